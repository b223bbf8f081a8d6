"""AWS errors: maps errors of botocore, of services other than S3, to the error codes of clusters.

In:   an exception. Out: the RunnerError that it is mapped to. Never: requests, retries; S3, see s3_errors.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid, RunnerError
from runner.storage.aws_answers import CAUSES, DENIED, DENIED_CODES, UNAVAILABLE, answer_status, error_code

__all__ = ["aws_error", "aws_errors"]

# Codes that the JSON services have beside those of S3.
_DENIED_CODES = {"IncompleteSignature", "InvalidClientTokenId", "InvalidSignatureException", "OptInRequired"}
_DENIED_CODES |= {"MissingAuthenticationToken", "MissingAuthenticationTokenException"}
_DENIED_CODES |= set(DENIED_CODES.split())
_BUSY = re.compile(r"Throttl|TooManyRequests|RequestLimit|SlowDown|ServiceUnavailable|Internal|Timeout", re.I)
_ACTION = re.compile(r"not authorized to perform:? ([A-Za-z0-9-]+:[A-Za-z0-9*]+)")  # IAM's sentence

_CREDENTIALS = "Give credentials in one of the usual ways: AWS_PROFILE, the AWS_… variables, a role of this machine"


@contextmanager
def aws_errors(where: str) -> Iterator[None]:
    """Raise botocore's errors as ClusterDenied, ClusterUnavailable or ConfigInvalid."""
    try:
        yield
    except (BotoCoreError, ClientError, OSError) as error:
        raise aws_error(error, where) from error
    except ValueError as error:  # botocore raises it for an endpoint that is not a URL
        raise ConfigInvalid(str(error), where=where, todo="Check AWS_ENDPOINT_URL and the region") from error


def aws_error(error: Exception, where: str) -> RunnerError:
    """Return the RunnerError for `error`, which botocore or the network raised."""
    if isinstance(error, ClientError):
        return _answer(error, where)
    names = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split()) or type(error).__name__
    if names & DENIED:
        return ClusterDenied(f"no usable credentials: {text}", where=where, todo=_CREDENTIALS)
    if names & UNAVAILABLE or not isinstance(error, BotoCoreError):
        todo = "Check the network, the region and AWS_ENDPOINT_URL, then run the same command"
        return ClusterUnavailable(f"cannot be reached: {text}", where=where, todo=todo)
    return ConfigInvalid(text, where=where, todo="Check the region (AWS_DEFAULT_REGION), the profile and the settings")


def _answer(error: ClientError, where: str) -> RunnerError:
    code, status, operation = error_code(error), answer_status(error), error.operation_name
    message = " ".join(str(error.response.get("Error", {}).get("Message") or "").split())
    text = f"{operation} was answered {code}" + (f" ({message})" if message else "")
    if code in CAUSES:
        return ClusterDenied(text, where=where, todo=CAUSES[code])
    action = _ACTION.search(message)
    if action or code in _DENIED_CODES or status in (401, 403):
        needed = action[1] if action else f"batch:{operation}"
        return ClusterDenied(text, where=where, todo=f"Check the credentials, and that they allow {needed}")
    if _BUSY.search(code) or status == 429 or status >= 500:
        return ClusterUnavailable(text, where=where, todo="The service is busy or failed: run the same command later")
    return ConfigInvalid(text, where=where, todo="Correct what the message names")
