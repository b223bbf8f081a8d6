"""Alignment: finds frames that were dropped, repeated, inserted or moved, compared with the baseline's video.

In:   per-frame digests of both videos, or a thumbnail of each frame. Out: `Misalignment`s, in the order of the video.
Never: pixels of whole frames, files, limits.

Both sequences are aligned as texts are (edit distance): each frame has a partner in the other video, or none at the
cost of a gap. Only alignments near the diagonal are computed, so that the time is linear in the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.regression.findings import Misalignment

__all__ = ["align_digests", "align_thumbnails", "make_thumbnail", "thumbnail_shape"]

THUMBNAIL_PIXELS = 960  # 24x40, a byte each: 4 MB for 2,000 frames of two videos
ROWS = 256  # thumbnails compared at once: 1 MB as float32
REACH = 16  # frames by which one video may lead the other, beyond the difference of their lengths
LONGEST = 128  # frames; videos whose lengths differ by more are not aligned
DIGEST_GAP = 0.75  # cost of a gap; a changed frame costs 1: two gaps cost more than one changed frame, less than two
THUMBNAIL_NOISE = 0.5  # levels, root mean square; H.264 at crf 18 changes a thumbnail by less
FIT = 0.5  # of the usual motion; if aligned frames differ by more, the content differs and no alignment is reported
STANDS = 0.25  # of the baseline's motion; a frame that moves less repeats the frame before it
EQUAL = 0.5  # levels; a repeated frame differs by less after coding


def thumbnail_shape(width: int, height: int) -> tuple[int, int]:
    """Return (rows, columns) of the thumbnail of a frame of width x height pixels."""
    scale = min(1.0, (THUMBNAIL_PIXELS / (height * width)) ** 0.5)
    return max(1, int(height * scale)), max(1, int(width * scale))


def make_thumbnail(frame: np.ndarray) -> np.ndarray:
    """Return the grey thumbnail of uint8 [H, W, 3] RGB: uint8 [rows, columns], about THUMBNAIL_PIXELS pixels."""
    import cv2

    rows, columns = thumbnail_shape(frame.shape[1], frame.shape[0])
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    thumbnail: np.ndarray = cv2.resize(grey, (columns, rows), interpolation=cv2.INTER_AREA)
    return thumbnail


def align_digests(new: Sequence[str], baseline: Sequence[str]) -> list[Misalignment]:
    """Align two lists of per-frame digests. If most frames have no equal in the baseline, compare the lengths only."""
    return _align(_DigestPair(new, baseline))


def align_thumbnails(
    new: Sequence[np.ndarray] | np.ndarray, baseline: Sequence[np.ndarray] | np.ndarray
) -> list[Misalignment]:
    """Align two lists of thumbnails, uint8 [h, w] of one size. If the contents differ too much, compare lengths only.

    In a still passage all frames look alike, so that a missing frame is found only by the number of frames.
    """
    if not len(new) or not len(baseline):
        return _by_length(len(new), len(baseline))
    return _align(_ThumbnailPair(new, baseline))


class _DigestPair:
    """Two lists of digests, with distances 0 (equal) and 1."""

    def __init__(self, new: Sequence[str], baseline: Sequence[str]) -> None:
        names = {name: number for number, name in enumerate({*new, *baseline})}
        self.new, self.baseline = (np.array([names[name] for name in side], np.int64) for side in (new, baseline))
        self.gap = DIGEST_GAP

    def distances(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (self.new[i] != self.baseline[j]).astype(np.float64)

    def fits(self, i: np.ndarray, j: np.ndarray) -> bool:
        return bool(len(i)) and self.distances(i, j).mean() <= FIT

    def repeats(self, i: int, j: int | None) -> bool:
        """Return whether frame `i` repeats the frame before it, while the baseline's frame `j` does not."""
        if i == 0 or self.new[i] != self.new[i - 1]:
            return False
        return j is None or (j > 0 and bool(self.baseline[j] != self.baseline[j - 1]))

    def shows(self, i: int, j: int) -> bool:
        return bool(self.new[i] == self.baseline[j])


