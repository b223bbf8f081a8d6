"""Lease journal: what several runners of one output did with which job and when, and whether each might render it.

In:   lines that forked runners append to one file; they outlive a SIGKILL. Out: renderings that no dead lease allows.
Never: the product's ledger. The clock is the monotonic one, which processes of a machine share.

    taken, renewed   a lease, the time before its request; the store has seen it later
    released         a lease, the time after its request
    begun            the generation of a job
    killed           a runner, the time before its signal
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.faults.output_checks import Problem

__all__ = ["Journal", "Line", "judge", "watch_leases"]

What = Literal["taken", "renewed", "released", "begun", "killed"]
NS = 10**9


@dataclass(frozen=True)
class Line:
    """`at`: seconds. `seeds`: the set of seeds of a generation."""

    at: float
    runner: int
    what: What
    job: str = ""
    seeds: int = 0


class Journal:
    """A file that runners append to. Made before they are forked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def write(self, runner: int, what: What, job: str = "", seeds: int = 0, *, at: float | None = None) -> None:
        """One line by one system call. `at`: now, if it is not given."""
        line = f"{time.monotonic() if at is None else at!r} {runner} {what} {job or '-'} {seeds}\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def lines(self) -> list[Line]:
        """All of them, by time."""
        found = []
        for text in self._path.read_text(encoding="ascii").splitlines():
            at, runner, what, job, seeds = text.split()
            found.append(Line(float(at), int(runner), what, job if job != "-" else "", int(seeds)))  # type: ignore[arg-type]
        return sorted(found, key=lambda line: line.at)


def watch_leases(journal: Journal, runner: int) -> None:
    """In this process, write down each lease that is taken, renewed or released. For a forked child."""
    from runner.batch.lease import Leases

    take, update, release = Leases.take, Leases.update, Leases.release

    def watched_take(self: Any, mark: Any, over: str | None) -> bool:
        begin = time.monotonic()
        taken = take(self, mark, over)
        if taken:
            journal.write(runner, "taken", mark.job_id, at=begin)
        return taken

    def watched_update(self: Any, job_id: str, **changes: Any) -> bool:
        begin = time.monotonic()
        renewed = update(self, job_id, **changes)
        if renewed:
            journal.write(runner, "renewed", job_id, at=begin)
        return renewed

    def watched_release(self: Any, job_id: str) -> None:
        held = job_id in self.held
        release(self, job_id)
        if held:
            journal.write(runner, "released", job_id)

    Leases.take, Leases.update, Leases.release = watched_take, watched_update, watched_release  # type: ignore[method-assign]


def judge(
    lines: Sequence[Line], lease_s: float, *, slack_s: float = 0.05, gone_seen: bool, done: Mapping[str, float]
) -> list[Problem]:
    """Renderings that were not allowed.

    A job may be rendered again where the lease of the runner that rendered it last had died: not renewed for `lease_s`
    (less `slack_s`, the fineness of the store's clock), or, with `gone_seen`, its process was killed. A runner whose
    own lease has died may go on with what it has begun for as long as it cannot know.

    `done`: when a job was seen to be done from outside, for jobs of one set of seeds; nothing takes its lease and
    renders it after that.
    """
    problems = []
    killed = {line.runner: line.at for line in lines if line.what == "killed"}
    last: dict[tuple[str, int], Line] = {}  # job, seeds -> the last rendering by a runner whose lease was alive
    leases: dict[tuple[int, str], list[Line]] = defaultdict(list)
    for line in lines:
        if line.job and line.what != "begun":
            leases[line.runner, line.job].append(line)

    def is_dead(runner: int, job: str, at: float) -> bool:
        before = [line for line in leases[runner, job] if line.at < at]
        if before and before[-1].what == "released":
            return False
        if gone_seen and killed.get(runner, at) < at:
            return True
        return not before or before[-1].at <= at - lease_s + slack_s

    for line in lines:
        if line.what != "begun" or is_dead(line.runner, line.job, line.at):
            continue
        before = last.get((line.job, line.seeds))
        last[line.job, line.seeds] = line
        taken = [own.at for own in leases[line.runner, line.job] if own.what == "taken" and own.at < line.at]
        who = f"{line.job} by runner {line.runner}"
        if not taken:
            problems.append(Problem("no lease", f"{who}, which has not taken its lease"))
            continue
        if taken[-1] > done.get(line.job, taken[-1]):
            problems.append(Problem("rendered again", f"{who}, {taken[-1] - done[line.job]:.2f} s after it was done"))
        if before is None:
            continue
        if before.runner == line.runner and before.at > taken[-1]:
            problems.append(Problem("rendered twice", f"{who} with one lease"))
        elif not is_dead(before.runner, line.job, taken[-1]):
            age = taken[-1] - max((own.at for own in leases[before.runner, line.job] if own.at < taken[-1]), default=0)
            what = f"{who}, whose lease runner {before.runner} had held {age:.2f} s before"
            problems.append(Problem("rendered twice", what))
    return problems
