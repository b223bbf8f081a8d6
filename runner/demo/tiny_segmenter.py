"""Tiny segmenter: find the puppet's pixels by their colours, without trained weights.

In:   frames and prompts, as every `segmenter.Segmenter`. Out: masks. Never: ONNX, video files.

It is used only if the store's `process_checkpoint/sam2/config.json` names it; only the demo writes such a file. A
puppet is all saturated or white pixels in and around the components with positive prompts.
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
_SATURATED, _BRIGHT = 0.32 * 255, 0.86 * 255  # as in the detector: above every scene, below every tint and white
_BRIDGE = 0.03  # of the person's height: grey rings around discs and grey lines on a face are narrower
_LINE = 0.006  # of the person's height: half the width of these lines and rings
_REACH = 0.02  # of the person's height: how far outside a component a joint may be estimated


def build_tiny_segmenter(folder: Path) -> None:
    """Write the config that chooses this segmenter. Its bytes are always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE}) + "\n", encoding="utf-8")


class PuppetSegmenter:
    """Segments every frame by itself: a puppet's colours need no tracking."""

    def __init__(self) -> None:
        self.description: dict[str, Any] = {"model": MODEL_TYPE, "device": "cpu", "dtype": "uint8"}

    @classmethod
    def load(cls, _folder: Path, _device: str = "cpu") -> PuppetSegmenter:
        """Make a segmenter. It has no weights and always runs on the CPU."""
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
    """Return the puppet's pixels, bool [H, W], of uint8 [H, W, 3]."""
    import cv2

    highest, lowest = frame.max(axis=2), frame.min(axis=2)
    vivid = ((highest - lowest > _SATURATED) | (lowest > _BRIGHT)).astype(np.uint8)
    vivid = cv2.medianBlur(vivid, 3)  # removes single pixels
    height = float(np.ptp(prompts.positive[:, 1]))
    closed = cv2.morphologyEx(vivid, cv2.MORPH_CLOSE, _disc(_BRIDGE * height))
    count, labels = cv2.connectedComponents(closed, connectivity=8)
    starts = np.zeros_like(vivid)
    for x, y in prompts.positive:
        cv2.circle(starts, (round(float(x)), round(float(y))), max(1, round(_REACH * height)), 1, -1)
    chosen = np.zeros(count, bool)
    chosen[labels[starts > 0]] = True
    chosen[0] = False  # the background
    # The wide closing only joins components: between an arm and the waist it is not part of the puppet. A grey ring is
    # part of it: one pixel around all vivid pixels.
    ring = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    figure = cv2.morphologyEx(cv2.dilate(vivid, ring), cv2.MORPH_CLOSE, _disc(_LINE * height))
    return (figure & cv2.dilate(chosen[labels].astype(np.uint8), ring)) > 0


def _disc(radius: float) -> np.ndarray:
    """Return an elliptic structuring element of at least 3 pixels."""
    import cv2

    side = 2 * max(1, round(radius)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
