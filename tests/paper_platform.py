"""Paper platform: a batch platform that writes down what it is asked, for tests of what platforms have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import yaml

from runner.launch.platform import Platform
from runner.launch.submission import Submission, SubmittedJob, run_words
from runner.launch.submission_checks import check_image

__all__ = ["PaperPlatform"]


@dataclass(frozen=True)
class PaperPlatform(Platform):
    """`calls`: what was asked of it, in order. `fails`: name of a method → the error that it raises."""

    name: ClassVar[str] = "paper"

    calls: list[str] = field(default_factory=list)
    seen: list[Submission] = field(default_factory=list)  # by `submit`
    fails: dict[str, Exception] = field(default_factory=dict)
    mounts: str | None = None  # where the tasks see gs:// buckets

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def check(self, submission: Submission) -> None:
        check_image(submission.image)
        self._called("check")

    def render(self, submission: Submission) -> Mapping[str, str]:
        self._called("render")
        words = vars(submission) | {"environment": dict(submission.environment), "words": run_words(submission)}
        return {"job.yaml": yaml.safe_dump(json.loads(json.dumps(words))), "submit.sh": "#!/usr/bin/env bash\n"}

    def ask(self, submission: Submission) -> None:
        self._called("ask")

    def keep_manifest(self, out: str, key: str, data: bytes) -> None:
        self._called("keep_manifest")
        super().keep_manifest(out, key, data)

    def submit(self, submission: Submission, files: Mapping[str, str]) -> tuple[SubmittedJob, ...]:
        self._called("submit")
        self.seen.append(submission)
        return SubmittedJob("run", "17"), SubmittedJob("report", "18")

    def watch(self, submission: Submission, jobs: tuple[SubmittedJob, ...]) -> tuple[str, ...]:
        return tuple(f"paper watch {job.id}" for job in jobs)

    def place(self, uri: str) -> str:
        return uri if self.mounts is None else uri.replace("gs://", f"{self.mounts}/")

    def problem_of_place(self, uri: str) -> str | None:
        return None if self.mounts is not None and uri.startswith("gs://") else super().problem_of_place(uri)
