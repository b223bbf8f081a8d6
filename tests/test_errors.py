from __future__ import annotations

import errno
import gc
import weakref

import pytest

from runner.errors import (
    InputNotFound,
    InternalError,
    JobWeightsCorrupt,
    JobWeightsMissing,
    RunnerError,
    StorageUnavailable,
    WeightsCorrupt,
    WeightsMissing,
    as_runner_error,
    first_few,
    is_transient,
    job_weight_errors,
)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), "storage.full", "/out/x"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "storage.full", "Free space"),
        (OSError(errno.EROFS, "Read-only file system", "/cache/x"), "storage.denied", "/cache/x"),  # --read-only
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), "storage.denied", "--user"),
        (MemoryError("3 GiB"), "resource.out_of_memory", "3 GiB"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "resource.out_of_memory", "CUDA"),
        (OSError(errno.EIO, "Input/output error", "/mnt/x"), "storage.unavailable", "/mnt/x: input/output failed"),
        (OSError(errno.ESTALE, "Stale file handle"), "storage.unavailable", "stale file handle"),
        (ZeroDivisionError("division by zero"), "internal", "ZeroDivisionError: division by zero"),
    ],
)
def test_foreign_errors_have_code_and_remedy(error, code, words):
    found = as_runner_error(error, where="somewhere")
    assert found.code == code
    assert words in found.message
    assert found.todo


def test_runner_error_stays_unchanged():
    error = InputNotFound("no such file", where="a.mp4", todo="Check the path")
    assert as_runner_error(error, where="elsewhere") is error
    assert error.message == "a.mp4: no such file. Check the path"


def test_error_codes_are_unique_with_known_exit_codes():
    kinds, waiting = [], [RunnerError]
    while waiting:
        kinds += (below := waiting.pop().__subclasses__())
        waiting += below
    codes = [kind.code for kind in kinds if "code" in vars(kind)]
    assert len(set(codes)) == len(codes)
    assert {kind.exit_code for kind in kinds} == {1, 2, 3}
    assert [code for code in codes if is_transient(code)] == [StorageUnavailable.code]


@pytest.mark.parametrize(("kind", "its"), [(WeightsMissing, JobWeightsMissing), (WeightsCorrupt, JobWeightsCorrupt)])
def test_weights_error_of_one_job_fails_only_that_job(kind, its):
    assert (kind("x").exit_code, kind("x").stops_run) == (2, True)
    with pytest.raises(its) as caught, job_weight_errors():
        raise kind("no LoRA", where="loras/a", todo="Put it there")
    assert (caught.value.exit_code, caught.value.stops_run, caught.value.code) == (1, False, kind.code)
    assert caught.value.message == "loras/a: no LoRA. Put it there"
    with pytest.raises(ZeroDivisionError), job_weight_errors():
        _ = 1 / 0


def test_first_few_of_long_list_names_first_items():
    assert first_few([], 2) == ""
    assert first_few(["a", "b"], 2) == "a, b"
    assert first_few(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert first_few(["a", "b", "c"], 2, "; ") == "a; b; and 1 more"


def test_unexpected_exception_keeps_traceback_text_and_no_frame():
    class Tensor:
        pass

    def fail() -> weakref.ref[Tensor]:
        held = Tensor()
        alive = weakref.ref(held)
        try:
            raise KeyError("frames")
        except KeyError as error:
            found.append(as_runner_error(error))
        return alive

    found: list[RunnerError] = []
    alive = fail()
    gc.collect()
    (error,) = found
    assert isinstance(error, InternalError)
    assert error.trace is not None
    assert error.trace.startswith("Traceback (most recent call last)")
    assert error.trace.endswith("KeyError: 'frames'")
    assert alive() is None
    assert as_runner_error(error) is error
