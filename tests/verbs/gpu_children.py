"""What the processes of `run --gpus` do in tests: functions that a new process finds by name, without a GPU.

Little is imported before a function needs it, so that a process starts soon.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from runner.batch.run_pace import StepCount
from runner.batch.worker_link import MachineShare
from runner.errors import ConfigInvalid, DeviceLost, RunnerError
from runner.records.record import JobLine

MINE = "VIDEO_LAB_TEST_PLACE"  # names this process's place


@dataclass
class Ended:
    exit_code: int
    lines: tuple[JobLine, ...] = ()
    error: RunnerError | None = None


def lines(status: Any, names: Sequence[str]) -> tuple[JobLine, ...]:
    return tuple(JobLine(id=name, status=status, reason="test") for name in names)


def log(event: str, **fields: Any) -> None:
    structlog.get_logger().info(event, **fields)


def run_stub(settings: Any, progress: Any, *, share: MachineShare, generate_s: float = 0.0, dies_at: str = "") -> Any:
    """The verb `run` with the stub's engine; at the place `dies_at` the process is killed before it begins a job."""
    import runner.verbs.run as run_verb
    from runner.batch.loop import Engine
    from tests.stub_generator import StubGenerator

    def load() -> StubGenerator:
        log("stub_loaded")
        return StubGenerator(generate_s=generate_s)

    def build_engine(settings: Any, manifest: Any, processes: int, demands: Any) -> Engine:
        if os.environ.get(MINE) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return Engine("stub", {"weights": "stub"}, load)

    run_verb.build_engine = build_engine  # type: ignore[assignment]
    return run_verb.run(settings, progress, share=share)


def tell_environment(settings: Any, progress: Any, *, share: MachineShare) -> Ended:
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    log("environment", pid=os.getpid(), session=os.getsid(0), **{name: os.environ.get(name) for name in names})
    return Ended(0)


def tell_settings(settings: Any, progress: Any, *, share: MachineShare) -> Ended:
    progress.step("a", StepCount(1, 1, 1, 2, 1, 2))
    log("settings", processes=share.processes, run_id=settings.run_id, shard=settings.shard, gpus=settings.gpus)
    return Ended(0, lines("succeeded", [job.id for job in settings.manifest.jobs]))


def render_some(
    settings: Any, progress: Any, *, share: MachineShare, first: Sequence[str], second: Sequence[str]
) -> Ended:
    """Place 0 ends `first`. Place 1 ends `second` and is then killed."""
    mine = os.environ[MINE] == "0"
    done = lines("succeeded", first if mine else second)
    for line in done:
        progress.finished(line)
    if not mine:
        os.kill(os.getpid(), signal.SIGKILL)
    return Ended(0, done)


def die_generating(settings: Any, progress: Any, *, share: MachineShare) -> Ended:
    """Place 0 is killed while it generates job a, which place 1 has only looked at."""
    if os.environ[MINE] == "0":
        progress.phase("a", "generating")
        progress.step("a", StepCount(1, 1, 1, 2, 1, 2))
        os.kill(os.getpid(), signal.SIGKILL)
    progress.phase("a", "waiting")
    return Ended(0)


def warn(settings: Any, progress: Any, *, share: MachineShare) -> Ended:
    """What a library says while the model is loaded."""
    logging.getLogger("transformers.models").warning("%s is not installed", "torchvision")
    return Ended(0)


def fail(settings: Any, progress: Any, *, share: MachineShare, places: Sequence[str], bug: bool = False) -> Ended:
    if os.environ[MINE] in places:
        if bug:
            raise ValueError("a bug of the test's")
        raise ConfigInvalid("this cannot be", where="the test", todo="Leave it")
    return Ended(0, lines("succeeded", ["a"]))


def wait_for_stop(settings: Any, progress: Any, *, share: MachineShare, at_once: str = "", folder: str = "") -> Ended:
    """Say what of the parent's signals is heard. A signal that comes directly says nothing."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    direct = share.stop.draining
    log("ready", direct=direct)
    if folder:
        Path(folder, os.environ[MINE]).write_text("ready", encoding="utf-8")
    assert share.stop.requested.wait(60)
    if at_once:  # until the second signal
        log("told")
        while not share.stop.abandon:
            time.sleep(0.01)
    else:
        time.sleep(0.3)  # a second signal, were there one, would come by now
    log("stopped", name=share.stop.name, at_once=share.stop.abandon)
    if folder:
        Path(folder, os.environ[MINE]).write_text(f"{share.stop.name} {share.stop.abandon}", encoding="utf-8")
    return Ended(share.stop.exit_code, lines("not_run", ["a"]))


def never_end(settings: Any, progress: Any, *, share: MachineShare) -> Ended:
    log("ready")
    time.sleep(600)
    return Ended(0)


def load_model(settings: Any, progress: Any, *, share: MachineShare) -> Ended:
    log("before_load")
    share.before_load()
    log("loaded")
    return Ended(0, lines("succeeded", ["a"]))


def stop_early(settings: Any, progress: Any, *, share: MachineShare, places: str, done: str) -> Ended:
    """The engine of `places` cannot be loaded; the other process ends `done`."""
    if os.environ[MINE] in places:
        return Ended(3, lines("not_run", ["a", "b"]), DeviceLost("the GPU is lost", where=os.environ[MINE]))
    return Ended(0, lines("succeeded", done))
