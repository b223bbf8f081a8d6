"""Ledger: what is done, what was attempted, and what to run and why.

In:   a job's id and fingerprint; the output storage. Out: a `Decision` with its reason; marks and records there.
Never: how frames are made.

All state is in the output folder, readable by any tool; records/output_layout.py has the names. The mark of a job is
the lease of the runner that has it; it stays after a failure that kept an older output. The record is written last, and
removed before the file that it names is replaced. What is written between is fenced: the store refuses it once another
runner has the lease.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from runner.batch.fingerprint import differences
from runner.batch.lease import LEASE_S, Leases, Sighting
from runner.errors import (
    ConfigInvalid,
    InputError,
    JobCrashed,
    LeaseLost,
    RunnerError,
    StorageConflict,
    StorageDenied,
    counts_as_attempt,
    first_few,
)
from runner.records.output_layout import ATTEMPT, KEPT, OUTPUT, RESULT, is_output_file, is_part, job_folder, job_key
from runner.records.record import AttemptMark, ErrorRecord, OutputRecord, ResultRecord
from runner.storage import ObjectInfo, Storage, check_key, combined_identity
from runner.storage.file_hashes import FileHashes
from runner.timing import now

__all__ = ["Decision", "JobTaken", "Ledger", "Listing", "Stage", "output_identity", "output_key_wrong", "parse_record"]

REPLACES = 5  # tries to put a record or an output in the place of another run's

Listing = Mapping[str, ObjectInfo]  # key → what lies under it, of a whole output storage
Stage = Literal["preparing", "generating", "delivering"]


class JobTaken(Exception):
    """Another runner took the job, or finished it, between the decision and the lease."""


@dataclass(frozen=True)
class Decision:
    """What to do with a job. `exhausted`: it has failed as often as allowed and counts as failed again. `leased`:
    another runner has it; look again later.

    `suspect`: a process died while the job was under way. Other jobs were under way in that process too, so this one
    runs last and alone, which shows whether it is the cause.
    """

    action: Literal["run", "skip", "exhausted", "leased"]
    reason: str
    attempt: int = 1
    previous: ResultRecord | None = None
    suspect: bool = False
    counted: int = 0  # attempts before this one that count towards the limit
    version: str | None = None  # of result.json as it was read; None: there was none
    error: ErrorRecord | None = None  # `exhausted`: of the last attempt, where it is known
    mark_version: str | None = None  # of attempt.json as it was read; None: there was none
    restore: bool = False  # `previous` was removed by an attempt that was lost, and its output stands


def output_key_wrong(job_id: str, output: OutputRecord | None) -> str | None:
    """Why a record names no output that could be the job's, in words; None where it does."""
    if output is None:
        return "the record names no output"
    try:
        check_key(output.key.rstrip("/"))
    except ConfigInvalid as error:
        return f"the record names no usable output: {error.what}"
    if not output.key.startswith(job_folder(job_id)):
        return f"the record names an output outside {job_folder(job_id)}"
    return None


def output_identity(storage: Storage, key: str, hashes: FileHashes | None = None) -> tuple[str, int, int] | None:
    """(identity, bytes, files) of an output as it lies on the storage now; None if nothing is there.

    A key that ends with `/` is a folder of frames. Files on a disk are hashed, an object store gives the identity.
    """
    hashes = hashes or FileHashes()
    if key.endswith("/"):
        found = {info.key: _content(storage, info, hashes) for info in storage.list(key)}
        return combined_identity(found) if found else None
    info = storage.stat(key)
    return None if info is None else (*_content(storage, info, hashes), 1)


def _content(storage: Storage, info: ObjectInfo, hashes: FileHashes) -> tuple[str, int]:
    return storage.identify(info, hashes.sha256), info.bytes


def _in_short(changes: list[str], most: int = 4) -> str:
    """The first few changes in one line; the record holds all parts."""
    return first_few(changes, most, "; ")


