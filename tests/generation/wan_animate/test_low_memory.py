"""Blocks a few rows at a time: which devices and modes run them so, and that they compute what `run_block` does."""

from __future__ import annotations

import pytest
import torch

from runner.generation.wan_animate.compiled import TOLERANCES, difference, dummies
from runner.generation.wan_animate.low_memory import choose_eager_block, lean_block
from runner.generation.wan_animate.transformer import embed_context, run_block
from tests.generation.wan_animate.test_transformer import Inputs, in_four_bits, load


@pytest.mark.parametrize(
    ("device", "lean", "wanted"),
    [("cpu", False, run_block), ("cpu", True, lean_block), ("cuda", False, lean_block), ("cuda:1", True, lean_block)],
)
def test_on_a_gpu_every_mode_runs_eager_blocks_by_rows(device, lean, wanted):
    assert choose_eager_block(torch.device(device), lean) is wanted


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
