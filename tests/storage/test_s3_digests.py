"""S3 digests: which of a store's words about an object can be held against its bytes, and flipped bits."""

from __future__ import annotations

import base64
import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.errors import StorageUnavailable
from runner.storage import fetch_input_with_info
from runner.storage.s3 import S3Storage
from runner.storage.s3_digests import check_digests, expected_digests
from tests.s3_servers import FaultyServer, S3Server

DATA = b"what was stored"
MD5, SHA256 = hashlib.md5(DATA).hexdigest(), hashlib.sha256(DATA).hexdigest()
CRC32 = zlib.crc32(DATA).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ({"ETag": f'"{MD5}"'}, ["md5"]),
        ({"ETag": MD5.upper()}, ["md5"]),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "AES256"}, ["md5"]),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms"}, []),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms:dsse"}, []),
        ({"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256"}, []),
        ({"ETag": f'"{MD5}-3"'}, []),
        ({"ETag": '"0123"'}, []),
        ({}, []),
        ({"ETag": f'"{MD5}-3"', "Metadata": {"sha256": SHA256}}, ["sha256"]),
        ({"ETag": f'"{MD5}-3"', "Metadata": {"Sha256": SHA256}}, ["sha256"]),
        ({"ETag": f'"{MD5}-3"', "Metadata": {"sha256": "of something else"}}, []),
        ({"ChecksumType": "FULL_OBJECT", "ChecksumCRC32": base64.b64encode(CRC32).decode()}, ["crc32"]),
        ({"ChecksumType": "COMPOSITE", "ChecksumCRC32": base64.b64encode(CRC32).decode()}, []),
        ({"ChecksumType": "FULL_OBJECT", "ChecksumCRC32": "not base64 -"}, []),
    ],
)
def test_expected_digests_of_answer_are_checked_against_bytes(answer: dict[str, Any], names: list[str]) -> None:
    expected = expected_digests(answer)
    assert [name for name, _ in expected] == names
    assert check_digests(expected, lambda: [DATA[:3], DATA[3:]], "s3://b/k") == (names[0] if names else "")
    if names:
        with pytest.raises(
            StorageUnavailable,
            match=f"s3://b/k: the bytes that arrived are not.* {names[0]} {expected[0][1]} was stored",
        ):
            check_digests(expected, lambda: [DATA[:-1] + b"e"], "s3://b/k")


def test_etag_that_is_no_md5_passes_with_matching_sha256() -> None:
    """One matching digest is enough."""
    answer = {"ETag": '"' + "0" * 32 + '"', "ChecksumType": "FULL_OBJECT"}
    answer["ChecksumSHA256"] = base64.b64encode(bytes.fromhex(SHA256)).decode()
    assert check_digests(expected_digests(answer), lambda: [DATA], "s3://b/k") == "sha256"


def test_etag_of_directory_bucket_is_no_digest() -> None:
    assert expected_digests({"ETag": f'"{MD5}"'}, "videos--use1-az5--x-s3") == []
    assert expected_digests({"ETag": f'"{MD5}"'}, "videos") == [("md5", MD5)]


# Over a line that flips bits and says nothing of it


@pytest.fixture
def line(faulty_s3: FaultyServer, aws_env: Callable[..., S3Server]) -> FaultyServer:
    aws_env(faulty_s3, AWS_MAX_ATTEMPTS="1")
    return faulty_s3


@pytest.fixture
def store(line: FaultyServer) -> S3Storage:
    return S3Storage(f"s3://{line.make_bucket()}/pre", sleep=lambda _: None)


def upload_foreign(line: FaultyServer, store: S3Storage, key: str, data: bytes, **arguments: str) -> None:
    line.client.put_object(Bucket=store.bucket, Key=f"pre/{key}", Body=data, **arguments)


def upload_foreign_parts(line: FaultyServer, store: S3Storage, key: str, data: bytes) -> None:
    where = {"Bucket": store.bucket, "Key": f"pre/{key}"}
    upload = where | {"UploadId": line.client.create_multipart_upload(**where)["UploadId"]}
    half = len(data) // 2
    parts = []
    for number, part in enumerate((data[:half], data[half:]), 1):
        etag = line.client.upload_part(**upload, PartNumber=number, Body=part)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
    line.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})


