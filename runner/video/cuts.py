"""Cuts: decide whether a scene ends between two neighbouring frames.

In:   uint8 RGB frames. Out: the similarity of two frames, and whether there is a cut between them.
Never: files, windows, more than two reduced pictures.

Pictures are reduced by area to the luma of 32x32 pixels. Two signs make a cut. One is a low structural similarity
(SSIM, Wang et al. 2004, uniform windows of 7x7). The other is a large mean difference, as two scenes on plain
backgrounds have a similar structure. Measured on a real clip of 30 frames a second and on four drawn dances of 24:
neighbours have a similarity of .85 or more and a difference of 5.6 levels or less, frames 6 apart .57 and 14 levels.
Across hard cuts between these clips the similarity is -.11 to .36, and the difference 30 levels or more.

A cut between two pictures of one scene (a jump cut) is not found where most of the picture stays the same. Below about
5 frames a second a fast dance may be taken for cuts.
"""

from __future__ import annotations

import numpy as np

__all__ = ["CUT_ABOVE_LEVELS", "CUT_BELOW", "is_cut", "similarity", "thumbnail"]

CUT_BELOW = 0.5  # similarity
CUT_ABOVE_LEVELS = 24.0  # mean absolute difference of luma
# At a smaller difference there is no cut, even at a low similarity: the last steps of a fade to black have one. So a
# cut between two night scenes may be missed.
LEAST_LEVELS = 8.0
SIDE = 32  # pixels
WINDOW = 7  # pixels, of SSIM
LEVELS = 255.0


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """Reduce a frame uint8 [H, W, 3] to the luma that `similarity` compares: float32 [32, 32], 8-bit levels."""
    import cv2

    small = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    luma: np.ndarray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return luma


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean SSIM of two thumbnails: 1 for equal ones, about 0 for unrelated pictures."""
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
    """Return whether two thumbnails of neighbouring frames show different scenes."""
    difference = float(np.abs(one - other).mean())
    if difference <= LEAST_LEVELS:
        return False
    return difference > CUT_ABOVE_LEVELS or similarity(one, other) < CUT_BELOW
