"""Jobs: CPU time of a job among twenty that share prompt, references and dances, beside one process per job.

    python bench/jobs.py [--jobs N] [--processes N] [--quick] [--json PATH]

Twenty jobs of one prompt, two references and two dances, with the tiny demo models in float32 on one thread. They are
rendered three ways: by one process that caches what jobs share; by the same process without caches; and by the original
scripts, one new process per job with the library's pipeline (`_original_job.py`). Schedule and seeds are equal, and the
frames must be bit-identical. Preprocessing and writing are not included. Tiny models import and load for longer than
they render; the shares are different for the 14B model, so that every part has a row. `--quick`: few small jobs and no
other process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import _original_job as original_job  # noqa: E402
import numpy as np  # noqa: E402
from _json_file import write_json  # noqa: E402

STEPS, FACE = 6, 32
NOT_MEASURED = "not measured"
SHARED = ("prompt", "clip", "reference", "blank", "pose_latents")


@dataclass(frozen=True)
class Shape:
    """The size of the clip: frames of width x height, all in one window."""

    frames: int
    width: int
    height: int


def moving(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]: smooth random pictures."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse])


class Source:
    """One job's conditions, in memory."""

    def __init__(self, shape: Shape, reference: int, dance: int) -> None:
        from PIL import Image

        self.frames = shape.frames
        self.pose = moving(shape.frames, shape.height, shape.width, 100 + dance)
        self.face = moving(shape.frames, FACE, FACE, 200 + dance)
        self.picture = moving(1, 90, 50, reference)[0]
        self.reference = Image.fromarray(self.picture)

    def window(self, start: int, stop: int) -> Any:
        return SimpleNamespace(pose=self.pose[start:stop], face=self.face[start:stop], background=None, mask=None)


class Ours:
    """The pipeline of this repository, and the CPU seconds and lookups of each job."""

    def __init__(self, store: Path, shape: Shape) -> None:
        import torch

        from runner.generation.wan_animate.loading import load_pipeline
        from runner.spec.recipes import get_recipe
        from runner.weights.resolved import ResolvedRecipe
        from runner.weights.store import ModelStore

        torch.set_num_threads(1)
        self.recipe, self.shape = get_recipe(f"fp32+euler+diffusers-grid+steps{STEPS}"), shape
        self.pipeline, _ = load_pipeline(ResolvedRecipe(ModelStore(store), self.recipe), torch.device("cpu"))
        self.lookups: Counter[str] = Counter()

    def render(self, source: Source, prompt: str, seed: int) -> np.ndarray:
        from runner.generation.sampling import make_sampler
        from runner.generation.segments import plan_job
        from runner.spec.options import JobOptions
        from runner.timing import StageTimer

        options = JobOptions(seed=seed, max_segment_frames=max(5, self.shape.frames))
        plan = plan_job(self.shape.frames, (self.shape.width, self.shape.height), options, self.recipe)
        recipe = self.recipe
        new_sampler = partial(make_sampler, recipe.scheduler, recipe.schedule, recipe.shift, recipe.steps)
        timer = StageTimer()
        segments = self.pipeline.render(source, prompt, options, plan, new_sampler, timer)
        frames = np.concatenate([segment.frames for segment in segments])
        self.lookups.update(timer.counters)
        return frames


