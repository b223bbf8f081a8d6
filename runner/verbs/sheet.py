"""Sheet: draws one picture of a whole run, one row per job: reference; driver, pose and output at the same times.

In:   jobs, their results, the storage of their outputs; or pictures and their times. Out: one PNG. Never: rendering.

A failed job shows its error instead of pictures; a job that is not rendered yet shows a note.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runner.batch.ledger import Ledger
from runner.batch.stop import Stop
from runner.errors import ConfigInvalid, InputNotFound, RunnerError, as_runner_error
from runner.records.output_layout import FRAMES, OUTPUT, POSE, is_frame, job_key
from runner.records.record import JobLine
from runner.redact import redact
from runner.spec.manifest import Job
from runner.storage import Storage, fetch_input
from runner.storage.disk import os_errors, staged
from runner.storage.roots import check_inside

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "ALARM",
    "CELL",
    "FAINT",
    "INK",
    "MAT",
    "PAPER",
    "SheetRow",
    "cell_box",
    "contact_sheet",
    "draw_sheet",
    "fitting",
    "job_row",
    "printable",
    "sheet_size",
    "try_draw_sheet",
]

CELL = (120, 150)  # width and height of a picture's cell, pixels
_GAP, _GROUP_GAP, _MARGIN = 4, 16, 16
_HEADER, _TITLE, _CAPTION = 34, 24, 18  # heights of the lines of text
PAPER, MAT, INK, FAINT = (250, 250, 250), (226, 226, 228), (24, 24, 27), (110, 110, 116)
ALARM = (185, 28, 28)
_LINE = 17  # height of a line of a message, pixels
COLUMNS = 4  # moments of a job
GROUPS = ("reference", "driver", "pose", "output")


@dataclass(frozen=True)
class SheetRow:
    """One job. `driver`, `pose` and `output` hold as many pictures as `times_s`; all are RGB uint8 [H, W, 3].

    A row without pictures has a `message`: a heading, e.g. an error's code, and a text.
    """

    label: str
    reference: np.ndarray | None  # None: it cannot be read
    times_s: Sequence[float] = ()
    driver: Sequence[np.ndarray] = ()
    pose: Sequence[np.ndarray] = ()
    output: Sequence[np.ndarray] = ()
    message: tuple[str, str] | None = None


def job_row(
    label: str, reference: Path, driver: Path, pose: Path, output: Path, *, start_s: float = 0.0, columns: int = COLUMNS
) -> SheetRow:
    """Return a row from a job's files: `columns` moments, spread evenly over the output, an MP4.

    `start_s`: time of the driving video at which the output begins, seconds. Raises InputNotFound, InputUnreadable.
    """
    from runner.video import VideoReader

    with VideoReader(output) as rendered:
        frames = _moments(rendered.info.frames, columns)
        shown, fps = list(rendered.read(frames)), rendered.info.fps
    return _row_of_frames(label, reference, driver, pose, frames, shown, fps, start_s)


def _moments(frames: int, columns: int) -> np.ndarray:
    """Return the numbers of `columns` frames, spread evenly over all `frames`: int64 [columns]."""
    return np.linspace(0, frames - 1, columns).round().astype(np.int64)


def _row_of_frames(
    label: str,
    reference: Path,
    driver: Path,
    pose: Path,
    frames: np.ndarray,
    shown: Sequence[np.ndarray],
    fps: Fraction,
    start_s: float,
) -> SheetRow:
    """Return a row. `shown`: the frames of the output with the numbers `frames`; its rate is `fps`."""
    from PIL import Image, ImageOps

    from runner.video import VideoReader

    times_s = [float(i / fps) for i in frames]
    with VideoReader(pose) as skeleton, VideoReader(driver) as dance:
        rate, last = float(dance.info.fps), dance.info.frames - 1
        driving = np.array([min(round((start_s + t) * rate), last) for t in times_s], np.int64)
        with Image.open(reference) as image:
            portrait = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        pose_rate, last_pose = float(skeleton.info.fps), skeleton.info.frames - 1  # of the generated frames
        posed = np.array([min(math.floor(t * pose_rate + 1e-6), last_pose) for t in times_s], np.int64)
        return SheetRow(label, portrait, times_s, list(dance.read(driving)), list(skeleton.read(posed)), shown)


def sheet_size(rows: int, columns: int) -> tuple[int, int]:
    """Return (width, height) in pixels of a sheet of `rows` jobs with `columns` moments each."""
    width = cell_box(0, len(GROUPS) - 1, columns - 1, columns)[2] + _MARGIN
    return width, cell_box(rows - 1, 0, 0, columns)[3] + _CAPTION + _MARGIN


def cell_box(row: int, group: int, column: int, columns: int) -> tuple[int, int, int, int]:
    """Return (x1, y1, x2, y2) of one cell: job `row`, `group` of GROUPS, moment `column` of `columns`."""
    width, height = CELL
    x = _MARGIN
    if group:
        x += width + _GROUP_GAP + (group - 1) * (columns * (width + _GAP) - _GAP + _GROUP_GAP) + column * (width + _GAP)
    y = _MARGIN + _HEADER + row * (_TITLE + height + _CAPTION) + _TITLE
    return x, y, x + width, y + height


def contact_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """Write the sheet as a PNG. Raises ConfigInvalid without rows, or when rows differ in their number of moments.

    Rows with a message have no moments; they are as high as the others.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ConfigInvalid("a contact sheet needs at least one job", where=path)
    columns = next((len(row.times_s) for row in rows if row.message is None), COLUMNS)
    for row in rows:
        if row.message is not None:
            continue
        counts = {
            "times": len(row.times_s),
            "driver": len(row.driver),
            "pose": len(row.pose),
            "output": len(row.output),
        }
        if set(counts.values()) != {columns}:
            raise ConfigInvalid(f"job {row.label}: {counts}, but the sheet has {columns} columns", where=path)

    sheet = Image.new("RGB", sheet_size(len(rows), columns), PAPER)
    pen = ImageDraw.Draw(sheet)
    heading, title, small = (ImageFont.load_default(size) for size in (18, 15, 12))
    for group, name in enumerate(GROUPS):
        pen.text((cell_box(0, group, 0, columns)[0], _MARGIN), name, FAINT, heading)
    for r, row in enumerate(rows):
        x, y, _, _ = cell_box(r, 0, 0, columns)
        room = sheet.width - 2 * _MARGIN
        pen.text((x, y - _TITLE + 2), fitting(pen, printable(row.label, title), title, room), INK, title)
        if row.reference is not None:
            _place(sheet, row.reference, cell_box(r, 0, 0, columns))
        else:
            sheet.paste(MAT, cell_box(r, 0, 0, columns))
        if row.message is not None:
            _write(pen, row.message, cell_box(r, 1, 0, columns), room + _MARGIN, (title, small))
        for group, pictures in enumerate((row.driver, row.pose, row.output), start=1):
            for c, picture in enumerate(pictures):
                box = cell_box(r, group, c, columns)
                _place(sheet, picture, box)
                pen.text((box[0], box[3] + 1), f"{row.times_s[c]:.2f} s", FAINT, small)
    with staged(path) as file:
        sheet.save(file, format="PNG")


