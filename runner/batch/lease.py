"""Lease: the file `jobs/<id>/attempt.json` that shows which runner has a job.

In:   job ids, the output storage. Out: leases that are taken, renewed, lost, released; the leases of other runners.
Never: which jobs are done or have to run; the ledger decides that.

A lease is created exclusively, or replaces a lost one. Its holder renews it while the job is under way. Another runner
treats it as lost when the store has not seen a renewal for `lease_s` seconds. If both run on the same machine, it is
lost at once when its process is not in the process table. A holder that was stopped for longer finds its lease
replaced: it gives the job up, and the store refuses what it publishes (see `Fence`).
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

LEASE_S = 60.0  # a request to a store that hangs is repeated after 60 s; a lease must last longer than most requests
RENEW_S = 10.0
LOCKS = 64  # shared among the jobs


@dataclass(frozen=True)
class Sighting:
    """The content of a job's lease file at one moment."""

    mark: AttemptMark | None  # None: no file, or one that cannot be read
    version: str | None  # None: no file
    age_s: float = 0.0  # age of the file by the store's clock
    gone: bool = False  # its process is known to have ended

    @property
    def live(self) -> bool:
        """Whether a runner holds the lease."""
        mark = self.mark
        if mark is None or mark.error is not None or mark.lease_s is None:
            return False
        return not self.gone and self.age_s < mark.lease_s

    @property
    def lost(self) -> bool:
        """Whether an attempt began and its runner no longer renews the lease."""
        return self.mark is not None and self.mark.error is None and not self.live

    def later(self, seconds: float) -> Sighting:
        """Return what it is `seconds` later if no runner has renewed the lease meanwhile."""
        gone = self.mark is not None and self.mark.process is not None and _is_gone(self.mark.process)
        return replace(self, age_s=self.age_s + seconds, gone=gone)

    @property
    def heard(self) -> str:
        """When the lease was last renewed, as a text: `heard of 4 s ago`."""
        return f"heard of {self.age_s:.0f} s ago"


@dataclass
class _Held:
    """A lease that this process holds or has lost."""

    mark: AttemptMark
    version: str
    seen: dict[str, ObjectInfo] = field(default_factory=dict)  # the job's files when it was taken
    lost: bool = False


