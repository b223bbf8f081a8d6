"""Layers that keep their weight's codes: the bits of layers that do not, whatever changes, and no tensor too many."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from runner.quantization.formats.e2m1 import FORMATS, G32, NVFP4
from runner.quantization.kernels import kept_codes, low_bit
from runner.quantization.kernels.kept_codes import KeepsCodes, drop_codes
from runner.quantization.kernels.low_bit import EXACT, LowBitLinear
from runner.quantization.linear import FP4Linear
from runner.quantization.lora.apply import attach, detach
from runner.quantization.lora.read import Lora, LowRank
from tests.quantization.kernels.test_low_bit import gauss, layer_of

ROWWISE = pytest.mark.parametrize("compute", ["fp8", "int8"])
KINDS = pytest.mark.parametrize("kind", [*FORMATS, "plain"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PRODUCTS = {"fp8": ("reference", "scaled_mm"), "int8": ("reference", "int_mm")}  # both of torch's run on a CPU too


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def make(kind: str, compute: str, backend: str = "reference", dtype: torch.dtype = torch.float32) -> KeepsCodes:
    if kind == "plain":
        torch.manual_seed(2)
        return LowBitLinear(nn.Linear(64, 48).to(dtype), compute, backend)
    layer = layer_of(FORMATS[kind]).to(dtype)
    layer.set_compute(compute, backend)
    return layer


def made_each_time(layer: KeepsCodes, x: Tensor) -> Tensor:
    """By a copy of the layer that holds no codes."""
    other = copy.deepcopy(layer)
    other.drop_codes()
    return other(x)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Grows with each weight that is brought to codes."""
    made: list[int] = []
    rows = low_bit.weight_rows

    def counting(*given):
        made.append(1)
        return rows(*given)

    monkeypatch.setattr(low_bit, "weight_rows", counting)
    monkeypatch.setattr("runner.quantization.linear.weight_rows", counting)
    return made


@ROWWISE
@KINDS
@DTYPES
def test_layer_with_kept_codes_gives_same_bits_and_makes_no_codes(compute, kind, dtype, counted):
    for backend in PRODUCTS[compute]:
        layer, x = make(kind, compute, backend, dtype), gauss(3, 20, 64).to(dtype)
        wanted = layer(x)
        assert layer.keep_codes(dtype) and layer.holds_codes
        counted.clear()
        assert torch.equal(layer(x), wanted)
        assert counted == []
        assert not layer.keep_codes(dtype)  # they are there
        layer.drop_codes()
        assert torch.equal(layer(x), wanted)
        assert counted == [1]


@ROWWISE
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_kept_codes_follow_lora_that_is_set_changed_and_removed(compute, fmt):
    layer, x, seen = layer_of(fmt), gauss(7, 64), []
    layer.set_compute(compute, "reference")
    down, up = gauss(4, 64, seed=4), gauss(48, 4, seed=5)
    for deltas in (None, [(down, up, 0.5)], [(down, up, -1.0), (up.T[:2] @ up @ down, up[:, :2], 0.1)], None):
        layer.set_lora(deltas)
        stale = layer(x)  # before they are made anew, at each product
        assert layer.keep_codes(torch.float32)
        seen.append(layer(x))
        assert torch.equal(seen[-1], stale)
        assert torch.equal(seen[-1], made_each_time(layer, x))
    assert torch.equal(seen[0], seen[-1])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@ROWWISE
def test_kept_codes_with_bias_delta_are_not_made_again(compute):
    layer, x = layer_of(), gauss(7, 64)
    layer.set_compute(compute, "reference")
    layer.keep_codes(torch.float32)
    before = layer(x)
    layer.set_bias_delta(gauss(48, seed=6))
    assert not layer.keep_codes(torch.float32)
    assert torch.equal(layer(x), made_each_time(layer, x))
    assert not torch.equal(layer(x), before)
    layer.set_bias_delta(None)
    assert torch.equal(layer(x), before)


@ROWWISE
@KINDS
def test_kept_codes_of_weight_changed_in_place_are_stale(compute, kind):
    layer, x = make(kind, compute), gauss(7, 64)
    layer.keep_codes(torch.float32)
    before = layer(x)
    (layer.weight if kind == "plain" else layer.weight_packed).copy_(make(kind, compute).weight.flip(0))
    assert torch.equal(layer(x), made_each_time(layer, x))
    assert not torch.equal(layer(x), before)
    assert layer.keep_codes(torch.float32)
    assert torch.equal(layer(x), made_each_time(layer, x))


@ROWWISE
@KINDS
def test_kept_codes_after_weight_is_replaced_are_stale(compute, kind):
    """Only the identity of the tensor shows that it is a different one."""
    layer, x, name = make(kind, compute), gauss(7, 64), "weight" if kind == "plain" else "weight_packed"
    first, second = (
        nn.Parameter(weight.clone(), requires_grad=False) for weight in (layer.weight, layer.weight.flip(0))
    )
    assert first._version == second._version
    setattr(layer, name, first)
    layer.keep_codes(torch.float32)
    before = layer(x)
    setattr(layer, name, second)
    assert torch.equal(layer(x), made_each_time(layer, x))
    assert not torch.equal(layer(x), before)


