"""Storage: one contract for every backend; keys."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from boto3.s3.transfer import TransferConfig
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import ConfigInvalid, InputNotFound, InternalError, StorageFull
from runner.storage import (
    LocalStorage,
    ObjectInfo,
    Storage,
    Versioned,
    check_key,
    fetch_input,
    identify_input,
    open_storage,
    probe_writable,
    stat_input,
)
from runner.storage.s3 import S3Storage
from runner.storage.uris import BACKENDS, backend_class
from tests.s3_servers import S3Server
from tests.storage.lease_contract import LeaseContract

KEYS = ["a.txt", "jobs/anna-samba/output.mp4", "dances 中文/跳舞 (1)+&=%20#?.mp4", "é/ü~'!*.bin", "...", "a..b/.c"]


def full_disk(_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class StorageContract(LeaseContract):
    """What every Storage promises. A backend supplies its `scheme` and the fixture `store`, and inherits the rest."""

    scheme: str

    @pytest.fixture
    def source(self, tmp_path: Path) -> Callable[[bytes], Path]:
        def make(data: bytes) -> Path:
            path = tmp_path / "source.bin"
            path.write_bytes(data)
            return path

        return make

    @pytest.mark.parametrize("key", KEYS)
    def test_published_object_is_fetched_unchanged(
        self, store: Storage, key: str, tmp_path: Path, source: Callable[[bytes], Path]
    ) -> None:
        data = os.urandom(3001)
        published = store.publish(source(data), key)
        fetched = store.fetch(key, tmp_path / "new" / "folder" / "copy")
        assert (tmp_path / "new" / "folder" / "copy").read_bytes() == data
        assert fetched == published
        found = store.stat(key)
        assert found is not None
        assert replace(found, identity=store.identify(found)) == published
        assert (published.key, published.bytes, published.uri) == (key, 3001, store.uri(key))
        assert store.read_bytes(key) == data
        assert [info.key for info in store.list()] == [key]

    def test_object_identity_is_same_by_stat_list_and_fetch(
        self, store: Storage, tmp_path: Path, source: Callable[[bytes], Path]
    ) -> None:
        identity = store.publish(source(b"dance"), "a/b.mp4").identity
        assert identity
        found = [store.stat("a/b.mp4"), *store.list("a/"), store.fetch("a/b.mp4", tmp_path / "copy")]
        assert [store.identify(info) for info in found if info is not None] == [identity] * 3
        assert identify_input(store.uri("a/b.mp4"))[1] == identity
        assert all((info.identity is not None) == store.lists_identities for info in store.list())

    def test_fetch_counts_bytes_and_takes_them_back_on_failure(
        self, store: Storage, tmp_path: Path, source: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.publish(source(os.urandom(3 << 20)), "x")
        seen: list[int] = []
        store.fetch("x", tmp_path / "copy", seen.append)
        assert sum(seen) == 3 << 20
        assert len(seen) > 1
        seen.clear()
        with pytest.raises(InputNotFound):
            store.fetch("none", tmp_path / "copy", seen.append)
        assert sum(seen) == 0
        monkeypatch.setattr("runner.storage.disk.os.fsync", full_disk)
        with pytest.raises(StorageFull):
            store.fetch("x", tmp_path / "other", seen.append)
        assert sum(seen) == 0
        assert max(seen) > 0

    def test_store_type_is_that_of_backend_registry(self, store: Storage) -> None:
        assert type(store) is backend_class(f"{self.scheme}://bucket")

    def test_intact_store_has_no_leftovers(self, store: Storage, source: Callable[[bytes], Path]) -> None:
        store.publish(source(b"x"), "jobs/a/output.mp4")
        store.write_if("jobs/a/result.json", b"{}", None)
        probe_writable(store)
        assert list(store.leftovers()) == list(store.leftovers("jobs/a/")) == list(store.leftovers("none/")) == []
        assert store.remove_leftovers("jobs/a/") == 0

    def test_forgotten_write_probe_is_leftover(self, store: Storage) -> None:
        store.write_bytes(".video-lab-probe-1", b"12345")
        store.write_bytes("deeper/.video-lab-probe-2", b"1234567")
        found = sorted(store.leftovers(), key=lambda leftover: leftover.key)
        assert [(left.key, left.bytes, left.kind) for left in found] == [
            (".video-lab-probe-1", 5, "write probe"),
            ("deeper/.video-lab-probe-2", 7, "write probe"),
        ]
        assert [left.key for left in store.leftovers("deeper/")] == ["deeper/.video-lab-probe-2"]
        assert store.remove_leftovers("") == 0  # another run may be asking just now
        assert all(store.remove_leftover(left) for left in found)
        assert list(store.leftovers()) == list(store.list()) == []

    def test_publish_in_many_parts_keeps_bytes(
        self, store: Storage, tmp_path: Path, source: Callable[[bytes], Path]
    ) -> None:
        data = os.urandom(1 << 20) * 33 + b"tail"  # three parts on S3, the last of an odd size
        info = store.publish(source(data), "big.bin")
        assert info.bytes == len(data)
        store.fetch("big.bin", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data

    def test_empty_file_is_stored_as_object(
        self, store: Storage, tmp_path: Path, source: Callable[[bytes], Path]
    ) -> None:
        assert store.publish(source(b""), "empty").bytes == 0
        store.fetch("empty", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b""
        store.write_bytes("empty too", b"")
        assert store.read_bytes("empty too") == b""

    def test_publish_of_existing_key_replaces_object(self, store: Storage, source: Callable[[bytes], Path]) -> None:
        first = store.publish(source(b"one"), "x")
        second = store.publish(source(b"other"), "x")
        assert store.read_bytes("x") == b"other"
        assert second.bytes == 5
        assert first != second
        assert second.modified >= first.modified > 1_700_000_000

    def test_object_identity_follows_content(self, store: Storage, source: Callable[[bytes], Path]) -> None:
        one = store.publish(source(b"same"), "a").identity
        two = store.publish(source(b"same"), "b").identity
        three = store.publish(source(b"else"), "a").identity
        assert one == two != three
        assert '"' not in one
        assert one.startswith("sha256:") or (one.startswith("etag:") and one.endswith(":4"))

    def test_concurrent_publish_of_one_key_returns_own_identity(self, store: Storage, tmp_path: Path) -> None:
        """Eight threads store different bytes under one key. Each one gets the identity of its own bytes."""
        contents = [bytes([i]) * (1000 + i) for i in range(8)]
        found: dict[int, ObjectInfo] = {}
        begin = threading.Barrier(8)

        def work(i: int) -> None:
            path = tmp_path / f"{i}"
            path.write_bytes(contents[i])
            begin.wait()
            found[i] = store.publish(path, "x")

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, data in enumerate(contents):
            digest = hashlib.md5(data).hexdigest()
            either = (f"sha256:{hashlib.sha256(data).hexdigest()}", f"etag:{digest}:{len(data)}")
            assert found[i].identity in either
            assert found[i].bytes == len(data)

    def test_missing_object_is_none_or_not_found(self, store: Storage, tmp_path: Path) -> None:
        assert store.stat("none") is None
        assert not store.exists("none/deeper")
        assert store.read_bytes("none/deeper") is None
        assert list(store.list()) == list(store.list("none/")) == []
        with pytest.raises(InputNotFound, match="none/file"):
            store.fetch("none/file", tmp_path / "x")
        assert list(tmp_path.rglob("x")) == []
        store.delete("none")
        store.delete("none/deeper")

    def test_folder_is_no_object(self, store: Storage) -> None:
        store.write_bytes("jobs/a/result.json", b"{}")
        assert store.stat("jobs/a") is None
        assert store.read_bytes("jobs/a/result.json/deeper") is None
        assert store.stat("jobs/a/result.json/deeper") is None

    def test_small_object_is_written_read_and_deleted(self, store: Storage) -> None:
        store.write_bytes("jobs/a/result.json", b"{}")
        store.write_bytes("jobs/a/result.json", '{"名": 1}'.encode())
        assert store.read_bytes("jobs/a/result.json") == '{"名": 1}'.encode()
        assert store.exists("jobs/a/result.json")
        store.delete("jobs/a/result.json")
        assert not store.exists("jobs/a/result.json")
        assert store.read_bytes("jobs/a/result.json") is None

    def test_write_if_with_stale_version_writes_nothing(self, store: Storage) -> None:
        first = store.write_if("jobs/a/result.json", b"one", None)
        assert first is not None
        assert store.read_versioned("jobs/a/result.json") == Versioned(b"one", first)
        assert store.write_if("jobs/a/result.json", b"two", None) is None  # something lies there
        second = store.write_if("jobs/a/result.json", b"two", first)
        assert second not in (None, first)
        assert store.write_if("jobs/a/result.json", b"three", first) is None  # something else lies there
        assert store.read_versioned("jobs/a/result.json") == Versioned(b"two", second or "")
        store.delete("jobs/a/result.json")
        assert store.read_versioned("jobs/a/result.json") is None
        assert store.write_if("jobs/a/result.json", b"three", second) is None  # nothing lies there any more
        assert not store.exists("jobs/a/result.json")
        assert store.write_if("jobs/a/result.json", b"three", None)
        assert [info.key for info in store.list()] == ["jobs/a/result.json"]

    def test_read_versioned_gives_version_of_published_and_written_objects(
        self, store: Storage, source: Callable[[bytes], Path]
    ) -> None:
        store.publish(source(b"published"), "a")
        store.write_bytes("b", b"written")
        for key in "ab":
            found = store.read_versioned(key)
            assert found is not None
            assert store.write_if(key, b"new", found.version)
            assert store.read_bytes(key) == b"new"

    def test_write_if_by_many_threads_has_one_winner(self, store: Storage) -> None:
        version: str | None = None
        for _ in range(2):
            won: list[str] = []
            begin = threading.Barrier(4)

            def work(i: int, version: str | None = version, won: list[str] = won, begin: Any = begin) -> None:
                begin.wait()
                made = store.write_if("x", f"{i} after {version}".encode(), version)
                if made is not None:
                    won.append(made)

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            found = store.read_versioned("x")
            assert found is not None
            assert found.version == won[0]
            version = won[0]

    def test_append_lines_continues_after_restart(self, store: Storage) -> None:
        lines = [f'{{"n": {n}}}\n'.encode() for n in range(4)]
        store.write_bytes("runs/r/x.events-other.jsonl", b"")  # beside it, and none of its objects
        for line in lines[:2]:
            store.append_lines("runs/r/x.events.jsonl", line)
        again = open_storage(store.root)  # a process that was started anew
        for line in lines[2:]:
            again.append_lines("runs/r/x.events.jsonl", line)
        store.append_lines("runs/r/y.events.jsonl", b"{}\n")
        if store.appends:
            assert store.read_bytes("runs/r/x.events.jsonl") == b"".join(lines)
            assert store.read_bytes("runs/r/y.events.jsonl") == b"{}\n"
        else:
            assert [store.read_bytes(f"runs/r/x.events-000{n}.jsonl") for n in range(1, 5)] == lines
            assert store.read_bytes("runs/r/y.events-0001.jsonl") == b"{}\n"
            assert len(list(store.list())) == 6

    def test_append_lines_by_many_threads_keeps_all_lines_whole(self, store: Storage) -> None:
        lines = {f"{n} ".encode() * 50 + b"\n" for n in range(12)}
        threads = [threading.Thread(target=store.append_lines, args=("log.txt", line)) for line in lines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        keys = ["log.txt"] if store.appends else [f"log-{n:04d}.txt" for n in range(1, 13)]
        data = b"".join(store.read_bytes(key) or b"" for key in keys)
        assert set(data.splitlines(keepends=True)) == lines
        assert len(data) == sum(map(len, lines))

    def test_list_returns_keys_with_prefix(self, store: Storage) -> None:
        keys = ["jobs/a/output.mp4", "jobs/a/frames/000001.png", "jobs/ab/output.mp4", "runs/1/0.json", "top"]
        for key in keys:
            store.write_bytes(key, key.encode())

        def listed(prefix: str) -> list[str]:
            return sorted(info.key for info in store.list(prefix))

        assert listed("") == sorted(keys)
        assert listed("jobs/a/") == ["jobs/a/frames/000001.png", "jobs/a/output.mp4"]
        assert listed("jobs/a") == sorted(keys[:3])
        assert listed("to") == listed("top") == ["top"]
        assert listed("top/") == []
        for info in store.list("jobs/"):
            assert info == store.stat(info.key)

    @pytest.fixture
    def small_pages(self, store: Storage) -> None:
        """Make the far end answer lists two objects at a time, where it answers by pages."""

    @pytest.mark.usefixtures("small_pages")
    def test_list_returns_objects_of_all_pages(self, store: Storage) -> None:
        keys = [f"many/{i}" for i in range(5)]
        for key in keys:
            store.write_bytes(key, b"")
        assert sorted(info.key for info in store.list("many/")) == keys

    @pytest.mark.usefixtures("small_pages")
    def test_folders_returns_folders_of_all_pages(self, store: Storage) -> None:
        for i in range(5):
            for name in ("x", "y", "z/x"):  # what they hold takes no page
                store.write_bytes(f"many/{i}/{name}", b"")
        assert sorted(store.folders("many/")) == ["0", "1", "2", "3", "4"]

    def test_folders_returns_names_without_contents(self, store: Storage) -> None:
        for key in ("top", "a/file", "a/b/1", "a/b/2/3", "a/b/2/4", "a/c/x", "a/中文 1/x", "a/z/y/x", "ab/c/x"):
            store.write_bytes(key, b"")
        found = {prefix: list(store.folders(prefix)) for prefix in ("", "a/", "a/b/", "a/c/", "none/")}
        expected = {"": ["a", "ab"], "a/": ["b", "c", "z", "中文 1"], "a/b/": ["2"], "a/c/": [], "none/": []}
        assert {prefix: sorted(names) for prefix, names in found.items()} == expected
        assert {prefix: sorted(Storage.folders(store, prefix)) for prefix in found} == expected  # of any other backend
        with pytest.raises(ConfigInvalid, match="key"):
            list(store.folders("../"))

    @pytest.mark.parametrize(
        "key", ["", "/etc/passwd", "../x", "a/../../x", "a/..", ".", "./a", "a//b", "a/", "a\nb", "a\0b", "\ud800"]
    )
    def test_key_outside_root_is_refused(
        self, store: Storage, key: str, tmp_path: Path, source: Callable[[bytes], Path]
    ) -> None:
        local = source(b"x")
        for use in (
            lambda: store.publish(local, key),
            lambda: store.fetch(key, tmp_path / "x"),
            lambda: store.stat(key),
            lambda: store.read_bytes(key),
            lambda: store.write_bytes(key, b""),
            lambda: store.read_versioned(key),
            lambda: store.write_if(key, b"", None),
            lambda: store.append_lines(key, b""),
            lambda: store.delete(key),
            lambda: store.uri(key),
        ):
            with pytest.raises(ConfigInvalid, match="key"):
                use()
        if not key.endswith("/") and key not in ("", "."):
            with pytest.raises(ConfigInvalid):
                list(store.list(f"{key}/../x"))

    def test_read_during_publish_returns_old_or_new_object(self, store: Storage, tmp_path: Path) -> None:
        contents = [bytes([i]) * (200_000 + i) for i in range(2)]
        sources = [tmp_path / f"source{i}" for i in range(2)]
        for path, data in zip(sources, contents, strict=True):
            path.write_bytes(data)
        store.publish(sources[0], "x")
        torn: list[int] = []
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                data = store.read_bytes("x")
                if data not in contents:
                    torn.append(-1 if data is None else len(data))

        reader = threading.Thread(target=read)
        reader.start()
        for i in range(16):
            store.publish(sources[i % 2], "x")
        stop.set()
        reader.join()
        assert torn == []

    def test_publish_and_fetch_by_many_threads_keep_bytes(self, store: Storage, tmp_path: Path) -> None:
        problems: list[BaseException] = []

        def work(i: int) -> None:
            try:
                path = tmp_path / f"{i}"
                path.write_bytes(bytes([i]) * 1000)
                store.publish(path, f"threads/{i}")
                store.fetch(f"threads/{i}", tmp_path / f"back{i}")
                assert (tmp_path / f"back{i}").read_bytes() == bytes([i]) * 1000
            except BaseException as err:
                problems.append(err)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        assert len(list(store.list("threads/"))) == 8

    def test_probe_writable_leaves_no_object(self, store: Storage) -> None:
        probe_writable(store)
        assert list(store.list()) == []

    def test_probe_writable_finds_store_that_loses_writes(
        self, store: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store, "write_bytes", lambda key, data: None)
        with pytest.raises(InternalError, match="reads back with other content"):
            probe_writable(store)

    def test_input_by_uri_is_identified_and_fetched(self, store: Storage, tmp_path: Path) -> None:
        key = "dances 中文/跳舞 #1?.mp4"
        store.write_bytes(key, b"dance")
        uri = store.uri(key)
        assert stat_input(uri).bytes == 5
        assert identify_input(uri)[0] == stat_input(uri)
        path = fetch_input(uri, tmp_path / "scratch")
        assert path.read_bytes() == b"dance"
        assert path.name == "跳舞 #1?.mp4"
        with pytest.raises(InputNotFound, match=r"none\.mp4"):
            stat_input(store.uri("none.mp4"))
        with pytest.raises(InputNotFound, match=r"none\.mp4"):
            fetch_input(store.uri("none.mp4"), tmp_path / "scratch")

    def test_fetch_input_with_equal_names_keeps_both_files(self, store: Storage, tmp_path: Path) -> None:
        for folder in "ab":
            store.write_bytes(f"{folder}/dance.mp4", folder.encode())
        paths = [fetch_input(store.uri(f"{folder}/dance.mp4"), tmp_path / "scratch") for folder in "ab"]
        assert [path.read_bytes() for path in paths] == [b"a", b"b"]
        assert [path.name for path in paths] == ["dance.mp4"] * 2


def suites(kind: type = StorageContract) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from suites(child)


@pytest.mark.parametrize("scheme", BACKENDS)
def test_backend_in_registry_has_contract_suite(scheme: str) -> None:
    assert scheme in {suite.scheme for suite in suites() if suite.__name__.startswith("Test")}


class TestLocalStorage(StorageContract):
    scheme = "file"

    @pytest.fixture
    def store(self, tmp_path: Path) -> Storage:
        return open_storage(tmp_path / "out" / "not yet there")


class TestFileUriStorage(StorageContract):
    scheme = "file"

    @pytest.fixture
    def store(self, tmp_path: Path) -> Storage:
        return open_storage(f"file://{quote(str(tmp_path))}/%E4%B8%AD%20x/")


class S3Contract(StorageContract):
    """What S3 answers by pages, it is made to answer by small ones."""

    scheme = "s3"

    @pytest.fixture
    def sizes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """One request; an upload of two parts."""
        config = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=2)
        monkeypatch.setattr("runner.storage.s3.TRANSFER", config)
        return [1000, (5 << 20) + 1000]

    @pytest.fixture
    def small_pages(self, store: Storage) -> Iterator[None]:
        assert isinstance(store, S3Storage)
        events, pages = store.client.meta.events, []

        def shrink(params: dict[str, Any], **_: object) -> dict[str, Any]:
            pages.append(params)
            return params | {"MaxKeys": 2}

        events.register("provide-client-params.s3.ListObjectsV2", shrink)
        yield
        events.unregister("provide-client-params.s3.ListObjectsV2", shrink)
        assert len(pages) == 3  # 2 + 2 + 1 objects

    def test_unfinished_upload_is_leftover(self, store: Storage, source: Callable[[bytes], Path]) -> None:
        """A process that is killed during a multipart upload leaves such an upload."""
        assert isinstance(store, S3Storage)
        begun = {}
        for key in ("jobs/a/output.mp4", "jobs/ab/output.mp4"):
            where = {"Bucket": store.bucket, "Key": store._key(key)}
            begun[key] = store.client.create_multipart_upload(**where)["UploadId"]
            store.client.upload_part(**where, UploadId=begun[key], PartNumber=1, Body=bytes(5 << 20))
        store.publish(source(b"x"), "jobs/a/output.mp4")
        found = sorted(store.leftovers(), key=lambda leftover: leftover.key)
        assert [(left.key, left.bytes, left.kind, left.upload_id, left.abandoned) for left in found] == [
            (key, 5 << 20, "unfinished upload", upload, False) for key, upload in begun.items()
        ]
        assert [left.uri for left in found] == [store.uri(key) for key in begun]
        assert all(abs(left.modified - time.time()) < 3600 for left in found)
        assert store.remove_leftovers("jobs/a/") == 1
        assert [left.key for left in store.leftovers()] == ["jobs/ab/output.mp4"]
        for left in found:  # of which one is gone: no error
            store.remove_leftover(left)
        assert list(store.leftovers()) == []
        assert store.read_bytes("jobs/a/output.mp4") == b"x"


class TestMotoStorage(S3Contract):
    completes_if_match = False

    @pytest.fixture
    def store(self, moto_s3: S3Server, aws_env: Callable[..., S3Server]) -> Storage:
        aws_env(moto_s3)
        return open_storage(f"s3://{moto_s3.make_bucket()}/some prefix/中文/")


class TestMotoWholeBucket(S3Contract):
    completes_if_match = False

    @pytest.fixture
    def store(self, moto_s3: S3Server, aws_env: Callable[..., S3Server]) -> Storage:
        aws_env(moto_s3)
        return open_storage(f"s3://{moto_s3.make_bucket()}")


@pytest.mark.s3
class TestSeaweedStorage(S3Contract):
    completes_if_match = (
        False  # version 4.48 looks and replaces in two steps: two of three won, in about one run of ten
    )

    @pytest.fixture
    def store(self, seaweedfs_s3: S3Server, aws_env: Callable[..., S3Server]) -> Storage:
        aws_env(seaweedfs_s3)
        return open_storage(f"s3://{seaweedfs_s3.make_bucket()}/some prefix/中文")


# Keys

PARTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.one_of(PARTS, st.sampled_from(["", ".", "..", "...", " ", "\\"])), max_size=6).map("/".join))
def test_accepted_key_is_path_below_root(key: str) -> None:
    root = Path("/srv/out")
    try:
        check_key(key)
    except ConfigInvalid:
        risky = {"", ".", ".."} & set(key.split("/")) or any(ord(c) < 32 or ord(c) == 127 for c in key)
        assert risky, f"refused without need: {key!r}"
        return
    path = Path(os.path.normpath(root / key))
    assert path.is_relative_to(root)
    assert path != root
    assert path.relative_to(root).as_posix() == key  # one place has one key
    assert LocalStorage(root).uri(key) == str(path)


@given(st.binary(max_size=40).map(lambda b: b.decode("utf-8", "surrogateescape")))
def test_check_key_of_any_text_accepts_or_refuses(key: str) -> None:
    try:
        assert check_key(key).encode()
    except ConfigInvalid as err:
        err.message.encode()  # the refusal can be printed


def test_check_key_over_1024_bytes_is_refused() -> None:
    assert check_key("é" * 512)
    with pytest.raises(ConfigInvalid, match="1024 bytes"):
        check_key("é" * 512 + "x")