@pytest.mark.parametrize(("size", "foreign"), [(1000, True), (1000, False), (20 << 20, False), (20 << 20, True)])
def test_fetch_with_flipped_bit_is_repeated_then_refused(
    line: FaultyServer, store: S3Storage, tmp_path: Path, size: int, foreign: bool
) -> None:
    """Small objects and ranges, stored by another program (its ETag is the digest) or by this one in 1 part or more."""
    data = os.urandom(size)
    if foreign:
        upload_foreign(line, store, "dance.mp4", data)
    else:
        (tmp_path / "source").write_bytes(data)
        store.publish(tmp_path / "source", "dance.mp4")
    line.fail("flip", "GET", "dance.mp4")
    moved: list[int] = []
    info = store.fetch("dance.mp4", tmp_path / "copy", on_bytes=moved.append)
    assert (tmp_path / "copy").read_bytes() == data
    assert info.verified == ("md5" if foreign else "sha256")
    assert sum(moved) == size
    line.fail("flip", "GET", "dance.mp4", times=1000)
    digest = hashlib.new(info.verified, data).hexdigest()
    with pytest.raises(
        StorageUnavailable, match=rf"dance\.mp4: the bytes that arrived are not the stored ones.*{digest} was stored"
    ) as caught:
        store.fetch("dance.mp4", tmp_path / "copy")
    assert caught.value.retryable
    assert (tmp_path / "copy").read_bytes() == data


def test_read_of_small_object_with_flipped_bit_is_repeated_then_refused(line: FaultyServer, store: S3Storage) -> None:
    upload_foreign(line, store, "foreign.json", b'{"seed": 1}')
    store.write_bytes("ours.json", b'{"seed": 1}')
    store.write_if("conditional.json", b'{"seed": 1}', None)
    for key in ("foreign.json", "ours.json", "conditional.json"):
        line.fail("flip", "GET", key)
        assert store.read_bytes(key) == b'{"seed": 1}'
        assert len(line.seen("GET", key)) == 2
        line.fail("flip", "GET", key, times=1000)
        with pytest.raises(StorageUnavailable, match="are not the stored ones"):
            store.read_versioned(key)


def test_fetch_with_kms_key_is_verified_by_metadata(line: FaultyServer, store: S3Storage, tmp_path: Path) -> None:
    own = S3Storage(store.root, extra={"ServerSideEncryption": "aws:kms"}, sleep=lambda _: None)
    own.write_bytes("x", b"data")
    line.fail("flip", "GET", "/x")
    assert own.fetch("x", tmp_path / "x").verified == "sha256"
    assert (tmp_path / "x").read_bytes() == b"data"


def test_fetch_that_cannot_be_verified_is_marked_unverified(
    line: FaultyServer, store: S3Storage, tmp_path: Path
) -> None:
    """Objects with several parts or a KMS key, and without metadata of this program: their ETag is no digest."""
    parts = os.urandom(6 << 20) * 2
    upload_foreign_parts(line, store, "parts.mp4", parts)
    upload_foreign(line, store, "kms.mp4", b"data", ServerSideEncryption="aws:kms")
    for key, data in [("parts.mp4", parts), ("kms.mp4", b"data")]:
        got = fetch_input_with_info(store.uri(key), tmp_path / "inputs")
        assert got.path.read_bytes() == data
        assert got.unverified
        assert got.info == store.stat(key)
        assert got.info.verified == ""
    store.write_bytes("ours.mp4", b"data")
    assert not fetch_input_with_info(store.uri("ours.mp4"), tmp_path / "inputs").unverified
    (tmp_path / "local.mp4").write_bytes(b"data")
    assert not fetch_input_with_info(tmp_path / "local.mp4", tmp_path / "inputs").unverified


def test_fetch_with_customer_key_is_verified_by_metadata(line: FaultyServer, store: S3Storage, tmp_path: Path) -> None:
    """With SSE-C, reads need the key too, and the ETag is no MD5."""
    extra = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32, "Metadata": {"run": "7", "SHA256": "mine"}}
    own = S3Storage(store.root, extra=extra, sleep=lambda _: None)
    (tmp_path / "big").write_bytes(os.urandom(1 << 20) * 17)
    own.publish(tmp_path / "big", "big")
    assert own.fetch("big", tmp_path / "copy").verified == "sha256"
    head = own._head("big")
    assert head is not None
    assert head["Metadata"] == {"run": "7", "sha256": hashlib.sha256((tmp_path / "big").read_bytes()).hexdigest()}


@pytest.mark.s3
@pytest.mark.parametrize("size", [1000, 10 << 20, 20 << 20])
def test_fetch_from_real_server_is_verified(
    seaweedfs_s3: S3Server, aws_env: Callable[..., S3Server], tmp_path: Path, size: int
) -> None:
    bucket = aws_env(seaweedfs_s3).make_bucket()
    store = S3Storage(f"s3://{bucket}")
    data = os.urandom(size)
    seaweedfs_s3.client.put_object(Bucket=bucket, Key="foreign", Body=data)
    (tmp_path / "source").write_bytes(data)
    store.publish(tmp_path / "source", "ours")
    assert store.fetch("foreign", tmp_path / "copy").verified == "md5"
    assert store.fetch("ours", tmp_path / "copy").verified == "sha256"
