"""Widening: widen a mask for the model, and blacken the frame under it.

In:   a mask at the output's size. Out: the mask as the model gets it, only 0 and 255; a blackened frame.
Never: finding or storing a mask.

A mask that follows the driving person too closely gives the character that person's outline. The official preprocessing
uses the whole bounding rectangle (a grid of one cell), which also removes the scene around the person. Here the default
is dilation only.
"""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["ITERATIONS", "KERNEL", "augment", "blacken", "dilate", "fill_grid"]

ITERATIONS, KERNEL = 3, 7  # the official defaults: 9 pixels to every side


def augment(
    mask: np.ndarray, *, iterations: int = ITERATIONS, kernel: int = KERNEL, grid: tuple[int, int] | None = None
) -> np.ndarray:
    """Widen a mask bool or uint8 [H, W], non-zero where the character goes, to uint8 [H, W] of 0 and 255.

    It is dilated; then, if `grid` is given, filled by `fill_grid` with (w_len, h_len) cells. With 0 iterations it is
    neither, as in the official code.
    """
    if iterations <= 0:
        return _binary(mask)
    widened = dilate(mask, kernel, iterations)
    return widened if grid is None else fill_grid(widened, *grid)


def dilate(mask: np.ndarray, kernel: int = KERNEL, iterations: int = ITERATIONS) -> np.ndarray:
    """Dilate `iterations` times with a square of kernel × kernel pixels; returns uint8 [H, W] of 0 and 255.

    For an odd kernel this equals one dilation with a square of iterations · (kernel - 1) + 1 pixels.
    Raises ValueError for a kernel below 1 or negative iterations.
    """
    if kernel < 1 or iterations < 0:
        raise ValueError(f"cannot dilate with a kernel of {kernel} pixels {iterations} times")
    return cv2.dilate(_binary(mask), np.ones((kernel, kernel), np.uint8), iterations=iterations)


def fill_grid(mask: np.ndarray, w_len: int, h_len: int) -> np.ndarray:
    """Fill every cell of the mask's bounding box that has a pixel of the mask; returns uint8 [H, W] of 0 and 255.

    As in the official code, a cell is int(width / w_len) × int(height / h_len) pixels, where width and height are last
    minus first: the box's last row and column are in no cell and are not changed, and cells at the far end are cut. The
    official code crashes for an empty mask, and for a box with fewer pixels than cells (here a cell is then one pixel).
    Raises ValueError for fewer than one cell.
    """
    if w_len < 1 or h_len < 1:
        raise ValueError(f"cannot fill a grid of {w_len} × {h_len} cells")
    filled = _binary(mask)
    left, top, columns, rows = cv2.boundingRect(filled)
    width, height = columns - 1, rows - 1
    if width < 1 or height < 1:
        return filled
    box = filled[top : top + height, left : left + width]
    if w_len == h_len == 1:  # the cell is empty only if the whole mask is in the box's last row and column
        if box.any():
            box[:] = 255
        return filled
    across = np.arange(0, width, max(1, width // w_len))
    down = np.arange(0, height, max(1, height // h_len))
    cells = np.maximum.reduceat(np.maximum.reduceat(box, down, axis=0), across, axis=1)
    box[:] = np.repeat(np.repeat(cells, np.diff(down, append=height), axis=0), np.diff(across, append=width), axis=1)
    return filled


def blacken(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a copy of uint8 [H, W, 3], black where `mask` [H, W] is not zero: the scene that the model keeps."""
    return cv2.copyTo(frame, cv2.bitwise_not(_binary(mask)))


def _binary(mask: np.ndarray) -> np.ndarray:
    """Return a copy as uint8 of 0 and 255."""
    if mask.ndim != 2:
        raise ValueError(f"a mask is [H, W], not {mask.shape}")
    flat = np.ascontiguousarray(mask)
    return cv2.threshold(flat.view(np.uint8) if flat.dtype == bool else flat, 0, 255, cv2.THRESH_BINARY)[1]
