"""Colour drift: effect of the options `colour: seam` and `anchor` on a long clip of the demo model, beside Reinhard's.

    python bench/colour_drift.py [--segments N,N] [--clips N] [--models DIR] [--strip PNG] [--json PATH]

Dancers of random looks (tools/demo_world.py), 96x144, windows of 21 frames with one in common, 4 steps; 8 and 16
segments. Each clip is rendered by the product's own pipeline with each option: with the model's own drift, and with an
added drift of the decoded frames, 1.5 % more gain in each segment and an offset in each channel.

The measures use only pixels that the true dancer never covers. `last` is delta E of the last segment's
mean picture against the first's, `mean` that of all segments; `truth` is that of the last segment against the true
room, which the model does not meet exactly in its first segment either (`truth 1`). `step` is the mean step at the
joints beyond the usual one, `flicker` the change of the mean colour from frame to frame, both in delta E. `texture` is
the Laplacian energy of the last segment over the first's. `ms`: time of the measures and the correction per segment.

The peer is Reinhard's transfer, each frame to the first one: mean and deviation of each channel in Lab, applied to the
frames of `off`. Ratios are to `off`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "tools"), str(ROOT)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from _json_file import write_json  # noqa: E402
from demo_world import Example, example  # noqa: E402

from runner.video.drift import DriftMeter, to_lab  # noqa: E402

WIDTH, HEIGHT, WINDOW, STEPS = 96, 144, 21, 4
SEED = 9_100_000  # training draws from other seeds
GAIN, OFFSETS = 1.015, (0.5, -0.4, 0.2)  # of each segment, on what the one before was; 8-bit levels
METHODS = ("off", "seam", "anchor", "reinhard")
MARGIN = 4  # pixels around the dancer that do not count
COLUMNS = ("last", "mean", "truth", "truth 1", "step", "flicker", "texture", "ms")


class Renderer:
    """The demo's pipeline; its decoder may drift."""

    def __init__(self, models: Path) -> None:
        import torch

        from runner.generation.wan_animate.loading import load_pipeline
        from runner.spec.recipes import get_recipe
        from runner.weights.resolved import ResolvedRecipe
        from runner.weights.store import ModelStore

        torch.set_num_threads(1)
        self.pipeline, _ = load_pipeline(ResolvedRecipe(ModelStore(models), get_recipe("fp32")), torch.device("cpu"))
        self.face_size = self.pipeline.transformer.config.motion_encoder_size
        self._decode, self._offsets = self.pipeline.vae.decode_chunks, torch.tensor(OFFSETS)[None, :, None, None, None]

    def render(self, made: Example, segments: int, colour: str, *, drifts: bool) -> tuple[np.ndarray, dict[str, Any]]:
        """uint8 [n, H, W, 3]; the seconds of the render and of its colours, and what was measured."""
        from PIL import Image

        from runner.generation.protocol import SegmentPlan
        from runner.generation.sampling import make_sampler
        from runner.preprocess.conditions import ConditionFrames
        from runner.spec.options import DEFAULT_PROMPT, JobOptions
        from runner.timing import StageTimer

        class Source:
            frames, reference = len(made.pose), Image.fromarray(made.reference)

            def window(self, start: int, stop: int) -> Any:
                return ConditionFrames(made.pose[start:stop], made.face[start:stop])

        windows = 0

        def decode(*given: Any) -> Iterator[Any]:
            nonlocal windows
            windows += 1
            for pixels in self._decode(*given):
                yield self._drift(pixels) if drifts and windows > 1 else pixels

        self.pipeline.vae.decode_chunks = decode
        plan = SegmentPlan(len(made.pose), WINDOW, 1, segments, WIDTH, HEIGHT, STEPS, STEPS, 0.0)
        options = JobOptions(size=f"{WIDTH}x{HEIGHT}", seed=42, colour=colour)
        new_sampler, timer = partial(make_sampler, "euler", "official", 5.0, STEPS), StageTimer()
        begin = time.perf_counter()
        parts = list(self.pipeline.render(Source(), DEFAULT_PROMPT, options, plan, new_sampler, timer))
        seconds = time.perf_counter() - begin
        drift = parts[-1].drift
        assert drift is not None
        said = {"seconds": seconds, "colour_s": timer.seconds["colour"], "drift": drift.model_dump(mode="json")}
        return np.concatenate([part.frames for part in parts]), said

    def _drift(self, pixels: Any) -> Any:
        """Of one window: what it began from drifts with it, and the next window begins from that."""
        levels = (pixels + 1) * 127.5 * GAIN + self._offsets
        return (levels / 127.5 - 1).clamp(-1, 1)


def reinhard(frames: np.ndarray) -> np.ndarray:
    """Mean and deviation of each Lab channel of each frame to those of the first (Reinhard et al. 2001, in CIE Lab)."""
    found, target = np.empty_like(frames), None
    for index, frame in enumerate(frames):
        lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        mean, deviation = lab.mean(axis=(0, 1)), lab.std(axis=(0, 1))
        if target is None:
            target = mean, deviation
        moved = (lab - mean) * (target[1] / np.maximum(deviation, 1e-6)) + target[0]
        rgb = cv2.cvtColor(moved.astype(np.float32), cv2.COLOR_LAB2RGB)
        found[index] = np.clip(np.rint(rgb * 255), 0, 255)
    return found