class Leases:
    """The leases of one output storage. Safe from any thread.

    `exclusive`: whether the store honours conditional writes. If it does not, two runners can take the same lease at
    the same moment; the next renewal of one of them shows which runner has lost it.
    """

    def __init__(self, storage: Storage, *, lease_s: float = LEASE_S, exclusive: bool = True) -> None:
        self.storage, self.lease_s, self.exclusive = storage, lease_s, exclusive
        self._held: dict[str, _Held] = {}
        # One thread at a time writes a lease. There are several locks, as one request to a store may take a minute.
        self._locks = [threading.RLock() for _ in range(LOCKS)]

    def look(self, job_id: str) -> Sighting:
        """Return the lease of a job now, of this or any other process. Raises storage.*."""
        try:
            found = self.storage.read_versioned(_key(job_id), aged=True)
        except InputError:  # a folder, or an unreadable file
            return Sighting(None, None)
        if found is None:
            return Sighting(None, None)
        mark = parse_mark(found.data)
        gone = mark is not None and mark.process is not None and _is_gone(mark.process)
        return Sighting(mark, found.version, found.age_s or 0.0, gone)

    def take(self, mark: AttemptMark, over: str | None) -> bool:
        """Take the lease of `mark.job_id`. `over`: the version of the file it replaces; None: there is no file.

        False if another runner has written the file meanwhile. Raises StorageDenied if a folder has the file's name;
        storage.*.
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
        """Remember the files in the job's folder, by key, as they are after the lease was taken."""
        self._held[job_id].seen = files

    def seen(self, job_id: str, key: str) -> ObjectInfo | None:
        """Return the remembered object under `key`."""
        return self._held[job_id].seen.get(key)

    def note_file(self, job_id: str, key: str, info: ObjectInfo | None) -> None:
        """Remember the present object under `key`."""
        held = self._held[job_id]
        if info is None:
            held.seen.pop(key, None)
        else:
            held.seen[key] = info

    @property
    def held(self) -> list[str]:
        """Jobs whose leases this process holds, as far as it has noticed."""
        return [job_id for job_id, held in list(self._held.items()) if not held.lost]

    def mark(self, job_id: str) -> AttemptMark | None:
        """Return the mark that this process last wrote to a lease that it holds."""
        held = self._held.get(job_id)
        return None if held is None else held.mark

    def is_lost(self, job_id: str) -> bool:
        """Return whether this process has held the job's lease and another runner has it now."""
        held = self._held.get(job_id)
        return held is not None and held.lost

    def fence(self, job_id: str) -> Fence | None:
        """Return the fence for the holder's writes; None if this process holds no lease of the job."""
        held = self._held.get(job_id)
        if held is None:
            return None
        token = held.mark.token

        def is_held(data: bytes | None) -> bool:
            mark = None if data is None else parse_mark(data)
            return mark is not None and mark.token == token and mark.error is None

        return Fence(_key(job_id), is_held)

    def update(self, job_id: str, **changes: Any) -> bool:
        """Renew the lease, with `changes` to its mark. False if this process holds no lease of the job.

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
        """Release the lease: remove its file. No effect if it is lost or not held.

        Raises storage.*; then the lease stays held.
        """
        with self._lock(job_id):
            held = self._held.get(job_id)
            if held is None:
                return
            if not held.lost:
                self.storage.delete(_key(job_id), version=held.version)
            del self._held[job_id]

    def end_with_failure(self, job_id: str, record: ResultRecord, counted: int) -> None:
        """End the lease and leave its mark with the failure of `record`, beside an older record that stays.

        `counted`: earlier attempts that count. Raises LeaseLost; storage.*.
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
        """Stop holding the lease, without touching its file."""
        with self._lock(job_id):
            self._held.pop(job_id, None)

    def renew_all(self) -> list[str]:
        """Renew all held leases. Return the jobs whose leases turn out to be lost.

        A store that does not answer changes nothing: a lease is held until another runner has replaced it.
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
        """Replace the lease file by `mark`. Return the new version, or None if the lease is lost.

        A missing file also means a lost lease: another runner may have taken it over, finished the job and released it.
        """
        key = _key(mark.job_id)
        written = self.storage.write_if(key, mark.to_json(), held.version)
        if written is not None:
            return written
        found = self.look(mark.job_id)
        if found.mark is None or found.mark.token != mark.token:
            return None
        # This process wrote the file, by a request whose answer was lost.
        return self.storage.write_if(key, mark.to_json(), found.version)

    def _require_no_folder(self, job_id: str) -> None:
        try:
            self.storage.read_versioned(_key(job_id))
        except InputError as error:
            remedy = "Remove or rename what has this name, then run the same command again"
            raise StorageDenied(
                f"the lease of this job cannot be written: {error.what}", where=error.where, todo=remedy
            ) from error

    def _lock(self, job_id: str) -> threading.RLock:
        return self._locks[hash(job_id) % LOCKS]


class LeaseKeeper:
    """Renews leases in a thread while its block runs."""

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
    """Return the mark in `data`; None for a torn or foreign file."""
    try:
        return AttemptMark.model_validate(json.loads(data))
    except (ValueError, ValidationError, RecursionError):
        return None


def host_name() -> str:
    """Return this machine's host name."""
    return socket.gethostname()


def _key(job_id: str) -> str:
    return job_key(job_id, ATTEMPT)


def _lost(job_id: str) -> LeaseLost:
    return LeaseLost(
        "another runner has taken this job over",
        where=job_id,
        todo="Nothing has to be done: the other runner renders it, and this one checks it again at the end",
    )


def _this_process() -> ProcessRecord | None:
    return _process_of(os.getpid())


@cache
def _process_of(pid: int) -> ProcessRecord | None:
    """Return this process; None if the system has no readable process table. `pid` is a parameter, as the cache must
    not outlive a fork."""
    with suppress(OSError):
        _, start_ticks = _process_state(pid)
        return ProcessRecord(
            pid=pid, start_ticks=start_ticks, boot_id=_boot_id(), pid_namespace=os.readlink("/proc/self/ns/pid")
        )
    return None


def _is_gone(process: ProcessRecord) -> bool:
    """Return whether the process is known to have ended. False if this process cannot find out."""
    here = _this_process()
    if here is None or (here.boot_id, here.pid_namespace) != (process.boot_id, process.pid_namespace):
        return False
    try:
        state, start_ticks = _process_state(process.pid)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return state == "Z" or start_ticks != process.start_ticks


def _process_state(pid: int) -> tuple[str, int]:
    """Return (state letter, start in clock ticks after boot) of a process, see proc(5). Raises OSError."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()  # the name before it may contain blanks and brackets
    return fields[0], int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
