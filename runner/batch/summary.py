"""Summary: write a run's summary to the output storage, and rewrite it at growing intervals.

In:   a line per job, and its record. Out: `runs/<run-id>/<shard>.summary.json` and `.metrics.prom`, whole objects that
any tool can read during the run; the events that wait; the exit code. Never: how a job is run.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from runner.batch.lease import host_name
from runner.batch.memory_trend import MemoryTrend
from runner.errors import is_transient
from runner.records.events import EventLog
from runner.records.output_layout import METRICS, SUMMARY, run_key
from runner.records.prometheus import RunMetrics
from runner.records.record import JobLine, ProcessUsage, ResultRecord, RunSummary, SpanRecord, environment
from runner.storage import Storage
from runner.timing import now

__all__ = ["SummaryWriter", "exit_code_of_lines"]

WRITING_SHARE = 0.1  # most of the time spent on writing: the files are rewritten whole, and a store may be slow
SHARE_OF_JOBS = 0.1  # write again when this share of the jobs has ended since the last writing
WAIT_S = 60.0  # or after this time, or after WAIT_SHARE of the run's time, whichever is longer
WAIT_SHARE = 0.02
KEEP_PROCESSES = 100  # earlier processes of the same shard that stay in the summary


def exit_code_of_lines(lines: Iterable[JobLine]) -> int:
    """Return the exit code of a run that was not stopped: 0 if no job failed; 3 if a rerun may succeed; else 1.

    3 means that all failures are transient.
    """
    failed = [line.error for line in lines if line.status == "failed"]
    if not failed:
        return 0
    return 3 if all(error is not None and error.retryable and is_transient(error.code) for error in failed) else 1


class SummaryWriter:
    """Collects the lines of jobs and writes the summary. Safe from any thread."""

    def __init__(
        self,
        storage: Storage,
        *,
        run_id: str,
        shard: str,
        shard_reason: str,
        manifest: str,
        recipe: str,
        job_ids: Sequence[str],
        events: EventLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_id = run_id
        self._storage, self._events, self._clock = storage, events, clock
        self.shard, self._why, self._manifest, self._recipe = shard, shard_reason, manifest, recipe
        self._job_ids = dict.fromkeys(job_ids)  # in the manifest's order
        self._lines: dict[str, JobLine] = {}
        self._metrics = RunMetrics()
        self._trend = MemoryTrend()
        self._begin, self._started_at = clock(), now()
        self._earlier: list[ProcessUsage] | None = None  # processes that ran this shard before; None: not read yet
        self._device, self._work_s, self._loading = "", 0.0, list[SpanRecord]()
        self._worked_until = self._begin  # _work_s contains all work before this time
        self._idle_s = 0.0  # as last written to the metrics
        self._not_before = self._written_at = float("-inf")
        self._written_lines = 0
        self._lock = threading.Lock()

    @property
    def counts(self) -> dict[str, int]:
        """Jobs by status; together they are all jobs of the shard."""
        found = Counter(line.status for line in self._lines.values())
        rest = len(self._job_ids) - sum(found.values())
        return {"total": len(self._job_ids)} | {
            status: found[status] + (rest if status == "not_run" else 0)
            for status in ("succeeded", "skipped", "failed", "not_run")
        }

    @property
    def lines(self) -> list[JobLine]:
        """One line per job, in the manifest's order; `not_run` for jobs that have not ended."""
        return [
            self._lines.get(i) or JobLine(id=i, status="not_run", reason="the run ended before it")
            for i in self._job_ids
        ]

    def add(self, line: JobLine, record: ResultRecord | None = None, rss_bytes: int | None = None) -> None:
        """Note a job's end and, when it is time, write the summary. Raises storage.*.

        `rss_bytes`: the resident memory of the process after a job that ran.
        """
        with self._lock:
            if rss_bytes is not None:
                self._trend.add(rss_bytes)
            self._job_ids.setdefault(line.id)  # a source may add jobs after the start
            self._lines[line.id] = line
            self._metrics.observe(line, record)
            if self._is_due():
                self._write(None, None, None)

    def note_loading(self, begin: float) -> None:
        """Note that a model was loaded from `begin` (monotonic seconds) until now."""
        end = self._clock()
        span = SpanRecord(begin_s=round(max(0.0, begin - self._begin), 3), end_s=round(end - self._begin, 3))
        with self._lock:
            self._loading.append(span)

    def note_work(self, seconds: float, device: str, until: float | None = None) -> None:
        """Note the device work of an attempt, `seconds`, for every kind of end.

        `device`: its name; empty if unknown. `until`: when the attempt left the device, monotonic; None if unknown.
        """
        with self._lock:
            self._work_s += seconds
            self._device = device or self._device
            self._worked_until = max(self._worked_until, until or self._worked_until)

    def finish(self, stopped_by: str | None, stop_code: int | None) -> int:
        """Write the last summary and return the exit code. Raises storage.*."""
        code = self.exit_code(stop_code)
        with self._lock:
            self._write(now(), code, stopped_by if stop_code is not None else None)
        return code

    def exit_code(self, stop_code: int | None) -> int:
        """Return 0: all done; 1: some failed; 3: a rerun may succeed; or `stop_code` if the run was stopped."""
        return exit_code_of_lines(self._lines.values()) if stop_code is None else stop_code

    def _is_due(self) -> bool:
        """Return whether to write now. A summary contains all jobs, so writing it at every job would cost O(n²)."""
        time = self._clock()
        grown = len(self._lines) - self._written_lines >= SHARE_OF_JOBS * len(self._job_ids)
        waited = time - self._written_at >= max(WAIT_S, WAIT_SHARE * (time - self._begin))
        return time >= self._not_before and (grown or waited)

    def _build(self, finished_at: str | None, exit_code: int | None, stopped_by: str | None) -> RunSummary:
        return RunSummary(
            run_id=self.run_id,
            shard=self.shard,
            shard_reason=self._why,
            manifest=self._manifest,
            recipe=self._recipe,
            started_at=self._started_at,
            finished_at=finished_at,
            seconds=round(self._clock() - self._begin, 3),
            exit_code=exit_code,
            stopped_by=stopped_by,
            counts=self.counts,
            jobs=self.lines,
            memory_trend=self._trend.record(),
            processes=[*(self._earlier or ()), self._usage(finished_at is not None)],
            environment=dict(environment()),
        )

    def _usage(self, finished: bool) -> ProcessUsage:
        return ProcessUsage(
            host=host_name(),
            pid=os.getpid(),
            device=self._device,
            started_at=self._started_at,
            seconds=round(self._clock() - self._begin, 3),
            finished=finished,
            work_s=round(self._work_s, 3),
            loading=self._loading,
        )

    def _count_idle(self, process: ProcessUsage) -> float:
        """Return the idle seconds for a counter, which must not decrease.

        Before the run's end, they count until the last attempt left the device: the work of the next attempt is only
        noted at its end.
        """
        idle_s = process.idle_s
        if not process.finished:
            until = self._worked_until - self._begin
            loading_s = sum(span.end_s - span.begin_s for span in self._loading if span.end_s <= until)
            idle_s = round(until - self._work_s - loading_s, 3)
        self._idle_s = max(self._idle_s, idle_s)
        return self._idle_s

    def _read_earlier(self) -> list[ProcessUsage]:
        """Return the usage of earlier processes of this shard and run id, which a scheduler has restarted."""
        data = self._storage.read_bytes(run_key(self.run_id, self.shard, SUMMARY))
        try:
            return [] if data is None else RunSummary.model_validate(json.loads(data)).processes[-KEEP_PROCESSES:]
        except ValueError:  # torn or foreign
            return []

    def _write(self, finished_at: str | None, exit_code: int | None, stopped_by: str | None) -> None:
        begin = self._clock()
        if self._earlier is None:
            self._earlier = self._read_earlier()
        summary = self._build(finished_at, exit_code, stopped_by)
        self._storage.write_bytes(run_key(self.run_id, self.shard, SUMMARY), summary.to_json())
        metrics = self._metrics.text(summary, idle_s=self._count_idle(summary.processes[-1]))
        self._storage.write_bytes(run_key(self.run_id, self.shard, METRICS), metrics.encode())
        if self._events is not None:
            self._events.flush()
        end = self._clock()
        self._not_before = end + (end - begin) / WRITING_SHARE
        self._written_at, self._written_lines = end, len(self._lines)
