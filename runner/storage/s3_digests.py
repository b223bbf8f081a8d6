"""S3 digests: check that the bytes that arrived are the stored ones, by the digests in the store's answer.

In:   the answer of a HEAD or GET; the bytes. Out: the name of the digest that matches, or an error.
Never: requests, retries.

A connection or a proxy can flip a bit. botocore detects that only if the answer has a checksum header, which many
stores and proxies leave out.
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

DIGEST_KEY = "sha256"  # key in the metadata of objects that this runner stored
_MD5, _SHA256 = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")

_DIRECTORY_BUCKET = "--x-s3"  # end of the names of S3 Express buckets, whose ETags are not digests


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
    """Return (name, lower-case hex) of each digest of the whole content in the answer to a HEAD or GET.

    These are: the sha256 in the metadata; the ETag, if it can be the MD5 (32 hexadecimal digits, no encryption by KMS
    or by the caller's key, no directory bucket); the checksums of the full object (sent with `ChecksumMode=ENABLED`).
    The list is empty for an object of several parts that another program stored: its ETag is a digest of digests.
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
    """Return the name of the first of the `expected` digests that matches the content; "" if none is expected.

    One match is enough, as ETags of some stores look like an MD5 but are not. Each call of `blocks` gives the content
    from its beginning. Raises StorageUnavailable if no digest matches.
    """
    differing = []
    for name, digest in expected:
        hashed = _HASHES[name]()
        for block in blocks():
            hashed.update(block)
        if hashed.hexdigest() == digest:
            return name
        differing.append(f"{name} {digest} was stored, but {hashed.hexdigest()} arrived")
    if differing:
        todo = "Run the same command again. If it fails again, upload the object again, or check the proxies"
        raise StorageUnavailable(
            f"the bytes that arrived are not the stored ones: {'; '.join(differing)}", where=where, todo=todo
        )
    return ""
