"""S3 errors: where every error of the libraries and every code of an answer belongs."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3.exceptions
import botocore
import botocore.exceptions
import pytest
import s3transfer.exceptions
from botocore.exceptions import BotoCoreError, ClientError

from runner.errors import (
    BucketMissing,
    ConfigInvalid,
    InputNotFound,
    InputUnreadable,
    InternalError,
    RunnerError,
    StorageDenied,
    StorageFull,
    StorageUnavailable,
)
from runner.storage.s3_errors import CLIENT_CODES, FOREIGN_ERRORS, storage_error


def all_subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from all_subclasses(child)


def import_all(package: Any) -> None:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not any(part in module.name for part in (".vendored", "crt", ".docs")):
            importlib.import_module(module.name)


# Which errors of the libraries are of the network or the store, and which of the credentials.
UNAVAILABLE = {
    *("HTTPClientError", "ConnectionClosedError", "ReadTimeoutError", "ResponseStreamingError", "ConnectionError"),
    *("EndpointConnectionError", "SSLError", "ConnectTimeoutError", "ProxyConnectionError", "ChecksumError"),
    *("IncompleteReadError", "MetadataRetrievalError", "AwsChunkedWrapperError", "FlexibleChecksumError"),
    *("RetriesExceededError", "S3TransferFailedError", "S3UploadFailedError", "S3DownloadFailedError"),
    *("S3CopyFailedError", "S3ValidationError", "CancelledError", "FatalError"),
}
DENIED = {
    *("NoCredentialsError", "NoAuthTokenError", "TokenRetrievalError", "UnknownTokenProviderError"),
    *("PartialCredentialsError", "CredentialRetrievalError", "UnknownCredentialError", "SSOError", "SSOTokenLoadError"),
    *("RefreshWithMFAUnsupportedError", "UnauthorizedSSOTokenError", "LoginError", "LoginRefreshRequired"),
    *("LoginInsufficientPermissions", "LoginTokenLoadError", "LoginAuthorizationCodeError"),
}
# Errors whose names sound like one of those, and which are of the configuration or of other services.
OTHERS = {
    *("InvalidRetryConfigurationError", "InvalidRetryModeError", "InvalidMaxRetryAttemptsError"),
    *("InvalidChecksumConfigError", "UnseekableStreamError"),
}
TELLING = re.compile(
    r"Credential|Auth(?!orizationCode)|Token|SSO|Login|MFA|Connect|Timeout|Stream|Read|Retr|Checksum|Transfer"
)


def foreign_errors() -> set[type]:
    """Every error class of the libraries."""
    for package in (botocore, boto3, s3transfer):
        import_all(package)
    bases = (BotoCoreError, boto3.exceptions.Boto3Error)
    foreign = {kind for base in bases for kind in all_subclasses(base)}
    foreign |= {kind for kind in vars(s3transfer.exceptions).values() if isinstance(kind, type)}
    libraries = ("botocore", "boto3", "s3transfer")
    return {kind for kind in foreign if kind.__module__.partition(".")[0] in libraries}


def made(kind: type) -> Any:
    error = kind.__new__(kind)
    Exception.__init__(error, "something")
    return error


def test_every_foreign_error_has_a_home() -> None:
    foreign = foreign_errors()
    assert len(foreign) > 80
    misused = {"TransferNotDoneError", "InvalidSubscriberMethodError"}  # of the transfer manager: bugs, not answers
    for kind in foreign:
        if kind.__name__ in misused:
            continue
        assert issubclass(kind, FOREIGN_ERRORS), f"{kind} would pass s3_errors uncaught"
        default = ConfigInvalid if issubclass(kind, BotoCoreError) else InternalError
        lists = ((UNAVAILABLE, StorageUnavailable), (DENIED, StorageDenied))
        home = next((home for names, home in lists if kind.__name__ in names), default)
        for writing in (True, False):
            assert type(storage_error(made(kind), where="s3://b/k", writing=writing)) is home, kind


def test_no_new_error_is_taken_for_one_of_the_configuration() -> None:
    """A later botocore may have more errors of the network or the credentials, which a rerun or a person mends."""
    names = {kind.__name__ for kind in foreign_errors() if issubclass(kind, BotoCoreError)}
    sound_so = {name for name in names if TELLING.search(name)}
    assert not sound_so - UNAVAILABLE - DENIED - OTHERS, "add to s3_errors, or to OTHERS here"


@pytest.mark.parametrize("kind", ["SSLError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyConnectionError"])
def test_a_failed_connection_is_not_the_disks_fault(kind: str, tmp_path: Path) -> None:
    """Of botocore's errors, these are OSErrors too."""
    error = storage_error(
        made(getattr(botocore.exceptions, kind)), where="s3://b/k", writing=False, disk=tmp_path / "x"
    )
    assert (type(error), error.where) == (StorageUnavailable, "s3://b/k")
    assert ("AWS_CA_BUNDLE" if kind == "SSLError" else "AWS_ENDPOINT_URL_S3") in (error.todo or "")


