"""What every Storage promises about leases: fences, what a publish may replace, removal by version, ages, the probe."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import LeaseLost
from runner.storage import Fence, Storage, open_storage, probe_conditions

Bodies = list[tuple[bytes, bytes]]
LEASE, OUTPUT, FRAME = "jobs/a/attempt.json", "jobs/a/output.mp4", "jobs/a/frames/1.png"


def fence(owner: bytes | None) -> Fence:
    """Held while `owner` lies in the lease; None: while there is no lease."""
    return Fence(LEASE, lambda data: data == owner)


def contents(store: Storage) -> dict[str, bytes | None]:
    return {info.key: store.read_bytes(info.key) for info in store.list()}


class LeaseContract:
    """A part of `StorageContract`, which gives `store` and `source`."""

    completes_if_match = True  # does an upload of several parts replace only what was seen, however close the race

    @pytest.fixture
    def sizes(self) -> list[int]:
        """Of outputs in bytes: one for each way in which the backend stores them."""
        return [1000]

    @pytest.fixture
    def bodies(self, sizes: list[int]) -> list[tuple[bytes, bytes]]:
        """Two different outputs of each size."""
        return [(os.urandom(size), os.urandom(size)) for size in sizes]

    def test_with_the_lease_everything_is_done(
        self, store: Storage, source: Callable[[bytes], Path], bodies: Bodies
    ) -> None:
        store.write_if(LEASE, b"me", None)
        mine = fence(b"me")
        for old, new in bodies:
            store.publish(source(old), OUTPUT, fence=mine)
            store.publish(source(new), OUTPUT, fence=mine)
            store.publish(source(new), FRAME, fence=mine)
            assert store.read_bytes(OUTPUT) == store.read_bytes(FRAME) == new
        version = store.write_if("jobs/a/result.json", b"{}", None, fence=mine)
        assert version is not None
        assert store.write_if("jobs/a/result.json", b"[]", None, fence=mine) is None
        assert store.write_if("jobs/a/result.json", b"[]", version, fence=mine)
        assert store.delete("jobs/a/result.json", fence=mine)
        assert store.delete("jobs/a/result.json", fence=mine)
        assert set(contents(store)) == {LEASE, OUTPUT, FRAME}
        assert store.delete(LEASE, fence=mine)
        assert store.write_if("jobs/b/result.json", b"{}", None, fence=Fence("jobs/b/lease", lambda data: data is None))

    @pytest.mark.parametrize("lease", [b"another", None])
    @pytest.mark.parametrize("exists", [False, True])
    def test_without_the_lease_nothing_changes(
        self, store: Storage, source: Callable[[bytes], Path], bodies: Bodies, lease: bytes | None, exists: bool
    ) -> None:
        if lease is not None:
            store.write_bytes(LEASE, lease)
        version = store.write_if(OUTPUT, b"there", None) if exists else None
        before, mine = contents(store), fence(b"me")
        seen = store.stat(OUTPUT)
        for data, _ in bodies:
            for key in (OUTPUT, FRAME):
                with pytest.raises(LeaseLost, match=r"attempt\.json: another runner"):
                    store.publish(source(data), key, fence=mine)
            with pytest.raises(LeaseLost):
                store.publish(source(data), OUTPUT, fence=mine, replaces=seen)
        for use in (
            lambda: store.write_if(OUTPUT, b"mine", version, fence=mine),
            lambda: store.write_if(FRAME, b"mine", None, fence=mine),
            lambda: store.delete(OUTPUT, fence=mine),
            lambda: store.delete(OUTPUT, version=version or "x", fence=mine),
            lambda: store.delete(OUTPUT, version="of another", fence=mine),
            lambda: store.delete(FRAME, fence=mine),
        ):
            with pytest.raises(LeaseLost):
                use()
        assert contents(store) == before
        assert list(store.leftovers()) == []

    def test_a_publish_replaces_only_what_was_seen(
        self, store: Storage, source: Callable[[bytes], Path], bodies: Bodies
    ) -> None:
        for old, new in bodies:
            first = store.publish(source(old), OUTPUT, replaces=None)
            with pytest.raises(LeaseLost, match=r"output\.mp4: another runner has changed"):
                store.publish(source(new), OUTPUT, replaces=None)
            assert store.read_bytes(OUTPUT) == old
            seen = store.stat(OUTPUT)
            assert seen is not None
            second = store.publish(source(new), OUTPUT, replaces=seen)
            assert (second.bytes, second.identity) == (len(new), store.identify(second))
            for stale in (first, seen):
                with pytest.raises(LeaseLost):
                    store.publish(source(old), OUTPUT, replaces=stale)
            assert store.read_bytes(OUTPUT) == new
            third = store.publish(source(old), OUTPUT, replaces=second)  # what publish returned is what lies there
            store.delete(OUTPUT)
            with pytest.raises(LeaseLost):
                store.publish(source(new), OUTPUT, replaces=third)
            assert contents(store) == {}
            assert list(store.leftovers()) == []

    def test_of_many_that_saw_the_same_one_publishes(self, store: Storage, tmp_path: Path, sizes: list[int]) -> None:
        for size in [*sizes, *sizes] if self.completes_if_match else sizes[:1] * 2:
            seen = store.stat(OUTPUT)
            bodies = [os.urandom(size) for _ in range(3)]
            won: list[bytes] = []
            begin = threading.Barrier(len(bodies))

            def work(i: int, bodies: list[bytes] = bodies, won: list[bytes] = won, seen=seen, begin=begin) -> None:
                (tmp_path / f"{i}").write_bytes(bodies[i])
                begin.wait()
                try:
                    store.publish(tmp_path / f"{i}", OUTPUT, replaces=seen)
                except LeaseLost:
                    return
                won.append(bodies[i])

            threads = [threading.Thread(target=work, args=(i,)) for i in range(len(bodies))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1, f"{len(won)} of {len(bodies)} have replaced {seen}, {size} bytes each"
            assert store.read_bytes(OUTPUT) == won[0]
            assert list(store.leftovers()) == []

    def test_a_version_is_removed_or_stays(self, store: Storage) -> None:
        assert store.delete(LEASE, version="x")
        first = store.write_if(LEASE, b"one", None)
        second = store.write_if(LEASE, b"two", first)
        assert first
        assert second
        assert not store.delete(LEASE, version=first)
        assert store.read_bytes(LEASE) == b"two"
        assert store.delete(LEASE, version=second)
        assert not store.exists(LEASE)
        assert store.delete(LEASE, version=second)
        store.write_bytes(LEASE, b"three")
        assert store.delete(LEASE)
        assert store.delete(LEASE)

    def test_the_clock_of_this_machine_gives_no_age(self, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        assert store.read_versioned(LEASE, aged=True) is None
        store.write_bytes(LEASE, b"me")
        real, here = time.time, threading.current_thread()  # a server of this process has threads of its own
        for wrong in (-1e6, 1e6):
            monkeypatch.setattr(time, "time", lambda wrong=wrong: real() + wrong * (threading.current_thread() is here))
            found = store.read_versioned(LEASE, aged=True)
            assert found is not None
            assert found.age_s is not None
            assert 0 <= found.age_s < 60
            plain = store.read_versioned(LEASE)
            assert plain is not None
            assert (plain.data, plain.version, plain.age_s) == (b"me", found.version, None)
        assert list(store.leftovers()) == []
        assert set(contents(store)) == {LEASE}

    def test_conditions_hold(self, store: Storage) -> None:
        assert probe_conditions(store) is None
        assert probe_conditions(open_storage(store.root)) is None
        assert list(store.list()) == []
        assert list(store.leftovers()) == []
