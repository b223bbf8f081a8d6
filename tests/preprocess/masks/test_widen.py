"""Widening: grids and dilations against cases worked by hand, a plain loop over the official rule, and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runner.preprocess.masks.widen import augment, blacken, dilate, fill_grid

masks = hnp.arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))


def drawn(*rows: str) -> np.ndarray:
    """'.' is 0, '#' is 255."""
    return np.array([[255 * (c == "#") for c in row] for row in rows], np.uint8)


def by_loop(mask: np.ndarray, w_len: int, h_len: int) -> np.ndarray:
    """The rule as the reference words it, a pixel and a cell at a time."""
    rows, columns = np.nonzero(mask)
    out = (mask != 0).astype(np.uint8) * np.uint8(255)
    if not len(rows):
        return out
    x1, x2, y1, y2 = columns.min(), columns.max(), rows.min(), rows.max()
    w, h = max(1, (x2 - x1) // w_len), max(1, (y2 - y1) // h_len)
    for x in range(x1, x2, w):
        for y in range(y1, y2, h):
            cell = out[y : min(y + h, y2), x : min(x + w, x2)]
            if cell.any():
                cell[:] = 255
    return out


def shifted_maximum(mask: np.ndarray, radius: int) -> np.ndarray:
    padded = np.pad(mask, radius)
    height, width = mask.shape
    shifts = [padded[y : y + height, x : x + width] for y in range(2 * radius + 1) for x in range(2 * radius + 1)]
    return np.max(shifts, axis=0)


def test_one_cell_fills_the_rectangle_but_its_last_row_and_column():
    mask = drawn(
        ".......",
        ".#.....",
        "...#...",
        ".....#.",
        "..#....",
        ".......",
    )
    assert (
        fill_grid(mask, 1, 1)
        == drawn(
            ".......",
            ".####..",
            ".####..",
            ".#####.",  # the pixel in the last column stays as it was
            "..#....",  # and that in the last row
            ".......",
        )
    ).all()


def test_cells_are_cut_at_the_far_end():
    # The box is 8 × 5, last minus first 7 × 4: cells of 7 // 3 = 2 by 4 // 2 = 2, four across (2, 2, 2, 1), two down.
    mask = drawn(
        "#.......",
        ".....#..",
        "......#.",
        "........",
        ".......#",
    )
    assert (
        fill_grid(mask, 3, 2)
        == drawn(
            "##..##..",
            "##..##..",
            "......#.",
            "......#.",
            ".......#",
        )
    ).all()


@pytest.mark.parametrize("at", [(0, 0), (3, 2)])
def test_what_crashes_officially(at):
    assert not fill_grid(np.zeros((4, 4), bool), 1, 1).any()
    one = np.zeros((4, 4), bool)
    one[at] = True
    assert (fill_grid(one, 1, 1) == one * 255).all()
    assert (fill_grid(one, 10, 20) == one * 255).all()
    thin = drawn("..##.", "..##.", "..##.")
    assert (fill_grid(thin, 10, 20) == thin).all()


@given(mask=masks, w_len=st.integers(1, 12), h_len=st.integers(1, 12))
def test_grid_is_the_official_loop(mask, w_len, h_len):
    assert (fill_grid(mask, w_len, h_len) == by_loop(mask, w_len, h_len)).all()


@given(mask=masks, w_len=st.integers(1, 6), h_len=st.integers(1, 6))
def test_grid_only_adds_within_the_bounding_box_and_once(mask, w_len, h_len):
    filled = fill_grid(mask, w_len, h_len)
    assert set(np.unique(filled)) <= {0, 255}
    assert (filled[mask] == 255).all()
    rows, columns = np.nonzero(mask)
    if len(rows):
        outside = np.ones_like(mask)
        outside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = False
        assert not filled[outside].any()
        again = np.nonzero(filled)
        assert (again[0].min(), again[0].max()) == (rows.min(), rows.max())
    assert (fill_grid(filled, w_len, h_len) == filled).all()


@given(mask=masks)
def test_official_dilation_is_one_square_of_19(mask):
    assert (dilate(mask, 7, 3) == shifted_maximum(mask, 9) * np.uint8(255)).all()


@given(mask=masks, kernel=st.sampled_from([1, 3, 5]), iterations=st.integers(0, 3), other=st.integers(0, 2**32 - 1))
def test_dilation_grows_with_the_mask_and_with_every_iteration(mask, kernel, iterations, other):
    wide = dilate(mask, kernel, iterations) > 0
    assert (wide == (shifted_maximum(mask, iterations * (kernel // 2)) > 0)).all()
    assert (wide <= (dilate(mask, kernel, iterations + 1) > 0)).all()
    more = mask | (np.random.default_rng(other).random(mask.shape) < 0.1)
    assert (wide <= (dilate(more, kernel, iterations) > 0)).all()


def test_default_keeps_the_shape_and_parity_gives_the_rectangle():
    mask = np.zeros((120, 100), bool)
    mask[40:80, 50] = mask[60, 30:70] = True  # a cross
    ours, official = augment(mask), augment(mask, grid=(1, 1))
    assert (ours == shifted_maximum(mask, 9) * 255).all() and not ours[31, 21]
    assert (official[31:88, 21:78] == 255).all()  # of rows 31..88 and columns 21..78
    assert (official[88] == ours[88]).all() and (official[:, 78] == ours[:, 78]).all()
    assert not official[:31].any() and not official[89:].any()


def test_without_iterations_the_mask_stays_raw():
    mask = drawn("#..", "...", "..#")
    assert (augment(mask, iterations=0, grid=(1, 1)) == mask).all()


def test_result_is_binary_whatever_comes():
    grey = np.array([[0, 1, 128, 255]], np.uint8)
    assert augment(grey, iterations=0).tolist() == [[0, 255, 255, 255]]
    assert grey.tolist() == [[0, 1, 128, 255]]


def test_background_is_black_where_the_character_goes_and_untouched_elsewhere():
    rng = np.random.default_rng(0)
    frame, mask = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), rng.random((20, 30)) < 0.3
    before = frame.copy()
    assert (blacken(frame, mask) == frame * (1 - mask[..., None])).all()
    assert (frame == before).all()


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="kernel of 0"):
        dilate(np.zeros((4, 4)), kernel=0)
    with pytest.raises(ValueError, match="grid of 0"):
        fill_grid(np.zeros((4, 4)), 0, 1)
    with pytest.raises(ValueError, match="H, W"):
        augment(np.zeros((4, 4, 3)))
