"""Errors: one class for each kind of failure, with its stable code, its exit code and its effect on the run.

    RunnerError
    ├── ManifestInvalid       manifest.invalid           exit 2   nothing starts
    ├── ConfigInvalid         config.invalid             exit 2   a flag, recipe or device that cannot work
    ├── InputError            fails its own job only     exit 1
    │   ├── InputNotFound     input.not_found
    │   │   └── BucketMissing input.not_found            exit 2   outside of jobs: a job's input is InputNotFound
    │   ├── InputUnreadable   input.unreadable
    │   ├── NoPerson          input.no_person
    │   ├── InputTooShort     input.too_short
    │   └── InputTooLarge     input.too_large
    ├── StorageDenied         storage.denied             exit 2 at the start of a run, later 1: fails its job only
    ├── StorageUnavailable    storage.unavailable        exit 3   retryable
    ├── StorageFull           storage.full               exit 3   stops the run; finished outputs stay
    ├── StorageConflict       storage.conflict           exit 1   another run published the same job meanwhile
    │   └── LeaseLost         storage.conflict           exit 1   another runner has taken this job over
    ├── OutOfMemory           resource.out_of_memory     exit 1   retryable
    ├── DeviceLost            device.lost                exit 3   stops the run; the command must be started again
    ├── ClusterDenied         cluster.denied             exit 2   a batch platform or Ray cluster refuses the request
    ├── ClusterUnavailable    cluster.unavailable        exit 3   a platform or cluster cannot be reached, or fails
    ├── WeightsMissing        weights.missing            exit 2   stops the run
    ├── WeightsCorrupt        weights.corrupt            exit 2   stops the run
    │   for weights that only one job uses (its LoRAs): JobWeightsMissing, JobWeightsCorrupt, exit 1
    ├── JobCrashed            job.crashed                exit 1   the process died in earlier attempts of this job
    ├── NotFinite             output.not_finite          exit 1   the model computed NaN or infinity
    └── InternalError         internal                   exit 1   unexpected exception (a bug)

A message gives the place, the problem and the remedy. Long lists are cut to their first items (`first_few`).
This module imports nothing of the project.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = [
    "BucketMissing",
    "ClusterDenied",
    "ClusterUnavailable",
    "ConfigInvalid",
    "DeviceLost",
    "InputError",
    "InputNotFound",
    "InputTooLarge",
    "InputTooShort",
    "InputUnreadable",
    "InternalError",
    "JobCrashed",
    "JobWeightsCorrupt",
    "JobWeightsMissing",
    "LeaseLost",
    "ManifestInvalid",
    "NoPerson",
    "NotFinite",
    "OutOfMemory",
    "RunnerError",
    "StorageConflict",
    "StorageDenied",
    "StorageFull",
    "StorageUnavailable",
    "WeightsCorrupt",
    "WeightsMissing",
    "as_runner_error",
    "counts_as_attempt",
    "first_few",
    "is_transient",
    "job_weight_errors",
]


class RunnerError(Exception):
    """A failure with a stable `code`. `what`: the problem. `where`: path, URI or line. `todo`: the remedy.

    The message is "WHERE: WHAT. TODO".
    """

    code = "internal"
    retryable = False  # the same call may succeed later, with nothing changed
    stops_run = False  # every later job would fail the same way
    blames_job = False  # the job itself is at fault: an output of older settings of this job is stale
    exit_code = 1

    def __init__(self, what: str, *, where: object = None, todo: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.todo = todo
        super().__init__(self.message)

    @property
    def message(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f". {self.todo}" if self.todo else ""
        return f"{place}{self.what}{remedy}"


class ManifestInvalid(RunnerError):
    """The manifest cannot be run as written. `problems`: all problems that were found, one text each."""

    code, exit_code, stops_run = "manifest.invalid", 2, True

    def __init__(self, problems: list[str], *, where: object = None) -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(f"{count}\n" + "\n".join(f"  {p}" for p in problems), where=where)


class ConfigInvalid(RunnerError):
    """A flag, recipe or device cannot work here, for any job."""

    code, exit_code, stops_run = "config.invalid", 2, True


class InputError(RunnerError):
    """One job's input is wrong. The other jobs continue."""

    blames_job = True


