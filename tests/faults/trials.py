"""Trials: runs that are killed or disturbed at one point each, and what was lost by it.

    python -m tests.faults.trials kills --stores local,s3 --formats mp4,png --trials 200 --seed 1

The process imports everything once, has no threads, and forks a child a trial, so that a trial costs a fraction of a
second and its kill lands in the run and not in imports. Points: each change of the output folder (`operations`), before
and after each request (`requests`), an instant (`instants`). After a kill the output is looked at from outside, then
the command is given again, undisturbed, and must end with everything done.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its pool of threads is made when numpy is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.faults.file_operations import CHANGES, READS, FileOperations
from tests.faults.http_requests import watch_requests
from tests.faults.line_process import ALL_LATER, LineServer, line_server
from tests.faults.output_checks import Finished, Problem, check_end, check_meanwhile, hidden_files, learn, look
from tests.faults.shared_page import SharedPage
from tests.faults.stub_runs import PageGenerator, fork, import_all, run_command, shorten_waits, write_manifest
from tests.faults.trial_places import LocalPlace, Place, S3Place
from tests.s3_servers import S3Server

__all__ = ["DISK_FAULTS", "S3_FAULTS", "SCENARIOS", "Row", "Stage", "disk_trials", "kill_trials", "open_places"]

FORMATS = ("mp4", "png")
LONGEST_RUN_S = 60.0
MEMORY_BYTES = 2**30
DISTURBED, AGAIN = "disturbed", "again"  # run ids
MAX_ATTEMPTS = 3  # the command line's default
SERIES = 6  # kills of one output, one after the other
AFTER_GENERATING_S = 0.05  # for the mark of a job to be taken back when its frames are made
NAMES = frozenset({"open", "open to read", "rename", "link", "unlink", "mkdir", "rmdir", "stat", "scandir", "truncate"})
# What a full disk, a broken one and wrong permissions refuse; descriptors that are open keep their permissions.
DISK_FAULTS = {
    "ENOSPC": (errno.ENOSPC, frozenset({"open", "write", "fsync", "rename", "link", "mkdir"})),
    "EIO": (errno.EIO, CHANGES | READS),
    "EACCES": (errno.EACCES, NAMES),
}
S3_FAULTS = ("503", "drop", "truncate", "flip")
ANY_JOB = -1
TRIES = 4  # of a kill that comes after the end: in another run the point or instant lies elsewhere
pause = time.sleep  # before `shorten_waits`


@dataclass(frozen=True)
class Scenario:
    """What lies in the output before the run (a set of seeds, None for nothing; its format), and how it is run."""

    older: int | None
    seeds: int
    flags: tuple[str, ...] = ()
    other_format: bool = False


SCENARIOS = {
    "fresh": Scenario(None, 1),
    "other seeds": Scenario(0, 1),
    "other format": Scenario(0, 1, other_format=True),
    "--force": Scenario(1, 1, ("--force",)),
}


@dataclass
class Row:
    """What was tried in one place, format and scenario, and what went wrong."""

    store: str
    format: str
    scenario: str
    what: str
    trials: int = 0
    landed: int = 0
    when: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[int] = field(default_factory=Counter)
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    hidden: int = 0  # files left at the end under hidden names
    seconds: float = 0.0

    def count(self, *kinds: str) -> int:
        return sum(problem.kind in kinds for _, problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        return {
            "store": self.store,
            "format": self.format,
            "scenario": self.scenario,
            "what": self.what,
            "trials": self.trials,
            "landed": self.landed,
            "when": dict(self.when),
            "exit_codes": {str(code): n for code, n in sorted(self.exit_codes.items())},
            "hidden": self.hidden,
            "seconds": round(self.seconds, 1),
            "problems": [{"trial": trial, "kind": p.kind, "what": p.what} for trial, p in self.problems],
        }


class Stage:
    """One place, format and scenario: manifests, the older output to copy, what undisturbed runs make."""

    def __init__(self, place: Place, folder: Path, format: str, name: str) -> None:
        jobs = 3 if place.kind == "local" else 2  # a server in Python takes milliseconds a request
        self.place, self.format, self.name, self.scenario = place, format, name, SCENARIOS[name]
        self.folder = Path(tempfile.mkdtemp(prefix="stage-", dir=folder))
        self.page = SharedPage()
        self.points: dict[str, int] = {}  # of an undisturbed run, by kind of point, once counted
        self.requests: list[str] = []  # of an undisturbed run, once they are known
        self._number = count()
        self.settings: dict[str, Any] = {"prepare_s": 0.004, "generate_s": 0.06, "frames": 4}
        older_format = format if not self.scenario.other_format else FORMATS[1 - FORMATS.index(format)]
        self.manifest, self.jobs = self._manifest("run.jsonl", format, self.scenario.seeds, jobs)
        self.finished: dict[str, Finished] = {}
        self.template: str | None = None
        self.older: dict[str, str] = {}
        if self.scenario.older is not None:
            manifest, _ = self._manifest("older.jsonl", older_format, self.scenario.older, jobs)
            self.template, self.older = self._undisturbed(manifest)
        _, self.targets = self._undisturbed(self.manifest)

    def _manifest(self, name: str, format: str, seeds: int, jobs: int) -> tuple[Path, list[str]]:
        path = self.folder / name
        return path, write_manifest(path, format=format, seeds=seeds, jobs=jobs, **self.place.inputs())

    def _undisturbed(self, manifest: Path) -> tuple[str, dict[str, str]]:
        """The output of a run on nothing, and the fingerprint of each job."""
        out = self.new_output(empty=True)
        code = self.wait(self.begin(out, AGAIN, manifest=manifest))
        assert code == 0, f"an undisturbed run ends with {code}:\n{self.log()}"
        made = learn(self.place.files(out))
        self.finished |= made
        return out, {one.job: fingerprint for fingerprint, one in made.items()}

    def new_output(self, *, empty: bool = False) -> str:
        name = f"{self.folder.name}-{next(self._number)}"
        return self.place.output(name, None if empty else self.template)

    def begin(
        self,
        out: str,
        run_id: str,
        *,
        manifest: Path | None = None,
        flags: Sequence[str] = (),
        disturb: Callable[[Sequence[Path]], None] = lambda folders: None,
    ) -> int:
        """Fork a run; its process id. `disturb` is called in the child with the folders that the run writes to."""
        self.page.clear()
        page, cache = self.page, self.folder / "cache"
        words = [str(manifest or self.manifest), "--out", out, "--cache", str(cache), "--run-id", run_id]

        def load() -> PageGenerator:
            page.add("loads")
            return PageGenerator(page, **self.settings)

        def work() -> int:
            disturb([Path(out), cache])
            return run_command([*words, "--log-format", "json", *flags], load, {"weights": "stub"})

        self.log_file.unlink(missing_ok=True)
        return fork(work, self.log_file)

    def wait(self, pid: int, kill_after_s: float | None = None, *, in_job: int | None = None) -> int:
        """The child's exit code, negative for a signal. One that hangs is killed: -SIGABRT.

        `kill_after_s`: seconds from now, or with `in_job` from when the job of that index begins to be generated;
        with ANY_JOB from when one does.
        """
        begin = start = time.monotonic()
        while True:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if in_job is not None:
                generating = self.page.get("generating")
                begin = now
                if generating and in_job in (ANY_JOB, generating - 1):
                    in_job = None
            elif kill_after_s is not None and now - begin >= kill_after_s:
                os.kill(pid, signal.SIGKILL)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if now - start > LONGEST_RUN_S:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return -signal.SIGABRT
            pause(0.001)

    def point(self, out: str) -> str:
        """The operation or request that was disturbed, with short names."""
        text = self.page.text.replace(out.removeprefix("s3:/"), "OUT")
        return text.replace(str(self.folder / "cache"), "CACHE").replace(str(self.folder), "")

    @property
    def log_file(self) -> Path:
        return self.folder / "run.log"

    def log(self, most: int = 4000) -> str:
        return self.log_file.read_text(errors="replace")[-most:] if self.log_file.exists() else ""

    def count_points(self, watch: Callable[[SharedPage, Sequence[Path]], None]) -> tuple[int, float]:
        """Points of an undisturbed run of the scenario, and its seconds."""
        out = self.new_output()
        begin = time.monotonic()
        pid = self.begin(out, DISTURBED, flags=self.scenario.flags, disturb=lambda folders: watch(self.page, folders))
        code = self.wait(pid)
        assert code == 0, f"an undisturbed run ends with {code}:\n{self.log()}"
        seconds = time.monotonic() - begin
        self.place.remove(out)
        return self.page.get("points"), seconds

    def after(self, out: str, row: Row, trial: str, *, lived: bool, once: bool) -> None:
        """Look at the output of a disturbed run, run again, look again."""
        files = self.place.files(out)
        generated = self.page.get("generated")
        states = {job: look(files, job, self.finished) for job in self.jobs}
        found: list[Problem] = []
        for index, (job, state) in enumerate(states.items()):
            publishing = bool(generated >> index & 1) and not (lived and once)
            found += [
                Problem(p.kind, f"{job}: {p.what}")
                for p in check_meanwhile(
                    state,
                    self.older.get(job),
                    self.targets[job],
                    may_lack_record=publishing,
                    may_have_failed=lived,
                )
            ]
        if lived:
            done = {job for job, state in states.items() if state.done == self.targets[job]}
            found += _false_claims(files, done)
        else:
            row.when[self._moment(generated, {j for j, s in states.items() if s.done == self.targets[j]})] += 1
        found += self.again(out, row, {job for job, state in states.items() if state.done == self.targets[job]})
        row.problems += [(trial, problem) for problem in found]
        self.place.remove(out)

    def again(self, out: str, row: Row, done: set[str], flags: Sequence[str] = ()) -> list[Problem]:
        """Give the command again; what is wrong then. `done`: jobs that must not be rendered again."""
        code = self.wait(self.begin(out, AGAIN, flags=flags))
        files = self.place.files(out)
        found = check_end(files, self.targets, self.finished)
        if code != 0:
            found.append(Problem("exit code", f"the run after it ends with {code}: {_last_error(self.log())}"))
        rendered = {job for job, n in zip(self.jobs, self.page.generations(), strict=False) if n}
        if rendered & done:
            found.append(Problem("rendered again", f"{sorted(rendered & done)} were done already"))
        row.hidden += len(hidden_files(files))
        return found

    def _moment(self, generated: int, done: set[str]) -> str:
        generating = self.page.get("generating") > 0
        delivering = any(generated >> index & 1 and job not in done for index, job in enumerate(self.jobs))
        if generating and delivering:
            return "both"
        return "generating" if generating else "delivering" if delivering else "else"


def _false_claims(files: Mapping[str, bytes], done: set[str]) -> list[Problem]:
    """What the summary of a run that lived says and the output does not hold; codes that name a bug."""
    found = []
    for key, data in files.items():
        if key.startswith(f"runs/{DISTURBED}/") and key.endswith(".summary.json"):
            for line in json.loads(data)["jobs"]:
                if line["status"] in ("succeeded", "skipped") and line["id"] not in done:
                    found.append(Problem("wrong frames", f"{line['id']} is called {line['status']} and is not done"))
                if line["error"] and line["error"]["code"] == "internal":
                    found.append(Problem("internal", f"{line['id']}: {line['error']['message']}"))
    return found


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if '"level": "error"' in line or "Error" in line]
    return (lines or log.splitlines() or ["no output"])[-1][:400]


# -- kills ------------------------------------------------------------------------------------------------------------


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


def watch_operations(page: SharedPage, folders: Sequence[Path], at: int = 0) -> None:
    """Count the changes of the output folder; die at the one numbered `at`."""

    def meet(name: str, path: str) -> None:
        if page.add("points") == at:
            page.text = f"{name} {path}"
            os.kill(os.getpid(), signal.SIGKILL)

    FileOperations(folders[:1], meet, CHANGES).install()


def watch_s3(page: SharedPage, folders: Sequence[Path], at: int = 0) -> None:
    """Count a point before and one after each request; die at the one numbered `at`."""

    def meet(phase: str, text: str) -> None:
        if page.add("points") == at:
            page.text = f"{phase} {text}"
            os.kill(os.getpid(), signal.SIGKILL)

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
        row.problems.append((trial, Problem("exit code", f"{code}: {_last_error(stage.log())}")))
    row.problems += [(trial, p) for p in check_end(stage.place.files(out), stage.targets, stage.finished)]
    stage.place.remove(out)
    return seconds


def series_trials(stage: Stage, trials: int, chance: random.Random) -> Row:
    """Kill SERIES runs of one output, one after the other: only a job that was generating may be called crashed."""
    row = Row(stage.place.kind, stage.format, stage.name, f"{SERIES} kills in a row")
    begin = time.monotonic()
    _, seconds = stage.count_points(lambda page, folders: None)
    while row.trials < trials:
        out, blamed = stage.new_output(), Counter[str]()
        trial = f"series {row.trials}"
        for number in range(SERIES):
            pid = stage.begin(out, DISTURBED, flags=stage.scenario.flags)
            if number % 2:
                code = stage.wait(pid, chance.uniform(0, seconds))
            else:
                code = stage.wait(pid, chance.uniform(0, stage.settings["generate_s"]), in_job=ANY_JOB)
            row.trials += 1
            if code == -signal.SIGKILL:
                row.landed += 1
                blamed.update(_at_work(stage))
                row.when["generating" if stage.page.get("generating") else "else"] += 1
            files = stage.place.files(out)
            for job in stage.jobs:
                state = look(files, job, stage.finished)
                row.problems += [(trial, Problem(p.kind, f"{job}: {p.what}")) for p in state.problems]
                if state.record and state.record["status"] == "failed" and blamed[job] < MAX_ATTEMPTS:
                    error = state.record["error"]
                    what = f"{job} is called {error['code']} after {blamed[job]} kills in which it was generating"
                    row.problems.append((trial, Problem("crashed", what)))
        guilty = any(blamed[job] >= MAX_ATTEMPTS for job in stage.jobs)
        found = stage.again(out, row, set(), ("--max-attempts", "0") if guilty else ())
        row.problems += [(trial, problem) for problem in found]
        stage.place.remove(out)
    row.seconds = time.monotonic() - begin
    return row


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


# -- faults -----------------------------------------------------------------------------------------------------------


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
        row.problems.append((trial, Problem("exit code", f"{code}: {_last_error(stage.log())}")))
    if code == 0:
        ended = check_end(stage.place.files(out), stage.targets, stage.finished)
        row.problems += [(trial, Problem("exit code", f"exit 0, but {p.what}")) for p in ended if p.kind == "job lost"]
    stage.after(out, row, trial, lived=True, once=once)


def spread(points: int, trials: int, chance: random.Random) -> list[int]:
    """`trials` of the points 1 … `points`, one of each of as many equal stretches; every point if they are fewer."""
    if trials >= points:
        return list(range(1, points + 1))
    return [1 + int(points * (i + chance.random()) / trials) for i in range(trials)]


@contextmanager
def trial_folder() -> Iterator[Path]:
    """In memory where there is room: a SIGKILL takes nothing from the page cache, and no trial waits for a disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > MEMORY_BYTES
    with tempfile.TemporaryDirectory(prefix="video-lab-trials-", dir=memory if roomy else None) as folder:
        yield Path(folder)


