"""Poses: pass 1 over a driving video: choose the person, find the box and the pose in every sampled frame.

In:   an open video and the numbers of its sampled frames, networks, options. Out: `FoundPoses`. Never: the reference.

The video is decoded once, window by window; a thread decodes the next windows. The detector runs on some frames, the
looks. The pose network follows one window behind, with boxes interpolated between looks. The person is chosen only
after the whole clip was seen. So these boxes are a guess, made only where one person is visible. If the choice gives a
picture another box, or if it was skipped, its pose is found in a second decode. The result equals that of two passes.

Boxes are interpolated between ten looks a second. Next to a look that misses the subject, or at which another person
comes or goes, the detector also runs on the frames between, so that the change is exact to the frame.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog

from runner.errors import NoPerson
from runner.preprocess.body.face import FacePlan, plan_faces
from runner.preprocess.body.keypoints import FACE, PoseTrack, hold_lost_bodies
from runner.preprocess.body.people_found import PeopleFound, choose_numbered, count_people
from runner.preprocess.body.repair import body_heights, repair
from runner.preprocess.body.smooth import smooth_joints
from runner.preprocess.body.track import Person, Whereabouts, choose_subject, follow, only_body, whereabouts
from runner.preprocess.geometry import Geometry, frames_at_once
from runner.preprocess.networks.backends import PersonDetector, PointFinder
from runner.preprocess.networks.yolov10 import Box, choose_person_parity, people
from runner.preprocess.pose_batches import PoseBatches
from runner.spec.options import PreprocessOptions
from runner.timing import StageTimer
from runner.video import Sampled, VideoReader

__all__ = ["LOOK_S", "ClipPictures", "FoundPoses", "find_poses"]

AHEAD = 2  # windows decoded in advance
LOOKS_AT_ONCE = 4  # frames decoded together, with network inputs of 5 MB each; DETECTOR_BATCH of them run together
LOOK_S = 0.1  # default time between looks: for so long a dancer's box moves nearly on a straight line
CLEARINGS = 3  # rounds of looking at unclear frames: each round may find new unclear ones
SAY_EVERY_S = 5.0  # between log lines with the progress of pass 1
GUESSES = 4  # windows after which guessing stops if it rarely succeeds
FEW = 16  # pictures: a person found in fewer, and in less than LEAST_SHARE, is a passer-by or a mistake
LEAST_SHARE = 0.1
RARE = 0.5  # if the person is found in less than this share of the looks, there is a warning

T = TypeVar("T")
Guess = Callable[[np.ndarray, list[T]], list[Box | None] | None]


@dataclass(frozen=True, eq=False)
class FoundPoses:
    """The driving person in each sampled frame, in pixels of the networks' frames."""

    track: PoseTrack
    faces: FacePlan
    report: dict[str, Any]  # counts of sampled frames; counts of repairs are of different pictures
    warnings: list[str]
    present: np.ndarray  # bool [frames]: the detector found the person, or did at the looks before and after


def find_poses(
    reader: VideoReader,
    sampled: Sampled,
    options: PreprocessOptions,
    geometry: Geometry,
    detector: PersonDetector,
    pose: PointFinder,
    timer: StageTimer,
    everybody: PeopleFound | None = None,
) -> FoundPoses:
    """Find the person and the poses in the clip. A frame that is sampled twice is processed once.

    everybody: the people of the whole video, needed if `subject` is a number (in parity mode it has no effect).
    Raises NoPerson if no person is found, if the person is found in too few frames, or if there is none at `subject`.
    """
    clip = ClipPictures(reader, sampled, geometry, timer)
    if options.parity:
        return _in_parity(clip, options, detector, pose)
    return _at_full_strength(clip, options, detector, pose, everybody)


