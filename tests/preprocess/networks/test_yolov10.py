"""Choosing the person: by our rule and by the official one, on rows worked by hand."""

import numpy as np
import pytest

from runner.errors import WeightsCorrupt
from runner.preprocess.networks.yolov10 import (
    UNIT,
    Box,
    Detector,
    _as_rows,
    choose_person,
    choose_person_parity,
    network_input,
    people,
)
from tests.preprocess.conftest import disc_frame
from tests.preprocess.tiny_networks import build_pose

SIZE = (1280, 720)  # x doubles from 640-space, y grows by 1.125


def rows(*given) -> np.ndarray:
    table = np.zeros((300, 6), np.float32)
    if given:
        table[: len(given)] = given
    return table


def corners(box: Box | None) -> tuple[float, ...] | None:
    return box and (box.x1, box.y1, box.x2, box.y2)


def test_boxes_are_scaled_to_the_frame_and_parity_cuts_them_to_whole_pixels():
    table = rows((100.3, 80, 200.3, 400, 0.9, 0))
    assert corners(choose_person(table, SIZE)) == pytest.approx((200.6, 90, 400.6, 450), abs=1e-3)
    # 200.6 → 200; position and size are cut, not the far corner: 200 + 200
    assert corners(choose_person_parity(table, SIZE)) == (200, 90, 400, 450)


def test_parity_cuts_what_float32_makes_of_a_size():
    """2 x (457.4 - 106.9) is 701 in float32 and 700.99998 in float64; 1.125 x (505.6 - 297.6) 233.99997 and 234."""
    x1, y1, x2, y2 = corners(choose_person_parity(rows((106.9, 297.6, 457.4, 505.6, 0.9, 0)), SIZE))
    assert (x1, y1) == (213, 334)
    assert (x2 - x1, y2 - y1) == (701, 233)


def test_nobody():
    assert choose_person(rows(), SIZE) is None
    assert choose_person_parity(rows(), SIZE) is None
    dog = rows((0, 0, 300, 300, 0.9, 16))
    assert choose_person(dog, SIZE) is None
    assert choose_person_parity(dog, SIZE) is None


def test_a_better_surfboard_deletes_its_surfer_only_in_parity():
    table = rows((100, 100, 200, 300, 0.9, 37), (100, 100, 200, 300, 0.8, 0))
    assert choose_person_parity(table, SIZE) is None
    assert choose_person(table, SIZE).score == pytest.approx(0.8)


def test_a_score_of_six_percent_is_a_person_only_in_parity():
    table = rows((10, 10, 100, 300, 0.95, 0), (200, 0, 600, 640, 0.06, 0))
    assert choose_person_parity(table, SIZE).score == pytest.approx(0.06)
    assert choose_person(table, SIZE).score == pytest.approx(0.95)
    assert choose_person(rows((200, 0, 600, 640, 0.2, 0)), SIZE) is None
    assert choose_person_parity(rows((200, 0, 600, 640, 0.04, 0)), SIZE) is None


def test_duplicates_fall_to_the_better_score_and_the_largest_of_the_rest_wins():
    table = rows((100, 100, 200, 300, 0.9, 0), (95, 95, 205, 305, 0.5, 0), (400, 100, 460, 200, 0.95, 0))
    assert choose_person(table, SIZE).score == pytest.approx(0.9)  # IoU of the first two is .87
    assert choose_person_parity(table, SIZE).score == pytest.approx(0.9)


def test_everybody_is_listed_the_surest_first():
    table = rows(
        (10, 10, 60, 110, 0.5, 0), (300, 10, 400, 310, 0.9, 0), (305, 12, 400, 308, 0.6, 0), (0, 0, 9, 9, 0.9, 2)
    )
    found = people(table, (640, 640))
    assert [box.score for box in found] == pytest.approx([0.9, 0.5])
    assert choose_person(table, (640, 640)) == found[0]
    assert people(rows(), (640, 640)) == []


def test_overlap_centre_and_height_by_hand():
    a, b = Box(0, 0, 10, 20, 1), Box(5, 10, 15, 30, 1)
    assert a.overlap(b) == pytest.approx(50 / 350)
    assert a.overlap(Box(20, 0, 30, 20, 1)) == 0
    assert (b.centre, b.height, a.area) == ((10, 20), 20, 200)


def test_the_running_maximum_of_the_official_scan():
    """Square frame. Long sides 400 (30 wide: 12000), 150 (100 wide: 15000, under .4 * 400 = 160), 170 (90 wide: 15300).

    By falling score: the thin one is taken first and 400 stays the maximum, 150 is passed over, 170 is larger and wins.
    """
    thin, short, tall = (0, 0, 30, 400, 0.9, 0), (100, 0, 200, 150, 0.8, 0), (300, 0, 390, 170, 0.7, 0)
    assert choose_person_parity(rows(thin, short, tall), (640, 640)).area == 15300
    assert choose_person_parity(rows(thin, short), (640, 640)).area == 12000
    assert choose_person(rows(thin, short), (640, 640)).area == 15000  # ours: the largest, shape aside


def test_our_boxes_stay_inside_the_frame():
    assert corners(choose_person(rows((-20, -20, 700, 650, 0.9, 0)), SIZE)) == (0, 0, 1280, 720)


def test_the_look_up_table_is_the_official_division():
    assert (np.float32(np.arange(256, dtype=np.float64) / 255.0) == UNIT).all()


def test_input_is_stretched_rgb_in_unit_range():
    frame = np.zeros((100, 300, 3), np.uint8)
    frame[:, :150] = (255, 0, 51)
    image = network_input(frame)
    assert image.shape == (3, 640, 640)
    assert image.dtype == np.float32
    assert image[:, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert not image[:, :, 330:].any()  # stretched to the full width, half of it


def test_input_can_be_made_in_place():
    frame = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    batch = np.full((2, 3, 640, 640), np.nan, np.float32)
    assert network_input(frame, batch[1]).base is batch
    assert (batch[1] == network_input(frame)).all()
    assert np.isnan(batch[0]).all()


def test_the_older_output_layout_says_the_same():
    old = np.zeros((1, 84, 8400), np.float32)
    old[0, :4, 7] = (150, 200, 100, 300)  # centre and size
    old[0, 4 + 16, 7] = 0.3
    old[0, 4, 7] = 0.8
    row = _as_rows(old)[0, 7]
    assert row.tolist() == pytest.approx([100, 50, 200, 350, 0.8, 0])


def test_a_network_finds_the_disc(networks):
    detector = Detector.load(networks[0])
    found = detector.rows([disc_frame((60, 64)), disc_frame(None), disc_frame((130, 40))])
    boxes = [choose_person(r, (192, 128)) for r in found]
    assert boxes[1] is None
    assert corners(boxes[0]) == pytest.approx((40, 44, 81, 85), abs=1)
    assert corners(boxes[2]) == pytest.approx((110, 20, 151, 61), abs=1)


def test_another_model_under_this_name_is_told_apart(tmp_path):
    with pytest.raises(WeightsCorrupt, match=r"640.*is needed.*another model"):
        Detector.load(build_pose(tmp_path / "yolov10m.onnx"))
