"""Our calls of the packages that multiply SVDQ layers, against the packages that users get; no GPU."""

from __future__ import annotations

import inspect
import sys
import types
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from runner.quantization.formats.svdq import torch_table
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS, SvdqLayout
from runner.quantization.kernels import low_bit, nvfp4, svdq_products
from runner.quantization.kernels.low_bit import multiply_svdq, relative_error
from runner.quantization.kernels.svdq_order import ROWS, reorder
from runner.quantization.svdq_linear import SvdqLinear, svdq_linear
from tests.gpu_env.known_torch import needs_gpu_env, needs_known_torch
from tests.gpu_env.test_signatures import Spy, on_meta
from tests.quantization.svdq_layers import quantize_weight

pytestmark = needs_gpu_env

BOTH = pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)
INT4, NVFP4 = SVDQ_LAYOUTS.values()
TOKENS, COLUMNS, OUTPUTS = 77, 160, 200  # padded to 256 each


def gauss(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_rows(layout: SvdqLayout) -> dict[str, Tensor]:
    stored = quantize_weight(gauss(OUTPUTS, COLUMNS, seed=1), layout)
    return {name: reorder(name, tensor, layout.precision, ROWS) for name, tensor in stored.items()}


def test_comfy_kitchen_on_cpu_agrees_with_definition():
    """An independent implementation of int4: quantiser, product, order of codes and scales, low-rank part, a job's
    LoRA."""
    assert low_bit._check_backend("comfy_kitchen", INT4.name, torch.device("cpu")) is None
    x, bias = gauss(TOKENS, COLUMNS, seed=0).bfloat16(), gauss(OUTPUTS, seed=2)
    stored = quantize_weight(gauss(OUTPUTS, COLUMNS, seed=1), INT4)
    lora = gauss(5, COLUMNS, seed=3), gauss(OUTPUTS, 5, seed=4)
    for given in ((), lora):
        found = multiply_svdq(x, in_rows(INT4), INT4.name, "comfy_kitchen", OUTPUTS, bias, *given)
        wanted = multiply_svdq(x, stored, INT4.name, "reference", OUTPUTS, bias, *given)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert relative_error(found, wanted) < 0.03  # scales and quotients in bfloat16


def test_comfy_kitchen_on_cpu_with_wrong_order_is_refused(monkeypatch):
    monkeypatch.setattr(svdq_products, "ORDERS", dict.fromkeys(svdq_products.ORDERS, "tiles"))
    assert "off by" in (low_bit._check_backend("comfy_kitchen", INT4.name, torch.device("cpu")) or "")


def test_comfy_kitchen_cuda_functions_accept_our_calls(monkeypatch):
    """Checked by parameter names, which both backends share; the CUDA functions run only on a GPU."""
    cuda, eager = import_module("comfy_kitchen.backends.cuda"), import_module("comfy_kitchen.backends.eager.svdquant")
    seen = []
    for name in ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"):
        real, plain = getattr(cuda, name), getattr(eager, name)
        assert list(inspect.signature(real).parameters) == list(inspect.signature(plain).parameters)
        spy = Spy(real)

        def both(*given, plain=plain, spy=spy, **how):
            spy(*given, **how)
            return plain(*given, **how)

        monkeypatch.setattr(eager, name, both)
        seen.append(spy)
    x = gauss(TOKENS, COLUMNS, seed=0)
    multiply_svdq(x, in_rows(INT4), INT4.name, "comfy_kitchen", OUTPUTS, gauss(OUTPUTS, seed=2))
    (quantized,), (multiplied,) = (spy.calls for spy in seen)
    assert (quantized.arguments["x"].shape, quantized.arguments["x"].dtype) == ((TOKENS, 256), torch.bfloat16)
    assert quantized.arguments["x"].is_contiguous()
    assert quantized.arguments["pad_size"] == 256
    assert multiplied.arguments["wgt"].dtype == torch.int8
    assert multiplied.arguments["wscales"].shape == (256 // 64, 256)
    assert multiplied.arguments["bias"].dtype == torch.bfloat16
    assert "COMFY_KITCHEN_SVDQUANT_REUSE_WORKSPACE" in inspect.getsource(cuda.quantize_svdquant_w4a4)


def test_scaled_mm_accepts_our_call(monkeypatch):
    functional = import_module("torch.nn.functional")
    real = functional.scaled_mm
    spy = Spy(real, torch.zeros(TOKENS, 256, dtype=torch.bfloat16))
    monkeypatch.setattr(functional, "scaled_mm", spy)
    x = gauss(TOKENS, COLUMNS, seed=0)
    found = multiply_svdq(x, in_rows(NVFP4), NVFP4.name, "scaled_mm", OUTPUTS, gauss(OUTPUTS, seed=2))
    assert (found.shape, found.dtype) == ((TOKENS, OUTPUTS), torch.float32)
    (call,) = spy.calls
    assert call.arguments["mat_b"].stride(0) == 1
    assert (call.arguments["scale_b"][0].dtype, call.arguments["scale_b"][0].numel()) == (torch.float8_e4m3fn, 256 * 16)
    assert call.arguments["scale_a"][0].numel() == 128 * 16  # 77 tokens in a tile of 128
    checked = real(**{name: on_meta(value) for name, value in call.arguments.items()})
    assert (checked.shape, checked.dtype) == ((TOKENS, 256), torch.bfloat16)
    assert nvfp4.multiply_blocked(*(nvfp4.Blocks(*blocks) for blocks in _operands(call))) is spy.answer


def _operands(call):
    for side in "ab":
        codes = call.arguments[f"mat_{side}"]
        codes = codes.t() if side == "b" else codes
        yield codes.view(torch.uint8), call.arguments[f"scale_{side}"][0], call.arguments[f"scale_{side}"][1]


@needs_known_torch
@BOTH
def test_svdq_linear_on_fake_cuda_gives_shape_dtype_and_device(layout):
    """Only shapes, dtypes and devices, from the operator's fake implementation, for each backend by name."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.gpu_env.fake_cuda import fake_cuda

    with fake_cuda("sm_120"), FakeTensorMode():
        table = torch_table(layout, OUTPUTS, COLUMNS)
        stored = {name: torch.empty(shape, dtype=dtype, device="cuda") for name, (shape, dtype) in table.items()}
        layer = SvdqLinear(stored, torch.empty(OUTPUTS, device="cuda"), layout, COLUMNS, OUTPUTS)
        x = torch.empty(2, TOKENS, COLUMNS, dtype=torch.bfloat16, device="cuda")
        for backend in ("", "cache_dit", "reference"):
            layer.backend = backend
            found = layer(x)
            assert (found.shape, found.dtype, found.device.type) == ((2, TOKENS, OUTPUTS), torch.bfloat16, "cuda")
    assert "svdq_linear" in str(svdq_linear._opoverload)


@BOTH
def test_cache_dit_without_extension_is_refused_with_loader_error(layout, monkeypatch):
    """As when it is installed for another torch: its loader keeps the error; its own message does not give it."""
    if find_spec("cache_dit") is None:
        pytest.skip("cache-dit is not installed here")
    loader = import_module("cache_dit.kernels.cuda._svdquant")
    error = ImportError("_C_svdquant.so: undefined symbol: _ZN3c104impl3cow23materialize_cow_storage")
    monkeypatch.setattr(loader, "_cached_extension_module", None)
    monkeypatch.setattr(loader, "_cached_load_error", error)
    problem = low_bit._check_backend("cache_dit", layout.name, torch.device("cpu"))
    assert problem == f"ImportError: cache-dit's kernels do not load with torch {torch.__version__}: {error}"
    monkeypatch.setattr(loader, "_cached_load_error", None)
    problem = low_bit._check_backend("cache_dit", layout.name, torch.device("cpu"))
    assert problem is not None
    assert "_C_svdquant" in problem  # the pure-Python package has none


@BOTH
def test_cache_dit_functions_accept_our_calls(layout, monkeypatch):
    """Checked by parameter names, which are the same in the package with kernels and in the one without."""
    if find_spec("cache_dit") is None:
        pytest.skip("cache-dit is not installed here")
    real = import_module("cache_dit.kernels")
    rows = 256
    answer = torch.zeros(rows, 256, dtype=torch.bfloat16)
    quantize, gemm = Spy(real.svdq_quantize_w4a4_act_fuse_lora, answer), Spy(real.svdq_gemm_w4a4, answer)
    stand_in = {
        "svdq_get_load_error": lambda: None,
        "svdq_quantize_w4a4_act_fuse_lora": lambda **how: (quantize(**how), answer, answer),
        "svdq_gemm_w4a4": gemm,
    }
    monkeypatch.setitem(sys.modules, "cache_dit.kernels", types.SimpleNamespace(**stand_in))
    stored = quantize_weight(gauss(OUTPUTS, COLUMNS, seed=1), layout)
    found = multiply_svdq(gauss(TOKENS, COLUMNS, seed=0), stored, layout.name, "cache_dit", OUTPUTS, None)
    assert (found.shape, found.dtype) == ((TOKENS, OUTPUTS), torch.float32)
    assert gemm.calls[0].arguments["wgt"] is stored["qweight"]
    assert gemm.calls[0].arguments["wcscales"] is stored.get("wcscales")
    assert quantize.calls[0].arguments["input"].shape == (TOKENS, 256)
