"""Approving: copies a render into a baseline and records who accepted it, when and why.

In:   an output storage and the record of a job there; a baseline's storage. Out: files there, `Approved` or `Refused`.
Never: comparing, deciding what should be approved; replacing a newer render silently.

A render is copied into a new folder and becomes valid when `approved.json` names it. That file is written only if it
has not changed since it was read, so that one of two simultaneous approvals is refused. A process that dies in between
leaves a folder without a name in `approved.json`; a later approval removes it when it is old.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import ValidationError

from runner.errors import ConfigInvalid, InputNotFound, InputUnreadable, RunnerError, StorageUnavailable
from runner.hashing import combine, sha256_file
from runner.records.approval import KEPT_APPROVALS, Approval, Approvals, parse_time
from runner.records.output_layout import FRAME_DIGESTS, KEPT, OUTPUT, RESULT, job_folder, job_key
from runner.records.record import OutputRecord, ResultRecord
from runner.regression.baseline_layout import (
    APPROVALS,
    FRAMES_FOLDER,
    JobName,
    approvals_key,
    job_prefix,
    name_job,
    render_prefix,
)
from runner.storage import ObjectInfo, Storage, check_key, combined_identity
from runner.timing import now

__all__ = [
    "ABANDONED_S",
    "FILES_AT_ONCE",
    "ApprovalRequest",
    "Approved",
    "Refused",
    "approve_removal",
    "approve_render",
    "check_digest_list",
    "read_approvals",
]

ABANDONED_S = 24 * 3600.0  # assumed: no copy of one render takes a day
FILES_AT_ONCE = 8
_TRIES = 3


@dataclass(frozen=True)
class ApprovalRequest:
    """The person who accepts, the reason, and what the approval may replace.

    `run_id`: of the run that rendered the job, or that no longer renders it; "": the record's run. `draft`: a first
    render that is accepted without being viewed; it replaces nothing. `as_of`: when the baseline was read, ISO 8601.
    An approval made since then, or one of a later render, is not replaced unless `replace_newer` is set.
    Raises ConfigInvalid for an `as_of` that is not a time.
    """

    who: str
    why: str
    run_id: str = ""
    draft: bool = False
    as_of: str | None = None
    replace_newer: bool = False

    def __post_init__(self) -> None:
        if self.as_of is not None:
            try:
                parse_time(self.as_of)
            except ValueError as error:
                raise ConfigInvalid(
                    f"{self.as_of!r} is not a time", todo="Write it as 2026-01-31T06:00:00+00:00"
                ) from error

    def refuse_newer(self, job_id: str, standing: Approval) -> Refused | None:
        """Return the refusal if `standing` was approved after the baseline was read, else None."""
        if self.replace_newer or self.as_of is None or parse_time(standing.when) < parse_time(self.as_of):
            return None
        return Refused(f"{job_id} was approved after {self.as_of}. {standing.sentence()}", standing)


@dataclass(frozen=True)
class Approved:
    """The render that is valid now. `unchanged`: it was valid before."""

    approval: Approval
    unchanged: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Nothing was changed. `why`: one sentence. `standing`: the current approval, if it is the reason."""

    why: str
    standing: Approval | None = None


def read_approvals(storage: Storage, name: JobName) -> tuple[Approvals | None, str | None]:
    """Return the approvals of a job and the version of their file; (None, None) if there are none.

    Raises InputUnreadable for a damaged file; storage.*.
    """
    key = approvals_key(name)
    found = storage.read_versioned(key)
    if found is None:
        return None, None
    try:
        return Approvals.parse(found.data), found.version
    except ValueError as error:
        todo = "Restore it, or remove it; without it the job has no baseline"
        raise InputUnreadable("is not a list of approvals", where=storage.uri(key), todo=todo) from error


