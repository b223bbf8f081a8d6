"""Calibration: measures how far apart two renders of the demo are, for pairs that must pass and pairs that must fail.

    python bench/calibration.py [--jobs demo|nightly] [--quick] [--models DIR] [--media DIR] [--work DIR] [--json PATH]

`demo`: five jobs of 96x144 (one segment, two, four with an overlap of 5, guided, replacing), 4 steps. `nightly`: the
jobs of manifests/nightly.yaml. Everything runs on the CPU. Each variant is rendered by `video-lab run` in a new process
with a separate cache, so that preprocessing is computed again too.
Pairs that must pass: another number of threads, other CPU instructions, the autoencoder in bfloat16, another crf. Pairs
that must fail: another seed, one step fewer; for the demo also another reference, another dance, FP4 weights instead of
bfloat16 ones. One pair is not rendered: the plain frames, multiplied by 1.02 from the second segment on.

For a pair that must pass the worst job counts; for a pair that must fail the best one. A metric separates a failing
pair if the gap between both is at least that of METRICS (3 dB of PSNR). The limit is the middle between the worst
passing job and the nearest separated pair. A failing pair that no metric separates is not a gate. Renders are kept in
`--work` and are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from _json_file import write_json  # noqa: E402

from runner.records.output_layout import OUTPUT, RESULT, job_key  # noqa: E402
from runner.records.record import ResultRecord  # noqa: E402
from runner.regression.findings import Measurements  # noqa: E402
from runner.verbs.run import run  # noqa: E402
from runner.verbs.settings import RunSettings  # noqa: E402

OPTIONS: dict[str, Any] = {"size": "96x144", "fps": 16, "max_frames": 21, "seed": 42, "steps": 4}
GAIN, GAIN_PAIR = 1.02, "2 % brighter from the second segment on"
QUICK = {"max_frames": 5, "steps": 2}
TWO_THREADS = {"OMP_NUM_THREADS": "2"}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
RENDER_S, QUANTIZE_S = 1800, 600  # until a render, or the making of FP4 weights, is given up


# id, reference, video, another reference, another video, options
DEMO_JOBS: Sequence[tuple[str, str, str, str, str, Mapping[str, Any]]] = (
    ("one-segment", "mira", "wave", "otto", "twist", {}),
    ("two-segments", "otto", "twist", "juno", "jacks", {"max_frames": 33, "max_segment_frames": 17}),
    (
        *("four-segments", "mira", "twist", "juno", "wave"),
        {"max_frames": 33, "max_segment_frames": 13, "overlap_frames": 5},
    ),
    ("guided", "juno", "jacks", "mira", "wave", {"guidance_scale": 2.0}),
    ("replacing", "otto", "jacks", "mira", "wave", {"mode": "replace"}),
)


@dataclass(frozen=True)
class BenchJob:
    """One job as a manifest writes it; `other`: what stands in it for another reference, and for another dance."""

    entry: Mapping[str, Any]
    other: Mapping[str, str] = field(default_factory=dict)


def demo_jobs(media: Path) -> list[BenchJob]:
    def reference(name: str) -> str:
        return str(media / "references" / f"{name}.png")

    def dance(name: str) -> str:
        return str(media / "dances" / f"{name}.mp4")

    return [
        BenchJob(
            {"id": name, "reference": reference(who), "video": dance(what), "options": OPTIONS | dict(options)},
            {"reference": reference(other_who), "video": dance(other_what)},
        )
        for name, who, what, other_who, other_what, options in DEMO_JOBS
    ]


def nightly_jobs() -> list[BenchJob]:
    from runner.spec.manifest import load_manifest

    found = []
    for job in load_manifest(str(ROOT / "manifests" / "nightly.yaml")).jobs:
        options = job.options.model_dump(mode="json", exclude_unset=True)
        entry = {"id": job.id, "reference": job.reference, "video": job.video, "prompt": job.prompt, "options": options}
        found.append(BenchJob(entry | ({"mask": job.mask} if job.mask else {})))
    return found


@dataclass(frozen=True)
class Render:
    """One way to render the jobs.

    options: over each job's own; added: numbers that are added to options. other: which of the job's inputs is another
    one. environment: variables of the process, beside this one's.
    """

    name: str
    recipe: str = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    other: Literal["", "reference", "video"] = ""
    environment: Mapping[str, str] = field(default_factory=lambda: TWO_THREADS)

    def manifest(self, jobs: Sequence[BenchJob]) -> dict[str, Any]:
        entries = []
        for job in jobs:
            options = {**job.entry["options"], **self.options}
            options |= {name: options[name] + number for name, number in self.added.items()}
            entry = {**job.entry, "options": options}
            entries.append(entry | ({self.other: job.other[self.other]} if self.other else {}))
        return {"version": 1, "recipe": self.recipe, "jobs": entries}


@dataclass(frozen=True)
class Pair:
    """`new` against `baseline`: whether `compare` has to call it the same."""

    name: str
    must: Literal["pass", "fail"]
    new: Render
    baseline: Render = Render("plain")


PAIRS = (
    Pair("one thread instead of two", "pass", Render("one-thread", environment={"OMP_NUM_THREADS": "1"})),
    Pair("AVX2 instead of all instructions", "pass", Render("avx2", environment=TWO_THREADS | AVX2)),
    Pair("autoencoder in bfloat16", "pass", Render("bf16-vae", recipe="fp32+bf16-vae")),
    Pair("crf 16 instead of 18", "pass", Render("crf-16", options={"output": {"crf": 16}})),
    Pair("another seed", "fail", Render("seed", added={"seed": 1})),
    Pair("one step fewer", "fail", Render("steps", added={"steps": -1})),
    Pair("another reference", "fail", Render("reference", other="reference")),
    Pair("another dance", "fail", Render("dance", other="video")),
    Pair("FP4 instead of bfloat16", "fail", Render("fp4", recipe="fp4"), Render("bf16", recipe="bf16")),
)
NIGHTLY_PAIRS = tuple(pair for pair in PAIRS if not pair.new.other and pair.new.recipe != "fp4")
QUICK_PAIRS = tuple(pair for pair in PAIRS if pair.new.name in ("crf-16", "dance"))


@dataclass(frozen=True)
class Metric:
    """A number of `Measurements`, and when two of its values are clearly apart."""

    name: str
    limit: str | None  # of RegressionLimits; None: it is reported alone
    read: Callable[[Measurements], float | None]
    low_is_worse: bool
    gap: Callable[[float, float], float]  # of the worst that must pass and the best that must fail
    clear: float  # least gap
    unit: str  # of the gap
    places: int  # decimals of the limit

    def worst(self, values: Mapping[str, float]) -> str:
        """The key of the worst value."""
        return (min if self.low_is_worse else max)(values, key=values.__getitem__)

    def best(self, values: Mapping[str, float]) -> str:
        return (max if self.low_is_worse else min)(values, key=values.__getitem__)


def _joint_drift(found: Measurements) -> float | None:
    """None for a job of one segment: it has no joint."""
    return found.drift.joint_drift if found.drift is not None and found.drift.joints else None


METRICS = (
    Metric(
        "PSNR", "psnr_min", lambda found: found.psnr and found.psnr.worst,
        True, lambda passing, failing: passing - failing, 3.0, "dB", 1,
    ),
    # 1 - SSIM grows as the squared error does, so that a factor of 2 is 3 dB.
    Metric(
        "SSIM", "ssim_min", lambda found: found.ssim and found.ssim.worst,
        True, lambda passing, failing: (1 - failing) / max(1 - passing, 1e-6), 2.0, "x", 2,
    ),
    # One pixel of a clip decides: twice the amplitude, which is 6 dB.
    Metric(
        "largest difference", "max_frame_diff", lambda found: found.largest_difference,
        False, lambda passing, failing: failing / max(passing, 1), 2.0, "x", 0,
    ),
    # An amplitude as well: twice, of at least 0.05, below which 8 bits a channel say nothing.
    Metric(
        "joint drift", "joint_drift_max", _joint_drift,
        False, lambda passing, failing: failing / max(passing, 0.05), 2.0, "x", 2,
    ),
    Metric(
        "colour", None, lambda found: found.colour,
        False, lambda passing, failing: failing - passing, 1.0, "delta E", 1,
    ),
)  # fmt: skip


def render(one: Render, jobs: Sequence[BenchJob], models: Path, work: Path, *, in_process: bool = False) -> Path:
    """The output folder, rendered unless that is done; `in_process`: here, without the environment of `one`."""
    folder = work / one.name
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(one.manifest(jobs), indent=1), encoding="utf-8")
    print(f"rendering {one.name}", file=sys.stderr, flush=True)
    out, cache = folder / "out", folder / "cache"
    if in_process:
        run(RunSettings(manifest=str(manifest), out=str(out), models=str(models), cache=cache, device="cpu"))
    else:
        places = ["--out", f"{out}", "--models", f"{models}", "--cache", f"{cache}"]
        _video_lab(["run", f"{manifest}", *places], one.environment, RENDER_S)
    return out


def store_with_fp4(models: Path, work: Path) -> Path:
    """A copy of the demo's store, with FP4 weights of its transformer, without a LoRA, beside the others."""
    copy, half = work / "models", work / "models.half"
    if not copy.exists():
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(models, half)
        _video_lab(["quantize", "--recipe", "fp4", "--models", f"{half}"], {}, QUANTIZE_S)
        half.rename(copy)
    return copy


