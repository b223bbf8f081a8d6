"""Errors: what can go wrong, under stable codes, and what each means for the job and for the exit code.

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
    ├── StorageDenied         storage.denied             exit 2 at the start of a run, else its job's failure
    ├── StorageUnavailable    storage.unavailable        exit 3   retryable
    ├── StorageFull           storage.full               exit 3   stops the run; what is done stays done
    ├── StorageConflict       storage.conflict           exit 1   another run published the same job meanwhile
    │   └── LeaseLost         storage.conflict           exit 1   another runner has taken this job over
    ├── OutOfMemory           resource.out_of_memory     exit 1   retryable
    ├── DeviceLost            device.lost                exit 3   stops the run; only a new process can go on
    ├── ClusterDenied         cluster.denied             exit 2   a batch platform or Ray cluster refuses the user
    ├── ClusterUnavailable    cluster.unavailable        exit 3   it cannot be reached, or fails
    ├── WeightsMissing        weights.missing            exit 2   stops the run
    ├── WeightsCorrupt        weights.corrupt            exit 2   stops the run
    │   each has a form for what one job alone asks for, its LoRAs: JobWeightsMissing, JobWeightsCorrupt, exit 1
    ├── JobCrashed            job.crashed                exit 1   the process died in this job, earlier
    ├── NotFinite             output.not_finite          exit 1   NaN or infinity on the way to the frames
    └── InternalError         internal                   exit 1   a bug of ours: please report

A message says what was wrong, where, and what to do; of many things it names the first few. Nothing here imports
anything of the project.
"""

from __future__ import annotations

import errno
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
    """A failure with a stable `code`. `what` went wrong, `where` (path, URI, line), what `todo` about it."""

    code = "internal"
    retryable = False  # may the same call succeed later, with nothing changed?
    stops_run = False  # would every later job fail the same way?
    blames_job = False  # is the job itself at fault, so that an output of its other settings is stale?
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
    """The manifest cannot be run as written; `problems` holds every one that was found."""

    code, exit_code, stops_run = "manifest.invalid", 2, True

    def __init__(self, problems: list[str], *, where: object = None) -> None:
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(f"{count}\n" + "\n".join(f"  {p}" for p in problems), where=where)


class ConfigInvalid(RunnerError):
    """A flag, recipe or device that cannot work here, whatever the job."""

    code, exit_code, stops_run = "config.invalid", 2, True


class InputError(RunnerError):
    """Something is wrong with one job's input; the other jobs go on."""

    blames_job = True


class InputNotFound(InputError):
    code = "input.not_found"


class BucketMissing(InputNotFound):
    """Nothing can be read because the bucket itself does not exist. For a job's input, `storage/uris.py` raises
    InputNotFound instead."""

    exit_code = 2


class InputUnreadable(InputError):
    """Empty, truncated, corrupt, or not the kind of file it claims to be."""

    code = "input.unreadable"


class NoPerson(InputError):
    code = "input.no_person"


class InputTooShort(InputError):
    code = "input.too_short"


class InputTooLarge(InputError):
    code = "input.too_large"


class StorageDenied(RunnerError):
    """Credentials or permissions were refused; retrying does not help."""

    code, exit_code = "storage.denied", 2


class StorageUnavailable(RunnerError):
    """The store timed out, dropped the connection or answered 5xx; the same call may succeed later."""

    code, retryable, exit_code = "storage.unavailable", True, 3


class StorageFull(RunnerError):
    """No space left where output, cache or temporary files go."""

    code, exit_code, stops_run = "storage.full", 3, True


class StorageConflict(RunnerError):
    """Another run with the same output folder published the same job while this one did, and its output stands."""

    code = "storage.conflict"


class LeaseLost(StorageConflict):
    """Another runner has taken this job over: what this one wanted to store or remove was left as it is."""


class DeviceLost(RunnerError):
    """The GPU or its driver failed in a way that makes every later call of this process fail too."""

    code, retryable, exit_code, stops_run = "device.lost", True, 3, True


class ClusterDenied(RunnerError):
    """A batch platform or a Ray cluster knows this user and allows not what was asked, or does not know the user."""

    code, exit_code, stops_run = "cluster.denied", 2, True


class ClusterUnavailable(RunnerError):
    """A batch platform or a Ray cluster cannot be reached, or failed; the same command may succeed later."""

    code, retryable, exit_code, stops_run = "cluster.unavailable", True, 3, True