@ROWWISE
@KINDS
def test_kept_codes_are_dropped_by_cast(compute, kind):
    layer, x = make(kind, compute), gauss(7, 64).bfloat16()
    layer.keep_codes(torch.float32)
    layer.to(torch.bfloat16)
    assert not layer.holds_codes
    wanted = layer(x)
    layer.keep_codes(torch.bfloat16)
    assert torch.equal(layer(x), wanted)


@ROWWISE
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_kept_codes_are_used_only_for_their_dtype(compute, fmt):
    """A weight that is dequantised to another dtype has other codes."""
    layer, x = layer_of(fmt), gauss(7, 64)
    layer.set_compute(compute, "reference")
    wanted = layer(x)
    layer.keep_codes(torch.bfloat16)
    assert torch.equal(layer(x), wanted)
    assert layer.codes_for(torch.float32) is None
    assert layer.keep_codes(torch.float32)
    assert torch.equal(layer(x), wanted)


def test_kept_codes_are_made_again_for_other_compute():
    layer, x = layer_of(NVFP4), gauss(7, 64)
    for compute in ("fp8", "int8", "fp8"):
        layer.set_compute(compute, "reference")
        assert layer.keep_codes(torch.float32)
        assert torch.equal(layer(x), made_each_time(layer, x))
        layer.set_compute(compute, PRODUCTS[compute][1])  # by another product the same
        assert not layer.keep_codes(torch.float32)
    for compute, backend in (("nvfp4", "reference"), (EXACT, "")):
        layer.set_compute(compute, backend)
        assert not layer.keep_codes(torch.float32)
        assert not layer.holds_codes


@ROWWISE
@KINDS
def test_kept_codes_are_not_in_state_dict(compute, kind):
    layer = make(kind, compute)
    before, parameters = set(layer.state_dict()), [name for name, _ in layer.named_parameters()]
    layer.keep_codes(torch.float32)
    assert set(layer.state_dict()) == before
    assert [name for name, _ in layer.named_parameters()] == parameters
    assert {name: tuple(buffer.shape) for name, buffer in layer.named_buffers()} == {
        "kept_codes": (48, 64),
        "kept_scale": (48, 1),
    }
    layer.load_state_dict(layer.state_dict())


class Model(nn.Module):
    def __init__(self, kind: str, compute: str) -> None:
        super().__init__()
        self.low, self.exact, self.norm = make(kind, compute), layer_of(), nn.LayerNorm(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.low(x)) + self.exact(x)


@ROWWISE
@KINDS
def test_kept_codes_of_model_are_for_row_layers_and_remade_with_lora(compute, kind):
    model, x = Model(kind, compute), gauss(7, 64)
    wanted = model(x)
    assert kept_codes.keep_codes(model, torch.float32) == (1, 48 * 64 + 48 * 4, 1)
    assert kept_codes.keep_codes(model, torch.float32) == (1, 48 * 64 + 48 * 4, 0)
    assert torch.equal(model(x), wanted)
    delta = LowRank(gauss(4, 64, seed=4), gauss(48, 4, seed=5), 1.0, ("k",))
    lora = Lora("a", "", 1.0, {"low.weight": (delta,)})
    attach(model, [lora])
    assert not model.low.holds_codes  # a compiled graph would go on with them
    changed = model(x)
    assert kept_codes.keep_codes(model, torch.float32).made == 1
    assert torch.equal(model(x), changed)
    assert not torch.equal(changed, wanted)
    detach(model)
    assert not model.low.holds_codes
    assert torch.equal(model(x), wanted)
    assert kept_codes.keep_codes(model, torch.float32).made == 1
    assert torch.equal(model(x), wanted)
    drop_codes(model)
    assert not model.low.holds_codes
    assert torch.equal(model(x), wanted)


@ROWWISE
@KINDS
def test_compiled_layer_has_one_graph_with_kept_codes_and_one_without(compute, kind):
    """A LoRA that is set or removed while codes are kept changes neither graph."""
    torch._dynamo.reset()
    counters.clear()
    layer, x = make(kind, compute), gauss(6, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=False)
    for _ in range(2):
        layer.drop_codes()
        assert torch.equal(compiled(x), made_each_time(layer, x))
        layer.keep_codes(torch.float32)
        assert torch.equal(compiled(x), made_each_time(layer, x))
    if isinstance(layer, FP4Linear):
        layer.set_lora([(gauss(4, 64, seed=4), gauss(48, 4, seed=5), 0.5)])
        layer.keep_codes(torch.float32)
        assert torch.equal(compiled(x), made_each_time(layer, x))
        layer.set_lora(None)
        layer.keep_codes(torch.float32)
        assert torch.equal(compiled(x), made_each_time(layer, x))
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_kept_codes_are_not_made_in_shared_memory():
    """Otherwise the next layer would overwrite them."""
    first, second = layer_of(G32), layer_of(NVFP4)
    for layer in (first, second):
        layer.set_compute("int8", "reference")
        layer.keep_codes(torch.float32)
    x = gauss(7, 64)
    assert torch.equal(first(x), made_each_time(first, x))
