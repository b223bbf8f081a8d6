"""YOLOX: cells worked by hand, the letterbox there and back, and a network that truly finds something."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.preprocess.networks.yolov10 import choose_person, choose_person_parity, people
from runner.preprocess.networks.yolox import CELLS, YoloxDetector, network_input, person_rows
from tests.preprocess.tiny_dwpose import build_simcc, build_yolox, coloured_frame
from tests.preprocess.tiny_networks import build_detector

SQUARE = (640, 640)  # letterbox, stretched space and frame are one
FIRST = {8: 0, 16: 6400, 32: 8000}


def candidates(*given: tuple[int, dict[int, float]], decoded: bool = False) -> np.ndarray:
    """[8400, 85] with everything about its own cell and no score, but for `given`: (row, {column: value})."""
    table = np.zeros((8400, 85), np.float32)
    table[:, :2] = 0.5
    if decoded:
        table[:, :2] = (CELLS[:, :2] + 0.5) * CELLS[:, 2:]
        table[:, 2:4] = CELLS[:, 2:]
    for row, values in given:
        table[row, list(values)] = list(values.values())
    return table


def raw(stride: int, column: int, line: int, width: float, height: float, **scores: float) -> tuple[int, dict]:
    """A candidate at a quarter and three quarters of a cell, sizes in pixels."""
    row = FIRST[stride] + line * (640 // stride) + column
    values = {0: 0.25, 1: 0.75, 2: np.log(width / stride), 3: np.log(height / stride)}
    return row, values | {4: scores.get("sure", 1.0), 5: scores.get("person", 0.9), 6: scores.get("bicycle", 0.0)}


@pytest.mark.parametrize(
    ("stride", "column", "line", "centre"),
    [
        (8, 0, 0, (2, 6)),
        (8, 79, 79, (634, 638)),
        (8, 10, 50, (82, 406)),
        (16, 0, 0, (4, 12)),
        (16, 39, 1, (628, 28)),
        (32, 0, 0, (8, 24)),
        (32, 19, 0, (616, 24)),
        (32, 7, 11, (232, 376)),
    ],
)
def test_a_cell_of_each_grid(stride, column, line, centre):
    """Row by row, 80x80 cells, then 40x40, then 20x20; (cell + offset) * stride, e^log * stride."""
    row = person_rows(candidates(raw(stride, column, line, 20, 44)), SQUARE)
    x, y = centre
    assert row.shape == (1, 6)
    assert row[0] == pytest.approx([x - 10, y - 22, x + 10, y + 22, 0.9, 0], abs=1e-3)


def test_an_export_that_decodes_says_the_same():
    table = candidates((8000, {0: 8, 1: 24, 2: 20, 3: 44, 4: 1, 5: 0.9}), decoded=True)
    from_raw = person_rows(candidates(raw(32, 0, 0, 20, 44)), SQUARE)
    assert person_rows(table, SQUARE) == pytest.approx(from_raw, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 3))
def test_the_two_kinds_are_told_apart_whatever_the_background_says(seed, spread):
    """Boxes up to several cells from their own, of any size: one answer for the same boxes, written either way."""
    rng = np.random.default_rng(seed)
    table = candidates(raw(16, 20, 20, 100, 200))
    known = table[:, 4] == 0
    table[known, :4] += spread * rng.standard_normal((known.sum(), 4)).astype(np.float32)
    decoded = table.copy()
    decoded[:, :2] = (table[:, :2] + CELLS[:, :2]) * CELLS[:, 2:]
    decoded[:, 2:4] = np.exp(table[:, 2:4]) * CELLS[:, 2:]
    assert person_rows(table, SQUARE) == pytest.approx(person_rows(decoded, SQUARE), abs=1e-2)
    assert person_rows(table, SQUARE)[0, :2] == pytest.approx([324 - 50, 332 - 100], abs=1e-2)


def test_a_score_is_objectness_times_person_and_other_classes_do_not_matter():
    table = candidates(
        raw(8, 10, 10, 40, 40, sure=0.5, person=0.8),  # 0.4
        raw(8, 40, 40, 40, 40, sure=0.5, person=0.59),  # 0.295: below 0.3
        raw(8, 70, 70, 40, 40, sure=0.9, person=0.0, bicycle=1.0),
        raw(8, 10, 70, 40, 40, sure=0.9, person=0.5, bicycle=0.95),  # a cyclist
    )
    rows = person_rows(table, SQUARE)
    assert rows[:, 4] == pytest.approx([0.45, 0.4])
    assert rows[:, 5].tolist() == [0, 0]


def test_suppression_at_045():
    """100 wide, moved by 38: 62 / 138 = 0.449; by 37: 63 / 137 = 0.460."""
    for moved, left in ((38, 2), (37, 1)):
        table = candidates(
            (8000, {0: 10, 1: 10, 2: np.log(100 / 32), 3: np.log(100 / 32), 4: 1, 5: 0.9}),
            (8001, {0: 9 + moved / 32, 1: 10, 2: np.log(100 / 32), 3: np.log(100 / 32), 4: 1, 5: 0.8}),
        )
        assert len(person_rows(table, SQUARE)) == left


def test_nobody_and_not_a_number():
    assert person_rows(candidates(), SQUARE).shape == (0, 6)
    assert person_rows(np.full((8400, 85), np.nan, np.float32), SQUARE).shape == (0, 6)


def test_input_is_bgr_at_the_top_left_on_grey():
    frame = np.zeros((100, 300, 3), np.uint8)
    frame[:] = (200, 100, 50)
    image = network_input(frame)
    assert image.shape == (3, 640, 640)
    assert image[:, 0, 0].tolist() == image[:, 212, 639].tolist() == [50, 100, 200]  # 640 / 300 * 100 = 213.3
    assert (image[:, 213:] == 114).all()
    tall = network_input(frame.transpose(1, 0, 2))
    assert tall[:, 639, 212].tolist() == [50, 100, 200]
    assert (tall[:, :, 213:] == 114).all()


@pytest.mark.parametrize("size", [(1920, 1080), (1080, 1920), (640, 640), (333, 1000), (97, 31), (4000, 3)])
def test_the_letterbox_is_undone(size):
    """A box at the corners of the frame's picture is the whole frame again, whatever was cut to whole pixels."""
    filled = network_input(np.zeros((size[1], size[0], 3), np.uint8))[0] == 0
    height, width = filled.any(1).sum(), filled.any(0).sum()
    table = candidates(
        (8000, {0: width / 64, 1: height / 64, 2: np.log(width / 32), 3: np.log(height / 32), 4: 1, 5: 1})
    )
    rows = person_rows(table, size)
    assert rows[0, :4] == pytest.approx([0, 0, 640, 640], abs=1e-3)
    (box,) = people(rows, size)
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((0, 0, *size), abs=0.01)


