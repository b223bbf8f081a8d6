from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runner.batch.lease import LeaseKeeper, Leases
from runner.errors import LeaseLost, StorageUnavailable
from runner.records.record import AttemptMark, ErrorRecord
from runner.storage import Storage, open_storage

MARK = "jobs/a/attempt.json"


def mark(**changes) -> AttemptMark:
    values = {"job_id": "a", "attempt": 1, "fingerprint": "f", "run_id": "r", "host": "h", "started_at": "t"}
    return AttemptMark.model_validate(values | changes)


@pytest.fixture(params=["disk", pytest.param("S3", marks=pytest.mark.s3)])
def store(request, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return open_storage(tmp_path / "out")
    server = request.getfixturevalue("moto_s3")
    request.getfixturevalue("aws_env")(server)
    return open_storage(f"s3://{server.make_bucket()}/out")


def taken(store: Storage, **settings) -> Leases:
    leases = Leases(store, **settings)
    assert leases.take(mark(), None)
    return leases


def test_one_of_many_takes_a_lease(store):
    runners = [Leases(store) for _ in range(8)]
    barrier = threading.Barrier(len(runners))

    def take(leases: Leases) -> bool:
        barrier.wait()
        return leases.take(mark(), None)

    with ThreadPoolExecutor(len(runners)) as pool:
        won = list(pool.map(take, runners))
    assert sum(won) == 1
    assert [leases.held for leases in runners].count(["a"]) == 1


def test_one_of_many_takes_a_lost_lease_over(store):
    taken(store, lease_s=0)
    seen = Leases(store).look("a")
    assert seen.lost
    runners = [Leases(store) for _ in range(8)]
    with ThreadPoolExecutor(len(runners)) as pool:
        won = list(pool.map(lambda leases: leases.take(mark(attempt=2), seen.version), runners))
    assert sum(won) == 1


def test_a_lease_is_live_until_it_is_too_old(store):
    leases = taken(store, lease_s=2)
    other = Leases(store)
    assert other.look("a").live
    assert other.look("a").heard in ("heard of 0 s ago", "heard of 1 s ago")
    deadline = time.monotonic() + 20
    while other.look("a").live and time.monotonic() < deadline:
        time.sleep(0.1)
    assert other.look("a").lost
    assert leases.update("a"), "it is still this runner's while no other has taken it"
    assert other.look("a").live


def test_the_holder_says_how_long_its_lease_lasts(tmp_path):
    """Two runners of other settings agree."""
    store = open_storage(tmp_path)
    taken(store, lease_s=1000)
    then = time.time() - 500
    os.utime(tmp_path / MARK, (then, then))
    assert Leases(store, lease_s=1).look("a").live


def test_a_runner_whose_lease_was_taken_over_has_lost_it(store):
    first = taken(store, lease_s=0)
    fence = first.fence("a")
    assert fence is not None
    assert fence.is_held(store.read_bytes(MARK))
    second = Leases(store)
    assert second.take(mark(attempt=2), second.look("a").version)
    assert not fence.is_held(store.read_bytes(MARK))
    assert not first.is_lost("a"), "it does not know yet"
    with pytest.raises(LeaseLost):
        first.update("a", stage="generating")
    assert first.is_lost("a")
    assert first.held == []
    before = store.read_bytes(MARK)
    first.release("a")
    assert store.read_bytes(MARK) == before, "the lease of the other runner stands"
    assert second.update("a")


def test_renewals_change_what_lies_there(store):
    leases = taken(store)
    versions = {leases.look("a").version}
    for _ in range(3):
        assert leases.renew_all() == []
        versions.add(leases.look("a").version)
    assert len(versions) == 4


def test_a_lease_that_was_given_back_leaves_nothing(store):
    leases = taken(store)
    leases.release("a")
    leases.release("a")
    assert list(store.list()) == []
    assert leases.held == []
    assert not leases.update("a"), "what is not held is not written"
    assert list(store.list()) == []


def test_a_lease_whose_file_is_gone_is_lost(store):
    """Another runner may have taken it over, finished the job and given it back: writing it anew would be wrong."""
    leases = taken(store)
    store.delete(MARK)
    with pytest.raises(LeaseLost):
        leases.update("a", stage="delivering")
    assert list(store.list()) == []


def test_a_store_that_is_away_loses_no_lease(store, monkeypatch):
    leases = taken(store)

    def away(*_, **__):
        raise StorageUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "write_if", away)
        assert leases.renew_all() == []
    assert leases.update("a")


def test_the_mark_of_a_failure_is_no_lease(store):
    leases = taken(store)
    assert leases.update("a", error=ErrorRecord(code="internal", message="m", stage="s", retryable=False))
    seen = Leases(store).look("a")
    assert (seen.live, seen.lost) == (False, False)


def test_a_mark_of_version_0_1_0_is_lost(store):
    store.write_bytes(MARK, mark().to_json())
    assert Leases(store).look("a").lost


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_torn_mark_can_be_taken_over(store, content):
    store.write_bytes(MARK, content)
    seen = Leases(store).look("a")
    assert (seen.mark, seen.live, seen.lost) == (None, False, False)
    assert Leases(store).take(mark(), seen.version)


def test_the_lease_of_a_process_that_has_ended_is_lost_at_once(tmp_path):
    """In no more time than it takes to look, though it would last for a minute."""
    code = (
        "import os; from tests.batch.test_lease import mark; from runner.batch.lease import Leases;"
        f"from runner.storage import open_storage; assert Leases(open_storage({str(tmp_path)!r})).take(mark(), None);"
        "print(flush=True); input()"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    leases = Leases(open_storage(tmp_path))
    assert leases.look("a").live
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nothing has asked for its code yet
    assert leases.look("a").lost, "a zombie runs nothing"
    process.wait()
    seen = leases.look("a")
    assert (seen.lost, seen.gone) == (True, True)


@pytest.mark.parametrize("change", [{"boot_id": "another kernel"}, {"pid_namespace": "pid:[1]"}])
def test_of_a_process_of_another_machine_or_container_only_the_age_tells(tmp_path, change):
    store = open_storage(tmp_path)
    leases = taken(store)
    found = leases.look("a").mark
    assert found is not None
    assert found.process is not None
    strange = found.process.model_copy(update=change | {"pid": 2**22 + 1})
    assert leases.update("a", process=strange)
    assert Leases(store).look("a").live


def test_a_process_with_the_number_of_one_that_has_ended_is_another(tmp_path):
    store = open_storage(tmp_path)
    leases = taken(store)
    found = leases.look("a").mark
    assert found is not None
    assert found.process is not None
    assert leases.update("a", process=found.process.model_copy(update={"start_ticks": found.process.start_ticks - 1}))
    assert Leases(store).look("a").gone


def test_leases_are_renewed_while_the_keeper_is_there(store):
    leases = taken(store, lease_s=2)
    other = Leases(store)
    with LeaseKeeper(leases, every_s=0.2):
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert other.look("a").live
            time.sleep(0.1)
    mark_then = leases.look("a").mark
    assert mark_then is not None
    assert mark_then.renewals >= 5


def test_the_keeper_finds_out_that_a_lease_is_lost(store):
    leases = taken(store, lease_s=0)
    other = Leases(store)
    assert other.take(mark(attempt=2), other.look("a").version)
    with LeaseKeeper(leases, every_s=0.02):
        deadline = time.monotonic() + 10
        while not leases.is_lost("a"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert leases.renew_all() == [], "a lease is lost once"