def approve_render(
    storage: Storage,
    out: Storage,
    record: ResultRecord,
    request: ApprovalRequest,
    scratch: Path | None = None,
) -> Approved | Refused:
    """Copy the job of `record` from `out` into the baseline `storage`, and make it the valid render there.

    Refused if `request` may not replace the current approval, or if another approval is made while this runs. Also
    refused: a job that failed, a job that was rendered again since `record` was read, and an output that is missing or
    differs from its record.

    A render that is valid already is kept with its approval. `scratch`: folder for temporary files; None: the system's
    folder. Raises InputUnreadable for damaged approvals; storage.*.
    """
    output = record.output
    if record.status != "succeeded" or output is None:
        return Refused(f"{record.job_id} failed; there is no render to approve")
    try:
        name = name_job(record)
        finished = parse_time(record.finished_at)
        check_key(output.key.rstrip("/"))
    except (ValueError, ConfigInvalid) as error:
        return Refused(f"the record of {record.job_id!r} cannot be used: {error}")
    if not output.key.startswith(job_folder(record.job_id)):
        return Refused(f"the record of {record.job_id} names an output outside {job_folder(record.job_id)}")

    before, version = read_approvals(storage, name)
    standing = None if before is None else before.approvals[0]
    if standing is not None:
        accepted = _is_render(standing, record) and request.draft >= standing.draft
        if accepted and _is_there(storage, name, standing, output):
            return Approved(standing, unchanged=True)
        if request.draft:
            return Refused(
                f"{record.job_id} has a baseline, and a draft replaces none. {standing.sentence()}", standing
            )
        if (refused := request.refuse_newer(record.job_id, standing)) is not None:
            return refused
        if not request.replace_newer and parse_time(standing.finished_at) > finished:
            later = f"its baseline was rendered later, at {standing.finished_at}"
            return Refused(
                f"{record.job_id} was rendered at {record.finished_at}; {later}. {standing.sentence()}", standing
            )

    token = uuid4().hex[:16]
    prefix = render_prefix(name, token)
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="approve-") as folder:
            copied = _copy(out, record, output, storage, prefix, Path(folder))
        if isinstance(copied, str):
            _remove_folder(storage, prefix)
            return Refused(copied)
        approval = Approval(
            token=token,
            who=request.who,
            when=now(),
            why=request.why,
            run_id=request.run_id or record.run_id,
            out=out.root,
            fingerprint=record.fingerprint,
            frames_sha256=output.frames_sha256,
            finished_at=record.finished_at,
            draft=request.draft,
            output_sha256=copied[0],
            output_bytes=copied[1],
            output_files=copied[2],
        )
        other = _write(storage, name, approval, before, version)
    except (OSError, RunnerError):
        _remove_unless_named(storage, name, token)
        raise
    if other is not None:
        _remove_folder(storage, prefix)
        return Refused(f"{record.job_id} was approved by another process meanwhile. {other.sentence()}", other)
    return Approved(approval, notes=_tidy(storage, name, before))


def approve_removal(storage: Storage, name: JobName, request: ApprovalRequest) -> Approved | Refused:
    """Accept that a job is no longer rendered: from now on it has no baseline and is not reported as missing.

    Refused as by `approve_render`; also if the job has no baseline. Its files are kept like those of other approvals.
    """
    before, version = read_approvals(storage, name)
    if before is None:
        return Refused(f"{name.job_id} has no baseline")
    standing = before.approvals[0]
    if standing.removed:
        return Approved(standing, unchanged=True)
    if (refused := request.refuse_newer(name.job_id, standing)) is not None:
        return refused
    moment = now()
    approval = Approval(
        token="",
        who=request.who,
        when=moment,
        why=request.why,
        run_id=request.run_id,
        finished_at=moment,
        removed=True,
    )
    other = _write(storage, name, approval, before, version)
    if other is not None:
        return Refused(f"{name.job_id} was approved by another process meanwhile. {other.sentence()}", other)
    return Approved(approval, notes=_tidy(storage, name, before))


