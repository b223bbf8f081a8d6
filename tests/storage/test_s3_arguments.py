"""S3 arguments: which are taken, and of which types."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from boto3.s3.transfer import S3Transfer

from runner.errors import ConfigInvalid
from runner.storage import open_storage, probe_writable
from runner.storage.s3_arguments import upload_arguments
from tests.s3_servers import S3Server


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
        upload_arguments({}, {"VIDEO_LAB_S3_EXTRA": text})
    assert "VIDEO_LAB_S3_EXTRA" in caught.value.message
    with pytest.raises(ConfigInvalid, match="ServerSideEncryption"):  # lists what there is
        upload_arguments({"Nonsense": "x"}, {})


def test_extra_arguments_are_all_of_boto3s_but_those_of_one_file() -> None:
    refused = set()
    other = {"Metadata": {"run": "7"}} | dict.fromkeys(["Expires", "ObjectLockRetainUntilDate"], "2030-01-31T12:00:00Z")
    for name in S3Transfer.ALLOWED_UPLOAD_ARGS:
        value = other.get(name, "x")
        try:
            assert upload_arguments({name: value}, {}) == {name: value}
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
        upload_arguments({}, {"VIDEO_LAB_S3_EXTRA": text})
    assert "top secret" not in caught.value.message
    with pytest.raises(ConfigInvalid, match="s3_extra: Tagging must be a string"):
        upload_arguments({"Tagging": {}}, {"VIDEO_LAB_S3_EXTRA": "{}"})


def test_flags_go_over_the_environment() -> None:
    environment = {"VIDEO_LAB_S3_EXTRA": '{"ACL": "private", "Tagging": "a=b"}'}
    assert upload_arguments({"ACL": "public-read"}, environment) == {"ACL": "public-read", "Tagging": "a=b"}
    assert upload_arguments(None, {"VIDEO_LAB_S3_EXTRA": "  "}) == {}


def test_argument_of_a_wrong_type_is_a_configuration_error(moto_s3: S3Server, aws_env: Callable[..., S3Server]) -> None:
    bucket = aws_env(moto_s3).make_bucket()
    with pytest.raises(ConfigInvalid, match="StorageClass"):
        probe_writable(open_storage(f"s3://{bucket}", s3_extra={"StorageClass": 3}))
