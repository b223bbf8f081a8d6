"""What eager blocks cost: the bytes of elementwise kernels over the GPU's copy speed, and one sentence for all."""

from __future__ import annotations

import pytest

from runner.forecast.flops import PRODUCTION
from runner.forecast.seconds import EAGER_BYTES, FUSED_BYTES, find_device
from runner.generation.runtime.eager_blocks import eager_by_plan, eager_cost, eager_words
from runner.generation.runtime.memory_plan import make_plan
from runner.spec.recipes import get_recipe


def test_a_step_costs_what_eager_kernels_move_more():
    gpu = find_device("NVIDIA GeForce RTX 5090")
    # 40 blocks, 22 latent frames of 52 x 30 tokens, 5,120 channels.
    wanted = 40 * 22 * 52 * 30 * 5120 * (EAGER_BYTES - FUSED_BYTES) / (1509 * 1e9)
    cost = eager_cost(PRODUCTION, gpu, (832, 480), 81)
    assert cost.step_s == pytest.approx(wanted)
    assert 1.3 < cost.step_s < 1.7
    assert eager_cost(PRODUCTION, gpu, (832, 480), 81, guided=True).step_s == pytest.approx(2 * wanted)
    assert eager_cost(PRODUCTION, None, (832, 480), 81) is None


def test_the_sentence_has_the_reason_and_the_cost_where_it_is_known():
    cost = eager_cost(PRODUCTION, find_device("H200"), (832, 480), 81)
    assert eager_words("no compiler", cost) == (
        "The transformer's blocks run eagerly on the GPU, not compiled (no compiler): "
        f"{cost.step_s:.2g} s more a step on H200 at 832x480, 81 frames, a forecast."
    )
    assert eager_words("no compiler", None) == (
        "The transformer's blocks run eagerly on the GPU, not compiled (no compiler)."
    )


def test_one_mode_makes_blocks_eager_by_plan():
    recipe = get_recipe("fp4-distill")
    assert [eager_by_plan(make_plan(mode, recipe)) for mode in ("resident", "stream")] == ["", ""]
    assert "minimal" in eager_by_plan(make_plan("minimal", recipe))
