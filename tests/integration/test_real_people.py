"""Real people, real detector and pose models, the tiny generator: the whole command line over film."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from runner.cli import main
from runner.preprocess.networks.yolov10 import Detector, choose_person
from runner.preprocess.pictures.sizing import place
from runner.video import VideoReader

FPS, WIDTH, HEIGHT = 10, 96, 96


@pytest.fixture(scope="module")
def real_run(real_data, demo_models, tmp_path_factory) -> Path:
    """The man's clip with both references, rendered: the folder."""
    folder = tmp_path_factory.mktemp("real")
    store = folder / "models"
    shutil.copytree(demo_models, store, ignore=shutil.ignore_patterns("process_checkpoint", ".building"))
    (store / "process_checkpoint/det").mkdir(parents=True)
    (store / "process_checkpoint/pose2d").mkdir()
    shutil.copy(real_data / "person_detector.onnx", store / "process_checkpoint/det/yolov10m.onnx")
    shutil.copy(real_data / "wholebody_pose_full.onnx", store / "process_checkpoint/pose2d/vitpose_h_wholebody.onnx")
    manifest = folder / "m.yaml"
    text = {
        "version": 1,
        "recipe": "fp32",
        "defaults": {"options": {"size": f"{WIDTH}x{HEIGHT}", "fps": FPS, "steps": 1}},
        "matrix": {
            "references": [
                str(real_data / "reference_woman_fullbody.png"),
                str(real_data / "reference_astronaut_upper_body.png"),
            ],
            "videos": [str(real_data / "man_480x480_30fps_110f.mp4")],
        },
    }
    manifest.write_text(yaml.safe_dump(text))
    command = ["run", str(manifest), "--out", str(folder / "out"), "--models", str(store)]
    assert main([*command, "--cache", str(folder / "cache")]) == 0
    return folder


def test_both_references_are_rendered_in_full(real_run):
    records = [json.loads(path.read_text()) for path in sorted((real_run / "out/jobs").glob("*/result.json"))]
    assert len(records) == 2
    for record in records:
        assert record["output"]["frames"] == 37  # 110 frames at 30 fps are 3.67 s
        assert record["preprocess"]["frames_without_person"] == 0
        assert record["preprocess"]["detector"] == "yolov10m.onnx"


def test_the_pose_preview_follows_the_man_in_every_frame(real_run, real_data):
    """The drawn skeleton covers the box in which a detector, asked again, sees the man."""
    detector = Detector.load(real_data / "person_detector.onnx")
    with VideoReader(real_data / "man_480x480_30fps_110f.mp4") as film:
        sampled = film.sample(FPS)
        frames = film.read(sampled.indices)
    placement = place((480, 480), (WIDTH, HEIGHT))
    for job in (real_run / "out/jobs").iterdir():
        with VideoReader(job / "pose.mp4") as movie:
            skeletons = movie.read(np.arange(movie.info.frames))
        assert len(skeletons) == len(frames)
        for index, (frame, skeleton) in enumerate(zip(frames, skeletons, strict=True)):
            box = choose_person(detector.rows([frame])[0], (480, 480))
            assert box is not None
            (x1, y1), (x2, y2) = placement.points(np.array([[box.x1, box.y1], [box.x2, box.y2]], np.float32))
            rows, columns = np.nonzero(skeleton.max(axis=2) > 60)
            assert len(rows), f"frame {index} has no skeleton"
            centre = np.array([columns.mean(), rows.mean()])
            assert x1 < centre[0] < x2, index
            assert y1 < centre[1] < y2, index
            assert np.ptp(rows) > 0.5 * (y2 - y1), index
            inside = (columns > x1 - 8) & (columns < x2 + 8) & (rows > y1 - 8) & (rows < y2 + 8)
            assert inside.mean() > 0.9, index
