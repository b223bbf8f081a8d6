"""Segment cost: the time to keep each finished segment, so that a killed job can continue after it.

    python bench/segment_cost.py [--segments N] [--frames N] [--stores NAMES] [--formats NAMES] [--clip PATH]
                                 [--json PATH]

480x832, windows of 77 frames, overlap 1 and 5. The product's own delivery encodes each segment; then its segment keeper
packs the part, stores it and the state after it, and renews the lease: on this disk and on a local S3 server
(SeaweedFS). The floor is a copy of the same bytes to the same store, one file or object for each of the two. The frames
are those of `--clip`, of the real clip beside the repository, or noise over gradients.

The main thread copies the state (frames and random state) from the device. The delivery thread does the rest while the
next segment is generated. Seconds are the least of all segments, because other work disturbs them. Percent are shares
of a segment's forecast on the fastest device of `runner/forecast`: for `fp4-distill` unchanged, whose autoencoder and
state are in float32, and for its fastest modifiers with the autoencoder in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _json_file import write_json  # noqa: E402

from runner.batch.delivery import Delivery  # noqa: E402
from runner.batch.job_checkpoint import Chain, Checkpoints  # noqa: E402
from runner.batch.ledger import Ledger  # noqa: E402
from runner.batch.memory_sampler import MemorySampler  # noqa: E402
from runner.batch.segment_keeper import SegmentKeeper  # noqa: E402
from runner.batch.task import SegmentItem, Task  # noqa: E402
from runner.forecast.flops import PRODUCTION  # noqa: E402
from runner.forecast.seconds import DEVICES, EngineBuild, forecast_seconds  # noqa: E402
from runner.generation.protocol import Segment, SegmentPlan  # noqa: E402
from runner.generation.wan_animate.resume_points import make_resume_point  # noqa: E402
from runner.records.events import EventLog  # noqa: E402
from runner.records.output_layout import part_name, parts_folder, state_name  # noqa: E402
from runner.records.record import AttemptMark  # noqa: E402
from runner.spec.manifest import Job  # noqa: E402
from runner.spec.options import JobOptions  # noqa: E402
from runner.storage import Storage, open_storage  # noqa: E402
from runner.timing import StageTimer, now  # noqa: E402
from runner.video import VideoReader  # noqa: E402
from tests.s3_servers import find_weed, seaweedfs  # noqa: E402

WIDTH, HEIGHT, FRAMES = 480, 832, 77
OVERLAPS = (1, 5)
# The state's dtype -> of which forecast its cost is a share.
DTYPES = {"float32": "fp4-distill", "bfloat16": "quickest words"}
LIMIT_PERCENT = 1.0  # of the forecast, for MP4
FORECAST_SEGMENTS = 10  # of the job whose forecast is divided: the first segment of a job costs a little less
REAL_CLIP = HERE.parent / "shared" / "data" / "real" / "man_480x480_30fps_110f.mp4"
IDENTITY = {"device": "bench"}
STAGES = ("pack", "part", "state", "lease")


def real_frames(clip: Path, count: int) -> np.ndarray:
    """uint8 [count, HEIGHT, WIDTH, 3]: the clip's middle, forwards and backwards, as large as the output."""
    with VideoReader(clip) as reader:
        read = reader.read(np.arange(min(reader.info.frames, count)))
    scale = max(WIDTH / read.shape[2], HEIGHT / read.shape[1])
    frames = []
    for frame in read:
        large = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        top, left = (large.shape[0] - HEIGHT) // 2, (large.shape[1] - WIDTH) // 2
        frames.append(large[top : top + HEIGHT, left : left + WIDTH])
    there_and_back = frames + frames[::-1]
    return np.stack([there_and_back[i % len(there_and_back)] for i in range(count)])


def made_frames(count: int) -> np.ndarray:
    """uint8 [count, HEIGHT, WIDTH, 3]: moving gradients under a little noise."""
    chance = np.random.default_rng(3)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    frames = np.empty((count, HEIGHT, WIDTH, 3), np.uint8)
    for index in range(count):
        waves = [128 + 100 * np.sin((x * a + y * b) / 97 + index / 9) for a, b in ((1, 0), (0, 1), (1, 1))]
        picture = np.stack(waves, axis=2) + chance.normal(0, 2, (HEIGHT, WIDTH, 1))
        frames[index] = picture.clip(0, 255).astype(np.uint8)
    return frames