class InputNotFound(InputError):
    """An input does not exist."""

    code = "input.not_found"


class BucketMissing(InputNotFound):
    """The bucket itself does not exist. For a job's input, `storage/uris.py` raises InputNotFound instead."""

    exit_code = 2


class InputUnreadable(InputError):
    """An input is empty, truncated, corrupt, or not of the kind that its name claims."""

    code = "input.unreadable"


class NoPerson(InputError):
    """No person was found in an input."""

    code = "input.no_person"


class InputTooShort(InputError):
    """An input has too few frames."""

    code = "input.too_short"


class InputTooLarge(InputError):
    """An input has more pixels, frames or bytes than the limit allows."""

    code = "input.too_large"


class StorageDenied(RunnerError):
    """Credentials or permissions were refused. A retry does not help."""

    code, exit_code = "storage.denied", 2


class StorageUnavailable(RunnerError):
    """The store timed out, dropped the connection or answered 5xx. The same call may succeed later."""

    code, retryable, exit_code = "storage.unavailable", True, 3


class StorageFull(RunnerError):
    """No space is left for output, cache or temporary files."""

    code, exit_code, stops_run = "storage.full", 3, True


class StorageConflict(RunnerError):
    """Another run published the same job into the same output folder meanwhile. The other run's output is kept."""

    code = "storage.conflict"


class LeaseLost(StorageConflict):
    """Another runner has taken this job over. This runner changed nothing in the store after that."""


class DeviceLost(RunnerError):
    """The GPU or its driver failed, and every later GPU call of this process will fail too."""

    code, retryable, exit_code, stops_run = "device.lost", True, 3, True


class ClusterDenied(RunnerError):
    """A batch platform or a Ray cluster refuses the request, or does not know the user."""

    code, exit_code, stops_run = "cluster.denied", 2, True


class ClusterUnavailable(RunnerError):
    """A batch platform or a Ray cluster cannot be reached, or failed. The same command may succeed later."""

    code, retryable, exit_code, stops_run = "cluster.unavailable", True, 3, True


class OutOfMemory(RunnerError):
    """Host or GPU memory is exhausted."""

    code, retryable = "resource.out_of_memory", True


class WeightsMissing(RunnerError):
    """Weights that every job needs are missing."""

    code, exit_code, stops_run = "weights.missing", 2, True


class WeightsCorrupt(RunnerError):
    """Weights that every job needs are damaged or of the wrong kind."""

    code, exit_code, stops_run = "weights.corrupt", 2, True


class JobWeightsMissing(WeightsMissing):
    """Weights that only one job uses (a LoRA, an auxiliary network) are missing. The other jobs continue."""

    exit_code, stops_run = 1, False


class JobWeightsCorrupt(WeightsCorrupt):
    """Weights that only one job uses (a LoRA, an auxiliary network) are damaged. The other jobs continue."""

    exit_code, stops_run = 1, False


@contextmanager
def job_weight_errors() -> Iterator[None]:
    """Turn WeightsMissing and WeightsCorrupt raised inside into their forms that fail one job and not the run."""
    try:
        yield
    except WeightsMissing as error:
        raise JobWeightsMissing(error.what, where=error.where, todo=error.todo) from error
    except WeightsCorrupt as error:
        raise JobWeightsCorrupt(error.what, where=error.where, todo=error.todo) from error


class JobCrashed(RunnerError):
    """The process that ran this job ended without a record: killed for memory, a driver fault, a power cut."""

    code = "job.crashed"


class NotFinite(RunnerError):
    """The model computed NaN or infinity. The message names the stage and the place."""

    code, blames_job = "output.not_finite", True


