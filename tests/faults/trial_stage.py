"""Trial stage: one place, format and scenario, in which runs are disturbed one after the other.

In:   a place for inputs and outputs. Out: forked runs, and what is wrong with the output of a disturbed one (`Row`).
Never: how a run is disturbed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tests.faults.output_checks import Finished, Problem, check_end, check_meanwhile, hidden_files, learn, look
from tests.faults.shared_page import SharedPage
from tests.faults.stub_runs import PageGenerator, fork, run_command, write_manifest
from tests.faults.trial_places import Place

__all__ = ["AGAIN", "ANY_JOB", "DISTURBED", "SCENARIOS", "Row", "Scenario", "Stage", "last_error", "shares", "spread"]

FORMATS = ("mp4", "png")
LONGEST_RUN_S = 60.0
DISTURBED, AGAIN = "disturbed", "again"  # run ids
ANY_JOB = -1
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
    """One place, format and scenario: manifests, the older output to copy, what undisturbed runs make.

    `jobs`: how many; `settings` of the stub generator, over the usual ones.
    """

    def __init__(
        self, place: Place, folder: Path, format: str, name: str, *, jobs: int | None = None, **settings: Any
    ) -> None:
        jobs = jobs or (3 if place.kind == "local" else 2)  # a server in Python takes milliseconds a request
        self.place, self.format, self.name, self.scenario = place, format, name, SCENARIOS[name]
        self.folder = Path(tempfile.mkdtemp(prefix="stage-", dir=folder))
        self.page = SharedPage()
        self.points: dict[str, int] = {}  # of an undisturbed run, by kind of point, once counted
        self.requests: list[str] = []  # of an undisturbed run, once they are known
        self._number = count()
        self.settings: dict[str, Any] = {"prepare_s": 0.004, "generate_s": 0.06, "frames": 4} | settings
        older_format = format if not self.scenario.other_format else FORMATS[1 - FORMATS.index(format)]
        self.manifest, self.jobs = self._manifest("run.jsonl", format, self.scenario.seeds, jobs)
        self.finished: dict[str, Finished] = {}
        self.template: str | None = None
        self.older: dict[str, str] = {}
        if self.scenario.older is not None:
            manifest, _ = self._manifest("older.jsonl", older_format, self.scenario.older, jobs)
            self.template, self.older = self._undisturbed(manifest)
        _, self.targets = self._undisturbed(self.manifest)

    def other_manifest(self, seeds: int) -> tuple[Path, dict[str, str]]:
        """A manifest of the same jobs with another set of seeds, and the fingerprint of each job."""
        manifest, _ = self._manifest(f"seeds-{seeds}.jsonl", self.format, seeds, len(self.jobs))
        return manifest, self._undisturbed(manifest)[1]

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
            found.append(Problem("exit code", f"the run after it ends with {code}: {last_error(self.log())}"))
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


def last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if '"level": "error"' in line or "Error" in line]
    return (lines or log.splitlines() or ["no output"])[-1][:400]


def spread(points: int, trials: int, chance: random.Random) -> list[int]:
    """`trials` of the points 1 … `points`, one of each of as many equal stretches; every point if they are fewer."""
    if trials >= points:
        return list(range(1, points + 1))
    return [1 + int(points * (i + chance.random()) / trials) for i in range(trials)]


def shares(total: int, parts: int, chance: random.Random) -> list[int]:
    """`total` in `parts` shares that differ by one at most; which are the larger is left to chance."""
    found = [total * (i + 1) // parts - total * i // parts for i in range(parts)]
    chance.shuffle(found)
    return found
