"""Sleeping stages: `video-lab run` with a stub whose stages sleep, for `makespan.py`; Ray workers run it too.

    python bench/_sleeping_stages.py GATE run-words…

A job's prompt is its seconds of generation. A process that has its first job writes a file into the folder GATE and
waits until the file `open` exists, so that the start of processes is not measured.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from runner.generation.protocol import OnStep, ResumePoint, Segment, SegmentPlan  # noqa: E402
from runner.timing import StageTimer  # noqa: E402
from tests.stub_generator import StubConditions, StubGenerator  # noqa: E402

PREPARE_S = 0.2
OPEN = "open"
GATE_S = 300.0  # until the other processes have started


class SleepingGenerator(StubGenerator):
    """Generates a job for the seconds in its prompt."""

    def generate(
        self,
        conditions: StubConditions,
        plan: SegmentPlan,
        timer: StageTimer,
        on_step: OnStep | None = None,
        start: ResumePoint | None = None,
    ) -> Iterator[Segment]:
        self.generate_s = float(conditions.request.prompt)
        self.prepared.clear()
        return super().generate(conditions, plan, timer, on_step, start)


def load(gate: str) -> SleepingGenerator:
    Path(gate, f"ready-{os.getpid()}").touch()
    deadline = time.monotonic() + GATE_S
    while not Path(gate, OPEN).exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the gate stays closed")
        time.sleep(0.01)
    return SleepingGenerator(prepare_s=PREPARE_S)


def put_in_place(gate: str) -> Any:
    """Replace the engine in this process and return the module of the verb `run`."""
    import runner.verbs.run as run_verb
    from runner.batch.loop import Engine

    run_verb.build_engine = lambda *_, **__: Engine("stub", {"weights": "stub"}, partial(load, gate))  # type: ignore
    return run_verb


def run_in_worker(gate: str, *arguments: Any, **named: Any) -> Any:
    """Run in a Ray worker in place of the verb `run`."""
    return put_in_place(gate).run(*arguments, **named)


def main() -> int:
    gate, *words = sys.argv[1:]
    import _sleeping_stages  # by this name, under which a Ray worker finds it

    from runner.cli import main as command

    run_verb = put_in_place(gate)
    ray_work = run_verb.RayWork
    run_verb.RayWork = lambda run, *more, **named: ray_work(
        partial(_sleeping_stages.run_in_worker, gate), *more, **named
    )
    # There is no forecast for this machine's CPUs, so the driver gets the seconds of the stages.
    run_verb.forecast_seconds = lambda jobs, *_: {job.id: float(job.prompt) for job in jobs}
    return command(["run", *words])


if __name__ == "__main__":
    raise SystemExit(main())
