"""Drift record: the schema of the colour drift of a job's segments in `result.json`, and its warnings.

In:   the numbers of each segment. Out: models that serialise to JSON; warnings.
Never: how drift is measured or corrected.

Gains and offsets are of red, green and blue; offsets in 8-bit levels. Delta E is CIE76 in Lab (D65).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["DELTA_E_LIMIT", "ColourChange", "ColourCorrection", "DriftRecord", "SegmentDriftRecord"]

DELTA_E_LIMIT = 2.0  # above this, a person sees the difference between two pictures side by side

Triple = tuple[float, float, float]


class _DriftModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ColourChange(_DriftModel):
    """after = gain * before + offset."""

    gain: Triple
    offset: Triple = Field(description="8-bit levels")
    delta_e: float = Field(ge=0, description="mean over the pixels of what gain and offset change")


class ColourCorrection(_DriftModel):
    """published = gain * decoded + offset, from the end of the ramp on."""

    method: Literal["seam", "anchor"] = Field(description="what gain and offset were fitted on")
    gain: Triple
    offset: Triple = Field(description="8-bit levels")


class SegmentDriftRecord(_DriftModel):
    segment: int = Field(ge=1)
    overlap: ColourChange | None = Field(
        None,
        description="from the frames that the segment began from, as they were published, to the same frames as the "
        "segment decoded them; null for the first segment",
    )
    joint: ColourChange | None = Field(
        None,
        description="from the last published frames before the segment to its first ones as they were decoded, pixels "
        "that are still on both sides; null for the first segment, and with less than 5 % of the picture",
    )
    still: ColourChange | None = Field(
        None,
        description="from `against` to this segment as it was decoded; null for the segment that is compared with, and "
        "with less than 5 % of the picture, or other content there",
    )
    share: float = Field(ge=0, le=1, description="of the picture's pixels: still, or in replace outside the mask")
    remaining: float | None = Field(None, ge=0, description="delta E of `still` after the correction; null as `still`")
    within: float | None = Field(
        None,
        ge=0,
        description="delta E of the segment's own still pixels, from its first quarter to its last; null with less "
        "than 5 % of the picture",
    )
    laplacian: float = Field(ge=0, description="mean squared Laplacian of luma, levels squared: texture")
    correction: ColourCorrection | None = Field(None, description="null where the frames are as they were decoded")


class DriftRecord(_DriftModel):
    """One job's segments, in order. A resumed job's record has those of the earlier attempts too."""

    colour: Literal["off", "seam", "anchor"] = Field(description="the job's option")
    against: Literal["first segment", "driving video"] = Field(
        description="what still pixels are compared with: the first segment's still pixels, or in replace the driving "
        "video outside the mask"
    )
    segments: list[SegmentDriftRecord]

    @property
    def warnings(self) -> list[str]:
        """Drift above DELTA_E_LIMIT in the published frames that a person should check, with the remedy."""
        found = []
        count = len(self.segments)
        worst = max(self.segments, key=lambda one: one.remaining or 0.0, default=None)
        if worst is not None and (worst.remaining or 0.0) > DELTA_E_LIMIT:
            todo = "check the video: the correction is limited" if self.colour == "anchor" else "set colour: anchor"
            found.append(
                f"colours drift: still pixels of segment {worst.segment} of {count} are {worst.remaining:.1f} delta E "
                f"from those of the {self.against}; {todo}"
            )
        shown = ((one.joint or one.overlap, one) for one in self.segments)
        steps = [(change.delta_e, one.segment) for change, one in shown if change and not one.correction]
        step, segment = max(steps, default=(0.0, 0))
        if step > DELTA_E_LIMIT:
            found.append(
                f"colours step by {step:.1f} delta E at the joint before segment {segment} of {count}; "
                "set colour: seam or anchor"
            )
        return found
