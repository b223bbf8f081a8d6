"""Quality: the demo's trained model on characters and dances that were not in its training, against the truth.

    python bench/quality.py [--clips N | --quick] [--models DIR] [--workers N] [--json PATH]
    python bench/quality.py --samplers --clips 12
    python bench/quality.py --fast --clips 8

Every clip is a dancer of random looks and a dance (tools/demo_world.py), 96x144, 21 frames, rendered by the product's
own pipeline. PSNR and SSIM are over the whole frame and inside the union of the true silhouettes over the clip; `edges`
is the gradient there relative to the truth's; `colour` is the distance (CIE76) of the true colours of the dancer's
parts and the rendered colours there. The weights are the shipped bfloat16 ones; computation is in float32.

`--samplers` compares the samplers at equal counts of model calls instead: `rms own` (of 255) and `psnr own` are against
the clip of the same random seed after 200 Euler steps, which is taken as the exact solution of the flow.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker is a thread: torch's own wait for one another
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "tools"), str(ROOT)]

import _picture as picture  # noqa: E402
import numpy as np  # noqa: E402
from _json_file import write_json  # noqa: E402
from demo_world import Example, example  # noqa: E402

WIDTH, HEIGHT, FRAMES = 96, 144, 21
SEED = 9_000_000  # training draws from other seeds
QUICK_STEPS, STEPS, SCHEDULES = (1, 2), (1, 2, 4, 6, 20), ("official", "diffusers")
FOUR_BITS = ("absmax", "mse", "nvfp4")  # as good as they are expected to be, the best last
SEGMENTS_FRAMES = 17  # a clip that is one window of 17 frames, or two of 9 with one in common
SHIFT = 5.0
CALLS, QUICK_CALLS = (4, 6, 8, 12), (4,)  # of the model, the same for each sampler of a comparison
EXACT_STEPS, QUICK_EXACT_STEPS = 200, 12  # of Euler, on the official schedule
LEAST_LOSS_DB, LEAST_EDGE_LOSS = 0.5, 0.10  # of many steps' quality: from there on few steps are worse
EXACT = "fp4-distill"  # the recipe that faster ones are held against
HALF_VAE = "fp16-vae"  # what `half_choice.pick_half` picks for the demo's autoencoder
LEAST_FAST_DB = 35.0  # inside the silhouettes, of all that is faster together


@dataclass(frozen=True)
class Trial:
    """One way to render a clip."""

    name: str
    weights: str  # bf16, bf16+lora, absmax, mse, nvfp4, nvfp4+lora
    steps: int
    schedule: str = "official"
    sampler: str = "euler"
    frames: int = FRAMES
    window: int = FRAMES
    against: str | None = None  # another trial, whose frames this one's are compared with too


def trials(quick: bool) -> list[Trial]:
    steps = QUICK_STEPS if quick else STEPS
    found = [
        Trial(f"{weights} {n} {schedule}", weights, n, schedule)
        for weights in ("bf16", "bf16+lora")
        for schedule in SCHEDULES
        for n in steps
        if not (quick and schedule == "diffusers")
    ]
    n = max(k for k in steps if k <= 6)
    for weights in FOUR_BITS:
        found.append(Trial(f"fp4 {weights} {n}", weights, n, against=f"bf16 {n} official"))
    found.append(Trial(f"fp4 nvfp4+lora {n}", "nvfp4+lora", n, against=f"bf16+lora {n} official"))
    found.append(Trial("one window", "bf16", n, frames=SEGMENTS_FRAMES, window=SEGMENTS_FRAMES))
    found.append(Trial("two windows", "bf16", n, frames=SEGMENTS_FRAMES, window=SEGMENTS_FRAMES // 2 + 1))
    return found


def sampler_trials(quick: bool) -> list[Trial]:
    """The exact solution, Euler with half its steps, then each sampler on each schedule with each count of calls.

    Euler's distance with half the steps is about the error that the exact solution itself has left.
    """
    from runner.generation.sampling import SAMPLERS, count_evaluations
    from runner.spec.recipes import SAMPLER_ROWS

    most = QUICK_EXACT_STEPS if quick else EXACT_STEPS
    exact = Trial(f"euler official {most}", "bf16", most)
    found = [exact, Trial(f"euler official {most // 2}", "bf16", most // 2, against=exact.name)]
    for calls in QUICK_CALLS if quick else CALLS:
        for schedule in ("official", "beta57"):
            for sampler in SAMPLERS:
                if schedule not in SAMPLER_ROWS[sampler].schedules:
                    continue
                a_step = count_evaluations(sampler, schedule, SHIFT, 1).evaluations
                name = f"{sampler} {schedule} {calls}"
                found.append(Trial(name, "bf16", calls // a_step, schedule, sampler, against=exact.name))
    return found


@dataclass(frozen=True)
class FastTrial:
    """A recipe, its self-attention in emulated 8 bits or as the recipe says."""

    name: str
    recipe: str
    emulated: bool = False
    together: bool = False  # all that a device may choose


def fast_trials(quick: bool) -> list[FastTrial]:
    """The exact recipe, each choice alone, and all together for each choice of products.

    Together, the autoencoder is in the type of 16 bits that a device picks for this model (`half_choice.pick_half`).
    """
    together = [
        FastTrial(f"all, {product}", f"{EXACT}+{product}+{HALF_VAE}", emulated=True, together=True)
        for product in ("fp8", "int8")
    ]
    if quick:
        return [FastTrial(EXACT, EXACT), together[-1]]
    alone = [FastTrial(word, f"{EXACT}+{word}") for word in ("fp8", "int8", "bf16-vae", "fp16-vae")]
    return [FastTrial(EXACT, EXACT), *alone, FastTrial("emulated attention", EXACT, emulated=True), *together]


class Source:
    """An example as the pipeline takes its conditions."""

    def __init__(self, made: Example, frames: int) -> None:
        from PIL import Image

        self.made, self.frames, self.reference = made, frames, Image.fromarray(made.reference)

    def window(self, start: int, stop: int) -> Any:
        from runner.preprocess.conditions import ConditionFrames

        return ConditionFrames(self.made.pose[start:stop], self.made.face[start:stop])


class Renderer:
    """The store's pipeline with every variant of its transformer."""

    def __init__(self, models: Path, lora: Path, wanted: Iterable[str]) -> None:
        import torch

        from runner.generation.wan_animate.loading import load_pipeline
        from runner.spec.recipes import get_recipe
        from runner.weights.resolved import ResolvedRecipe
        from runner.weights.store import ModelStore

        torch.set_num_threads(1)
        self.pipeline, _ = load_pipeline(ResolvedRecipe(ModelStore(models), get_recipe("fp32")), torch.device("cpu"))
        plain = self.pipeline.transformer
        self.variants = {name: self._variant(plain, name, lora) for name in sorted(set(wanted))}

    @staticmethod
    def _variant(plain: Any, name: str, lora: Path) -> Any:
        """A copy of the transformer with the LoRA merged, and its linears through four bits and back."""
        import torch

        from runner.quantization.formats.e2m1 import G32, NVFP4, dequantize
        from runner.quantization.formats.scales import quantize
        from runner.quantization.lora.apply import attach, read_lora

        model = copy.deepcopy(plain)
        weights, _, with_lora = name.partition("+")
        if with_lora:
            attach(model, [read_lora(lora)])
        if weights != "bf16":
            fmt, method = {"absmax": (G32, "absmax"), "mse": (G32, "mse"), "nvfp4": (NVFP4, "mse")}[weights]
            for layer in model.modules():
                if isinstance(layer, torch.nn.Linear):
                    parts = quantize(layer.weight.data, fmt, method)  # type: ignore[arg-type]
                    layer.weight.data = dequantize(parts, fmt, torch.float32)
        return model

    def render(self, made: Example, trial: Trial, seed: int) -> np.ndarray:
        """uint8 [n, H, W, 3]."""
        self.pipeline.transformer = self.variants[trial.weights]
        sampling = (trial.sampler, trial.schedule, SHIFT, trial.steps)
        return render_clip(self.pipeline, made, sampling, seed, trial.frames, trial.window)

    def reconstruct(self, clip: np.ndarray) -> np.ndarray:
        """The clip through the autoencoder and back: nothing the transformer does can be better."""
        import torch

        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            vae = self.pipeline.vae
            back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
        return ((back.permute(1, 2, 3, 0).numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


class FastRenderer:
    """A pipeline for each recipe, loaded as a run loads it."""

    def __init__(self, models: Path, names: Iterable[str]) -> None:
        import torch

        from runner.generation.wan_animate.loading import load_pipeline
        from runner.spec.recipes import get_recipe
        from runner.weights.resolved import ResolvedRecipe
        from runner.weights.store import ModelStore

        torch.set_num_threads(1)
        self.recipes = {name: get_recipe(name) for name in dict.fromkeys(names)}
        store, device = ModelStore(models), torch.device("cpu")
        self.pipelines = {
            name: load_pipeline(ResolvedRecipe(store, recipe), device)[0] for name, recipe in self.recipes.items()
        }

    def render(self, made: Example, trial: FastTrial, seed: int) -> np.ndarray:
        """uint8 [n, H, W, 3]."""
        from _emulated_attention import emulating

        recipe, pipeline = self.recipes[trial.recipe], self.pipelines[trial.recipe]
        sampling = (recipe.scheduler, recipe.schedule, recipe.shift, recipe.steps)
        with emulating(pipeline.transformer) if trial.emulated else nullcontext():
            return render_clip(pipeline, made, sampling, seed, FRAMES, FRAMES)


def render_clip(
    pipeline: Any, made: Example, sampling: tuple[str, str, float, int], seed: int, frames: int, window: int
) -> np.ndarray:
    """uint8 [frames, H, W, 3]. `sampling`: sampler, sigma schedule, its shift, steps; `window`: frames of a window."""
    from runner.generation.protocol import SegmentPlan
    from runner.generation.sampling import count_evaluations, make_sampler
    from runner.spec.options import DEFAULT_PROMPT, JobOptions
    from runner.timing import StageTimer

    segments = -(-(frames - 1) // (window - 1))
    plan = SegmentPlan(frames, window, 1, segments, WIDTH, HEIGHT, *count_evaluations(*sampling), 0.0)
    options = JobOptions(size=f"{WIDTH}x{HEIGHT}", seed=seed)
    source, new_sampler = Source(made, frames), partial(make_sampler, *sampling)
    parts = pipeline.render(source, DEFAULT_PROMPT, options, plan, new_sampler, StageTimer())
    return np.concatenate([part.frames for part in parts])


def compare(clip: np.ndarray, made: Example) -> dict[str, float]:
    """All measures of one clip, which may be shorter than the truth."""
    n = len(clip)
    truth, inside = made.truth[:n], made.silhouette[:n].any(axis=0)
    joints = made.take.joints()[:n]
    colours = picture.part_colours(clip, joints)
    return {
        "psnr": picture.psnr(clip, truth),
        "psnr_inside": picture.psnr(clip, truth, inside),
        "ssim": picture.ssim(clip, truth),
        "ssim_inside": picture.ssim(clip, truth, inside),
        "edges": picture.edge_energy(clip, inside) / picture.edge_energy(truth, inside),
        "colour": picture.colour_distance(colours, picture.dancer_colours(made.dancer)),
    }


def compare_with(clip: np.ndarray, other: np.ndarray, made: Example) -> dict[str, float]:
    """How near a clip is to another rendering of the same example."""
    inside = made.silhouette.any(axis=0)
    own = {"psnr_own": picture.psnr(clip, other), "psnr_own_inside": picture.psnr(clip, other, inside)}
    return {"rms_own": rms(clip, other)} | own


def rms(clip: np.ndarray, other: np.ndarray) -> float:
    """Root of the mean squared difference of two uint8 clips, of 255."""
    return float(np.sqrt(np.mean((clip.astype(np.float64) - other) ** 2)))


def held_out(index: int, face_size: int) -> Example:
    return example(np.random.default_rng([SEED, index]), WIDTH, HEIGHT, FRAMES, face_size)


def measure(task: tuple[Path, Path, list[int], list[Trial], str]) -> list[dict[str, Any]]:
    """One worker's clips: for each its index, the measures of every trial, and the frames of trial `kept`."""
    models, lora, indices, todo, kept = task
    renderer = Renderer(models, lora, (trial.weights for trial in todo))
    results = []
    for index in indices:
        made = held_out(index, renderer.pipeline.transformer.config.motion_encoder_size)
        still = np.repeat(made.reference[None], FRAMES, axis=0)
        rows = {"copy the reference": compare(still, made)}
        rows["autoencoder"] = compare(renderer.reconstruct(made.truth), made)
        clips = {}
        for trial in todo:
            clip = clips[trial.name] = renderer.render(made, trial, seed=index)
            rows[trial.name] = compare(clip, made)
            if trial.against:
                rows[trial.name] |= compare_with(clip, clips[trial.against], made)
        results.append({"index": index, "rows": rows, "frames": clips[kept]})
        print(f"clip {index} done", file=sys.stderr, flush=True)
    return results


def measure_fast(task: tuple[Path, list[int], list[FastTrial]]) -> list[dict[str, Any]]:
    """One worker's clips: for each its index and the measures of every trial, none where values were not finite. The
    first trial's frames are those that the others' are compared with."""
    models, indices, todo = task
    from runner.errors import NotFinite

    renderer, results = FastRenderer(models, (trial.recipe for trial in todo)), list[dict[str, Any]]()
    face_size = renderer.pipelines[EXACT].transformer.config.motion_encoder_size
    for index in indices:
        made, rows = held_out(index, face_size), dict[str, dict[str, float]]()
        exact = renderer.render(made, todo[0], seed=index)
        rows[todo[0].name] = compare(exact, made)
        for trial in todo[1:]:
            try:
                clip = renderer.render(made, trial, seed=index)
            except NotFinite:
                rows[trial.name] = {}
            else:
                rows[trial.name] = compare(clip, made) | compare_with(clip, exact, made)
        results.append({"index": index, "rows": rows})
        print(f"clip {index} done", file=sys.stderr, flush=True)
    return results


def identity(results: list[dict[str, Any]], face_size: int) -> dict[str, Any]:
    """Check that the colour distance separates a clip's dancer and dance from all others, over all pairs of clips.

    For a single clip there is no pair, only its distance to its own dancer.
    """
    made = [held_out(result["index"], face_size) for result in results]
    joints = [one.take.joints() for one in made]
    right = [picture.dancer_colours(one.dancer) for one in made]
    count = len(results)
    table = np.zeros((2, count, count))  # [wrong reference or wrong dance, clip, whose]
    for i, result in enumerate(results):
        for j in range(count):
            seen = picture.part_colours(result["frames"], joints[i])
            table[0, i, j] = picture.colour_distance(seen, right[j])
            seen = picture.part_colours(result["frames"], joints[j])
            table[1, i, j] = picture.colour_distance(seen, right[i])
    own, others = table[0].diagonal(), ~np.eye(count, dtype=bool)
    found: dict[str, Any] = {"own": {"mean": float(own.mean()), "worst": float(own.max())}}
    if count == 1:
        return found
    for name, distances in zip(("wrong reference", "wrong dance"), table, strict=True):
        wrong = distances[others].reshape(count, count - 1)
        found[name] = {
            "mean": float(wrong.mean()),
            "nearest": float(wrong.min()),
            "caught": float((wrong > own[:, None]).mean()),
            "ahead of all": float((wrong.min(axis=1) > own).mean()),
        }
    return found


def verdicts(rows: dict[str, dict[str, float]], steps: Iterable[int]) -> dict[str, Any]:
    """Return whether the table meets the demo's claims."""
    named = {n: (rows[f"bf16 {n} official"], rows[f"bf16+lora {n} official"]) for n in steps}
    many = max(named)
    best, floor = named[many][0], rows["copy the reference"]
    said: dict[str, Any] = {
        "above_floor_db": {n: plain["psnr_inside"] - floor["psnr_inside"] for n, (plain, _) in named.items()}
    }
    said["lora"] = {"steps": None, "many": many}
    for n, (plain, lora) in named.items():
        lost, edges = best["psnr_inside"] - plain["psnr_inside"], 1 - plain["edges"] / best["edges"]
        if n < many and (lost >= LEAST_LOSS_DB or edges >= LEAST_EDGE_LOSS):
            measure_of = "psnr_inside" if lost >= LEAST_LOSS_DB else "edges"
            gap = best[measure_of] - plain[measure_of]
            said["lora"] |= {"steps": n, "measure": measure_of, "lost": gap}
            said["lora"]["recovered"] = (lora[measure_of] - plain[measure_of]) / gap
            break
    four_bits = {m: next(row for name, row in rows.items() if name.startswith(f"fp4 {m} ")) for m in FOUR_BITS}
    for measure_of in ("psnr_own", "psnr_own_inside"):
        found = [four_bits[m][measure_of] for m in FOUR_BITS]
        said[f"fp4_{measure_of}"] = {"db": found, "in_order": found == sorted(found)}
    return said


def nearest(rows: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """Count of calls → the samplers with their schedules, the one nearest to the exact solution first."""
    found: dict[str, list[str]] = {}
    for name in sorted((name for name in rows if "rms_own" in rows[name]), key=lambda name: rows[name]["rms_own"]):
        sampler, _, calls = name.rpartition(" ")
        found.setdefault(calls, []).append(sampler)
    return found


def fast_verdicts(results: Sequence[dict[str, Any]], todo: Sequence[FastTrial]) -> dict[str, Any]:
    """Of all that is faster together: the PSNR inside of the worse choice of products, mean and worst clip. Raises
    KeyError where that was not finite."""
    names = [trial.name for trial in todo if trial.together]
    overflows = {trial.name: sum(not result["rows"][trial.name] for result in results) for trial in todo}
    inside = {name: [result["rows"][name]["psnr_own_inside"] for result in results] for name in names}
    means = {name: float(np.mean(values)) for name, values in inside.items()}
    worst = min(means, key=lambda name: means[name])
    return {
        "worst_together": worst,
        "inside_db": means[worst],
        "worst_clip_db": min(min(values) for values in inside.values()),
        "least_db": LEAST_FAST_DB,
        "reached": means[worst] >= LEAST_FAST_DB,
        "attention": "emulated in float, not run in 8 bits",
        "clips_not_finite": {name: count for name, count in overflows.items() if count},
    }


COLUMNS = ("psnr", "psnr_inside", "ssim", "ssim_inside", "edges", "colour", "rms_own", "psnr_own", "psnr_own_inside")


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['clips']} held-out characters and dances, {WIDTH}x{HEIGHT}, {FRAMES} frames; means\n")
    print(f"{'':<24}" + "".join(f"{name.replace('_', ' '):>16}" for name in COLUMNS))
    for name, row in found["rows"].items():
        print(f"{name:<24}" + "".join(f"{row[c]:>16.3f}" if c in row else f"{'':>16}" for c in COLUMNS))
    if "identity" in found:
        print("\nColour distance of a clip to its own dancer, and where reference or dance is another clip's:")
        for name, row in found["identity"].items():
            print(f"{name:<24}" + "   ".join(f"{key} {value:.2f}" for key, value in row.items()))
    print("\n" + json.dumps(found["verdicts"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, help="how many, one or more (default: 32, with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="few clips and trials, one worker: to see that it runs")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--samplers", action="store_true", help="compare the samplers at equal counts of model calls")
    kind.add_argument("--fast", action="store_true", help="compare faster choices with the frames of fp4-distill")
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "demo-models", help="the demo's store")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    clips = (2 if arguments.quick else 32) if arguments.clips is None else arguments.clips
    workers = min(1 if arguments.quick else arguments.workers, clips)
    if workers < 1:
        parser.error("--clips and --workers must be at least 1")
    from runner.demo.build import build_demo_models
    from runner.demo.tiny_model import TINY_FACE_SIZE

    build_demo_models(arguments.models)
    (lora,) = (arguments.models / "distill_lora").glob("*.safetensors")
    shares = [list(range(w, clips, workers)) for w in range(workers)]
    todo: list[Any]
    if arguments.fast:
        todo = fast_trials(arguments.quick)
        results = run_workers(measure_fast, [(arguments.models, share, todo) for share in shares])
    else:
        if arguments.samplers:
            todo = sampler_trials(arguments.quick)
            kept = todo[0].name
        else:
            todo = trials(arguments.quick)
            kept = f"bf16 {QUICK_STEPS[-1] if arguments.quick else 6} official"
        results = run_workers(measure, [(arguments.models, lora, share, todo, kept) for share in shares])
    rows = {name: means([result["rows"][name] for result in results]) for name in results[0]["rows"]}
    found: dict[str, Any] = {"clips": clips, "rows": rows}
    if arguments.fast:
        found["verdicts"] = fast_verdicts(results, todo)
    elif arguments.samplers:
        found["verdicts"] = {"nearest": nearest(rows)}
    else:
        found["identity"] = identity(results, TINY_FACE_SIZE)
        found["verdicts"] = verdicts(rows, QUICK_STEPS if arguments.quick else STEPS)
    show(found)
    write_json(arguments.json, found)


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of one trial's measures of each clip; nothing where a clip has none, for the others may be the easier ones."""
    if not all(rows):
        return {}
    return {column: float(np.mean([row[column] for row in rows])) for column in rows[0]}


def run_workers(work: Callable[[Any], list[dict[str, Any]]], tasks: Sequence[Any]) -> list[dict[str, Any]]:
    """The clips' results in order; a process a task where there are several."""
    if len(tasks) == 1:
        parts = [work(tasks[0])]
    else:
        with get_context("spawn").Pool(len(tasks)) as pool:
            parts = pool.map(work, tasks)
    return sorted((result for part in parts for result in part), key=lambda result: result["index"])


if __name__ == "__main__":
    main()
