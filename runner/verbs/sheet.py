"""Sheet: one picture of a whole run. A band a job: the reference, then driver, pose and output at the same moments.

In:   jobs and the storage that holds their outputs, or pictures and their times. Out: one PNG. Never: records, ledgers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runner.batch.stop import Stop
from runner.errors import ConfigInvalid, RunnerError, as_runner_error
from runner.records.output_layout import OUTPUT, POSE, job_key
from runner.spec.manifest import Job
from runner.storage import Storage, fetch_input
from runner.storage.disk import os_errors, staged

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["CELL", "SheetRow", "cell_box", "contact_sheet", "draw_sheet", "job_row", "sheet_size", "try_draw_sheet"]

CELL = (120, 150)  # width and height that a picture is fitted into, pixels
_GAP, _GROUP_GAP, _MARGIN = 4, 16, 16
_HEADER, _TITLE, _CAPTION = 34, 24, 18  # heights of the lines of text
_PAPER, _MAT, _INK, _FAINT = (250, 250, 250), (226, 226, 228), (24, 24, 27), (110, 110, 116)
GROUPS = ("reference", "driver", "pose", "output")


@dataclass(frozen=True)
class SheetRow:
    """One job. `driver`, `pose` and `output` hold as many pictures as `times_s`; all are RGB uint8 [H, W, 3]."""

    label: str
    reference: np.ndarray
    times_s: Sequence[float]
    driver: Sequence[np.ndarray]
    pose: Sequence[np.ndarray]
    output: Sequence[np.ndarray]


def job_row(
    label: str, reference: Path, driver: Path, pose: Path, output: Path, *, start_s: float = 0.0, columns: int = 4
) -> SheetRow:
    """A row from a job's files: `columns` moments, evenly over the output.

    `start_s`: where in the driving video the output begins, seconds. Errors are those of reading: InputNotFound,
    InputUnreadable.
    """
    from PIL import Image, ImageOps

    from runner.video import VideoReader

    with VideoReader(output) as rendered, VideoReader(pose) as skeleton, VideoReader(driver) as dance:
        frames = np.linspace(0, rendered.info.frames - 1, columns).round().astype(np.int64)
        times_s = [float(i / rendered.info.fps) for i in frames]
        rate, last = float(dance.info.fps), dance.info.frames - 1
        driving = np.array([min(round((start_s + t) * rate), last) for t in times_s], np.int64)
        with Image.open(reference) as image:
            portrait = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        posed = np.minimum(frames, skeleton.info.frames - 1)
        return SheetRow(
            label, portrait, times_s, list(dance.read(driving)), list(skeleton.read(posed)), list(rendered.read(frames))
        )


def sheet_size(rows: int, columns: int) -> tuple[int, int]:
    """(width, height) in pixels of a sheet of `rows` jobs with `columns` moments each."""
    width = cell_box(0, len(GROUPS) - 1, columns - 1, columns)[2] + _MARGIN
    return width, cell_box(rows - 1, 0, 0, columns)[3] + _CAPTION + _MARGIN


def cell_box(row: int, group: int, column: int, columns: int) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) of one cell: job `row`, `group` of GROUPS, moment `column` of `columns`."""
    width, height = CELL
    x = _MARGIN
    if group:
        x += width + _GROUP_GAP + (group - 1) * (columns * (width + _GAP) - _GAP + _GROUP_GAP) + column * (width + _GAP)
    y = _MARGIN + _HEADER + row * (_TITLE + height + _CAPTION) + _TITLE
    return x, y, x + width, y + height


