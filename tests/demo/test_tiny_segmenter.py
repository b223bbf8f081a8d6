"""The puppet's segmenter against the exact silhouette, on clips that went through H.264."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runner.demo.build import CLIPS, stage_for
from runner.demo.dances import Stage, dance
from runner.demo.drawing import CHARACTERS, draw, silhouette
from runner.demo.puppet import lift
from runner.demo.scenes import scene
from runner.demo.tiny_segmenter import PuppetSegmenter, build_tiny_segmenter
from runner.preprocess.masks.point_prompts import PromptPlan
from runner.preprocess.masks.segmenter import load_segmenter
from runner.video import VideoReader


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def plan_of(joints: list[np.ndarray], size: tuple[int, int]) -> PromptPlan:
    return PromptPlan(np.stack([np.c_[lift(j), np.ones(133)] for j in joints]).astype(np.float32), size)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "sam2"
    build_tiny_segmenter(folder)
    assert [f.name for f in folder.iterdir()] == ["config.json"]
    loaded = load_segmenter(folder)
    assert isinstance(loaded, PuppetSegmenter)
    return loaded


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_masks_are_the_silhouettes(segmenter, media, clip):
    truth = json.loads((media / "joints.json").read_text())["clips"][clip.name]["frames"]
    stage = stage_for(clip.width, clip.height, clip.character)
    chosen = np.arange(0, clip.frames, 5)
    joints = [np.array(truth[i]["joints"]) for i in chosen]
    with VideoReader(media / "dances" / f"{clip.name}.mp4") as reader:
        masks = np.concatenate(
            list(segmenter.segment(reader.windows(chosen, 4), plan_of(joints, (clip.width, clip.height))))
        )
    exact = [silhouette((clip.height, clip.width), j, stage.height, CHARACTERS[clip.character]) for j in joints]
    assert min(iou(a, b) for a, b in zip(masks, exact, strict=True)) >= 0.9


def test_masks_are_those_of_the_mask_video(segmenter, media):
    truth = json.loads((media / "joints.json").read_text())["clips"]["step"]["frames"]
    chosen = np.arange(0, 72, 9)
    plan = plan_of([np.array(truth[i]["joints"]) for i in chosen], (480, 320))
    with VideoReader(media / "dances" / "step.mp4") as dances, VideoReader(media / "masks" / "step.mp4") as given:
        masks = np.concatenate(list(segmenter.segment(dances.windows(chosen, 8), plan)))
        white = np.concatenate(list(given.windows(chosen, 8)))[..., 1] >= 128
    assert min(iou(a, b) for a, b in zip(masks, white, strict=True)) >= 0.9


def test_of_two_puppets_the_one_that_was_asked_for(segmenter):
    frame = scene("studio", 640, 480, seed=1)
    stages = [Stage(180, 430, 330, CHARACTERS["pip"].build), Stage(470, 430, 330, CHARACTERS["cato"].build)]
    joints = [dance("step", 0.4, stage) for stage in stages]
    for name, j in zip(("pip", "cato"), joints, strict=True):
        draw(frame, j, 330, CHARACTERS[name])
    for name, j in zip(("pip", "cato"), joints, strict=True):
        (mask,) = next(segmenter.segment(iter([frame[None]]), plan_of([j], (640, 480))))
        assert iou(mask, silhouette((480, 640), j, 330, CHARACTERS[name])) >= 0.9


def test_nobody_is_an_empty_mask(segmenter):
    frame = scene("stage", 320, 480, seed=1)
    here = plan_of([dance("wave", 0.2, stage_for(320, 480, "pip"))], (320, 480))
    away = PromptPlan(here.points * [1, 1, 0], here.size)
    assert not next(segmenter.segment(iter([frame[None]]), here)).any()  # joints, but no puppet
    assert not next(segmenter.segment(iter([frame[None]]), away)).any()  # no joints
