"""Inspection: the schema of the facts on one driving video, as `inspect --json` prints them.

In:   plain values from the verb `inspect`. Out: a model that serialises to JSON and exports its JSON Schema.
Never: how a video is inspected. Sizes are pixels of the video as it is shown; frames are counted from 0; times are
seconds after the first frame appears.

    python -m runner.records.inspection schemas/    writes the schema that is in the repository
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from runner.records.record import Record, schemas, write_schemas

__all__ = [
    "AdviceRecord",
    "CutRecord",
    "Inspection",
    "LookRecord",
    "PersonRecord",
    "RepeatsRecord",
    "StillRecord",
    "VideoRecord",
    "inspection_schemas",
]


class LookRecord(Record):
    """The place of a person in one inspected frame."""

    frame: int = Field(ge=0)
    box: tuple[float, float, float, float] = Field(description="x1, y1, x2, y2, pixels")


class PersonRecord(Record):
    """One person of the video. `preprocess.subject` takes the number."""

    number: int = Field(ge=1, description="1: the person that is followed unless a job names another")
    seconds: float = Field(
        ge=0, description="time on screen: inspected frames with this person, times the seconds between them"
    )
    begin_s: float = Field(ge=0, description="time of the first inspected frame with this person")
    end_s: float = Field(ge=0, description="time of the last one")
    face_px: float | None = Field(description="longer side of the face, brows to chin, median; null: no face was seen")
    sharpness: float | None = Field(
        description="variance of the Laplacian of the person's box at 256 pixels, grey levels², median"
    )
    hands_inside: float | None = Field(
        description="share of the inspected frames in which both wrists are inside the picture, 0 to 1"
    )
    fingers_seen: float | None = Field(
        description="share of the inspected frames in which more than half of the points of each hand are found; "
        "other points are not drawn for the generator"
    )
    feet_inside: float | None = Field(description="as hands_inside, of both feet")
    looks: list[LookRecord] = Field(description="in order of time")


class CutRecord(Record):
    frame: int = Field(ge=1, description="the first frame of the new scene")
    at_s: float


class StillRecord(Record):
    """A span in which the picture does not change."""

    begin_s: float
    end_s: float


class RepeatsRecord(Record):
    """Frames repeat regularly: the video was made at another rate than it is stored at."""

    frames_per_picture: float = Field(ge=1)
    pictures_per_s: float
    fps: str = Field(description="the rate to sample at, e.g. 15 or 24000/1001")
    start_s: float = Field(description="where to begin, so that most pictures are seen")
    covered: float = Field(ge=0, le=1, description="share of the different pictures that are seen then")


class VideoRecord(Record):
    """Facts that need no neural network."""

    frames: int = Field(ge=1)
    duration_s: float
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    rotation_degrees: int = Field(description="counter-clockwise, by which the container turns its frames upright")
    has_audio: bool
    fps: str = Field(description="what `fps: source` means, e.g. 24 or 30000/1001")
    fps_measured: float = Field(description="frames by the seconds that their timestamps span")
    variable_rate: bool
    frame_s_shortest: float = Field(description="from one frame to the next")
    frame_s_longest: float
    cuts: list[CutRecord]
    repeated_frames: int = Field(ge=0, description="that show the picture of the frame before")
    repeats: RepeatsRecord | None
    still: list[StillRecord]
    blur: float = Field(ge=0, le=1, description="0 sharp, 1 without edges (Crete et al. 2007), median over frames")


class AdviceRecord(Record):
    """One fact or recommendation. Codes are stable; texts are for people."""

    code: str
    text: str
    person: int | None = Field(description="number of the person that it is about; null: the video")
    numbers: dict[str, Any] = Field(description="what the text says, as numbers")


class Inspection(Record):
    """What `video-lab inspect VIDEO --json` prints."""

    schema_version: Literal[1] = 1
    source: str = Field(description="the video, as it was named")
    video: VideoRecord
    people_looked_for: bool = Field(description="false: no model store was named, so that `people` is empty")
    look_s: float | None = Field(description="seconds between two looks for people")
    people: list[PersonRecord] = Field(description="in order of their numbers")
    advice: list[AdviceRecord]
    sheet: str | None = Field(description="the PNG that was drawn; null: none was asked for")


def inspection_schemas() -> dict[str, dict[str, Any]]:
    """File name → JSON Schema (draft 2020-12)."""
    return schemas({"inspection": Inspection})


if __name__ == "__main__":
    write_schemas(inspection_schemas(), Path(sys.argv[1]))