def a_process(store: Path, source: Source, prompt: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Render one job with the original scripts: CPU seconds by part, and the digest of its frames."""
    inputs = scratch / "inputs.npz"
    np.savez(inputs, reference=source.picture, pose=source.pose, face=source.face, prompt=np.array(prompt))
    command = [sys.executable, str(HERE / "_original_job.py"), str(store), str(inputs), str(STEPS), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the original scripts failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 4)


def bench(jobs: int, processes: int, checked: int, shape: Shape, *, whole_process: bool = True) -> dict[str, Any]:
    """`checked`: how many of the first four jobs the other rows of this process render, the first as warm-up.

    `whole_process`: this process was begun for the bench, so that its first job pays for the imports.
    """
    from runner.spec.options import DEFAULT_PROMPT

    begin = 0.0 if whole_process else time.process_time()
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as folder:
        # Before the clock that leaves out what the models take to make.
        import runner.generation.wan_animate.pipeline  # noqa: F401
        from runner.demo.tiny_model import build_tiny_store

        building = time.process_time()
        store = Path(folder) / "models"
        build_tiny_store(store)
        begin += time.process_time() - building
        sources = [Source(shape, reference, dance) for dance in (1, 2) for reference in (1, 2)]

        ours, cpu, digests = Ours(store, shape), [], {}
        for seed in range(jobs):
            frames = ours.render(sources[seed % 4], DEFAULT_PROMPT, seed)
            digests[seed] = original_job.digest(frames)
            cpu.append(time.process_time() - begin - sum(cpu))
        lookups = dict(ours.lookups)

        forgetful = []
        ours.pipeline.switches = replace(ours.pipeline.switches, tensor_cache=False)
        for seed in range(checked):
            at = time.process_time()
            alike = original_job.digest(ours.render(sources[seed % 4], DEFAULT_PROMPT, seed)) == digests[seed]
            forgetful.append(time.process_time() - at)
            if not alike:
                raise RuntimeError(f"job {seed}: other frames without the tensor cache")

        components = store / ours.recipe.weights
        pipe, library = original_job.load(components), []
        for seed in range(checked):  # the first is the warm-up
            inputs = {"reference": sources[seed].picture, "pose": sources[seed].pose, "face": sources[seed].face}
            at = time.process_time()
            frames = original_job.render(pipe, inputs, DEFAULT_PROMPT, STEPS, seed)
            library.append(time.process_time() - at)
            if original_job.digest(frames) != digests[seed]:
                raise RuntimeError(f"job {seed}: the library renders other frames")

        originals = [
            a_process(components, sources[i % 4], DEFAULT_PROMPT, i % jobs, Path(folder)) for i in range(processes)
        ]
        if any(done["frames_sha256"] != digests[i % jobs] for i, done in enumerate(originals)):
            raise RuntimeError("a process of its own renders other frames")

    found: dict[str, Any] = {
        "bench": "jobs",
        "jobs": jobs,
        "shape": f"{shape.width}x{shape.height}, {shape.frames} frames, {STEPS} steps",
        "first_s": round(cpu[0], 3),
        "after_s": mean(cpu[1:]),
        "without_memos_s": mean(forgetful[1:]),
        "library_s": mean(library[1:]),
        "encoded": {name: lookups.get(f"{name}_cache_misses", 0) for name in SHARED},
        "looked_up": {
            name: lookups.get(f"{name}_cache_misses", 0) + lookups.get(f"{name}_cache_hits", 0) for name in SHARED
        },
        "encoder_loads": {name: lookups.get(f"{name}_loads", 0) for name in ("text_encoder", "image_encoder")},
        "process_a_job": None,
        "ratio": None,
    }
    found["memos_ratio"] = round(found["without_memos_s"] / found["after_s"], 2)
    found["library_ratio"] = round(found["library_s"] / found["after_s"], 2)
    if originals:
        parts = ("import_s", "load_s", "render_s", "cpu_s")
        found["process_a_job"] = {part: mean([done[part] for done in originals]) for part in parts}
        found["ratio"] = round(found["process_a_job"]["cpu_s"] / found["after_s"], 1)
    return found


def table(found: dict[str, Any]) -> str:
    originals, ratio = found["process_a_job"], found["ratio"]

    def row(label: str, value: float | None, more: str = "") -> str:
        return f"{label:<58}{NOT_MEASURED if value is None else f'{value:.3f}':>13}  {more}".rstrip()

    lines = [
        f"{found['jobs']} jobs of one prompt, two references, two dances; {found['shape']}; CPU seconds",
        row("our first job, with imports and loading", found["first_s"]),
        row("each of ours after it", found["after_s"]),
        row("the same, without caches between jobs", found["without_memos_s"], f"{found['memos_ratio']:.2f}x"),
        row("the library's pipeline, warm, in one process", found["library_s"], f"{found['library_ratio']:.2f}x"),
        row(
            "the original scripts, a process per job",
            originals and originals["cpu_s"],
            f"{ratio:.1f}x" if ratio else "",
        ),
    ]
    for part in ("import", "load", "render"):
        lines.append(row(f"  of which {part}", originals and originals[f"{part}_s"]))
    lines.append("frames equal to the bit in all of them; encoded, of lookups:")
    for name in SHARED:
        lines.append(f"  {name:<20}{found['encoded'][name]:>4} of {found['looked_up'][name]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20, metavar="N", help="in one process (20; 4 at least)")
    parser.add_argument("--processes", type=int, default=3, metavar="N", help="jobs of the original scripts (3)")
    parser.add_argument("--quick", action="store_true", help="few small jobs, no other process")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 4:
        parser.error("with fewer than 4 jobs nothing is shared")
    if arguments.quick:
        found = bench(6, 0, 2, Shape(5, 32, 32), whole_process=argv is None)
    else:
        found = bench(arguments.jobs, arguments.processes, 4, Shape(21, 64, 96), whole_process=argv is None)
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