def _video_lab(arguments: list[str], environment: Mapping[str, str], timeout_s: float) -> None:
    """In a new process: threads and instructions are chosen when torch is loaded."""
    command = [sys.executable, "-m", "runner.cli", *arguments, "--device", "cpu", "--log-format", "json"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:1])} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def compare(new: Path | Sequence[Path], baseline: Path, joints: Sequence[int]) -> dict[str, float | None]:
    """Metric → its value of one job's output, an MP4 or PNG frames."""
    from runner.regression.frame_metrics import measure
    from runner.regression.outputs import RenderedFrames

    with RenderedFrames(new) as frames, RenderedFrames(baseline) as others:
        found = measure(frames, others, joints=joints)
    return {metric.name: metric.read(found) for metric in METRICS}


def joints_in(out: Path, job: str) -> list[int]:
    from runner.regression.judge import joints_of

    record = ResultRecord.model_validate_json((out / job_key(job, RESULT)).read_bytes())
    assert record.output is not None
    return joints_of(record.efficiency, record.output)


def write_with_gain(video: Path, first: int, folder: Path) -> list[Path]:
    """The frames of `video` as PNG files, brighter by GAIN from frame `first` on."""
    from PIL import Image

    from runner.regression.outputs import RenderedFrames

    files = []
    with RenderedFrames(video) as frames:
        for index in range(frames.frames):
            frame = frames.frame(index)
            if index >= first:
                frame = np.clip(np.rint(frame * GAIN), 0, 255).astype(np.uint8)
            files.append(folder / f"{index:06d}.png")
            Image.fromarray(frame).save(files[-1])
    return files


