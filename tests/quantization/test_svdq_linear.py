"""SvdqLinear: the definition, the 16-bit weight, LoRAs, orders of its tensors, shapes, streaming, one graph."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from runner.forecast.precisions import PRECISIONS, REFERENCE, GemmBackend
from runner.generation.runtime.streaming import BlockStream
from runner.generation.wan_animate.compiled import structure_of
from runner.quantization.formats.svdq import effective_weight, svdq_linear
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.kernels import svdq_products
from runner.quantization.kernels.low_bit import EXACT, relative_error
from runner.quantization.kernels.svdq_order import ROWS, TILES, reorder
from runner.quantization.kernels.workspace import release_workspace, workspace_bytes
from runner.quantization.lora.apply import HoldsLora, Lora, attached
from runner.quantization.lora.read import Full, LowRank
from runner.quantization.svdq_linear import SvdqLinear
from runner.quantization.svdq_linear import svdq_linear as operator
from tests.quantization.svdq_layers import quantize_linear

BOTH = pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)
COMPUTES = pytest.mark.parametrize("low", [False, True], ids=["16 bits", "four bits"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    release_workspace()
    with torch.no_grad():
        yield


@cache
def made(layout, columns: int, outputs: int, bias: bool) -> SvdqLinear:
    torch.manual_seed(1)
    return quantize_linear(nn.Linear(columns, outputs, bias=bias), layout)


def layer_of(layout, columns: int = 160, outputs: int = 200, *, bias: bool = True, low: bool = False) -> SvdqLinear:
    layer = copy.deepcopy(made(layout, columns, outputs, bias))
    if low:
        layer.set_compute(layout.name, REFERENCE)
    return layer


def expected(layer: SvdqLinear, x: Tensor, delta: Tensor | float = 0.0) -> Tensor:
    """In 16 bits: with the weight that the tensors stand for."""
    weight = effective_weight(layer.stored, layer.layout)[: layer.out_features, : layer.in_features] + delta
    return F.linear(x, weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("columns", "outputs", "bias"), [(160, 200, True), (256, 128, False)])
def test_layer_keeps_shape_and_dtype_of_input(layout, bias, dtype, columns, outputs):
    layer = layer_of(layout, columns, outputs, bias=bias)
    for shape in [(columns,), (1, columns), (7, columns), (2, 3, columns)]:
        x = torch.randn(shape).to(dtype)
        layer.set_compute(EXACT)
        exact = layer(x)
        layer.set_compute(layout.name, REFERENCE)
        low = layer(x)
        for found in (exact, low):
            assert (found.dtype, found.shape) == (dtype, (*shape[:-1], outputs))
            assert found.is_contiguous()
        assert relative_error(exact, expected(layer, x)) < {torch.float32: 1e-5}.get(dtype, 0.01)
        assert torch.equal(low, svdq_linear(x, layer.stored, layout, outputs, layer.bias))
        assert 0 < relative_error(low, exact) < 0.2


@BOTH
def test_layer_with_input_of_other_width_is_refused(layout):
    """Otherwise it would be padded with zeros."""
    with pytest.raises(ValueError, match="an input of 128 channels for a layer of 160"):
        layer_of(layout)(torch.randn(3, 128))


@BOTH
def test_layer_keeps_no_full_precision_weight(layout):
    layer = layer_of(layout)
    held = layout.bytes(200, 160) + 200 * 4  # and the bias
    for _ in range(2):
        assert sum(parameter.nbytes for parameter in layer.parameters()) == held
        assert sum(tensor.nbytes for tensor in layer.state_dict().values()) == held
        layer(torch.randn(3, 160))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert workspace_bytes() == 200 * 160 * 4
    assert next(layer.parameters()).is_floating_point()


@BOTH
@COMPUTES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_set_lora_adds_loras_and_removes_them_exactly(layout, low, dtype):
    layer, x = layer_of(layout, low=low), torch.randn(9, 160).to(dtype)
    before, names = layer(x), [name for name, _ in layer.named_parameters()]
    first = torch.randn(4, 160), torch.randn(200, 4), 0.07
    second = torch.randn(16, 160).bfloat16(), torch.randn(200, 16).bfloat16(), -0.03
    for loras in ([first], [first, second], [second]):
        layer.set_lora(loras)
        delta = sum(scale * up.float() @ down.float() for down, up, scale in loras)
        assert isinstance(delta, Tensor)
        wanted = before.float() + x.float() @ delta.T
        assert relative_error(layer(x), wanted) < 0.01
        assert layer.lora_rank == sum(len(down) for down, _, _ in loras)
    for nothing in (None, []):
        layer.set_lora([first])
        layer.set_lora(nothing)
        assert torch.equal(layer(x), before)
        assert [name for name, _ in layer.named_parameters()] == names == list(layer.state_dict())


@BOTH
def test_lora_is_added_to_16_bit_weight_before_rounding(layout):
    layer = layer_of(layout, bias=False)
    down, up = torch.randn(4, 160), torch.randn(200, 4)
    layer.set_lora([(down, up, 0.5)])
    x = torch.randn(5, 160)
    torch.testing.assert_close(layer(x), expected(layer, x, 0.5 * up @ down), rtol=1e-4, atol=1e-4)


@BOTH
@COMPUTES
@pytest.mark.parametrize("has_bias", [True, False])
def test_bias_delta_is_added_and_removed(layout, low, has_bias):
    layer, x, delta = layer_of(layout, bias=has_bias, low=low), torch.randn(3, 160), torch.randn(200)
    before = layer(x)
    layer.set_bias_delta(delta.half())
    torch.testing.assert_close(layer(x), before + delta.half().float())
    layer.set_bias_delta(None)
    assert torch.equal(layer(x), before)


@BOTH
@COMPUTES
def test_attach_acts_as_merge_and_detach_restores_bits(layout, low):
    """With two LoRAs: a low-rank change, and a full change of weight and bias."""
    model = nn.Module()
    model.layer = layer = layer_of(layout, low=low)
    assert isinstance(layer, HoldsLora)
    x, held = torch.randn(9, 160), {name: p.clone() for name, p in layer.named_parameters()}
    before = layer(x)
    down, up, diff, shift = torch.randn(4, 160), torch.randn(200, 4), 0.1 * torch.randn(200, 160), torch.randn(200)
    one = Lora("one", "", 0.5, {"layer.weight": (LowRank(down, up, 1.0, ("w",)),)})
    two = Lora("two", "", 1.0, {"layer.weight": (Full(diff, ("d",)),), "layer.bias": (Full(shift, ("b",)),)})
    with attached(model, [one, two]) as plan:
        assert set(plan.applied) == {"layer.weight", "layer.bias"}
        wanted = before + x @ (0.5 * up @ down + diff).T + shift
        assert relative_error(layer(x), wanted) < 0.01
        assert layer.lora_rank == 4 + 160
    assert torch.equal(layer(x), before)
    assert {name for name, _ in layer.named_parameters()} == set(held)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), held[name].view(torch.uint8)), name


def test_deltas_of_wrong_shape_are_refused():
    layer = layer_of(SVDQ_LAYOUTS["svdq-int4"])
    for down, up in [((4, 32), (200, 4)), ((4, 160), (64, 4)), ((4, 160), (200, 8)), ((4, 160, 1), (200, 4))]:
        with pytest.raises(ValueError, match="do not fit a weight of \\[200, 160\\]"):
            layer.set_lora([(torch.zeros(down), torch.zeros(up), 1.0)])
    assert layer.lora_down is None
    with pytest.raises(ValueError, match="does not fit 200 outputs"):
        layer.set_bias_delta(torch.zeros(64))


@pytest.fixture
def product_in_rows(monkeypatch, layout):
    """A product of the format's that reads `rows`, as plain arithmetic: its name."""
    name = "comfy_kitchen" if layout.precision == "int4" else "scaled_mm"
    assert svdq_products.ORDERS[name] == ROWS

    def product(x, tensors, layout, out_features, bias):
        tiles = {suffix: reorder(suffix, t, layout.precision, TILES) for suffix, t in tensors.items()}
        return svdq_linear(x, tiles, layout, out_features, bias)

    monkeypatch.setattr(svdq_products, name, product)
    return name


