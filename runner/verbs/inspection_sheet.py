"""Inspection sheet: draws one picture of a driving video: its facts, a row per person, frames with numbered boxes.

In:   an open video, its inspection, its people. Out: one PNG. Never: finding people, judging.

Frames are spread over the video. From each stretch the frame with the most people is shown, and both sides of a cut.
People have the colours of Okabe and Ito (2008), which colour-blind people can distinguish. A label beside each box
has the person's number, as has the person's row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runner.records.inspection import Inspection, PersonRecord
from runner.storage.disk import os_errors, staged
from runner.verbs.sheet import ALARM, FAINT, INK, MAT, PAPER, fitting, printable
from runner.video import VideoReader

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from runner.preprocess.body.people_found import PeopleFound

__all__ = ["choose_moments", "draw_inspection_sheet", "facts_line", "measures", "person_colour"]

Colour = tuple[int, int, int]
# Vermillion, sky blue, yellow, bluish green, reddish purple, orange, blue.
COLOURS: tuple[Colour, ...] = (
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (0, 114, 178),
)
SHOWN_CUTS = 3  # number of first cuts of which both sides are shown
WIDE = 1.2  # aspect ratio; a wider video has fewer columns
GRIDS = {True: (4, 12), False: (5, 10)}  # whether the video is wide → columns, moments at most
SHEET_WIDTH = 1200  # pixels, between the margins
CELL_HEIGHT = 300  # of a picture at most, pixels
GAP, MARGIN, LINE, CAPTION = 10, 20, 24, 24
HEADING_SIZE, TEXT_SIZE, LABEL_SIZE = 18, 15, 16  # of fonts, pixels


@dataclass(frozen=True)
class Moment:
    """A frame of the sheet."""

    frame: int
    after_cut: bool = False


def choose_moments(
    frames: int, looks: Sequence[int], counts: Sequence[int], cuts: Sequence[int], moments: int
) -> list[Moment]:
    """Choose at most `moments` frames of a video of `frames`, in order of time; at least both sides of the first cuts.

    looks: frames in which people were looked for, increasing (empty: any frame may be chosen); counts: number of people
    in each. The first and the last frame of a scene are chosen from the looks of that scene, if there are any.
    """
    at, seen = (np.array(looks), np.array(counts)) if looks else (np.arange(frames), np.zeros(frames))
    bounds = [0, *cuts, frames]
    chosen: dict[int, Moment] = {}
    for cut in cuts[:SHOWN_CUTS]:
        scene = bounds.index(cut)
        before = at[(at >= bounds[scene - 1]) & (at < cut)]
        after = at[(at >= cut) & (at < bounds[scene + 1])]
        for moment in (
            Moment(int(before[-1]) if len(before) else cut - 1),
            Moment(int(after[0]) if len(after) else cut, after_cut=True),
        ):
            chosen[moment.frame] = Moment(moment.frame, moment.after_cut or chosen.get(moment.frame, moment).after_cut)
    left = max(0, moments - len(chosen))
    edges = np.linspace(0, frames, left + 1)
    for begin, end in pairwise(edges):
        inside = np.flatnonzero((at >= begin) & (at < end))
        inside = inside[[int(at[i]) not in chosen for i in inside]] if len(inside) else inside
        if not len(inside):
            continue
        middle = (begin + end) / 2
        best = min(inside, key=lambda i: (-seen[i], abs(at[i] - middle)))
        chosen[int(at[best])] = Moment(int(at[best]))
    return [chosen[frame] for frame in sorted(chosen)]


def person_colour(number: int) -> Colour:
    """Return the RGB colour of person `number`, from 1; after the last colour the first one follows."""
    return COLOURS[(number - 1) % len(COLOURS)]


def facts_line(inspection: Inspection) -> str:
    """Return size, length, rate, cuts and sound in one line."""
    video = inspection.video
    parts = [f"{video.width}x{video.height}", f"{video.frames} frames in {video.duration_s:.2f} s"]
    parts.append(f"{video.fps_measured:.5g} fps" + (", variable" if video.variable_rate else ""))
    parts += [f"rotated by {video.rotation_degrees}°"] if video.rotation_degrees else []
    cuts = len(video.cuts)
    parts.append(f"{cuts or 'no'} {'cut' if cuts == 1 else 'cuts'}")
    parts += [f"{video.repeated_frames} frames repeat"] if video.repeated_frames else []
    parts += [f"blur {video.blur:.2f}", "sound" if video.has_audio else "no sound"]
    return " · ".join(parts)


def measures(person: PersonRecord) -> dict[str, str]:
    """Return the measures of a person as cells of a table: column → text."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    return {
        "seconds": f"{person.seconds:.1f}",
        "from": f"{person.begin_s:.1f}",
        "to": f"{person.end_s:.1f}",
        "face px": "-" if person.face_px is None else f"{person.face_px:.0f}",
        "sharpness": "-" if person.sharpness is None else f"{person.sharpness:.0f}",
        "hands inside": share(person.hands_inside),
        "fingers seen": share(person.fingers_seen),
        "feet inside": share(person.feet_inside),
    }


