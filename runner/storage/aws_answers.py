"""AWS answers: what errors of botocore and of AWS's services mean, whichever service was asked.

Out:  names of botocore's exceptions and codes of answers, by what they mean; the code of an answer.
Never: what an error of S3 alone means, see s3_errors.py.
"""

from __future__ import annotations

from botocore.exceptions import ClientError

__all__ = ["CAUSES", "DENIED", "DENIED_CODES", "UNAVAILABLE", "answer_status", "error_code"]

# By class name, as not every release that we allow has every class. A subclass belongs where its base class does;
# every other error of botocore is of the configuration, and every other one of boto3 is a bug.
_UNAVAILABLE = """
    HTTPClientError ConnectionError ChecksumError FlexibleChecksumError AwsChunkedWrapperError IncompleteReadError
    MetadataRetrievalError RetriesExceededError S3TransferFailedError S3UploadFailedError S3DownloadFailedError
    S3CopyFailedError S3ValidationError CancelledError HTTPError HTTPException"""
_DENIED = """
    NoCredentialsError NoAuthTokenError TokenRetrievalError UnknownTokenProviderError PartialCredentialsError
    CredentialRetrievalError UnknownCredentialError RefreshWithMFAUnsupportedError SSOError LoginError"""
UNAVAILABLE, DENIED = frozenset(_UNAVAILABLE.split()), frozenset(_DENIED.split())

# The codes of answers that refuse the user. HEAD's answer has no body and gives its status instead.
DENIED_CODES = """
    401 403 AccessDenied AccessDeniedException AccountProblem AllAccessDisabled AuthorizationHeaderMalformed
    CrossLocationLoggingProhibited ExpiredToken ExpiredTokenException Forbidden InvalidAccessKeyId InvalidPayer
    InvalidSecurity InvalidToken KMS.DisabledException NotSignedUp RequestExpired RequestTimeTooSkewed
    SignatureDoesNotMatch TokenRefreshRequired Unauthorized UnauthorizedAccess UnrecognizedClientException"""

_RENEW = "Renew the credentials (with temporary ones AWS_SESSION_TOKEN too), then run the same command"
CAUSES = {  # refusals whose cause is known to be another than missing or wrong credentials
    "RequestTimeTooSkewed": "Set this machine's clock, for example by NTP: it differs too much from the store's",
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "RequestExpired": f"{_RENEW}; check this machine's clock too",
}


def error_code(error: ClientError) -> str:
    """The code of an answer, e.g. `NoSuchKey`; its status, e.g. `404`, where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code") or answer_status(error))


def answer_status(error: ClientError) -> int:
    """The HTTP status of an answer; 0 where there was none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
