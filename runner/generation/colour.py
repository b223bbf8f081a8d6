"""Colour: measure the colour drift of a job's segments, and correct it if the job asks for it.

In:   each segment's decoded frames, the frames from which it began, in replace mode the true background.
Out:  a DriftRecord; with `seam` or `anchor` corrected frames, and a corrected start of the next segment.
Never: models, files, frames of more than one segment; of earlier segments only a reduced picture and a mask are kept.

Pictures reduced to about 14,000 pixels are compared, pixel by pixel (`video/drift.py`). There are three pairs. The
overlap: the frames from which a window began, as published, and as the window decoded them again. The joint: still
pixels of the last published frames, and of the first new ones. The still pixels: those of the first segment, and the
same pixels of this one; in replace mode the driving video outside the mask, and the same pixels here. Each pair gives a
gain and an offset for each channel, by a robust fit.

A window continues the colours of the frames from which it began. These were corrected, so the window's colours include
the correction of the segment before. Therefore a fit at the joint is enough to continue the published frames. `seam` is
that fit: the overlap's fit, which uses all pixels before rounding, if it leaves no step at the joint, else the joint's
fit. The decoder makes a window's first frame from a separate latent frame. On the demo model its colours are 0.5 delta
E from those of the frames after it, and the overlap's fit made a step of 0.4 where there was none (measured,
`bench/colour_drift.py`). `anchor` begins with `seam` and changes to the fit of the still pixels within RAMP_FRAMES.

Frames are rounded to bytes when they are decoded, and a table of 256 levels for each channel corrects the bytes: still
pixels are known only after the last frame, and 81 frames at 480x832 in float32 would take 0.4 GB. The second rounding
adds at most half a level. The frames from which the next window begins are corrected as floats. Gains and offsets are
rounded as in the record, so that the last bits of different CPUs do not change the frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from runner.errors import InternalError
from runner.generation.protocol import DRIFT, ResumePoint
from runner.records.drift_record import ColourChange, ColourCorrection, DriftRecord, SegmentDriftRecord
from runner.spec.options import Colour
from runner.video.drift import STILL_SHARE, SegmentStatistics, fit_colour, reduce_picture

__all__ = [
    "GAIN_LIMITS",
    "OFFSET_LIMIT",
    "RAMP_FRAMES",
    "Correction",
    "SegmentColours",
    "TrueBackground",
    "correct_frames",
    "correct_pixels",
    "fit_correction",
    "ramp",
    "without_colours",
]

GAIN_LIMITS = (0.9, 1.1)
OFFSET_LIMIT = 0.04 * 255  # 8-bit levels
RAMP_FRAMES = 8  # from the overlap's correction to that of still pixels; in a shorter segment all its frames
NEAR = 4  # frames on each side of a joint: the decoder makes four at a time
JOINT_LEFT = 0.3  # delta E that the overlap's fit may leave at a joint; rounding a plain picture to bytes has as much
SAME_LEVELS = 10.0  # largest rest of a fit for most pixels, 8-bit levels; assumed; other content leaves 30 and more
SAMPLES = 16  # measured frames of a segment, evenly spaced
MASK_MARGIN = 2  # reduced pixels around the mask: the model works in blocks of 16 pixels, 3 reduced ones at 480p
GAIN_DIGITS, OFFSET_DIGITS = 5, 3  # 1e-5 of 255 levels and 1e-3 levels: far below the rounding to bytes

PREFIX: Final = "colour."  # of the arrays in a resume point
MEAN: Final = PREFIX + "mean"  # float32 [h, w, 3]: the first segment's mean picture, 8-bit levels
STILL: Final = PREFIX + "still"  # uint8 [h, w]: 1 where the first segment is still
END: Final = PREFIX + "end"  # as MEAN, of the last published frames
END_STILL: Final = PREFIX + "end_still"  # as STILL, of the last published segment

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Correction:
    """published = gain * decoded + offset, for red, green and blue; offsets in 8-bit levels."""

    gain: Triple = (1.0, 1.0, 1.0)
    offset: Triple = (0.0, 0.0, 0.0)

    @property
    def changes(self) -> bool:
        return self != Correction()


@dataclass(frozen=True)
class TrueBackground:
    """The driving video's pixels in a segment's frames, and the mask of pixels that are not compared."""

    frames: np.ndarray  # uint8 [n, H, W, 3] RGB
    mask: np.ndarray  # uint8 [n, H, W], above 0 where the character goes


@dataclass(frozen=True)
class _Measured:
    """Measured colours of one segment, and the expected ones of the same pixels: float [n, 3]."""

    found: np.ndarray
    expected: np.ndarray
    share: float  # of the picture

    @property
    def enough(self) -> bool:
        return self.share >= STILL_SHARE


@dataclass(frozen=True)
class _End:
    """The end of a published segment."""

    picture: np.ndarray  # float32 [h, w, 3], 8-bit levels: mean of the last NEAR frames
    still: np.ndarray  # bool [h, w], of the whole segment


class SegmentColours:
    """Measure and correct the colours of one job's segments in order. Inactive if a job has nothing to compare.

    replace: whether each segment has its true background. Not thread-safe.
    """

    def __init__(self, colour: Colour, segments: int, *, replace: bool) -> None:
        self.active = segments > 1 or (colour == "anchor" and replace)
        self._colour, self._segments, self._replace = colour, segments, replace
        self._mean: np.ndarray | None = None
        self._still: np.ndarray | None = None
        self._end: _End | None = None
        self._drifts: list[SegmentDriftRecord] = []

    @property
    def drift(self) -> DriftRecord | None:
        """The drift of the segments so far; None if inactive."""
        if not self.active:
            return None
        return DriftRecord(
            colour=self._colour,
            against="driving video" if self._replace else "first segment",
            segments=list(self._drifts),
        )

    def finish(
        self,
        frames: np.ndarray,
        tail: torch.Tensor,
        began: torch.Tensor | None = None,
        decoded: torch.Tensor | None = None,
        truth: TrueBackground | None = None,
    ) -> torch.Tensor:
        """Measure the next segment and correct `frames` in place; return `tail`, corrected, with its strides.

        frames: uint8 [n, H, W, 3], without overlap and padding. tail: [1, 3, k, H, W] in [-1, 1], the window's last
        frames. began, decoded: [1, 3, overlap, H, W] in [-1, 1], the pixels from which the window began, and the same
        frames as it decoded them; None for the first segment. truth: of `frames`, only in replace mode. With `off`,
        `tail` is returned unchanged.
        """
        if not self.active:
            return tail
        statistics = SegmentStatistics(0, min(SAMPLES, len(frames)))
        measured = self._compare(frames, statistics, truth)
        still = statistics.still()
        overlap, seam = None, Correction()
        if began is not None and decoded is not None:
            before, after = (_reduce_pixels(pixels) for pixels in (began, decoded))
            if np.isfinite(before).all() and np.isfinite(after).all():
                overlap, seam = _change(before, after), fit_correction(after, before) or seam
        joint = None
        if self._end is not None and (both := still & self._end.still).mean() >= STILL_SHARE:
            first, last = _mean_picture(frames[:NEAR])[both], self._end.picture[both]
            if (fitted := fit_correction(first, last)) is not None:
                joint = _change(last, first)
                left = fit_colour(last, _corrected(first, seam)).delta_e
                seam = seam if left <= JOINT_LEFT else fitted
        start, end, method = seam, seam, "seam"
        target = None if measured is None or not measured.enough else fit_correction(measured.found, measured.expected)
        if self._colour == "anchor" and target is not None:
            start, end, method = target if began is None else seam, target, "anchor"
        if self._colour == "off":
            start = end = Correction()
        self._drifts.append(
            SegmentDriftRecord.model_validate(
                {
                    "segment": len(self._drifts) + 1,
                    "overlap": overlap,
                    "joint": joint,
                    **({} if measured is None or target is None else _still_drift(measured, end)),
                    "share": round(float(still.mean()) if measured is None else measured.share, 4),
                    "within": round(statistics.within(still), 3) if still.mean() >= STILL_SHARE else None,
                    "laplacian": round(statistics.mean_laplacian, 3),
                    "correction": _as_record(method, end) if start.changes or end.changes else None,
                }
            )
        )
        gains, offsets = ramp(start, end, len(frames))
        self._end = _End(_mean_picture(frames[-NEAR:], gains[-NEAR:], offsets[-NEAR:]), still)
        if not (start.changes or end.changes):
            return tail
        correct_frames(frames, gains, offsets)
        at = np.arange(len(frames) - tail.shape[2], len(frames)).clip(0)
        return correct_pixels(tail, gains[at], offsets[at])

    def _compare(
        self, frames: np.ndarray, statistics: SegmentStatistics, truth: TrueBackground | None
    ) -> _Measured | None:
        """Fill `statistics`, and return the pairs of colours; None for the segment with which others are compared."""
        pairs = []
        for index in np.linspace(0, len(frames) - 1, statistics.end).round().astype(int):
            statistics.add(frames[index])
            if truth is not None:
                pairs.append(_outside_mask(statistics.tail[-1], truth.frames[index], truth.mask[index]))
        if self._replace:
            share = float(np.mean([outside.mean() for _, _, outside in pairs]))
            found, expected = (np.concatenate([pair[side][pair[2]] for pair in pairs]) for side in (0, 1))
            return _Measured(found, expected, share)
        mean, still = statistics.mean.astype(np.float32), statistics.still()
        if self._mean is None or self._still is None:
            self._mean, self._still = mean, still
            return None
        both = still & self._still
        return _Measured(mean[both], self._mean[both], float(both.mean()))

    def add_state(self, point: ResumePoint) -> ResumePoint:
        """Return `point` with the state for `restore`; after the last segment only with the measurements."""
        if not self.active:
            return point
        arrays, values = dict(point.arrays), dict(point.values)
        if point.segment < self._segments:
            arrays |= {name: picture for name, picture in self._pictures().items() if picture is not None}
        drift = self.drift
        assert drift is not None
        values[DRIFT] = drift.model_dump(mode="json")
        return ResumePoint(point.segment, arrays, values)

    def _pictures(self) -> dict[str, np.ndarray | None]:
        """Return the pictures by their names in a resume point, masks as uint8 0 and 1."""
        end, still = self._end, self._still
        return {
            MEAN: self._mean,
            STILL: None if still is None else still.astype(np.uint8),
            END: None if end is None else end.picture,
            END_STILL: None if end is None else end.still.astype(np.uint8),
        }

    def restore(self, point: ResumePoint) -> None:
        """Restore the state before `point.segment`. Raises InternalError if `point` is damaged."""
        if not self.active:
            return
        try:
            drift = point.drift
            if drift is None or len(drift.segments) != point.segment:
                raise ValueError("it does not have the drift of each segment")
            self._end = _End(*_picture_and_mask(point, END, END_STILL))
            if not self._replace:
                self._mean, self._still = _picture_and_mask(point, MEAN, STILL)
        except (ValueError, KeyError) as error:
            raise InternalError(
                f"the checkpoint does not fit this job: its colours cannot be read ({error})",
                todo="Run again with --checkpoint off, and report this",
            ) from error
        self._drifts = list(drift.segments)


def _picture_and_mask(point: ResumePoint, picture: str, mask: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [h, w, 3] and bool [h, w]. Raises KeyError, ValueError."""
    mean, still = point.arrays[picture], point.arrays[mask]
    if mean.shape != (*still.shape, 3) or mean.dtype != np.float32 or still.dtype != np.uint8:
        raise ValueError(f"its pictures are {mean.dtype} {mean.shape} and {still.dtype} {still.shape}")
    return mean, still.astype(bool)