@BOTH
def test_set_compute_changes_tensors_to_order_of_product_and_back(layout, product_in_rows):
    layer, x = layer_of(layout), torch.randn(9, 160)
    exact = layer(x)
    memory = {name: t.data_ptr() for name, t in layer.stored.items()}
    values = {name: t.detach().view(torch.uint8).clone() for name, t in layer.stored.items()}
    layer.set_lora([(torch.randn(4, 160), torch.randn(200, 4), 0.1)])
    layer.set_compute(layout.name, REFERENCE)
    wanted = layer(x)
    layer.set_compute(layout.name, product_in_rows)
    assert layer.order == ROWS
    assert not torch.equal(layer.qweight.view(torch.uint8), values["qweight"])
    torch.testing.assert_close(layer(x), wanted)
    layer.set_lora(None)
    layer.set_compute(EXACT)
    assert (layer.order, layer.backend) == (TILES, "")
    assert torch.equal(layer(x), exact)
    assert {name: t.data_ptr() for name, t in layer.stored.items()} == memory
    assert all(torch.equal(t.view(torch.uint8), values[name]) for name, t in layer.stored.items())


@BOTH
def test_set_compute_to_same_product_moves_no_tensor(layout, product_in_rows):
    layer = layer_of(layout)
    layer.set_compute(layout.name, product_in_rows)
    before = {name: t._version for name, t in layer.stored.items()}
    layer.set_compute(layout.name, product_in_rows)
    layer(torch.randn(9, 160))
    assert {name: t._version for name, t in layer.stored.items()} == before


