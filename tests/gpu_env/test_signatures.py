"""Our calls of comfy-kitchen and of torch's scaled products, as our own functions make them, against the real ones."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from runner.quantization.kernels import nvfp4, rowwise
from runner.quantization.kernels.rowwise import Rows
from tests.gpu_env.known_torch import needs_gpu_env, needs_known_torch

pytestmark = needs_gpu_env

TOKENS, COLUMNS, OUTPUTS = 64, 256, 128
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


class Spy:
    """In place of a package's function: takes what it takes, keeps it, and answers with `answer`."""

    def __init__(self, real: Any, answer: Tensor | None = None) -> None:
        self.signature, self.answer = inspect.signature(real), answer
        self.calls: list[inspect.BoundArguments] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self.calls.append(self.signature.bind(*args, **kwargs))  # TypeError where the real one would raise it
        return self.answer


def gauss(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@BIAS
def test_the_int8_product_of_comfy_kitchen(monkeypatch, bias):
    """A function of the package's own, by its parameters' names; it runs on a GPU alone."""
    package = import_module("comfy_kitchen.backends.cuda")
    spy = Spy(package._int4_linear_via_int8_values, torch.zeros(TOKENS, OUTPUTS, dtype=torch.bfloat16))
    monkeypatch.setattr(package, "_int4_linear_via_int8_values", spy)
    x, w = (rowwise.quantize_rows(gauss(rows, COLUMNS, seed=rows), "int8") for rows in (TOKENS, OUTPUTS))
    added = gauss(OUTPUTS, seed=2).float() if bias else None
    assert rowwise.comfy_kitchen(x, w, added, torch.bfloat16) is spy.answer
    (call,) = spy.calls
    for name, rows in (("x", x), ("weight", w)):
        assert call.arguments[f"{name}_int8"] is rows.codes
        assert call.arguments[f"{name}_scale"] is rows.scale
    assert call.arguments["out_dtype"] == torch.bfloat16
    assert (call.arguments["bias"] is not None) == bias


@BIAS
def test_that_function_runs_the_product_of_the_public_one(monkeypatch, bias):
    """On calls of the package's compiled module: codes, scales, bias and result in the places where `int8_linear` puts
    them, whose codes are ours but for a division in bfloat16."""
    package = import_module("comfy_kitchen.backends.cuda")
    seen: list[tuple[Any, ...]] = []

    class Compiled:
        def cutlass_int8_dequant(self, *given: Any) -> bool:
            seen.append(given)
            return True

        def quantize_int8_rowwise(self, x: Tensor, codes: Tensor, scale: Tensor, *rest: Any) -> None:
            rows = rowwise.quantize_rows(x, "int8")
            codes.copy_(rows.codes)
            scale.copy_(rows.scale)

    stream = type("Stream", (), {"cuda_stream": 0})
    answers = {
        "_wrap_for_dlpack": lambda tensor: tensor,
        "_prefer_turing_fused_int8": lambda *_: False,
        "_prefer_cublas_int8_fallback": lambda *_: False,
        "_cuda_device_supports_cutlass_int8_dequant": lambda _: True,
        "_empty_cuda_tensor": lambda device, dtype: torch.empty(0, dtype=dtype),
        "_C": Compiled(),
    }
    for name, answer in answers.items():
        assert hasattr(package, name) or name == "_C"
        monkeypatch.setattr(package, name, answer, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    x, w = gauss(TOKENS, COLUMNS, seed=0), rowwise.quantize_rows(gauss(OUTPUTS, COLUMNS, seed=1), "int8")
    added = gauss(OUTPUTS, seed=2) if bias else None
    rowwise.comfy_kitchen(rowwise.quantize_rows(x, "int8"), w, added, torch.bfloat16)
    package.int8_linear(x, w.codes, w.scale.flatten(), added, torch.bfloat16)
    ours, theirs = seen
    assert len(ours) == len(theirs)
    for found, wanted in zip(ours, theirs, strict=True):
        if not isinstance(wanted, Tensor):
            assert found == wanted
        elif wanted.shape != (TOKENS, OUTPUTS):  # the result is not written here
            assert torch.equal(found.flatten(), wanted.flatten())


def fake_rows(rows: int, columns: int) -> Rows:
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="cuda")
    return Rows(codes, torch.empty(rows, 1, device="cuda"))


@needs_known_torch
@BIAS
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90", "sm_120"])
def test_scaled_products_of_rows_pass_the_checks_of_torch(architecture, bias):
    """torch checks dtypes, shapes and strides of codes and scales when it is asked for shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.gpu_env.fake_cuda import fake_cuda

    with fake_cuda(architecture), FakeTensorMode():
        x, w = fake_rows(TOKENS, COLUMNS), fake_rows(OUTPUTS, COLUMNS)
        added = torch.empty(OUTPUTS, device="cuda") if bias else None
        found = rowwise.rowwise(x, w, added, torch.bfloat16)
        assert (found.shape, found.dtype, found.device.type) == ((TOKENS, OUTPUTS), torch.bfloat16, "cuda")
        turned = Rows(x.codes, x.scale.expand(TOKENS, 2))
        with pytest.raises(RuntimeError, match="scal"):
            rowwise.rowwise(turned, w, added, torch.bfloat16)


def test_scaled_mm_of_nvfp4_binds(monkeypatch):
    """The function's signature, and below it the operator's schema with the very values that it was called with."""
    functional = import_module("torch.nn.functional")
    real = functional.scaled_mm
    spy = Spy(real, torch.zeros(TOKENS, OUTPUTS, dtype=torch.bfloat16))
    x, w = (nvfp4.quantize_blocks(gauss(rows, COLUMNS, seed=rows)) for rows in (TOKENS, OUTPUTS))
    monkeypatch.setattr(functional, "scaled_mm", spy)
    assert nvfp4.block_scaled(x, w, torch.bfloat16) is spy.answer
    (call,) = spy.calls
    codes = call.arguments["mat_a"], call.arguments["mat_b"]
    assert [tensor.dtype for tensor in codes] == [torch.float4_e2m1fn_x2] * 2
    assert codes[1].stride(0) == 1  # K innermost on both sides
    blocks, whole = call.arguments["scale_b"]
    assert (blocks.dtype, blocks.numel()) == (torch.float8_e4m3fn, OUTPUTS * COLUMNS // 16)
    assert whole.dtype == torch.float32
    # On meta tensors the operator checks what it is given, without a device.
    given = {name: on_meta(value) for name, value in call.arguments.items()}
    found = real(**given)
    assert (found.shape, found.dtype) == ((TOKENS, OUTPUTS), torch.bfloat16)


def on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [on_meta(item) for item in value] if isinstance(value, list) else value