def without_colours(point: ResumePoint) -> ResumePoint:
    """Return `point` as it was before `SegmentColours.add_state`."""
    arrays = {name: array for name, array in point.arrays.items() if not name.startswith(PREFIX)}
    return ResumePoint(point.segment, arrays, {key: value for key, value in point.values.items() if key != DRIFT})


def fit_correction(found: np.ndarray, expected: np.ndarray) -> Correction | None:
    """Fit gain and offset that turn float [n, 3] `found` into `expected`, 8-bit levels; robust, limited and rounded.

    Returns None if most pixels show different content, which no gain and offset explain.

    The fit has this direction, instead of inverting the measured change, so that detail lost in the decoder does not
    change the gain from 1.
    """
    fit = fit_colour(found, expected)
    rest = np.abs(found * np.array(fit.gain) + fit.offset - expected).max(axis=1)
    if np.median(rest) > SAME_LEVELS:
        return None
    x, y = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    limited = [_limit(x[:, c], y[:, c], fit.gain[c], fit.offset[c]) for c in range(3)]
    gains, offsets = zip(*limited, strict=True)
    return Correction((gains[0], gains[1], gains[2]), (offsets[0], offsets[1], offsets[2]))


def _limit(x: np.ndarray, y: np.ndarray, gain: float, offset: float) -> tuple[float, float]:
    """Limit and round gain and offset from float [n] `x` to `y`; return (1, 0) if they do not reduce the difference.

    If the gain is limited, the offset is fitted again, and the other way round.
    """
    within = min(max(gain, GAIN_LIMITS[0]), GAIN_LIMITS[1])
    if within != gain:
        offset = float(np.median(y - within * x))
    kept = min(max(offset, -OFFSET_LIMIT), OFFSET_LIMIT)
    if kept != offset:
        within = min(max(float(np.median((y - kept) / np.maximum(x, 1.0))), GAIN_LIMITS[0]), GAIN_LIMITS[1])
    within, kept = round(within, GAIN_DIGITS), round(kept, OFFSET_DIGITS)
    # A mean, as most levels of two rounded pictures may be equal; an outlier counts as SAME_LEVELS.
    before, after = (np.square(np.minimum(np.abs(side - y), SAME_LEVELS)).mean() for side in (x, within * x + kept))
    return (within, kept) if after < before else (1.0, 0.0)


