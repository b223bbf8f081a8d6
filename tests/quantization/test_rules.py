"""Rules: the 14B model on the meta device against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from runner.errors import ConfigInvalid
from runner.quantization.formats.e2m1 import FORMATS
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.rules import (
    RULES,
    WAN_ANIMATE_14B,
    get_rule,
    linear_shapes,
    plan_sizes,
    rule_for,
    stored_dtype,
    transformer_on_meta,
)
from tests.quantization.random_stores import TINY

# (out, in) → how many, from the architecture: 40 blocks of ten square projections and two of the feed-forward, eight
# face adapters of four, two MLPs and a projection of the embedders, the ends of both encoders.
LINEARS = {
    (5120, 5120): 40 * 10 + 8 * 4 + 2,
    (13824, 5120): 40,
    (5120, 13824): 40,
    (5120, 256): 1,
    (30720, 5120): 1,
    (5120, 4096): 1,
    (1280, 1280): 1,
    (5120, 1280): 1,
    (5120, 1024): 1,
    (64, 5120): 1,
}
WEIGHTS = sum(count * out * wide for (out, wide), count in LINEARS.items())
PARAMETERS = 17_274_816_884


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_14b_model_fits(fmt):
    rows = plan_sizes(WAN_ANIMATE_14B, fmt)
    packed = [row for row in rows if row.packed_bytes]
    assert len(packed) == sum(LINEARS.values()) == 521
    assert {shape: sum(row.shape == shape for row in packed) for shape in LINEARS} == LINEARS
    scales_2 = 521 * 4 if fmt.tensor_scale else 0
    assert sum(row.packed_bytes for row in rows) == WEIGHTS * 9 // 16 + scales_2  # four bits and a half each
    total = sum(row.packed_bytes + row.other_bytes for row in rows)
    assert 9.6e9 <= sum(row.packed_bytes for row in rows) <= total <= 9.9e9
    # What is not packed has two bytes, or four by the class's wish: between the two closed forms.
    assert sum(p.numel() for p in transformer_on_meta(WAN_ANIMATE_14B).parameters()) == PARAMETERS
    rest = PARAMETERS - WEIGHTS
    assert 2 * rest <= sum(row.other_bytes for row in rows) <= 4 * rest


@pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)
def test_svdq_leaves_the_last_projection_as_it_is(layout):
    rows = plan_sizes(WAN_ANIMATE_14B, layout)
    packed = {row.name: row for row in rows if row.packed_bytes}
    assert len(packed) == 520 and "proj_out" not in packed
    assert next(row.other_bytes for row in rows if row.name == "proj_out") == 2 * (64 * 5120 + 64)
    weights = WEIGHTS - 64 * 5120
    assert sum(row.packed_bytes for row in rows) > weights * layout.bits_per_weight / 8
    factors = sum(2 * 32 * sum(row.shape) for row in packed.values())  # in bf16
    vectors = sum(2 * (row.shape[1] + (row.shape[0] if layout.group == 16 else 0)) for row in packed.values())
    assert sum(row.packed_bytes for row in rows) == weights * layout.bits_per_weight / 8 + factors + vectors
    larger = plan_sizes(WAN_ANIMATE_14B, layout.with_rank(64))
    assert sum(row.packed_bytes for row in larger) - sum(row.packed_bytes for row in rows) == factors
    assert [row.other_bytes for row in larger] == [row.other_bytes for row in rows]
    careful = rule_for(layout, RULES["sensitive"])
    assert careful.keep("proj_out") and careful.keep("face_encoder.out_proj")
    assert rule_for(FORMATS["g32"], RULES["all"]) == RULES["all"]


def test_svdq_pads_the_tiny_model():
    rows = {row.name: row for row in plan_sizes(TINY, SVDQ_LAYOUTS["svdq-int4"])}
    assert rows["blocks.0.attn1.to_q"].shape == (64, 64)
    assert rows["blocks.0.attn1.to_q"].packed_bytes == SVDQ_LAYOUTS["svdq-int4"].bytes(128, 128)


def test_what_keeping_the_sensitive_layers_costs():
    fmt = FORMATS["g32"]
    everything, careful = (plan_sizes(WAN_ANIMATE_14B, fmt, RULES[name]) for name in ("all", "sensitive"))
    assert sum(bool(row.packed_bytes) for row in careful) == 517
    time_embedder = 5120 * 256 + 5120 * 5120
    ends = 64 * 5120 + 5120 * 1024
    cost = sum(row.packed_bytes + row.other_bytes for row in careful) - sum(
        row.packed_bytes + row.other_bytes for row in everything
    )
    assert cost == time_embedder * (4 - 0.5625) + ends * (2 - 0.5625)
    assert "103 MB" in RULES["sensitive"].summary and round(cost / 1e6) == 103


def test_a_rule_keeps_whole_names():
    keep = RULES["sensitive"].keep
    assert keep("proj_out") and keep("condition_embedder.time_embedder.linear_1")
    assert not keep("proj_out_2") and not keep("condition_embedder.time_proj") and not keep("blocks.0.attn1.to_q")
    with pytest.raises(ConfigInvalid, match="sensitive"):
        get_rule("sensitve")


def test_float32_by_parts_of_the_name():
    assert stored_dtype("blocks.0.norm2.weight", ("norm2",)) == torch.float32
    assert stored_dtype("blocks.0.norm20.weight", ("norm2",)) == torch.bfloat16
    assert stored_dtype("blocks.0.norm20.weight", ("norm2",), torch.float16) == torch.float16


def test_the_model_on_meta_has_its_tables():
    """The same model as the library makes, but that nothing of it takes memory: positions are computed already."""
    from diffusers import WanAnimateTransformer3DModel

    real, meta = WanAnimateTransformer3DModel.from_config(dict(TINY)), transformer_on_meta(TINY)
    assert all(p.is_meta for p in meta.parameters())
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    for (name, ours), (_, theirs) in zip(meta.named_buffers(), real.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    kinds = [type(module) for module in real.modules()]
    assert len(linear_shapes(meta)) == kinds.count(torch.nn.Linear)
