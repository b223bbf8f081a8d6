"""Blocks a few rows at a time: which devices and modes run them so, and that they compute what `run_block` does."""

from __future__ import annotations

import pytest
import torch

from runner.forecast.precisions import PRECISIONS, REFERENCE
from runner.generation.runtime.compute import is_token_wise
from runner.generation.wan_animate.compiled import TOLERANCES, difference, dummies
from runner.generation.wan_animate.low_memory import FFN_PIECES, choose_eager_block, chunked_block, chunked_face
from runner.generation.wan_animate.transformer import embed_context, feed_forward, run_block
from runner.quantization.formats.e2m1 import G32, NVFP4
from runner.quantization.linear import FP4Linear
from tests.generation.operator_counts import OperatorCounts
from tests.generation.wan_animate.test_transformer import Inputs, in_four_bits, load


@pytest.mark.parametrize(
    ("device", "chunked", "wanted"),
    [
        ("cpu", False, run_block),
        ("cpu", True, chunked_block),
        ("cuda", False, chunked_block),
        ("cuda:1", True, chunked_block),
    ],
)
def test_choose_eager_block_on_gpu_is_chunked_in_every_mode(device, chunked, wanted):
    assert choose_eager_block(torch.device(device), chunked) is wanted


@torch.no_grad()
def test_chunked_block_in_nvfp4_keeps_rows_of_one_scale_together(tiny_store_dir, monkeypatch):
    """NVFP4 quantises an activation by one scale for all rows: chunks would have other codes, with an error of 0.08."""
    monkeypatch.setattr("runner.generation.wan_animate.low_memory.ROWS", 16)
    model = load(tiny_store_dir)
    in_four_bits(model, NVFP4)
    for name, layer in model.named_modules():
        if is_token_wise(name) and PRECISIONS["nvfp4"].problem_of_shape(layer.out_features, layer.in_features) is None:
            layer.set_compute("nvfp4", REFERENCE)
    inputs = Inputs(model)
    (conditioning,) = inputs.conditionings(model)
    whole, chunked = (
        inputs.step(model, conditioning, 0, **steps)
        for steps in ({}, {"block_forward": chunked_block, "face_forward": chunked_face})
    )
    assert torch.equal(whole, chunked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_chunked_block_equals_run_block_within_tolerance(tiny_store_dir, monkeypatch, dtype):
    """The input is noise in the shapes of a window, as in warming; a chunk has so few rows that there are several."""
    monkeypatch.setattr("runner.generation.wan_animate.low_memory.ROWS", 16)
    model = load(tiny_store_dir, dtype)
    in_four_bits(model)
    inputs = Inputs(model)
    context = embed_context(model, inputs.texts[:1], inputs.clip)[0]
    for block in model.blocks[:2]:
        given = dummies(model, context, tuple(inputs.hidden[0].shape[2:]), block)
        assert given[0].shape[1] > 2 * 16
        wanted = run_block(block, *given)
        found = chunked_block(block, given[0].clone(), *given[1:])
        assert found.dtype == wanted.dtype == dtype
        assert difference(found, wanted) <= TOLERANCES[dtype]


def low_block(tiny_store_dir, compute: str, dtype: torch.dtype = torch.bfloat16, *, lora: bool = False):
    """A block whose layers that see every token compute so, and what it is called with."""
    model = load(tiny_store_dir, dtype)
    in_four_bits(model, NVFP4 if compute == "nvfp4" else G32)
    for name, layer in model.named_modules():
        fits = isinstance(layer, FP4Linear) and is_token_wise(name)
        if fits and PRECISIONS[compute].problem_of_shape(layer.out_features, layer.in_features) is None:
            layer.set_compute(compute, REFERENCE)
            if lora:
                down, up = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
                layer.set_lora([(down.to(dtype), up.to(dtype), 0.02)])
    inputs = Inputs(model)
    context = embed_context(model, inputs.texts[:1], inputs.clip)[0]
    return model.blocks[0], dummies(model, context, tuple(inputs.hidden[0].shape[2:]), model.blocks[0])


LOW = pytest.mark.parametrize("compute", [row.name for row in PRECISIONS.values() if row.layout in ("rows", "blocks")])
STEPS = pytest.mark.parametrize("step", [run_block, chunked_block])


@LOW
@STEPS
@pytest.mark.parametrize("lora", [False, True], ids=["no lora", "lora"])
@torch.no_grad()
def test_block_with_shared_inputs_equals_separate_inputs(tiny_store_dir, monkeypatch, compute, step, lora):
    """Separate inputs: query, key and value each prepare a plain input, and GELU is a pass of its own."""
    block, given = low_block(tiny_store_dir, compute, lora=lora)
    found = step(block, given[0].clone(), *given[1:])
    for module in ("transformer", "low_memory"):
        monkeypatch.setattr(f"runner.generation.wan_animate.{module}.prepare", lambda layers, x: x)
        monkeypatch.setattr(f"runner.generation.wan_animate.{module}.feed_forward", lambda ffn, x: ffn(x))
    assert torch.equal(found, step(block, given[0].clone(), *given[1:]))


@STEPS
@torch.no_grad()
def test_eager_block_in_int8_rotates_each_shared_input_once(tiny_store_dir, step):
    """In the chunked block the feed-forward part has two inputs per chunk."""
    block, given = low_block(tiny_store_dir, "int8")
    with OperatorCounts() as counts:
        step(block, given[0].clone(), *given[1:])
    runs = 1 if step is run_block else FFN_PIECES
    assert counts.launches["video_lab::rotated_codes"] == 4 + 2 * runs
    assert counts.launches["aten::gelu"] == 0  # inside the operator


@pytest.mark.parametrize(("compute", "gelu"), [("int8", 0), ("fp8", 1)])
@torch.no_grad()
def test_feed_forward_with_layer_without_fused_gelu_runs_separate_gelu(tiny_store_dir, compute, gelu):
    block, given = low_block(tiny_store_dir, compute)
    with OperatorCounts() as counts:
        found = feed_forward(block.ffn, given[0])
    assert counts.launches["aten::gelu"] == gelu
    assert torch.equal(found, block.ffn(given[0]))
    block.ffn.net[0].approximate = "none"  # the operator's GELU is the one by tanh
    assert torch.equal(feed_forward(block.ffn, given[0]), block.ffn(given[0]))
