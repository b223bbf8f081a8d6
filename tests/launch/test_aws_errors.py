"""AWS errors: answers and exceptions of botocore by what a user can do about them."""

from __future__ import annotations

import botocore.exceptions
import pytest
from botocore.exceptions import ClientError

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid
from runner.launch.aws_errors import aws_error, aws_errors

IAM = "User: arn:aws:iam::123456789012:user/x is not authorized to perform: {} on resource: y"


def answer(status: int, code: str, message: str, operation: str = "SubmitJob") -> ClientError:
    body = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(body, operation)


@pytest.mark.parametrize(
    ("status", "code", "message", "error", "words"),
    [
        (403, "AccessDeniedException", IAM.format("batch:SubmitJob"), ClusterDenied, "allow batch:SubmitJob"),
        (400, "ClientException", IAM.format("iam:PassRole"), ClusterDenied, "allow iam:PassRole"),
        (403, "AccessDeniedException", "", ClusterDenied, "allow batch:SubmitJob"),
        (403, "UnrecognizedClientException", "The security token is invalid", ClusterDenied, "token is invalid"),
        (403, "InvalidSignatureException", "Signature expired", ClusterDenied, "Signature expired"),
        (400, "IncompleteSignature", "no", ClusterDenied, "Check the credentials"),
        (403, "ExpiredTokenException", "expired", ClusterDenied, "Renew the credentials"),
        (401, "Whatever", "", ClusterDenied, "Check the credentials"),
        (400, "ClientException", "no job queue x", ConfigInvalid, "no job queue x"),
        (404, "NotFound", "", ConfigInvalid, "NotFound"),
        (400, "ThrottlingException", "Rate exceeded", ClusterUnavailable, "later"),
        (429, "TooManyRequestsException", "", ClusterUnavailable, "later"),
        (500, "ServerException", "", ClusterUnavailable, "later"),
        (503, "", "", ClusterUnavailable, "503"),
    ],
)
def test_answers(status, code, message, error, words):
    found = aws_error(answer(status, code, message), "AWS Batch")
    assert type(found) is error
    assert words in found.message
    assert found.where == "AWS Batch"


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (botocore.exceptions.NoCredentialsError(), ClusterDenied),
        (botocore.exceptions.PartialCredentialsError(provider="env", cred_var="x"), ClusterDenied),
        (botocore.exceptions.SSOTokenLoadError(error_msg="x"), ClusterDenied),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="x"), ClusterUnavailable),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="x"), ClusterUnavailable),
        (botocore.exceptions.ConnectionClosedError(endpoint_url="x"), ClusterUnavailable),
        (ConnectionResetError("x"), ClusterUnavailable),
        (botocore.exceptions.NoRegionError(), ConfigInvalid),
        (botocore.exceptions.ProfileNotFound(profile="x"), ConfigInvalid),
        (ValueError("Invalid endpoint: x"), ConfigInvalid),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_exceptions(raised, error):
    with pytest.raises(error) as found, aws_errors("AWS Batch"):
        raise raised
    assert found.value.todo
    assert found.value.__cause__ is raised


def test_errors_of_our_own_pass():
    with pytest.raises(ConfigInvalid, match="ours"), aws_errors("AWS Batch"):
        raise ConfigInvalid("ours")
