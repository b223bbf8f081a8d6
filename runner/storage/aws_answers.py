"""AWS answers: classify errors of botocore and of AWS's services, for any service.

Out:  names of botocore's exceptions and codes of answers, by meaning; the code of an answer.
Never: errors that only S3 has, see s3_errors.py.
"""

from __future__ import annotations

from botocore.exceptions import ClientError

__all__ = ["CAUSES", "DENIED", "DENIED_CODES", "UNAVAILABLE", "answer_status", "error_code"]

# By class name, as not every supported release has every class. A subclass counts like its base class. All other errors
# of botocore are errors of the configuration; all other errors of boto3 are bugs.
_UNAVAILABLE = """
    HTTPClientError ConnectionError ChecksumError FlexibleChecksumError AwsChunkedWrapperError IncompleteReadError
    MetadataRetrievalError RetriesExceededError S3TransferFailedError S3UploadFailedError S3DownloadFailedError
    S3CopyFailedError S3ValidationError CancelledError HTTPError HTTPException"""
_DENIED = """
    NoCredentialsError NoAuthTokenError TokenRetrievalError UnknownTokenProviderError PartialCredentialsError
    CredentialRetrievalError UnknownCredentialError RefreshWithMFAUnsupportedError SSOError LoginError"""
UNAVAILABLE, DENIED = frozenset(_UNAVAILABLE.split()), frozenset(_DENIED.split())

# Codes of answers that refuse the user. The answer to a HEAD has no body; its status counts instead.
DENIED_CODES = """
    401 403 AccessDenied AccessDeniedException AccountProblem AllAccessDisabled AuthorizationHeaderMalformed
    CrossLocationLoggingProhibited ExpiredToken ExpiredTokenException Forbidden InvalidAccessKeyId InvalidPayer
    InvalidSecurity InvalidToken KMS.DisabledException NotSignedUp RequestExpired RequestTimeTooSkewed
    SignatureDoesNotMatch TokenRefreshRequired Unauthorized UnauthorizedAccess UnrecognizedClientException"""

_RENEW = "Renew the credentials (temporary ones: AWS_SESSION_TOKEN too), then run the same command again"
CAUSES = {  # refusals with a cause other than missing or wrong credentials
    "RequestTimeTooSkewed": "Set this machine's clock, for example by NTP. It differs too much from the store's clock",
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "RequestExpired": f"{_RENEW}. Check this machine's clock too",
}


def error_code(error: ClientError) -> str:
    """Return the code of an answer, e.g. `NoSuchKey`; its status, e.g. `404`, if the answer has no body."""
    return str(error.response.get("Error", {}).get("Code") or answer_status(error))


def answer_status(error: ClientError) -> int:
    """Return the HTTP status of an answer; 0 if there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