class ClipPictures:
    """The different pictures among the sampled frames, as the networks get them; without `geometry` as decoded."""

    def __init__(self, reader: VideoReader, sampled: Sampled, geometry: Geometry | None, timer: StageTimer) -> None:
        self._reader, self._geometry, self.timer = reader, geometry, timer
        self.path = reader.info.path
        self.size = self._native = reader.info.width, reader.info.height
        indices = np.asarray(sampled.indices, np.int64)
        self.indices, self.first, self.back = np.unique(indices, return_index=True, return_inverse=True)
        self.fps = float(sampled.fps)
        self._said_at = time.monotonic()
        self.times_s = self.first / self.fps

    def __len__(self) -> int:
        return len(self.indices)

    def windows(self, chosen: np.ndarray, most: int = 16) -> Generator[np.ndarray, None, None]:
        """Yield uint8 [≤ most, H, W, 3] of the pictures `chosen` (ascending). A thread decodes the next ones."""
        native = self._reader.windows(self.indices[chosen], frames_at_once(*self._native, most))
        done = 0
        for frames in _read_ahead(native, self.timer):
            if time.monotonic() - self._said_at >= SAY_EVERY_S:
                self._said_at = time.monotonic()
                log = structlog.get_logger()
                log.info("preprocessing", video=Path(self.path).name, frames=f"{done}/{len(chosen)}")
            done += len(frames)
            if self._geometry is not None and self._geometry.resize_first is not None:
                resized = np.stack([self._geometry.frame(frame) for frame in frames])
                self.size = resized.shape[2], resized.shape[1]
                yield resized
            else:
                yield frames

    def look(
        self,
        detector: PersonDetector,
        looks: np.ndarray,
        read: Callable[[np.ndarray, tuple[int, int]], T],
    ) -> list[T]:
        """Run the detector on the pictures `looks`. Returns `read(rows, size)` of each."""
        seen: list[T] = []
        for frames in self.windows(looks, LOOKS_AT_ONCE):
            seen += self._read(detector, frames, read)
        return seen

    def pose(self, posed: Posed, estimator: PointFinder, boxes: list[Box | None], *, bgr: bool) -> np.ndarray:
        """Return float32 [n, 133, 3]: the points in each picture's box. Those of `posed` in the same box are reused."""
        batches = PoseBatches(estimator, posed.points, bgr=bgr)
        todo = np.array([i for i, box in enumerate(boxes) if not posed.done[i] or posed.boxes[i] != box], np.int64)
        done = 0
        for frames in self.windows(todo):
            chosen = todo[done : done + len(frames)]
            with self.timer.stage("pose"):
                batches.add(chosen, frames, [boxes[i] for i in chosen])
            done += len(frames)
        with self.timer.stage("pose"):
            batches.finish()
        return posed.points

    def look_and_pose(
        self,
        detector: PersonDetector,
        estimator: PointFinder,
        looks: np.ndarray,
        read: Callable[[np.ndarray, tuple[int, int]], T],
        guess: Guess[T],
        *,
        bgr: bool,
    ) -> tuple[list[T], Posed]:
        """In one decode, run the detector on the pictures `looks` and find poses in guessed boxes. Returns
        (`read(rows, size)` of each look, the poses).

        guess(pictures, seen): the boxes of pictures, from the looks up to the first one after them; or None.
        """
        n = len(self)
        seen, posed = list[T](), Posed.nothing(n)
        batches = PoseBatches(estimator, posed.points, bgr=bgr)
        if np.diff(looks, append=n).max() > 2 * frames_at_once(*self._native):  # too many to keep until the next look
            return self.look(detector, looks, read), posed
        windows = self.windows(np.arange(n))
        waiting: deque[tuple[np.ndarray, np.ndarray]] = deque()  # pictures and frames
        made = tried = start = 0
        for window in windows:
            waiting.append((np.arange(start, start + len(window)), window))
            start += len(window)
            chosen = looks[len(seen) : np.searchsorted(looks, start)] - (start - len(window))
            if len(chosen):
                seen += self._read(detector, [window[i] for i in chosen], read)
            while waiting and (start == n or waiting[0][0][-1] <= looks[len(seen) - 1]):
                pictures, frames = waiting.popleft()
                boxes = guess(pictures, seen)
                made, tried = made + (boxes is not None), tried + 1
                if boxes is not None:
                    with self.timer.stage("pose"):
                        batches.add(pictures, frames, boxes)
                    posed.note(pictures, boxes)
            if tried >= GUESSES and 2 * made < tried and start < n:
                windows.close()
                seen += self.look(detector, looks[len(seen) :], read)
                break
        with self.timer.stage("pose"):
            batches.finish()
        return seen, posed

    def _read(
        self,
        detector: PersonDetector,
        frames: Sequence[np.ndarray] | np.ndarray,
        read: Callable[[np.ndarray, tuple[int, int]], T],
    ) -> list[T]:
        with self.timer.stage("detect"):
            return [read(rows, (frames[0].shape[1], frames[0].shape[0])) for rows in detector.rows(list(frames))]


@dataclass(frozen=True, eq=False)
class Posed:
    """Points, and the boxes in which they were found."""

    points: np.ndarray  # float32 [n, 133, 3]
    boxes: list[Box | None]
    done: np.ndarray  # bool [n]

    @classmethod
    def nothing(cls, n: int) -> Posed:
        return cls(np.zeros((n, 133, 3), np.float32), [None] * n, np.zeros(n, bool))

    def note(self, pictures: np.ndarray, boxes: list[Box | None]) -> None:
        """Note that the points of these pictures are found, or will be before they are read."""
        self.done[pictures] = True
        self.boxes[pictures[0] : pictures[-1] + 1] = boxes