def check_digest_list(data: bytes, output: OutputRecord) -> list[str]:
    """Return the digests of a job's frames from `frames.sha256`. Raises ValueError if they do not match the record."""
    from runner.video import FRAMES_HASH, combined_digest, parse_digests  # loads PyAV

    digests = parse_digests(data)
    if len(digests) != output.frames:
        raise ValueError(f"{len(digests)} digests for {output.frames} frames")
    if output.frames_hash == FRAMES_HASH and combined_digest(digests) != output.frames_sha256:
        raise ValueError("the digests do not match the recorded frames")
    return digests


def _is_render(approval: Approval, record: ResultRecord) -> bool:
    """Return whether this is the approval of exactly the render of `record`."""
    output = record.output
    return (
        not approval.removed
        and output is not None
        and (approval.fingerprint, approval.frames_sha256, approval.finished_at)
        == (record.fingerprint, output.frames_sha256, record.finished_at)
    )


def _is_there(storage: Storage, name: JobName, approval: Approval, output: OutputRecord) -> bool:
    """Return whether the record and the output of this approval are in the baseline."""
    prefix = render_prefix(name, approval.token)
    if not storage.exists(prefix + RESULT):
        return False
    if output.key.endswith("/"):
        return sum(1 for _ in storage.list(prefix + FRAMES_FOLDER)) == approval.output_files
    info = storage.stat(prefix + OUTPUT)
    return info is not None and info.bytes == approval.output_bytes


def _copy(
    out: Storage, record: ResultRecord, output: OutputRecord, storage: Storage, prefix: str, scratch: Path
) -> tuple[str, int, int] | str:
    """Copy a job's files below `prefix`, the record last. Return (sha256, bytes, files) of the output, or the refusal.

    The record is read before and after the copy: a run removes the record before it replaces one of its files.
    """
    key = job_key(record.job_id, RESULT)
    found = out.read_versioned(key)
    if found is not None and _is_same_record(found.data, record):
        copied = _copy_files(out, record.job_id, output, storage, prefix, scratch)
        storage.write_bytes(prefix + RESULT, found.data)
        still = out.read_versioned(key)
        if still is not None and still.version == found.version:
            return copied
    return f"{record.job_id} was rendered again since it was compared; compare again"


def _copy_files(
    out: Storage, job_id: str, output: OutputRecord, storage: Storage, prefix: str, scratch: Path
) -> tuple[str, int, int] | str:
    files = _fetch_output(out, job_id, output, scratch)
    if isinstance(files, str):
        return files
    digests = {name: sha256_file(path) for name, path in files.items()}
    nbytes = sum(path.stat().st_size for path in files.values())
    if output.sha256 is not None and (digests.get(OUTPUT), nbytes) != (output.sha256, output.bytes):
        return f"the output of {job_id} differs from its record: {out.uri(output.key)}"
    for name in KEPT:
        with suppress(InputNotFound):
            out.fetch(job_key(job_id, name), scratch / name)
            files[name] = scratch / name
    if FRAME_DIGESTS in files:
        try:
            check_digest_list(files[FRAME_DIGESTS].read_bytes(), output)
        except ValueError as error:
            return f"{out.uri(job_key(job_id, FRAME_DIGESTS))}: {error}"

    def store(name: str) -> None:
        path = files[name]
        info = storage.publish(path, prefix + name)
        identity = storage.identify(info)
        sha256 = digests.get(name) or sha256_file(path)
        if info.bytes != path.stat().st_size or (identity.startswith("sha256:") and identity != f"sha256:{sha256}"):
            where = storage.uri(prefix + name)
            raise StorageUnavailable("the copy differs from the original", where=where, todo="Try again")

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(store, files))
    return combine(digests), nbytes, len(digests)


def _is_same_record(data: bytes, record: ResultRecord) -> bool:
    try:
        found = ResultRecord.model_validate_json(data)
    except ValidationError:
        return False
    return found == record


