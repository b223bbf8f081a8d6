"""Preprocessing: CPU time per frame by stage, 1080p to 480x832, beside the official steps and a plain loop in one run.

    python bench/preprocessing.py [--frames N | --seconds S] [--real DIR] [--json PATH]

Stages are CPU times on one core: there no library starts helper threads, whose cost would not be measured. Whole
pipelines run on all cores. Warm-up is excluded. The clip is made here: the demo's puppet in 1080x1920, found by the
demo's tiny networks. `--real DIR`: a real detector, pose network and clip
(person_detector.onnx, wholebody_pose_*.onnx, *.mp4; the clip is enlarged to 1080p).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # the networks' threads: the same for both sides
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import _official_steps as official  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
from _json_file import write_json  # noqa: E402

from runner.preprocess import conditions, poses  # noqa: E402
from runner.preprocess.networks import vitpose, yolov10  # noqa: E402
from runner.preprocess.networks.sessions import Network, open_network  # noqa: E402
from runner.preprocess.prepare import Preprocessor  # noqa: E402
from runner.spec.options import JobOptions  # noqa: E402
from runner.video import Mp4Writer, VideoReader  # noqa: E402
from runner.video import decode as decode_module  # noqa: E402
from runner.video import reader as reader_module  # noqa: E402

SOURCE, TARGET = (1080, 1920), (480, 832)
TARGET_MS = 6.0  # a frame, outside of the networks and of video decoding
FPS = 30
WARM_UP = 24  # frames, after which the allocator keeps blocks of a window's size
WINDOW = 40  # frames of a segment handed to the generator, about
BATCHES = (1, 4, 16)  # crops at once: the CPU's, those of a window of 1080p, a GPU's
NOT_OURS = ("decode", "detector network", "pose network")
NETWORKS = NOT_OURS[1:]
Name = str | Callable[..., str]


class Meter:
    """Measures CPU seconds of named functions in every thread, each without the named functions that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock, self._inner = threading.Lock(), threading.local()

    def timed(self, name: Name, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            stack = self._inner.__dict__.setdefault("stack", [0.0])
            stack.append(0.0)
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took, within = time.thread_time() - begin, stack.pop()
                stack[-1] += took
                label = name if isinstance(name, str) else name(*args)
                with self._lock:
                    self.seconds[label] = self.seconds.get(label, 0.0) + took - within

        return call

    @contextmanager
    def watching(self, functions: list[tuple[Any, str, Name]]) -> Iterator[None]:
        """Time (module or class, attribute, name) where they stand."""
        with ExitStack() as patches:
            for owner, attribute, name in functions:
                timed = self.timed(name, getattr(owner, attribute))
                patches.enter_context(mock.patch.object(owner, attribute, timed))
            yield


@contextmanager
def one_core() -> Iterator[None]:
    """Restrict the process to one core: decoder and scaler then start no helper threads."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with mock.patch.object(decode_module, "THREADS", 1):
            yield
    finally:
        os.sched_setaffinity(0, before)


def network_name(_network: Network, images: np.ndarray) -> str:
    return NETWORKS[0] if images.shape[-1] == yolov10.SIDE else NETWORKS[1]


COMMON: list[tuple[Any, str, Name]] = [
    (VideoReader, "read", "decode"),
    (reader_module, "read_timeline", "decode"),
    (Network, "_run_once", network_name),
]
OURS: list[tuple[Any, str, Name]] = [
    *COMMON,
    (yolov10.Detector, "rows", "detector input"),
    (poses, "people", "boxes and tracking"),
    (poses, "follow", "boxes and tracking"),
    (poses, "choose_subject", "boxes and tracking"),
    (poses, "whereabouts", "boxes and tracking"),
    (vitpose.PoseEstimator, "cut", "pose input"),
    (vitpose, "decode_heatmaps", "decode heatmaps"),
    (poses, "body_heights", "repair"),
    (poses, "repair", "repair"),
    (poses, "plan_faces", "face crop"),
    (conditions, "crop_face", "face crop"),
    (conditions.Geometry, "skeleton", "draw"),
]
OFFICIAL: list[tuple[Any, str, Name]] = [
    *COMMON,
    (official, "detector_input", "detector input"),
    (official, "choose_box", "boxes and tracking"),
    (official, "pose_input", "pose input"),
    (official, "decode", "decode heatmaps"),
    (official, "draw", "draw"),
    (official, "crop_face", "face crop"),
]
STAGES = [
    *NOT_OURS,
    *("detector input", "boxes and tracking", "pose input", "decode heatmaps", "repair", "draw", "face crop", "other"),
]


def timed(run: Callable[[], int]) -> dict[str, float]:
    """CPU (of all threads) and wall milliseconds a frame of `run`, which returns its frames."""
    wall, cpu = time.perf_counter(), time.process_time()
    frames = run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_ms": round(1e3 * cpu / frames, 3), "wall_ms": round(1e3 * wall / frames, 3)}


def staged(functions: list[tuple[Any, str, Name]], run: Callable[[], int], repeats: int = 3) -> dict[str, Any]:
    """CPU milliseconds a frame by stage ("other": what has no name), and of all but networks and decoding.

    The cheapest of `repeats` runs, ours and theirs alike: whatever else goes on can only add.
    """
    return min((staged_once(functions, run) for _ in range(repeats)), key=lambda found: found["outside_ms"])


def staged_once(functions: list[tuple[Any, str, Name]], run: Callable[[], int]) -> dict[str, Any]:
    meter, frames = Meter(), 0

    def counted() -> int:
        nonlocal frames
        frames = run()
        return frames

    with one_core(), meter.watching(functions):
        cpu_ms = timed(counted)["cpu_ms"]
    stages = {name: 1e3 * seconds / frames for name, seconds in meter.seconds.items()}
    stages["other"] = cpu_ms - sum(stages.values())
    return {
        "stages_ms": {name: round(stages.get(name, 0.0), 3) for name in STAGES},
        "outside_ms": round(sum(ms for name, ms in stages.items() if name not in NOT_OURS), 3),
    }


def ours(preprocessor: Preprocessor, reference: Path, video: Path, frames: int, detect_every: int | None = None) -> int:
    """Both passes over the clip, as a job does them."""
    options = JobOptions(
        size=f"{TARGET[0]}x{TARGET[1]}", fps="source", max_frames=frames, preprocess={"detect_every": detect_every}
    )
    made = preprocessor.prepare(reference, video, options)
    for start in range(0, made.frames, WINDOW):
        made.window(start, min(start + WINDOW, made.frames))
    made.close()
    return made.frames


def plain_loop(networks: tuple[Network, Network], video: Path, frames: int, differs: list[float] | None = None) -> int:
    """The official steps, one frame after the other. `differs`: how far our decoding lies from theirs, pixels."""
    with VideoReader(video) as reader:
        for (frame,) in reader.windows(np.arange(frames), 1):
            rows = networks[0].run(official.detector_input(frame))[0]
            crop, person = official.pose_input(frame, official.choose_box(rows, frame.shape[1], frame.shape[0]))
            heatmaps = networks[1].run(crop)
            points = official.decode(heatmaps[0], person)
            official.draw(points, frame, TARGET)
            official.crop_face(points, frame)
            if differs is not None:
                (same,) = vitpose.decode_heatmaps(heatmaps, [vitpose.Crop(*vars(person).values())])
                differs.append(float(np.abs(same - points)[:, :2].max()))
    return frames


def decoding(video: Path, frames: int) -> dict[str, dict[str, float] | None]:
    """Milliseconds a frame of PyAV and of decord, if it is installed: on one core, RGB, windows of 4."""

    def by_pyav() -> int:
        with VideoReader(video) as reader:
            return sum(len(window) for window in reader.windows(np.arange(frames), 4))

    with one_core():
        results: dict[str, dict[str, float] | None] = {"PyAV": timed(by_pyav), "decord": None}
    try:
        import decord
    except ImportError:
        return results

    def by_decord() -> int:
        reader = decord.VideoReader(str(video), num_threads=1)
        return sum(len(reader.get_batch(range(i, min(i + 4, frames))).asnumpy()) for i in range(0, frames, 4))

    with one_core():
        results["decord"] = timed(by_decord)
    return results


def pose_batches(network: Network, video: Path) -> dict[str, Any]:
    """CPU milliseconds a crop of the pose network by how many crops it takes at once, on one core; the least of five.

    `differs`: the largest difference of any output from that of one crop at a time. A graph of constant batch has no
    choice, and no row.
    """
    images = np.zeros((max(BATCHES), *vitpose.PoseEstimator.input_size), np.float32)
    with VideoReader(video) as reader:
        count = min(len(images), reader.info.frames)
        for i, (frame,) in enumerate(reader.windows(np.arange(count), 1)):
            vitpose.network_input(frame, vitpose.crop_of(None, (frame.shape[1], frame.shape[0])), out=images[i])
    alone = network.run(images, most=1)
    found: dict[str, Any] = {"ms_a_crop": {}, "differs": 0.0}
    if network.batch is not None:
        return found
    with one_core():
        for most in BATCHES:
            times = []
            for _ in range(5):
                begin = time.process_time()
                together = network.run(images, most=most)
                times.append(time.process_time() - begin)
            found["ms_a_crop"][str(most)] = round(1e3 * min(times) / len(images), 3)
            found["differs"] = max(found["differs"], float(np.abs(together - alone).max()))
    return found


def puppet_clip(path: Path, frames: int) -> None:
    """The demo's puppet in 1080p."""
    from runner.demo.build import stage_for
    from runner.demo.dances import dance
    from runner.demo.drawing import CHARACTERS, draw
    from runner.demo.scenes import scene

    stage, ground = stage_for(*SOURCE, "pip"), scene("street", *SOURCE, seed=1)
    with Mp4Writer(path, *SOURCE, Fraction(FPS)) as writer:
        for i in range(frames):
            joints = dance("step", i / FPS, stage)
            writer.write(draw(ground.copy(), joints, stage.height, CHARACTERS["pip"])[None])


def real_clip(path: Path, source: Path, frames: int) -> int:
    """A clip enlarged to 1080p; how many frames it has."""
    with VideoReader(source) as reader, Mp4Writer(path, *SOURCE, Fraction(FPS)) as writer:
        frames = min(frames, reader.info.frames)
        scale = min(SOURCE[0] / reader.info.width, SOURCE[1] / reader.info.height)
        size = round(reader.info.width * scale), round(reader.info.height * scale)
        left, top = (SOURCE[0] - size[0]) // 2, (SOURCE[1] - size[1]) // 2
        for (frame,) in reader.windows(np.arange(frames), 1):
            canvas = np.full((SOURCE[1], SOURCE[0], 3), 96, np.uint8)
            canvas[top : top + size[1], left : left + size[0]] = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
            writer.write(canvas[None])
    return frames


def materials(folder: Path, real: Path | None, frames: int) -> tuple[Path, Path, Path, int]:
    """(detector, pose network, clip, its frames)."""
    clip = folder / "clip.mp4"
    if real is not None:
        frames = real_clip(clip, next(iter(sorted(real.glob("*.mp4")))), frames)
        return real / "person_detector.onnx", next(iter(sorted(real.glob("wholebody_pose*.onnx")))), clip, frames
    from runner.demo.tiny_detector import build_tiny_detector
    from runner.demo.tiny_pose import build_tiny_pose

    build_tiny_detector(folder / "detector.onnx")
    build_tiny_pose(folder / "pose.onnx")
    puppet_clip(clip, frames)
    return folder / "detector.onnx", folder / "pose.onnx", clip, frames


def limits(found: dict[str, Any]) -> list[str]:
    """Return sentences about the current limits of the speed, from the numbers."""
    mine = found["ours"]
    stages = mine["stages_ms"]
    all_ms = sum(stages.values())
    first = max(stages, key=stages.get)
    own = {name: ms for name, ms in stages.items() if name not in NOT_OURS}
    most = max(own, key=own.get)
    networks = sum(stages[name] for name in NETWORKS)
    return [
        f"{first} takes most: {stages[first]:.1f} of {all_ms:.1f} ms CPU a frame ({stages[first] / all_ms:.0%}).",
        f"Without networks and decoding, {most} takes most: {own[most]:.2f} of {mine['outside_ms']:.2f} ms.",
        f"If the networks took no time, one core would do {1e3 / (all_ms - networks):.0f} frames/s, limited by "
        f"{'decoding' if stages['decode'] > mine['outside_ms'] else 'the stages between'} "
        f"({max(stages['decode'], mine['outside_ms']):.1f} ms; a frame is decoded twice: for both networks, and for "
        "the face, whose box is known only after the whole clip).",
        f"Detecting in every frame would cost {found['every_frame']['cpu_ms'] - mine['cpu_ms']:.1f} ms CPU more.",
    ]


def bench(frames: int, real: Path | None) -> dict[str, Any]:
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as scratch:
        detector, pose_model, clip, frames = materials(Path(scratch), real, frames)
        reference = Path(scratch) / "reference.png"
        cv2.imwrite(str(reference), np.full((TARGET[1], TARGET[0], 3), 128, np.uint8))
        preprocessor = Preprocessor.load(detector, pose_model)
        networks = open_network(detector), open_network(pose_model)
        differs: list[float] = []
        ours(preprocessor, reference, clip, min(WARM_UP, frames))  # also what is allocated and imported once
        plain_loop(networks, clip, min(WARM_UP, frames), differs)
        decoding(clip, min(WARM_UP, frames))
        found: dict[str, Any] = {
            "bench": "preprocess",
            "frames": frames,
            "source": f"{SOURCE[0]}x{SOURCE[1]}",
            "target": f"{TARGET[0]}x{TARGET[1]}",
            "networks": "real" if real else "demo",
            "ours": staged(OURS, lambda: ours(preprocessor, reference, clip, frames)),
            "every_frame": staged(OURS, lambda: ours(preprocessor, reference, clip, frames, 1)),
            "official": staged(OFFICIAL, lambda: plain_loop(networks, clip, frames)),
            "decoding": decoding(clip, frames),
            "pose_batches": pose_batches(networks[1], clip),
            "decode_differs_px": max(differs),
            "target_ms": TARGET_MS,
        }
        found["ours"] |= timed(lambda: ours(preprocessor, reference, clip, frames))
        found["every_frame"] |= timed(lambda: ours(preprocessor, reference, clip, frames, 1))
        found["official"] |= timed(lambda: plain_loop(networks, clip, frames))
    found["outside_ratio"] = round(found["official"]["outside_ms"] / found["ours"]["outside_ms"], 2)
    found["pipeline_cpu_ratio"] = round(found["official"]["cpu_ms"] / found["ours"]["cpu_ms"], 2)
    found["pipeline_wall_ratio"] = round(found["official"]["wall_ms"] / found["ours"]["wall_ms"], 2)
    found["target_met"] = found["ours"]["outside_ms"] <= TARGET_MS
    found["limits"] = limits(found)
    return found


def table(found: dict[str, Any]) -> str:
    mine, each, theirs = found["ours"], found["every_frame"], found["official"]
    heads = f"{found['frames']} frames, {found['source']} to {found['target']}, {found['networks']} networks"
    lines = [f"{heads}; ms a frame", f"{'stage':<22}{'ours':>9}{'official':>10}{'':>9}{'detect_every: 1':>17}"]
    for name in STAGES:
        ms = (side["stages_ms"][name] for side in (mine, theirs, each))
        lines.append("{:<22}{:>9.2f}{:>10.2f}{:>26.2f}".format(name, *ms))
    for label, name in (("outside both", "outside_ms"), ("whole, CPU", "cpu_ms"), ("whole, wall", "wall_ms")):
        ratio = theirs[name] / mine[name]
        lines.append(f"{label:<22}{mine[name]:>9.2f}{theirs[name]:>10.2f}{ratio:>8.2f}x{each[name]:>17.2f}")
    met = "met" if found["target_met"] else "MISSED"
    lines.append(f"target outside of networks and decoding: {TARGET_MS:g} ms, {met}")
    for name, times in found["decoding"].items():
        text = "not installed" if times is None else f"{times['cpu_ms']:.2f} CPU, {times['wall_ms']:.2f} wall"
        lines.append(f"decoding once, {name:<8}{text}")
    batches = found["pose_batches"]
    if batches["ms_a_crop"]:
        text = ", ".join(f"{most} at once {ms:.2f}" for most, ms in batches["ms_a_crop"].items())
        lines.append(f"pose network, CPU ms a crop: {text}; outputs differ by {batches['differs']:.1e}")
    lines.append(f"our heatmap decoding differs from theirs by at most {found['decode_differs_px']:.1e} px")
    return "\n".join([*lines, "what limits it now:", *(f"  {line}" for line in found["limits"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--frames", type=int, default=48, metavar="N", help="of the clip (48)")
    length.add_argument("--seconds", type=float, metavar="S", help=f"of the clip, at {FPS} frames a second")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder of a real detector, pose network and clip")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args()
    frames = arguments.frames if arguments.seconds is None else round(arguments.seconds * FPS)
    if frames < 2:
        parser.error("at least 2 frames are needed")
    found = bench(frames, arguments.real)
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
