"""People search: number the people of a driving video, and measure how well each of them can be followed.

In:   an open video, a detector, a pose network, perhaps a cache. Out: `PeopleFound`. Never: jobs, references, printing.

The detector runs ten times a second over the whole file, whatever part or rate a job uses. So numbers are the same for
every job and for the sheet that shows them. A second, partial decode finds each person's pose at some of the looks.
Both results are kept in the pose cache, by the video's content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from runner.preprocess.body.keypoints import LEFT_HAND, RIGHT_HAND
from runner.preprocess.body.people_found import NumberedPerson, PeopleFound, number_people
from runner.preprocess.body.person_boxes import face_boxes
from runner.preprocess.body.skeleton import THRESHOLD
from runner.preprocess.geometry import frames_at_once
from runner.preprocess.networks.backends import Backend, PersonDetector, PointFinder
from runner.preprocess.networks.yolov10 import Box, people
from runner.preprocess.pose_cache import backend_parts, network_parts, video_parts
from runner.preprocess.poses import LOOK_S, ClipPictures
from runner.storage.disk_cache import DiskCache, key, remembered
from runner.timing import StageTimer
from runner.video import VideoReader

__all__ = ["SHARPNESS_HEIGHT", "find_people", "find_people_boxes", "numbering_parts", "sharpness"]

SHORT_S = 1.0  # in a shorter video the detector runs on every frame
MEASURED = 8  # looks at which a person's pose is found: with the large network a pose takes seconds on a CPU
SHARPNESS_HEIGHT = 256  # pixels that a person's box is scaled to
WRISTS = [9, 10]  # of COCO-WholeBody's 133 points
FINGER_POINTS = 11  # of the 21 of a hand: more than half of its drawn points
FOOT_POINTS = 2  # of 3: big toe, small toe, heel
FEET = (slice(17, 20), slice(20, 23))


def find_people_boxes(
    reader: VideoReader,
    detector: PersonDetector,
    *,
    cache: DiskCache | None = None,
    timer: StageTimer | None = None,
    parts: Mapping[str, Any] | None = None,
) -> PeopleFound:
    """Number the people of the whole video, without measurements. One decode, unless the result is in the cache.

    parts: `network_parts` of the detector, if known. Counts people_cache_hits and people_cache_misses.
    Raises InputTooShort for a video of one frame, InputUnreadable if a part of it is damaged.
    """
    timer = timer or StageTimer()
    sampled = reader.sample(1 / LOOK_S if reader.info.duration_s >= SHORT_S else "source")
    pictures = ClipPictures(reader, sampled, None, timer)

    def look() -> dict[str, np.ndarray]:
        return _packed(pictures.look(detector, np.arange(len(pictures)), people))

    if cache is None:
        arrays: Mapping[str, np.ndarray] = look()
    else:
        name = key(numbering_parts(reader, parts or network_parts(detector.network)))
        arrays = remembered(cache, name, look, timer, "people_cache")
    return number_people(_unpacked(arrays), pictures.indices.tolist(), pictures.times_s, pictures.size)


def find_people(
    reader: VideoReader, backend: Backend, *, cache: DiskCache | None = None, timer: StageTimer | None = None
) -> PeopleFound:
    """Number and measure the people of the whole video. Stages: decode, detect, pose.

    Each person's pose is found at up to MEASURED looks, evenly spread. Raises the errors of `find_people_boxes`.
    """
    timer = timer or StageTimer()
    parts = None if cache is None else backend_parts(backend)
    found = find_people_boxes(reader, backend.detector, cache=cache, timer=timer, parts=parts and parts["detector"])
    chosen = [_spread(person.looks) for person in found.people]

    def measure() -> dict[str, np.ndarray]:
        return {"measures": _measure(reader, backend.pose, found, chosen, timer)}

    if parts is None or cache is None:
        measures = measure()["measures"]
    else:
        name = key({"what": "measures of people", **video_parts(reader), "networks": parts})
        measures = remembered(cache, name, measure, timer, "people_cache")["measures"]
    return replace(
        found, people=tuple(_measured(*row) for row in zip(found.people, chosen, measures.tolist(), strict=True))
    )


def numbering_parts(reader: VideoReader, detector: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that decides the numbers of a video's people. detector: its `network_parts`."""
    return {"what": "people", **video_parts(reader), "networks": {"detector": dict(detector)}}


