"""Blocks a few rows at a time: which devices and modes run them so, and that they compute what `run_block` does."""

from __future__ import annotations

import pytest
import torch

from runner.forecast.precisions import PRECISIONS, REFERENCE
from runner.generation.runtime.compute import sees_every_token
from runner.generation.wan_animate.compiled import TOLERANCES, difference, dummies
from runner.generation.wan_animate.low_memory import choose_eager_block, lean_block, lean_face
from runner.generation.wan_animate.transformer import embed_context, run_block
from runner.quantization.formats.e2m1 import NVFP4
from tests.generation.wan_animate.test_transformer import Inputs, in_four_bits, load


@pytest.mark.parametrize(
    ("device", "lean", "wanted"),
    [("cpu", False, run_block), ("cpu", True, lean_block), ("cuda", False, lean_block), ("cuda:1", True, lean_block)],
)
def test_on_a_gpu_every_mode_runs_eager_blocks_by_rows(device, lean, wanted):
    assert choose_eager_block(torch.device(device), lean) is wanted


@torch.no_grad()
def test_rows_that_share_a_scale_stay_together(tiny_store_dir, monkeypatch):
    """NVFP4 quantises an activation by one scale of all its rows: in pieces it had other codes, off by .08."""
    monkeypatch.setattr("runner.generation.wan_animate.low_memory.ROWS", 16)
    model = load(tiny_store_dir)
    in_four_bits(model, NVFP4)
    for name, layer in model.named_modules():
        if (
            sees_every_token(name)
            and PRECISIONS["nvfp4"].problem_of_shape(layer.out_features, layer.in_features) is None
        ):
            layer.set_compute("nvfp4", REFERENCE)
    inputs = Inputs(model)
    (invariants,) = inputs.branches(model)
    whole, lean = (
        inputs.step(model, invariants, 0, **steps) for steps in ({}, {"block_step": lean_block, "face_step": lean_face})
    )
    assert torch.equal(whole, lean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_blocks_by_rows_compute_what_a_compiled_block_is_compared_with(tiny_store_dir, monkeypatch, dtype):
    """On noise in the shapes of a window, as warming has it; so few rows at a time that there are several runs."""
    monkeypatch.setattr("runner.generation.wan_animate.low_memory.ROWS", 16)
    model = load(tiny_store_dir, dtype)
    in_four_bits(model)
    inputs = Inputs(model)
    context = embed_context(model, inputs.texts[:1], inputs.clip)[0]
    for block in model.blocks[:2]:
        given = dummies(model, context, tuple(inputs.hidden[0].shape[2:]), block)
        assert given[0].shape[1] > 2 * 16
        wanted = run_block(block, *given)
        found = lean_block(block, given[0].clone(), *given[1:])
        assert found.dtype == wanted.dtype == dtype
        assert difference(found, wanted) <= TOLERANCES[dtype]
