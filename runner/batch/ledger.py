"""Ledger: decide which jobs run and why, from the records and marks in the output folder, and write these.

In:   a job's id and fingerprint; the output storage. Out: a `Decision` with its reason; marks and records there.
Never: how frames are made.

All state is in the output folder, readable by any tool; records/output_layout.py has the names. The mark of a job is
the lease of the runner that has the job. It stays after a failure that kept an older output. The record is written
last, and removed before the file that it names is replaced. All writes in between are fenced: the store refuses them
once another runner has the lease.
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

REPLACES = 5  # tries to replace a record or an output of another run

Listing = Mapping[str, ObjectInfo]  # key → object, of a whole output storage
Stage = Literal["preparing", "generating", "delivering"]


class JobTaken(Exception):
    """Another runner took or finished the job after the decision and before this runner took the lease."""


@dataclass(frozen=True)
class Decision:
    """What to do with a job. `exhausted`: it has failed as often as allowed and counts as failed again. `leased`:
    another runner has it; check it again later.

    `suspect`: a process died while the job was under way. Other jobs ran in that process too, so retry this one last
    and alone to find out whether it caused the crash.
    """

    action: Literal["run", "skip", "exhausted", "leased"]
    reason: str
    attempt: int = 1
    previous: ResultRecord | None = None
    suspect: bool = False
    counted: int = 0  # earlier attempts that count towards the limit
    version: str | None = None  # of result.json as it was read; None: no such file
    error: ErrorRecord | None = None  # `exhausted`: the error of the last attempt, if known
    mark_version: str | None = None  # of attempt.json as it was read; None: no such file
    restore: bool = False  # a lost attempt removed `previous`, but its output is still there


def output_key_wrong(job_id: str, output: OutputRecord | None) -> str | None:
    """Return why the output that a record names cannot be the job's, as a text; None if it can."""
    if output is None:
        return "the record does not name an output"
    try:
        check_key(output.key.rstrip("/"))
    except ConfigInvalid as error:
        return f"the record names an unusable output: {error.what}"
    if not output.key.startswith(job_folder(job_id)):
        return f"the record names an output outside {job_folder(job_id)}"
    return None