def sharpness(frame: np.ndarray, box: Box) -> float:
    """Return the variance of the Laplacian, grey levels² (0…255), of a box of uint8 RGB [H, W, 3].

    The box is scaled to SHARPNESS_HEIGHT first: this blurs a small person, as the generator's scaling does. 0 for a box
    without pixels.
    """
    height, width = frame.shape[:2]
    left, right = int(np.clip(box.x1, 0, width)), int(np.ceil(np.clip(box.x2, 0, width)))
    top, bottom = int(np.clip(box.y1, 0, height)), int(np.ceil(np.clip(box.y2, 0, height)))
    if right <= left or bottom <= top:
        return 0.0
    grey = cv2.cvtColor(frame[top:bottom, left:right], cv2.COLOR_RGB2GRAY)
    scale = SHARPNESS_HEIGHT / grey.shape[0]
    size = max(1, round(grey.shape[1] * scale)), SHARPNESS_HEIGHT
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def _spread(looks: Sequence[int]) -> list[int]:
    """Return at most MEASURED of the looks, evenly spread from the first to the last."""
    places = np.linspace(0, len(looks) - 1, min(MEASURED, len(looks))).round().astype(int)
    return [looks[place] for place in places]


def _measure(
    reader: VideoReader, pose: PointFinder, found: PeopleFound, chosen: Sequence[Sequence[int]], timer: StageTimer
) -> np.ndarray:
    """Return float64 [people, 5]: side of the face (NaN: no face), sharpness, and the shares of looks with both hands,
    with their fingers, and with both feet."""
    boxes = [
        dict(zip(person.looks, person.boxes, strict=True)) for person in found.people
    ]  # of each person, by frame number
    frames = np.unique(np.array([frame for looks in chosen for frame in looks], np.int64))
    points: list[list[np.ndarray]] = [[] for _ in found.people]
    sharp: list[list[float]] = [[] for _ in found.people]
    done = 0
    windows = reader.windows(frames, frames_at_once(*found.size))
    while True:
        with timer.stage("decode"):
            window = next(windows, None)
        if window is None:
            break
        here = frames[done : done + len(window)].tolist()
        done += len(window)
        for i, looks in enumerate(chosen):
            seen = [frame for frame in here if frame in looks]
            if seen:
                pictures = window[[here.index(frame) for frame in seen]]
                with timer.stage("pose"):
                    points[i] += list(pose.points(pictures, [boxes[i][frame] for frame in seen]))
                sharp[i] += [sharpness(picture, boxes[i][frame]) for picture, frame in zip(pictures, seen, strict=True)]
    rows = [_row(np.stack(poses), values, found.size) for poses, values in zip(points, sharp, strict=True)]
    return np.array(rows, np.float64).reshape(-1, 5)


def _row(points: np.ndarray, sharp: Sequence[float], size: tuple[int, int]) -> tuple[float, ...]:
    """Return the row of `_measure` for one person's points [n, 133, 3] and sharpness [n]."""
    faces = face_boxes(points, *size)
    sides = (faces[:, 2:] - faces[:, :2]).max(1)
    sides = sides[np.isfinite(sides)]
    inside = (points[..., 2] >= THRESHOLD) & ((points[..., :2] >= 0) & (points[..., :2] < size)).all(-1)
    fingers = [inside[:, hand].sum(1) >= FINGER_POINTS for hand in (LEFT_HAND, RIGHT_HAND)]
    feet = [inside[:, foot].sum(1) >= FOOT_POINTS for foot in FEET]
    return (
        float(np.median(sides)) if len(sides) else float("nan"),
        float(np.median(sharp)),
        float(inside[:, WRISTS].all(1).mean()),
        float((fingers[0] & fingers[1]).mean()),
        float((feet[0] & feet[1]).mean()),
    )


def _measured(person: NumberedPerson, looks: Sequence[int], measures: Sequence[float]) -> NumberedPerson:
    face, sharp, hands, fingers, feet = measures
    return replace(
        person,
        measured=tuple(looks),
        face_pixels=None if np.isnan(face) else face,
        sharpness=sharp,
        hands_inside=hands,
        fingers_seen=fingers,
        feet_inside=feet,
    )


def _packed(seen: Sequence[Sequence[Box]]) -> dict[str, np.ndarray]:
    """Pack boxes as counts int64 [looks] and boxes float64 [all, 5]: x1, y1, x2, y2, score."""
    rows = [(box.x1, box.y1, box.x2, box.y2, box.score) for boxes in seen for box in boxes]
    counts = np.array([len(boxes) for boxes in seen], np.int64)
    return {"counts": counts, "boxes": np.array(rows, np.float64).reshape(-1, 5)}


def _unpacked(arrays: Mapping[str, np.ndarray]) -> list[list[Box]]:
    """Inverse of `_packed`."""
    boxes = iter([Box(*row) for row in arrays["boxes"].tolist()])
    return [[next(boxes) for _ in range(count)] for count in arrays["counts"].tolist()]