class Ledger:
    """The output storage, read as a ledger. Safe from any thread.

    `max_attempts` counts the attempts of one fingerprint: those that failed by the job's own fault and those in which
    the process died while it was generating; 0: no limit. After an attempt that finished a segment, which is kept, they
    are counted anew. `force`: run all. `retry_failed`: run only what has failed. `since`: what another runner has
    failed after this moment (`timing.now`) is not tried again by this one.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        max_attempts: int = 3,
        force: bool = False,
        retry_failed: bool = False,
        hashes: FileHashes | None = None,
        since: str | None = None,
        lease_s: float = LEASE_S,
        exclusive: bool = True,
    ) -> None:
        self.storage = storage
        self.leases = Leases(storage, lease_s=lease_s, exclusive=exclusive)
        self.since = since
        self.max_attempts = max_attempts
        self.force = force
        self.retry_failed = retry_failed
        self.hashes = hashes or FileHashes()
        self._versions: dict[str, str | None] = {}  # of records that this process has removed or put back
        self._lost: set[str] = set()  # jobs that another runner has taken over from this process

    # -- reading --------------------------------------------------------------------------------------------------

    def result(self, job_id: str) -> ResultRecord | None:
        """The job's record; None if there is none, or none that can be read (a torn or foreign file is no record)."""
        return self._read_result(job_id)[0]

    def attempt(self, job_id: str) -> AttemptMark | None:
        """The mark of an attempt: it is running, its process died, or it failed beside an older output that stands."""
        return self.leases.look(job_id).mark

    def decide(
        self, job_id: str, fingerprint: str, parts: Mapping[str, Any], listing: Listing | None = None
    ) -> Decision:
        """Whether to run `job_id`, and why, in words.

        `listing` says what lies on the storage, so that only the files that are there are asked for.
        """
        self._versions.pop(job_id, None)
        asked = listing is None or _mark_key(job_id) in listing
        sighting = self.leases.look(job_id) if asked else Sighting(None, None)
        mark = sighting.mark
        before, version, restore = None, None, False
        if listing is None or _result_key(job_id) in listing:
            before, version = self._read_result(job_id)
        if version is None and sighting.lost and mark is not None and mark.replaces is not None:
            restore = self._output_wrong(job_id, mark.replaces.output) is None
            before = mark.replaces if restore else None
        decision = self._decide(job_id, fingerprint, parts, before, sighting, listing)
        return replace(decision, version=version, mark_version=sighting.version, restore=restore)

    def _decide(
        self,
        job_id: str,
        fingerprint: str,
        parts: Mapping[str, Any],
        before: ResultRecord | None,
        sighting: Sighting,
        listing: Listing | None,
    ) -> Decision:
        mark = sighting.mark
        own = mark if mark is not None and mark.fingerprint == fingerprint else None
        same = before is not None and before.fingerprint == fingerprint
        failed = before if before is not None and same and before.status == "failed" else None
        tried = max(failed.attempt if failed else 0, own.attempt if own else 0)
        counted = max(failed.counted if failed else 0, own.counted if own else 0)
        if self.force:
            if sighting.live:
                return _leased(sighting, before)
            return Decision("run", "--force", tried + 1, before, counted=counted)
        why = None
        if before is not None and before.status == "succeeded":
            if self.retry_failed and (mark is None or mark.error is None):
                reason = "succeeded; --retry-failed runs failures only"
                if not same:
                    changes = _in_short(differences(before.fingerprint_parts, parts))
                    reason = f"changed, but not failed ({changes}); a plain run renders it"
                return Decision("skip", reason, before.attempt, before)
            if same:
                why = self._output_wrong(job_id, before.output, listing)
                if why is None:
                    lost = job_id in self._lost
                    if lost and sighting.live:  # that runner may be removing what is left over: look again after it
                        return _leased(sighting, before)
                    left = (mark is not None or lost) and not sighting.live
                    return Decision("skip", "done", before.attempt, before, suspect=left)
        elif before is None and mark is None and self.retry_failed:
            return Decision("skip", "never run; --retry-failed runs failures only")
        if sighting.live:
            return _leased(sighting, before)
        error = own.error if own is not None and own.error is not None else failed.error if failed else None
        ended = own.finished_at if own is not None and own.error is not None else failed.finished_at if failed else None
        if error is not None and self.since is not None and (ended or "") > self.since and not error.retryable:
            reason = "another runner failed it while this run was under way"
            return Decision("exhausted", reason, tried, before, counted=counted, error=error)
        crashed = own is not None and own.error is None and own.counts
        if self.max_attempts and counted >= self.max_attempts:
            last = "its process died" if crashed or error is None else error.code
            reason = f"{counted} attempts, the last: {last}; --max-attempts 0 or --force runs it again"
            return Decision("exhausted", reason, tried, before, counted=counted, error=None if crashed else error)
        died = own is not None and own.error is None and not own.stopping and not own.progressed
        why = why or _why(before, mark, fingerprint, parts)
        return Decision("run", why, tried + 1, before, suspect=died, counted=counted)

    def _output_wrong(self, job_id: str, output: OutputRecord | None, listing: Listing | None = None) -> str | None:
        """Why the recorded output cannot be trusted; None if it is there as recorded."""
        wrong = output_key_wrong(job_id, output)
        if output is None or wrong is not None:
            return wrong
        if listing is not None and not output.key.endswith("/"):  # of frames, the listing has none
            info = listing.get(output.key)
            found = None if info is None else (*_content(self.storage, info, self.hashes), 1)
        else:
            found = output_identity(self.storage, output.key, self.hashes)
        if found is None:
            return f"the output is gone: {output.key}"
        if (found[0], found[1]) != (output.identity, output.bytes):
            return f"the output is not what the record says: {output.key}"
        return None

    # -- an attempt under way -------------------------------------------------------------------------------------

    def begin(self, job_id: str, decision: Decision, fingerprint: str, run_id: str, *, alone: bool = False) -> None:
        """Take the job's lease, in preparation. `alone`: no other job is under way in this process.

        Raises JobTaken if another runner was quicker, or has written a record since the decision; storage.*.
        """
        if job_id in self.leases.held:  # another try in this run
            self._put_back(job_id, decision)
            self.leases.update(job_id, attempt=decision.attempt, attempts_counted=decision.counted, stage="preparing")
            return
        self._take(job_id, decision, fingerprint, run_id, alone=alone)
        with suppress(RunnerError):  # they cost space and nothing else
            self.storage.remove_leftovers(job_folder(job_id))

    def _take(
        self, job_id: str, decision: Decision, fingerprint: str, run_id: str = "", *, alone: bool = False
    ) -> None:
        """Take the lease over what was there at the decision, and look at the record once more."""
        mark = AttemptMark(
            job_id=job_id,
            attempt=decision.attempt,
            attempts_counted=decision.counted,
            fingerprint=fingerprint,
            run_id=run_id,
            host="",
            started_at=now(),
            stage="preparing",
            alone=alone,
            replaces=decision.previous if decision.restore else None,  # until it is put back, below
        )
        if not self.leases.take(mark, decision.mark_version):
            raise JobTaken
        try:
            if self._read(_result_key(job_id))[1] != decision.version:
                raise JobTaken
            self.leases.note_files(job_id, {info.key: info for info in self.storage.list(job_folder(job_id))})
            if decision.restore and decision.previous is not None:
                self._restore(job_id, decision.previous)
        except BaseException:
            with suppress(RunnerError):
                self.leases.release(job_id)
            raise

    def advance(self, job_id: str, stage: Stage) -> None:
        """Note in the mark which stage the job has reached. Raises LeaseLost if another runner has the job."""
        self.leases.update(job_id, stage=stage)

    def confirm(self, job_id: str, decision: Decision) -> None:
        """Note that the job is being generated. Raises LeaseLost if another runner has it, or has finished it on a
        store where leases do not exclude each other; storage.*."""
        self.leases.update(job_id, stage="generating")
        if not self.leases.exclusive:
            version = self._versions.get(job_id, decision.version)
            if self._read(_result_key(job_id))[1] != version:
                raise LeaseLost("another runner has finished this job meanwhile", where=job_id)

    def note_segments(self, job_id: str, done: int, *, before: bool = False) -> None:
        """Note in the mark how many segments are finished and kept; `before`: when the attempt began."""
        self.leases.update(job_id, segments_done=done, **({"segments_before": done} if before else {}))

    def note_stopping(self) -> None:
        """Note in every open mark that the process was told to stop: if it is killed now, no attempt counts."""
        for job_id in self.leases.held:
            with suppress(LeaseLost):
                self.leases.update(job_id, stopping=True)

    def abandon(self, job_id: str) -> None:
        """Give the job's lease back: the attempt was given back unfinished and does not count."""
        self.leases.release(job_id)

    def tidy(self, job_id: str, record: ResultRecord, published: Collection[str] | None = None) -> None:
        """Remove from a job that is done what does not belong to its output, and then the mark.

        `published`: the keys of all files of the output, where they are known. The mark goes last: while it stands, the
        next run does this again. Raises LeaseLost if another runner has the job; storage.*.
        """
        output = record.output.key if record.output is not None else ""
        fence = self.leases.fence(job_id)
        for info in list(self.storage.list(job_folder(job_id))):
            name = info.key.removeprefix(job_folder(job_id))
            if published is not None:
                stale = info.key not in published
            else:
                stale = info.key != output and not (output.endswith("/") and info.key.startswith(output))
                stale &= name not in KEPT
            if stale and (is_output_file(name) or is_part(name)):
                self.storage.delete(info.key, fence=fence)
        with suppress(RunnerError):  # they cost space and nothing else
            self.storage.remove_leftovers(job_folder(job_id))
        self.abandon(job_id)

    def lose(self, job_id: str) -> None:
        """Leave the job to the runner that has taken it over.

        What this process had asked the store for may arrive after that runner has tidied: once the job is done,
        `decide` has it tidied once more.
        """
        self.leases.forget(job_id)
        self._lost.add(job_id)

    def tidy_lost(self, job_id: str, decision: Decision) -> None:
        """Do what `tidy` does for a job that is done and was taken over, or is yet to be tidied by a runner that died.

        Raises JobTaken if another runner has the job; storage.*.
        """
        self._lost.discard(job_id)
        if decision.previous is not None:
            self._take(job_id, decision, decision.previous.fingerprint)
            self.tidy(job_id, decision.previous)

    @property
    def open_attempts(self) -> list[str]:
        """Jobs whose leases this process holds."""
        return self.leases.held

    def publish(self, job_id: str, local: Path, key: str) -> ObjectInfo:
        """Store a file of the output, fenced. The record that names `key` as its output is removed right before.

        Raises LeaseLost if another runner has the job; storage.*.
        """
        fence = self.leases.fence(job_id)
        for _ in range(REPLACES):
            if key == job_key(job_id, OUTPUT):
                self.before_replacing(job_id, key)
            try:
                info = self.storage.publish(local, key, fence=fence, replaces=self.leases.seen(job_id, key))
                self.leases.note_file(job_id, key, info)
                return info
            except LeaseLost:
                # A runner that lost this lease before it was taken here may have stored its file since: it is replaced.
                self.leases.update(job_id)
                self.leases.note_file(job_id, key, self.storage.stat(key))
        raise StorageConflict(
            "another runner stores this file again and again",
            where=self.storage.uri(key),
            todo="Stop the other runner, then run again",
        )

    def before_replacing(self, job_id: str, key: str) -> None:
        """Remove the record that names `key` as its output: it must never stand beside a file that is not its own.

        The mark keeps a copy, so that the record can be put back should the process die before the file is replaced.
        """
        record, version = self._read_result(job_id)
        if version is None or (record is not None and (record.output is None or record.output.key != key)):
            return
        self.leases.update(job_id, replaces=record)
        self.storage.delete(_result_key(job_id), version=version, fence=self.leases.fence(job_id))
        self._versions[job_id] = None

    def another_try(self, job_id: str, decision: Decision, code: str) -> Decision:
        """The decision for another try in this run, after a failure with `code`. Its mark stands meanwhile."""
        with suppress(RunnerError):  # the next attempt tries to put the record back once more
            self._put_back(job_id, decision)
            self.advance(job_id, "preparing")  # it waits: a process that dies now did not die in this job
        counted = self._counted(job_id, decision, code)
        return replace(decision, reason=f"retry after {code}", attempt=decision.attempt + 1, counted=counted)

    # -- the end of an attempt ------------------------------------------------------------------------------------

    def succeed(self, record: ResultRecord, decision: Decision) -> ResultRecord:
        """Write the record of a job whose output is published. Returns the record that stands.

        The record is written only over the one that was read when the job began. Where another run has written one
        meanwhile, this one replaces it if this output is the one that lies there; else the other's record stands.
        Raises StorageConflict if that is of other settings; storage.*.
        """
        assert record.output is not None
        job_id = record.job_id
        version = self._versions.get(job_id, decision.version)
        record = record.model_copy(update={"attempts_counted": decision.counted})
        for _ in range(REPLACES):
            written = self.storage.write_if(
                _result_key(job_id), record.to_json(), version, fence=self.leases.fence(job_id)
            )
            if written is not None:
                self._versions.pop(job_id, None)
                return record
            self._require_no_folder(job_id)
            other, version = self._read_result(job_id)
            if self._output_wrong(job_id, record.output) is None:
                continue
            if other is not None and other.status == "succeeded" and other.fingerprint == record.fingerprint:
                return other
            break
        raise StorageConflict(
            f"another run ({other.run_id if other else 'unknown'}) has replaced the output of this job meanwhile",
            where=self.storage.uri(_result_key(job_id)),
            todo="Run one manifest at a time into one output folder, or give each run its own --out; then run again",
        )

    def fail(self, record: ResultRecord, decision: Decision, *, blames_job: bool) -> Literal["recorded", "kept"]:
        """Note a failed attempt. `kept`: in the mark alone, beside an older record whose output stands.

        Only a failure that blames the job removes an output, and only one of another fingerprint; its record says so.
        Raises StorageConflict if another run has written a record meanwhile, which stands, or has the job; storage.*.
        """
        job_id, before = record.job_id, decision.previous
        if job_id not in self.leases.held:
            try:
                self._take(job_id, decision, record.fingerprint, record.run_id)
            except JobTaken as taken:
                raise LeaseLost("another runner has taken this job meanwhile", where=job_id) from taken
        fence = self.leases.fence(job_id)
        counted = self._counted(job_id, decision, None if record.error is None else record.error.code)
        record = record.model_copy(update={"attempts_counted": counted})
        stale = before is None or before.fingerprint != record.fingerprint
        good = before is not None and before.status == "succeeded" and not (blames_job and stale)
        if good and before is not None and self._output_wrong(job_id, before.output) is None:
            self._put_back(job_id, decision)
            self.leases.end_with_failure(job_id, record, decision.counted)
            return "kept"
        version = self._versions.pop(job_id, decision.version)
        if blames_job and stale and self._read(_result_key(job_id))[1] == version:
            if version is not None:
                self.storage.delete(_result_key(job_id), version=version, fence=fence)
                version = None
            if self._remove_outputs(job_id):
                notes = [*record.notes, "the output of an earlier run was removed"]
                record = record.model_copy(update={"notes": notes})
        if self.storage.write_if(_result_key(job_id), record.to_json(), version, fence=fence) is None:
            self._require_no_folder(job_id)
            raise StorageConflict(
                "another run has written a record of this job meanwhile, which stands",
                where=self.storage.uri(_result_key(job_id)),
            )
        return "recorded"

    def crashed(
        self, job_id: str, parts: Mapping[str, Any], run_id: str, recipe: str, decision: Decision
    ) -> ResultRecord | None:
        """Turn the mark of a job that died too often into a failure, noted as `fail` does; None if no such mark is.

        Raises JobTaken if another runner has the job by now; storage.*.
        """
        mark = self.attempt(job_id)
        if mark is None or mark.error is not None:
            return None
        self._take(job_id, decision, mark.fingerprint, run_id)
        if not mark.counts:  # the attempts before it are used up, and their failure has its record
            self.abandon(job_id)
            return None
        error = JobCrashed(
            f"the process died in {mark.counted} attempts, the last on {mark.host} at {mark.started_at}",
            where=job_id,
            todo="Look at that host's log (out of memory? driver?), then run with --max-attempts 0",
        )
        record = ResultRecord(
            job_id=job_id,
            status="failed",
            attempt=mark.attempt,
            run_id=run_id,
            reason="its process died",
            started_at=mark.started_at,
            finished_at=now(),
            fingerprint=mark.fingerprint,
            fingerprint_parts=dict(parts),
            recipe=recipe,
            error=ErrorRecord.of(error, mark.stage),
        )
        before = replace(decision, counted=mark.counted - 1)
        if self.fail(record, before, blames_job=False) == "recorded":
            self.abandon(job_id)
        return record

    # -- inside ---------------------------------------------------------------------------------------------------

    def _counted(self, job_id: str, decision: Decision, code: str | None) -> int:
        """Attempts that count towards the limit after one that failed with `code`, which this process has under way."""
        mark = self.leases.mark(job_id)
        if mark is not None and mark.progressed:
            return 0
        return decision.counted + (code is None or counts_as_attempt(code))

    def _restore(self, job_id: str, record: ResultRecord) -> None:
        """Put the record back that a lost attempt had removed. Raises JobTaken where another one stands by now."""
        version = self.storage.write_if(_result_key(job_id), record.to_json(), None, fence=self.leases.fence(job_id))
        if version is None:
            raise JobTaken
        self._versions[job_id] = version
        self.leases.update(job_id, replaces=None)

    def _put_back(self, job_id: str, decision: Decision) -> None:
        """Put the older record back that this process has removed, if its output stands."""
        before = decision.previous
        if before is None or self._versions.get(job_id, "") is not None:
            return
        if self._output_wrong(job_id, before.output) is None:
            self._versions[job_id] = self.storage.write_if(
                _result_key(job_id), before.to_json(), None, fence=self.leases.fence(job_id)
            )

    def _remove_outputs(self, job_id: str) -> bool:
        """Remove the outputs of earlier runs; True if there were some."""
        keys = [info.key for info in self.storage.list(job_folder(job_id))]
        names = {key: key.removeprefix(job_folder(job_id)) for key in keys}
        found = [key for key, name in names.items() if is_output_file(name)]
        for key in found:
            self.storage.delete(key, fence=self.leases.fence(job_id))
        return bool(found)

    def _read_result(self, job_id: str) -> tuple[ResultRecord | None, str | None]:
        data, version = self._read(_result_key(job_id))
        return (None if data is None else parse_record(data)), version

    def _read(self, key: str) -> tuple[bytes | None, str | None]:
        """(content, version) of a small object; neither where a folder or something unreadable lies in its place."""
        try:
            found = self.storage.read_versioned(key)
        except InputError:
            return None, None
        return (found.data, found.version) if found is not None else (None, None)

    def _require_no_folder(self, job_id: str) -> None:
        """Raise StorageDenied if what keeps the record from being written is no record at all."""
        key = _result_key(job_id)
        try:
            self.storage.read_versioned(key)
        except InputError as error:
            remedy = "Remove or rename what lies there, then run again"
            raise StorageDenied(
                f"the record cannot be written: {error.what}", where=error.where, todo=remedy
            ) from error


