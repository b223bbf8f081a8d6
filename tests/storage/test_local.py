"""What only a folder of this machine has to do."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from runner.errors import ConfigInvalid, InputUnreadable, LeaseLost, StorageDenied
from runner.storage import LocalStorage, disk, local, open_storage, probe_conditions, probe_writable
from runner.storage.disk import is_staged
from tests.storage.lease_contract import FRAME, LEASE, OUTPUT, contents, fence


def test_publish_shows_nothing_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rename, the old object is whole, and the new one is in no listing."""
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


def test_interrupted_publish_keeps_old_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_staged_file_of_killed_process_is_not_listed(tmp_path: Path) -> None:
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


KILLED = """
import os, sys
from runner.storage import LocalStorage
from runner.storage.disk import staged
with staged(LocalStorage(sys.argv[1]).path / sys.argv[2]) as out:
    out.write(b"12345")
    out.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


def start_writing(root: Path, key: str) -> subprocess.Popen[bytes]:
    """A process in the middle of writing `key`; its end of input lets it finish."""
    command = [sys.executable, "-c", KILLED, root, key]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def test_staged_file_is_leftover_only_after_its_process_dies(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path)
    one, two = start_writing(tmp_path, "jobs/a/output.mp4"), start_writing(tmp_path, "jobs/a/pose.mp4")
    assert list(store.leftovers()) == []
    assert store.remove_leftovers("jobs/a/") == 0
    one.kill()
    one.communicate()
    (left,) = store.leftovers()
    assert (left.bytes, left.kind, left.abandoned) == (5, "staged file", True)
    assert is_staged(Path(left.uri).name)
    assert left.key == f"jobs/a/{Path(left.uri).name}"
    assert list(store.leftovers("jobs/b/")) == []
    assert store.remove_leftovers("jobs/b/") == 0
    assert store.remove_leftovers("jobs/a/") == 1
    assert not store.remove_leftover(left)  # it is gone
    two.communicate(b"\n")
    assert two.returncode == 0
    assert [info.key for info in store.list()] == ["jobs/a/pose.mp4"]
    assert [path.name for path in (tmp_path / "jobs" / "a").iterdir()] == ["pose.mp4"]


def test_leftover_that_is_locked_is_not_removed(tmp_path: Path) -> None:
    """The file is locked between the listing and the removal."""
    store = LocalStorage(tmp_path)
    path = tmp_path / f".staged-{'0' * 32}.tmp"
    path.write_bytes(b"")
    (left,) = store.leftovers()
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not store.remove_leftover(left)
        assert path.exists()
    assert store.remove_leftover(left)


def test_staged_file_removed_before_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`clean --older-than 0s` can run after a file is created and before it is locked."""
    store, removed = LocalStorage(tmp_path), []

    def spy(file: BinaryIO | int, operation: int, *, flock: Callable[..., None] = fcntl.flock) -> None:
        if operation == fcntl.LOCK_EX and not isinstance(file, int) and not removed:
            removed.append(1)
            assert store.remove_leftovers("") == 1
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", spy)
    store.write_bytes("x", b"data")
    assert removed
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert store.read_bytes("x") == b"data"


def test_leftovers_without_locks_are_removed_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    store = LocalStorage(tmp_path)
    (tmp_path / f".staged-{'0' * 32}.tmp").write_bytes(b"")
    assert store.remove_leftovers("") == 0  # it may be another runner's
    (left,) = store.leftovers()
    assert not left.abandoned
    assert store.remove_leftover(left)  # a person wants it


