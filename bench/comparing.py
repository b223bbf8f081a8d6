"""Comparing: the time of measuring a new video against the baseline's, part by part, beside FFmpeg's filters.

    python bench/comparing.py [--frames N] [--memory-frames N,N] [--clip PATH] [--json PATH]

480x832, MP4s of the product's own writer at crf 18 and 16: the real clip beside the repository, enlarged, or noise over
gradients; longer videos repeat its first 100 frames. CPU seconds per frame, of all threads. The peer decodes
the same two files and runs FFmpeg's psnr and ssim filters through PyAV; its ssim has windows of 8x8 on planes of YUV or
RGB, ours is that of scikit-image. The floors: decoding both files to RGB, and the four blurs that an SSIM needs.

Memory is the largest resident set of a separate process for each length, minus its size after the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import av  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from _json_file import write_json  # noqa: E402
from segment_cost import REAL_CLIP, made_frames, real_frames  # noqa: E402

from runner.regression import frame_metrics  # noqa: E402
from runner.regression.alignment import align_thumbnails, make_thumbnail  # noqa: E402
from runner.regression.frame_metrics import find_shift, measure, psnr, ssim  # noqa: E402
from runner.regression.outputs import RenderedFrames  # noqa: E402
from runner.video.drift import DriftMeter  # noqa: E402
from runner.video.join import join_parts  # noqa: E402
from runner.video.writer import Mp4Writer  # noqa: E402

WIDTH, HEIGHT, SEGMENT, FPS = 480, 832, 77, Fraction(16)
PART = 100  # frames that are coded; longer videos repeat them
CRFS = {"new": 18, "baseline": 16}
WINDOW = 8
STRIP = 64  # rows that are blurred at once: they fit in a processor's cache


def encode_parts(folder: Path, clip: Path | None, count: int) -> list[Path]:
    """Two MP4s of the same `count` frames, coded at two rates."""
    frames = made_frames(count) if clip is None else real_frames(clip, count)
    paths = [folder / f"{name}.mp4" for name in CRFS]
    for path, crf in zip(paths, CRFS.values(), strict=True):
        with Mp4Writer(path, WIDTH, HEIGHT, FPS, crf=crf) as writer:
            writer.write(frames)
    return paths


def lengthen(parts: list[Path], times: int) -> tuple[Path, Path]:
    """Both parts, each `times` times."""
    paths = [part.with_name(f"{part.stem}-{times}.mp4") for part in parts]
    for part, path in zip(parts, paths, strict=True):
        join_parts([part] * times, path, fps=FPS)
    return paths[0], paths[1]


def cpu_seconds(call: Callable[[], Any]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def decode(paths: tuple[Path, Path]) -> None:
    for path in paths:
        for _ in RenderedFrames(path).windows(WINDOW):
            pass


def run_filters(paths: tuple[Path, Path], pixels: str | None = None) -> list[dict[str, float]]:
    """PSNR and SSIM of each frame by FFmpeg: both files through split, psnr and ssim."""
    values = []
    with av.open(str(paths[0])) as one, av.open(str(paths[1])) as other:
        streams = [one.streams.video[0], other.streams.video[0]]
        for stream in streams:
            stream.thread_type = "AUTO"
        graph = av.filter.Graph()
        sources = [graph.add_buffer(template=stream, name=f"in{i}") for i, stream in enumerate(streams)]
        quality, likeness, sink = graph.add("psnr"), graph.add("ssim"), graph.add("buffersink")
        split = graph.add("split")
        ends = []
        for source in sources:
            end = source
            if pixels:
                end = graph.add("format", pixels)
                source.link_to(end)
            ends.append(end)
        ends[0].link_to(quality, 0, 0)
        ends[1].link_to(split)
        split.link_to(quality, 0, 1)
        split.link_to(likeness, 1, 1)
        quality.link_to(likeness, 0, 0)
        likeness.link_to(sink)
        graph.configure()
        for pair in zip(one.decode(streams[0]), other.decode(streams[1]), strict=True):
            for source, frame in zip(sources, pair, strict=True):
                source.push(frame)
            while True:
                try:
                    found = sink.pull().metadata
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
                values.append({key: float(value) for key, value in found.items() if key.startswith("lavfi.")})
    return values


def blur_four(picture: np.ndarray) -> None:
    """Four of the five blurs that one pair's SSIM needs (one may be of the sum of squares), strip by strip."""
    for top in range(0, HEIGHT, STRIP):
        rows = picture[top : top + STRIP + 10].astype(np.float32)
        for _ in range(4):
            cv2.GaussianBlur(rows, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)


