"""Kill trials: runs that die by SIGKILL at a file operation, before or after a request, or at an instant.

In:   a stage. Out: a `Row` of what was tried and what went wrong. Never: faults that a run outlives.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.file_operations import CHANGES, FileOperations
from tests.faults.http_requests import watch_requests
from tests.faults.output_checks import Problem, check_end, look
from tests.faults.shared_page import SharedPage
from tests.faults.trial_stage import ANY_JOB, DISTURBED, Row, Stage, last_error, spread

__all__ = ["SERIES", "WATCHES", "kills"]

MAX_ATTEMPTS = 3  # the command line's default
SERIES = 6  # kills of one output, one after the other
AFTER_GENERATING_S = 0.05  # for the mark of a job to be taken back when its frames are made
TRIES = 4  # of a kill that comes after the end: in another run the point or instant lies elsewhere


def kills(stage: Stage, trials: int, series: int, chance: random.Random, *, every_point: bool) -> list[Row]:
    """Rows of `trials` kills, and of `series` outputs killed several times in a row."""
    rows = [kill_trials(stage, trials, chance, every_point=every_point)] if trials or every_point else []
    if series and stage.name == "fresh":
        stage.settings["generate_s"] = 0.1
        rows.append(series_trials(stage, series * SERIES, chance))
    return rows


@dataclass(frozen=True)
class Kill:
    """`kind`: `operation` or `request`, `at` its number; `instant`, `at` seconds from the begin of the run; or
    `rendering`, `at` seconds from when the job of index `job` begins to be generated."""

    kind: str
    at: float
    job: int | None = None

    def __str__(self) -> str:
        where = f"{self.at:.0f}" if self.kind in WATCHES else f"{self.at:.3f} s"
        return f"kill at {self.kind} {where}" + ("" if self.job is None else f" of job{self.job}")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch_operations(page: SharedPage, folders: Sequence[Path], at: int = 0, strike: Callable[[], None] = die) -> None:
    """Count the changes of the output folder; die, or what `strike` does, at the one numbered `at`."""

    def meet(name: str, path: str) -> None:
        if page.add("points") == at:
            page.text = f"{name} {path}"
            strike()

    FileOperations(folders[:1], meet, CHANGES).install()


def watch_s3(page: SharedPage, folders: Sequence[Path], at: int = 0, strike: Callable[[], None] = die) -> None:
    """Count a point before and one after each request; die, or what `strike` does, at the one numbered `at`."""

    def meet(phase: str, text: str) -> None:
        if page.add("points") == at:
            page.text = f"{phase} {text}"
            strike()

    watch_requests(meet)


Watch = Callable[..., None]
WATCHES: dict[str, Watch] = {"operation": watch_operations, "request": watch_s3}


def choose_kills(stage: Stage, trials: int, chance: random.Random, *, every_point: bool = False) -> list[Kill]:
    """Half of them at points, spread evenly over a run (with `every_point` at each), a quarter at random instants, a
    quarter at random instants of generating."""
    kind = "operation" if stage.place.kind == "local" else "request"
    points, seconds = stage.count_points(WATCHES[kind])
    at_points = trials - trials // 2
    rendering = (trials // 2 + 1) // 2
    instants = trials - at_points - rendering
    kills = [Kill(kind, n) for n in spread(points, points if every_point else at_points, chance)]
    kills += [Kill("instant", chance.uniform(0, seconds)) for _ in range(instants)]
    for _ in range(rendering):
        job = chance.randrange(len(stage.jobs))
        kills.append(Kill("rendering", chance.uniform(0, 0.9 * stage.settings["generate_s"]), job))
    return kills


def kill_trials(stage: Stage, trials: int, chance: random.Random, *, every_point: bool = False) -> Row:
    """Kill runs of `stage` and look at what is left."""
    row = Row(stage.place.kind, stage.format, stage.name, "kills")
    begin = time.monotonic()
    for chosen in choose_kills(stage, trials, chance, every_point=every_point):
        row.trials += 1
        kill = chosen
        for _ in range(TRIES):
            seconds = kill_run(stage, row, kill)
            if seconds is None:
                row.landed += 1
                break
            # Other threads, another order, a quicker machine: somewhere in what this run was.
            points = stage.page.get("points")
            at = 1 + chance.randrange(points) if kill.kind in WATCHES and points else chance.uniform(0, seconds)
            kill = Kill(kill.kind, at, kill.job) if kill.job is None else Kill("instant", at)
    row.when["missed"] = row.trials - row.landed
    row.seconds = time.monotonic() - begin
    return row


def kill_run(stage: Stage, row: Row, kill: Kill) -> float | None:
    """Kill one run and look at what is left; where the run ended before its kill, look at that: its seconds."""
    out, begin = stage.new_output(), time.monotonic()
    watch, number = WATCHES.get(kill.kind), int(kill.at)
    pid = stage.begin(
        out,
        DISTURBED,
        flags=stage.scenario.flags,
        disturb=lambda folders: watch(stage.page, folders, number) if watch is not None else None,
    )
    code = stage.wait(pid, None if watch is not None else kill.at, in_job=kill.job)
    trial = f"{kill} {stage.point(out)}".strip()
    if code == -signal.SIGKILL:
        stage.after(out, row, trial, lived=False, once=True)
        return None
    seconds = time.monotonic() - begin
    if code != 0:
        row.problems.append((trial, Problem("exit code", f"{code}: {last_error(stage.log())}")))
    row.problems += [(trial, p) for p in check_end(stage.place.files(out), stage.targets, stage.finished)]
    stage.place.remove(out)
    return seconds


def series_trials(stage: Stage, trials: int, chance: random.Random) -> Row:
    """Kill SERIES runs of one output, one after the other: only a job that was generating, or that
    was the only one under way, may be called crashed."""
    row = Row(stage.place.kind, stage.format, stage.name, f"{SERIES} kills in a row")
    begin = time.monotonic()
    _, seconds = stage.count_points(lambda page, folders: None)
    while row.trials < trials:
        out, blamed = stage.new_output(), Counter[str]()
        trial = f"series {row.trials}"
        for number in range(SERIES):
            run_id = f"{DISTURBED}-{number}"
            pid = stage.begin(out, run_id, flags=stage.scenario.flags)
            if number % 2:
                code = stage.wait(pid, chance.uniform(0, seconds))
            else:
                # In its first half, as a job that goes on after its first segment has no second one.
                code = stage.wait(pid, chance.uniform(0, stage.settings["generate_s"] / 2), in_job=ANY_JOB)
            row.trials += 1
            at_work = _at_work(stage)
            files = stage.place.files(out)
            if code == -signal.SIGKILL:
                row.landed += 1
                marked = [job for job in stage.jobs if _marked_by(run_id, files.get(f"jobs/{job}/attempt.json"))]
                blamed.update({*at_work, *marked} if len(marked) == 1 else at_work)  # it alone was under way
                row.when["generating" if stage.page.get("generating") else "else"] += 1
            for job in stage.jobs:
                state = look(files, job, stage.finished)
                row.problems += [(trial, Problem(p.kind, f"{job}: {p.what}")) for p in state.problems]
                if state.record and state.record["status"] == "failed" and blamed[job] < MAX_ATTEMPTS:
                    error = state.record["error"]
                    what = f"{job} is called {error['code']} after {blamed[job]} kills in which it was at work"
                    row.problems.append((trial, Problem("crashed", what)))
        guilty = any(blamed[job] >= MAX_ATTEMPTS for job in stage.jobs)
        found = stage.again(out, row, set(), ("--max-attempts", "0") if guilty else ())
        row.problems += [(trial, problem) for problem in found]
        stage.place.remove(out)
    row.seconds = time.monotonic() - begin
    return row


def _marked_by(run_id: str, mark: bytes | None) -> bool:
    """Whether a job's mark is of this run; those of runs that died before it stay."""
    return mark is not None and json.loads(mark)["run_id"] == run_id


def _at_work(stage: Stage) -> list[str]:
    """The jobs that a kill just now may count against: the one generating; it, for a moment after; one about to be."""
    page = stage.page
    if page.get("generating"):
        return [stage.jobs[page.get("generating") - 1]]
    prepared, generated = page.get("prepared"), page.get("generated")
    found = [job for index, job in enumerate(stage.jobs) if (prepared & ~generated) >> index & 1]
    if page.get("ended") and time.monotonic_ns() - page.get("ended_ns") < AFTER_GENERATING_S * 1e9:
        found.append(stage.jobs[page.get("ended") - 1])
    return found