def test_published_file_obeys_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalStorage(tmp_path).write_bytes("x", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_list_follows_links_but_no_loops(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "jobs").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(out)
    (out / "nothing").symlink_to(tmp_path / "absent")
    assert [info.key for info in LocalStorage(out).list()] == ["jobs/file"]


def test_write_to_blocked_path_names_obstacle(tmp_path: Path) -> None:
    """Each case is the failure of one job. A ConfigInvalid would stop the run."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "file").write_bytes(b"")
    (tmp_path / "jobs" / "loop").symlink_to("loop")
    (tmp_path / "jobs" / "nowhere").symlink_to("absent/too")
    store = LocalStorage(tmp_path)
    store.write_bytes("jobs/folder/output.mp4/x", b"")
    (tmp_path / "source").write_bytes(b"x")
    for key, said in [
        ("jobs/file/output.mp4", "jobs/file: a file is where a folder must be. Remove or rename that file"),
        ("jobs/file/a/b/output.mp4", "jobs/file: a file is where a folder must be. Remove or rename that file"),
        ("jobs/nowhere/output.mp4", "jobs/nowhere: a file is where a folder must be. Remove or rename that file"),
        ("jobs/loop/a/output.mp4", "jobs/loop: a symbolic link there forms a loop. Remove or rename that link"),
        ("jobs/folder/output.mp4", "output.mp4: a folder is where a file must be. Remove or rename that folder"),
        ("n" * 300, "longer than this file system allows. Choose a shorter name"),
    ]:
        for write in (
            lambda key: store.write_bytes(key, b""),
            lambda key: store.publish(tmp_path / "source", key),
            lambda key: store.write_if(key, b"", "sha256:0"),
            lambda key: store.append_lines(key, b"x\n"),
        ):
            with pytest.raises(StorageDenied, match=re.escape(said)):
                write(key)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"source", "jobs/file", "jobs/folder/output.mp4/x"}


def test_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigInvalid, match="not a folder"):
        open_storage(tmp_path / "file")
    for root in (tmp_path / "file" / "deeper", tmp_path / "loop"):
        with pytest.raises(StorageDenied, match="Remove or rename") as caught:
            probe_writable(open_storage(root))
        assert caught.value.exit_code == 2
    with pytest.raises(StorageDenied, match="shorter"):
        open_storage(tmp_path / ("n" * 300))


def test_read_of_folder_or_link_loop_is_input_unreadable(tmp_path: Path) -> None:
    """A link loop in the folder of one job does not keep the others from being listed."""
    store = LocalStorage(tmp_path)
    store.write_bytes("jobs/a/output.mp4", b"")
    store.write_bytes("jobs/b/attempt.json/x", b"")
    (tmp_path / "jobs" / "loop").symlink_to("loop")
    assert [info.key for info in store.list()] == ["jobs/a/output.mp4", "jobs/b/attempt.json/x"]
    for read in (store.read_bytes, store.read_versioned, lambda key: store.fetch(key, tmp_path / "copy")):
        with pytest.raises(InputUnreadable, match="folder"):
            read("jobs/b/attempt.json")
        with pytest.raises(InputUnreadable, match="loop"):
            read("jobs/loop")
    assert store.read_bytes("n" * 300) is None
    assert store.stat("n" * 300) is None


RACE = """
import sys, time
from pathlib import Path
from runner.storage import LocalStorage
store, folder, me, rounds = LocalStorage(sys.argv[1]), Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
won = 0
for n in range(rounds):
    key = f"jobs/{n}/result.json"
    created = store.write_if(key, f"{me} created {n}".encode(), None)
    found = store.read_versioned(key)
    version = found.version if b"created" in found.data else None
    replaced = version and store.write_if(key, f"{me} replaced {n}".encode(), version)
    print(n, bool(created), bool(replaced), flush=True)
"""


def test_write_if_by_several_processes_has_one_winner(tmp_path: Path) -> None:
    rounds = 60
    command = [sys.executable, "-c", RACE, tmp_path]
    racers = [
        subprocess.Popen(
            [*command, str(n), str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for n in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    answers = [racer.communicate("\n")[0].split("\n")[:rounds] for racer in racers]
    for n in range(rounds):
        rows = [answer[n].split() for answer in answers]
        assert [row[0] for row in rows] == [str(n)] * 3
        assert [row[1] for row in rows].count("True") == 1, f"round {n}: created by {rows}"
        assert [row[2] for row in rows].count("True") == 1, f"round {n}: replaced by {rows}"


def test_write_if_between_comparison_and_rename_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact interleaving: another process tries after this one has compared and before it renames."""
    store = LocalStorage(tmp_path)
    version = store.write_if("x", b"old", None)
    code = "import sys; from runner.storage import LocalStorage; print('ready', flush=True); "
    code += "print(LocalStorage(sys.argv[1]).write_if('x', b'theirs', sys.argv[2]))"
    others = []

    def spy(source: Path, target: Path, *, rename: Callable[..., None] = os.replace) -> None:
        command = [sys.executable, "-c", code, tmp_path, version]
        others.append(subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]))
        assert others[0].stdout is not None
        assert others[0].stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):  # it waits for us
            others[0].wait(0.5)
        rename(source, target)

    monkeypatch.setattr(os, "replace", spy)
    assert store.write_if("x", b"mine", version)
    assert others[0].communicate()[0] == b"None\n"
    assert store.read_bytes("x") == b"mine"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_write_if_without_locks_and_links_is_conditional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    store = LocalStorage(tmp_path)
    version = store.write_if("x", b"one", None)
    assert version
    assert store.write_if("x", b"two", None) is None
    assert store.write_if("x", b"two", version)
    assert store.read_bytes("x") == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_write_if_without_locks_does_not_overwrite_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: another process creates the file just before this one does."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def spy(source: Path, target: Path, *, link: Callable[..., None] = os.link) -> None:
        Path(target).write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", spy)
    assert LocalStorage(tmp_path).write_if("x", b"mine", None) is None
    assert (tmp_path / "x").read_bytes() == b"theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_publish_returns_identity_of_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another runner replaces the output directly after the publish."""
    store = LocalStorage(tmp_path / "out")
    mine, other = b"mine" * 1000, b"of another seed"
    (tmp_path / "mine").write_bytes(mine)

    def spy(source: Path, target: Path, *, rename: Callable[..., None] = os.replace) -> None:
        rename(source, target)
        Path(target).write_bytes(other)

    monkeypatch.setattr(os, "replace", spy)
    info = store.publish(tmp_path / "mine", "output.mp4")
    assert (info.identity, info.bytes) == (f"sha256:{hashlib.sha256(mine).hexdigest()}", len(mine))
    assert store.read_bytes("output.mp4") == other