def output_identity(storage: Storage, key: str, hashes: FileHashes | None = None) -> tuple[str, int, int] | None:
    """Return (identity, bytes, files) of an output as it is on the storage now; None if it does not exist.

    A key that ends with `/` is a folder of frames. Files on a disk are hashed; an object store gives the identity.
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
    """Join the first `most` changes in one line. The record contains all parts."""
    return first_few(changes, most, "; ")


class Ledger:
    """The records and marks of an output storage. Safe from any thread.

    `max_attempts`: limit of the attempts with one fingerprint; 0: no limit. An attempt counts if it failed through the
    job's own fault, or if the process died while generating the job. The count restarts after an attempt that finished
    a segment which is kept. `force`: run all jobs. `retry_failed`: run only failed jobs. `since`: a job that another
    runner has failed after this time (`timing.now`) is not tried again.
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
        """Return the job's record; None if there is none, or if the file is torn or foreign."""
        return self._read_result(job_id)[0]

    def attempt(self, job_id: str) -> AttemptMark | None:
        """Return the mark of an attempt: it runs, its process died, or it failed and an older output was kept."""
        return self.leases.look(job_id).mark

    def decide(
        self, job_id: str, fingerprint: str, parts: Mapping[str, Any], listing: Listing | None = None
    ) -> Decision:
        """Decide whether to run `job_id`, with the reason as a text.

        `listing`: the objects on the storage, so that only existing files are requested.
        """
        self._versions.pop(job_id, None)
        has_mark = listing is None or _mark_key(job_id) in listing
        sighting = self.leases.look(job_id) if has_mark else Sighting(None, None)
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
                reason = "succeeded before; --retry-failed runs only failed jobs"
                if not same:
                    changes = _in_short(differences(before.fingerprint_parts, parts))
                    reason = f"changed, but did not fail ({changes}); a run without --retry-failed renders it"
                return Decision("skip", reason, before.attempt, before)
            if same:
                why = self._output_wrong(job_id, before.output, listing)
                if why is None:
                    lost = job_id in self._lost
                    if lost and sighting.live:  # that runner may still be removing leftovers: check again after it
                        return _leased(sighting, before)
                    left = (mark is not None or lost) and not sighting.live
                    return Decision("skip", "done", before.attempt, before, suspect=left)
        elif before is None and mark is None and self.retry_failed:
            return Decision("skip", "never run; --retry-failed runs only failed jobs")
        if sighting.live:
            return _leased(sighting, before)
        error = own.error if own is not None and own.error is not None else failed.error if failed else None
        ended = own.finished_at if own is not None and own.error is not None else failed.finished_at if failed else None
        if error is not None and self.since is not None and (ended or "") > self.since and not error.retryable:
            reason = "it failed in another runner while this run was under way"
            return Decision("exhausted", reason, tried, before, counted=counted, error=error)
        crashed = own is not None and own.error is None and own.counts
        if self.max_attempts and counted >= self.max_attempts:
            last = "its process died" if crashed or error is None else error.code
            reason = f"no attempts left ({counted} used, last: {last}); --max-attempts 0 or --force runs it again"
            return Decision("exhausted", reason, tried, before, counted=counted, error=None if crashed else error)
        died = own is not None and own.error is None and not own.stopping and not own.progressed
        why = why or _why(before, mark, fingerprint, parts)
        return Decision("run", why, tried + 1, before, suspect=died, counted=counted)

    def _output_wrong(self, job_id: str, output: OutputRecord | None, listing: Listing | None = None) -> str | None:
        """Return why the recorded output cannot be trusted; None if it is there as recorded."""
        wrong = output_key_wrong(job_id, output)
        if output is None or wrong is not None:
            return wrong
        if listing is not None and not output.key.endswith("/"):  # a listing contains no single frames
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
        """Take the job's lease at the start of preparation. `alone`: no other job is under way in this process.

        Raises JobTaken if another runner has taken it, or has written a record since the decision; storage.*.
        """
        if job_id in self.leases.held:  # another try in this run
            self._put_back(job_id, decision)
            self.leases.update(job_id, attempt=decision.attempt, attempts_counted=decision.counted, stage="preparing")
            return
        self._take(job_id, decision, fingerprint, run_id, alone=alone)
        with suppress(RunnerError):  # they only cost space
            self.storage.remove_leftovers(job_folder(job_id))

    def _take(
        self, job_id: str, decision: Decision, fingerprint: str, run_id: str = "", *, alone: bool = False
    ) -> None:
        """Take the lease that was found at the decision, and check that the record has not changed since."""
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
        """Note the stage of the job in its mark. Raises LeaseLost if another runner has the job."""
        self.leases.update(job_id, stage=stage)

    def confirm(self, job_id: str, decision: Decision) -> None:
        """Note in the mark that the job is being generated. Raises LeaseLost if another runner has the job, or has
        finished it on a store without exclusive leases; storage.*."""
        self.leases.update(job_id, stage="generating")
        if not self.leases.exclusive:
            version = self._versions.get(job_id, decision.version)
            if self._read(_result_key(job_id))[1] != version:
                raise LeaseLost("another runner has finished this job meanwhile", where=job_id)

    def note_segments(self, job_id: str, done: int, *, before: bool = False) -> None:
        """Note in the mark how many segments are finished and kept. `before`: at the start of the attempt."""
        self.leases.update(job_id, segments_done=done, **({"segments_before": done} if before else {}))

    def note_stopping(self) -> None:
        """Note in every open mark that the process is stopping: if it is killed now, no attempt counts."""
        for job_id in self.leases.held:
            with suppress(LeaseLost):
                self.leases.update(job_id, stopping=True)

    def abandon(self, job_id: str) -> None:
        """Release the job's lease. An unfinished attempt then does not count."""
        self.leases.release(job_id)

    def tidy(self, job_id: str, record: ResultRecord, published: Collection[str] | None = None) -> None:
        """Remove the files of a finished job that do not belong to its output, and then the mark.

        `published`: the keys of all files of the output, if known. The mark is removed last: while it is there, the
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
        with suppress(RunnerError):  # they only cost space
            self.storage.remove_leftovers(job_folder(job_id))
        self.abandon(job_id)

    def lose(self, job_id: str) -> None:
        """Leave the job to the runner that has taken it over.

        Its late requests may reach the store after that runner has tidied: `decide` then lets this process tidy again.
        """
        self.leases.forget(job_id)
        self._lost.add(job_id)

    def tidy_lost(self, job_id: str, decision: Decision) -> None:
        """Tidy a finished job that was taken over, or that a runner which died did not tidy.

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
        """Store a file of the output, fenced. A record that names `key` as its output is removed right before.

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
                # A runner that lost this lease earlier may have stored its file since then: replace it.
                self.leases.update(job_id)
                self.leases.note_file(job_id, key, self.storage.stat(key))
        raise StorageConflict(
            "another runner writes this file repeatedly",
            where=self.storage.uri(key),
            todo="Stop the other runner, then run the same command again",
        )

    def before_replacing(self, job_id: str, key: str) -> None:
        """Remove the record that names `key` as its output, so that no record names another run's file.

        The mark keeps a copy: the record can be restored if the process dies before the file is replaced.
        """
        record, version = self._read_result(job_id)
        if version is None or (record is not None and (record.output is None or record.output.key != key)):
            return
        self.leases.update(job_id, replaces=record)
        self.storage.delete(_result_key(job_id), version=version, fence=self.leases.fence(job_id))
        self._versions[job_id] = None

    def another_try(self, job_id: str, decision: Decision, code: str) -> Decision:
        """Return the decision for another try in this run, after a failure with `code`. The mark stays meanwhile."""
        with suppress(RunnerError):  # the next attempt tries to restore the record again
            self._put_back(job_id, decision)
            self.advance(job_id, "preparing")  # the job waits: if the process dies now, this job is not the cause
        counted = self._counted(job_id, decision, code)
        return replace(decision, reason=f"retry after {code}", attempt=decision.attempt + 1, counted=counted)

    # -- the end of an attempt ------------------------------------------------------------------------------------

    def succeed(self, record: ResultRecord, decision: Decision) -> ResultRecord:
        """Write the record of a job whose output is published. Returns the record that is stored in the end.

        The record only replaces the one that was read when the job began. If another run has written a record
        meanwhile, this one replaces it only if the stored output is this run's; else the other record stays.
        Raises StorageConflict if the other record has other settings; storage.*.
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
            todo="Run one manifest at a time into one output folder, or give each run its own --out. Then run again",
        )

    def fail(self, record: ResultRecord, decision: Decision, *, blames_job: bool) -> Literal["recorded", "kept"]:
        """Record a failed attempt. `kept`: only in the mark, beside an older record whose output is kept.

        An output is removed only if the failure blames the job and the output has another fingerprint; the new record
        notes that. Raises StorageConflict if another run has the job or has written a record meanwhile; storage.*.
        """
        job_id, before = record.job_id, decision.previous
        if job_id not in self.leases.held:
            try:
                self._take(job_id, decision, record.fingerprint, record.run_id)
            except JobTaken as taken:
                raise LeaseLost("another runner has taken this job over", where=job_id) from taken
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
                "another run has written a record of this job meanwhile, and it was kept",
                where=self.storage.uri(_result_key(job_id)),
                todo="Run one manifest at a time into one output folder, or give each run its own --out",
            )
        return "recorded"

    def crashed(
        self, job_id: str, parts: Mapping[str, Any], run_id: str, recipe: str, decision: Decision
    ) -> ResultRecord | None:
        """Record a failure for a job whose process died too often, from its mark; None without such a mark.

        Raises JobTaken if another runner has the job; storage.*.
        """
        mark = self.attempt(job_id)
        if mark is None or mark.error is not None:
            return None
        self._take(job_id, decision, mark.fingerprint, run_id)
        if not mark.counts:  # earlier attempts were the last allowed ones, and their failure is recorded
            self.abandon(job_id)
            return None
        error = JobCrashed(
            f"the process died in {mark.counted} attempts of this job, last on {mark.host} at {mark.started_at}",
            where=job_id,
            todo="Check that host's log for exhausted memory or driver errors, then run with --max-attempts 0",
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
        """Return the number of counting attempts after this process's attempt failed with `code`."""
        mark = self.leases.mark(job_id)
        if mark is not None and mark.progressed:
            return 0
        return decision.counted + (code is None or counts_as_attempt(code))

    def _restore(self, job_id: str, record: ResultRecord) -> None:
        """Restore the record that a lost attempt had removed. Raises JobTaken if there is another record now."""
        version = self.storage.write_if(_result_key(job_id), record.to_json(), None, fence=self.leases.fence(job_id))
        if version is None:
            raise JobTaken
        self._versions[job_id] = version
        self.leases.update(job_id, replaces=None)

    def _put_back(self, job_id: str, decision: Decision) -> None:
        """Restore the older record that this process has removed, if its output is still there."""
        before = decision.previous
        if before is None or self._versions.get(job_id, "") is not None:
            return
        if self._output_wrong(job_id, before.output) is None:
            self._versions[job_id] = self.storage.write_if(
                _result_key(job_id), before.to_json(), None, fence=self.leases.fence(job_id)
            )

    def _remove_outputs(self, job_id: str) -> bool:
        """Remove the outputs of earlier runs. Return whether there were any."""
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
        """Return (content, version) of a small object; (None, None) if it is missing, a folder or unreadable."""
        try:
            found = self.storage.read_versioned(key)
        except InputError:
            return None, None
        return (found.data, found.version) if found is not None else (None, None)

    def _require_no_folder(self, job_id: str) -> None:
        """Raise StorageDenied if the record cannot be written because a folder has its name."""
        key = _result_key(job_id)
        try:
            self.storage.read_versioned(key)
        except InputError as error:
            remedy = "Remove or rename what has this name, then run the same command again"
            raise StorageDenied(
                f"the record cannot be written: {error.what}", where=error.where, todo=remedy
            ) from error


def parse_record(data: bytes) -> ResultRecord | None:
    """Return the record in `data`; None for a torn or foreign file."""
    try:
        return ResultRecord.model_validate(json.loads(data))
    except (ValueError, ValidationError, RecursionError):
        return None


def _leased(sighting: Sighting, before: ResultRecord | None) -> Decision:
    assert sighting.mark is not None
    reason = f"running on {sighting.mark.host}, {sighting.heard}"
    return Decision("leased", reason, sighting.mark.attempt, before)


def _why(before: ResultRecord | None, mark: AttemptMark | None, fingerprint: str, parts: Mapping[str, Any]) -> str:
    """Return why an unfinished job runs, as a text."""
    if mark is not None and mark.fingerprint == fingerprint:
        if mark.error is not None:
            return f"failed before: {mark.error.code} (attempt {mark.attempt})"
        if mark.stopping:
            return f"attempt {mark.attempt} was stopped"
        return f"attempt {mark.attempt} did not end: its process died"
    if before is not None and before.fingerprint != fingerprint:
        return _in_short(differences(before.fingerprint_parts, parts))
    if before is not None:
        return f"failed before: {before.error.code if before.error else 'unknown'} (attempt {before.attempt})"
    return "no record yet" if mark is None else "an attempt with other inputs or options did not end"


def _result_key(job_id: str) -> str:
    return job_key(job_id, RESULT)


def _mark_key(job_id: str) -> str:
    return job_key(job_id, ATTEMPT)
