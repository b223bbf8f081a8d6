"""What the demo's tests share: the tiny models, built once, and clips that went through H.264."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from runner.demo.dances import Stage, dance
from runner.demo.drawing import CHARACTERS, box_of, draw, silhouette
from runner.demo.scenes import scene

Session = Callable[[np.ndarray], np.ndarray]


def open_session(path: Path) -> Session:
    """The model's first output as a function of its first input, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})[0]


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Session:
    from runner.demo.tiny_detector import build_tiny_detector

    path = tmp_path_factory.mktemp("detector") / "det.onnx"
    build_tiny_detector(path)
    return open_session(path)


@pytest.fixture(scope="session")
def pose(tmp_path_factory: pytest.TempPathFactory) -> Session:
    from runner.demo.tiny_pose import build_tiny_pose

    path = tmp_path_factory.mktemp("pose") / "pose.onnx"
    build_tiny_pose(path)
    return open_session(path)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from runner.demo.build import build_demo_media

    root = tmp_path_factory.mktemp("media")
    build_demo_media(root)
    return root


@dataclass(frozen=True)
class Sight:
    """A picture with puppets whose joints [P, 23, 2] and boxes [P, 4] are known."""

    picture: np.ndarray
    joints: np.ndarray
    boxes: np.ndarray


def through_h264(pictures: list[np.ndarray], crf: int = 23) -> list[np.ndarray]:
    """Encode and decode again, yuv420p, in memory."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    file.seek(0)
    with av.open(file) as back:
        return [frame.to_ndarray(format="rgb24") for frame in back.decode(video=0)]


def filmed(
    size: tuple[int, int],
    people: list[tuple[str, str, float, float, float]],  # dance, character, x, floor, height
    ground: str = "studio",
    frames: int = 8,
    every_s: float = 0.31,
) -> list[Sight]:
    """A short clip of dancing puppets after H.264, with its ground truth."""
    width, height = size
    pictures, truths = [], []
    for i in range(frames):
        picture = scene(ground, width, height, seed=7)
        joints, boxes = [], []
        for name, character, x, floor, tall in people:
            figure = CHARACTERS[character]
            where = dance(name, i * every_s, Stage(x, floor, tall, figure.build))
            draw(picture, where, tall, figure)
            joints.append(where)
            boxes.append(box_of(silhouette((height, width), where, tall, figure)))
        pictures.append(picture)
        truths.append((np.array(joints), np.array(boxes)))
    return [Sight(seen, *truth) for seen, truth in zip(through_h264(pictures), truths, strict=True)]
