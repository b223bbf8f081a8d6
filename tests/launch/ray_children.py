"""What the workers of `run --on ray` do in tests: functions that a worker finds by name. The engine is the stub's.

A job's prompt says what happens to it: `ok`, or `hold`, which generates until the file `ID.go` lies in the folder. Each
beginning of `generate` adds a line to `begun`: job's seed, pid.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from runner.batch.loop import Engine
from runner.errors import WeightsMissing
from tests.stub_generator import StubGenerator

LONGEST_S = 120.0  # that a held job waits


class HeldGenerator(StubGenerator):
    """Generates as the stub does, and waits in the middle of a job that is held."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def generate(self, conditions: Any, plan: Any, timer: Any, on_step: Any = None, start: Any = None) -> Iterator[Any]:
        name = chr(conditions.request.options.seed)
        with (self._folder / "begun").open("a", encoding="utf-8") as file:
            file.write(f"{name} {os.getpid()}\n")
        go, deadline = self._folder / f"{name}.go", time.monotonic() + LONGEST_S
        for segment in super().generate(conditions, plan, timer, on_step, start):
            while conditions.request.prompt == "hold" and not go.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
                if on_step is not None:  # where a run that is told to stop gives the job up
                    on_step(segment.index * plan.steps + 1, plan.segments * plan.steps)
            yield segment


def engine_in(folder: str, breaks_once: bool = False) -> Engine:
    """`breaks_once`: the first worker that loads it fails, and no other."""

    def load() -> StubGenerator:
        if breaks_once:
            try:
                (Path(folder) / "broken").mkdir()
            except FileExistsError:
                pass
            else:
                raise WeightsMissing("the test's weights are not there", where=str(os.getpid()))
        return HeldGenerator(Path(folder))

    return Engine("stub", {"weights": "stub"}, load)


def run_held(settings: Any, progress: Any, *, source: Any, share: Any, folder: str, breaks_once: bool = False) -> Any:
    """The verb `run` of a worker."""
    import runner.verbs.run as run_verb
    from runner.batch import settlement

    settlement.LOOK_AGAIN_S = 0.2
    run_verb.build_engine = lambda *_: engine_in(folder, breaks_once)  # type: ignore[assignment]
    return run_verb.run(settings, progress, source=source, share=share)


def patched(folder: str, breaks_once: bool = False) -> dict[str, Any]:
    """What of `runner.verbs.run` a command's process replaces, so that its workers compute as `run_held` does."""
    from runner.launch.ray_driver import RayWork

    work = partial(run_held, folder=folder, breaks_once=breaks_once)
    return {
        "build_engine": lambda *_: engine_in(folder),
        "RayWork": lambda run, *more, **named: RayWork(work, *more, **named),
    }
