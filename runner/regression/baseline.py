"""Baseline: the approved render of each job, by device and recipe, on a local disk or in an object store.

In:   a storage; names of jobs. Out: the approved render of each job with its record, digests and files.
Never: comparing; names of keys, see baseline_layout.py; how a render is approved, see approving.py.

The render of the job's device is used. If there is none, the newest approval of another device is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from runner.errors import ConfigInvalid, InputUnreadable
from runner.hashing import combine, sha256_file
from runner.records.approval import Approval, Approvals, parse_time
from runner.records.output_layout import FRAME_DIGESTS, OUTPUT, PEOPLE, RESULT, is_frame
from runner.records.record import ResultRecord
from runner.regression.approving import (
    FILES_AT_ONCE,
    ApprovalRequest,
    Approved,
    Refused,
    approve_removal,
    approve_render,
    check_digest_list,
    read_approvals,
)
from runner.regression.baseline_layout import FRAMES_FOLDER, JobName, jobs_prefix, render_prefix
from runner.storage import Storage, check_key

__all__ = ["Baseline", "BaselineJob"]

READS_AT_ONCE = 32  # as many as the S3 client has connections; a request of 20 ms waits 18 ms for the network


@dataclass(frozen=True)
class BaselineJob:
    """The approved render of one job."""

    storage: Storage
    name: JobName  # the device may differ from the requested device
    approvals: Approvals

    @property
    def approval(self) -> Approval:
        return self.approvals.approvals[0]

    @property
    def _prefix(self) -> str:
        return render_prefix(self.name, self.approval.token)

    @cached_property
    def record(self) -> ResultRecord:
        """The record of the render. Raises InputUnreadable if it is missing or not the approved one; storage.*."""
        key = self._prefix + RESULT
        data = self.storage.read_bytes(key)
        if data is None:
            raise self._damaged("the record is missing", key)
        try:
            record = ResultRecord.model_validate_json(data)
        except ValidationError as error:
            raise self._damaged("is not the record of a job", key) from error
        frames = "" if record.output is None else record.output.frames_sha256
        if (record.fingerprint, frames) != (self.approval.fingerprint, self.approval.frames_sha256):
            raise self._damaged("differs from the record that was approved", key)
        return record

    @property
    def is_frames(self) -> bool:
        """Whether the output is a folder of PNG frames."""
        output = self.record.output
        return output is not None and output.key.endswith("/")

    @property
    def output_key(self) -> str:
        """Key in the baseline's storage of the MP4, or of the folder of PNG frames with a slash at the end."""
        return self._prefix + (FRAMES_FOLDER if self.is_frames else OUTPUT)

    def digests(self) -> list[str] | None:
        """Return the hex sha256 of each frame, in order; None if there are none. Raises InputUnreadable; storage.*."""
        data, output = self.read(FRAME_DIGESTS), self.record.output
        if data is None or output is None:
            return None
        try:
            return check_digest_list(data, output)
        except ValueError as error:
            raise self._damaged(str(error), self._prefix + FRAME_DIGESTS) from error

    def people(self) -> bytes | None:
        """Return the content of people.json; None if the render has none. Raises storage.*."""
        return self.read(PEOPLE)

    def read(self, name: str) -> bytes | None:
        """Return the content of another file of the render (`poster.jpg`); None if there is none. Raises storage.*."""
        return self.storage.read_bytes(self._prefix + name)

    def fetch(self, dest: Path) -> Path | list[Path]:
        """Copy the output into the folder `dest`: the MP4, or the PNG frames in order.

        Raises InputUnreadable if it is missing or differs from the approved one; storage.*.
        """
        key = self.output_key
        if not self.is_frames:
            paths = {OUTPUT: dest / OUTPUT}
            if not self.storage.exists(key):
                raise self._damaged("the output is missing", key)
        else:
            names = sorted(info.key.removeprefix(self._prefix) for info in self.storage.list(key))
            if not names:
                raise self._damaged("the frames are missing", key.rstrip("/"))
            paths = {name: dest / name for name in names}

        def fetch(name: str) -> str:
            self.storage.fetch(self._prefix + name, paths[name])
            return sha256_file(paths[name])

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            digests = dict(zip(paths, pool.map(fetch, paths), strict=True))
        if combine(digests) != self.approval.output_sha256:
            raise self._damaged("the output differs from the approved one", key.rstrip("/"))
        return [path for name, path in paths.items() if is_frame(name)] if self.is_frames else paths[OUTPUT]

    def _damaged(self, what: str, key: str) -> InputUnreadable:
        todo = "Approve a newer render of this job"
        return InputUnreadable(what, where=self.storage.uri(key), todo=todo)