def bounds_of(segments: int) -> list[int]:
    return [0, *(1 + (WINDOW - 1) * (index + 1) for index in range(segments))]


def measure(frames: np.ndarray, made: Example, segments: int) -> dict[str, float]:
    """All measures of one clip; the room is what the true dancer never covers."""
    kernel = np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8)
    room = cv2.dilate(made.silhouette.any(axis=0).astype(np.uint8), kernel) == 0
    bounds = bounds_of(segments)
    means = [frames[a:b, room].mean(axis=0) for a, b in pairwise(bounds)]
    truth = made.truth[:, room].mean(axis=0)

    def delta_e(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm(to_lab(one) - to_lab(other), axis=-1).mean())

    meter = DriftMeter(bounds[1:-1], len(frames))
    meter.add(frames)
    found = meter.result()
    colours = to_lab(frames[:, room].mean(axis=1))
    return {
        "room": float(room.mean()),
        "last": delta_e(means[-1], means[0]),
        "mean": float(np.mean([delta_e(mean, means[0]) for mean in means[1:]])),
        "truth": delta_e(means[-1], truth),
        "truth 1": delta_e(means[0], truth),
        "step": float(np.mean([joint.excess for joint in found.joints])),
        "flicker": float(np.linalg.norm(np.diff(colours, axis=0), axis=1).mean()),
        "texture": found.segments[-1].laplacian / found.segments[0].laplacian,
    }


def bench(models: Path, counts: list[int], clips: int, strip: Path | None) -> list[dict[str, Any]]:
    renderer, rows = Renderer(models), []
    pictures: dict[str, np.ndarray] = {}
    for segments in counts:
        for drifts in (False, True):
            for clip in range(clips):
                rng = np.random.default_rng([SEED, clip])
                frames = bounds_of(segments)[-1]
                made = example(rng, WIDTH, HEIGHT, frames, renderer.face_size)
                rendered: dict[str, np.ndarray] = {}
                for method in METHODS:
                    said: dict[str, Any] = {"drift": None}
                    if method == "reinhard":
                        begin = time.perf_counter()
                        rendered[method] = reinhard(rendered["off"])
                        said |= {"seconds": 0.0, "colour_s": time.perf_counter() - begin}
                    else:
                        rendered[method], said = renderer.render(made, segments, method, drifts=drifts)
                    row = {"segments": segments, "drifts": drifts, "clip": clip, "method": method}
                    row |= measure(rendered[method], made, segments)
                    row |= {"ms": 1000 * said["colour_s"] / segments, "render_s": said["seconds"]}
                    rows.append(row | {"drift": said["drift"]})
                    print(f"{segments} segments, clip {clip}, {method} done", file=sys.stderr, flush=True)
                if clip == 0:
                    pictures |= {f"{segments} {'drift' if drifts else 'own'} {m}": f for m, f in rendered.items()}
    if strip is not None:
        draw_strip(pictures, strip)
    return rows


def draw_strip(clips: dict[str, np.ndarray], path: Path) -> None:
    """A row a clip: a frame from the middle of each segment."""
    rows = []
    for name, frames in clips.items():
        bounds = bounds_of((len(frames) - 1) // (WINDOW - 1))
        middles = [(a + b) // 2 for a, b in pairwise(bounds)]
        row = np.concatenate([frames[i] for i in middles], axis=1)
        label = np.full((16, row.shape[1], 3), 255, np.uint8)
        cv2.putText(label, name, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [label, row]
    width = max(row.shape[1] for row in rows)
    sheet = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), mode="constant") for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


def show(rows: list[dict[str, Any]]) -> None:
    for segments, drifts in dict.fromkeys((row["segments"], row["drifts"]) for row in rows):
        chosen = [row for row in rows if (row["segments"], row["drifts"]) == (segments, drifts)]
        clips = len({row["clip"] for row in chosen})
        what = f"drift of {GAIN} a segment put in" if drifts else "the model's own drift"
        print(f"\n{segments} segments, {what}; means of {clips} clips; room {chosen[0]['room']:.0%} of the picture")
        print(f"{'':<10}" + "".join(f"{name:>10}" for name in COLUMNS) + f"{'last/off':>10}{'step/off':>10}")
        means = {
            method: {n: float(np.mean([row[n] for row in chosen if row["method"] == method])) for n in COLUMNS}
            for method in METHODS
        }
        off = means["off"]
        for method, row in means.items():
            ratios = [row[name] / off[name] if off[name] else float("nan") for name in ("last", "step")]
            print(
                f"{method:<10}" + "".join(f"{row[n]:>10.3f}" for n in COLUMNS) + "".join(f"{r:>10.2f}" for r in ratios)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=lambda text: [int(n) for n in text.split(",")], default=[8, 16])
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "demo-models", help="the demo's store")
    parser.add_argument("--strip", type=Path, help="draw a frame of each segment of the first clip here")
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    from runner.demo.build import build_demo_models

    build_demo_models(arguments.models)
    rows = bench(arguments.models, arguments.segments, arguments.clips, arguments.strip)
    show(rows)
    write_json(arguments.json, {"bench": "colour_drift", "rows": rows})


if __name__ == "__main__":
    main()
