"""Platform: what a batch platform must be able to do; one subclass a platform, each in its own file.

In:   a `Submission`. Out: the files that describe the job in the platform's words, and what the platform accepted.
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
    """A batch platform and its own settings (a queue, a namespace, …). Subclasses are frozen dataclasses."""

    name: ClassVar[str]  # as on the command line: aws-batch, gcp-batch, kubernetes, slurm

    @abstractmethod
    def check(self, submission: Submission) -> None:
        """Raise ConfigInvalid for what the platform would refuse, or read in another way; sends nothing."""

    @abstractmethod
    def render(self, submission: Submission) -> Mapping[str, str]:
        """File name → text: the complete job, and `submit.sh`, which submits these files by the platform's own tool.

        Pure: the same submission gives the same bytes. `submit.sh` expects the frozen manifest beside it, as
        `manifest.jsonl`, and copies it to where the tasks read it.
        """

    @abstractmethod
    def ask(self, submission: Submission) -> None:
        """Ask the platform whether it would take the job; changes nothing.

        Raises ConfigInvalid (no such tool, queue, …), ClusterDenied, ClusterUnavailable.
        """

    @abstractmethod
    def submit(self, submission: Submission, files: Mapping[str, str]) -> tuple[SubmittedJob, ...]:
        """Submit what `render` gave; the frozen manifest is in its place. Where a later part fails, what was accepted
        before it is taken back. Raises ConfigInvalid, ClusterDenied, ClusterUnavailable.
        """

    @abstractmethod
    def watch(self, submission: Submission, jobs: tuple[SubmittedJob, ...]) -> tuple[str, ...]:
        """Command lines to paste: how to watch, how to read logs, how to stop the run."""

    def place(self, uri: str) -> str:
        """`uri` as a task sees it."""
        return uri

    def problem_of_place(self, uri: str) -> str | None:
        """Why a task cannot read or write `uri`, in words that follow it; None where it can."""
        if is_remote(uri):
            return None
        if "://" in uri:
            return "lies in a store that the tasks cannot read"
        return "lies on this machine; the tasks run elsewhere"

    def kept_manifest(self, out: str, key: str) -> bytes | None:
        """What lies under `key` below `out`, as the user named it; None: nothing. Raises storage.*, ConfigInvalid."""
        return open_storage(out).read_bytes(key)

    def keep_manifest(self, out: str, key: str, data: bytes) -> None:
        """Write the frozen manifest to `key` below `out`, as the user named it. Raises storage.*, ConfigInvalid."""
        open_storage(out).write_bytes(key, data)
