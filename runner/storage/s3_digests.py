"""S3 digests: whether the bytes that arrived are those that were stored, by what the store's answer says of them.

In:   the answer of a HEAD or GET; the bytes. Out: the name of the digest that they agree with; an error if they do not.
Never: requests, retries.

A connection or a proxy can flip a bit. botocore notices that where the answer has a checksum header, which many stores
and proxies leave out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from runner.errors import StorageUnavailable

__all__ = ["DIGEST_KEY", "check_digests", "expected_digests"]

DIGEST_KEY = "sha256"  # of an object's metadata, where this runner stored it
_MD5, _SHA256 = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")

_DIRECTORY_BUCKET = "--x-s3"  # how S3 Express names its buckets end, whose ETags are no digests


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self.value = 0

    def update(self, data: bytes, /) -> None:
        self.value = zlib.crc32(data, self.value)

    def hexdigest(self) -> str:
        return f"{self.value:08x}"


_HASHES: dict[str, Callable[[], _Hash]] = {
    "sha256": hashlib.sha256,
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "crc32": _Crc32,
}


def expected_digests(answer: Mapping[str, Any], bucket: str = "") -> list[tuple[str, str]]:
    """(name, lower-case hex) of each digest of the whole content that the answer of a HEAD or GET gives.

    The sha256 in the metadata. The ETag, if it can be the MD5: it has 32 hexadecimal digits, neither a KMS key nor the
    caller's own encrypts the object, and `bucket` is no directory bucket. The checksums of the full object, which are
    there if `ChecksumMode=ENABLED` asked for them.
    Empty for an object of several parts that another program stored: its ETag is a digest of digests.
    """
    found = []
    metadata = {key.lower(): value for key, value in answer.get("Metadata", {}).items()}
    if _SHA256.fullmatch(metadata.get(DIGEST_KEY, "")):
        found.append(("sha256", metadata[DIGEST_KEY]))
    etag = answer.get("ETag", "").strip('"').lower()
    own_key = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or answer.get("SSECustomerAlgorithm")
    if _MD5.fullmatch(etag) and not own_key and not bucket.endswith(_DIRECTORY_BUCKET):
        found.append(("md5", etag))
    if answer.get("ChecksumType") == "FULL_OBJECT":
        for name in ("sha256", "sha1", "crc32"):
            try:
                checksum = base64.b64decode(answer.get(f"Checksum{name.upper()}", ""), validate=True).hex()
            except binascii.Error:
                continue
            if checksum:
                found.append((name, checksum))
    return found


def check_digests(expected: Iterable[tuple[str, str]], blocks: Callable[[], Iterable[bytes]], where: object) -> str:
    """The name of the first of the `expected` digests that the content agrees with; "" if none is expected.

    One is enough, as some stores give ETags that look like an MD5 and are none. `blocks` gives the content from its
    beginning each time. Raises StorageUnavailable if the content agrees with none.
    """
    differing = []
    for name, digest in expected:
        hashed = _HASHES[name]()
        for block in blocks():
            hashed.update(block)
        if hashed.hexdigest() == digest:
            return name
        differing.append(f"{name} {digest} was stored, {hashed.hexdigest()} arrived")
    if differing:
        todo = "Try again; if it stays so, the object is damaged or a proxy changes it: upload it again"
        raise StorageUnavailable(
            f"other bytes arrived than were stored: {'; '.join(differing)}", where=where, todo=todo
        )
    return ""
