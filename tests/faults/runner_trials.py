"""Runner trials: several runners of one output at once; one is killed, one is suspended past its lease, one is late.

In:   a stage. Out: a `Row` of what was tried and what went wrong: a job rendered twice although its lease was alive, a
record that does not match its output at any moment, a job that is not done at the end, a runner that does not end well.
Never: exact interleavings of two runners (tests/batch/test_takeover.py has those).
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from runner.generation.protocol import OnStep, ResumePoint, Segment, SegmentPlan
from runner.timing import StageTimer
from tests.faults.kill_trials import WATCHES
from tests.faults.lease_journal import Journal, Line, judge, watch_leases
from tests.faults.output_checks import Problem, check_end, hidden_files, look
from tests.faults.shared_page import SharedPage
from tests.faults.stub_runs import MANY_SEEDS, PageGenerator, fork, run_command
from tests.faults.trial_places import Place
from tests.faults.trial_stage import Row, Stage, last_error, pause

__all__ = ["SCENARIOS", "open_stage", "runners"]

SCENARIOS = ("same seeds", "other seeds")
LEASE_S = {"local": 1.5, "S3": 2.5}  # S3 dates objects in whole seconds
CLOCK_S = {"local": 0.05, "S3": 1.0}  # how far the age of a lease may be off
LONGEST_TRIAL_S = 120.0
LOOK_AGAIN_S = {"local": 0.2, "S3": 0.6}
SAMPLING = {"local": 1 / 2, "S3": 1 / 4}  # of the time; the rest is the runners', and the server's that they share
SAMPLE_EVERY_S = 0.02
OTHER_SEEDS = 2
BROKEN = ("Traceback (most recent call last)", "loop_broken", "leases_are_warnings", "leases_not_renewed")


class JournalGenerator(PageGenerator):
    """The stub, writing down which jobs it begins."""

    def __init__(self, page: SharedPage, journal: Journal, runner: int, **settings: Any) -> None:
        super().__init__(page, **settings)
        self._journal, self._runner = journal, runner

    def generate(
        self,
        conditions: Any,
        plan: SegmentPlan,
        timer: StageTimer,
        on_step: OnStep | None = None,
        start: ResumePoint | None = None,
    ) -> Iterator[Segment]:
        job = f"job{conditions.report['index']}"
        seeds = conditions.request.options.seed % (MANY_SEEDS * MANY_SEEDS) // MANY_SEEDS
        self._journal.write(self._runner, "begun", job, seeds)
        return super().generate(conditions, plan, timer, on_step, start)


@dataclass
class Runner:
    """One runner of a trial, and what shall happen to it: at a point of its own, or at an instant."""

    number: int
    manifest: Path
    late_s: float = 0.0  # begins this long after the first
    fate: str = ""  # "kill" or "suspend"
    at_point: int = 0  # the number of the change of the output folder, or of the point before or after a request
    wait_for_job: bool = False  # `after_s` counts from its first generation, else from its own begin
    after_s: float = 0.0
    suspend_s: float = 0.0
    page: SharedPage = field(default_factory=SharedPage)
    pid: int | None = None
    begun_at: float = 0.0
    generating_at: float = 0.0
    stopped_at: float = 0.0
    struck: bool = False
    code: int | None = None

    def __str__(self) -> str:
        words = [f"runner {self.number}"]
        if self.late_s:
            words.append(f"{self.late_s:.2f} s late")
        if self.fate and self.at_point:
            words.append(f"{self.fate} at point {self.at_point} ({self.page.text})")
        elif self.fate:
            words.append(f"{self.fate} {self.after_s:.3f} s after {'its first job' if self.wait_for_job else 'begin'}")
        return " ".join(words)


def open_stage(place: Place, folder: Path, format: str, name: str) -> Stage:
    """A stage of jobs of four segments. `name`: of SCENARIOS."""
    settings = {"prepare_s": 0.02, "generate_s": 0.3, "frames": 8, "segments": 4}
    stage = Stage(place, folder, format, "fresh", jobs=6 if place.kind == "local" else 3, **settings)
    stage.name = name
    return stage


def runners(stage: Stage, count: int, trials: int, chance: random.Random) -> Row:
    """`trials` trials of `count` runners, with `other seeds` always of two: each has seeds of its own."""
    others = stage.other_manifest(OTHER_SEEDS) if stage.name == "other seeds" else None
    row = Row(stage.place.kind, stage.format, stage.name, f"{2 if others else count} runners")
    begin = time.monotonic()
    for number in range(trials):
        trial = Trial(stage, row, chance, others)
        trial.plan(2 if others else count, number)
        trial.run()
        row.trials += 1
    row.seconds = time.monotonic() - begin
    return row


class Trial:
    """Several runners of one new output, from the first begin to the last end."""

    def __init__(
        self, stage: Stage, row: Row, chance: random.Random, others: tuple[Path, dict[str, str]] | None
    ) -> None:
        self._stage, self._row, self._chance, self._others = stage, row, chance, others
        self._kind = "operation" if stage.place.kind == "local" else "request"
        self._store = "local" if stage.place.kind == "local" else "S3"
        self.lease_s, self.clock_s = LEASE_S[self._store], CLOCK_S[self._store]
        self.out = stage.new_output()
        self.journal = Journal(stage.folder / f"{Path(self.out).name}.journal")
        self.runners: list[Runner] = []
        self.any_shard = chance.random() < 0.5
        self.one_machine = chance.random() < 0.5  # else each runner believes that it is on a machine of its own
        self.problems: list[Problem] = []
        self.done: dict[str, float] = {}  # job -> when it was seen to be done
        self._seen: dict[str, dict[str, bytes]] = {}
        self.samples = 0

    def plan(self, count: int, number: int) -> None:
        """Choose what happens to whom. With two, one of them is killed, or suspended, or one each."""
        chance, stage = self._chance, self._stage
        manifests = [stage.manifest] * count
        if self._others:
            manifests[1] = self._others[0]
        self.runners = [Runner(i, manifest) for i, manifest in enumerate(manifests)]
        fates = [("kill", "suspend"), ("suspend",), ("kill",)][number % 3] if count == 2 else ("kill", "suspend")
        if self._others:  # one of them must live
            fates = [("suspend",), ("kill",)][number % 2]
        span = len(stage.jobs) * stage.settings["generate_s"] / count
        for runner, fate in zip(chance.sample(self.runners, len(fates)), fates, strict=True):
            runner.fate, runner.wait_for_job = fate, chance.random() < 0.75
            runner.after_s = chance.uniform(0, 0.8 * span if runner.wait_for_job else 0.3)
            if chance.random() < 0.5:
                runner.at_point = 1 + int(chance.random() * self._points() / count)
            if fate == "suspend":
                runner.suspend_s = self.lease_s * chance.uniform(1.1, 1.6) + self.clock_s
        late = chance.choice(self.runners[1:])
        late.late_s = chance.uniform(0.1, 0.8 * span)

    def _points(self) -> int:
        """Of an undisturbed run of all jobs."""
        points = self._stage.points
        if "runner" not in points:
            points["runner"], _ = self._stage.count_points(WATCHES[self._kind])
        return points["runner"]

    def run(self) -> None:
        """Carry it out, and note in the row what went wrong."""
        self._let_run()
        lines = self.journal.lines()
        if self._others and any(runner.fate == "kill" for runner in self.runners):
            # It may have died while it replaced a job that the other has done with: the other's command is given again.
            manifest = next(runner.manifest for runner in self.runners if runner.fate != "kill")
            self.runners.append(Runner(len(self.runners), manifest))
            self._let_run()
        self._check(lines)

    def _let_run(self) -> None:
        """Begin the runners, let happen to them what shall, look at the output meanwhile, until all have ended."""
        begin, sample_at = time.monotonic(), 0.0
        while any(runner.code is None for runner in self.runners):
            now = time.monotonic()
            for runner in self.runners:
                if runner.pid is None and now - begin >= runner.late_s:
                    self._begin(runner)
                if runner.pid is not None and runner.code is None:
                    self._attend(runner)
            if now - begin > LONGEST_TRIAL_S:
                self._end_all()
                break
            if now >= sample_at:
                self._sample()
                taken = time.monotonic() - now
                sample_at = now + max(SAMPLE_EVERY_S, taken / SAMPLING[self._store])
            pause(0.002)

    def _begin(self, runner: Runner) -> None:
        stage = self._stage
        cache = stage.folder / ("cache" if self.one_machine else f"cache-{runner.number}")
        run_id = "shared" if self.any_shard else f"runner-{runner.number}"
        words = [str(runner.manifest), "--out", self.out, "--cache", str(cache), "--run-id", run_id]
        words += ["--log-format", "json", *(("--shard", "any") if self.any_shard else ())]
        load = partial(JournalGenerator, runner.page, self.journal, runner.number, **stage.settings)

        def work() -> int:
            self._patch(runner)
            return run_command(words, load, {"weights": "stub"})

        runner.begun_at = time.monotonic()
        runner.pid = fork(work, self._log(runner))

    def _patch(self, runner: Runner) -> None:
        """In the child: short leases and pauses, and where it is, as `one_machine` says."""
        import runner.verbs.run as run_verb
        from runner.batch import lease, ledger, settlement

        if runner.fate and runner.at_point:
            kill = runner.fate == "kill"

            def strike() -> None:
                runner.page.set("struck", 1)
                if kill:
                    self.journal.write(runner.number, "killed")
                os.kill(os.getpid(), signal.SIGKILL if kill else signal.SIGSTOP)

            WATCHES[self._kind](runner.page, [Path(self.out)], runner.at_point, strike)
        settlement.LOOK_AGAIN_S = LOOK_AGAIN_S[self._store]
        run_verb.Ledger = partial(ledger.Ledger, lease_s=self.lease_s)  # type: ignore[assignment,misc]
        watch_leases(self.journal, runner.number)
        if not self.one_machine:
            lease._boot_id = lambda: f"machine {runner.number}"
            lease.host_name = lambda: f"machine-{runner.number}"

    def _log(self, runner: Runner) -> Path:
        return self._stage.folder / f"{Path(self.out).name}.{runner.number}.log"

    def _attend(self, runner: Runner) -> None:
        """Note that it has ended; let happen to it what shall."""
        assert runner.pid is not None
        found, status = os.waitpid(runner.pid, os.WNOHANG | os.WUNTRACED)
        now = time.monotonic()
        if found and os.WIFSTOPPED(status):
            runner.struck, runner.stopped_at = True, now
        elif found:
            runner.code = os.waitstatus_to_exitcode(status)
            runner.struck |= runner.code == -signal.SIGKILL
            return
        if runner.stopped_at:
            if now - runner.stopped_at >= runner.suspend_s:
                runner.stopped_at = 0.0
                os.kill(runner.pid, signal.SIGCONT)
            return
        if runner.wait_for_job and not runner.generating_at:
            runner.generating_at = now if sum(runner.page.generations()) else 0.0
        begin = runner.generating_at if runner.wait_for_job else runner.begun_at
        if not runner.fate or runner.at_point or runner.struck or not begin or now - begin < runner.after_s:
            return
        runner.struck = True
        if runner.fate == "kill":
            self.journal.write(runner.number, "killed")
        os.kill(runner.pid, signal.SIGKILL if runner.fate == "kill" else signal.SIGSTOP)

    def _end_all(self) -> None:
        for runner in self.runners:
            if runner.code is None and runner.pid is not None:
                os.kill(runner.pid, signal.SIGKILL)
                os.waitpid(runner.pid, 0)
                runner.code = -signal.SIGABRT
                self.problems.append(Problem("hang", f"{runner} has not ended after {LONGEST_TRIAL_S:g} s"))

    def _sample(self) -> None:
        """Look at the output while the runners are at work.

        A record of success that stands before and after the files were read has stood all the time: it is removed
        before its output is replaced, and no two records are equal.
        """
        stage = self._stage
        self.samples += 1
        for job in stage.jobs:
            key = f"jobs/{job}/result.json"
            record = stage.place.read(self.out, key)
            if record is None:
                if self.done.pop(job, None) is not None:
                    self.problems.append(Problem("record", f"{job}: its record of success was removed"))
                continue
            own = {key: record, **self._output_of(record)}
            if own == self._seen.get(job) or stage.place.read(self.out, key) != record:
                continue
            self._seen[job] = own
            state = look(own, job, stage.finished)
            self.problems += [Problem(p.kind, f"{job}, meanwhile: {p.what}") for p in state.problems]
            if state.done is not None and not self._others:
                self.done.setdefault(job, time.monotonic())
            if state.record is not None and state.record["status"] == "failed":
                self.problems.append(Problem("called failed", f"{job}: {state.record['error']}"))

    def _output_of(self, record: bytes) -> dict[str, bytes]:
        """The files that a record names as its output."""
        output = json.loads(record)["output"]
        if output is None:
            return {}
        if output["key"].endswith("/"):
            return self._stage.place.files(self.out, output["key"])
        data = self._stage.place.read(self.out, output["key"])
        return {} if data is None else {output["key"]: data}

    def _check(self, lines: Sequence[Line]) -> None:
        row, stage = self._row, self._stage
        files = stage.place.files(self.out)
        found = self.problems + check_end(files, self._targets(files), stage.finished)
        found += judge(lines, self.lease_s, slack_s=self.clock_s, gone_seen=self.one_machine, done=self.done)
        for runner in self.runners:
            path = self._log(runner)
            log = path.read_text(errors="replace") if path.exists() else ""  # it may be killed before it opens its log
            killed = runner.fate == "kill" and runner.struck
            if runner.code not in (0, -signal.SIGABRT) and not (killed and runner.code == -signal.SIGKILL):
                found.append(Problem("exit code", f"{runner}: {runner.code}: {last_error(log)}"))
            found += [Problem("internal", f"{runner}: {last_error(log)}") for word in BROKEN if word in log]
            row.when["lease lost"] += log.count('"event": "lease_lost"')
            row.when["left to another"] += log.count('"event": "job_leased"')
            row.exit_codes[runner.code or 0] += 1
        row.landed += all(runner.struck for runner in self.runners if runner.fate)
        row.when["suspended"] += sum(runner.struck for runner in self.runners if runner.fate == "suspend")
        row.when["killed"] += sum(runner.struck for runner in self.runners if runner.fate == "kill")
        row.when["jobs"] += len(stage.jobs)
        row.when["renderings"] += sum(line.what == "begun" for line in lines)
        records = [json.loads(data) for key, data in files.items() if key.endswith("/result.json")]
        row.when["resumed"] += sum(record.get("resumed_at_segment") is not None for record in records)
        row.when["samples"] += self.samples
        row.hidden += len(hidden_files(files))
        where = (
            f"{'--shard any' if self.any_shard else 'all jobs'}, {'one machine' if self.one_machine else 'machines'}"
        )
        trial = f"trial {row.trials}: {where}: " + "; ".join(map(str, self.runners))
        row.problems += [(trial, problem) for problem in found]
        if not found:
            stage.place.remove(self.out)

    def _targets(self, files: dict[str, bytes]) -> dict[str, str]:
        """What each job must be at the end; with other seeds, what either runner makes of it, as its record says."""
        if self._others is None:
            return self._stage.targets
        found = {}
        for job, target in self._stage.targets.items():
            data = files.get(f"jobs/{job}/result.json")
            fingerprint = None if data is None else json.loads(data)["fingerprint"]
            found[job] = fingerprint if fingerprint == self._others[1][job] else target
        return found
