"""Sheet: every picture in its cell, in its aspect; labels that any id survives."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

import runner.verbs.run as run_verb
from runner.batch.loop import Engine
from runner.errors import ConfigInvalid
from runner.spec.manifest import parse_manifest
from runner.storage import open_storage
from runner.verbs.settings import RunSettings
from runner.verbs.sheet import CELL, SheetRow, cell_box, contact_sheet, draw_sheet, job_row, printable, sheet_size
from runner.video import Mp4Writer
from tests.stub_generator import StubGenerator


def flat(colour: tuple[int, int, int], width: int = 96, height: int = 144) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def row(label: str = "job", columns: int = 3, shade: int = 0) -> SheetRow:
    return SheetRow(
        label,
        flat((200, shade, 0)),
        [0.5 * c for c in range(columns)],
        [flat((0, 40 * c, shade), 144, 96) for c in range(columns)],
        [flat((10 * c, 255, shade)) for c in range(columns)],
        [flat((shade, 60, 20 * c)) for c in range(columns)],
    )


def test_each_picture_is_in_its_cell(tmp_path: Path) -> None:
    rows = [row("first", shade=10), row("second", shade=90)]
    contact_sheet(rows, tmp_path / "deep" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "deep" / "sheet.png"))
    assert sheet.shape[1::-1] == sheet_size(2, 3)
    for r, one in enumerate(rows):
        for group, pictures in enumerate(([one.reference], one.driver, one.pose, one.output)):
            for c, picture in enumerate(pictures):
                x1, y1, x2, y2 = cell_box(r, group, c, 3)
                assert (x2 - x1, y2 - y1) == CELL
                cell = sheet[y1:y2, x1:x2]
                shown = (cell == picture[0, 0]).all(axis=2)
                assert shown[CELL[1] // 2, CELL[0] // 2]
                high, wide = shown.any(axis=1).sum(), shown.any(axis=0).sum()
                assert wide / high == pytest.approx(picture.shape[1] / picture.shape[0], rel=0.03)
                assert wide == CELL[0] or high == CELL[1]


def test_cells_do_not_overlap() -> None:
    boxes = [cell_box(0, 0, 0, 4)] + [cell_box(r, g, c, 4) for r in range(2) for g in (1, 2, 3) for c in range(4)]
    covered = np.zeros(sheet_size(2, 4)[::-1], int)
    for x1, y1, x2, y2 in boxes:
        covered[y1:y2, x1:x2] += 1
    assert covered.max() == 1
    assert covered.sum() == len(boxes) * CELL[0] * CELL[1]  # none beyond the edge


@pytest.mark.parametrize("label", ["plain", "贝拉-samba", "a\nb\x07", "\U0001f483", "x" * 128])
def test_any_label_is_drawn_and_stays_in_its_line(tmp_path: Path, label: str) -> None:
    contact_sheet([row(label, columns=1)], tmp_path / "s.png")
    contact_sheet([row("", columns=1)], tmp_path / "blank.png")
    drawn, blank = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("s.png", "blank.png"))
    rows = np.flatnonzero((drawn != blank).any(axis=(1, 2)))
    top = cell_box(0, 0, 0, 1)[1]
    assert len(rows)
    assert top - 24 <= rows.min()
    assert rows.max() < top


def test_characters_without_a_shape_are_numbered() -> None:
    font = ImageFont.load_default(15)
    assert printable("anna-samba_07.v2", font) == "anna-samba_07.v2"
    assert printable("贝a", font) == "<U+8D1D>a"
    assert printable("a\tb", font) == "a<U+0009>b"


def test_rows_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="job second"):
        contact_sheet([row("first", columns=3), row("second", columns=2)], tmp_path / "s.png")
    with pytest.raises(ConfigInvalid, match="at least one"):
        contact_sheet([], tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_a_row_from_files_shows_the_same_moments(tmp_path: Path) -> None:
    """The driver's grey is its time: 24 fps, begun 0.5 s in; the output is 8 fps, its grey its frame."""

    def clip(name: str, greys: list[int], fps: int) -> Path:
        with Mp4Writer(tmp_path / name, 64, 64, Fraction(fps)) as writer:
            writer.write(np.stack([flat((g, g, g), 64, 64) for g in greys]))
        return tmp_path / name

    driver = clip("driver.mp4", [20 + 2 * i for i in range(72)], 24)
    pose = clip("pose.mp4", [30 + 8 * i for i in range(16)], 8)
    output = clip("output.mp4", [220 - 8 * i for i in range(16)], 8)
    Image.fromarray(flat((1, 2, 3), 40, 50)).save(tmp_path / "ref.png")
    made = job_row("job", tmp_path / "ref.png", driver, pose, output, start_s=0.5, columns=4)
    assert made.times_s == [0.0, 0.625, 1.25, 1.875]
    assert made.reference.shape == (50, 40, 3)

    def greys(pictures) -> list[float]:
        return [float(p.mean()) for p in pictures]

    assert greys(made.driver) == pytest.approx([20 + 2 * (12 + 15 * c) for c in range(4)], abs=3)
    assert greys(made.pose) == pytest.approx([30 + 8 * 5 * c for c in range(4)], abs=3)
    assert greys(made.output) == pytest.approx([220 - 8 * 5 * c for c in range(4)], abs=3)