def _fetch_output(out: Storage, job_id: str, output: OutputRecord, scratch: Path) -> dict[str, Path] | str:
    """Return the files of a job's output by their names in the baseline, or why they differ from the record."""
    wrong = f"the output of {job_id} differs from its record: {out.uri(output.key.rstrip('/'))}"
    if not output.key.endswith("/"):
        path = scratch / OUTPUT
        try:
            info = out.fetch(output.key, path)
        except InputNotFound:
            return f"the output of {job_id} is missing: {out.uri(output.key)}"
        return wrong if output.sha256 is None and info.identity != output.identity else {OUTPUT: path}
    keys = sorted(info.key for info in out.list(output.key))
    if not keys:
        return f"the output of {job_id} is missing: {out.uri(output.key.rstrip('/'))}"
    names = {key: FRAMES_FOLDER + key.removeprefix(output.key) for key in keys}

    def fetch(key: str) -> ObjectInfo:
        return out.fetch(key, scratch / names[key])

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        infos = list(pool.map(fetch, keys))
    identity, nbytes, count = combined_identity({info.key: (out.identify(info), info.bytes) for info in infos})
    if (identity, nbytes, count) != (output.identity, output.bytes, output.files):
        return wrong
    return {names[key]: scratch / names[key] for key in keys}


def _write(
    storage: Storage, name: JobName, approval: Approval, before: Approvals | None, version: str | None
) -> Approval | None:
    """Write `approval` if nothing has changed since `before` was read; otherwise return the current approval."""
    older = [] if before is None else before.approvals
    approvals = Approvals(job_id=name.job_id, approvals=[approval, *older][:KEPT_APPROVALS])
    for _ in range(_TRIES):
        storage.write_if(approvals_key(name), approvals.to_json(), version)
        # Always read again: a store may not support conditional writes, and an answer may be lost.
        found, seen = read_approvals(storage, name)
        if found is not None and any(_is_same(one, approval) for one in found.approvals):
            return None
        if found is not None and (before is None or not _is_same(found.approvals[0], before.approvals[0])):
            return found.approvals[0]
        before, version = found, seen
    raise StorageUnavailable("the approval was not stored", where=storage.uri(approvals_key(name)), todo="Try again")


def _is_same(one: Approval, other: Approval) -> bool:
    return (one.token, one.when) == (other.token, other.when)


def _tidy(storage: Storage, name: JobName, before: Approvals | None) -> tuple[str, ...]:
    """Remove the renders that `approved.json` no longer names, and old files of killed processes."""
    try:
        named = _named(storage, name)
        dropped = {one.token for one in (before.approvals if before is not None else ())} - named
        folders: dict[str, list[ObjectInfo]] = {}
        prefix, written = job_prefix(name), 0.0  # modification time of approved.json, by the store's clock
        for info in storage.list(prefix):
            token, slash, _ = info.key.removeprefix(prefix).partition("/")
            if slash:
                folders.setdefault(token, []).append(info)
            elif token == APPROVALS:
                written = info.modified
        for token, infos in folders.items():
            old = written - max(info.modified for info in infos) > ABANDONED_S
            if token not in named and (token in dropped or old):
                for info in infos:
                    storage.delete(info.key)
        for leftover in list(storage.leftovers(prefix)):
            if leftover.abandoned or written - leftover.modified > ABANDONED_S:
                storage.remove_leftover(leftover)
    except RunnerError as error:
        return (f"files of older approvals were not removed: {error.message}",)
    return ()


def _named(storage: Storage, name: JobName) -> set[str]:
    found, _ = read_approvals(storage, name)
    return set() if found is None else {one.token for one in found.approvals}


def _remove_folder(storage: Storage, prefix: str) -> None:
    with suppress(RunnerError):  # a later approval removes remaining files
        for info in list(storage.list(prefix)):
            storage.delete(info.key)


def _remove_unless_named(storage: Storage, name: JobName, token: str) -> None:
    """Remove a copy after a failure, unless it is named: an approval may be written although the answer was lost."""
    with suppress(RunnerError):
        if token not in _named(storage, name):
            _remove_folder(storage, render_prefix(name, token))