class InternalError(RunnerError):
    """Unexpected exception (a bug). `trace`: its traceback as text; a kept exception would keep its tensors alive."""

    code, blames_job = "internal", True
    trace: str | None = None


def is_transient(code: str) -> bool:
    """Return whether a run whose failures all have `code` ends with exit code 3: the same command may then succeed.

    Out of memory is retryable within a run, but not transient: the same command would find no more memory.
    """
    return code == StorageUnavailable.code


def counts_as_attempt(code: str) -> bool:
    """Return whether a failure with `code` counts as one of the job's attempts. Storage failures do not count."""
    return not code.startswith("storage.")


def first_few(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first `most` texts and count the rest: `a, b and 3 more`. With separator `; `: `a; b; and 3 more`."""
    more = f"{separator.rstrip(', ')} and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def as_runner_error(error: BaseException, *, where: object = None) -> RunnerError:
    """Return `error` as a RunnerError.

    Full or read-only disks, denied files, failed input/output, exhausted memory and a lost GPU have their own codes.
    Everything else becomes InternalError.
    """
    if isinstance(error, RunnerError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(
            "no space is left on the device",
            where=error.filename or where,
            todo="Free space, then run the same command again",
        )
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return StorageDenied(
            "the file system is read-only",
            where=error.filename or where,
            todo="Mount a writable volume there, or choose another folder",
        )
    if isinstance(error, PermissionError):
        return StorageDenied(
            "the permission was denied",
            where=error.filename or where,
            todo="Check the owner and mode of the folder. For a container, pass --user to docker run",
        )
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT):
        return StorageUnavailable(
            f"input/output failed: {(error.strerror or str(error)).lower()}",
            where=error.filename or where,
            todo="Check the disk or mount, then run the same command again",
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemory(
            f"the process is out of memory ({str(error).splitlines()[0] if str(error) else 'host memory'})",
            where=where,
            todo="Set a smaller size or fewer max_segment_frames in the manifest",
        )
    if _is_device_lost(error):
        return DeviceLost(
            f"the GPU cannot be used any more ({str(error).splitlines()[0]})",
            where=where,
            todo="Start the same command again. If this happens again, check the GPU and the driver's log (dmesg, Xid)",
        )
    found = InternalError(f"{type(error).__name__}: {error}", where=where, todo="This is a bug; please report it")
    found.trace = "".join(traceback.format_exception(error)).rstrip()
    return found


def _is_device_lost(error: BaseException) -> bool:
    """Return whether CUDA fails every later call of this process after `error`.

    torch raises AcceleratorError (a RuntimeError before 2.8); its text contains that of cudaGetErrorString. ONNX
    Runtime adds the number: `CUDA failure 700: an illegal memory access was encountered`.
    """
    text = str(error).lower()
    about_cuda = any(word in text for word in ("cuda", "cudnn", "cublas", "nvml"))
    return about_cuda and any(phrase in text for phrase in _STICKY_CUDA_ERRORS)


# Texts of cudaGetErrorString for the errors after which the process must end (CUDA runtime manual), and the driver's
# texts for a GPU that is gone.
_STICKY_CUDA_ERRORS = (
    "an illegal memory access was encountered",  # 700
    "device-side assert",  # 710
    "uncorrectable ecc error",  # 214
    "uncorrectable nvlink error",  # 220
    "hardware stack error",  # 714
    "an illegal instruction was encountered",  # 715
    "misaligned address",  # 716
    "operation not supported on global/shared address space",  # 717
    "invalid program counter",  # 718
    "unspecified launch failure",  # 719
    "the launch timed out and was terminated",  # 702
    "driver shutting down",  # 4
    "context is destroyed",  # 709
    "no cuda-capable device is detected",  # 100
    "gpu is lost",
    "unknown error",  # 999: the driver was reloaded, or the GPU fell off the bus
)