# -- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def open_places(
    stores: Sequence[str], folder: Path, server: S3Server | None = None
) -> Iterator[tuple[dict[str, Place], LineServer | None]]:
    """`local` and `s3` (moto behind the line, or `server`), ready for trials; the line. Imports the product, once."""
    with ExitStack() as held:
        line: LineServer | None = None
        if "s3" in stores:
            if server is None:
                server = line = held.enter_context(line_server())
            for name in [name for name in os.environ if name.startswith(("AWS_", "VIDEO_LAB_S3"))]:
                del os.environ[name]
            os.environ.update(server.environment())
        shorten_waits()
        import_all()
        places: dict[str, Place] = {}
        for store in stores:
            if store == "local":
                places[store] = LocalPlace(folder)
            else:
                assert server is not None
                places[store] = S3Place(server, "S3" if line is not None else "S3, SeaweedFS")
        yield places, line


def kills(stage: Stage, trials: int, series: int, chance: random.Random, *, every_point: bool) -> list[Row]:
    """Rows of `trials` kills, and of `series` outputs killed several times in a row."""
    rows = [kill_trials(stage, trials, chance, every_point=every_point)] if trials or every_point else []
    if series and stage.name == "fresh":
        stage.settings["generate_s"] = 0.1
        rows.append(series_trials(stage, series * SERIES, chance))
    return rows


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


