"""Disk: full disks, refused folders and every error number of the system."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from runner.errors import (
    InputNotFound,
    InputUnreadable,
    RunnerError,
    StorageDenied,
    StorageFull,
    StorageUnavailable,
)
from runner.storage import Fence, LocalStorage, disk, fetch_input, open_storage, probe_writable, stat_input
from runner.storage.disk import is_staged, os_error, staged
from tests.s3_servers import S3Server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a small disk")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_on_publish_keeps_done_objects(small_disk: Path, tmp_path: Path) -> None:
    store = LocalStorage(small_disk)
    store.write_bytes("jobs/a/output.mp4", b"a" * 300_000)
    (tmp_path / "big").write_bytes(b"b" * 2_000_000)
    with pytest.raises(StorageFull, match=r"no space is left.*Free space") as caught:
        store.publish(tmp_path / "big", "jobs/a/output.mp4")
    assert caught.value.where == str(small_disk / "jobs/a/output.mp4")
    with pytest.raises(StorageFull):
        store.write_bytes("jobs/b/output.mp4", b"b" * 2_000_000)
    assert store.read_bytes("jobs/a/output.mp4") == b"a" * 300_000
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["output.mp4"]
    store.write_bytes("jobs/b/output.mp4", b"b" * 300_000)  # the space of the failed ones is free again


def test_full_disk_while_downloading_leaves_no_file(
    small_disk: Path, tmp_path: Path, moto_s3: S3Server, aws_env: Callable[..., S3Server]
) -> None:
    store = open_storage(f"s3://{aws_env(moto_s3).make_bucket()}")
    store.write_bytes("big", b"b" * 2_000_000)
    with pytest.raises(StorageFull, match="small disk/big"):
        store.fetch("big", small_disk / "big")
    assert list(small_disk.iterdir()) == []


def test_probe_writable_finds_full_disk(small_disk: Path) -> None:
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(b"x" * 65536)
    assert shutil.disk_usage(small_disk).free == 0
    with pytest.raises(StorageFull):
        probe_writable(LocalStorage(small_disk))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_at_fsync_keeps_older_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """File systems that allocate late, and quotas, accept the write and refuse at fsync."""
    store = LocalStorage(tmp_path)
    store.write_bytes("x", b"old")

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageFull):
        store.write_bytes("x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, folders = os.fsync, []

    def some(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            folders.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", some)
    LocalStorage(tmp_path).write_bytes("x", b"new")
    assert folders
    assert (tmp_path / "x").read_bytes() == b"new"


REFUSED = """
import os, sys
from pathlib import Path
from runner.errors import RunnerError
from runner.storage import LocalStorage, probe_writable, stat_input
if os.geteuid() == 0:
    os.setgroups([])
    os.setuid(65534)
root = Path(sys.argv[1])
for work in (
    lambda: probe_writable(LocalStorage(root / "mine")),
    lambda: probe_writable(LocalStorage(root / "mine" / "new" / "folder")),
    lambda: stat_input(root / "secret"),
    lambda: list(LocalStorage(root / "hidden").list()),
):
    try:
        work()
        print("allowed")
    except RunnerError as err:
        print(err.code, err.message)
