"""Outcome: what a run came to, and how the outcomes of processes that shared its jobs become one.

In:   lines and exit codes. Out: `RunOutcome`; one line a job; one exit code. Never: running anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from runner.batch.shards import AnyShard, Shard
from runner.batch.summary import exit_code_of_lines
from runner.errors import RunnerError
from runner.records.record import JobLine
from runner.verbs.dry_run import Action

__all__ = ["RunOutcome", "counts_of_lines", "merge_exit_codes", "merge_lines"]

RANKS = {"not_run": 0, "skipped": 1, "failed": 2, "succeeded": 3}
# Of processes that leave jobs undone, the first of these that one ended with: what must be mended before a rerun, what
# stopped the run, what a rerun mends.
FIRST_CODES = (2, 130, 143, 3, 1)
DIED = 3  # the exit code that a process counts with which was killed


@dataclass(frozen=True)
class RunOutcome:
    """What a run came to."""

    exit_code: int  # 0 all done, 1 some failed, 2 or 3 stopped by an error, 130 or 143 by a signal
    run_id: str
    shard: Shard | AnyShard
    shard_reason: str
    counts: Mapping[str, int]  # jobs of this shard by status, and their total
    lines: tuple[JobLine, ...]  # one a job of this shard, in the manifest's order
    outputs: str  # folder or URI below which each job has its own
    summary: str  # folder or URI of the run's summary, metrics and events; empty after a dry run
    sheet: str | None  # where the contact sheet is, or why there is none; None where none was asked for
    error: RunnerError | None = None  # what stopped the run; None where it ran to its end, or a signal came
    actions: Mapping[str, Action] | None = None  # of a dry run: job id → what a run would do; None of a run

    @property
    def dry_run(self) -> bool:
        """Whether nothing was run, and the lines say what would be."""
        return self.actions is not None


def merge_lines(job_ids: Sequence[str], lines: Iterable[JobLine]) -> list[JobLine]:
    """One line a job, in the order of `job_ids`: succeeded goes over failed, skipped and not_run, in this order.

    Of two lines of one status the one with more attempts counts, else the first. Ids that `job_ids` lacks come last.
    """
    best: dict[str, JobLine] = {}
    for line in lines:
        known = best.get(line.id)
        if known is None or (RANKS[line.status], line.attempt or 0) > (RANKS[known.status], known.attempt or 0):
            best[line.id] = line
    missing = {
        name: JobLine(id=name, status="not_run", reason="the run ended before it")
        for name in job_ids
        if name not in best
    }
    return [best.get(name) or missing[name] for name in dict.fromkeys([*job_ids, *best])]


def counts_of_lines(lines: Sequence[JobLine]) -> dict[str, int]:
    """Status → jobs, and `total`."""
    found = Counter(line.status for line in lines)
    return {"total": len(lines)} | {status: found[status] for status in ("succeeded", "skipped", "failed", "not_run")}


def merge_exit_codes(lines: Sequence[JobLine], codes: Sequence[int | None]) -> int:
    """The exit code of a run from its merged lines and the exit codes of its processes, None for one that was killed.

    Where every job has an end it follows from the lines alone, whatever became of a process.
    """
    if all(line.status != "not_run" for line in lines):
        return exit_code_of_lines(lines)
    ended = [DIED if code is None else code for code in codes]
    return next((code for code in FIRST_CODES if code in ended), DIED)
