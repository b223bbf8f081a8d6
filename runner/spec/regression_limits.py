"""Regression limits: how far a nightly render may differ from its baseline, as set in a manifest.

In:   the mapping under `regression:`. Out: `RegressionLimits`. Never: fingerprints, measurements.

Limits of a job override those of the manifest, key by key. A limit that neither sets is `None`. The verb `compare` then
takes its calibrated default, or reports the metric without judging it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from runner.spec.options import Frozen

__all__ = ["Factor", "RegressionLimits"]

_FACTOR = re.compile(r"([1-9][0-9]{0,3}(?:\.[0-9]{1,6})?)x")


def _factor(value: Any) -> Any:
    """Return `1.2x` as 1.2. A number without the x is refused: it could mean seconds or bytes."""
    if value is None:
        return None
    found = _FACTOR.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("must be a factor of the baseline, 1 or more, e.g. 1.2x")
    return float(found[1])


def _as_written(value: float | None) -> str | None:
    """Return 1.2 as `1.2x`. `_factor` reads the same number from it."""
    return None if value is None else f"{value!r}x"


Factor = Annotated[
    float | None,
    BeforeValidator(_factor),
    PlainSerializer(_as_written, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": f"^{_FACTOR.pattern}$"}, {"type": "null"}]}),
]


class RegressionLimits(Frozen):
    """When a job counts as changed, slower or larger than its baseline."""

    same_frames: bool | None = Field(
        None, description="frames must be the same bits where device, compute, memory mode and versions are the same"
    )
    psnr_min: float | None = Field(None, ge=0, le=100, description="dB, of the worst frame")
    ssim_min: float | None = Field(None, ge=-1, le=1, description="of the worst frame")
    max_frame_diff: float | None = Field(
        None, ge=0, le=255, description="largest difference of one channel of a pixel, in 8-bit levels"
    )
    joint_drift_max: float | None = Field(
        None, ge=0, description="colour step where two segments meet, above the baseline's, in CIE76 delta E"
    )
    identity_min: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="cosine similarity of the person's picture and the baseline's, worst of the compared frames",
    )
    seconds_max: Factor = Field(None, description="times the median of the last nights, stage by stage")
    memory_max: Factor = Field(None, description="times the median of the last nights")

    def over(self, below: RegressionLimits) -> RegressionLimits:
        """Return these limits, with those of `below` where these are None."""
        return below.model_copy(update=self.model_dump(exclude_none=True))