def _at_full_strength(
    clip: ClipPictures,
    options: PreprocessOptions,
    detector: PersonDetector,
    pose: PointFinder,
    numbered: PeopleFound | None,
) -> FoundPoses:
    every = options.detect_every or max(1, round(LOOK_S * clip.fps))
    looks = np.arange(0, len(clip), every)
    if options.detect_every is None and looks[-1] < len(clip) - 1:
        looks = np.append(looks, len(clip) - 1)

    def guess(pictures: np.ndarray, seen: list[list[Box]]) -> list[Box | None] | None:
        return _alone(pictures, seen, looks, clip.times_s)

    seen, posed = clip.look_and_pose(detector, pose, looks, people, guess, bgr=False)
    everybody, where = _decide(clip, options, looks, seen, numbered)
    for _ in range(CLEARINGS if options.detect_every is None else 0):
        more = _unclear(clip, looks, everybody, where)
        if not len(more):
            break
        found = dict(zip([*looks.tolist(), *more.tolist()], seen + clip.look(detector, more, people), strict=True))
        looks, seen = np.array(sorted(found), np.int64), [found[look] for look in sorted(found)]
        every = 1  # next to unclear looks, so in the frames that matter
        everybody, where = _decide(clip, options, looks, seen, numbered)
    if where is None:
        _check(len(looks), sum(bool(boxes) for boxes in seen), clip, every)
        raise _nobody_there(options, seen, clip, numbered)
    _check(where.looked, where.found, clip, every)
    points = clip.pose(posed, pose, where.boxes, bgr=False)
    points[where.doubtful, :, 2] = 0  # another person stands there
    box_heights = np.array([box.height if box else 0.0 for box in where.boxes])
    heights = body_heights(points, box_heights, clip.times_s)
    repaired = repair(points, clip.times_s, heights)
    points = smooth_joints(repaired.points, clip.times_s, heights) if options.smooth else repaired.points
    faces = plan_faces(points[:, FACE], *clip.size, times_s=clip.times_s)
    report = {
        "frames_without_person": int(where.unseen[clip.back].sum()),
        "frames_bridged": where.bridged,
        "people": count_people(everybody, clip.times_s[looks], len(clip) / clip.fps),
        "people_at_once": max(len(boxes) for boxes in seen),
        "joints_repaired": repaired.joints,
        "frames_repaired": repaired.frames,
        "frames_sides_exchanged": repaired.flipped,
    }
    warnings = []
    if where.found < RARE * where.looked:
        warnings.append(
            f"The person was found in only {where.found} of the {where.looked} frames in which the detector ran; "
            "in the others the last or next place is used, and the drawn pose may be wrong."
        )
    return _found(clip, points, faces, report, warnings, ~where.unseen)


def _decide(
    clip: ClipPictures,
    options: PreprocessOptions,
    looks: np.ndarray,
    seen: list[list[Box]],
    numbered: PeopleFound | None,
) -> tuple[list[Person], Whereabouts | None]:
    """Return (all tracklets, the subject's box in every picture; None if there is no subject)."""
    times_s = clip.times_s[looks]
    everybody = follow(seen, times_s)
    if isinstance(options.subject, int):
        assert numbered is not None
        subject = choose_numbered(everybody, options.subject, numbered, clip.indices[looks])
    else:
        subject = choose_subject(everybody, options.subject, clip.size, times_s)
    return everybody, None if subject is None else whereabouts(subject, seen, looks, clip.times_s)


def _unclear(clip: ClipPictures, looks: np.ndarray, everybody: list[Person], where: Whereabouts | None) -> np.ndarray:
    """Return the skipped pictures, int64, next to an unclear look: the subject is not seen there or is doubtful, or
    another person comes or goes, who may have moved too far to be recognised.

    If the subject is found rarely, return all skipped pictures: the result is then close to an error, which should not
    come from too few looks.
    """
    if where is None or where.found < RARE * where.looked:
        unclear = np.ones(len(looks), bool)
    else:
        unclear = (where.unseen | where.doubtful)[looks]
        for person in everybody:
            for look, box in ((person.looks[0], person.boxes[0]), (person.looks[-1], person.boxes[-1])):
                subject = where.boxes[looks[look]]
                if 0 < look < len(looks) - 1 and subject is not None and only_body([subject, box]) is None:
                    unclear[look] = True
    pictures = np.arange(len(clip))
    before = np.searchsorted(looks, pictures, side="right") - 1
    after = np.minimum(np.searchsorted(looks, pictures), len(looks) - 1)
    return np.flatnonzero((looks[before] != pictures) & (unclear[before] | unclear[after]))