def measure_parts(paths: tuple[Path, Path], frames: int) -> dict[str, float]:
    """CPU seconds a frame, of each part alone; decoded frames are given."""
    new, old = (next(RenderedFrames(path).windows(frames)) for path in paths)
    pairs = list(zip(new, old, strict=True))
    meter = DriftMeter([frames // 2], frames)
    thumbnails: list[list[np.ndarray]] = [[], []]

    def thumbnail() -> None:
        for side, videos in zip(thumbnails, (new, old), strict=True):
            side.extend(make_thumbnail(frame) for frame in videos)
        align_thumbnails(*thumbnails)

    parts: dict[str, Callable[[], Any]] = {
        "PSNR, largest difference": lambda: [psnr(*pair) for pair in pairs],
        "SSIM's four blurs alone": lambda: [blur_four(one) for one in new],
        "SSIM": lambda: [ssim(*pair) for pair in pairs],
        "colour": lambda: [
            frame_metrics._compare_frames(one, other, (120, 100, 360, 800), False) for one, other in pairs
        ],
        "drift": lambda: (meter.add(new, old), meter.result()),
        "thumbnails, alignment": thumbnail,
    }
    seconds = {name: cpu_seconds(call) / frames for name, call in parts.items()}
    seconds["shift of the worst frame (once a job)"] = cpu_seconds(lambda: find_shift(new[3], new[2]))
    return seconds


def measure_memory(new: Path, old: Path) -> dict[str, float]:
    """In a process of its own: the largest resident set while measuring, above that of before."""
    import scipy  # noqa: F401

    process, stop, largest = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal largest
        while not stop.wait(0.02):
            largest = max(largest, process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    opened = RenderedFrames(new), RenderedFrames(old)
    joints = range(SEGMENT, opened[0].frames, SEGMENT)
    begin, cpu = time.perf_counter(), time.process_time()
    measure(*opened, joints=list(joints))
    row = {"wall_s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu, "frames": opened[0].frames}
    stop.set()
    watcher.join()
    return row | {"mb": (largest - before) / 1e6}


def memory_in_a_process(paths: tuple[Path, Path]) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory-of", *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def bench(part: int, frames: int, memory_frames: list[int], clip: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as name:
        folder = Path(name)
        coded = encode_parts(folder, clip, part)
        paths = lengthen(coded, frames // part)
        run_filters(paths)  # the files are in the page cache, the libraries are loaded
        seconds = {
            "decode both": cpu_seconds(lambda: decode(paths)) / frames,
            "peer: PyAV's psnr and ssim, YUV": cpu_seconds(lambda: run_filters(paths)) / frames,
            "peer: PyAV's psnr and ssim, RGB": cpu_seconds(lambda: run_filters(paths, "gbrp")) / frames,
            "measure": cpu_seconds(
                lambda: measure(*map(RenderedFrames, paths), joints=list(range(SEGMENT, frames, SEGMENT)))
            )
            / frames,
        }
        parts = measure_parts(paths, min(frames, 48))
        memory = [memory_in_a_process(lengthen(coded, count // part)) for count in memory_frames]
    return {
        "bench": "comparing",
        "clip": "made" if clip is None else clip.name,
        "frames": frames,
        "seconds": seconds,
        "parts": parts,
        "ratio_rgb": seconds["measure"] / seconds["peer: PyAV's psnr and ssim, RGB"],
        "ratio_yuv": seconds["measure"] / seconds["peer: PyAV's psnr and ssim, YUV"],
        "memory": memory,
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"{WIDTH}x{HEIGHT}, {found['frames']} frames ({found['clip']}); CPU ms a frame"]
    lines += [f"{name:<42}{1e3 * value:>8.1f}" for name, value in found["seconds"].items()]
    lines.append(f"{'ratio to the peer, RGB / YUV':<42}{found['ratio_rgb']:>7.1f}x / {found['ratio_yuv']:.1f}x")
    lines.append("parts, without decoding")
    lines += [f"  {name:<40}{1e3 * value:>8.1f}" for name, value in found["parts"].items()]
    for row in found["memory"]:
        lines.append(
            f"{row['frames']:.0f} frames: {row['mb']:.0f} MB above the imports, {row['wall_s']:.1f} s, "
            f"CPU {1e3 * row['cpu_s'] / row['frames']:.1f} ms a frame"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, default=PART, metavar="N", help=f"frames that are coded ({PART})")
    parser.add_argument(
        "--frames", type=int, default=2 * PART, metavar="N", help=f"compared, a multiple of part ({2 * PART})"
    )
    parser.add_argument("--memory-frames", default="200,2000", metavar="N,N", help="of the videos for memory")
    parser.add_argument("--clip", type=Path, metavar="PATH", help="a real clip (the one beside the repository)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--memory-of", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_of:
        print(json.dumps(measure_memory(*arguments.memory_of)))
        return 0
    clip = arguments.clip or (REAL_CLIP if REAL_CLIP.exists() else None)
    counts = [int(count) for count in arguments.memory_frames.split(",") if count]
    found = bench(arguments.part, arguments.frames, counts, clip)
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