@pytest.mark.parametrize(("batch", "decoded"), [("batch", False), (1, False), ("batch", True)])
def test_a_network_finds_people_in_frames_of_any_shape(tmp_path, batch, decoded):
    detector = YoloxDetector.load(build_yolox(tmp_path / "yolox_l.onnx", batch, decoded))
    assert detector.network.description["batch"] == (batch if batch == 1 else None)
    for size in ((640, 360), (360, 640), (96, 72)):
        width, height = size
        red, green = (width // 3, height // 3), (width // 2, 2 * height // 3)
        frames = [coloured_frame(size, [red, green]), coloured_frame(size, []), coloured_frame(size, [green])]
        rows = detector.rows(frames)
        assert rows.shape == (3, 1, 6)
        assert rows.dtype == np.float32
        both, nobody, one = (choose_person(r, size) for r in rows)
        assert nobody is None
        assert choose_person_parity(rows[1], size) is None
        expected = (red[0] - 8, red[1] - 8, green[0] + 9, green[1] + 9)
        assert (both.x1, both.y1, both.x2, both.y2) == pytest.approx(expected, abs=1.2)
        assert one.centre == pytest.approx((green[0] + 0.5, green[1] + 0.5), abs=0.6)
        assert both.score == pytest.approx(0.9)
        whole = choose_person_parity(rows[0], size)  # cuts position and size to whole pixels
        assert (whole.x1, whole.y1, whole.x2, whole.y2) == pytest.approx((both.x1, both.y1, both.x2, both.y2), abs=2)


def test_no_frame_has_anybody(tmp_path):
    detector = YoloxDetector.load(build_yolox(tmp_path / "yolox_l.onnx"))
    rows = detector.rows([coloured_frame((64, 48), [])] * 2)
    assert rows.shape == (2, 0, 6)
    assert choose_person(rows[0], (64, 48)) is None
    assert choose_person_parity(rows[0], (64, 48)) is None


def test_missing_and_mistaken_files(tmp_path):
    with pytest.raises(WeightsMissing, match=r"yolox_l\.onnx"):
        YoloxDetector.load(tmp_path / "yolox_l.onnx")
    for build in (build_detector, build_simcc):
        with pytest.raises(WeightsCorrupt, match=r"8400, 85.*is needed.*another model"):
            YoloxDetector.load(build(tmp_path / "yolox_l.onnx"))
    (tmp_path / "cut.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsCorrupt, match="LFS"):
        YoloxDetector.load(tmp_path / "cut.onnx")
