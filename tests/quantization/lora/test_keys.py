from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.quantization.lora.keys import LoraPart, parse_keys, unsupported

# Worked by hand from the two implementations' module trees, not from the table under test.
ORIGINAL_TO_LIBRARY = {
    "blocks.7.self_attn.q": "blocks.7.attn1.to_q",
    "blocks.7.self_attn.o": "blocks.7.attn1.to_out.0",
    "blocks.7.cross_attn.v": "blocks.7.attn2.to_v",
    "blocks.7.cross_attn.k_img": "blocks.7.attn2.add_k_proj",
    "blocks.7.cross_attn.v_img": "blocks.7.attn2.add_v_proj",
    "blocks.7.ffn.0": "blocks.7.ffn.net.0.proj",
    "blocks.7.ffn.2": "blocks.7.ffn.net.2",
    "blocks.7.self_attn.norm_k": "blocks.7.attn1.norm_k",
    "blocks.7.cross_attn.norm_k_img": "blocks.7.attn2.norm_added_k",
    "blocks.7.norm3": "blocks.7.norm2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "patch_embedding": "patch_embedding",
}


def one(key: str) -> LoraPart | None:
    return parse_keys([key])[key]


@pytest.mark.parametrize(("original", "library"), ORIGINAL_TO_LIBRARY.items())
def test_original_names_become_the_library_s(original: str, library: str) -> None:
    for prefix in ("diffusion_model.", "model.diffusion_model."):
        assert one(f"{prefix}{original}.diff_b") == LoraPart(f"{library}.bias", "diff", library)
    assert one(f"diffusion_model.{original}.lora_down.weight") == LoraPart(f"{library}.weight", "down", library)
    assert one(f"lora_unet_{original.replace('.', '_')}.lora_up.weight") == LoraPart(f"{library}.weight", "up", library)


@pytest.mark.parametrize(
    ("suffix", "leaf", "role"),
    [
        ("lora_down.weight", "weight", "down"),
        ("lora_up.weight", "weight", "up"),
        ("lora_A.weight", "weight", "down"),
        ("lora_B.weight", "weight", "up"),
        ("lora_A.default.weight", "weight", "down"),
        ("lora_B.default.weight", "weight", "up"),
        ("lora_B.default.bias", "bias", "scaled_diff"),
        ("lora_B.bias", "bias", "scaled_diff"),
        ("alpha", "weight", "alpha"),
        ("diff", "weight", "diff"),
        ("diff_b", "bias", "diff"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "base_model.model."])
def test_suffixes(suffix: str, leaf: str, role: str, prefix: str) -> None:
    assert one(f"{prefix}blocks.0.self_attn.q.{suffix}") == LoraPart(
        f"blocks.0.attn1.to_q.{leaf}", role, "blocks.0.attn1.to_q"
    )
    assert one(f"{prefix}blocks.0.attn1.to_q.{suffix}") == LoraPart(
        f"blocks.0.attn1.to_q.{leaf}", role, "blocks.0.attn1.to_q"
    )


@pytest.mark.parametrize(
    ("key", "table"),
    [
        ("diffusion_model.blocks.3.diff_m", "blocks.3.scale_shift_table"),
        ("diffusion_model.head.diff_m", "scale_shift_table"),
        ("diffusion_model.blocks.3.modulation.diff", "blocks.3.scale_shift_table"),
        ("diffusion_model.head.modulation.diff", "scale_shift_table"),
        ("transformer.blocks.3.scale_shift_table.diff", "blocks.3.scale_shift_table"),
    ],
)
def test_modulation_tables_have_no_weight_below_them(key: str, table: str) -> None:
    assert one(key) == LoraPart(table, "diff", table)


def test_the_cross_attention_s_norm_is_the_third_of_one_naming_and_the_second_of_the_other() -> None:
    bare, original, library = "blocks.0.norm3.diff", "blocks.0.self_attn.q.diff", "blocks.0.attn1.to_q.diff"
    assert (part := parse_keys([bare, original])[bare]) is not None and part.module == "blocks.0.norm2"
    assert (part := parse_keys([bare, library])[bare]) is not None and part.module == "blocks.0.norm3"
    assert (part := one("transformer.blocks.0.norm2.diff")) is not None and part.module == "blocks.0.norm2"
    for prefix in ("diffusion_model.", "base_model.model.diffusion_model."):
        assert (part := one(f"{prefix}blocks.0.norm3.diff")) is not None and part.module == "blocks.0.norm2"


def test_unknown_modules_keep_their_names_and_unknown_suffixes_mean_nothing() -> None:
    assert one("transformer.new_module.4.lora_A.weight") == LoraPart("new_module.4.weight", "down", "new_module.4")
    assert one("blocks.0.attn1.to_q.weight") is None
    assert one("diffusion_model.blocks.0.self_attn.q.reshape_weight") is None


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.blocks.0.self_attn.q.dora_scale",
        "transformer.blocks.0.attn1.to_q.lora_magnitude_vector.default.weight",
        "lora_unet_blocks_0_ffn_0.lora_mid.weight",
        "lora_unet_blocks_0_ffn_0.hada_w1_a",
        "lora_unet_blocks_0_ffn_0.lokr_w2",
    ],
)
def test_other_kinds_of_adapters_are_told_apart(key: str) -> None:
    assert unsupported(key)


@pytest.mark.parametrize("suffix", ["lora_down.weight", "lora_A.default.weight", "alpha", "diff", "diff_b", "diff_m"])
def test_a_plain_lora_is_not_taken_for_one_of_them(suffix: str) -> None:
    assert unsupported(f"diffusion_model.blocks.0.self_attn.q.{suffix}") is None


@given(st.lists(st.text(string.ascii_lowercase + "._0123456789AB", max_size=60), unique=True, max_size=8))
def test_any_keys_parse(keys: list[str]) -> None:
    parsed = parse_keys(keys)
    assert list(parsed) == keys
    for part in parsed.values():
        assert part is None or part.param.startswith(part.module)
