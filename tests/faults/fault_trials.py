"""Fault trials: runs in which one file operation or request fails, or all that follow.

In:   a stage; for S3 the line that fails on demand. Out: a `Row` of what was tried and what went wrong. Never: kills.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.file_operations import CHANGES, READS, FileOperations
from tests.faults.line_process import ALL_LATER, LineServer
from tests.faults.output_checks import Problem, check_end
from tests.faults.shared_page import SharedPage
from tests.faults.trial_stage import DISTURBED, Row, Stage, last_error, shares, spread

__all__ = ["faults"]

NAMES = frozenset({"open", "open to read", "rename", "link", "unlink", "mkdir", "rmdir", "stat", "scandir", "truncate"})
# What a full disk, a broken one and wrong permissions refuse; descriptors that are open keep their permissions.
DISK_FAULTS = {
    "ENOSPC": (errno.ENOSPC, frozenset({"open", "write", "fsync", "rename", "link", "mkdir"})),
    "EIO": (errno.EIO, CHANGES | READS),
    "EACCES": (errno.EACCES, NAMES),
}
S3_FAULTS = ("503", "drop", "truncate", "flip")


def faults(stage: Stage, trials: int, line: LineServer | None, chance: random.Random) -> list[Row]:
    """Rows of `trials` faults in all: of the disk, or of the line to S3."""
    local = stage.place.kind == "local"
    plans = [(fault, lasting) for fault in DISK_FAULTS for lasting in (False, True)]
    if not local:
        plans = [(fault, False) for fault in S3_FAULTS] + [("503", True)]
    rows = []
    for (fault, lasting), share in zip(plans, shares(trials, len(plans), chance), strict=True):
        if share and local:
            rows.append(disk_trials(stage, fault, share, chance, lasting=lasting))
        elif share:
            assert line is not None
            rows.append(s3_trials(stage, line, fault, share, chance, lasting=lasting))
    return rows


def disk_trials(stage: Stage, fault: str, trials: int, chance: random.Random, *, lasting: bool = False) -> Row:
    """Fail file operations of runs with `fault`: one a run, or all from one on (`lasting`)."""
    row = Row("local", stage.format, stage.name, f"{fault}{' from there on' if lasting else ''}")
    begin = time.monotonic()
    number_of_error, operations = DISK_FAULTS[fault]

    def watch(page: SharedPage, folders: Sequence[Path], at: int = 0) -> None:
        def meet(name: str, path: str) -> None:
            number = page.add("points")
            if at and (number == at or (lasting and number > at)):
                if number == at:
                    page.text = f"{name} {path}"
                    page.set("struck", 1)
                raise OSError(number_of_error, os.strerror(number_of_error), path)

        FileOperations(folders, meet, operations).install()

    if fault not in stage.points:
        stage.points[fault], _ = stage.count_points(watch)
    for number in spread(stage.points[fault], trials, chance):
        out = stage.new_output()
        pid = stage.begin(
            out,
            DISTURBED,
            flags=stage.scenario.flags,
            disturb=lambda folders, at=number: watch(stage.page, folders, at),  # type: ignore[misc]
        )
        fault_ended(stage, row, out, stage.wait(pid), f"{row.what} at operation {number}", once=not lasting)
    row.seconds = time.monotonic() - begin
    return row


def s3_trials(
    stage: Stage, line: LineServer, fault: str, trials: int, chance: random.Random, *, lasting: bool = False
) -> Row:
    """Fail requests of runs with `fault`: one a run, or all from one on (`lasting`)."""
    row = Row(stage.place.kind, stage.format, stage.name, f"{fault}{' from there on' if lasting else ''}")
    begin = time.monotonic()
    if not stage.requests:
        out = stage.new_output()
        line.order()
        code = stage.wait(stage.begin(out, DISTURBED, flags=stage.scenario.flags))
        assert code == 0, stage.log()
        stage.requests = line.requests()
        stage.place.remove(out)
    numbers = [n for n, text in enumerate(stage.requests, 1) if fault != "flip" or text.startswith("GET ")]
    for position in spread(len(numbers), trials, chance):
        number = numbers[position - 1]
        out = stage.new_output()
        line.order(fault, number, ALL_LATER if lasting else 1)
        code = stage.wait(stage.begin(out, DISTURBED, flags=stage.scenario.flags))
        seen = line.requests()
        line.order()
        if number <= len(seen):
            stage.page.text = seen[number - 1]
            stage.page.set("struck", 1)
        fault_ended(stage, row, out, code, f"{row.what} at request {number}", once=not lasting)
    row.seconds = time.monotonic() - begin
    return row


def fault_ended(stage: Stage, row: Row, out: str, code: int, trial: str, *, once: bool) -> None:
    """Note how a run with a fault ended, and look at what it left."""
    row.trials += 1
    row.landed += stage.page.get("struck")
    row.exit_codes[code] += 1
    trial = f"{trial}, {stage.point(out)}, exit {code}"
    if code not in (0, 1, 2, 3):
        row.problems.append((trial, Problem("exit code", f"{code}: {last_error(stage.log())}")))
    if code == 0:
        ended = check_end(stage.place.files(out), stage.targets, stage.finished)
        row.problems += [(trial, Problem("exit code", f"exit 0, but {p.what}")) for p in ended if p.kind == "job lost"]
    stage.after(out, row, trial, lived=True, once=once)
