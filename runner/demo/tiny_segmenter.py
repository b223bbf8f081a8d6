"""Tiny segmenter: the puppet's pixels by the rules that drew it; no trained weights.

In:   frames and prompts, as every `segmenter.Segmenter`. Out: masks. Never: ONNX, video files.

Reached only through a store whose `process_checkpoint/sam2/config.json` says so, which only the demo writes. A puppet
is what is saturated or white in and around the components on which the positive prompts lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runner.preprocess.masks.point_prompts import PromptPlan, Prompts

__all__ = ["MODEL_TYPE", "PuppetSegmenter", "build_tiny_segmenter"]

MODEL_TYPE = "video-lab-puppet"
_SATURATED, _BRIGHT = 0.32 * 255, 0.86 * 255  # the detector's: above every scene, below every tint and white
_BRIDGE = 0.03  # of the person's height: grey rings around discs and grey lines on a face are narrower
_LINE = 0.006  # of the person's height: half of what those lines and rings are wide
_REACH = 0.02  # of the person's height: how far from a component a joint may be estimated


def build_tiny_segmenter(folder: Path) -> None:
    """Write the config that chooses this segmenter. The same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE}) + "\n", encoding="utf-8")


class PuppetSegmenter:
    """Every frame by itself: a puppet's colours need no memory."""

    def __init__(self) -> None:
        self.description: dict[str, Any] = {"model": MODEL_TYPE, "device": "cpu", "dtype": "uint8"}

    @classmethod
    def load(cls, _folder: Path, _device: str = "cpu") -> PuppetSegmenter:
        """There are no weights, and nothing for a GPU to do."""
        return cls()

    def segment(self, windows: Iterator[np.ndarray], plan: PromptPlan) -> Iterator[np.ndarray]:
        """See `Segmenter`."""
        at = 0
        for window in windows:
            masks = np.zeros(window.shape[:3], bool)
            for mask, frame in zip(masks, window, strict=True):
                prompts = plan.at(at)
                if prompts is not None:
                    mask[:] = _puppet(frame, prompts)
                at += 1
            yield masks


def _puppet(frame: np.ndarray, prompts: Prompts) -> np.ndarray:
    """uint8 [H, W, 3] → bool [H, W]."""
    import cv2

    highest, lowest = frame.max(axis=2), frame.min(axis=2)
    gaudy = ((highest - lowest > _SATURATED) | (lowest > _BRIGHT)).astype(np.uint8)
    gaudy = cv2.medianBlur(gaudy, 3)  # specks vanish
    height = float(np.ptp(prompts.positive[:, 1]))
    closed = cv2.morphologyEx(gaudy, cv2.MORPH_CLOSE, _disc(_BRIDGE * height))
    count, labels = cv2.connectedComponents(closed, connectivity=8)
    seeds = np.zeros_like(gaudy)
    for x, y in prompts.positive:
        cv2.circle(seeds, (round(float(x)), round(float(y))), max(1, round(_REACH * height)), 1, -1)
    wanted = np.zeros(count, bool)
    wanted[labels[seeds > 0]] = True
    wanted[0] = False  # the background
    # Bridges joined what belongs together; they are not of the puppet where they span from an arm to the waist. A grey
    # ring, though, is: one pixel around everything gaudy.
    ring = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    figure = cv2.morphologyEx(cv2.dilate(gaudy, ring), cv2.MORPH_CLOSE, _disc(_LINE * height))
    return (figure & cv2.dilate(wanted[labels].astype(np.uint8), ring)) > 0


def _disc(radius: float) -> np.ndarray:
    """An elliptic structuring element of at least 3 pixels."""
    import cv2

    side = 2 * max(1, round(radius)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