def contact_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """Write the sheet as a PNG. Raises ConfigInvalid without rows, or when rows differ in their number of moments."""
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ConfigInvalid("a contact sheet needs at least one job", where=path)
    columns = len(rows[0].times_s)
    for row in rows:
        counts = {
            "times": len(row.times_s),
            "driver": len(row.driver),
            "pose": len(row.pose),
            "output": len(row.output),
        }
        if set(counts.values()) != {columns}:
            raise ConfigInvalid(f"job {row.label}: {counts}, but the sheet has {columns} columns", where=path)

    sheet = Image.new("RGB", sheet_size(len(rows), columns), _PAPER)
    pen = ImageDraw.Draw(sheet)
    heading, title, small = (ImageFont.load_default(size) for size in (18, 15, 12))
    for group, name in enumerate(GROUPS):
        pen.text((cell_box(0, group, 0, columns)[0], _MARGIN), name, _FAINT, heading)
    for r, row in enumerate(rows):
        x, y, _, _ = cell_box(r, 0, 0, columns)
        room = sheet.width - 2 * _MARGIN
        pen.text((x, y - _TITLE + 2), _fitting(pen, printable(row.label, title), title, room), _INK, title)
        _place(sheet, row.reference, cell_box(r, 0, 0, columns))
        for group, pictures in enumerate((row.driver, row.pose, row.output), start=1):
            for c, picture in enumerate(pictures):
                box = cell_box(r, group, c, columns)
                _place(sheet, picture, box)
                pen.text((box[0], box[3] + 1), f"{row.times_s[c]:.2f} s", _FAINT, small)
    with staged(path) as file:
        sheet.save(file, format="PNG")


def _place(sheet: Image.Image, picture: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Fit a picture into a cell, centred on a mat, in its own aspect."""
    from PIL import Image, ImageOps

    size = (box[2] - box[0], box[3] - box[1])
    fitted = ImageOps.contain(Image.fromarray(picture), size, Image.Resampling.LANCZOS)
    sheet.paste(_MAT, box)
    sheet.paste(fitted, (box[0] + (size[0] - fitted.width) // 2, box[1] + (size[1] - fitted.height) // 2))


def printable(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text` with every character that `font` has no shape for written as its number: 贝 becomes <U+8D1D>."""
    if not hasattr(font, "getmask2"):  # Pillow without FreeType: a bitmap font of Latin-1
        return "".join(c if ord(c) < 256 else f"<U+{ord(c):04X}>" for c in text)
    missing = bytes(font.getmask("\U0010ffff"))  # a code point that never stands for anything

    def shown(character: str) -> str:
        drawn = bytes(font.getmask(character)) if character.isprintable() else missing
        return f"<U+{ord(character):04X}>" if drawn == missing else character

    return "".join(shown(c) for c in text)


def _fitting(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    """`text`, cut in its middle if it is wider than `room` pixels: the ends of an id tell the most."""
    kept = len(text)
    shown = text
    while pen.textlength(shown, font) > room and kept > 2:
        kept -= 1
        shown = text[: (kept + 1) // 2] + "..." + text[len(text) - kept // 2 :]
    return shown


def try_draw_sheet(jobs: Sequence[Job], storage: Storage, path: Path, scratch: Path, stop: Stop) -> str:
    """Where the sheet is, or why there is none: the jobs are done, and it is no reason to end as if they were not."""
    if stop.draining:
        return "contact sheet: not drawn, the run was stopped"
    try:
        with os_errors(path, writing=True):
            return draw_sheet(jobs, storage, path, scratch)
    except Exception as error:
        return f"contact sheet: not drawn ({as_runner_error(error, where=path).message})"


def draw_sheet(jobs: Sequence[Job], storage: Storage, path: Path, scratch: Path) -> str:
    """Draw every MP4 of `jobs` that is there, whenever it was rendered; where to look, or why there is nothing."""
    rows, without = [], []
    for job in jobs:
        if storage.exists(job_key(job.id, OUTPUT)):
            try:
                rows.append(_sheet_row(job, storage, scratch / "sheet" / job.id))
            except RunnerError:  # an input or a preview that is gone since
                without.append(job.id)
    if not rows:
        return "contact sheet: no MP4 to draw"
    contact_sheet(rows, path)
    return f"contact sheet: {path}" + (f", without {', '.join(without)}: files are missing" if without else "")


def _sheet_row(job: Job, storage: Storage, folder: Path) -> SheetRow:
    folder.mkdir(parents=True)
    for name in (OUTPUT, POSE):
        storage.fetch(job_key(job.id, name), folder / name)
    reference = fetch_input(job.reference, folder / "reference")
    driver = fetch_input(job.video, folder / "driver")
    start_s = job.options.start_s
    return job_row(job.id, reference, driver, folder / POSE, folder / OUTPUT, start_s=start_s)