def compare_with_gain(out: Path, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Job of several segments → metric → value, of its own frames with GAIN from the second segment on."""
    found = {}
    for job in names:
        video = out / job_key(job, OUTPUT)
        if joints := joints_in(out, job):
            with tempfile.TemporaryDirectory() as folder:
                found[job] = compare(write_with_gain(video, joints[0], Path(folder)), video, joints)
    return found


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metric → the worst passing job, the gap to each failing pair, the limit.

    rows: {pair, must, jobs: {job: {metric: value or None}}}
    """
    found: dict[str, Any] = {}
    for metric in METRICS:
        extremes = {"pass": metric.worst, "fail": metric.best}
        values = [
            (row, {job: v[metric.name] for job, v in row["jobs"].items() if v[metric.name] is not None}) for row in rows
        ]
        pairs = {
            row["pair"]: (row["must"], of_jobs, extremes[row["must"]](of_jobs)) for row, of_jobs in values if of_jobs
        }
        passing = {pair: of_jobs[job] for pair, (must, of_jobs, job) in pairs.items() if must == "pass"}
        failing = {pair: of_jobs[job] for pair, (must, of_jobs, job) in pairs.items() if must == "fail"}
        if not passing:
            continue
        worst = metric.worst(passing)
        gaps = {pair: metric.gap(passing[worst], value) for pair, value in failing.items()}
        told_apart = {pair: failing[pair] for pair, gap in gaps.items() if gap >= metric.clear}
        limit = None
        if metric.limit and told_apart:
            nearest = failing[metric.best(told_apart)]
            limit = round((passing[worst] + nearest) / 2, metric.places)
        found[metric.name] = {
            "extremes": passing | failing,
            "jobs": {pair: job for pair, (_, _, job) in pairs.items()},
            "worst passing": {"pair": worst, "job": pairs[worst][2], "value": passing[worst]},
            "gaps": gaps,
            "unit": metric.unit,
            "clear": metric.clear,
            "tells apart": sorted(told_apart),
            "limit": limit,
        }
    return found


def caught(rows: Sequence[Mapping[str, Any]], judged: Mapping[str, Any]) -> dict[str, list[str]]:
    """Pair → the jobs that break at least one limit."""
    limits = {m: judged[m.name]["limit"] for m in METRICS if judged.get(m.name, {}).get("limit") is not None}

    def breaks(values: Mapping[str, float | None]) -> bool:
        told = [(values[m.name], limit, m.low_is_worse) for m, limit in limits.items()]
        return any(v is not None and (v < limit if low else v > limit) for v, limit, low in told)

    return {row["pair"]: [job for job, values in row["jobs"].items() if breaks(values)] for row in rows}


def show(found: Mapping[str, Any]) -> None:
    names = [metric.name for metric in METRICS if metric.name in found["metrics"]]
    print(f"\n{len(found['rows'][0]['jobs'])} jobs; of a passing pair the worst, of a failing pair the best\n")
    print(f"| must | pair | {' | '.join(names)} | gate | jobs caught |")
    print(f"|---|---|{'---|' * len(names)}---|---|")
    for row in found["rows"]:
        pair, cells, gates = row["pair"], [], []
        for name in names:
            judged = found["metrics"][name]
            value, gap = judged["extremes"].get(pair), judged["gaps"].get(pair)
            text = "" if value is None else f"{value:.4g}"
            cells.append(text if gap is None else f"{text} ({gap:.3g} {judged['unit']})")
            if pair in judged["tells apart"] and judged["limit"] is not None:
                gates.append(name)
        gate = "" if row["must"] == "pass" else ", ".join(gates) or "no gate"
        count = f"{len(found['caught'][pair])} of {len(row['jobs'])}"
        print(f"| {row['must']} | {pair} | {' | '.join(cells)} | {gate} | {count} |")
    print()
    for metric in METRICS:
        judged = found["metrics"].get(metric.name)
        if judged and metric.limit:
            worst = judged["worst passing"]
            said = "no limit: no gap is clear" if judged["limit"] is None else f"{metric.limit}: {judged['limit']:g}"
            print(
                f"{metric.name}: worst passing {worst['value']:.4g} ({worst['pair']}, {worst['job']}); "
                f"clear from {metric.clear:g} {metric.unit}; {said}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", choices=("demo", "nightly"), default="demo")
    parser.add_argument(
        "--quick", action="store_true", help="one short job, two pairs, one process: to see that it runs"
    )
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "demo-models", help="the demo's store")
    parser.add_argument("--media", type=Path, default=ROOT / ".cache" / "demo-media", help="the demo's clips")
    parser.add_argument("--work", type=Path, help="where renders are kept; default: a folder that is removed")
    parser.add_argument("--json", type=Path, help="write the values here too")
    arguments = parser.parse_args()
    from runner.demo.build import build_demo_media, build_demo_models

    build_demo_models(arguments.models)
    build_demo_media(arguments.media)
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        jobs, pairs = demo_jobs(arguments.media.absolute()), PAIRS
        if arguments.quick:
            first = jobs[0]
            jobs = [replace(first, entry={**first.entry, "options": first.entry["options"] | QUICK})]
            pairs = QUICK_PAIRS
        elif arguments.jobs == "nightly":
            jobs, pairs = nightly_jobs(), NIGHTLY_PAIRS
        found = calibrate(jobs, pairs, arguments.models.absolute(), work, in_process=arguments.quick)
    show(found)
    write_json(arguments.json, found)


