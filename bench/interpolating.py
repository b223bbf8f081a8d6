"""Interpolating: quality and seconds of the frame between two, beside averaging them and FFmpeg's minterpolate.

    python bench/interpolating.py [--rife FILE] [--clip PATH] [--every N] [--json PATH]

Odd frames of a clip are dropped and rebuilt from their neighbours, in every N-th triple. Reported are the RGB PSNR
against the dropped frame, and the median wall seconds per frame. FFmpeg's minterpolate (mci, through PyAV) doubles the
rate of the even frames in one pass; its seconds are those of the pass per frame. The floor is the time of the network's
convolutions at the rate of one large convolution of torch in the same run. FILE: made by tools/convert_rife.py; without
it the network has random weights, and no quality is reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported

import av  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _json_file import write_json  # noqa: E402
from segment_cost import REAL_CLIP, made_frames  # noqa: E402

from runner.finishing.rife import RifeInterpolator, RifeNetwork  # noqa: E402
from runner.forecast.rife_shape import RifeShape  # noqa: E402
from runner.video import VideoReader  # noqa: E402

SIZES = ((480, 480), (832, 480))
TIMED = 5  # frames between, of which the median counts

Frame = np.ndarray  # uint8 RGB [H, W, 3]


def psnr(one: Frame, other: Frame) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2)))


def average(one: Frame, other: Frame) -> Frame:
    return cv2.addWeighted(one, 0.5, other, 0.5, 0)


def minterpolate(frames: Sequence[Frame]) -> tuple[list[Frame], float]:
    """The frames of twice the rate, and the seconds of the pass."""
    height, width = frames[0].shape[:2]
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 15))
    smooth = graph.add("minterpolate", "fps=30:mi_mode=mci:mc_mode=aobmc:vsbmc=1:scd=none")
    sink = graph.add("buffersink")
    source.link_to(smooth)
    smooth.link_to(sink)
    graph.configure()
    found: list[Frame] = []

    def drain() -> None:
        while True:
            try:
                found.append(sink.pull().to_ndarray(format="rgb24"))
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    begin = time.perf_counter()
    for number, frame in enumerate(frames):
        made = av.VideoFrame.from_ndarray(frame, format="rgb24")
        made.pts, made.time_base = number, Fraction(1, 15)
        source.push(made)
        drain()
    source.push(None)
    drain()
    return found, time.perf_counter() - begin


def median_seconds(work: Callable[[], Any]) -> float:
    work()
    taken = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def convolution_rate() -> float:
    """FLOP a second of one large convolution."""
    x, layer = torch.randn(1, 128, 256, 256), torch.nn.Conv2d(128, 128, 3, padding=1)
    with torch.inference_mode():
        return 2 * 9 * 128 * 128 * 256 * 256 / median_seconds(lambda: layer(x))


def qualities(frames: Sequence[Frame], network: RifeInterpolator | None, every: int) -> dict[str, dict[str, float]]:
    """Name → mean and least PSNR of the odd frames that are rebuilt."""
    starts = range(0, len(frames) - 2, 2 * every)
    passed, _ = minterpolate(frames[::2])
    ways: dict[str, Callable[[int], Frame]] = {
        "repeat": lambda at: frames[at],
        "average": lambda at: average(frames[at], frames[at + 2]),
        "minterpolate": lambda at: passed[min(at + 1, len(passed) - 1)],
    }
    if network is not None:
        ways["rife"] = lambda at: network.between(frames[at], frames[at + 2])
    found = {}
    for name, way in ways.items():
        values = [psnr(way(at), frames[at + 1]) for at in starts]
        found[name] = {"mean": statistics.mean(values), "least": min(values), "frames": len(values)}
    return found


def times(network: RifeInterpolator, frames: Sequence[Frame], rate: float) -> list[dict[str, float]]:
    """A row a size."""
    rows = []
    for width, height in SIZES:
        small = [cv2.resize(frame, (width, height)) for frame in frames[:9]]
        one, other = small[0], small[2]
        rife = median_seconds(lambda one=one, other=other: network.between(one, other))  # type: ignore[misc]
        flop = RifeShape().frame_flop(width, height)
        made, seconds = minterpolate(small)
        rows.append(
            {
                "width": width,
                "height": height,
                "rife_s": rife,
                "average_s": median_seconds(lambda one=one, other=other: average(one, other)),  # type: ignore[misc]
                "minterpolate_s": seconds / max(1, len(made) - len(small)),
                "gflop": flop / 1e9,
                "floor_s": flop / rate,
                "of_floor": rife / (flop / rate),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rife", type=Path)
    parser.add_argument("--clip", type=Path, default=REAL_CLIP)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    network = RifeInterpolator(RifeNetwork()) if asked.rife is None else RifeInterpolator.open(asked.rife)
    real = asked.clip is not None and asked.clip.is_file()
    if real:
        with VideoReader(asked.clip) as reader:
            frames = list(reader.read(np.arange(reader.info.frames)))
    else:
        frames = list(made_frames(9))
    quality = qualities(frames, network, asked.every) if real and asked.rife is not None else {}
    for name, found in quality.items():
        print(f"{name:14s} {found['mean']:6.2f} dB mean, {found['least']:6.2f} dB least, {found['frames']} frames")
    rate = convolution_rate()
    print(f"one large convolution: {rate / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    rows = times(network, frames, rate)
    for row in rows:
        print(
            f"{row['width']:.0f}x{row['height']:.0f}: rife {row['rife_s']:.3f} s a frame, {row['of_floor']:.1f} times "
            f"its floor of {row['floor_s']:.3f} s ({row['gflop']:.1f} GFLOP); average {row['average_s'] * 1e3:.2f} ms; "
            f"minterpolate {row['minterpolate_s']:.3f} s, {row['minterpolate_s'] / row['rife_s']:.2f} times rife's"
        )
    if asked.json:
        write_json(asked.json, {"quality": quality, "conv_flop_per_s": rate, "times": rows})


if __name__ == "__main__":
    main()
