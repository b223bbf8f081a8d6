"""Lease: which runner has a job, as `jobs/<id>/attempt.json` says.

In:   job ids, the output storage. Out: leases that are taken, renewed, lost, given back; what is known of those of
other runners. Never: what is done or what shall run; the ledger decides that.

A lease is created exclusively or replaces one that is lost. Its holder renews it while the job is under way. Another
runner calls it lost when the store has not seen a renewal for `lease_s` seconds, or at once where both run on one
machine and the process table has no such process. A holder that was stopped for longer finds its lease replaced: it
gives the job up, and the store refuses what it publishes (see `Fence`).
"""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import structlog
from pydantic import ValidationError

from runner.errors import InputError, LeaseLost, RunnerError, StorageDenied
from runner.records.output_layout import ATTEMPT, job_key
from runner.records.record import AttemptMark, ProcessRecord, ResultRecord
from runner.storage import Fence, ObjectInfo, Storage

__all__ = ["LEASE_S", "RENEW_S", "LeaseKeeper", "Leases", "Sighting", "parse_mark"]

LEASE_S = 60.0  # a request to a store that hangs is given up and repeated after 60 s; a lease must outlive most of them
RENEW_S = 10.0
LOCKS = 64  # shared among the jobs


@dataclass(frozen=True)
class Sighting:
    """What lies in the place of a job's lease now."""

    mark: AttemptMark | None  # None: nothing, or nothing that can be read
    version: str | None  # None: nothing lies there
    age_s: float = 0.0  # since it was written, by the store's clock
    gone: bool = False  # its process is known to have ended

    @property
    def live(self) -> bool:
        """Whether a runner holds it."""
        mark = self.mark
        if mark is None or mark.error is not None or mark.lease_s is None:
            return False
        return not self.gone and self.age_s < mark.lease_s

    @property
    def lost(self) -> bool:
        """Whether an attempt began and its runner is not heard of any more."""
        return self.mark is not None and self.mark.error is None and not self.live

    def later(self, seconds: float) -> Sighting:
        """What it is `seconds` later where no runner has renewed it meanwhile."""
        gone = self.mark is not None and self.mark.process is not None and _is_gone(self.mark.process)
        return replace(self, age_s=self.age_s + seconds, gone=gone)

    @property
    def heard(self) -> str:
        """`heard of 4 s ago`."""
        return f"heard of {self.age_s:.0f} s ago"


@dataclass
class _Held:
    """A lease of this process."""

    mark: AttemptMark
    version: str
    seen: dict[str, ObjectInfo] = field(default_factory=dict)  # the job's files when it was taken
    lost: bool = False