def _write(
    pen: ImageDraw.ImageDraw,
    message: tuple[str, str],
    box: tuple[int, int, int, int],
    right: int,
    fonts: Sequence[ImageFont.FreeTypeFont | ImageFont.ImageFont],
) -> None:
    """Write a heading and a text instead of pictures: from the left of `box` to `right`, as many lines as fit."""
    heading, text = message
    x, y, _, bottom = box
    title, small = fonts
    failed = bool(text)
    pen.text((x, y), fitting(pen, printable(heading, title), title, right - x), ALARM if failed else FAINT, title)
    lines: list[str] = []
    for word in printable(" ".join(text.split()), small).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, small) <= right - x:
            lines[-1] = longer
        else:
            lines.append(fitting(pen, word, small, right - x))
    room = (bottom - y - _TITLE) // _LINE
    if len(lines) > room:
        lines[room - 1 :] = ["..."]
    for number, line in enumerate(lines):
        pen.text((x, y + _TITLE + number * _LINE), line, INK, small)


def _place(sheet: Image.Image, picture: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Fit a picture into a cell, centred on a mat; its aspect ratio is kept."""
    from PIL import Image, ImageOps

    size = (box[2] - box[0], box[3] - box[1])
    fitted = ImageOps.contain(Image.fromarray(picture), size, Image.Resampling.LANCZOS)
    sheet.paste(MAT, box)
    sheet.paste(fitted, (box[0] + (size[0] - fitted.width) // 2, box[1] + (size[1] - fitted.height) // 2))


def printable(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return `text` with each character that `font` lacks replaced by its number: 贝 becomes <U+8D1D>."""
    if not hasattr(font, "getmask2"):  # Pillow without FreeType: a bitmap font of Latin-1
        return "".join(c if ord(c) < 256 else f"<U+{ord(c):04X}>" for c in text)
    missing = bytes(font.getmask("\U0010ffff"))  # a code point that is never assigned

    def shown(character: str) -> str:
        drawn = bytes(font.getmask(character)) if character.isprintable() else missing
        return f"<U+{ord(character):04X}>" if drawn == missing else character

    return "".join(shown(c) for c in text)


def fitting(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    """Return `text`, cut in its middle if it is wider than `room` pixels, because ids differ most at their ends."""
    kept = len(text)
    shown = text
    while pen.textlength(shown, font) > room and kept > 2:
        kept -= 1
        shown = text[: (kept + 1) // 2] + "..." + text[len(text) - kept // 2 :]
    return shown


def try_draw_sheet(
    jobs: Sequence[Job],
    lines: Sequence[JobLine],
    storage: Storage,
    path: Path,
    scratch: Path,
    stop: Stop,
    input_roots: Sequence[str] = (),
) -> str:
    """Draw the sheet. Return the sentence that names its place, or why there is none: an error here fails no job."""
    if stop.draining:
        return "contact sheet: not drawn, the run was stopped"
    try:
        with os_errors(path, writing=True):
            return draw_sheet(jobs, lines, storage, path, scratch, input_roots)
    except Exception as error:
        return f"contact sheet: not drawn ({as_runner_error(error, where=path).message})"


def draw_sheet(
    jobs: Sequence[Job],
    lines: Sequence[JobLine],
    storage: Storage,
    path: Path,
    scratch: Path,
    input_roots: Sequence[str] = (),
) -> str:
    """Draw one row per job. Return the sentence that names the sheet's place, or why there is none.

    `lines`: the results of this run. A job that did not fail shows its output, even of an earlier run. `input_roots`:
    if not empty, only files inside these roots are read.
    """
    ended = {line.id: line for line in lines}
    ledger = Ledger(storage)
    rows, without = [], []
    for job in jobs:
        folder = scratch / "sheet" / job.id
        folder.mkdir(parents=True)
        try:
            rows.append(_sheet_row(job, ended.get(job.id), ledger, folder, input_roots))
        except RunnerError:  # an input or a preview was removed meanwhile
            without.append(job.id)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if not rows:
        return "contact sheet: not drawn, there is no job to show"
    contact_sheet(rows, path)
    return f"contact sheet: {path}" + (f", without {', '.join(without)}: files are missing" if without else "")


def _sheet_row(job: Job, line: JobLine | None, ledger: Ledger, folder: Path, roots: Sequence[str]) -> SheetRow:
    """Return a job's row. Raises InputNotFound, InputUnreadable, storage.* for a missing picture of a rendered job."""
    storage, record = ledger.storage, ledger.result(job.id)
    error = line.error if line is not None and line.status == "failed" else None
    output = record.output if record is not None and record.status == "succeeded" else None
    frames = output if output is not None and output.key.startswith(job_key(job.id, FRAMES)) else None
    if error is None and (frames is not None or storage.exists(job_key(job.id, OUTPUT))):
        for name in (POSE,) if frames is not None else (OUTPUT, POSE):
            storage.fetch(job_key(job.id, name), folder / name)
        reference = fetch_input(check_inside(job.reference, roots), folder / "reference")
        driver = fetch_input(check_inside(job.video, roots), folder / "driver")
        start_s = job.options.start_s
        if frames is None:
            return job_row(job.id, reference, driver, folder / POSE, folder / OUTPUT, start_s=start_s)
        numbers, shown = _read_frames(storage, frames.key, folder)
        fps = Fraction(frames.fps)
        return _row_of_frames(job.id, reference, driver, folder / POSE, numbers, shown, fps, start_s)
    error = error or (record.error if record is not None else None)
    message = ("not rendered yet", "") if error is None else (error.code, redact(error.message))
    return SheetRow(job.id, _read_reference(job, folder, roots), message=message)


def _read_frames(storage: Storage, key: str, folder: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the numbers of COLUMNS frames of a folder of PNGs, and these frames. Raises InputNotFound without any."""
    from runner.preprocess.pictures.images import load_image

    keys = sorted(info.key for info in storage.list(key) if is_frame(info.key))
    if not keys:
        raise InputNotFound("has no frames", where=key)
    numbers = _moments(len(keys), COLUMNS)
    shown = []
    for number in numbers:
        storage.fetch(keys[number], folder / "frame.png")
        shown.append(np.asarray(load_image(folder / "frame.png")))
    return numbers, shown


def _read_reference(job: Job, folder: Path, roots: Sequence[str]) -> np.ndarray | None:
    from runner.preprocess.pictures.images import load_image

    try:
        return np.asarray(load_image(fetch_input(check_inside(job.reference, roots), folder / "reference")))
    except (RunnerError, OSError):  # it may be the reason why the job failed
        return None
