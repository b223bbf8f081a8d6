"""Layers in 8 and 4 bits: equal to the formats' arithmetic, LoRAs seen, kernels chosen only when right, one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from runner.forecast.precisions import PRECISIONS
from runner.quantization.formats.e2m1 import FORMATS, G32, NVFP4, dequantize
from runner.quantization.kernels import low_bit as module
from runner.quantization.kernels import rowwise
from runner.quantization.kernels.low_bit import (
    EXACT,
    LowBitLinear,
    pick_gemm_backend,
    relative_error,
)
from runner.quantization.kernels.nvfp4 import dequantize_blocks, quantize_blocks
from runner.quantization.kernels.row_codes import pick_rows
from runner.quantization.kernels.rowwise import quantize_rows, rotate_rows
from runner.quantization.linear import FP4Linear
from tests.quantization.kernels.test_rowwise import dequantize_rows

ROWWISE = pytest.mark.parametrize("compute", ["fp8", "int8"])
COMPUTES = [row.name for row in PRECISIONS.values() if row.layout != "exact"]
OF_FP4 = [row.name for row in PRECISIONS.values() if row.layout in ("rows", "blocks")]
CPU = torch.device("cpu")


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(fmt=G32, outputs: int = 48, columns: int = 64) -> FP4Linear:
    torch.manual_seed(2)
    return FP4Linear.from_linear(nn.Linear(columns, outputs), fmt)


def in_rows(x: Tensor, weight: Tensor, compute: str) -> Tensor:
    """The format's arithmetic, in float64 and written out."""
    if compute == "int8":
        x, weight = rotate_rows(x), rotate_rows(weight)
    x, weight = (dequantize_rows(quantize_rows(matrix, compute)).double() for matrix in (x, weight))
    return x @ weight.T / (64 if compute == "int8" else 1)


@ROWWISE
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_layer_with_reference_backend_computes_in_its_format(compute, fmt):
    layer, x = layer_of(fmt), gauss(3, 5, 64)
    exact = layer(x)
    layer.set_compute(compute, "reference")
    assert f"compute={compute}" in repr(layer)
    found = layer(x)
    wanted = in_rows(x.view(15, 64), dequantize(layer.stored, fmt), compute) + layer.bias.double()
    torch.testing.assert_close(found.view(15, 48).double(), wanted, rtol=1e-4, atol=1e-4)
    assert 0 < relative_error(found, exact) < 0.06
    layer.set_compute(EXACT)
    assert torch.equal(layer(x), exact)


@ROWWISE
def test_lora_is_added_to_weight_before_rounding(compute):
    layer, x = layer_of(), gauss(7, 64)
    down, up, delta = gauss(4, 64, seed=4), gauss(48, 4, seed=5), gauss(48, seed=6)
    layer.set_lora([(down, up, 0.5)])
    layer.set_bias_delta(delta)
    layer.set_compute(compute, "reference")
    weight = dequantize(layer.stored, G32) + 0.5 * up @ down
    wanted = in_rows(x, weight, compute) + (layer.bias + delta).double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-3, atol=1e-3)
    assert layer.lora_rank == 4
    layer.set_lora(None)
    assert layer.lora_rank == 0


def test_nvfp4_layer_uses_stored_codes_and_adds_lora_separately():
    layer, x = layer_of(NVFP4), gauss(7, 64)
    layer.set_compute("nvfp4", "reference")
    plain = dequantize_blocks(quantize_blocks(x)).double() @ dequantize(layer.stored, NVFP4).double().T
    plain = plain + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), plain, rtol=1e-5, atol=1e-5)
    down, up = gauss(4, 64, seed=4), gauss(48, 4, seed=5)
    layer.set_lora([(down, up, 0.5)])
    torch.testing.assert_close(layer(x).double(), plain + 0.5 * (x @ down.T @ up.T).double(), rtol=1e-4, atol=1e-4)