class Leases:
    """The leases of one output storage. Safe from any thread.

    `exclusive`: whether the store honours conditional writes. Where it does not, two runners that take a lease at the
    same moment both believe that they hold it until one of them renews.
    """

    def __init__(self, storage: Storage, *, lease_s: float = LEASE_S, exclusive: bool = True) -> None:
        self.storage, self.lease_s, self.exclusive = storage, lease_s, exclusive
        self._held: dict[str, _Held] = {}
        # A lease is written by one thread at a time. Not one lock for all: a store may take a minute over one request.
        self._locks = [threading.RLock() for _ in range(LOCKS)]

    def look(self, job_id: str) -> Sighting:
        """What lies there, whether it is this process's or not. Raises storage.*."""
        try:
            found = self.storage.read_versioned(_key(job_id), aged=True)
        except InputError:  # a folder, or something else that cannot be read
            return Sighting(None, None)
        if found is None:
            return Sighting(None, None)
        mark = parse_mark(found.data)
        gone = mark is not None and mark.process is not None and _is_gone(mark.process)
        return Sighting(mark, found.version, found.age_s or 0.0, gone)

    def take(self, mark: AttemptMark, over: str | None) -> bool:
        """Take the lease of `mark.job_id`. `over`: the version of what it replaces; None: nothing lies there.

        False if something else lies there by now: another runner was quicker. Raises StorageDenied if what lies there
        can be no lease at all; storage.*.
        """
        job_id = mark.job_id
        mark = mark.model_copy(
            update={"token": uuid4().hex, "lease_s": self.lease_s, "process": _this_process(), "host": host_name()}
        )
        with self._lock(job_id):
            version = self.storage.write_if(_key(job_id), mark.to_json(), over)
            if version is None:
                self._require_no_folder(job_id)
                return False
            self._held[job_id] = _Held(mark, version)
        return True

    def note_files(self, job_id: str, files: dict[str, ObjectInfo]) -> None:
        """Keep what lay in the job's folder after the lease was taken, by key."""
        self._held[job_id].seen = files

    def seen(self, job_id: str, key: str) -> ObjectInfo | None:
        """What lay under `key` after the lease was taken."""
        return self._held[job_id].seen.get(key)

    def note_file(self, job_id: str, key: str, info: ObjectInfo | None) -> None:
        """Keep what lies under `key` now."""
        held = self._held[job_id]
        if info is None:
            held.seen.pop(key, None)
        else:
            held.seen[key] = info

    @property
    def held(self) -> list[str]:
        """Jobs whose leases this process holds, as far as it knows."""
        return [job_id for job_id, held in list(self._held.items()) if not held.lost]

    def mark(self, job_id: str) -> AttemptMark | None:
        """What this process last wrote of a lease that it holds."""
        held = self._held.get(job_id)
        return None if held is None else held.mark

    def is_lost(self, job_id: str) -> bool:
        """Whether this process has held the job's lease and another runner has it now."""
        held = self._held.get(job_id)
        return held is not None and held.lost

    def fence(self, job_id: str) -> Fence | None:
        """For what the holder publishes; None if this process holds no lease of the job."""
        held = self._held.get(job_id)
        if held is None:
            return None
        token = held.mark.token

        def is_held(data: bytes | None) -> bool:
            mark = None if data is None else parse_mark(data)
            return mark is not None and mark.token == token and mark.error is None

        return Fence(_key(job_id), is_held)

    def update(self, job_id: str, **changes: Any) -> bool:
        """Renew the lease, with `changes` of its mark; False if this process holds none.

        Raises LeaseLost if another runner has it; storage.*.
        """
        with self._lock(job_id):
            held = self._held.get(job_id)
            if held is None:
                return False
            if not held.lost:
                mark = held.mark.model_copy(update=changes | {"renewals": held.mark.renewals + 1})
                version = self._replace(held, mark)
                if version is not None:
                    held.mark, held.version = mark, version
                    return True
                held.lost = True
            raise _lost(job_id)

    def release(self, job_id: str) -> None:
        """Give the lease back: its file is removed. Without effect where it is lost or was never held. Raises storage.*
        and stays held then."""
        with self._lock(job_id):
            held = self._held.get(job_id)
            if held is None:
                return
            if not held.lost:
                self.storage.delete(_key(job_id), version=held.version)
            del self._held[job_id]

    def end_with_failure(self, job_id: str, record: ResultRecord, counted: int) -> None:
        """End the lease and leave its mark with the failure that `record` tells, beside an older record that stands.

        `counted`: attempts before this one that count. Raises LeaseLost; storage.*.
        """
        self.update(
            job_id,
            attempt=record.attempt,
            attempts_counted=counted,
            finished_at=record.finished_at,
            error=record.error,
            replaces=None,
        )
        self.forget(job_id)

    def forget(self, job_id: str) -> None:
        """Hold the lease no longer and leave what lies there."""
        with self._lock(job_id):
            self._held.pop(job_id, None)

    def renew_all(self) -> list[str]:
        """Renew every lease that is held. The jobs whose leases turned out to be lost.

        A store that does not answer changes nothing: the lease is ours until another runner has replaced it.
        """
        lost = []
        for job_id in self.held:
            try:
                self.update(job_id)
            except LeaseLost:
                lost.append(job_id)
            except RunnerError:
                continue
        return lost

    def _replace(self, held: _Held, mark: AttemptMark) -> str | None:
        """Write `mark` over what this process wrote last; the new version, or None if the lease is lost.

        It is also lost where nothing lies any more: another runner may have taken it over, finished the job and given
        it back.
        """
        key = _key(mark.job_id)
        written = self.storage.write_if(key, mark.to_json(), held.version)
        if written is not None:
            return written
        found = self.look(mark.job_id)
        if found.mark is None or found.mark.token != mark.token:
            return None
        return self.storage.write_if(key, mark.to_json(), found.version)  # ours, of a request whose answer was lost

    def _require_no_folder(self, job_id: str) -> None:
        try:
            self.storage.read_versioned(_key(job_id))
        except InputError as error:
            remedy = "Remove or rename what lies there, then run again"
            raise StorageDenied(f"no lease can be taken: {error.what}", where=error.where, todo=remedy) from error

    def _lock(self, job_id: str) -> threading.RLock:
        return self._locks[hash(job_id) % LOCKS]


class LeaseKeeper:
    """A thread that renews leases while its block lasts."""

    def __init__(self, leases: Leases, every_s: float | None = None) -> None:
        self._leases = leases
        self._every_s = max(0.1, min(RENEW_S, leases.lease_s / 6)) if every_s is None else every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _keep(self) -> None:
        while not self._end.wait(self._every_s):
            try:
                self._leases.renew_all()
            except Exception as error:  # a bug must not end the renewals: other runners would take every job over
                structlog.get_logger().warning("leases_not_renewed", message=str(error))


def parse_mark(data: bytes) -> AttemptMark | None:
    """The mark that `data` holds; None for a torn or foreign file."""
    try:
        return AttemptMark.model_validate(json.loads(data))
    except (ValueError, ValidationError, RecursionError):
        return None


def host_name() -> str:
    return socket.gethostname()


def _key(job_id: str) -> str:
    return job_key(job_id, ATTEMPT)


def _lost(job_id: str) -> LeaseLost:
    return LeaseLost(
        "another runner has taken this job over",
        where=job_id,
        todo="Nothing is lost: that runner renders it, and this one looks again at the end",
    )


def _this_process() -> ProcessRecord | None:
    return _process_of(os.getpid())


@cache
def _process_of(pid: int) -> ProcessRecord | None:
    """`pid`: this process's own, so that a fork asks anew. None where the system has no process table to read."""
    with suppress(OSError):
        _, start_ticks = _process_state(pid)
        return ProcessRecord(
            pid=pid, start_ticks=start_ticks, boot_id=_boot_id(), pid_namespace=os.readlink("/proc/self/ns/pid")
        )
    return None


def _is_gone(process: ProcessRecord) -> bool:
    """Whether the process is known to have ended. False where this process cannot tell."""
    own = _this_process()
    if own is None or (own.boot_id, own.pid_namespace) != (process.boot_id, process.pid_namespace):
        return False
    try:
        state, start_ticks = _process_state(process.pid)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return state == "Z" or start_ticks != process.start_ticks


def _process_state(pid: int) -> tuple[str, int]:
    """(state letter, start in clock ticks after boot) of a process, as proc(5) has them. Raises OSError."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    return fields[0], int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
