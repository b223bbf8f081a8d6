"""Cuts: whether one scene ends and another begins between two neighbouring frames.

In:   uint8 RGB frames. Out: how alike two frames are, and whether that is a cut.
Never: files, windows, more than two reduced pictures.

Pictures are reduced by area to the luma of 32x32 pixels. Two signs make a cut. One is a low structural similarity
(SSIM, Wang et al. 2004, uniform windows of 7x7). The other is a large mean difference: two scenes on plain backgrounds
are alike in structure. Measured on a real clip of 30 frames a second and on four drawn dances of 24: the similarity of
neighbours is .85 or more and their difference 5.6 levels or less, of frames 6 apart .57 and 14 levels; across hard cuts
between these clips the similarity is -.11 to .36 and the difference 30 levels or more.

A cut between two pictures of one scene (a jump cut) is not seen where most of the picture stays. Below about 5 frames a
second a fast dance may look like cuts.
"""

from __future__ import annotations

import numpy as np

__all__ = ["CUT_ABOVE_LEVELS", "CUT_BELOW", "is_cut", "similarity", "thumbnail"]

CUT_BELOW = 0.5  # similarity
CUT_ABOVE_LEVELS = 24.0  # mean absolute difference of luma
# At a smaller difference there is no cut, whatever the similarity, which is low between a nearly black picture and a
# black one: the last steps of a fade. So a cut between two night scenes may be missed.
LEAST_LEVELS = 8.0
SIDE = 32  # pixels
WINDOW = 7  # pixels, of SSIM
LEVELS = 255.0


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] as the luma float32 [32, 32] that `similarity` compares, in 8-bit levels."""
    import cv2

    small = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    luma: np.ndarray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return luma


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Mean SSIM of two thumbnails: 1 for equal ones, about 0 for pictures that have nothing in common."""
    import cv2

    def mean(values: np.ndarray) -> np.ndarray:
        """Over each whole window inside the picture."""
        edge = WINDOW // 2
        blurred: np.ndarray = cv2.blur(values, (WINDOW, WINDOW))[edge:-edge, edge:-edge]
        return blurred

    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    samples = WINDOW**2 / (WINDOW**2 - 1)
    var_x, var_y = samples * (mean(x * x) - mean_x**2), samples * (mean(y * y) - mean_y**2)
    cov = samples * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2
    ssim = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(ssim.mean())


def is_cut(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two thumbnails of neighbouring frames show different scenes."""
    difference = float(np.abs(one - other).mean())
    if difference <= LEAST_LEVELS:
        return False
    return difference > CUT_ABOVE_LEVELS or similarity(one, other) < CUT_BELOW