def pose_frames(count: int) -> np.ndarray:
    """uint8 [count, HEIGHT, WIDTH, 3]: a moving skeleton on black, for the preview."""
    frames = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    for index, frame in enumerate(frames):
        swing = int(60 * np.sin(index / 7))
        joints = [(240, 150), (240, 400), (150 + swing, 300), (330 - swing, 300), (200, 700), (280, 700)]
        for number, (a, b) in enumerate(((0, 1), (0, 2), (0, 3), (1, 4), (1, 5))):
            cv2.line(frame, joints[a], joints[b], (255 - 40 * number, 50 * number, 120), 8)
    return frames


@dataclass
class Clock:
    """Seconds by name, of calls that are wrapped."""

    seconds: dict[str, float] = field(default_factory=dict)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*arguments, **keywords)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

        setattr(owner, method, timed)


def open_delivery(folder: Path, format: str, frames: int) -> Delivery:
    folder.mkdir(parents=True)
    options, fps = JobOptions.model_validate({"output": {"format": format}}), Fraction(16)
    sizes = {"width": WIDTH, "height": HEIGHT, "fps": fps, "frames": frames, "pose_fps": fps}
    return Delivery(folder, options, audio=None, timer=StageTimer(), **sizes)


def begin_job(
    storage: Storage, scratch: Path, format: str, plan: SegmentPlan, dtype: str, delivery: Delivery
) -> tuple[Task, SegmentKeeper, Clock]:
    """A job under way, its lease taken; what keeps its segments; the clock of that."""
    name = f"{format}-{plan.overlap_frames}-{dtype}"
    job = Job(name, "reference.png", "video.mp4", None, "", JobOptions(), 1)
    ledger = Ledger(storage)
    mark = AttemptMark(job_id=name, attempt=1, fingerprint="f", run_id="bench", host="", started_at=now())
    if not ledger.leases.take(mark, None):
        raise RuntimeError(f"{storage.root} holds a job {name} already")
    checkpoints = Checkpoints(storage, ledger.leases.fence)
    task = Task(job, scratch, MemorySampler().window(), plan=plan, delivery=delivery)
    task.chain = Chain.of(name, "f", IDENTITY, plan.segments)
    clock = Clock()
    clock.wrap(delivery, "pack_part", "pack")
    clock.wrap(checkpoints, "save_part", "part")
    clock.wrap(checkpoints, "save_state", "state")
    clock.wrap(ledger, "note_segments", "lease")
    return task, SegmentKeeper(checkpoints, ledger, EventLog(lambda data: None)), clock