class Baseline:
    """The approved renders below one root. Thread-safe. `scratch`: folder for files that are being copied."""

    def __init__(self, storage: Storage, *, scratch: Path | None = None) -> None:
        self.storage = storage
        self._scratch = scratch

    def find(self, names: Iterable[JobName]) -> dict[JobName, BaselineJob]:
        """Return the approved render of each job, by the given name; jobs without one are left out.

        Makes one listing per thousand jobs of a recipe and device, then reads one small object per job with a folder.
        Raises InputUnreadable for damaged approvals; storage.*.
        """
        wanted = list(dict.fromkeys(names))
        listed: dict[tuple[str, str], set[str]] = {}

        def has_folder(name: JobName) -> bool:
            at = name.device, name.recipe
            if at not in listed:
                listed[at] = set(self._folders(jobs_prefix(*at)))
            return name.job_id in listed[at]

        own = self._read(name for name in wanted if has_folder(name))
        found = {name: job for name, job in own.items() if job is not None}
        rest = [name for name in wanted if name not in own or own[name] is None]
        if rest:
            devices = self._folders("")
            others = {
                name: [
                    other
                    for device in devices
                    if device != name.device and has_folder(other := name._replace(device=device))
                ]
                for name in rest
            }
            read = self._read(other for candidates in others.values() for other in candidates)
            for name, candidates in others.items():
                standing = [
                    job for other in candidates if (job := read[other]) is not None and not job.approval.removed
                ]
                if standing:
                    found[name] = max(standing, key=_rank)
        return {name: found[name] for name in wanted if name in found and not found[name].approval.removed}

    def jobs(self, device: str, recipe: str, *, without: Collection[str] = ()) -> list[BaselineJob]:
        """Return the approved renders of a device and recipe by job id, except those of the ids `without`.

        Raises the same errors as `find`.
        """
        left_out = set(without)
        ids = (job_id for job_id in sorted(self._folders(jobs_prefix(device, recipe))) if job_id not in left_out)
        found = self._read(JobName(device, recipe, job_id) for job_id in ids)
        return [job for job in found.values() if job is not None and not job.approval.removed]

    def approve(self, out: Storage, record: ResultRecord, request: ApprovalRequest) -> Approved | Refused:
        """Approve the render of `record` in `out` for its job: see `approve_render`."""
        return approve_render(self.storage, out, record, request, self._scratch)

    def approve_removal(self, name: JobName, request: ApprovalRequest) -> Approved | Refused:
        """Accept that a job is no longer rendered: see `approving.approve_removal`."""
        return approve_removal(self.storage, name, request)

    def _read(self, names: Iterable[JobName]) -> dict[JobName, BaselineJob | None]:
        wanted = list(names)

        def read(name: JobName) -> BaselineJob | None:
            approvals, _ = read_approvals(self.storage, name)
            return None if approvals is None else BaselineJob(self.storage, name, approvals)

        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            return dict(zip(wanted, pool.map(read, wanted), strict=True))

    def _folders(self, prefix: str) -> list[str]:
        """Return names of folders that can be part of a key; a baseline may contain other folders too."""
        names = []
        for name in self.storage.folders(prefix):
            try:
                check_key(prefix + name)
            except ConfigInvalid:
                continue
            names.append(name)
        return names


def _rank(job: BaselineJob) -> tuple[bool, object]:
    """Return the sort key of several devices' approvals: the newest one that is not a draft wins, else the newest."""
    return not job.approval.draft, parse_time(job.approval.when)
