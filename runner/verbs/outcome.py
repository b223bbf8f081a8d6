"""Outcome: the result of a run.

In:   lines and exit codes. Out: `RunOutcome`; jobs by status. Never: running anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runner.batch.shards import AnyShard, Shard
from runner.errors import RunnerError
from runner.records.record import JobLine
from runner.verbs.dry_run import Action

__all__ = ["RunOutcome", "counts_of_lines"]


@dataclass(frozen=True)
class RunOutcome:
    """The result of a run."""

    exit_code: int  # 0 all done, 1 some failed, 2 or 3 stopped by an error, 130 or 143 by a signal
    run_id: str
    shard: Shard | AnyShard
    shard_reason: str
    counts: Mapping[str, int]  # jobs of this shard by status, and their total
    lines: tuple[JobLine, ...]  # one per job of this shard, in the manifest's order
    outputs: str  # folder or URI below which each job has its own
    summary: str  # folder or URI of the run's summary, metrics and events; empty after a dry run
    sheet: str | None  # place of the contact sheet, or why there is none; None if not requested
    error: RunnerError | None = None  # the error that stopped the run; None if it ran to its end or a signal came
    actions: Mapping[str, Action] | None = None  # of a dry run: job id → what a run would do; otherwise None

    @property
    def dry_run(self) -> bool:
        """Whether this was a dry run: the lines describe what would run."""
        return self.actions is not None


def counts_of_lines(lines: Sequence[JobLine]) -> dict[str, int]:
    """Return status → number of jobs, and `total`."""
    found = Counter(line.status for line in lines)
    return {"total": len(lines)} | {status: found[status] for status in ("succeeded", "skipped", "failed", "not_run")}
