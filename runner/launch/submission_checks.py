"""Submission checks: checks of a submission for all platforms, made before anything is sent.

In:   a value of the submission. Out: ConfigInvalid for a value that cannot work. Never: requests to a platform or
registry.
"""

from __future__ import annotations

import re

from runner.errors import ConfigInvalid

__all__ = ["check_image"]

# The reference format of the OCI distribution specification: [host[:port]/]path[:tag][@digest].
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[+._-][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?P<tag>:{_TAG})?(?P<digest>@{_DIGEST})?"
)


def check_image(image: str) -> None:
    """Raise ConfigInvalid for an image reference that is malformed, or has neither a tag nor a digest.

    Every explicit tag passes, also one that may move in the registry.
    """
    found = _IMAGE.fullmatch(image)
    if found is None:
        raise ConfigInvalid(
            f"{image!r} is not an image reference",
            where="--image",
            todo="Write [host[:port]/]name:tag, or name@sha256:… for exact bytes",
        )
    if found["tag"] is None and found["digest"] is None:
        raise ConfigInvalid(
            f"{image} has no tag: registries interpret this as `latest`, which changes over time. Tasks that start "
            "later, and retries, could run another version than the first tasks",
            where="--image",
            todo="Write name:tag, or name@sha256:… for exact bytes",
        )
