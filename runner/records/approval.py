"""Approval: the schema of `approved.json`: who approved which render of a job as its baseline, when and why.

In:   plain values. Out: models that serialise to JSON. Never: where a baseline is stored, which renders are approved.

Times are UTC, ISO 8601. The newest approval counts. The older ones are its history.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from runner.redact import redact_tree

__all__ = ["KEPT_APPROVALS", "Approval", "Approvals", "parse_time"]

KEPT_APPROVALS = 5  # per job: earlier approvals stay visible for a while
_COMPARED = frozenset({"token", "fingerprint", "frames_sha256", "output_sha256"})  # later comparisons read these


def parse_time(text: str) -> datetime:
    """Return an ISO 8601 text as a time with a zone; without an offset it is UTC. Raises ValueError."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _check_time(text: str) -> str:
    parse_time(text)
    return text


_Time = Annotated[str, AfterValidator(_check_time)]


class Approval(BaseModel):
    """One approved render. Its files are in a folder of their own, named by `token`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    token: str = Field(description="the folder of its files, beside approved.json; empty if `removed`")
    who: str
    when: _Time = Field(description="when it was approved, by the clock of the approver's machine")
    why: str
    run_id: str = Field(description="the run that rendered it")
    out: str = Field("", description="the output folder that it was taken from, as the approver wrote it")
    fingerprint: str = ""
    frames_sha256: str = Field("", description="as in the job's record")
    finished_at: _Time = Field(description="when it was rendered, as in its record; of a removal, when it was approved")
    draft: bool = Field(False, description="a first render that was approved without being checked")
    removed: bool = Field(False, description="the job is no longer expected; there are no files")
    output_sha256: str = Field(
        "",
        description="of the MP4; of PNG frames, the sha256 of their sorted sha256sum listing (one frame: its sha256)",
    )
    output_bytes: int = Field(0, ge=0)
    output_files: int = Field(0, ge=0, description="1 for an MP4, else the number of frames, one more with audio.wav")

    def sentence(self) -> str:
        """Return one sentence: who approved it, when, why and from which run."""
        what = "A removal" if self.removed else "A draft" if self.draft else "A render"
        return f"{what} of run {self.run_id} was approved by {self.who} at {self.when}: {self.why}"


class Approvals(BaseModel):
    """`<device>/<recipe>/jobs/<id>/approved.json` of a baseline."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = 1
    job_id: str
    approvals: list[Approval] = Field(min_length=1, description=f"newest first, at most {KEPT_APPROVALS}")

    def to_json(self) -> bytes:
        """Return the JSON to store, with secrets masked."""
        public = redact_tree(self.model_dump(mode="json"), keep=_COMPARED)
        return (json.dumps(public, ensure_ascii=False, indent=2) + "\n").encode(errors="backslashreplace")

    @classmethod
    def parse(cls, data: bytes) -> Approvals:
        """Read what `to_json` returned. Raises ValueError for anything else."""
        try:
            return cls.model_validate(json.loads(data))
        except (ValidationError, RecursionError) as error:
            raise ValueError(f"not a list of approvals: {error}") from error
