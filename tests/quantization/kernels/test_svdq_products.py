"""Products of SVDQ layers: orders of the tensors, kernels within the agreement, wrong ones refused, the 16-bit weight.

Kernels of packages are stood in for: by arithmetic on the very tensors that they are given, in their order.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.forecast.precisions import PRECISIONS
from runner.quantization.formats.e2m1 import decode, unpack
from runner.quantization.formats.svdq import (
    dequantize_residual,
    effective_weight,
    pack_lowrank,
    pad,
    quantize_activations,
    svdq_linear,
    unpack_lowrank,
    unpack_scales,
    unpack_vector,
    unpack_weight,
)
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.kernels import low_bit, nvfp4, svdq_products
from runner.quantization.kernels.low_bit import multiply_svdq, pick_gemm_backend, relative_error
from runner.quantization.kernels.nvfp4 import Blocks, dequantize_blocks, from_blocked
from runner.quantization.kernels.svdq_order import ROWS, TILES, join_factors, reorder
from runner.quantization.kernels.svdq_products import ORDERS, probe_tensors, write_weight
from tests.quantization.svdq_layers import quantize_weight

BOTH = pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)
INT4, NVFP4 = SVDQ_LAYOUTS.values()
CPU = torch.device("cpu")


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_rows(tensors, layout):
    return {name: reorder(name, tensor, layout.precision, ROWS) for name, tensor in tensors.items()}


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_svdq_backend_has_order():
    for row in PRECISIONS.values():
        if row.layout == "svdq":
            assert {backend.name for backend in (*row.backends, row.reference)} <= ORDERS.keys()


@BOTH
@pytest.mark.parametrize("shape", [(128, 128), (256, 640), (384, 256)])
def test_in_rows_then_reorder_gives_same_bytes(layout, shape):
    tensors = quantize_weight(gauss(*shape), layout.with_rank(48))
    rows = in_rows(tensors, layout)
    for name, tensor in tensors.items():
        assert (rows[name].shape, rows[name].dtype) == (tensor.shape, tensor.dtype)
        assert rows[name].is_contiguous()
        back = reorder(name, rows[name], layout.precision, TILES)
        assert torch.equal(bytes_of(back), bytes_of(tensor))
        assert back.is_contiguous()


@BOTH
def test_in_rows_gives_tensors_in_order_of_product(layout):
    tensors = quantize_weight(gauss(256, 384), layout)
    rows = in_rows(tensors, layout)
    codes = unpack(rows["qweight"].view(torch.uint8))
    assert torch.equal(codes, unpack_weight(tensors["qweight"], layout.precision).view(torch.uint8) & 15)
    scales = unpack_scales(tensors["wscales"], layout.precision)
    if layout.precision == "int4":
        assert torch.equal(rows["wscales"], scales.T)
    else:
        plain = from_blocked(rows["wscales"].view(torch.uint8).flatten(), *scales.shape)
        assert torch.equal(plain, scales.view(torch.uint8))
        # cuBLAS: the scale of (r, c) lies at ((r // 128) C / 4 + c // 4) 512 + (r % 32) 16 + (r % 128) // 32 4 + c % 4
        flat, (r, c) = rows["wscales"].view(torch.uint8).flatten(), (201, 13)
        at = ((r // 128) * 6 + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
        assert flat[at] == scales.view(torch.uint8)[r, c]
    assert torch.equal(rows["proj_down"], unpack_lowrank(tensors["proj_down"], down=True).T)
    assert torch.equal(rows["proj_up"], unpack_lowrank(tensors["proj_up"], down=False))
    assert torch.equal(rows["smooth_factor"], unpack_vector(tensors["smooth_factor"]))


@BOTH
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("order", [TILES, ROWS])
def test_join_factors_appends_lora_to_factors_of_layer(layout, rank, order):
    tensors, down, up = quantize_weight(gauss(200, 160), layout), gauss(rank, 160, seed=2), gauss(200, rank, seed=3)
    given = tensors if order == TILES else in_rows(tensors, layout)
    joined = join_factors(given, order, down, up)
    if order == ROWS:
        joined |= {
            "proj_down": pack_lowrank(joined["proj_down"].T, down=True),
            "proj_up": pack_lowrank(joined["proj_up"], down=False),
        }
    wide = 32 + -(-rank // 16) * 16
    own_down, own_up = unpack_lowrank(tensors["proj_down"], down=True), unpack_lowrank(tensors["proj_up"], down=False)
    found_down, found_up = unpack_lowrank(joined["proj_down"], down=True), unpack_lowrank(joined["proj_up"], down=False)
    assert torch.equal(found_down, pad(torch.cat([own_down, pad(down.bfloat16(), (rank, 256))]), (wide, 256)))
    assert torch.equal(found_up, pad(torch.cat([own_up, pad(up.bfloat16(), (256, rank))], dim=1), (256, wide)))
    assert joined["qweight"] is given["qweight"]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_write_weight_equals_effective_weight(layout, dtype):
    tensors = quantize_weight(gauss(300, 160), layout)
    down, up = gauss(5, 160, seed=2), gauss(300, 5, seed=3)
    for lora in ((None, None), (down, up)):
        wanted = effective_weight(tensors, layout)[:300, :160] + (0 if lora[0] is None else up @ down)
        out = torch.empty(300, 160, dtype=dtype)
        write_weight(tensors, layout, *lora, out)
        assert relative_error(out, wanted) < {torch.float32: 1e-6}.get(dtype, 0.0025)


@BOTH
def test_write_weight_of_large_weight_works_in_chunks_of_rows(layout):
    """No float32 copy of the whole weight exists beside the result."""
    tensors = probe_tensors(layout, CPU)
    many = {name: t.repeat(16, *[1] * (t.ndim - 1)) for name, t in tensors.items() if name not in ("wscales",)}
    many |= {"smooth_factor": tensors["smooth_factor"], "proj_down": tensors["proj_down"]}
    many["wscales"] = tensors["wscales"].flatten().repeat(16).view(-1, 2048)
    out = torch.empty(2048, 256)
    write_weight(many, layout, None, None, out)
    wanted = effective_weight(tensors, layout)
    for tile in out.split(128):
        torch.testing.assert_close(tile, wanted, rtol=1e-5, atol=1e-6)


def emulated(x, tensors, layout, out_features, bias, *, reciprocal):
    """A kernel with roundings of its own: x / s in float32, or by reciprocals in bfloat16."""
    smooth = unpack_vector(tensors["smooth_factor"])
    divided = x * (1 / smooth) if reciprocal else x.float() / smooth.float()
    unsmoothed = tensors | {
        "smooth_factor": torch.ones_like(smooth),
        "proj_up": torch.zeros_like(tensors["proj_up"]),
    }
    result = svdq_linear(divided, unsmoothed, layout, out_features, bias).float()
    down, up = unpack_lowrank(tensors["proj_down"], down=True), unpack_lowrank(tensors["proj_up"], down=False)
    return (result + (x @ down.T).float() @ up.float().T[:, :out_features]).to(x.dtype)


@BOTH
@pytest.mark.parametrize("reciprocal", [False, True])
def test_check_backend_accepts_small_difference_of_rounding(layout, reciprocal, monkeypatch):
    def kernel(*given):
        return emulated(*given, reciprocal=reciprocal)

    monkeypatch.setattr(svdq_products, "cache_dit", kernel)
    assert low_bit._check_backend("cache_dit", layout.name, CPU) is None
    tensors = probe_tensors(layout, CPU)
    x = low_bit.probe_matrix(80, 256, CPU)
    off = relative_error(kernel(x, tensors, layout, 128, None), svdq_linear(x, tensors, layout, 128))
    assert 0.001 < off < 0.6 * PRECISIONS[layout.name].agreement


WRONG = {
    "codes": lambda t: {"qweight": t["qweight"].roll(1, 1)},
    "scales": lambda t: {"wscales": t["wscales"].roll(1, 1)},
    "smoothing": lambda t: {"smooth_factor": unpack_vector(t["smooth_factor"])},
    "down": lambda t: {"proj_down": unpack_lowrank(t["proj_down"], down=True).T.contiguous()},
    "up": lambda t: {"proj_up": unpack_lowrank(t["proj_up"], down=False)},
    "no low-rank part": lambda t: {"proj_up": torch.zeros_like(t["proj_up"])},
    "channels": lambda t: {"wcscales": unpack_vector(t["wcscales"])},
}


@BOTH
@pytest.mark.parametrize("wrong", WRONG)
def test_check_backend_refuses_wrong_order_or_missing_part(layout, wrong, monkeypatch):
    if wrong == "channels" and layout.precision == "int4":
        return

    def kernel(x, tensors, *rest):
        return svdq_linear(x, tensors | WRONG[wrong](tensors), *rest)

    monkeypatch.setattr(svdq_products, "cache_dit", kernel)
    problem = low_bit._check_backend("cache_dit", layout.name, CPU)
    assert problem is not None
    off = float(problem.removeprefix("off by ").split()[0])
    assert off > 2 * PRECISIONS[layout.name].agreement, problem


@BOTH
def test_check_backend_refuses_bias_in_wrong_order(layout, monkeypatch):
    monkeypatch.setattr(svdq_products, "cache_dit", lambda x, t, lay, n, b: svdq_linear(x, t, lay, n, b.flip(0)))
    assert "off by" in (low_bit._check_backend("cache_dit", layout.name, CPU) or "")


# cache-dit's kernels by a stand-in of its module: it computes from what it is given, as the packed order says


def fake_cache_dit(layout, calls):
    """The package's two functions as plain arithmetic on packed operands; between them goes what the package's go."""

    def quantize(input, lora_down, smooth, fuse_glu, fp4, pad_size):
        calls.append({"dtype": input.dtype, "fp4": fp4, "pad": pad_size, "glu": fuse_glu, "rank": lora_down.shape[1]})
        rows = -(-input.shape[0] // pad_size) * pad_size
        codes, scales = quantize_activations(input / unpack_vector(smooth), layout.precision)
        low = input.float() @ unpack_lowrank(lora_down, down=True).float().T
        return tuple(pad(t, (rows, t.shape[1])) for t in (codes, scales.float(), low))

    def gemm(act, wgt, ascales, wscales, lora_act_in, lora_up, bias, fp4, alpha, wcscales, act_unsigned, output_dtype):
        calls.append({"alpha": alpha, "unsigned": act_unsigned, "out": output_dtype, "rows": act.shape[0]})
        x = (decode(act) if fp4 else act.float()) * ascales.repeat_interleave(layout.group, 1)
        stored = {"qweight": wgt, "wscales": wscales} | ({} if wcscales is None else {"wcscales": wcscales})
        result = x @ dequantize_residual(stored, layout).T
        result += lora_act_in @ unpack_lowrank(lora_up, down=False).float().T
        return (result if bias is None else result + unpack_vector(bias).float()).to(output_dtype)

    return types.SimpleNamespace(
        svdq_get_load_error=lambda: None, svdq_quantize_w4a4_act_fuse_lora=quantize, svdq_gemm_w4a4=gemm
    )


@pytest.fixture
def calls(monkeypatch, layout):
    made: list[dict] = []
    package = types.ModuleType("cache_dit")
    monkeypatch.setitem(sys.modules, "cache_dit", package)
    monkeypatch.setitem(sys.modules, "cache_dit.kernels", fake_cache_dit(layout, made))
    return made


@BOTH
def test_cache_dit_is_called_as_in_cache_dit_layer(layout, calls):
    tensors, x, bias = quantize_weight(gauss(200, 160), layout), gauss(77, 160).bfloat16(), gauss(200, seed=4)
    found = multiply_svdq(x, tensors, layout.name, "cache_dit", 200, bias)
    wanted = multiply_svdq(x, tensors, layout.name, "reference", 200, bias)
    assert found.shape == (77, 200)
    assert found.is_contiguous()
    assert relative_error(found, wanted) < 0.005
    quantized, multiplied = calls
    assert quantized == {
        "dtype": torch.bfloat16,
        "fp4": layout.precision == "nvfp4",
        "pad": 256,
        "glu": False,
        "rank": 32,
    }
    assert multiplied == {"alpha": 1.0, "unsigned": False, "out": torch.bfloat16, "rows": 256}
    assert low_bit._check_backend("cache_dit", layout.name, CPU) is None
    # float32 activations pass through bfloat16; a LoRA makes the rank grow
    calls.clear()
    down, up = gauss(4, 160, seed=5), gauss(200, 4, seed=6)
    found = multiply_svdq(x.float(), tensors, layout.name, "cache_dit", 200, None, down, up)
    wanted = multiply_svdq(x.float(), tensors, layout.name, "reference", 200, None, down, up)
    assert found.dtype is torch.float32
    assert relative_error(found, wanted) < 0.03
    assert calls[0]["rank"] == 48


@BOTH
def test_check_backend_with_extension_that_does_not_load_gives_reason(layout, calls):
    sys.modules["cache_dit.kernels"].svdq_get_load_error = lambda: ImportError("_C.so: undefined symbol: _ZN3c10")
    problem = low_bit._check_backend("cache_dit", layout.name, CPU)
    assert problem == f"ImportError: cache-dit's kernels do not load with torch {torch.__version__}: " + (
        "_C.so: undefined symbol: _ZN3c10"
    )


@BOTH
def test_check_backend_without_package_gives_reason(layout, monkeypatch):
    for package in ("cache_dit", "comfy_kitchen"):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    for backend in PRECISIONS[layout.name].backends:
        problem = low_bit._check_backend(backend.name, layout.name, CPU)
        assert problem is not None, backend.name
        if backend.name != "scaled_mm":
            assert problem.startswith("ModuleNotFoundError")


def test_product_of_other_precision_is_refused():
    x = gauss(8, 256).bfloat16()
    with pytest.raises(ValueError, match="no SVDQuant product of nvfp4"):
        svdq_products.comfy_kitchen(x, {}, NVFP4, 128, None)
    with pytest.raises(ValueError, match="no block-scaled product of int4"):
        svdq_products.scaled_mm(x, {}, INT4, 128, None)


def test_scaled_mm_agrees_with_definition(monkeypatch):
    """A substitute for cuBLAS that reads scales in its order."""

    def multiply(x, w):
        plain = []
        for blocks in (x, w):
            rows, columns = -(-blocks.packed.shape[0] // 128) * 128, blocks.packed.shape[1] // 8
            scale = from_blocked(blocks.scale.view(torch.uint8), rows, columns)[: blocks.packed.shape[0]]
            plain.append(dequantize_blocks(Blocks(blocks.packed, scale, blocks.tensor_scale)))
        return (plain[0] @ plain[1].T).bfloat16()

    monkeypatch.setattr(svdq_products, "multiply_blocked", multiply)
    assert low_bit._check_backend("scaled_mm", NVFP4.name, CPU) is None
    tensors, x, bias = quantize_weight(gauss(200, 160), NVFP4), gauss(77, 160).bfloat16(), gauss(200, seed=4)
    down, up = gauss(4, 160, seed=5), gauss(200, 4, seed=6)
    found = multiply_svdq(x, in_rows(tensors, NVFP4), NVFP4.name, "scaled_mm", 200, bias, down, up)
    wanted = multiply_svdq(x, tensors, NVFP4.name, "reference", 200, bias, down, up)
    assert relative_error(found, wanted) < 0.01
    assert nvfp4.multiply_blocked is not multiply


@BOTH
def test_lora_of_unsupported_rank_is_separate_product(layout, calls):
    """A full difference of a weight arrives as factors of its whole width."""
    weight = gauss(128, 1152)
    tensors, x, diff = quantize_weight(weight, layout), gauss(9, 1152).bfloat16(), 0.1 * gauss(128, 1152, seed=7)
    for down, up in ((torch.eye(1152), diff), (diff, torch.eye(128))):
        calls.clear()
        found = multiply_svdq(x, tensors, layout.name, "cache_dit", 128, None, down, up)
        wanted = multiply_svdq(x, tensors, layout.name, "reference", 128, None).float() + x.float() @ diff.T
        assert relative_error(found, wanted) < 0.01
        assert calls[0]["rank"] == (32 if up is diff else 160)


@BOTH
def test_pick_gemm_backend_on_cpu_is_reference(layout):
    assert pick_gemm_backend(CPU, layout.name)[0] == "reference"
    linear = nn.Linear(160, 200)
    tensors, x = quantize_weight(linear.weight.detach(), layout), gauss(7, 160)
    found = multiply_svdq(x, tensors, layout.name, "reference", 200, linear.bias.detach())
    assert torch.equal(found, svdq_linear(x, tensors, layout, 200, linear.bias.detach()))
    exact = F.linear(x, effective_weight(tensors, layout)[:200, :160], linear.bias.detach())
    assert relative_error(found, exact) < 0.15