class OutOfMemory(RunnerError):
    code, retryable = "resource.out_of_memory", True


class WeightsMissing(RunnerError):
    code, exit_code, stops_run = "weights.missing", 2, True


class WeightsCorrupt(RunnerError):
    code, exit_code, stops_run = "weights.corrupt", 2, True


class JobWeightsMissing(WeightsMissing):
    """The same of a LoRA or a network that one job alone asks for: the other jobs go on."""

    exit_code, stops_run = 1, False


class JobWeightsCorrupt(WeightsCorrupt):
    """The same of a LoRA or a network that one job alone asks for: the other jobs go on."""

    exit_code, stops_run = 1, False


@contextmanager
def job_weight_errors() -> Iterator[None]:
    """Raise what is wrong with weights that one job alone asks for as that job's failure, not the run's."""
    try:
        yield
    except WeightsMissing as error:
        raise JobWeightsMissing(error.what, where=error.where, todo=error.todo) from error
    except WeightsCorrupt as error:
        raise JobWeightsCorrupt(error.what, where=error.where, todo=error.todo) from error


class JobCrashed(RunnerError):
    """The process that ran this job ended without a word: killed for memory, a driver fault, a power cut."""

    code = "job.crashed"


class NotFinite(RunnerError):
    """The model computed NaN or infinity, of which no picture can be made; the message names stage and place."""

    code, blames_job = "output.not_finite", True


class InternalError(RunnerError):
    """An unexpected exception: a bug."""

    code, blames_job = "internal", True


def is_transient(code: str) -> bool:
    """Does `code` say nothing against the job, so that a run of such failures ends with 3 and may be started again?

    Out of memory, retryable within a run, does: the same command would find no more of it.
    """
    return code == StorageUnavailable.code


def counts_as_attempt(code: str) -> bool:
    """Does a failure with `code` use up one of a job's attempts? What the storage does says nothing about the job."""
    return not code.startswith("storage.")


def first_few(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """`a, b and 3 more`: the first `most` of them, and how many are left. Separated by `; `: `a; b; and 3 more`."""
    more = f"{separator.rstrip(', ')} and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def as_runner_error(error: BaseException, *, where: object = None) -> RunnerError:
    """`error` as one of ours: full and read-only disks, denied files and exhausted memory have a code, all else is
    `internal`."""
    if isinstance(error, RunnerError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(
            "no space left on the device", where=error.filename or where, todo="Free space, then run the same command"
        )
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return StorageDenied(
            "the file system is read-only",
            where=error.filename or where,
            todo="Mount a writable volume there, or name another folder",
        )
    if isinstance(error, PermissionError):
        return StorageDenied(
            "permission denied",
            where=error.filename or where,
            todo="Check the owner of the folder; in a container, pass --user",
        )
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT):
        return StorageUnavailable(
            f"input/output failed: {(error.strerror or str(error)).lower()}",
            where=error.filename or where,
            todo="Check the disk or mount; then retry",
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OutOfMemory(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'host'})",
            where=where,
            todo="Ask for a smaller size or fewer max_segment_frames",
        )
    if _is_device_lost(error):
        return DeviceLost(
            f"the GPU cannot be used any more ({str(error).splitlines()[0]})",
            where=where,
            todo="Start the same command again; if it happens again, look at the driver's log (dmesg: Xid) and the GPU",
        )
    return InternalError(f"{type(error).__name__}: {error}", where=where, todo="This is a bug; please report it")


def _is_device_lost(error: BaseException) -> bool:
    """Is this an error after which CUDA answers every call of the process with an error?

    torch raises AcceleratorError (a RuntimeError before 2.8), whose text holds that of cudaGetErrorString. ONNX Runtime
    gives the number instead: `CUDA failure 700: an illegal memory access was encountered`.
    """
    text = str(error).lower()
    about_cuda = any(word in text for word in ("cuda", "cudnn", "cublas", "nvml"))
    return about_cuda and any(phrase in text for phrase in _STICKY_CUDA_ERRORS)


# cudaGetErrorString of the errors after which, by the CUDA runtime's manual, the process must end, and what the driver
# says of a GPU that is gone.
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
    "unknown error",  # 999: what a driver that was reloaded or a GPU that fell off the bus gives
)
