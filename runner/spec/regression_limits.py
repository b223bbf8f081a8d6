"""Regression limits: how far a night's render may be from its baseline, as a manifest says it.

In:   the mapping under `regression:`. Out: `RegressionLimits`. Never: a fingerprint, how anything is measured.

Limits of a job go over those of the manifest, key by key; what neither says is `None` here, and the verb `compare` then
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
    """`1.2x` as 1.2; a bare number could be taken for seconds or bytes."""
    if value is None:
        return None
    found = _FACTOR.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("must be a factor of the baseline, 1 or more, e.g. 1.2x")
    return float(found[1])


def _as_written(value: float | None) -> str | None:
    """1.2 as `1.2x`, which `_factor` reads again as the same number."""
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
        None, ge=0, description="colour step at a joint of segments beyond the baseline's, in CIE76 delta E"
    )
    identity_min: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="cosine of the person's picture with the baseline's, worst frame of those looked at",
    )
    seconds_max: Factor = Field(None, description="of the median of the last nights, stage by stage")
    memory_max: Factor = Field(None, description="of the median of the last nights")

    def over(self, below: RegressionLimits) -> RegressionLimits:
        """These limits, and those of `below` where these say nothing."""
        return below.model_copy(update=self.model_dump(exclude_none=True))