def answer(code: str, status: int, operation: str = "GetObject") -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": "words"}, "ResponseMetadata": {"HTTPStatusCode": status}}, operation
    )


@pytest.mark.parametrize(
    ("code", "status", "reading", "writing"),
    [
        ("AccessDenied", 403, StorageDenied, StorageDenied),
        ("403", 403, StorageDenied, StorageDenied),
        ("InvalidAccessKeyId", 403, StorageDenied, StorageDenied),
        ("SignatureDoesNotMatch", 403, StorageDenied, StorageDenied),
        ("ExpiredToken", 400, StorageDenied, StorageDenied),
        ("SomethingNew", 403, StorageDenied, StorageDenied),
        ("404", 404, InputNotFound, ConfigInvalid),
        ("NoSuchKey", 404, InputNotFound, ConfigInvalid),
        ("NoSuchBucket", 404, BucketMissing, ConfigInvalid),
        ("InvalidObjectState", 403, InputUnreadable, InputUnreadable),
        ("SlowDown", 503, StorageUnavailable, StorageUnavailable),
        ("RequestTimeout", 400, StorageUnavailable, StorageUnavailable),
        ("InternalError", 500, StorageUnavailable, StorageUnavailable),
        ("500", 500, StorageUnavailable, StorageUnavailable),
        ("SomethingNew", 599, StorageUnavailable, StorageUnavailable),
        ("SomethingNew", 0, StorageUnavailable, StorageUnavailable),
        ("", 503, StorageUnavailable, StorageUnavailable),
        ("BadDigest", 400, StorageUnavailable, StorageUnavailable),
        ("PreconditionFailed", 412, StorageUnavailable, StorageUnavailable),
        ("QuotaExceeded", 403, StorageFull, StorageFull),
        ("InsufficientStorage", 507, StorageFull, StorageFull),
        ("InvalidBucketName", 400, ConfigInvalid, ConfigInvalid),
        ("PermanentRedirect", 301, ConfigInvalid, ConfigInvalid),
        ("KMS.NotFoundException", 400, ConfigInvalid, ConfigInvalid),
        ("SomethingNew", 418, ConfigInvalid, ConfigInvalid),
    ],
)
def test_answers(code: str, status: int, reading: type[RunnerError], writing: type[RunnerError]) -> None:
    for is_writing, kind in ((False, reading), (True, writing)):
        error = storage_error(answer(code, status), where="s3://bucket/key", writing=is_writing)
        assert type(error) is kind
        what = "the bucket bucket does not exist" if code == "NoSuchBucket" else "GetObject was answered "
        assert error.message.startswith(f"s3://bucket/key: {what}")
        assert error.todo


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("RequestTimeTooSkewed", "clock"),
        ("ExpiredToken", "Renew the credentials"),
        ("ExpiredTokenException", "Renew the credentials"),
        ("TokenRefreshRequired", "Renew the credentials"),
        ("RequestExpired", "Renew the credentials"),
    ],
)
@pytest.mark.parametrize("writing", [True, False])
def test_refusals_with_a_known_cause_say_so(code: str, advice: str, writing: bool) -> None:
    error = storage_error(answer(code, 403, "PutObject"), where="s3://b/k", writing=writing)
    assert type(error) is StorageDenied
    assert advice in (error.todo or "")
    assert "Set AWS_ACCESS_KEY_ID" not in error.message


def test_no_code_has_two_homes() -> None:
    from runner.storage import s3_errors as module

    assert sum(len(names.split()) for names in module._CODES.values()) == len(CLIENT_CODES)
    assert not module.UNAVAILABLE & module.DENIED


def test_a_wrapped_answer_is_unwrapped() -> None:
    """boto3's own wrapper keeps only the text of what it wraps."""
    try:
        try:
            raise answer("AccessDenied", 403, "PutObject")
        except ClientError as err:
            raise boto3.exceptions.S3UploadFailedError(str(err))  # noqa: B904  as boto3 does
    except boto3.exceptions.S3UploadFailedError as err:
        error = storage_error(err, where="s3://b/k", writing=True)
    assert type(error) is StorageDenied
    assert "s3:PutObject" in error.message


def test_disk_and_network_are_told_apart(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    assert storage_error(full, where="s3://b/k", writing=False, disk=tmp_path / "x").where == str(tmp_path / "x")
    for lost in (ConnectionResetError(104, "reset"), TimeoutError("slow"), BrokenPipeError(32, "pipe")):
        error = storage_error(lost, where="s3://b/k", writing=False, disk=tmp_path / "x")
        assert (type(error), error.where) == (StorageUnavailable, "s3://b/k")


def test_refusals_say_which_right_is_missing() -> None:
    for operation, right in [("HeadObject", "s3:ListBucket"), ("PutObject", "s3:PutObject"), ("X", "s3:PutObject")]:
        assert right in storage_error(answer("403", 403, operation), where="s3://b/k", writing=True).message
