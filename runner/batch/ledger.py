"""Ledger: what is done, what was attempted, and what to run and why.

In:   a job's id and fingerprint; the output storage. Out: a `Decision` with its reason; marks and records there.
Never: how frames are made. All state is in the output folder, readable by any tool:

    jobs/<id>/attempt.json   stands while the job runs
    jobs/<id>/output.mp4     or frames/000000.png …
    jobs/<id>/result.json    written last; removed before the output is replaced
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from runner.batch.fingerprint import differences, sha256_file
from runner.errors import JobCrashed, is_transient
from runner.records.record import AttemptMark, ErrorRecord, OutputRecord, ResultRecord
from runner.storage import Storage
from runner.timing import now

__all__ = ["Decision", "Ledger", "output_identity"]

OUTPUTS = ("output.mp4", "pose.mp4", "poster.jpg")


@dataclass(frozen=True)
class Decision:
    """What to do with a job. `exhausted`: it has failed as often as allowed and counts as failed again.

    `suspect`: a process died while it ran. Other jobs were under way in that process too, so it may be innocent: run
    alone, it will show. If it is skipped, its mark is all that is left of that.
    """

    action: Literal["run", "skip", "exhausted"]
    reason: str
    attempt: int = 1
    previous: ResultRecord | None = None
    suspect: bool = False


def output_identity(storage: Storage, key: str) -> tuple[str, int, int] | None:
    """(identity, bytes, files) of an output as it lies on the storage now; None if nothing is there.

    A key that ends with `/` is a folder of frames. Local files are hashed, S3 objects give their ETag.
    """
    if key.endswith("/"):
        found = sorted((info.key, info) for info in storage.list(key))
        if not found:
            return None
        lines = [f"{name}\t{_content(storage, info.key, info.identity)}" for name, info in found]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return f"sha256:{digest}", sum(info.bytes for _, info in found), len(found)
    info = storage.stat(key)
    return None if info is None else (_content(storage, key, info.identity), info.bytes, 1)


def _content(storage: Storage, key: str, identity: str) -> str:
    return identity or f"sha256:{sha256_file(Path(storage.uri(key)))}"


def _in_short(changes: list[str], most: int = 4) -> str:
    """The first few changes in one line; the record holds all parts."""
    more = f"; and {len(changes) - most} more" if len(changes) > most else ""
    return "; ".join(changes[:most]) + more


class Ledger:
    """The output storage, read as a ledger.

    `max_attempts` counts the runs of one fingerprint, crashes included; 0: no limit. One that ended because the store
    was away does not exhaust it.
    `force`: run all. `retry_failed`: run only what has failed.
    """

    def __init__(
        self, storage: Storage, *, max_attempts: int = 3, force: bool = False, retry_failed: bool = False
    ) -> None:
        self.storage = storage
        self.max_attempts = max_attempts
        self.force = force
        self.retry_failed = retry_failed

    def result(self, job_id: str) -> ResultRecord | None:
        """The job's record; None if there is none, or none that can be read (a torn or foreign file is no record)."""
        return self._load(f"jobs/{job_id}/result.json", ResultRecord)

    def attempt(self, job_id: str) -> AttemptMark | None:
        """The mark of a run that has not ended: it is running now, or its process died."""
        return self._load(f"jobs/{job_id}/attempt.json", AttemptMark)

    def succeeded(self, job_id: str) -> bool:
        """Whether a record of success stands, whatever it was made of."""
        record = self.result(job_id)
        return record is not None and record.status == "succeeded"

    def decide(self, job_id: str, fingerprint: str, parts: Mapping[str, Any]) -> Decision:
        """Whether to run `job_id`, and why, in words."""
        before, mark = self.result(job_id), self.attempt(job_id)
        tried = self._attempts(fingerprint, before, mark)
        if self.force:
            return Decision("run", "--force", tried + 1, before)
        if before is not None and before.status == "succeeded":
            return self._after_success(before, mark, fingerprint, parts, tried)
        if before is None and mark is None:
            if self.retry_failed:
                return Decision("skip", "never run; --retry-failed runs failures only")
            return Decision("run", "no record yet")
        return self._after_failure(before, mark, fingerprint, parts, tried)

    def _after_success(
        self,
        before: ResultRecord,
        mark: AttemptMark | None,
        fingerprint: str,
        parts: Mapping[str, Any],
        tried: int,
    ) -> Decision:
        if self.retry_failed:
            return Decision("skip", "succeeded; --retry-failed runs failures only", before.attempt, before)
        if before.fingerprint == fingerprint:
            why = self._output_wrong(before.output)
            if why is None:
                return Decision("skip", "done", before.attempt, before, suspect=mark is not None)
        else:
            why = _in_short(differences(before.fingerprint_parts, parts))
        if self.max_attempts and tried >= self.max_attempts:
            return self._exhausted(tried, "its process died", before)
        return Decision("run", why, tried + 1, before, suspect=tried > 0)

    def _exhausted(self, tried: int, last: str, before: ResultRecord | None) -> Decision:
        remedy = "--max-attempts 0 or --force runs it again"
        return Decision("exhausted", f"{tried} attempts, the last: {last}; {remedy}", tried, before)

    def _after_failure(
        self,
        before: ResultRecord | None,
        mark: AttemptMark | None,
        fingerprint: str,
        parts: Mapping[str, Any],
        tried: int,
    ) -> Decision:
        failed = before.error.code if before is not None and before.error is not None else "unknown"
        crashed = mark is not None and mark.fingerprint == fingerprint and mark.attempt == tried
        last = "its process died" if crashed else failed
        # A store that was away says nothing against the job: a run that ended with 3 may be started again.
        if self.max_attempts and tried >= self.max_attempts and not is_transient(last):
            return self._exhausted(tried, last, before)
        if crashed:
            return Decision("run", f"attempt {tried} never ended: its process died", tried + 1, before, suspect=True)
        if before is not None and before.fingerprint != fingerprint:
            return Decision("run", _in_short(differences(before.fingerprint_parts, parts)), tried + 1, before)
        if before is None:
            return Decision("run", "an attempt with other inputs or options never ended", tried + 1)
        return Decision("run", f"failed before: {failed} (attempt {tried})", tried + 1, before)

    def begin(self, job_id: str, decision: Decision, fingerprint: str, run_id: str) -> None:
        """Mark the job as running."""
        mark = AttemptMark(
            job_id=job_id,
            attempt=decision.attempt,
            fingerprint=fingerprint,
            run_id=run_id,
            host=socket.gethostname(),
            started_at=now(),
        )
        self.storage.write_bytes(f"jobs/{job_id}/attempt.json", mark.to_json())

    def abandon(self, job_id: str) -> None:
        """The job was given back unfinished, by a signal: no attempt of it counts."""
        self.storage.delete(f"jobs/{job_id}/attempt.json")

    def before_publish(self, job_id: str) -> None:
        """Remove the old record: it must never stand beside an output that is not its own."""
        self.storage.delete(f"jobs/{job_id}/result.json")

    def remove_outputs(self, job_id: str, *, keep: Collection[str] = ()) -> bool:
        """Remove what an earlier run left, but for the keys in `keep`; True if there was something."""
        keys = [f"jobs/{job_id}/{name}" for name in OUTPUTS]
        found = [key for key in keys if key not in keep and self.storage.stat(key)]
        found += [info.key for info in self.storage.list(f"jobs/{job_id}/frames/") if info.key not in keep]
        for key in found:
            self.storage.delete(key)
        return bool(found)

    def finish(self, record: ResultRecord) -> None:
        """Write the record, then take the mark away. A failed job first loses its stale output; its record says so."""
        if record.status == "failed":
            self.storage.delete(f"jobs/{record.job_id}/result.json")
            if self.remove_outputs(record.job_id):
                record = record.model_copy(
                    update={"notes": [*record.notes, "the output of an earlier run was removed"]}
                )
        self.storage.write_bytes(f"jobs/{record.job_id}/result.json", record.to_json())
        self.storage.delete(f"jobs/{record.job_id}/attempt.json")

    def crashed(self, job_id: str, parts: Mapping[str, Any], run_id: str, recipe: str) -> ResultRecord | None:
        """Turn the mark of a job that died too often into a failed record; None if no such mark stands."""
        mark = self.attempt(job_id)
        if mark is None:
            return None
        error = JobCrashed(
            f"the process died in each of {mark.attempt} attempts, the last on {mark.host} at {mark.started_at}",
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
            error=ErrorRecord.of(error, "unknown"),
        )
        self.finish(record)
        return record

    def _attempts(self, fingerprint: str, before: ResultRecord | None, mark: AttemptMark | None) -> int:
        """How often this very fingerprint was tried without success."""
        tried = [0]
        if before is not None and before.status == "failed" and before.fingerprint == fingerprint:
            tried.append(before.attempt)
        if mark is not None and mark.fingerprint == fingerprint:
            tried.append(mark.attempt)
        return max(tried)

    def _output_wrong(self, output: OutputRecord | None) -> str | None:
        """Why the recorded output cannot be trusted; None if it is there as recorded."""
        if output is None:
            return "the record names no output"
        found = output_identity(self.storage, output.key)
        if found is None:
            return f"the output is gone: {output.key}"
        if (found[0], found[1]) != (output.identity, output.bytes):
            return f"the output is not what the record says: {output.key}"
        return None

    def _load(self, key: str, model: type[Any]) -> Any:
        data = self.storage.read_bytes(key)
        if data is None:
            return None
        try:
            return model.model_validate(json.loads(data))
        except (ValueError, ValidationError):
            return None
