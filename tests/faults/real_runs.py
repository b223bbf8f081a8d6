"""Real runs: `video-lab run` with the real engine on the CPU, killed by SIGKILL at an exact point of a job.

    python -m tests.faults.real_runs        reads a request a line from standard input, answers each with a line

In:   JSON: the words of the command, where to kill it, what the device shall call itself. Out: JSON: the exit code,
      negative for a signal. Never: what the run leaves.

The process imports everything once, has no threads, and forks a child a run. A child that has reached its point tells
this process and waits there, in that one thread; the kill comes from here.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its pool of threads is made when numpy is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.faults.stub_runs import fork, import_all

__all__ = ["PUBLISHED", "Point", "RealRuns"]

ROOT = Path(__file__).resolve().parents[2]
LONGEST_RUN_S = 240.0
KILLED = -signal.SIGKILL
ENGINE = (  # what a run would import for seconds; no more, as ONNX Runtime starts threads
    "transformers.models.clip.modeling_clip",
    "transformers.models.umt5.modeling_umt5",
    "diffusers.models.transformers.transformer_wan_animate",
    "diffusers.pipelines.wan.pipeline_wan_animate",
    "runner.generation.wan_animate.family",
    "runner.generation.wan_animate.generator",
    "runner.generation.wan_animate.loading",
)
PUBLISHED = ("published", 0)

# `after`: that many segments are kept and noted in the mark. `part`: the last of them without its state. `in`: the
# segment after that many has had its first evaluation, and all before it are kept. `published`: the output is stored
# and the record is not.
Point = tuple[str, int]


def halt_at(point: Point, halt: Callable[[], None]) -> None:
    """In this process, call `halt` where `point` says."""
    from runner.batch.job_checkpoint import Checkpoints
    from runner.batch.ledger import Ledger
    from runner.generation.wan_animate.generator import WanAnimateGenerator

    kind, number = point
    kept = threading.Event()
    if kind == "in" and number == 0:
        kept.set()
    save_part, save_state = Checkpoints.save_part, Checkpoints.save_state
    generate, find = WanAnimateGenerator.generate, Checkpoints.find
    publish, note = Ledger.publish, Ledger.note_segments

    def finding(self: Any, chain: Any, folder: Path) -> Any:
        found = find(self, chain, folder)
        if found.point is not None and found.point.segment == number:
            kept.set()
        return found

    def saving_part(self: Any, chain: Any, packed: Path) -> None:
        save_part(self, chain, packed)
        if kind == "part" and self.kept(chain) == number:
            halt()

    def saving_state(self: Any, chain: Any, resume: Any, scratch: Path) -> None:
        save_state(self, chain, resume, scratch)
        if resume.segment == number:
            kept.set()

    def noting(self: Any, job_id: str, done: int, *, before: bool = False) -> None:
        note(self, job_id, done, before=before)
        if kind == "after" and done == number and not before:
            halt()

    def generating(
        self: Any, conditions: Any, plan: Any, timer: Any, on_step: Callable[[int, int], None], start: Any = None
    ) -> Any:
        def step(done: int, total: int) -> None:
            if kind == "in" and done == number * (total // plan.segments) + 1:
                kept.wait()
                halt()
            on_step(done, total)

        return generate(self, conditions, plan, timer, step, start)

    def publishing(self: Any, job_id: str, local: Path, key: str) -> Any:
        info = publish(self, job_id, local, key)
        if kind == "published" and key.endswith((".mp4", ".sha256")):
            halt()
        return info

    Checkpoints.find, Checkpoints.save_part, Checkpoints.save_state = finding, saving_part, saving_state  # type: ignore[method-assign]
    WanAnimateGenerator.generate = generating  # type: ignore[method-assign]
    Ledger.publish, Ledger.note_segments = publishing, noting  # type: ignore[method-assign]


def run_once(words: Sequence[str], log: Path, point: Point | None, device: str | None) -> int:
    """The exit code of one run; negative for a signal, -SIGABRT for a run that hangs."""
    reached, told = os.pipe()

    def halt() -> None:
        os.write(told, b"x")
        threading.Event().wait()

    def work() -> int:
        from runner.cli import main
        from runner.generation.wan_animate import generator

        if device is not None:
            generator.hardware_model = lambda _: device  # type: ignore[assignment]
        if point is not None:
            halt_at(point, halt)
        return main(["run", *words])

    pid, end = fork(work, log), time.monotonic() + LONGEST_RUN_S
    os.close(told)
    try:
        while True:
            readable, _, _ = select.select([reached], [], [], max(0.0, end - time.monotonic()))
            if readable and not os.read(reached, 1):  # closed: it has ended
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return code if readable else -signal.SIGABRT
    finally:
        os.close(reached)


def import_engine() -> None:
    for name in ENGINE:
        importlib.import_module(name)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    import_all()
    import_engine()
    for line in sys.stdin:
        asked = json.loads(line)
        point = None if asked["point"] is None else (asked["point"][0], asked["point"][1])
        code = run_once(asked["words"], Path(asked["log"]), point, asked["device"])
        print(json.dumps(code), file=answers, flush=True)


class RealRuns:
    """A process that forks runs, and what it needs to be asked. Close it."""

    def __init__(self, models: Path, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._words = ["--models", str(models), "--recipe", "fp32", "--cache", str(folder / "cache")]
        self._words += ["--log-format", "json"]
        self.log = folder / "run.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.real_runs"],
            cwd=ROOT,
            # One thread, whatever the tests have: the process must not have others when it forks.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, device: str | None = None) -> list[dict[str, Any]]:
        """The events of a run that must succeed."""
        code = self._ask(words, None, device)
        assert code == 0, f"exit {code}:\n{self._said()}"
        return [json.loads(line) for line in self._said().splitlines() if line.startswith("{")]

    def kill(self, point: Point, *words: str) -> None:
        """A run that must be killed at `point`."""
        code = self._ask(words, point, None)
        assert code == KILLED, f"not killed at {point}, exit {code}:\n{self._said()}"

    def _said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _ask(self, words: Sequence[str], point: Point | None, device: str | None) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self.log.unlink(missing_ok=True)
        asked = {"words": [*words, *self._words], "point": point, "device": device, "log": str(self.log)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that forks runs has ended"
        return int(json.loads(answer))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    main()