def test_set_compute_with_unknown_compute_or_backend_is_refused():
    with pytest.raises(ValueError, match="g32 cannot compute as nvfp4"):
        layer_of().set_compute("nvfp4", "reference")
    for compute, backend in (("fp8", "int_mm"), ("int4", "reference"), ("fp8", "")):
        with pytest.raises(ValueError, match="no backend"):
            layer_of().set_compute(compute, backend)
    with pytest.raises(ValueError, match="no backend"):
        LowBitLinear(nn.Linear(64, 48), "nvfp4", "reference")


@ROWWISE
def test_low_bit_linear_shares_parameters_of_plain_layer(compute):
    linear, x = nn.Linear(64, 48), gauss(7, 64)
    low = LowBitLinear(linear, compute, "reference")
    assert low.weight is linear.weight
    with torch.no_grad():
        linear.weight.mul_(2)  # as a LoRA that is merged in place
        wanted = in_rows(x, linear.weight, compute) + linear.bias.double()
        torch.testing.assert_close(low(x).double(), wanted, rtol=1e-4, atol=1e-4)
        low.set_compute(EXACT)
        assert torch.equal(low(x), linear(x))


@pytest.mark.parametrize(("compute", "backend"), [("fp8", "scaled_mm"), ("int8", "int_mm")])
def test_layer_with_torch_kernel_agrees_with_definition(compute, backend):
    """torch runs both on a CPU too: an independent implementation of the same numbers."""
    layer, x = layer_of(), gauss(40, 64).bfloat16()
    layer = layer.to(torch.bfloat16)
    layer.set_compute(compute, "reference")
    wanted = layer(x)
    layer.set_compute(compute, backend)
    assert relative_error(layer(x), wanted) < 0.005


@pytest.mark.parametrize("compute", COMPUTES)
def test_pick_gemm_backend_on_cpu_is_reference(compute):
    assert pick_gemm_backend(CPU, compute)[0] == "reference"


@pytest.mark.parametrize("broken", ["raises", "is off", "is not finite"])
def test_check_backend_refuses_wrong_kernel(broken, monkeypatch):
    def kernel(x, w, bias, dtype):
        if broken == "raises":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        return rowwise.reference(x, w, bias, dtype) * (1.02 if broken == "is off" else torch.nan)

    monkeypatch.setattr(rowwise, "rowwise", kernel)
    problem = module._check_backend("scaled_mm", "fp8", CPU)
    assert problem is not None
    wanted = {"raises": "RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED", "is off": "off by 0.02", "is not finite": "inf"}
    assert wanted[broken] in problem


def test_check_backend_accepts_small_difference_of_rounding(monkeypatch):
    """Hopper's fast sums of e4m3 differ by .003, by a model of them."""
    monkeypatch.setattr(rowwise, "rowwise", lambda *given: rowwise.reference(*given) * 1.008)
    assert module._check_backend("scaled_mm", "fp8", CPU) is None


@pytest.mark.parametrize(("compute", "backend"), [("fp8", "scaled_mm"), ("int8", "int_mm")])
def test_check_backend_accepts_correct_kernel(compute, backend):
    assert module._check_backend(backend, compute, CPU) is None


def test_problem_of_shape_names_unsupported_shape():
    assert PRECISIONS["fp8"].problem_of_shape(48, 64) is None
    assert "no multiple of [16, 16]" in (PRECISIONS["int8"].problem_of_shape(20, 64) or "")
    assert PRECISIONS["nvfp4"].problem_of_shape(48, 48) is not None


@pytest.mark.parametrize("compute", OF_FP4)
def test_compiled_layer_is_one_graph(compute):
    layer, x = layer_of(NVFP4), gauss(6, 64)
    layer.set_compute(compute, "reference")
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@ROWWISE
def test_layer_on_gpu_agrees_with_definition(compute):
    device = torch.device("cuda")
    backend, why = pick_gemm_backend(torch.device("cuda", 0), compute)
    if backend is None:
        pytest.skip(why)
    assert pick_rows(torch.device("cuda", 0), compute)[0] == "triton"
    layer, x = layer_of(G32, 5120, 5120).to(device, torch.bfloat16), gauss(1040, 5120).to(device, torch.bfloat16)
    layer.set_compute(compute, "reference")
    wanted = layer(x)
    layer.set_compute(compute, backend)
    assert relative_error(layer(x), wanted) < 0.005