def draw_inspection_sheet(
    reader: VideoReader, inspection: Inspection, found: PeopleFound | None, path: Path
) -> tuple[int, int]:
    """Write the sheet as a PNG; return its (width, height). Raises StorageDenied, StorageFull, InputUnreadable."""
    from PIL import Image, ImageDraw, ImageFont

    video = inspection.video
    looks = found.looks if found is not None else ()
    seen = Counter(look for person in found.people for look in person.looks) if found is not None else Counter[int]()
    counts = [seen[look] for look in looks]
    columns, most = GRIDS[video.width > WIDE * video.height]
    moments = choose_moments(video.frames, looks, counts, [cut.frame for cut in video.cuts], most)
    scale = min(((SHEET_WIDTH + GAP) // columns - GAP) / video.width, CELL_HEIGHT / video.height)
    cell = max(1, round(video.width * scale)), max(1, round(video.height * scale))
    rows = -(-len(moments) // columns)
    notes = [advice.text for advice in inspection.advice if advice.code in ("people.unknown", "people.none")]
    lines = 2 + (len(inspection.people) + 1 if inspection.people else len(notes))
    top = MARGIN + lines * LINE + 2 * GAP
    width = SHEET_WIDTH + 2 * MARGIN
    sheet = Image.new("RGB", (width, top + rows * (cell[1] + CAPTION + GAP) + MARGIN - GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    heading, text, label = (ImageFont.load_default(size) for size in (HEADING_SIZE, TEXT_SIZE, LABEL_SIZE))

    room = width - 2 * MARGIN
    name = fitting(pen, printable(Path(inspection.source).name, heading), heading, room)
    pen.text((MARGIN, MARGIN), name, INK, heading)
    pen.text((MARGIN, MARGIN + LINE), fitting(pen, facts_line(inspection), text, room), INK, text)
    _write_people(pen, inspection.people, MARGIN + 2 * LINE, (text, label))
    if not inspection.people:
        for number, note in enumerate(notes):
            pen.text((MARGIN, MARGIN + (2 + number) * LINE), fitting(pen, note, text, room), FAINT, text)

    starts_s = reader.starts_s
    for place, moment in enumerate(moments):
        row, column = divmod(place, columns)
        x, y = MARGIN + column * (cell[0] + GAP), top + row * (cell[1] + CAPTION + GAP)
        (frame,) = reader.read(np.array([moment.frame]))
        picture = Image.fromarray(frame).resize(cell, Image.Resampling.LANCZOS)
        if found is not None:
            _mark_people(picture, found, moment.frame, scale, label)
        sheet.paste(MAT, (x, y, x + cell[0], y + cell[1]))
        sheet.paste(picture, (x, y))
        caption = f"{starts_s[moment.frame]:.2f} s"
        pen.text((x, y + cell[1] + 3), caption, INK, text)
        if moment.after_cut:
            pen.line((x - GAP // 2, y, x - GAP // 2, y + cell[1]), ALARM, 3)
            pen.text((x + pen.textlength(caption, text) + 8, y + cell[1] + 3), "after a cut", ALARM, text)
    with os_errors(path, writing=True), staged(path) as file:
        sheet.save(file, format="PNG", optimize=True)
    return sheet.width, sheet.height


def _write_people(
    pen: ImageDraw.ImageDraw,
    people: Sequence[PersonRecord],
    y: int,
    fonts: tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, ImageFont.FreeTypeFont | ImageFont.ImageFont],
) -> None:
    """Write a heading and one row per person, in columns."""
    text, label = fonts
    cells = [measures(person) for person in people]
    x = float(MARGIN + 56)
    for row, person in enumerate(people, 1):
        _tag(pen, (MARGIN, y + row * LINE), person.number, label)
    for name in cells[0] if cells else ():
        pen.text((x, y), name, FAINT, text)
        for row, found in enumerate(cells, 1):
            pen.text((x, y + row * LINE), found[name], INK, text)
        x += max(pen.textlength(word, text) for word in (name, *(found[name] for found in cells))) + 24


def _mark_people(
    picture: Image.Image,
    found: PeopleFound,
    frame: int,
    scale: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Draw the boxes of all people in `frame`, the largest first, then the labels, so that no box covers a label."""
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    here = [(person.number, box) for person in found.people if (box := found.box_at(person, frame)) is not None]
    here.sort(key=lambda entry: -entry[1].height)
    corners = []
    for number, box in here:
        x1, x2 = (round(min(max(x * scale, 0), picture.width - 1)) for x in (box.x1, box.x2))
        y1, y2 = (round(min(max(y * scale, 0), picture.height - 1)) for y in (box.y1, box.y2))
        if x2 - x1 < 2 or y2 - y1 < 2:
            continue
        # Dark edges on both sides make the colour visible on any picture.
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=5)
        pen.rectangle((x1, y1, x2, y2), outline=person_colour(number), width=3)
        corners.append((number, x1, y1))
    taken: list[tuple[int, int, int, int]] = []
    for number, x1, y1 in corners:
        width, height = _tag_size(pen, number, font)
        x = max(0, min(x1, picture.width - width - 1))
        y = y1 - height if y1 >= height else max(0, min(y1, picture.height - height - 1))  # above the box, else in it
        while any(x < right and left < x + width and y < low and high < y + height for left, high, right, low in taken):
            y += height  # two people whose boxes begin at one corner
        taken.append((x, y, x + width, y + height))
        _tag(pen, (x, y), number, font)


def _tag_size(
    pen: ImageDraw.ImageDraw, number: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> tuple[int, int]:
    return round(pen.textlength(str(number), font)) + 12, LABEL_SIZE + 5


def _tag(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], number: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    """Draw the number on its colour; in black, or in white on a dark colour."""
    (x, y), (width, height) = corner, _tag_size(pen, number, font)
    colour = person_colour(number)
    red, green, blue = colour
    ink = (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 100 else (255, 255, 255)
    pen.rectangle((x, y, x + width, y + height), fill=colour, outline=(0, 0, 0))
    pen.text((x + width / 2, y + height / 2), str(number), ink, font, anchor="mm")
