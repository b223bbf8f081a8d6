"""What the GPU is asked to do, counted without one: the autoencoder's launches and bytes, a traced block's operators.

Ceilings are what was counted with torch 2.13 and diffusers 0.42.1. A change that lowers a count by a tenth fails too:
then the ceiling comes down with it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch._dynamo.backends.common import aot_autograd

from runner.forecast.bytes import LIBRARY_TRAFFIC, VAE_TRAFFIC
from runner.forecast.precisions import REFERENCE
from runner.generation.runtime.compute import is_token_wise
from runner.generation.wan_animate.autoencoder import FramewiseVae, with_channels_last
from runner.generation.wan_animate.compiled import CompiledBlocks
from runner.quantization.linear import FP4Linear
from tests.generation.operator_counts import OperatorCounts
from tests.generation.wan_animate.test_compiled import Case
from tests.generation.wan_animate.test_transformer import in_four_bits, load
from tests.system_tests import system_test

WINDOW = 21  # latent frames of 81 frames, 480x832
FLOAT, HALF = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Cost:
    launches: int
    gigabytes: float

    def within(self, ceiling: Cost) -> bool:
        fits = self.launches <= ceiling.launches and self.gigabytes <= ceiling.gigabytes
        return fits and self.launches > 0.9 * ceiling.launches and self.gigabytes > 0.9 * ceiling.gigabytes


# Of a whole window: ours, then the library's walk, four frames at a time.
CEILINGS = {
    ("decode", FLOAT): (Cost(4_603, 1_183), Cost(7_992, 3_309)),
    ("encode", FLOAT): (Cost(3_704, 792), Cost(6_016, 2_004)),
    ("decode", HALF): (Cost(4_750, 606), Cost(9_483, 2_443)),
    ("encode", HALF): (Cost(3_851, 410.2), Cost(7_045, 1_411)),
}


@pytest.fixture(autouse=True)
def _no_gradients():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def count(kind: type[AutoencoderKLWan], what: str, dtype: torch.dtype, latent_frames: int) -> Cost:
    """The published autoencoder at 480x832, on the meta device. Attention is counted as torch's plain products."""
    with torch.device("meta"):
        vae = kind().to(dtype)
        if kind is FramewiseVae:
            with_channels_last(vae)  # as on a GPU
        shape = (16, latent_frames, 60, 104) if what == "decode" else (3, 4 * latent_frames - 3, 480, 832)
        given = torch.empty(1, *shape, dtype=dtype)
    with OperatorCounts() as counts:
        vae.decode(given) if what == "decode" else vae.encode(given)
    return Cost(counts.launches.total(), counts.bytes.total() / 1e9)


@pytest.mark.parametrize(("what", "dtype"), [key for key in CEILINGS if key[1] == FLOAT], ids=str)
def test_autoencoder_window_stays_within_launch_and_byte_ceilings(what, dtype):
    """Every latent frame from the second on costs the same: the cost of a long window follows from two short ones."""
    two, three = (count(FramewiseVae, what, dtype, frames) for frames in (2, 3))
    later = WINDOW - 3
    window = Cost(
        three.launches + later * (three.launches - two.launches),
        three.gigabytes + later * (three.gigabytes - two.gigabytes),
    )
    ceiling, _ = CEILINGS[what, dtype]
    assert window.within(ceiling), window


@pytest.mark.parametrize(("what", "dtype"), CEILINGS, ids=str)
def test_vae_traffic_in_forecast_equals_counted_bytes(what, dtype):
    name, pixels = str(dtype).removeprefix("torch."), 81 * 480 * 832
    for cost, traffic in zip(CEILINGS[what, dtype], (VAE_TRAFFIC, LIBRARY_TRAFFIC), strict=True):
        assert traffic[what][name] * pixels / 1e9 == pytest.approx(cost.gigabytes, rel=0.002)


@system_test
@pytest.mark.parametrize(("what", "dtype"), CEILINGS, ids=str)
def test_autoencoder_counts_of_whole_window_match_library_and_ceiling(what, dtype):
    """If the library's counts differ, torch or diffusers has changed."""
    ceiling, theirs = CEILINGS[what, dtype]
    found = count(AutoencoderKLWan, what, dtype, WINDOW)
    assert (found.launches, found.gigabytes) == (theirs.launches, pytest.approx(theirs.gigabytes, abs=1)), found
    assert count(FramewiseVae, what, dtype, WINDOW).within(ceiling)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operator_counts_equal_sum_by_hand(device):
    """Float32 [2, 3, 4, 4] has 96 numbers; its convolution with 5 filters of 3x3 gives 5 x 2 x 2 per picture."""
    pictures = torch.ones(2, 3, 4, 4, device=device)
    filters, bias = torch.ones(5, 3, 3, 3, device=device), torch.ones(5, device=device)
    with OperatorCounts() as counts:
        made = torch.nn.functional.conv2d(pictures, filters, bias)  # reads 96 + 135 + 5, writes 40
        turned = made.transpose(0, 1)[1:].unsqueeze(0)  # views
        room = torch.empty(1, 4, 2, 2, 2, device=device).zero_()  # writes 32
        room.copy_(turned)  # reads 32, writes 32
        room.add_(1)  # reads 32, writes 32
        torch.cat([room, room], dim=1)  # reads 64, writes 64
    assert counts.launches == {f"aten::{name}": 1 for name in ("convolution", "zero_", "copy_", "add_", "cat")}
    numbers = {"convolution": 276, "zero_": 32, "copy_": 64, "add_": 64, "cat": 128}
    assert counts.bytes == {f"aten::{name}": 4 * many for name, many in numbers.items()}


def graph_of_a_block(model) -> torch.fx.Graph:
    """The graph that a block becomes, as the compiler's back end gets it: equal operators merged."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    step = CompiledBlocks(backend=aot_autograd(fw_compiler=keep, inference_compiler=keep))
    case = Case(model)
    assert (case.warm(step), step.broken) == (1, "")
    (graph,) = graphs
    return graph.graph


def operators_in(graph: torch.fx.Graph, library: str) -> Counter[str]:
    names = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return Counter(name.split(".")[1] for name in names if name.startswith(f"{library}."))


ONCE_A_LAYER = {"fp4_linear": 8}
IN_ROWS = {"fp4_rowwise_linear": 8}


@pytest.mark.parametrize(
    ("compute", "wanted"),
    [("", ONCE_A_LAYER), ("int8", IN_ROWS | {"rotated_codes": 6}), ("fp8", IN_ROWS)],
    ids=["bf16", "int8", "fp8"],
)
def test_block_graph_has_one_fp4_operator_per_layer_and_six_inputs(tiny_store_dir, compute, wanted):
    """Four layers of self-attention, query and output of cross-attention, two of the feed-forward; all else is computed
    once for all steps. Query, key and value have one input, so that six are rotated and quantised."""
    model = load(tiny_store_dir, torch.bfloat16)
    in_four_bits(model)
    for name, layer in model.named_modules():
        if compute and isinstance(layer, FP4Linear) and is_token_wise(name):
            layer.set_compute(compute, REFERENCE)
    graph = graph_of_a_block(model)
    assert operators_in(graph, "video_lab") == wanted
    eight = [node for node in graph.nodes if node.kwargs.get("dtype") == torch.float8_e4m3fn]
    assert len(eight) == (6 if compute == "fp8" else 0)