def test_poses_of_a_doubled_rate_are_those_of_the_moment(tmp_path: Path) -> None:
    """The output has 16 frames a second, the preview of the poses 8; each frame's grey is its number's."""

    def clip(name: str, count: int, fps: int) -> Path:
        with Mp4Writer(tmp_path / name, 64, 64, Fraction(fps)) as writer:
            writer.write(np.stack([flat((20 + 6 * i,) * 3, 64, 64) for i in range(count)]))
        return tmp_path / name

    Image.fromarray(flat((1, 2, 3), 40, 50)).save(tmp_path / "ref.png")
    files = (clip("driver.mp4", 24, 8), clip("pose.mp4", 12, 8), clip("output.mp4", 23, 16))
    made = job_row("job", tmp_path / "ref.png", *files, columns=3)
    assert made.times_s == [0.0, 11 / 16, 22 / 16]
    assert [float(p.mean()) for p in made.pose] == pytest.approx([20 + 6 * n for n in (0, 5, 11)], abs=3)


@pytest.mark.parametrize("reference", [flat((200, 30, 0)), None])
def test_a_message_stands_in_the_place_of_pictures(tmp_path: Path, reference: np.ndarray | None) -> None:
    text = "a clip of 3 frames, and the job asks for 5. " * 30
    message = SheetRow("failed", reference, message=("input.too_short", text))
    contact_sheet([message, row("last", columns=2)], tmp_path / "s.png")
    sheet = np.asarray(Image.open(tmp_path / "s.png")).astype(int)
    assert sheet.shape[1::-1] == sheet_size(2, 2)
    x1, y1, x2, y2 = cell_box(0, 0, 0, 2)
    shown = (sheet[y1:y2, x1:x2] == (200, 30, 0)).all(axis=2)
    assert shown.any() == (reference is not None)
    left, top, _, bottom = cell_box(0, 1, 0, 2)
    drawn = (sheet[top - 24 : bottom + 18, left - 10 :] != sheet[0, 0]).any(axis=2)
    rows, columns = np.nonzero(drawn[24:])
    assert rows.max() < bottom - top, "not into the next row"
    assert left - 10 + columns.max() < sheet.shape[1] - 10, "not beyond the edge"
    assert rows.max() > 100, "as many lines as there is room for"
    red = (sheet[top : top + 20, left:] == (185, 28, 28)).all(axis=2)
    assert red.any(), "the code"


def sheet_of(monkeypatch, demo_media, tmp_path, jobs: dict[str, dict], **given) -> tuple[str, np.ndarray]:
    """What a run of the stub says of its sheet, and the sheet."""
    engine = Engine("stub", {"weights": "stub"}, StubGenerator)
    monkeypatch.setattr(run_verb, "build_engine", lambda *_: engine)
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    text = {"version": 1, "jobs": [{"id": name, **place, "prompt": "ok"} | job for name, job in jobs.items()]}
    manifest = parse_manifest(json.dumps(text), base=str(tmp_path), source="m.json")
    common = {"manifest": manifest, "out": str(tmp_path / "out"), "cache": tmp_path / "cache"}
    outcome = run_verb.run(RunSettings(**common, sheet=tmp_path / "sheet.png", **given))
    return str(outcome.sheet), np.asarray(Image.open(tmp_path / "sheet.png"))


def middle(sheet: np.ndarray, row: int, group: int, column: int) -> np.ndarray:
    x1, y1, x2, y2 = cell_box(row, group, column, 4)
    return sheet[(y1 + y2) // 2, (x1 + x2) // 2]


def test_a_run_s_sheet_has_a_row_for_every_job(monkeypatch, demo_media, tmp_path) -> None:
    """PNG frames as they are, failures with their error, and a job that is not rendered yet."""
    png = {"options": {"output": {"format": "png"}, "seed": 3}}
    jobs = {"mp4": {}, "png": png, "broken": {"prompt": "fail-prepare"}, "gone": {"reference": "none.png"}}
    said, sheet = sheet_of(monkeypatch, demo_media, tmp_path, jobs)
    assert said == f"contact sheet: {tmp_path / 'sheet.png'}"
    assert sheet.shape[1::-1] == sheet_size(4, 4)
    frames = sorted((tmp_path / "out/jobs/png/frames").glob("*/*.png"))
    assert len(frames) == 6
    for column, number in enumerate((0, 2, 3, 5)):
        frame = np.asarray(Image.open(frames[number]))
        assert np.abs(middle(sheet, 1, 3, column).astype(int) - frame[24, 32]).max() <= 1
    portrait = middle(sheet, 0, 0, 0)
    assert (middle(sheet, 2, 0, 0) == portrait).all(), "a failed job's reference"
    assert (middle(sheet, 3, 0, 0) == (226, 226, 228)).all(), "which is not there"
    for number in (2, 3):
        left, top, _, _ = cell_box(number, 1, 0, 4)
        assert (sheet[top : top + 20, left:] == (185, 28, 28)).all(axis=2).any()


def test_a_job_that_failed_before_shows_its_error_and_one_that_did_not_run_says_so(
    monkeypatch, demo_media, tmp_path
) -> None:
    jobs = {"broken": {"prompt": "fail-prepare"}, "new": {}}
    _, failed = sheet_of(monkeypatch, demo_media, tmp_path, jobs, only=["broken"])
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    manifest = parse_manifest(
        json.dumps({"version": 1, "jobs": [{"id": name, **place} for name in jobs]}), base=str(tmp_path), source="m"
    )
    said = draw_sheet(manifest.jobs, (), open_storage(tmp_path / "out"), tmp_path / "later.png", tmp_path / "scratch")
    assert said == f"contact sheet: {tmp_path / 'later.png'}"
    later = np.asarray(Image.open(tmp_path / "later.png"))
    assert later.shape[1::-1] == sheet_size(2, 4)
    end = cell_box(0, 0, 0, 4)[3]
    assert (later[:end] == failed[:end]).all(), "the same error"
    left, top, _, bottom = cell_box(1, 1, 0, 4)
    place = later[top:bottom, left:]
    assert (place != (250, 250, 250)).any() and not (place == (185, 28, 28)).all(axis=2).any()