def _in_parity(
    clip: ClipPictures, options: PreprocessOptions, detector: PersonDetector, pose: PointFinder
) -> FoundPoses:
    every = options.detect_every or 1

    def held(pictures: np.ndarray, seen: list[Box | None]) -> list[Box | None]:
        return [seen[i // every] for i in pictures]

    looks = np.arange(0, len(clip), every)
    seen, posed = clip.look_and_pose(detector, pose, looks, choose_person_parity, held, bgr=True)
    _check(len(looks), sum(box is not None for box in seen), clip, every=FEW)  # one is enough, as in the official code
    boxes = held(np.arange(len(clip)), seen)
    unseen = np.zeros(len(clip), bool)
    unseen[looks] = [box is None for box in seen]
    # Holding a lost body depends on the order of frames only, and a repeated frame repeats its result.
    points = hold_lost_bodies(clip.pose(posed, pose, boxes, bgr=True))
    faces = plan_faces(points[:, FACE], *clip.size, parity=True)
    warnings = []
    if options.smooth or options.subject != "largest":
        warnings.append("preprocess.subject and preprocess.smooth have no effect with preprocess.parity.")
    report = {"frames_without_person": int(unseen[clip.back].sum())}
    return _found(clip, points, faces, report, warnings, ~unseen)


def _found(
    clip: ClipPictures,
    points: np.ndarray,
    faces: FacePlan,
    report: dict[str, Any],
    warnings: list[str],
    present: np.ndarray,
) -> FoundPoses:
    """Expand the results for different pictures to the sampled frames."""
    shown = faces.repeated(clip.first, clip.back)
    report |= {"frames_face_held": shown.held, "face_seen": shown.seen}
    if not shown.seen:
        warnings.append("No face was seen in the whole clip: the expression is not driven.")
    return FoundPoses(PoseTrack(points[clip.back], *clip.size), shown, report, warnings, present[clip.back])


def _alone(
    pictures: np.ndarray, seen: list[list[Box]], looks: np.ndarray, times_s: np.ndarray
) -> list[Box | None] | None:
    """Return the boxes of neighbouring pictures that show exactly one person; None if they show more, or no one."""
    first = int(np.searchsorted(looks, pictures[0], side="right")) - 1
    last = min(int(np.searchsorted(looks, pictures[-1])), len(seen) - 1)
    around = seen[first : last + 1]
    alone = [box for boxes in around if (box := only_body(boxes)) is not None]
    if len(alone) < len(around):
        return None
    begin, end = int(looks[first]), max(int(pictures[-1]), int(looks[last])) + 1
    person = Person(list(range(len(alone))), alone)
    boxes = whereabouts(person, around, looks[first : last + 1] - begin, times_s[begin:end]).boxes
    return boxes[pictures[0] - begin : pictures[-1] + 1 - begin]


def _check(looked: int, found: int, clip: ClipPictures, every: int) -> None:
    """Raise NoPerson if a person was found in too few frames."""
    least = -(-FEW // every)
    todo = "Give a video in which one person is well visible; check start_s"
    if not found:
        raise NoPerson(f"no person was found in any of the {looked} searched frames", where=clip.path, todo=todo)
    if found < least and found < LEAST_SHARE * looked:
        raise NoPerson(
            f"a person was found in only {found} of the {looked} searched frames ({100 * found / looked:.1f} %)",
            where=clip.path,
            todo=todo,
        )


def _nobody_there(
    options: PreprocessOptions, seen: list[list[Box]], clip: ClipPictures, numbered: PeopleFound | None
) -> NoPerson:
    if isinstance(options.subject, int):
        assert numbered is not None
        person = numbered.people[options.subject - 1]
        return NoPerson(
            f"person {person.number} is not on screen in the rendered part of the video, but from "
            f"second {person.begin_s:.1f} to {person.end_s:.1f}",
            where=clip.path,
            todo="Check start_s and max_frames, or choose another preprocess.subject: `video-lab inspect VIDEO` shows "
            "all people with their times",
        )
    first = next(boxes for boxes in seen if boxes)
    places = ", ".join(f"[{b.x1:.0f}, {b.y1:.0f}, {b.x2:.0f}, {b.y2:.0f}]" for b in first)
    subject = options.subject if isinstance(options.subject, str) else [round(corner) for corner in options.subject]
    return NoPerson(
        f"there is no person at preprocess.subject ({subject}); in the first frame with people they are at {places}",
        where=clip.path,
        todo=f"Give one of these boxes, in pixels of the {clip.size[0]}x{clip.size[1]} video, or largest or centre",
    )


def _read_ahead(windows: Iterator[np.ndarray], timer: StageTimer) -> Iterator[np.ndarray]:
    """Yield the same windows. A thread decodes the next ones while one is in use."""

    def decode() -> np.ndarray | None:
        with timer.stage("decode"):
            return next(windows, None)

    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        ahead: deque[Future[np.ndarray | None]] = deque(pool.submit(decode) for _ in range(AHEAD))
        try:
            while (window := ahead.popleft().result()) is not None:
                ahead.append(pool.submit(decode))
                yield window
        finally:
            for waiting in ahead:
                waiting.cancel()