@BOTH
def test_set_compute_with_unknown_name_is_refused_and_changes_nothing(layout):
    layer = layer_of(layout)
    (other,) = (name for name in SVDQ_LAYOUTS if name != layout.name)
    for compute, backend, problem in (
        (other, REFERENCE, f"a weight in {layout.name} cannot compute as {other}"),
        ("fp8", REFERENCE, "cannot compute as fp8"),
        (layout.name, "int_mm", "no backend"),
        (layout.name, "", "no backend"),
        ("int2", REFERENCE, "no backend"),
    ):
        with pytest.raises(ValueError, match=problem):
            layer.set_compute(compute, backend)
    assert (layer.compute, layer.backend, layer.order) == (EXACT, "", TILES)


@BOTH
def test_empty_layer_loads_state_dict(layout):
    layer = layer_of(layout)
    shell = SvdqLinear.empty(160, 200, True, layout)
    assert all(parameter.is_meta for parameter in shell.parameters())
    assert {n: (p.shape, p.dtype) for n, p in shell.named_parameters() if n != "bias"} == {
        n: (p.shape, p.dtype) for n, p in layer.named_parameters() if n != "bias"
    }
    shell.load_state_dict(layer.state_dict(), assign=True, strict=True)
    x = torch.randn(2, 160)
    assert torch.equal(shell(x), layer(x))
    assert not any(parameter.requires_grad for parameter in shell.parameters())


@BOTH
def test_stored_dtypes_are_kept_by_cast(layout):
    layer, x = layer_of(layout), torch.randn(2, 160)
    held = {name: (t.dtype, t.detach().view(torch.uint8).clone()) for name, t in layer.stored.items()}
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        cast()
        for name, tensor in layer.stored.items():
            assert tensor.dtype is held[name][0]
            assert torch.equal(tensor.view(torch.uint8), held[name][1]), name
    assert layer.bias is not None
    assert layer.bias.dtype is torch.float32
    layer.half()
    assert layer(x.half()).dtype is torch.float16
    assert all(parameter.is_meta for parameter in layer.to("meta").parameters())


