"""People found: the people of a driving video, numbered from 1, with where and when each of them was seen.

In:   everybody's way through a whole video, as `track.follow` gives it. Out: `PeopleFound`, and which of the people in a
part of the video has a number. Never: pixels, networks.

Number 1 is the person that `subject: largest` follows over the whole video; the others follow by the area of their
boxes, summed over the looks. Numbers are decided on the whole video, so that they are the same for every part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.preprocess.networks.yolov10 import Box

__all__ = ["NumberedPerson", "PeopleFound"]


@dataclass(frozen=True)
class NumberedPerson:
    """One person of a video. The measures are None until somebody measures them: see `find_people`."""

    number: int  # from 1
    looks: tuple[int, ...]  # frame numbers of the video, increasing: the looks at which they were seen
    boxes: tuple[Box, ...]  # one a look, pixels of the video
    seconds: float  # on screen: looks at which they were seen, times the seconds between looks
    begin_s: float  # the first look at which they were seen
    end_s: float  # the last one
    measured: tuple[int, ...] = ()  # frame numbers among `looks` at which they were posed; the measures are of these
    face_pixels: float | None = (
        None  # median of the longer side of the face's 68 points, pixels; None: no face was seen
    )
    sharpness: float | None = (
        None  # median variance of the Laplacian (grey 0…255) of the box at SHARPNESS_HEIGHT pixels
    )
    hands_inside: float | None = None  # share of `measured` at which both hands are seen inside the picture, 0…1
    feet_inside: float | None = None  # the same of both feet


@dataclass(frozen=True)
class PeopleFound:
    """Everybody in a video of whom more than a glimpse was seen."""

    people: tuple[NumberedPerson, ...]  # in order of their numbers; empty: nobody was seen
    size: tuple[int, int]  # width and height of the video, pixels
    looks: tuple[int, ...]  # frame numbers at which the detector looked, increasing
    look_s: float  # seconds between two looks