def measure(
    store: str, storage: Storage, scratch: Path, format: str, overlap: int, picture: np.ndarray, segments: int
) -> list[dict[str, Any]]:
    """A row a dtype of the state, of one store, format and overlap."""
    length = len(picture)
    frames = overlap + (segments + 1) * (length - overlap)
    plan = SegmentPlan(frames, length, overlap, segments + 1, WIDTH, HEIGHT, 6, 6, 0.0)
    delivery = open_delivery(scratch / f"{store}-{format}-{overlap}", format, frames)
    jobs = {dtype: begin_job(storage, scratch, format, plan, dtype, delivery) for dtype in DTYPES}
    poses = pose_frames(length)
    rows: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in DTYPES}
    for index in range(segments):
        new = slice(overlap if index else 0, None)
        begin = time.perf_counter()
        delivery.write(Segment(index, picture[new], poses[new]))
        encode_s = time.perf_counter() - begin
        for dtype, (task, keeper, clock) in jobs.items():
            # The last frames of more, so that no copy is for free.
            decoded = torch.rand(1, 3, overlap + 1, HEIGHT, WIDTH).to(getattr(torch, dtype))
            generator = torch.Generator("cpu").manual_seed(index)
            begin = time.perf_counter()
            point = make_resume_point(index + 1, plan, decoded[:, :, -overlap:], generator)
            row = {"main_s": time.perf_counter() - begin, "encode_s": encode_s}
            piece = SegmentItem(task, Segment(index, picture[new], poses[new], point), IDENTITY)
            clock.seconds.clear()
            begin, cpu = time.perf_counter(), time.process_time()
            keeper.keep(task, piece)
            row |= {"kept_s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
            row |= {f"{name}_s": clock.seconds[name] for name in STAGES}
            assert task.chain is not None
            prefix = parts_folder(task.job.id, task.chain.name)
            names = (part_name(index + 1), state_name(index + 1))
            sizes = [info.bytes for name in names if (info := storage.stat(prefix + name)) is not None]
            if len(sizes) != len(names):
                raise RuntimeError(f"segment {index + 1} was not kept")
            row |= {"part_bytes": sizes[0], "state_bytes": sizes[1]}
            rows[dtype].append(row | {"floor_s": copy_floor(storage, scratch, prefix, names)})
    delivery.abort()
    return [
        {"store": store, "format": format, "overlap": overlap, "state": dtype, "frames": length, "segments": segments}
        | {name: min(row[name] for row in found) for name in found[0] if name.endswith("_s")}
        | {name: statistics.median(row[name] for row in found) for name in found[0] if name.endswith("_bytes")}
        for dtype, found in rows.items()
    ]


def copy_floor(storage: Storage, scratch: Path, prefix: str, names: tuple[str, ...]) -> float:
    """Seconds of the same bytes, a file or an object each, put to the same place and nothing else."""
    copies = [scratch / f"copy-{name}" for name in names]
    for name, path in zip(names, copies, strict=True):
        storage.fetch(prefix + name, path)
    client, bucket = getattr(storage, "client", None), getattr(storage, "bucket", "")
    begin = time.perf_counter()
    for path in copies:
        if client is None:
            with path.open("rb") as source, (scratch / f"{path.name}.floor").open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
        else:
            with path.open("rb") as source:
                client.put_object(Bucket=bucket, Key=f"floor/{path.name}", Body=source)
    seconds = time.perf_counter() - begin
    for path in copies:
        path.unlink()
        (scratch / f"{path.name}.floor").unlink(missing_ok=True)
    return seconds


def forecasts() -> list[dict[str, Any]]:
    """Seconds of a segment on each device: `fp4-distill` as it is, and its quickest words. Forecasts."""
    quickest = [
        EngineBuild(compute, attention_8bit=attention, vae=vae)
        for compute in ("bf16", "fp8", "int8", "nvfp4")
        for attention in (False, True)
        for vae in ("float32", "bfloat16")
    ]
    clip = {"size": (WIDTH, HEIGHT), "segment_frames": FRAMES, "segments": FORECAST_SEGMENTS}
    rows = []
    for device in DEVICES:
        for name, builds in (("fp4-distill", [EngineBuild()]), ("quickest words", quickest)):
            found = [
                (forecast_seconds(PRODUCTION, device, build, evaluations=6, **clip).total_s / FORECAST_SEGMENTS, build)
                for build in builds
                if build.compute in device.matmul
            ]
            seconds, build = min(found, key=lambda pair: pair[0])
            words = [build.compute, *["8-bit attention"] * build.attention_8bit, f"{build.vae} autoencoder"]
            rows.append({"device": device.name, "recipe": name, "words": ", ".join(words), "segment_s": seconds})
    return rows


@contextmanager
def open_stores(names: list[str], folder: Path) -> Iterator[dict[str, Storage]]:
    """`local`, and `s3` where its server is installed."""
    with ExitStack() as held:
        stores: dict[str, Storage] = {}
        if "local" in names:
            stores["local"] = open_storage(folder / "out")
        if "s3" in names and find_weed() is None:
            print("no SeaweedFS: S3 is not measured")
        elif "s3" in names:

            def make_folder(name: str) -> Path:
                made = folder / name
                made.mkdir()
                return made

            server = held.enter_context(seaweedfs(make_folder))
            for name in [name for name in os.environ if name.startswith(("AWS_", "VIDEO_LAB_S3"))]:
                del os.environ[name]
            os.environ.update(server.environment())
            stores["s3"] = open_storage(f"s3://{server.make_bucket()}/out")
        yield stores


def bench(stores: list[str], formats: list[str], segments: int, frames: int, clip: Path | None) -> dict[str, Any]:
    picture = made_frames(frames) if clip is None else real_frames(clip, frames)
    seconds = forecasts()
    fastest = {
        recipe: min((row for row in seconds if row["recipe"] == recipe), key=lambda row: row["segment_s"])
        for recipe in ("fp4-distill", "quickest words")
    }
    rows = []
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as name, open_stores(stores, Path(name)) as opened:
        for store, storage in opened.items():
            for format in formats:
                for overlap in OVERLAPS:
                    for row in measure(store, storage, Path(name), format, overlap, picture, segments):
                        forecast_s = fastest[DTYPES[row["state"]]]["segment_s"]
                        row["ratio"] = row["kept_s"] / row["floor_s"]
                        row["percent"] = 100 * row["kept_s"] / forecast_s
                        row["main_percent"] = 100 * row["main_s"] / forecast_s
                        rows.append(row)
    return {
        "bench": "segment_cost",
        "clip": "made" if clip is None else clip.name,
        "forecasts": seconds,
        "fastest": fastest,
        "rows": rows,
        "limit_percent": LIMIT_PERCENT,
    }


def table(found: dict[str, Any]) -> str:
    slow, fast = found["fastest"]["fp4-distill"], found["fastest"]["quickest words"]
    lines = [
        f"{WIDTH}x{HEIGHT}, windows of {found['rows'][0]['frames']} frames ({found['clip']}); ms a segment",
        f"forecast of a segment: {slow['device']}, fp4-distill {slow['segment_s']:.1f} s; "
        f"{fast['device']}, {fast['words']} {fast['segment_s']:.1f} s",
        f"{'store':<6}{'format':<7}{'overlap':>7}  {'state':<9}{'part MB':>8}{'state MB':>9}{'kept':>7}"
        + "".join(f"{name:>7}" for name in STAGES)
        + f"{'CPU':>7}{'copy':>7}{'ratio':>7}{'percent':>8}{'main':>6}{'encode':>7}",
    ]
    for row in found["rows"]:
        lines.append(
            f"{row['store']:<6}{row['format']:<7}{row['overlap']:>7}  {row['state']:<9}{row['part_bytes'] / 1e6:>8.2f}"
            f"{row['state_bytes'] / 1e6:>9.2f}{1e3 * row['kept_s']:>7.0f}"
            + "".join(f"{1e3 * row[f'{name}_s']:>7.0f}" for name in STAGES)
            + f"{1e3 * row['cpu_s']:>7.0f}{1e3 * row['floor_s']:>7.0f}{row['ratio']:>6.1f}x{row['percent']:>8.2f}"
            f"{1e3 * row['main_s']:>6.1f}{1e3 * row['encode_s']:>7.0f}"
        )
    for row in found["rows"]:
        if row["percent"] > LIMIT_PERCENT:
            named = f"{row['store']} {row['format']}, overlap {row['overlap']}, {row['state']}"
            lines.append(f"above {LIMIT_PERCENT:g} %: {named}: {row['percent']:.2f} %")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=8, metavar="N", help="measured, of each row (8)")
    parser.add_argument("--frames", type=int, default=FRAMES, metavar="N", help=f"of a window ({FRAMES})")
    parser.add_argument("--stores", default="local,s3", metavar="NAMES", help="local, s3, or both")
    parser.add_argument("--formats", default="mp4,png", metavar="NAMES", help="mp4, png, or both")
    parser.add_argument("--clip", type=Path, metavar="PATH", help="a real clip (the one beside the repository)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args(argv)
    clip = arguments.clip or (REAL_CLIP if REAL_CLIP.exists() else None)
    found = bench(arguments.stores.split(","), arguments.formats.split(","), arguments.segments, arguments.frames, clip)
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
