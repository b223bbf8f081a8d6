"""Approval: who accepted which render of a job as its baseline, when and why (`approved.json`), as a versioned schema.

In:   plain values. Out: models that serialise to JSON. Never: where a baseline is stored, what is approved.

Times are UTC, ISO 8601. The newest approval stands; the older ones tell what stood before it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from runner.redact import redact_tree

__all__ = ["KEPT_APPROVALS", "Approval", "Approvals", "parse_time"]

KEPT_APPROVALS = 5  # of a job: what stood before can be looked at for a while
_COMPARED = frozenset({"token", "fingerprint", "frames_sha256", "output_sha256"})  # by a later comparison


def parse_time(text: str) -> datetime:
    """`text`, ISO 8601, as a time that can be compared; without an offset it is UTC. Raises ValueError."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _check_time(text: str) -> str:
    parse_time(text)
    return text


_Time = Annotated[str, AfterValidator(_check_time)]


class Approval(BaseModel):
    """One render that was accepted. Its files lie in a folder of its own, named by `token`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    token: str = Field(description="the folder of its files, beside approved.json; empty where `removed`")
    who: str
    when: _Time = Field(description="when it was approved, by the clock of who did")
    why: str
    run_id: str = Field(description="the run that rendered it")
    out: str = Field("", description="the output folder it was taken from, as the approver named it")
    fingerprint: str = ""
    frames_sha256: str = Field("", description="as in its record")
    finished_at: _Time = Field(description="when it was rendered, as in its record; of a removal, when it was approved")
    draft: bool = Field(False, description="a first render that was accepted unseen")
    removed: bool = Field(False, description="the job is no longer expected; there are no files")
    output_sha256: str = Field(
        "",
        description="of the MP4; of PNG frames, the sha256 of their sorted sha256sum listing (of one frame: its own)",
    )
    output_bytes: int = Field(0, ge=0)
    output_files: int = Field(0, ge=0, description="1 for an MP4, else the number of frames, one more with audio.wav")

    def sentence(self) -> str:
        """Who approved it, when, why and from which run, in one sentence."""
        what = "A removal" if self.removed else "A draft" if self.draft else "A render"
        return f"{what} of run {self.run_id} was approved by {self.who} at {self.when}: {self.why}"


class Approvals(BaseModel):
    """`<device>/<recipe>/jobs/<id>/approved.json` of a baseline."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = 1
    job_id: str
    approvals: list[Approval] = Field(min_length=1, description=f"newest first, at most {KEPT_APPROVALS}")

    def to_json(self) -> bytes:
        """As it is stored: its secrets masked."""
        public = redact_tree(self.model_dump(mode="json"), keep=_COMPARED)
        return (json.dumps(public, ensure_ascii=False, indent=2) + "\n").encode(errors="backslashreplace")

    @classmethod
    def parse(cls, data: bytes) -> Approvals:
        """What `to_json` made. Raises ValueError for anything else."""
        try:
            return cls.model_validate(json.loads(data))
        except (ValidationError, RecursionError) as error:
            raise ValueError(f"not a list of approvals: {error}") from error