def ramp(start: Correction, end: Correction, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return gain and offset of each of a segment's frames, float64 [frames, 3] each.

    `start` belongs to the frame before the first one. `end` is reached after RAMP_FRAMES, or with the last frame.
    """
    weight = np.minimum(np.arange(1, frames + 1) / min(RAMP_FRAMES, frames), 1.0)[:, None]
    gains, offsets = (
        (1 - weight) * np.array(one) + weight * np.array(other)
        for one, other in ((start.gain, end.gain), (start.offset, end.offset))
    )
    return gains, offsets


def correct_frames(frames: np.ndarray, gains: np.ndarray, offsets: np.ndarray) -> None:
    """Correct uint8 [n, H, W, 3] in place by each frame's gain and offset, float [n, 3]; levels round half to even."""
    import cv2

    levels = np.arange(256, dtype=np.float64)[:, None]
    for index, frame in enumerate(frames):
        table = np.clip(np.rint(levels * gains[index] + offsets[index]), 0, 255).astype(np.uint8)
        cv2.LUT(frame, table[None], dst=frame)


def correct_pixels(pixels: torch.Tensor, gains: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
    """Correct [1, 3, n, H, W] in [-1, 1] by each frame's gain and offset, float [n, 3]; dtype and strides stay."""
    gain, shift = (
        torch.from_numpy(np.ascontiguousarray(values.T)).to(pixels.device, torch.float32)[None, :, :, None, None]
        for values in (gains, gains - 1 + offsets / 127.5)
    )
    corrected: torch.Tensor = pixels.float().mul(gain).add_(shift).clamp_(-1.0, 1.0).to(pixels.dtype)
    return corrected


def _mean_picture(frames: np.ndarray, gains: np.ndarray | None = None, offsets: np.ndarray | None = None) -> np.ndarray:
    """Return the mean of the reduced frames, corrected without rounding: float32 [h, w, 3], 8-bit levels."""
    pictures = np.stack([reduce_picture(frame) for frame in frames]).astype(np.float64)
    if gains is not None and offsets is not None:
        pictures = np.clip(pictures * gains[:, None, None] + offsets[:, None, None], 0, 255)
    return pictures.mean(axis=0).astype(np.float32)


def _outside_mask(
    picture: np.ndarray, truth: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a reduced picture and the true one, float32 [h, w, 3], and where they can be compared, bool [h, w]."""
    import cv2

    height, width = picture.shape[:2]
    covered = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) > 0
    side = 2 * MASK_MARGIN + 1
    near = cv2.dilate(covered.astype(np.uint8), np.ones((side, side), np.uint8))
    return picture, reduce_picture(truth), near == 0


def _reduce_pixels(pixels: torch.Tensor) -> np.ndarray:
    """Return the reduced frames' colours of [1, 3, n, H, W] in [-1, 1]: float32 [n * h * w, 3] in 8-bit levels."""
    frames = pixels[0].permute(1, 2, 3, 0).float().cpu().numpy()
    return np.concatenate([reduce_picture((frame + 1) * 127.5).reshape(-1, 3) for frame in frames])


def _change(before: np.ndarray, after: np.ndarray) -> ColourChange:
    fit = fit_colour(before, after)
    return ColourChange(
        gain=_rounded(fit.gain, GAIN_DIGITS), offset=_rounded(fit.offset, OFFSET_DIGITS), delta_e=round(fit.delta_e, 3)
    )


def _corrected(colours: np.ndarray, correction: Correction) -> np.ndarray:
    corrected: np.ndarray = np.clip(colours * correction.gain + correction.offset, 0, 255)
    return corrected


def _still_drift(measured: _Measured, correction: Correction) -> Mapping[str, Any]:
    """Return `still` and `remaining` of a SegmentDriftRecord."""
    remaining = fit_colour(measured.expected, _corrected(measured.found, correction)).delta_e
    return {"still": _change(measured.expected, measured.found), "remaining": round(remaining, 3)}


def _as_record(method: str, correction: Correction) -> ColourCorrection:
    return ColourCorrection.model_validate({"method": method, "gain": correction.gain, "offset": correction.offset})


def _rounded(values: Sequence[float], digits: int) -> Triple:
    red, green, blue = (round(value, digits) for value in values)
    return red, green, blue
