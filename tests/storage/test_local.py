"""What only a folder of this machine has to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import ConfigInvalid, InputUnreadable
from runner.storage import (
    LocalStorage,
    open_storage,
)
from runner.storage.disk import is_staged


def test_nothing_is_seen_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a publish, the old object is whole, and the new one is in no listing."""
    store = LocalStorage(tmp_path / "out")
    store.write_bytes("jobs/a/output.mp4", b"old")
    (tmp_path / "new").write_bytes(b"new" * 1000)
    seen = []

    def spy(source: str, target: str, *, rename: Callable[..., None] = os.replace) -> None:
        seen.append(store.read_bytes("jobs/a/output.mp4"))
        seen.append([info.key for info in store.list()])
        seen.append(Path(source).parent == Path(target).parent and is_staged(Path(source).name))
        seen.append(Path(source).stat().st_size)
        rename(source, target)

    monkeypatch.setattr(os, "replace", spy)
    store.publish(tmp_path / "new", "jobs/a/output.mp4")
    assert seen == [b"old", ["jobs/a/output.mp4"], True, 3000]
    assert store.read_bytes("jobs/a/output.mp4") == b"new" * 1000


def test_an_interrupted_publish_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStorage(tmp_path / "out")
    store.write_bytes("x", b"old")
    (tmp_path / "new").write_bytes(b"new")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.publish(tmp_path / "new", "x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    assert store.read_bytes("x") == b"old"


def test_leftovers_of_a_killed_process_are_not_listed(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path)
    pid = os.fork()
    if pid == 0:  # dies in the middle of publishing, cleaning up nothing
        os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
        store.write_bytes("jobs/a/result.json", b"{}")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = [path.name for path in (tmp_path / "jobs" / "a").iterdir()]
    assert len(left) == 1
    assert left[0].endswith(".tmp")
    assert list(store.list()) == []
    assert not store.exists("jobs/a/result.json")
    with pytest.raises(ConfigInvalid, match="reserved"):
        store.write_bytes(f"jobs/a/{left[0]}", b"")


def test_published_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalStorage(tmp_path).write_bytes("x", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "jobs").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(out)
    (out / "nothing").symlink_to(tmp_path / "absent")
    assert [info.key for info in LocalStorage(out).list()] == ["jobs/file"]


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigInvalid, match="not a folder"):
        open_storage(tmp_path / "file")
    store = LocalStorage(tmp_path)
    with pytest.raises(ConfigInvalid, match="file"):
        store.write_bytes("file/deeper", b"")
    store.write_bytes("folder/x", b"")
    with pytest.raises(ConfigInvalid, match="folder"):
        store.write_bytes("folder", b"")
    with pytest.raises(ConfigInvalid, match="shorter name"):
        store.write_bytes("n" * 300, b"")
    with pytest.raises(InputUnreadable, match="folder"):
        store.fetch("folder", tmp_path / "copy")
    assert sorted(info.key for info in store.list()) == ["file", "folder/x"]
