"""S3 errors: turn errors of botocore, boto3 and s3transfer into RunnerErrors.

In:   an exception, where it happened, reading or writing. Out: a RunnerError.
Never: requests, retries. A test compares the tables with the libraries.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3transfer.exceptions
import urllib3.exceptions
from boto3.exceptions import Boto3Error
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
from runner.storage.aws_answers import CAUSES, DENIED, DENIED_CODES, UNAVAILABLE, answer_status, error_code
from runner.storage.disk import os_error

__all__ = ["CLIENT_CODES", "FOREIGN_ERRORS", "missing_bucket", "s3_errors", "storage_error"]

FOREIGN_ERRORS = (
    BotoCoreError,
    ClientError,
    Boto3Error,
    s3transfer.exceptions.RetriesExceededError,
    s3transfer.exceptions.S3UploadFailedError,
    s3transfer.exceptions.S3DownloadFailedError,
    s3transfer.exceptions.S3CopyFailedError,
    s3transfer.exceptions.S3ValidationError,
    concurrent.futures.CancelledError,  # s3transfer's CancelledError and FatalError are subclasses
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)

_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)  # OSErrors of the network and not of a disk

# The codes of S3's answers. The answer to a HEAD has no body; its status counts instead.
_CODES: dict[type[RunnerError], str] = {
    StorageDenied: DENIED_CODES,
    InputNotFound: "404 410 NoSuchBucket NoSuchKey NoSuchVersion NotFound",
    InputUnreadable: "InvalidObjectState",
    StorageUnavailable: """
        408 409 412 416 429 500 502 503 504 BadDigest BandwidthLimitExceeded ConditionalRequestConflict IncompleteBody
        InternalError InternalServerError InvalidDigest InvalidPart InvalidRange NoSuchUpload OperationAborted
        PreconditionFailed PriorRequestNotComplete RequestLimitExceeded RequestThrottled RequestThrottledException
        RequestTimeout RequestTimeoutException ServiceUnavailable SlowDown ThrottledException Throttling
        ThrottlingException TooManyRequestsException XAmzContentChecksumMismatch XAmzContentSHA256Mismatch""",
    StorageFull: "507 InsufficientStorage QuotaExceeded XMinioAdminBucketQuotaExceeded XMinioStorageFull",
    ConfigInvalid: """
        301 307 400 405 501 EntityTooLarge EntityTooSmall IllegalLocationConstraintException InvalidArgument
        InvalidBucketName InvalidEncryptionAlgorithmError InvalidRequest InvalidStorageClass InvalidTag
        InvalidURI KMS.InvalidKeyUsageException KMS.InvalidStateException KMS.NotFoundException KeyTooLongError
        MalformedXML MetadataTooLarge MethodNotAllowed NotImplemented PermanentRedirect TemporaryRedirect""",
}
CLIENT_CODES = {code: kind for kind, codes in _CODES.items() for code in codes.split()}

_REMEDIES: dict[type[RunnerError], str] = {
    StorageUnavailable: "The storage may be busy or unreachable. Check AWS_ENDPOINT_URL_S3 and the network, then retry",
    StorageFull: "Free space or raise the quota there, then run the same command again",
    InputNotFound: "Check the bucket and the key",
    InputUnreadable: "The object is archived. Restore it first",
    ConfigInvalid: "Check the URI, AWS_ENDPOINT_URL_S3, the region and VIDEO_LAB_S3_EXTRA",
    InternalError: "This is a bug; please report it",
}
_PERMISSION = {
    "HeadObject": "s3:GetObject (and s3:ListBucket, as S3 else refuses requests for missing objects)",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
}


def storage_error(error: BaseException, *, where: object, writing: bool, disk: Path | None = None) -> RunnerError:
    """Return `error` as a RunnerError. `disk`: the local file of a transfer, which may be the cause."""
    if isinstance(error, RunnerError):
        return error
    if isinstance(error, ClientError):
        return _client_error(error, where=where, writing=writing)
    text = " ".join(str(error).split()) or type(error).__name__
    # botocore's errors first: its time-outs and TLS errors are OSErrors too
    if not isinstance(error, BotoCoreError):
        if isinstance(error, _NETWORK):
            return StorageUnavailable(
                f"{type(error).__name__}: {text}", where=where, todo=_REMEDIES[StorageUnavailable]
            )
        if isinstance(error, OSError):
            return os_error(error, where=disk or where, writing=writing or disk is not None)
    inner = error.__cause__ or error.__context__ or getattr(error, "last_exception", None)
    if isinstance(error, Boto3Error) and isinstance(inner, FOREIGN_ERRORS):
        return storage_error(inner, where=where, writing=writing, disk=disk)
    kind = _class_of_error(error)
    if kind is StorageDenied:
        return _denied(f"no usable credentials: {text}", where=where)
    return kind(f"{type(error).__name__}: {text}", where=where, todo=_remedy(kind, error))


def _class_of_error(error: BaseException) -> type[RunnerError]:
    names = {base.__name__ for base in type(error).__mro__}
    if names & DENIED:
        return StorageDenied
    if names & UNAVAILABLE:
        return StorageUnavailable
    return ConfigInvalid if isinstance(error, BotoCoreError) else InternalError


def _remedy(kind: type[RunnerError], error: BaseException) -> str:
    if type(error).__name__ == "SSLError":
        return "Check the server's certificate, or set AWS_CA_BUNDLE to your authority's certificates"
    return _REMEDIES[kind]


def _client_error(error: ClientError, *, where: object, writing: bool) -> RunnerError:
    code, status, operation = error_code(error), answer_status(error), error.operation_name
    message = str(error.response.get("Error", {}).get("Message") or "").strip()
    text = f"{operation} was answered {code}" + (f" ({message})" if message and message != code else "")
    kind = CLIENT_CODES.get(code) or _class_of_status(status)
    if code == "NoSuchBucket":
        return missing_bucket(str(where).partition("://")[2].partition("/")[0], where=where, writing=writing)
    if code in CAUSES:
        return StorageDenied(text, where=where, todo=CAUSES[code])
    if kind is StorageDenied:
        return _denied(text, where=where, operation=operation)
    if kind is InputNotFound and writing:  # the object to write need not exist, but its bucket must
        return ConfigInvalid(text, where=where, todo="Create the bucket first, or correct its name")
    return kind(text, where=where, todo=_REMEDIES[kind])


def missing_bucket(bucket: str, *, where: object, writing: bool) -> RunnerError:
    """Return the error for a bucket that does not exist."""
    what = f"the bucket {bucket} does not exist"
    if writing:
        return ConfigInvalid(what, where=where, todo="Create the bucket first, or correct its name")
    return BucketMissing(what, where=where, todo="Check its name, the region and AWS_ENDPOINT_URL_S3")


def _class_of_status(status: int) -> type[RunnerError]:
    """Return the error class for an unknown code, by the status of its answer."""
    known = CLIENT_CODES.get(str(status))
    if known is not None:
        return known
    return ConfigInvalid if 300 <= status < 500 else StorageUnavailable


def _denied(what: str, *, where: object, operation: str = "") -> StorageDenied:
    allow = _PERMISSION.get(operation, "s3:PutObject" if operation else "")
    return StorageDenied(
        what,
        where=where,
        todo="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, mount ~/.aws, or give the machine a role"
        + (f" that allows {allow}" if allow else ""),
    )


@contextmanager
def s3_errors(where: object, *, writing: bool, disk: Path | None = None) -> Iterator[None]:
    """Raise errors of boto3 in the block as RunnerErrors."""
    try:
        yield
    except FOREIGN_ERRORS as err:
        raise storage_error(err, where=where, writing=writing, disk=disk) from err