def shares(total: int, parts: int, chance: random.Random) -> list[int]:
    """`total` in `parts` shares that differ by one at most; which are the larger is left to chance."""
    found = [total * (i + 1) // parts - total * i // parts for i in range(parts)]
    chance.shuffle(found)
    return found


def table(rows: Sequence[Row]) -> str:
    """One line a row: how many, where the kills landed, what went wrong."""
    moments = ("generating", "delivering", "both", "else")
    titles = "".join(f"{moment:>11}" for moment in moments)
    lines = [
        f"{'store':<14}{'format':<7}{'scenario':<13}{'what':<19}{'trials':>7}{'landed':>7}"
        f"{titles}{'violations':>11}{'hidden':>7}{'s':>7}  exit codes"
    ]
    for row in rows:
        cells = "".join(f"{row.when[moment]:>11}" for moment in moments)
        codes = ", ".join(f"{code}: {n}" for code, n in sorted(row.exit_codes.items()))
        lines.append(
            f"{row.store:<14}{row.format:<7}{row.scenario:<13}{row.what:<19}{row.trials:>7}{row.landed:>7}"
            f"{cells}{len(row.problems):>11}{row.hidden:>7}{row.seconds:>7.1f}  {codes}".rstrip()
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "faults"), help="faults: of the disk for local, of the line for s3")
    parser.add_argument("--stores", default="local,s3", help="of local, s3")
    parser.add_argument("--formats", default="mp4,png")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--trials", type=int, default=20, help="in all (20)")
    parser.add_argument("--series", type=int, default=0, help=f"outputs killed {SERIES} times in a row (0)")
    parser.add_argument("--every-point", action="store_true", help="kill at each operation or request too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server", metavar="JSON", help="kills: fields of a running S3 server, instead of moto")
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args(argv)
    server = S3Server(**json.loads(arguments.server)) if arguments.server else None
    stores, formats, scenarios = (
        text.split(",") for text in (arguments.stores, arguments.formats, arguments.scenarios)
    )
    chance = random.Random(arguments.seed)
    combinations = list(product(stores, formats, scenarios))
    rows: list[Row] = []
    with trial_folder() as folder, open_places(stores, folder, server) as (places, line):
        parts = shares(arguments.trials, len(combinations), chance)
        for (store, format, name), share in zip(combinations, parts, strict=True):
            if share or arguments.every_point or (arguments.series and name == "fresh"):
                stage = Stage(places[store], folder, format, name)
                if arguments.what == "kills":
                    rows += kills(stage, share, arguments.series, chance, every_point=arguments.every_point)
                else:
                    rows += faults(stage, share, line, chance)
                shutil.rmtree(stage.folder, ignore_errors=True)
    print(table(rows))
    for row in rows:
        for trial, problem in row.problems:
            print(f"{row.store} {row.format} {row.scenario}: {trial}: {problem.kind}: {problem.what}")
    if arguments.json:
        arguments.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
