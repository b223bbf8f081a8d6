"""The tiny detector finds puppets, all of them and nothing else, in frames stretched to its square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runner.demo.dancers import DANCERS
from runner.demo.drawing import CHARACTERS
from runner.demo.scenes import SCENES, scene
from runner.demo.tiny_detector import build_tiny_detector
from tests.demo.conftest import Session, filmed


def detect(detector: Session, picture: np.ndarray) -> np.ndarray:
    """[P, 6] rows above YOLOv10's threshold, in the picture's pixels. The frame is stretched, not letterboxed."""
    import cv2

    height, width = picture.shape[:2]
    square = cv2.resize(picture, (640, 640), interpolation=cv2.INTER_LINEAR)
    rows = detector((square / 255).astype(np.float32).transpose(2, 0, 1)[None])
    assert rows.shape == (1, 300, 6)
    assert (np.diff(rows[0, :, 4]) <= 0).all()  # best first, then the unused rows
    found = rows[0][rows[0, :, 4] >= 0.05]
    return found * np.array([width / 640, height / 640, width / 640, height / 640, 1, 1])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    inside = np.prod(np.clip(np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(inside / (np.prod(a[2:4] - a[:2]) + np.prod(b[2:4] - b[:2]) - inside))


ONE = [
    ("portrait", (320, 480), [("jacks", "pip", 160, 430, 330)], "stage"),
    ("tall", (480, 832), [("wave", "anna", 240, 760, 450)], "studio"),
    ("landscape", (832, 480), [("step", "bela", 416, 440, 380)], "street"),
    ("wide", (1920, 480), [("twist", "cato", 960, 450, 370)], "meadow"),
    ("small", (256, 192), [("twist", "pip", 128, 180, 150)], "street"),
    ("very-small", (144, 256), [("wave", "pip", 72, 230, 120)], "stage"),
]


@pytest.mark.parametrize(("size", "people", "ground"), [case[1:] for case in ONE], ids=[case[0] for case in ONE])
def test_finds_the_puppet_in_every_frame(detector: Session, size, people, ground) -> None:
    for sight in filmed(size, people, ground, frames=5):
        found = detect(detector, sight.picture)
        assert len(found) == 1
        assert iou(found[0], sight.boxes[0]) >= 0.85
        assert found[0, 4] > 0.6
        assert found[0, 5] == 0


def test_counts_several(detector: Session) -> None:
    people = [("twist", "pip", 200, 650, 480), ("jacks", "bela", 640, 690, 330), ("wave", "cato", 1050, 660, 500)]
    for sight in filmed((1280, 720), people, "stage", frames=3):
        found = detect(detector, sight.picture)
        assert len(found) == len(people)
        for box in sight.boxes:
            assert max(iou(row, box) for row in found) >= 0.85


@pytest.mark.parametrize("name", SCENES)
def test_sees_nobody_in_an_empty_scene(detector: Session, name: str) -> None:
    for seed, size in enumerate([(320, 480), (832, 480)]):
        assert len(detect(detector, scene(name, *size, seed=seed))) == 0


def test_sees_nobody_in_flat_or_noisy_pictures(detector: Session) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (480, 640, 3), np.uint8)
    coarse = np.kron(rng.integers(0, 256, (60, 80, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    reds = np.full((480, 640, 3), (255, 0, 0), np.uint8)
    for picture in (noise, coarse, reds, np.full_like(noise, 255), np.zeros_like(noise)):
        assert len(detect(detector, picture)) == 0


def test_same_code_same_bytes(tmp_path: Path) -> None:
    build_tiny_detector(tmp_path / "a.onnx")
    build_tiny_detector(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (tmp_path / "a.onnx").stat().st_size < 200_000


@pytest.mark.real
def test_sees_no_puppet_in_real_pictures(detector: Session, real_data: Path) -> None:
    from PIL import Image

    from runner.video import VideoReader

    clip = next(real_data.glob("*.mp4"))
    with VideoReader(clip) as reader:
        pictures = list(reader.read(np.linspace(0, reader.info.frames - 1, 6).astype(int)))
    pictures += [np.asarray(Image.open(path).convert("RGB")) for path in sorted(real_data.glob("*.png"))]
    assert len(pictures) > 6
    assert [len(detect(detector, picture)) for picture in pictures] == [0] * len(pictures)


def test_finds_the_puppets_among_the_references_and_no_dancer(detector: Session, media: Path) -> None:
    import json

    from PIL import Image

    truth = json.loads((media / "joints.json").read_text(encoding="utf-8"))["references"]
    assert truth.keys() & CHARACTERS.keys() and truth.keys() & DANCERS.keys()
    for name, about in truth.items():
        found = detect(detector, np.asarray(Image.open(media / "references" / f"{name}.png")))
        assert len(found) == (name in CHARACTERS)
        if name in DANCERS:
            continue
        assert iou(found[0], np.array(about["box"])) >= 0.85
