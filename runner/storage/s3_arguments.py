"""S3 arguments: the user's extra arguments for every upload, such as encryption or a storage class.

In:   VIDEO_LAB_S3_EXTRA (a JSON object). Out: arguments by boto3's names, checked against botocore's model of the
service. Never: requests.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from boto3.s3.transfer import S3Transfer
from botocore.loaders import create_loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator

from runner.errors import ConfigInvalid

__all__ = ["EXTRA_VARIABLE", "upload_arguments"]

EXTRA_VARIABLE = "VIDEO_LAB_S3_EXTRA"

_OF_ONE_FILE = re.compile(r"Checksum(?!Algorithm$|Type$)\w+|MpuObjectSize")  # right for one upload only
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def upload_arguments(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments for every upload from VIDEO_LAB_S3_EXTRA, a JSON object. Raises ConfigInvalid.

    The names are boto3's (`S3Transfer.ALLOWED_UPLOAD_ARGS`), without those that depend on one file's content.
    """
    text = environ.get(EXTRA_VARIABLE, "").strip()
    remedy = 'Write a JSON object such as {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/renders"}'
    try:
        extra = json.loads(text) if text else {}
    except (ValueError, RecursionError) as err:
        raise ConfigInvalid(f"the value is not JSON ({err})", where=EXTRA_VARIABLE, todo=remedy) from err
    if not isinstance(extra, dict):
        raise ConfigInvalid("the value is not a JSON object", where=EXTRA_VARIABLE, todo=remedy)
    allowed = [name for name in S3Transfer.ALLOWED_UPLOAD_ARGS if not _OF_ONE_FILE.fullmatch(name)]
    unknown = sorted(set(extra) - set(allowed))
    if unknown:
        raise ConfigInvalid(
            f"no upload argument is called {', '.join(unknown)}",
            where=EXTRA_VARIABLE,
            todo=f"Choose from {', '.join(sorted(allowed))}",
        )
    for name, value in extra.items():
        _check_type(name, value)
    return extra


_NEEDED = {
    "string": "a string",
    "boolean": "true or false",
    "integer": "a whole number",
    "map": 'an object of strings, such as {"run": "7"}',
    "timestamp": "a time, such as 2030-01-31T12:00:00Z",
}


def _check_type(name: str, value: Any) -> None:
    """Raise ConfigInvalid if the argument does not have the type of botocore's model of the service.

    The value is not shown, as it may be an encryption key.
    """
    shape = _upload_shapes().get(name)
    if shape is not None and ParamValidator().validate(value, shape).has_errors():
        needed = _NEEDED.get(shape.type_name, f"a {shape.type_name}")
        raise ConfigInvalid(f"{name} must be {needed}", where=EXTRA_VARIABLE, todo="Correct its value")
    texts = [*value.keys(), *value.values()] if isinstance(value, dict) else [str(value)]
    if name != "SSECustomerKey" and any(
        _CONTROL.search(text) for text in texts
    ):  # an encryption key may contain any bytes
        raise ConfigInvalid(f"{name} has a control character", where=EXTRA_VARIABLE, todo="Correct its value")


@functools.cache
def _upload_shapes() -> dict[str, Any]:
    """Return upload argument → its shape. Loaded without a session, which would read the AWS configuration."""
    service = ServiceModel(create_loader().load_service_model("s3", "service-2"), "s3")
    names = ("CreateMultipartUpload", "PutObject")
    return {k: v for name in names for k, v in service.operation_model(name).input_shape.members.items()}