# A runner that was stopped and another that has taken its job over

THEIRS = b"another"


@pytest.fixture
def leased(tmp_path: Path) -> LocalStorage:
    """A storage with a lease of this runner, `me`, and a file to publish."""
    store = LocalStorage(tmp_path / "out")
    store.write_if(LEASE, b"me", None)
    (tmp_path / "mine").write_bytes(b"mine")
    return store


def take_over(store: LocalStorage) -> bool:
    """The other runner's: whether it has the lease now."""
    found = store.read_versioned(LEASE)
    return found is not None and store.write_if(LEASE, THEIRS, found.version) is not None


CHANGES: dict[str, tuple[Callable[[LocalStorage, Path], object], str, str]] = {  # the change; how it is made; its key
    "create": (lambda store, path: store.publish(path, FRAME, fence=fence(b"me"), replaces=None), "link", FRAME),
    "replace": (
        lambda store, path: store.publish(path, FRAME, fence=fence(b"me"), replaces=store.stat(FRAME)),
        "replace",
        FRAME,
    ),
    "publish": (lambda store, path: store.publish(path, OUTPUT, fence=fence(b"me")), "replace", OUTPUT),
    "write": (
        lambda store, path: store.write_if("jobs/a/r.json", b"{}", None, fence=fence(b"me")),
        "link",
        "jobs/a/r.json",
    ),
    "delete": (lambda store, path: store.delete(FRAME, fence=fence(b"me")), "unlink", FRAME),
}


