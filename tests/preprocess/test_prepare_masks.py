"""Masks of the driving person, from film to the model's window: the demo's segmenter against the drawn silhouette."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from runner.demo.build import CLIPS, DETECTOR_FILE, POSE_FILE, SEGMENTER_FOLDER, stage_for
from runner.demo.drawing import CHARACTERS, silhouette
from runner.errors import NoPerson
from runner.preprocess.conditions import PoseConditions
from runner.preprocess.masks.widen import augment
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from runner.storage.disk_cache import DiskCache
from runner.timing import StageTimer
from runner.video import Mp4Writer, VideoReader

(STEP,) = (clip for clip in CLIPS if clip.name == "step")


@pytest.fixture(scope="module")
def preprocessor(demo_models) -> Preprocessor:
    return Preprocessor.load(
        demo_models / DETECTOR_FILE, demo_models / POSE_FILE, segmenter=demo_models / SEGMENTER_FOLDER
    )


@pytest.fixture(scope="module")
def exact(demo_media) -> np.ndarray:
    """bool [n, H, W]: the puppet's silhouette in every frame of the clip, as it was drawn."""
    truth = json.loads((demo_media / "joints.json").read_text())["clips"]["step"]["frames"]
    stage = stage_for(STEP.width, STEP.height, STEP.character)
    size, character = (STEP.height, STEP.width), CHARACTERS[STEP.character]
    return np.stack([silhouette(size, np.array(frame["joints"]), stage.height, character) for frame in truth])


def prepared(preprocessor: Preprocessor, reference: Path, video: Path, **given: object) -> PoseConditions:
    asked = {"mode": "replace", "size": f"{STEP.width}x{STEP.height}", "fps": "source", "max_frames": 9, **given}
    return preprocessor.prepare(reference, video, JobOptions.model_validate(asked), face_size=32)


class LosesOneFrame:
    """A segmenter to which all is person, but for frame 9, where nothing is."""

    def __init__(self) -> None:
        self.description = {"model": "loses one frame"}

    def segment(self, windows, plan):
        at = 0
        for window in windows:
            shown = at + np.arange(len(window)) != 9
            at += len(window)
            yield np.ones(window.shape[:3], bool) & shown[:, None, None]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_the_mask_is_the_silhouette(preprocessor, demo_media, exact):
    inputs = demo_media / "references/anna.png", demo_media / "dances/step.mp4"
    raw = prepared(preprocessor, *inputs, start_s=1.0, preprocess={"mask": {"iterations": 0}})
    window = raw.window(0, 9)
    assert raw.report["mask"] == "made"
    for index, mask, background in zip(raw.indices, window.mask, window.background, strict=True):
        assert iou(mask > 0, exact[index]) >= 0.9
        assert not background[mask > 0].any()
    raw.close()
    wide = prepared(preprocessor, *inputs, start_s=1.0)
    for index, mask in zip(wide.indices, wide.window(0, 9).mask, strict=True):
        assert set(np.unique(mask)) == {0, 255}
        assert iou(mask > 0, augment(exact[index]) > 0) >= 0.9
        assert (mask[exact[index]] > 0).mean() > 0.999  # nothing of the driver is left
    wide.close()


def test_a_frame_sampled_twice_has_its_mask_twice_and_parity_fills_rectangles(preprocessor, demo_media):
    inputs = demo_media / "references/anna.png", demo_media / "dances/step.mp4"
    twice = prepared(preprocessor, *inputs, fps=2 * STEP.fps, max_frames=8)
    masks = twice.window(0, 8).mask
    assert (masks[0::2] == masks[1::2]).all()
    assert (masks[0] != masks[6]).any()
    twice.close()
    official = prepared(preprocessor, *inputs, preprocess={"parity": True})
    mask = official.window(0, 1).mask[0]
    rows, columns = np.nonzero(mask)
    assert (mask[rows.min() : rows.max(), columns.min() : columns.max()] == 255).all()
    official.close()


def test_where_nobody_is_seen_there_is_no_mask_and_a_lost_one_has_a_number(preprocessor, demo_media, tmp_path):
    with VideoReader(demo_media / "dances/step.mp4") as reader:
        frames, rate = reader.read(np.arange(12)), reader.info.fps
    frames[4:8] = frames[0, 0, 0]
    with Mp4Writer(tmp_path / "gone.mp4", STEP.width, STEP.height, Fraction(rate)) as writer:
        writer.write(frames)
    reference = demo_media / "references/anna.png"
    found = prepared(preprocessor, reference, tmp_path / "gone.mp4", max_frames=12)
    there = found.window(0, 12).mask.any((1, 2))
    assert there.tolist() == [not 4 <= i < 8 for i in range(12)]
    found.close()

    losing = Preprocessor(preprocessor.detector, preprocessor.pose, segmenter=tmp_path)
    losing._segmenter = LosesOneFrame()
    with pytest.raises(NoPerson, match=r"gone\.mp4: frame 9: the person is there, but the mask is empty"):
        prepared(losing, reference, tmp_path / "gone.mp4", max_frames=12)


def test_a_dance_is_segmented_once_for_many_characters(demo_models, demo_media, tmp_path):
    cached = Preprocessor.load(
        demo_models / DETECTOR_FILE,
        demo_models / POSE_FILE,
        segmenter=demo_models / SEGMENTER_FOLDER,
        cache=DiskCache(tmp_path),
    )
    options = JobOptions(mode="replace", size="96x64", fps="source", max_frames=6)
    made, seen = [], []
    for character in ("anna", "bela"):
        timer, reference = StageTimer(), demo_media / "references" / f"{character}.png"
        conditions = cached.prepare(reference, demo_media / "dances/step.mp4", options, face_size=32, timer=timer)
        made.append(conditions.window(0, 6).mask)
        seen.append(dict(timer.counters))
        conditions.close()
    assert (made[0] == made[1]).all() and made[0].any()
    assert seen == [{"pose_cache_misses": 1, "mask_cache_misses": 1}, {"pose_cache_hits": 1, "mask_cache_hits": 1}]