"""


def test_refused_folder_error_names_owner() -> None:
    root = Path(tempfile.mkdtemp())  # not below tmp_path: pytest shuts its folders to other users
    try:
        root.chmod(0o755)
        (root / "mine").mkdir(mode=0o555)
        (root / "secret").write_bytes(b"x")
        (root / "secret").chmod(0)
        (root / "hidden").mkdir(mode=0)
        repository = Path(__file__).parents[2]
        command = [sys.executable, "-c", REFUSED, root]
        done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
        lines = done.stdout.splitlines()
        assert len(lines) == 4, done.stderr
        for line in lines:
            assert line.startswith("storage.denied ")
            assert "--user" in line
        assert f"mine belongs to uid {os.geteuid()}" in lines[0]
        assert f"mine belongs to uid {os.geteuid()}" in lines[1]
        assert f"secret belongs to uid {os.geteuid()}" in lines[2]
    finally:
        (root / "hidden").chmod(0o700)
        shutil.rmtree(root)


@pytest.mark.parametrize("writing", [True, False])
@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_os_error_of_every_errno_has_runner_error(number: int, writing: bool) -> None:
    error = os_error(OSError(number, os.strerror(number)), where="/some/place", writing=writing)
    assert isinstance(error, RunnerError)
    assert "/some/place" in error.message
    assert error.code not in ("internal", "config.invalid")  # one file's trouble must not stop the run


@pytest.mark.parametrize(
    ("number", "writing", "kind"),
    [
        (errno.ENOSPC, True, StorageFull),
        (errno.EDQUOT, True, StorageFull),
        (errno.EACCES, True, StorageDenied),
        (errno.EPERM, True, StorageDenied),
        (errno.EROFS, True, StorageDenied),
        (errno.EACCES, False, StorageDenied),
        (errno.ENOENT, False, InputNotFound),
        (errno.ENOTDIR, False, InputNotFound),
        (errno.ENOENT, True, StorageUnavailable),  # the folder went away while we wrote
        (errno.ENOTDIR, True, StorageDenied),
        (errno.EEXIST, True, StorageDenied),
        (errno.EISDIR, True, StorageDenied),
        (errno.ELOOP, True, StorageDenied),
        (errno.ENAMETOOLONG, True, StorageDenied),
        (errno.EINVAL, True, StorageDenied),
        (errno.EISDIR, False, InputUnreadable),
        (errno.ELOOP, False, InputUnreadable),
        (errno.EINVAL, False, InputUnreadable),
        (errno.ENAMETOOLONG, False, InputNotFound),
        (errno.EIO, True, StorageUnavailable),
        (errno.ESTALE, False, StorageUnavailable),
        (errno.ETIMEDOUT, True, StorageUnavailable),
    ],
)
def test_os_error_with_known_errno_has_expected_class(number: int, writing: bool, kind: type[RunnerError]) -> None:
    assert type(os_error(OSError(number, "x"), where="here", writing=writing)) is kind


def test_os_error_names_target_and_not_staged_file(tmp_path: Path) -> None:
    names: list[Any] = []
    with staged(tmp_path / "x") as file:
        names.append(Path(file.name).name)
    assert is_staged(names[0])
    error = os_error(OSError(errno.EIO, "x", str(tmp_path / names[0])), where=tmp_path / "x", writing=True)
    assert error.where == str(tmp_path / "x")
    error = os_error(OSError(errno.EIO, "x", "from", None, "to"), where="where", writing=True)
    assert error.where == "to"


@pytest.mark.parametrize("name", ["x.tmp", ".staged-x.tmp", f".staged-{'0' * 32}.tmp.png", f"staged-{'0' * 32}.tmp"])
def test_name_similar_to_staged_file_is_not_reserved(name: str, tmp_path: Path) -> None:
    assert not is_staged(name)
    LocalStorage(tmp_path).write_bytes(name, b"")
    assert [info.key for info in LocalStorage(tmp_path).list()] == [name]


def test_input_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dance.mp4")
    for ask in (stat_input, lambda path: fetch_input(path, tmp_path)):
        with pytest.raises(InputUnreadable, match=r"dance\.mp4: this is a pipe"):
            ask(tmp_path / "dance.mp4")


HOLDER = """
import os, signal, sys
from pathlib import Path
from runner.storage.disk import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def stopped_holder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose lock a stopped process holds."""
    folder = tmp_path / "jobs/a"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, folder]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    yield folder
    holder.kill()
    holder.communicate()


def test_lock_held_by_stopped_process_ends_in_storage_unavailable(
    stopped_holder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LOCK_SECONDS", 0.2)
    store = LocalStorage(tmp_path)
    store.write_bytes("jobs/a/frames/x", b"")
    for use in (
        lambda: store.write_bytes("jobs/a/x", b""),
        lambda: store.write_if("jobs/a/x", b"", None),
        lambda: store.delete("jobs/a/x"),
        lambda: store.delete("jobs/a/frames/x", fence=NO_LEASE),
    ):
        with pytest.raises(
            StorageUnavailable, match=r"jobs/a: .*another process.*0\.2 s.*Find the stopped process"
        ) as caught:
            use()
        assert caught.value.retryable
        assert caught.value.where == str(stopped_holder)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [stopped_holder / "frames/x"]


NO_LEASE = Fence("jobs/a/attempt.json", lambda data: data is None)


def test_folder_with_two_names_is_locked_once(tmp_path: Path) -> None:
    (tmp_path / "jobs/a").mkdir(parents=True)
    (tmp_path / "jobs/a/frames").symlink_to(tmp_path / "jobs/a")
    store = LocalStorage(tmp_path)
    (tmp_path / "1.png").write_bytes(b"frame")
    store.publish(tmp_path / "1.png", "jobs/a/frames/1.png", fence=NO_LEASE)
    assert store.read_bytes("jobs/a/1.png") == b"frame"