@pytest.mark.parametrize("name", CHANGES)
def test_takeover_waits_for_change_whose_lease_was_read(
    leased: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The exact interleaving: this runner has read its lease and has not changed the key yet."""
    change, call, key = CHANGES[name]
    if name in ("replace", "delete"):
        leased.write_bytes(FRAME, b"old")
    owner = Path if call == "unlink" else os
    real = getattr(owner, call)
    seen: list[object] = []
    took: list[tuple[bool, dict[str, bytes | None]]] = []
    other = threading.Thread(target=lambda: took.append((take_over(leased), contents(leased))))

    def spy(*arguments: object, **more: object) -> None:
        if not seen and any(str(leased.path / key) == str(a) for a in arguments):
            seen.append(arguments)
            other.start()
            other.join(0.1)
            assert leased.read_bytes(LEASE) == b"me"
            assert other.is_alive()
        real(*arguments, **more)

    monkeypatch.setattr(owner, call, spy)
    change(leased, tmp_path / "mine")
    other.join()
    monkeypatch.undo()
    assert len(seen) == 1
    [(won, found)] = took
    assert won
    assert found == contents(leased)  # the change was there when the takeover had come
    assert leased.exists(key) is (name != "delete")
    with pytest.raises(LeaseLost):
        change(leased, tmp_path / "mine")
    assert contents(leased) == found


@pytest.mark.parametrize("name", CHANGES)
def test_runner_stopped_before_lock_changes_nothing(
    leased: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The exact interleaving: its bytes are staged, and then another runner takes over and publishes."""
    change, _, key = CHANGES[name]
    if name in ("replace", "delete"):
        leased.write_bytes(FRAME, b"old")
    stops: list[bool] = []

    @contextlib.contextmanager
    def stopped(folder: Path, first: Path | None = None):
        if first is not None and not stops:
            stops.append(take_over(leased))
            leased.write_bytes(key, THEIRS)
        with locked(folder, first):
            yield

    locked = disk.locked_folder
    monkeypatch.setattr(disk, "locked_folder", stopped)
    monkeypatch.setattr(local, "locked_folder", stopped)
    with pytest.raises(LeaseLost):
        change(leased, tmp_path / "mine")
    assert stops == [True]
    assert leased.read_bytes(key) == THEIRS
    assert not any(is_staged(path.name) for path in leased.path.rglob("*"))


def test_publish_after_change_without_lease_is_refused(
    leased: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is still held, but another process has written a file of the same size."""
    leased.write_bytes(OUTPUT, b"seen")
    seen = leased.stat(OUTPUT)
    real = local._copy

    def then_changed(*arguments: Any) -> str:
        result = real(*arguments)
        leased.write_bytes(OUTPUT, b"them")
        return result

    monkeypatch.setattr(local, "_copy", then_changed)
    with pytest.raises(LeaseLost, match="changed"):
        leased.publish(tmp_path / "mine", OUTPUT, fence=fence(b"me"), replaces=seen)
    assert leased.read_bytes(OUTPUT) == b"them"


def test_lost_lease_creates_no_folder(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path / "out")
    (tmp_path / "mine").write_bytes(b"mine")
    for change, _, _ in CHANGES.values():
        with pytest.raises(LeaseLost):
            change(store, tmp_path / "mine")
    assert not store.path.exists()


# Ages, and whether conditions hold


@pytest.mark.parametrize("skew", [-86400.0, 0.0, 86400.0])
def test_age_is_difference_of_file_system_times(
    leased: LocalStorage, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """The file system belongs to a server with another clock. New files there get times of that clock."""
    real = disk._new_staged

    def dated(folder: Path) -> tuple[Path, BinaryIO]:
        path, file = real(folder)
        monkeypatch.setattr(os, "fsync", lambda handle: os.utime(path, (now + skew, now + skew)))
        return path, file

    now = (leased.path / LEASE).stat().st_mtime
    os.utime(leased.path / LEASE, (now + skew - 40, now + skew - 40))
    monkeypatch.setattr(disk, "_new_staged", dated)
    found = leased.read_versioned(LEASE, aged=True)
    assert found is not None
    assert found.age_s == pytest.approx(40, abs=0.01)
    assert [path.name for path in (leased.path / "jobs/a").iterdir()] == ["attempt.json"]


def test_age_of_file_from_future_is_zero(leased: LocalStorage) -> None:
    later = (leased.path / LEASE).stat().st_mtime + 3600
    os.utime(leased.path / LEASE, (later, later))
    found = leased.read_versioned(LEASE, aged=True)
    assert found is not None
    assert found.age_s == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_age_in_unwritable_folder_is_none(leased: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk, "_new_staged", refuse)
    found = leased.read_versioned(LEASE, aged=True)
    assert found is not None
    assert (found.data, found.age_s) == (b"me", None)


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, None], ids=["EBADF", "ENOLCK", "without effect"])
def test_probe_conditions_finds_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refuse(*_: object) -> None:
        if number is not None:
            raise OSError(number, os.strerror(number))

    store = LocalStorage(tmp_path / "out")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "no locks for folders" in (probe_conditions(store) or "")
    assert list(store.path.iterdir()) == []


def test_locks_hold_in_folder_locked_by_other_runner(tmp_path: Path) -> None:
    with disk.locked_folder(tmp_path):
        assert disk.locks_hold(tmp_path)
    assert disk.locks_hold(tmp_path)
