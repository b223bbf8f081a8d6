"""Widening: the shape of a mask, widened for the model, and the background that it leaves.

In:   a mask at the output's size. Out: the mask as the model gets it, 0 and 255, nothing between; a blackened frame.
Never: how a mask is found or kept.

A mask that follows the driving person too closely makes the character take that person's outline. Officially it becomes
the whole bounding rectangle (a grid of one cell), which also throws away all of the scene around the person; by default
it is only dilated here.
"""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["ITERATIONS", "KERNEL", "augment", "blacken", "dilate", "fill_grid"]

ITERATIONS, KERNEL = 3, 7  # the official defaults: 9 pixels to every side


def augment(
    mask: np.ndarray, *, iterations: int = ITERATIONS, kernel: int = KERNEL, grid: tuple[int, int] | None = None
) -> np.ndarray:
    """bool or uint8 [H, W], non-zero where the character goes → uint8 [H, W] of 0 and 255.

    `dilate`, then `fill_grid` of (w_len, h_len) cells if `grid` is given. Without iterations neither, as officially.
    """
    if iterations <= 0:
        return _binary(mask)
    widened = dilate(mask, kernel, iterations)
    return widened if grid is None else fill_grid(widened, *grid)


def dilate(mask: np.ndarray, kernel: int = KERNEL, iterations: int = ITERATIONS) -> np.ndarray:
    """`iterations` times the maximum over kernel × kernel pixels → uint8 [H, W] of 0 and 255.

    For an odd kernel that is once the maximum over a square of iterations · (kernel - 1) + 1 pixels.
    """
    if kernel < 1 or iterations < 0:
        raise ValueError(f"a kernel of {kernel} pixels {iterations} times")
    return cv2.dilate(_binary(mask), np.ones((kernel, kernel), np.uint8), iterations=iterations)


def fill_grid(mask: np.ndarray, w_len: int, h_len: int) -> np.ndarray:
    """Every cell of the mask's bounding box that holds a pixel of the mask, filled → uint8 [H, W] of 0 and 255.

    Official: a cell is int(width / w_len) × int(height / h_len) pixels, where width and height are last minus first, so
    that the box's last row and column lie in no cell and stay as they are; cells at the far end are cut. An empty mask,
    and a box narrower than its cells are many (one pixel a cell here), crash there.
    """
    if w_len < 1 or h_len < 1:
        raise ValueError(f"a grid of {w_len} × {h_len} cells")
    filled = _binary(mask)
    left, top, columns, rows = cv2.boundingRect(filled)
    width, height = columns - 1, rows - 1
    if width < 1 or height < 1:
        return filled
    box = filled[top : top + height, left : left + width]
    if w_len == h_len == 1:  # the one cell holds a pixel of the mask, but for masks in the last row and column alone
        if box.any():
            box[:] = 255
        return filled
    across = np.arange(0, width, max(1, width // w_len))
    down = np.arange(0, height, max(1, height // h_len))
    cells = np.maximum.reduceat(np.maximum.reduceat(box, down, axis=0), across, axis=1)
    box[:] = np.repeat(np.repeat(cells, np.diff(down, append=height), axis=0), np.diff(across, append=width), axis=1)
    return filled


def blacken(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] → a copy, black where `mask` [H, W] is not zero: what the model keeps of the scene."""
    return cv2.copyTo(frame, cv2.bitwise_not(_binary(mask)))


def _binary(mask: np.ndarray) -> np.ndarray:
    """A copy as uint8 of 0 and 255."""
    if mask.ndim != 2:
        raise ValueError(f"a mask is [H, W], not {mask.shape}")
    flat = np.ascontiguousarray(mask)
    return cv2.threshold(flat.view(np.uint8) if flat.dtype == bool else flat, 0, 255, cv2.THRESH_BINARY)[1]