class _ThumbnailPair:
    """Two lists of thumbnails. Distances are root mean squares, in levels."""

    def __init__(self, new: Sequence[np.ndarray] | np.ndarray, baseline: Sequence[np.ndarray] | np.ndarray) -> None:
        self.new, self.baseline = (np.asarray(side).reshape(len(side), -1) for side in (new, baseline))
        count = min(len(new), len(baseline))
        every = np.arange(count)
        here = self.distances(every, every)
        for offset in (-1, 1):
            i = every[max(0, -offset) : count - max(0, offset)]
            here[i] = np.minimum(here[i], self.distances(i, i + offset))
        # The usual difference of frames that belong together; a gap must save several times as much.
        self.noise = max(THUMBNAIL_NOISE, float(np.median(here)))
        self.gap = 3 * self.noise
        self.motion = self._rms(self.baseline[1:], self.baseline[:-1])
        self.own = self._rms(self.new[1:], self.new[:-1])

    def distances(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return self._rms(self.new[i], self.baseline[j])

    def fits(self, i: np.ndarray, j: np.ndarray) -> bool:
        moving = self.motion[self.motion > THUMBNAIL_NOISE]
        if not len(i) or not len(moving):
            return False
        return float(np.median(self.distances(i, j))) <= FIT * float(np.median(moving))

    def repeats(self, i: int, j: int | None) -> bool:
        if i == 0 or self.own[i - 1] > EQUAL:
            return False
        return j is None or (j > 0 and bool(self.motion[j - 1] > max(THUMBNAIL_NOISE, self.own[i - 1] / STANDS)))

    def shows(self, i: int, j: int) -> bool:
        return float(self._rms(self.new[i], self.baseline[j])) <= 2 * self.noise

    @staticmethod
    def _rms(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """float32 of uint8 [..., pixels]; some rows at a time, for memory."""
        if one.ndim > 1 and len(one) > ROWS:
            spans = [slice(begin, begin + ROWS) for begin in range(0, len(one), ROWS)]
            return np.concatenate([_ThumbnailPair._rms(one[span], other[span]) for span in spans])
        return np.sqrt(np.square(one.astype(np.float32) - other.astype(np.float32)).mean(axis=-1))


@dataclass(frozen=True)
class _Pairing:
    """For each frame its partner in the other video, or -1."""

    of_new: np.ndarray
    of_baseline: np.ndarray


def _align(videos: _DigestPair | _ThumbnailPair) -> list[Misalignment]:
    count_new, count_baseline = len(videos.new), len(videos.baseline)
    if abs(count_new - count_baseline) > LONGEST:
        return _by_length(count_new, count_baseline)
    path = _cheapest_path(videos)
    matched = np.flatnonzero(path.of_new >= 0)
    if not videos.fits(matched, path.of_new[matched]):
        return _by_length(count_new, count_baseline)
    return _name_gaps(videos, _close_replacements(_settle_repeats(videos, path)))


def _by_length(new: int, baseline: int) -> list[Misalignment]:
    """Compare the lengths only: report the frames of the longer video after the end of the other one."""
    if new == baseline:
        return []
    kind, frame = ("inserted", baseline) if new > baseline else ("dropped", new)
    return [Misalignment(kind=kind, frame=frame, frames=abs(new - baseline))]


def _cheapest_path(videos: _DigestPair | _ThumbnailPair) -> _Pairing:
    """Return the alignment with the smallest sum of distances and gaps; of equal ones the nearest to the diagonal."""
    new, baseline = len(videos.new), len(videos.baseline)
    low, high = min(0, baseline - new) - REACH, max(0, baseline - new) + REACH
    offsets = np.arange(low, high + 1)  # cell (i, offset): `i` new and `i + offset` baseline frames are aligned so far
    match = np.full((new, len(offsets)), np.inf, np.float32)
    for column, offset in enumerate(offsets.tolist()):
        frames = np.arange(max(0, -offset), min(new, baseline - offset))
        if len(frames):
            match[frames, column] = videos.distances(frames, frames + offset)
    slope = videos.gap * np.arange(len(offsets))
    before = np.where((offsets >= 0) & (offsets <= baseline), videos.gap * offsets, np.inf)
    inserts = np.zeros((new, len(offsets)), bool)  # the new frame has no partner
    drops = np.zeros((new + 1, len(offsets)), bool)  # the cell is reached from the left: the baseline frame has none
    drops[0] = offsets > 0
    for i in range(new):
        matched = before + match[i]
        inserted = np.append(before[1:], np.inf) + videos.gap
        inserts[i] = inserted < matched
        reached = np.minimum(matched, inserted)
        reached[(offsets + i + 1 < 0) | (offsets + i + 1 > baseline)] = np.inf
        before = np.minimum.accumulate(reached - slope) + slope
        before[(offsets + i + 1 < 0) | (offsets + i + 1 > baseline)] = np.inf
        drops[i + 1] = before < reached - 1e-6
    of_new, of_baseline = np.full(new, -1), np.full(baseline, -1)
    i, column = new, int(np.flatnonzero(offsets == baseline - new)[0])
    while i > 0 or offsets[column] > 0:
        if drops[i, column]:
            column -= 1
        elif inserts[i - 1, column]:
            i, column = i - 1, column + 1
        else:
            i -= 1
            of_new[i], of_baseline[i + offsets[column]] = i + offsets[column], i
    return _Pairing(of_new, of_baseline)


def _settle_repeats(videos: _DigestPair | _ThumbnailPair, path: _Pairing) -> _Pairing:
    """Give the partner to the first of equal frames; remove the partner of a still frame where the baseline moves."""
    of_new, of_baseline = path.of_new.copy(), path.of_baseline.copy()
    for i in range(len(of_new) - 2, -1, -1):
        if of_new[i] < 0 <= of_new[i + 1] and videos.repeats(i + 1, None):
            of_new[i], of_new[i + 1] = of_new[i + 1], -1
            of_baseline[of_new[i]] = i
    for i, j in enumerate(of_new.tolist()):
        if j >= 0 and videos.repeats(i, j):
            of_new[i] = of_baseline[j] = -1
    return _Pairing(of_new, of_baseline)


def _close_replacements(path: _Pairing) -> _Pairing:
    """Pair unpaired frames between the same partners: they have changed, and were neither dropped nor inserted."""
    of_new, of_baseline = path.of_new.copy(), path.of_baseline.copy()
    i = j = 0
    while i < len(of_new) or j < len(of_baseline):
        end_i, end_j = i, j
        while end_i < len(of_new) and of_new[end_i] < 0:
            end_i += 1
        while end_j < len(of_baseline) and of_baseline[end_j] < 0:
            end_j += 1
        if (pairs := min(end_i - i, end_j - j)) > 0:
            of_new[i : i + pairs] = np.arange(j, j + pairs)
            of_baseline[j : j + pairs] = np.arange(i, i + pairs)
        i, j = end_i + 1, end_j + 1
    return _Pairing(of_new, of_baseline)


def _name_gaps(videos: _DigestPair | _ThumbnailPair, path: _Pairing) -> list[Misalignment]:
    named: list[tuple[str, int]] = []  # kind, frame
    dropped = np.flatnonzero(path.of_baseline < 0).tolist()
    for i, partner in enumerate(path.of_new.tolist()):
        j = None if partner < 0 else partner
        if videos.repeats(i, j):
            named.append(("repeated", i))
        elif j is None:
            moved = next((frame for frame in dropped if videos.shows(i, frame)), None)
            if moved is None:
                named.append(("inserted", i))
            else:
                dropped.remove(moved)
                named.append(("moved", moved))
    named += [("dropped", frame) for frame in dropped]
    return _join_neighbours(named)


def _join_neighbours(named: list[tuple[str, int]]) -> list[Misalignment]:
    """Return one `Misalignment` for consecutive frames of one kind, ordered by the frame."""
    runs: list[list] = []  # kind, first frame, frames
    for kind, frame in sorted(named, key=lambda entry: (entry[0], entry[1])):
        if runs and runs[-1][0] == kind and runs[-1][1] + runs[-1][2] == frame:
            runs[-1][2] += 1
        else:
            runs.append([kind, frame, 1])
    runs.sort(key=lambda run: run[1])
    return [Misalignment(kind=kind, frame=frame, frames=frames) for kind, frame, frames in runs]
