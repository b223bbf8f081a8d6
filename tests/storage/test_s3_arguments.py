"""S3 arguments: which are taken, and of which types."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from boto3.s3.transfer import S3Transfer

from runner.errors import ConfigInvalid
from runner.storage import open_storage, stat_input
from runner.storage.s3_arguments import upload_arguments


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"SSEKMSKeyID": "x"}', "SSEKMSKeyID"),
        ('{"ChecksumSHA256": "x"}', "ChecksumSHA256"),
        ('{"Body": "x"}', "Body"),
    ],
)
def test_extra_arguments_are_checked(text: str, said: str) -> None:
    with pytest.raises(ConfigInvalid, match=said) as caught:
        upload_arguments({"VIDEO_LAB_S3_EXTRA": text})
    assert "VIDEO_LAB_S3_EXTRA" in caught.value.message
    with pytest.raises(ConfigInvalid, match="ServerSideEncryption"):  # lists what there is
        upload_arguments({"VIDEO_LAB_S3_EXTRA": '{"Nonsense": "x"}'})


def test_extra_arguments_are_all_of_boto3s_but_those_of_one_file() -> None:
    refused = set()
    other = {"Metadata": {"run": "7"}} | dict.fromkeys(["Expires", "ObjectLockRetainUntilDate"], "2030-01-31T12:00:00Z")
    for name in S3Transfer.ALLOWED_UPLOAD_ARGS:
        value = other.get(name, "x")
        try:
            assert upload_arguments({"VIDEO_LAB_S3_EXTRA": json.dumps({name: value})}) == {name: value}
        except ConfigInvalid:
            refused.add(name)
    assert {"ChecksumSHA256", "MpuObjectSize"} <= refused
    assert all(name.startswith(("Checksum", "Mpu")) for name in refused)
    assert not {"ChecksumAlgorithm", "ServerSideEncryption", "SSEKMSKeyId", "ACL", "Tagging"} & refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"ServerSideEncryption": 5}', "ServerSideEncryption must be a string"),
        ('{"ServerSideEncryption": null}', "ServerSideEncryption must be a string"),
        ('{"StorageClass": ["GLACIER"]}', "StorageClass must be a string"),
        ('{"Metadata": "x"}', "Metadata must be an object of strings"),
        ('{"Metadata": {"run": 7}}', "Metadata must be an object of strings"),
        ('{"Metadata": {"run": {"a": [{}]}}}', "Metadata must be an object of strings"),
        ('{"Metadata": {"run": "a\\nb"}}', "Metadata has a control character"),
        ('{"ContentLanguage": "a\\r\\nb"}', "ContentLanguage has a control character"),
        ('{"Expires": "tomorrow"}', "Expires must be a time"),
        ('{"SSECustomerKey": ["top secret"]}', "SSECustomerKey must be a string"),
    ],
)
def test_types_of_extra_arguments_are_checked(text: str, said: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"VIDEO_LAB_S3_EXTRA: {said}") as caught:
        upload_arguments({"VIDEO_LAB_S3_EXTRA": text})
    assert "top secret" not in caught.value.message


def test_without_the_variable_there_are_none() -> None:
    assert upload_arguments({}) == upload_arguments({"VIDEO_LAB_S3_EXTRA": "  "}) == {}


@pytest.mark.parametrize("ask", [open_storage, lambda uri: stat_input(f"{uri}/x.mp4")])
def test_a_wrong_argument_is_a_configuration_error_and_no_fault_of_an_input(
    ask: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDEO_LAB_S3_EXTRA", '{"StorageClass": 3}')
    with pytest.raises(ConfigInvalid, match="VIDEO_LAB_S3_EXTRA: StorageClass"):
        ask("s3://bucket")