def calibrate(
    jobs: Sequence[BenchJob], pairs: Sequence[Pair], models: Path, work: Path, *, in_process: bool = False
) -> dict[str, Any]:
    """Render and measure; everything that the tables show. `in_process`: as for `render`."""
    if any(pair.new.recipe == "fp4" for pair in pairs):
        models = store_with_fp4(models, work)
    renders = {one.name: one for pair in pairs for one in (pair.baseline, pair.new)}
    folders = {name: render(one, jobs, models, work, in_process=in_process) for name, one in renders.items()}
    names = [job.entry["id"] for job in jobs]
    rows = [
        {
            "pair": pair.name,
            "must": pair.must,
            "jobs": {
                job: compare(
                    folders[pair.new.name] / job_key(job, OUTPUT),
                    folders[pair.baseline.name] / job_key(job, OUTPUT),
                    joints_in(folders[pair.new.name], job),
                )
                for job in names
            },
        }
        for pair in pairs
    ]
    if brighter := compare_with_gain(folders["plain"], names):
        rows.append({"pair": GAIN_PAIR, "must": "fail", "jobs": brighter})
    judged = judge(rows)
    limits = {m.limit: judged[m.name]["limit"] for m in METRICS if m.limit and m.name in judged}
    return {"rows": rows, "metrics": judged, "limits": limits, "caught": caught(rows, judged)}


if __name__ == "__main__":
    main()
