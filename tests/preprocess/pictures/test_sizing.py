"""Sizes and placements, against the table measured on the official code and against geometry worked by hand."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.preprocess.pictures.sizing import AUTO_AREA, area_size, output_size, padding_resize, place, resize_by_area
from runner.spec.options import JobOptions

FULL = None
TABLE = [  # area, (w, h) in, (w, h) out, first and last lit column, first and last lit row
    (921600, (1920, 1080), (1280, 720), FULL, FULL),
    (921600, (1080, 1920), (720, 1280), FULL, FULL),
    (921600, (640, 480), (1104, 816), (8, 1095), FULL),
    (921600, (854, 480), (1280, 704), (14, 1265), FULL),
    (921600, (406, 720), (720, 1264), (4, 715), FULL),
    (921600, (2560, 1080), (1472, 608), (15, 1455), FULL),
    (399360, (1920, 1080), (832, 464), (4, 827), FULL),
    (399360, (480, 832), (464, 832), FULL, (14, 817)),
    (399360, (1080, 1080), (624, 624), FULL, (0, 622)),
]


@pytest.mark.parametrize(("area", "size", "expected", "columns", "rows"), TABLE)
def test_official_resize_matches_the_measured_table(area, size, expected, columns, rows):
    assert area_size(*size, area) == expected
    out = resize_by_area(np.full((size[1], size[0], 3), 255, np.uint8), area)
    assert out.shape == (expected[1], expected[0], 3)
    lit_columns, lit_rows = np.flatnonzero(out.any((0, 2))), np.flatnonzero(out.any((1, 2)))
    assert (lit_columns[0], lit_columns[-1]) == (columns or (0, expected[0] - 1))
    assert (lit_rows[0], lit_rows[-1]) == (rows or (0, expected[1] - 1))


def test_the_official_resize_does_not_honour_832_by_480_standing_up():
    assert area_size(832, 480, 399360) == (832, 480)
    assert area_size(480, 832, 399360) == (464, 832)


def options(size="auto", parity=False, mode="animate") -> JobOptions:
    return JobOptions(size=size, mode=mode, preprocess={"parity": parity})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((480, 832), (480, 832)),  # not 464
        ((832, 480), (832, 480)),
        ((1080, 1080), (624, 624)),  # sqrt(399360) = 631.9 = 39.5 * 16
        ((1920, 1080), (848, 480)),  # 842.6 and 474.0
        ((1000, 1), (4096, 16)),  # 19984 is beyond the longest side
    ],
)
def test_auto_is_the_nearest_multiple_of_16_in_the_reference_aspect(shape, expected):
    assert output_size(options(), shape, (640, 360)) == expected


def test_what_is_asked_is_given_and_replace_takes_the_video_aspect():
    assert output_size(options("480x832"), (1080, 1080), (1920, 1080)) == (480, 832)
    assert output_size(options("480x832", mode="replace"), (1080, 1080), (1920, 1080)) == (480, 832)
    assert output_size(options(mode="replace"), (480, 832), (832, 480)) == (832, 480)


def test_parity_takes_only_the_area_of_the_size_asked():
    assert output_size(options("1280x720", parity=True), (640, 480), (1, 1)) == (1104, 816)
    assert output_size(options(parity=True), (480, 832), (1, 1)) == (464, 832)
    assert output_size(options(parity=True, mode="replace"), (480, 832), (1920, 1080)) == (832, 464)


@given(w=st.integers(16, 6000), h=st.integers(16, 6000))
def test_auto_stays_on_the_grid_near_the_area_and_aspect(w, h):
    width, height = output_size(options(), (w, h), (1, 1))
    assert width % 16 == height % 16 == 0
    if 1 / 3 < w / h < 3:
        assert abs(width * height / AUTO_AREA - 1) < 0.06
        assert abs((width / height) / (w / h) - 1) < 0.05


def test_padding_resize_centres_on_black():
    out = padding_resize(np.full((50, 100, 3), 200, np.uint8), 64, 64)
    assert (out[16:48] == 200).all()  # 64 wide, 32 high, 16 above and below
    assert not out[:16].any()
    assert not out[48:].any()


def test_a_square_frame_on_a_wide_canvas_by_hand():
    spot = place((480, 480), (832, 480))
    assert spot.source == (0, 0, 480, 480)
    assert spot.target == (176, 0, 480, 480)  # (832 - 480) / 2
    assert spot.points(np.array([[0.0, 0.0], [240.0, 100.0]])).tolist() == [[176, 0], [416, 100]]


def test_a_tall_frame_halved_by_hand():
    spot = place((1080, 1920), (480, 832))  # scale 832/1920 = .43333: 468 wide, 6 to the left
    assert spot.target == (6, 0, 468, 832)
    assert spot.points(np.array([540.0, 960.0])).tolist() == pytest.approx([240, 416])


def test_replace_fills_the_canvas_when_only_slivers_are_lost():
    spot = place((1920, 1080), (848, 480), crop_up_to=16)  # 853.3 wide at full height: 5.3 too many
    assert spot.target == (0, 0, 848, 480)
    assert spot.source == (6, 0, 1908, 1080)  # 848 / .44444 = 1908, 12 left over
    assert place((480, 480), (832, 480), crop_up_to=16) == place((480, 480), (832, 480))


@given(w=st.integers(20, 400), h=st.integers(20, 400), width=st.integers(1, 12), height=st.integers(1, 12))
def test_points_and_pixels_go_to_the_same_place(w, h, width, height):
    spot = place((w, h), (width * 16, height * 16), crop_up_to=16)
    frame = np.zeros((h, w, 3), np.uint8)
    x, y, r = w // 2, h // 2, max(2, min(w, h) // 6)
    cv2.rectangle(frame, (x - r, y - r), (x + r, y + r), (255, 255, 255), -1)
    out = spot.image(frame)
    assert out.shape == (height * 16, width * 16, 3)
    rows, columns = np.nonzero(out[..., 0] > 127)
    if len(rows):
        # pixel k covers k … k+1, a coordinate k stands for its middle: half a pixel of each scale lies between them
        expected = spot.points(np.array([x, y]))
        scale = max(spot.target[2] / spot.source[2], spot.target[3] / spot.source[3])
        assert np.abs([columns.mean() - expected[0], rows.mean() - expected[1]]).max() <= 1 + scale
