"""Picture measures for bench/quality.py: the similarity of two clips, and the colours of the dancer in a clip."""

from __future__ import annotations

import cv2
import numpy as np

from runner.demo.dancers import Dancer
from runner.demo.puppet import BONES, joint

PARTS = ("torso", "arms", "legs", "face")


def psnr(clip: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    """Return the PSNR in dB of uint8 [n, H, W, 3] against the truth; `where`: bool [H, W], the pixels that count."""
    squared = np.square(clip.astype(np.float64) - truth).mean(axis=3)
    error = squared.mean() if where is None else squared[:, where].mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def ssim(clip: np.ndarray, truth: np.ndarray, where: np.ndarray | None = None) -> float:
    """Return the mean SSIM of the grey pictures, Gaussian windows of sigma 1.5 (Wang et al., 2004)."""

    def blurred(picture: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(picture, (11, 11), 1.5)

    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for a, b in zip(clip, truth, strict=True):
        x, y = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY).astype(np.float64) for p in (a, b))
        mx, my = blurred(x), blurred(y)
        vx, vy, both = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
        similar = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        values.append(similar.mean() if where is None else similar[where].mean())
    return float(np.mean(values))


def edge_energy(clip: np.ndarray, where: np.ndarray) -> float:
    """Return the mean gradient of the grey pictures inside `where`; blur reduces it."""
    total = 0.0
    for picture in clip:
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
        total += float(np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))[where].mean())
    return total / len(clip)


def _places(joints: np.ndarray) -> dict[str, np.ndarray]:
    """Points [k, 2] well inside each part of a dancer with these joints [23, 2]."""

    def along(a: int, b: int) -> list[np.ndarray]:
        return [joints[a] + t * (joints[b] - joints[a]) for t in (0.3, 0.5, 0.7)]

    hips, toes = joint("left_hip"), joint("left_big_toe")
    legs = [p for a, b in BONES if a >= hips and b < toes for p in along(a, b)]
    arms = [p for a, b in BONES if a < hips for p in along(a, b)]
    corners = joints[[joint(f"{side}_{name}") for side in ("left", "right") for name in ("shoulder", "hip")]]
    middle = corners.mean(0)
    torso = [middle + t * (corner - middle) for corner in corners for t in (0.3, 0.6)]
    left, right = joints[joint("left_eye")], joints[joint("right_eye")]
    across = left - right
    chin = (left + right) / 2 + 0.8 * np.array([-across[1], across[0]])
    face = [chin + t * across for t in (-0.5, 0.0, 0.5)]
    return {"torso": np.array(torso), "arms": np.array(arms), "legs": np.array(legs), "face": np.array(face)}


def part_colours(clip: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """Return the CIE Lab colours [4, 3] of PARTS in `clip`: medians at the parts' places by `joints` [n, 23, 2].

    A median ignores an arm in front of the torso, which covers only some of the points.
    """
    seen: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
    height, width = clip.shape[1:3]
    for picture, at in zip(clip, joints, strict=True):
        for name, points in _places(at).items():
            x, y = np.clip(points.round().astype(int), 0, [width - 1, height - 1]).T
            seen[name].append(picture[y, x])
    return _lab(np.stack([np.median(np.concatenate(seen[name]), axis=0) for name in PARTS]))


def dancer_colours(dancer: Dancer) -> np.ndarray:
    """CIE Lab [4, 3] of PARTS, as the dancer was painted."""
    return _lab(np.array([dancer.torso, dancer.arms, dancer.legs, dancer.face], np.float64))


def _lab(colours: np.ndarray) -> np.ndarray:
    return cv2.cvtColor((colours[None] / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[0]


def colour_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean CIE76 delta E over PARTS: 2.3 is just noticeable; two dancers differ by 50 and more."""
    return float(np.linalg.norm(one - other, axis=1).mean())
