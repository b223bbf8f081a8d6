"""Platform: the interface of a batch platform; each platform is a subclass in a separate file.

In:   a `Submission`. Out: files that describe the job in the platform's format, and the jobs that it accepted.
Never: manifests, forecasts; credentials in a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from runner.launch.submission import Submission, SubmittedJob
from runner.storage import is_remote, open_storage

__all__ = ["Platform"]


class Platform(ABC):
    """A batch platform and its settings (a queue, a namespace, …). Subclasses are frozen dataclasses."""

    name: ClassVar[str]  # as on the command line: aws-batch, gcp-batch, kubernetes, slurm

    @abstractmethod
    def check(self, submission: Submission) -> None:
        """Raise ConfigInvalid for values that the platform would refuse or interpret differently. Sends nothing."""

    @abstractmethod
    def render(self, submission: Submission) -> Mapping[str, str]:
        """Return file name → text: the complete job, and `submit.sh`, which submits it with the platform's tool.

        Deterministic: the same submission gives the same bytes. `submit.sh` expects the frozen manifest in its folder
        as `manifest.jsonl`, and copies it to the URI from which the tasks read it.
        """

    @abstractmethod
    def ask(self, submission: Submission) -> None:
        """Check with the platform whether it would accept the job. Changes nothing.

        Raises ConfigInvalid (no such tool, queue, …), ClusterDenied, ClusterUnavailable.
        """

    @abstractmethod
    def submit(self, submission: Submission, files: Mapping[str, str]) -> tuple[SubmittedJob, ...]:
        """Submit the files of `render`; the frozen manifest has been copied already.

        If a later part fails, the parts that were accepted before are removed. Raises ConfigInvalid, ClusterDenied,
        ClusterUnavailable.
        """

    @abstractmethod
    def watch(self, submission: Submission, jobs: tuple[SubmittedJob, ...]) -> tuple[str, ...]:
        """Return command lines that watch the run, read its logs and stop it."""

    def place(self, uri: str) -> str:
        """Return the path or URI under which a task reads `uri`."""
        return uri

    def problem_of_place(self, uri: str) -> str | None:
        """Return why a task cannot read or write `uri`, as a predicate of it ("is on …"); None if it can."""
        if is_remote(uri):
            return None
        if "://" in uri:
            return "is in a store that the tasks cannot read"
        return "is on this machine; the tasks run on other machines"

    def kept_manifest(self, out: str, key: str) -> bytes | None:
        """Return the content of `key` in `out` (as the user wrote it), or None. Raises storage.*, ConfigInvalid."""
        return open_storage(out).read_bytes(key)

    def keep_manifest(self, out: str, key: str, data: bytes) -> None:
        """Write the frozen manifest to `key` in `out` (as the user wrote it). Raises storage.*, ConfigInvalid."""
        open_storage(out).write_bytes(key, data)
