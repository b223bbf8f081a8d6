"""Prepared inputs: the bits of layers that quantise for themselves, made once, and only for layers that agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.forecast.precisions import PRECISIONS
from runner.quantization.formats.e2m1 import FORMATS
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.kernels import prepared as module
from runner.quantization.kernels.low_bit import EXACT, LowBitLinear
from runner.quantization.kernels.prepared import Prepared, prepare, prepare_gelu, takes_gelu
from runner.quantization.linear import FP4Linear
from tests.quantization.kernels.test_low_bit import gauss
from tests.quantization.svdq_layers import quantize_linear

COMPUTES = [row.name for row in PRECISIONS.values() if row.layout in ("rows", "blocks")]
LOW = pytest.mark.parametrize("compute", COMPUTES)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def layers_in(kind: str, compute: str, dtype: torch.dtype = torch.float32) -> list:
    """Three of unlike weights; `kind`: a format, or plain."""
    torch.manual_seed(3)
    linears = [nn.Linear(64, 48).to(dtype) for _ in range(3)]
    if kind == "plain":
        return [LowBitLinear(linear, compute, "reference") for linear in linears]
    layers = [FP4Linear.from_linear(linear, FORMATS[kind]) for linear in linears]
    for layer in layers:
        layer.set_compute(compute, "reference")
    return layers


def kinds_of(compute: str) -> list[str]:
    return ["nvfp4"] if PRECISIONS[compute].layout == "blocks" else [*FORMATS, "plain"]


CASES = [(kind, compute) for compute in COMPUTES for kind in kinds_of(compute)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "compute"), CASES)
def test_layers_give_the_bits_that_each_gives_alone(kind, compute, dtype):
    layers, x = layers_in(kind, compute, dtype), gauss(2, 5, 64).to(dtype)
    given = prepare(layers, x)
    assert isinstance(given, Prepared)
    for layer in layers:
        found = layer(given)
        assert (found.shape, found.dtype) == ((2, 5, 48), dtype)
        assert torch.equal(found, layer(x))


@pytest.mark.parametrize(("kind", "compute"), [case for case in CASES if case[0] != "plain"])
def test_loras_beside_the_weights_stay(kind, compute):
    """Each layer with its own; NVFP4 multiplies them by the input as it was."""
    layers, x = layers_in(kind, compute), gauss(7, 64)
    for seed, layer in enumerate(layers[:2]):
        layer.set_lora([(gauss(4, 64, seed=seed), gauss(48, 4, seed=seed + 9), 0.5)])
        layer.set_bias_delta(gauss(48, seed=seed))
    given = prepare(layers, x)
    found = [layer(given) for layer in layers]
    assert all(torch.equal(one, layer(x)) for one, layer in zip(found, layers, strict=True))
    layers[0].set_lora(None)
    assert not torch.equal(layers[0](given), found[0])


@LOW
def test_an_input_is_quantised_once(compute, monkeypatch):
    name = "quantize_blocks" if PRECISIONS[compute].layout == "blocks" else "prepare_rows"
    plain, seen = getattr(module, name), []

    def counting(*given, **how):
        seen.append(given[0].shape)
        return plain(*given, **how)

    monkeypatch.setattr(module, name, counting)
    layers = layers_in("nvfp4", compute)
    given = prepare(layers, gauss(2, 5, 64))
    for layer in layers:
        layer(given)
    assert seen == [(10, 64)]


@LOW
def test_layers_that_keep_their_codes_take_it_too(compute):
    if PRECISIONS[compute].layout == "blocks":
        pytest.skip("weights in blocks are multiplied as they are stored")
    layers, x = layers_in("g32", compute), gauss(7, 64)
    wanted = layers[0](x)
    layers[0].keep_codes(x.dtype)
    assert layers[0].kept_codes is not None
    assert torch.equal(layers[0](prepare(layers, x)), wanted)


@pytest.mark.parametrize("other", [EXACT, "fp8"])
def test_layers_that_compute_in_unlike_ways_get_the_input_itself(other):
    layers, x = layers_in("g32", "int8"), gauss(7, 64)
    layers[1].set_compute(other, "" if other == EXACT else "reference")
    assert prepare(layers, x) is x
    assert prepare([nn.Linear(64, 48)], x) is x
    assert prepare([*layers[::2], nn.Linear(64, 48)], x) is x


def test_an_input_for_another_compute_is_refused():
    layers, x = layers_in("g32", "int8"), gauss(7, 64)
    given = prepare(layers, x)
    layers[0].set_compute("fp8", "reference")
    layers[1].set_compute(EXACT)
    with pytest.raises(ValueError, match="prepared for int8; the layer computes fp8"):
        layers[0](given)
    with pytest.raises(ValueError, match="the layer computes exact"):
        layers[1](given)
    plain = layers_in("plain", EXACT)[0]
    with pytest.raises(ValueError, match="the layer computes exact"):
        plain(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "compute"), CASES)
def test_gelu_goes_into_the_codes_where_an_operator_makes_them(kind, compute, dtype):
    layer, x = layers_in(kind, compute, dtype)[0], gauss(7, 64).to(dtype)
    assert takes_gelu(layer) == (compute == "int8")
    if takes_gelu(layer):
        assert torch.equal(layer(prepare_gelu(layer, x)), layer(F.gelu(x, approximate="tanh")))
    layer.set_compute(EXACT)
    assert not takes_gelu(layer)
    assert not takes_gelu(nn.Linear(64, 48))


class SelfAttention(nn.Module):
    def __init__(self, compute: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers_in("nvfp4", compute))

    def forward(self, x: Tensor) -> Tensor:
        given = prepare(list(self.layers), x)
        return sum(layer(given) for layer in self.layers)


@LOW
def test_a_graph_takes_prepared_inputs(compute):
    """Whole, and with the numbers of the layers alone."""
    model, x = SelfAttention(compute), gauss(2, 5, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)
def test_layers_of_svdq_take_the_input_itself(layout):
    """Each smooths it by a factor of its own, so no codes are shared."""
    layers = [quantize_linear(nn.Linear(64, 48), layout) for _ in range(2)]
    for layer in layers:
        layer.set_compute(layout.name, "reference")
    x = gauss(2, 5, 64)
    assert prepare(layers, x) is x
    assert not takes_gelu(layers[0])
