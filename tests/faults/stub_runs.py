"""Stub runs: `video-lab run` with the stub generator in a forked child; the one place that knows how a run is begun.

Everything but the model is the product's: command line, loop, ledger, writers, storage. The stub's frames depend on the
job's seed and on what the inputs hold, so that a wrong input renders wrong frames.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.generation.protocol import OnStep, Request, ResumePoint, Segment, SegmentPlan
from runner.timing import StageTimer
from tests.faults.shared_page import JOBS, SharedPage
from tests.stub_generator import StubConditions, StubGenerator

__all__ = ["PageGenerator", "fork", "import_all", "one_thread", "run_command", "shorten_waits", "write_manifest"]

LONGEST_WAIT_S = 0.02
MANY_SEEDS = 1000  # seeds of one set of options: MANY_SEEDS * set + index of the job


def write_manifest(
    path: Path, *, reference: str, video: str, format: str = "mp4", seeds: int = 0, jobs: int = 3
) -> list[str]:
    """A manifest of `jobs` jobs; `seeds`: which set of seeds. Their ids."""
    assert jobs <= JOBS
    lines = [
        {
            "id": f"job{index}",
            "reference": reference,
            "video": video,
            "prompt": "ok",
            "options": {"seed": seeds * MANY_SEEDS + index, "keep_audio": False, "output": {"format": format}},
        }
        for index in range(jobs)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [str(line["id"]) for line in lines]


class PageGenerator(StubGenerator):
    """The stub, noting on a page what it does; its frames depend on the inputs' contents too."""

    def __init__(self, page: SharedPage, **settings: Any) -> None:
        super().__init__(**settings)
        self._page = page

    def prepare(self, request: Request, timer: StageTimer) -> StubConditions:
        index = request.options.seed % MANY_SEEDS
        conditions = super().prepare(request, timer)
        content = zlib.crc32(request.reference.read_bytes()) ^ zlib.crc32(request.video.read_bytes())
        seed = request.options.seed + content * MANY_SEEDS * MANY_SEEDS
        conditions.request = replace(request, options=request.options.model_copy(update={"seed": seed}))
        conditions.report = {"frames_without_person": 0, "index": index}
        self._page.add_bit("prepared", index)
        self.prepared.clear()  # a long run keeps none of them
        return conditions

    def generate(
        self,
        conditions: StubConditions,
        plan: SegmentPlan,
        timer: StageTimer,
        on_step: OnStep | None = None,
        start: ResumePoint | None = None,
    ) -> Iterator[Segment]:
        index = int(conditions.report["index"])
        self._page.set("generating", index + 1)
        self._page.count_generation(index)
        segments = super().generate(conditions, plan, timer, on_step, start)

        def watched() -> Iterator[Segment]:
            yield from segments
            self._page.add_bit("generated", index)
            self._page.set("ended_ns", time.monotonic_ns())
            self._page.set("ended", index + 1)
            self._page.set("generating", 0)

        return watched()


def run_command(words: Sequence[str], load: Callable[[], Any], identity: Mapping[str, str]) -> int:
    """`video-lab run` with `words`, its engine replaced by one that loads with `load`; the exit code."""
    import runner.verbs.run as run_verb
    from runner.batch.loop import Engine
    from runner.cli import main

    run_verb.build_engine = lambda *_, **__: Engine("stub", dict(identity), load)  # type: ignore[assignment]
    return main(["run", *words])


def shorten_waits() -> None:
    """In this process no pause before a retry is longer than LONGEST_WAIT_S. Call it before the product is imported."""
    assert "runner.storage.s3" not in sys.modules, "its default pause is bound when it is imported"
    original = time.sleep
    time.sleep = lambda seconds: original(min(seconds, LONGEST_WAIT_S))


def import_all() -> None:
    """What a run needs, so that no fork pays for imports."""
    import boto3.s3.transfer  # noqa: F401
    import cv2  # noqa: F401
    import jsonschema  # noqa: F401
    import prometheus_client  # noqa: F401
    import psutil  # noqa: F401
    import rich.console  # noqa: F401
    from av.video.reformatter import VideoReformatter  # noqa: F401

    import runner.cli
    import runner.storage.s3
    import runner.verbs.run  # noqa: F401
    from runner.batch import settlement
    from runner.records.record import environment

    environment()
    settlement.RETRY_DELAY_S = LONGEST_WAIT_S


def one_thread() -> bool:
    """Whether this process has one thread, so that a fork copies no lock that another holds."""
    return len(os.listdir("/proc/self/task")) == 1


def fork(work: Callable[[], int], log: Path) -> int:
    """Run `work` in a child whose output goes to `log`; its process id. The child ends with what `work` returns."""
    assert one_thread(), "a process with threads must not fork trials: set OPENBLAS_NUM_THREADS=1"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
