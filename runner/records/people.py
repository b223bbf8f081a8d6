"""People: the schema of `people.json`: the boxes of the people in each frame of a rendered clip.

In:   boxes in pixels of the output. Out: a model that serialises to JSON, and the box in one frame of the output.
Never: how the boxes are found. 10,000 frames of one person take 360 KB of JSON, or 440 KB if all coordinates have four
digits.

A box is (x1, y1, x2, y2): whole pixels, x2 and y2 one beyond the last, inside the picture. Frames are counted from 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["People", "PersonBoxes", "PixelBox", "make_people"]

PixelBox = tuple[int, int, int, int]  # x1, y1, x2, y2
Side = Annotated[int, Field(ge=1)]
Ends = tuple[
    Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]


class PersonBoxes(BaseModel):
    """One person of the clip. Both lists have one entry per frame."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    number: int = Field(ge=1, description="1: the driving person")
    boxes: list[Ends | None] = Field(description="x1, y1, x2, y2 of the whole person; null where nothing is drawn")
    faces: list[Ends | None] = Field(description="the same of the face, without hair; null where it is not sure")


class People(BaseModel):
    """`jobs/<id>/people.json`: the boxes of the people that are drawn into the conditions of a job."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = 1
    width: Side = Field(description="of the output, pixels")
    height: Side
    fps: str = Field(pattern=r"^[1-9][0-9]*(/[1-9][0-9]*)?$", description="of the entries, e.g. 16 or 30000/1001")
    people: list[PersonBoxes] = Field(description="number 1 first; empty where no person is known")

    @model_validator(mode="after")
    def _check(self) -> People:
        lengths = {len(entries) for person in self.people for entries in (person.boxes, person.faces)}
        if len(lengths) > 1:
            raise ValueError(f"the lists of boxes have different lengths: {sorted(lengths)}")
        for person in self.people:
            for x1, y1, x2, y2 in (box for box in (*person.boxes, *person.faces) if box is not None):
                if not (x1 < x2 <= self.width and y1 < y2 <= self.height):
                    size = f"{self.width}x{self.height}"
                    raise ValueError(f"the box {(x1, y1, x2, y2)} is empty, or not inside a picture of {size}")
        return self

    @property
    def frames(self) -> int:
        """How many entries each list has; 0 without people."""
        return len(self.people[0].boxes) if self.people else 0

    def to_json(self) -> bytes:
        """Return the JSON to store: one line, without spaces."""
        return (json.dumps(self.model_dump(mode="json"), separators=(",", ":")) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> People:
        """Read what `to_json` returned. Raises ValueError for anything else."""
        return cls.model_validate_json(data)

    def person(self, frame: int, fps: Fraction | None = None) -> PixelBox | None:
        """Return the box of person 1 in frame `frame` (≥ 0) of the output; None if there is none.

        `fps`: the output's rate, if it may differ from the entries' rate; then the entry nearest in time counts. The
        last entry also counts for later frames. Raises IndexError for a negative frame.
        """
        return self._entry([person.boxes for person in self.people], frame, fps)

    def face(self, frame: int, fps: Fraction | None = None) -> PixelBox | None:
        """Return the same for the face of person 1."""
        return self._entry([person.faces for person in self.people], frame, fps)

    def resized(self, width: int, height: int) -> People:
        """Return the boxes for the same pictures at another size. Boxes grow to whole pixels."""
        if (width, height) == (self.width, self.height):
            return self
        scale = (width / self.width, height / self.height) * 2

        def boxes(entries: Sequence[PixelBox | None]) -> list[PixelBox | None]:
            ends = [None if box is None else [end * s for end, s in zip(box, scale, strict=True)] for box in entries]
            return _whole(ends, width, height)

        people = [
            PersonBoxes(number=person.number, boxes=boxes(person.boxes), faces=boxes(person.faces))
            for person in self.people
        ]
        return People(width=width, height=height, fps=self.fps, people=people)

    def _entry(self, lists: Sequence[Sequence[PixelBox | None]], frame: int, fps: Fraction | None) -> PixelBox | None:
        if frame < 0:
            raise IndexError(f"the frame number {frame} is negative")
        if not self.frames:
            return None
        entry_fps = Fraction(self.fps)
        seconds = frame / Fraction(fps or 1)
        index = frame if fps in (None, entry_fps) else math.floor(seconds * entry_fps + Fraction(1, 2))
        return lists[0][min(index, self.frames - 1)]


def make_people(boxes: np.ndarray, faces: np.ndarray, width: int, height: int, fps: Fraction) -> People:
    """Return the record of one person. boxes, faces: float [n, 4], x1 y1 x2 y2 in output pixels; NaN: none.

    Boxes grow to whole pixels and are clipped to the picture; one that lies outside or is infinite becomes null.
    """
    person = PersonBoxes(
        number=1,
        boxes=_whole([box if np.isfinite(box).all() else None for box in boxes], width, height),
        faces=_whole([box if np.isfinite(box).all() else None for box in faces], width, height),
    )
    return People(width=width, height=height, fps=str(fps), people=[person])


def _whole(boxes: Iterable[Sequence[float] | np.ndarray | None], width: int, height: int) -> list[PixelBox | None]:
    found: list[PixelBox | None] = []
    for box in boxes:
        if box is None:
            found.append(None)
            continue
        x1, y1, x2, y2 = (float(end) for end in box)
        left, right = max(0, math.floor(x1)), min(width, math.ceil(x2))
        top, bottom = max(0, math.floor(y1)), min(height, math.ceil(y2))
        found.append((left, top, right, bottom) if left < right and top < bottom else None)
    return found
