"""Real runs to report on: the verb `run` over a stub that works for measured seconds; storage and records are real.

In:   an output folder or URI, prompts. Out: what the runs leave there; what its raw JSON files say.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob
from itertools import count
from pathlib import Path
from typing import Any

import runner.verbs.run as run_verb
from runner.batch.loop import Engine
from runner.generation.protocol import SegmentPlan
from runner.records.output_layout import shard_of_summary
from runner.spec.manifest import Manifest, parse_manifest
from runner.spec.options import JobOptions
from runner.storage import open_storage
from runner.verbs.settings import RunSettings
from tests.stub_generator import StubGenerator

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = "runs/r/00000-of-00001.summary.json"
FORECAST_S, FORECAST_BYTES = 0.25, 5_000_000_000


@dataclass
class WorkingStub(StubGenerator):
    """A stub that forecasts and looks things up.

    A job whose prompt is `terminate` sends its process a SIGTERM.
    """

    generate_s: float = 0.04
    keep_ahead: int = 0  # of so many jobs, each but the last waits for the preparation of the next one
    crash_after: tuple[str, ...] = ()  # globs: of each a file must be there before a job ends the process

    def plan(self, frames: int, size: tuple[int, int], options: JobOptions) -> SegmentPlan:
        return replace(super().plan(frames, size, options), seconds=FORECAST_S)

    def generate(self, conditions: Any, plan: Any, timer: Any, *more: Any) -> Iterator[Any]:
        timer.count("prompt_cache_hits" if self.tries else "prompt_cache_misses")
        timer.forecast["denoise"] = FORECAST_BYTES
        begun = len(self.started_at) + 1  # generations, this one included
        wait_until(lambda: len(self.prepared) >= min(begun + 1, self.keep_ahead))
        if conditions.request.prompt == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        pieces = super().generate(conditions, plan, timer, *more)
        for index in count():
            if index == 1 and conditions.request.prompt == "crash-at-1":
                wait_until(lambda: all(glob(name) for name in self.crash_after))
            piece = next(pieces, None)
            if piece is None:
                return
            yield piece


def manifest_of(folder: Path, prompts: Mapping[str, str]) -> Manifest:
    """A job for each id, with its prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "r.png").write_bytes(b"not opened by the stub")
    (folder / "v.mp4").write_bytes(b"not opened by the stub")
    place = {"reference": str(folder / "r.png"), "video": str(folder / "v.mp4")}
    jobs = [{"id": job_id, **place, "prompt": prompt} for job_id, prompt in prompts.items()]
    return parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=".", source="night.json")


def run_stub(
    out: str,
    folder: Path,
    prompts: Mapping[str, str],
    *,
    keep_ahead: bool = False,
    crash_after: Sequence[str] = (),
    **given: Any,
) -> int:
    """One run in this process; the exit code."""

    def load() -> WorkingStub:
        return WorkingStub(keep_ahead=len(prompts) if keep_ahead else 0, crash_after=tuple(crash_after))

    before = run_verb.build_engine
    run_verb.build_engine = lambda *_: Engine("stub", {"weights": "stub"}, load)
    try:
        settings = RunSettings(manifest=manifest_of(folder, prompts), out=out, cache=folder / "cache", **given)
        return run_verb.run(settings).exit_code
    finally:
        run_verb.build_engine = before


def run_that_dies(out: Path, folder: Path, prompts: Mapping[str, str], crash_after: Sequence[str]) -> None:
    """One run `r` in a process of its own, which a job's prompt ends as soon as the files of `crash_after` are there.

    It writes its summary after the first job that ended and not again; not even then, where the summary is not among
    these files.
    """
    globs = [f"{out}/{name}" for name in crash_after]
    code = f"""
import runner.batch.summary as summary
from pathlib import Path
from tests.verbs.reported_runs import run_stub
summary.SHARE_OF_JOBS = 10
if {SUMMARY!r} not in {list(crash_after)!r}:
    summary.SummaryWriter._is_due = lambda self: False
run_stub({str(out)!r}, Path({str(folder)!r}), {dict(prompts)!r}, crash_after={globs!r}, run_id="r")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr


def wait_until(come: Callable[[], bool]) -> None:
    """Raises TimeoutError after a minute."""
    deadline = time.monotonic() + 60
    while not come():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.005)


@dataclass
class RawRun:
    """The JSON files of one run, read without the code under test."""

    summaries: list[dict[str, Any]]
    records: dict[str, dict[str, Any]]

    @property
    def processes(self) -> list[dict[str, Any]]:
        return [process for summary in self.summaries for process in summary["processes"]]


def read_raw(out: str | Path, run_id: str) -> RawRun:
    storage = open_storage(out)
    keys = sorted(info.key for info in storage.list())
    summaries = [
        json.loads(storage.read_bytes(key))
        for key in keys
        if key.startswith(f"runs/{run_id}/") and shard_of_summary(key.rpartition("/")[2])
    ]
    read = (json.loads(storage.read_bytes(key)) for key in keys if key.endswith("/result.json"))
    return RawRun(summaries, {record["job_id"]: record for record in read if record["run_id"] == run_id})