def parse_record(data: bytes) -> ResultRecord | None:
    """The record that `data` holds; None for a torn or foreign file."""
    try:
        return ResultRecord.model_validate(json.loads(data))
    except (ValueError, ValidationError, RecursionError):
        return None


def _leased(sighting: Sighting, before: ResultRecord | None) -> Decision:
    assert sighting.mark is not None
    reason = f"running on {sighting.mark.host}, {sighting.heard}"
    return Decision("leased", reason, sighting.mark.attempt, before)


def _why(before: ResultRecord | None, mark: AttemptMark | None, fingerprint: str, parts: Mapping[str, Any]) -> str:
    """Why a job runs that is not done, in words."""
    if mark is not None and mark.fingerprint == fingerprint:
        if mark.error is not None:
            return f"failed before: {mark.error.code} (attempt {mark.attempt})"
        if mark.stopping:
            return f"attempt {mark.attempt} was stopped"
        return f"attempt {mark.attempt} never ended: its process died"
    if before is not None and before.fingerprint != fingerprint:
        return _in_short(differences(before.fingerprint_parts, parts))
    if before is not None:
        return f"failed before: {before.error.code if before.error else 'unknown'} (attempt {before.attempt})"
    return "no record yet" if mark is None else "an attempt with other inputs or options never ended"


def _result_key(job_id: str) -> str:
    return job_key(job_id, RESULT)


def _mark_key(job_id: str) -> str:
    return job_key(job_id, ATTEMPT)