class Block(nn.Module):
    """Attention and a feed-forward, in the proportions of a transformer's block."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + self.feed(self.norm(x))


def quantised_block(layout) -> Block:
    """Keys and values compute in 16 bits, the others in four."""
    block = Block()
    for name, child in [(n, m) for n, m in block.named_modules() if type(m) is nn.Linear]:
        layer = quantize_linear(child, layout)
        if name not in ("k", "v"):
            layer.set_compute(layout.name, REFERENCE)
        block.set_submodule(name, layer)
    return block.eval()


@BOTH
def test_compiled_block_is_one_graph(layout):
    block, x = quantised_block(layout), torch.randn(2, 16, 64)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    assert counter.frame_count == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("svdq_linear" in target for target in targets) == 6
    plain = block(x)
    for scale in (1.0, 0.5, -2.0):  # one more graph for layers with a LoRA, none for another LoRA
        block.q.set_lora([(torch.randn(4, 64), torch.randn(64, 4), scale)])
        torch.testing.assert_close(compiled(x), block(x))
        assert not torch.equal(block(x), plain)
        assert counter.frame_count == 2
    block.q.set_lora(None)
    assert torch.equal(compiled(x), plain)
    assert counter.frame_count == 2
    torch._dynamo.reset()


@BOTH
def test_structure_of_block_changes_when_graph_changes(layout):
    block = quantised_block(layout)
    seen = {structure_of(block)}

    def is_new() -> bool:
        before = len(seen)
        seen.add(structure_of(block))
        return len(seen) > before

    block.q.set_lora([(torch.randn(4, 64), torch.randn(64, 4), 1.0)])
    assert is_new()
    block.q.set_lora([(torch.randn(4, 64), torch.randn(64, 4), 2.0)])
    assert not is_new()
    block.q.set_bias_delta(torch.randn(64))
    assert is_new()
    block.k.set_compute(layout.name, REFERENCE)
    assert is_new()


@BOTH
def test_svdq_linear_operator_passes_opcheck(layout):
    layer = layer_of(layout)
    stored = layer.qweight, layer.wscales, layer.wcscales, layer.smooth_factor, layer.proj_down, layer.proj_up
    lora = torch.randn(4, 160), torch.randn(200, 4)
    # That nothing is written to what is given, torch checks by arithmetic that e4m3 has none of.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = tests if layout.precision == "nvfp4" else ("test_schema", *tests)
    for backend in ("", REFERENCE):
        how = layout.name, backend, 200
        full = torch.randn(2, 3, 160), *stored, *how, layer.bias, torch.randn(200), *lora
        torch.library.opcheck(operator, full, test_utils=tests)
        bare = torch.randn(160), *stored, *how, None, None, None, None
        torch.library.opcheck(operator, bare, test_utils=tests)


@BOTH
def test_layer_used_in_inference_mode_works_in_normal_mode(layout):
    layer, x = layer_of(layout), torch.randn(2, 160)
    with torch.inference_mode():
        first = layer(x)
        layer.set_compute(layout.name, REFERENCE)
        layer(x)
        layer.set_compute(EXACT)
    assert torch.equal(layer(x), first)


@BOTH
@COMPUTES
def test_streamed_blocks_give_same_bits_as_resident_blocks(layout, low):
    """With a LoRA's factors, after their removal, and after another product has moved the tensors."""
    layers = [layer_of(layout, 128, 128, low=low) for _ in range(3)]
    stream = BlockStream([(layer,) for layer in layers], torch.device("cpu"), buffers=2)
    x = torch.randn(5, 128)

    def run(modules) -> Tensor:
        result = x
        for module in modules:
            result = module(result)
        return result

    plain = run(layers)
    assert torch.equal(run(stream()), plain)
    layers[1].set_lora([(torch.randn(4, 128), torch.randn(128, 4), 0.1)])
    layers[2].set_bias_delta(torch.randn(128))
    changed = run(layers)
    assert not torch.equal(changed, plain)
    for _ in range(2):
        assert torch.equal(run(stream()), changed)
    layers[1].set_lora(None)
    layers[2].set_bias_delta(None)
    assert torch.equal(run(stream()), plain)


@BOTH
def test_streamed_blocks_in_other_order_stay_in_their_buffers(layout, product_in_rows):
    layers = [layer_of(layout, 128, 128) for _ in range(2)]
    stream, x = BlockStream([(layer,) for layer in layers], torch.device("cpu"), buffers=1), torch.randn(5, 128)
    buffers = [part.packed[0] for part in stream._parts]
    for layer in layers:
        layer.set_compute(layout.name, product_in_rows)
    wanted = layers[1](layers[0](x))
    found = x
    for layer in stream():
        found = layer(found)
    assert torch.equal(found, wanted)
    assert [part.packed[0] for part in stream._parts] == buffers


def test_repr_of_layer_has_format_rank_and_compute():
    layer = layer_of(SVDQ_LAYOUTS["svdq-int4"])
    assert repr(layer) == "SvdqLinear(in_features=160, out_features=200, bias=True, format=svdq-int4, rank=32)"
    layer.set_lora([(torch.zeros(4, 160), torch.zeros(200, 4), 1.0)])
    layer.set_compute("svdq-int4", REFERENCE)
    assert "lora_rank=4, compute=svdq-int4" in repr(layer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
def test_layer_on_gpu_agrees_with_cpu_and_definition(layout):
    from runner.quantization.kernels.low_bit import pick_gemm_backend

    layer, x = layer_of(layout, 5120, 5120), torch.randn(1040, 5120)
    wanted = layer(x)
    layer.cuda()
    torch.testing.assert_close(layer(x.cuda()).cpu(), wanted, rtol=1e-3, atol=1e-3)
    device = torch.device("cuda", torch.cuda.current_device())
    backend, why = pick_gemm_backend(device, layout.name)
    if backend is None:
        pytest.skip(why)
    layer.set_compute(layout.name, REFERENCE)
    defined = layer(x.cuda().bfloat16())
    layer.set_compute(layout.name, backend)
    assert isinstance(PRECISIONS[layout.name].find_backend(backend), GemmBackend)
    assert relative_error(layer(x.cuda().bfloat16()), defined) < PRECISIONS[layout.name].agreement
