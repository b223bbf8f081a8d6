from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing
from runner.quantization.lora.read import Full, LowRank, read_lora

LAYER = "blocks.0.attn1.to_q"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DOWN, UP, BIAS = numbers(4, 8, seed=1), numbers(6, 4, seed=2), numbers(6, seed=3)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("module", "down", "up"),
    [
        ("diffusion_model.blocks.0.self_attn.q", "lora_down.weight", "lora_up.weight"),
        ("diffusion_model.blocks.0.self_attn.q", "lora_A.weight", "lora_B.weight"),
        ("blocks.0.self_attn.q", "lora_down.weight", "lora_up.weight"),
        ("transformer.blocks.0.attn1.to_q", "lora_A.weight", "lora_B.weight"),
        ("transformer.blocks.0.attn1.to_q", "lora_A.default.weight", "lora_B.default.weight"),
        ("blocks.0.attn1.to_q", "lora_A.weight", "lora_B.weight"),
        ("lora_unet_blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 1.0, 8.0])
def test_read_lora_of_any_style_gives_same_delta(
    tmp_path: Path, module: str, down: str, up: str, alpha: float | None
) -> None:
    tensors = {f"{module}.{down}": DOWN, f"{module}.{up}": UP}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    lora = read_lora(write(tmp_path / "style.safetensors", tensors), 0.5)
    (delta,) = lora.deltas[f"{LAYER}.weight"]
    assert isinstance(delta, LowRank)
    assert torch.equal(delta.dense(), (UP @ DOWN) * (1.0 if alpha is None else alpha / 4))
    assert sorted(delta.keys) == sorted(tensors) and lora.unread == ()
    assert (lora.name, lora.strength) == ("style", 0.5)
    assert lora.sha256 == hashlib.sha256((tmp_path / "style.safetensors").read_bytes()).hexdigest()
    assert dataclasses.replace(lora, strength=2.0).deltas is lora.deltas


def test_peft_bias_is_scaled_with_layer_and_difference_is_not(tmp_path: Path) -> None:
    key = f"transformer.{LAYER}"
    tensors = {f"{key}.lora_A.weight": DOWN, f"{key}.lora_B.weight": UP, f"{key}.alpha": torch.tensor([2.0])}
    for leaf, expected in (("lora_B.bias", BIAS / 2), ("diff_b", BIAS)):
        lora = read_lora(write(tmp_path / f"{leaf}.safetensors", {**tensors, f"{key}.{leaf}": BIAS}))
        (delta,) = lora.deltas[f"{LAYER}.bias"]
        assert isinstance(delta, Full)
        assert torch.equal(delta.dense(), expected)


def test_pair_and_difference_for_one_parameter_are_both_kept(tmp_path: Path) -> None:
    key, diff = "diffusion_model.head.head", numbers(6, 8, seed=4)
    tensors = {f"{key}.lora_down.weight": DOWN, f"{key}.lora_up.weight": UP, f"{key}.diff": diff}
    deltas = read_lora(write(tmp_path / "a.safetensors", tensors)).deltas["proj_out.weight"]
    assert torch.allclose(sum((d.dense() for d in deltas), torch.zeros(())), UP @ DOWN + diff)


def test_factors_of_convolution_multiply_as_matrices(tmp_path: Path) -> None:
    down, up = numbers(4, 3, 1, 2, 2), numbers(6, 4, 1, 1, 1)
    key = "diffusion_model.patch_embedding"
    lora = read_lora(write(tmp_path / "a.safetensors", {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}))
    (delta,) = lora.deltas["patch_embedding.weight"]
    assert delta.shape == (6, 3, 1, 2, 2)
    # the change acts on a video as the two convolutions do, one after the other
    video = numbers(1, 3, 2, 8, 8)
    expected = torch.conv3d(torch.conv3d(video, down, stride=(1, 2, 2)), up)
    assert torch.allclose(torch.conv3d(video, delta.dense(), stride=(1, 2, 2)), expected, atol=1e-4)


def test_delta_in_chunks_equals_whole_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = LowRank(DOWN, UP, 0.5, ())
    whole = delta.dense()
    monkeypatch.setattr("runner.quantization.lora.read.CHUNK", 16)  # two rows of eight
    assert torch.equal(delta.dense(), whole)


def test_read_lora_lists_unread_tensors(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.diff_b": BIAS, f"{LAYER}.reshape_weight": torch.ones(2), "blocks.0.ffn.0.alpha": torch.ones(1)}
    lora = read_lora(write(tmp_path / "a.safetensors", tensors))
    assert sorted(lora.unread) == ["blocks.0.attn1.to_q.reshape_weight", "blocks.0.ffn.0.alpha"]


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth", ".pkl"])
def test_read_lora_refuses_pickle_without_opening(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"lora{suffix}"
    torch.save({f"{LAYER}.diff_b": BIAS}, path)
    monkeypatch.setattr(Path, "open", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(WeightsCorrupt, match="never read"):
        read_lora(path)


def test_read_lora_of_pickle_named_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    torch.save({f"{LAYER}.diff_b": BIAS}, path)
    with pytest.raises(WeightsCorrupt, match="not a whole safetensors file"):
        read_lora(path)


def test_read_lora_of_missing_file_or_bad_strength_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"none\.safetensors"):
        read_lora(tmp_path / "none.safetensors")
    path = write(tmp_path / "a.safetensors", {f"{LAYER}.diff_b": BIAS})
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ConfigInvalid, match="strength"):
            read_lora(path, strength)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.lora_down.weight": DOWN}, r"a\.lora_down\.weight has no up factor"),
        ({"a.lora_B.weight": UP}, r"a\.lora_B\.weight has no down factor"),
        ({"a.lora_down.weight": DOWN, "a.lora_up.weight": numbers(6, 5)}, r"\[4, 8\] and a\.lora_up\.weight \[6, 5\]"),
        ({"a.lora_down.weight": BIAS, "a.lora_up.weight": UP}, "no pair"),
        ({"a.lora_down.weight": numbers(0, 8), "a.lora_up.weight": numbers(6, 0)}, "no pair"),
        ({"a.lora_A.weight": DOWN, "a.lora_B.weight": UP, "a.alpha": torch.ones(2)}, "no single number"),
        ({"a.lora_A.weight": DOWN, "a.lora_A.default.weight": DOWN, "a.lora_B.weight": UP}, "same part"),
        ({"a.lora_A.weight": DOWN, "transformer.a.lora_A.weight": DOWN, "a.lora_B.weight": UP}, "same part"),
        ({"a.diff": torch.tensor([1.0, float("nan")])}, r"a\.diff holds NaN"),
        ({"a.diff": torch.tensor([1.0, float("inf")], dtype=torch.bfloat16)}, r"a\.diff holds NaN or Inf"),
        ({"a.diff": torch.ones(2, dtype=torch.int8)}, r"a\.diff is torch\.int8"),
        ({"a.diff": torch.ones(2).to(torch.float8_e4m3fn)}, r"a\.diff is torch\.float8_e4m3fn"),
        ({"a.lora_down.weight": DOWN, "a.lora_up.weight": UP, "a.dora_scale": BIAS}, "dora_scale"),
        ({"blocks.0.attn1.to_q.weight": UP}, "holds no LoRA"),
        ({"a.alpha": torch.ones(())}, "holds no LoRA"),
        ({}, "holds no LoRA"),
    ],
)
def test_read_lora_of_inconsistent_tensors_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    path = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(WeightsCorrupt, match=words) as caught:
        read_lora(path)
    assert "bad.safetensors" in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 600), flips=st.lists(st.tuples(st.integers(0, 599), st.integers(1, 255)), max_size=3))
def test_read_lora_of_damaged_file_is_refused_or_valid(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    blob = bytearray(save({f"a.lora_{x}.weight": t for x, t in (("down", DOWN), ("up", UP))}))
    size = len(blob)
    for at, bits in flips:
        blob[at % size] ^= bits
    damaged = bytes(blob[: min(cut, size)] if cut < 300 else blob)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        lora = read_lora(path)
    except WeightsCorrupt:
        return
    assert len(damaged) == size  # a truncated file is never taken
    assert load(damaged).keys() >= {key for deltas in lora.deltas.values() for delta in deltas for key in delta.keys}


class TestPeftConfig:
    """PEFT keeps alpha out of the tensors; the library stores its config in the file's header."""

    @pytest.mark.parametrize("pattern", ["([a-z.0-9]+)+!", "(.*)*x", ".*.*.*.*.*x", "(a{1,9}){1,9}!", "(?:a|a)*!"])
    def test_alpha_pattern_with_slow_regex_is_refused(self, tmp_path: Path, pattern: str) -> None:
        tensors = {"a.lora_A.weight": DOWN, "a.lora_B.weight": UP}
        path = tmp_path / "slow.safetensors"
        config = json.dumps({"lora_alpha": 1, "alpha_pattern": {pattern: 2}})
        save_file(tensors, path, metadata={"lora_adapter_metadata": config})
        with pytest.raises(WeightsCorrupt, match="repeats a group, or has more than 3 repetitions"):
            read_lora(path)

    def scale(self, tmp_path: Path, config: Any) -> float:
        tensors = {f"transformer.{LAYER}.lora_A.weight": DOWN, f"transformer.{LAYER}.lora_B.weight": UP}
        text = config if isinstance(config, str) else json.dumps(config)
        lora = read_lora(write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": text}))
        (delta,) = lora.deltas[f"{LAYER}.weight"]
        return delta.scale

    def test_peft_config_with_alpha_scales_by_alpha_over_rank(self, tmp_path: Path) -> None:
        assert self.scale(tmp_path, {"transformer.r": 4, "transformer.lora_alpha": 8}) == 2.0

    def test_peft_config_with_rslora_scales_by_alpha_over_root_of_rank(self, tmp_path: Path) -> None:
        assert self.scale(tmp_path, {"transformer.lora_alpha": 8, "transformer.use_rslora": True}) == 4.0

    def test_peft_config_with_alpha_pattern_uses_first_match(self, tmp_path: Path) -> None:
        pattern = {"attn2.to_q": 100, "attn1.to_q": 2, LAYER: 3}
        assert self.scale(tmp_path, {"transformer.lora_alpha": 8, "transformer.alpha_pattern": pattern}) == 0.5

    def test_read_lora_of_folder_saved_by_peft_equals_peft(self, tmp_path: Path) -> None:
        """The names have PEFT's prefix, and the config is a separate file."""
        from peft import LoraConfig, get_peft_model

        model = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(8, 6), "pose": torch.nn.Linear(6, 8)})
        settings = LoraConfig(
            r=4, lora_alpha=6, target_modules=list(model), alpha_pattern={"pose": 20}, init_lora_weights=False
        )
        trained = get_peft_model(model, settings)
        trained.save_pretrained(tmp_path)
        deltas = read_lora(tmp_path / "adapter_model.safetensors").deltas
        assert set(deltas) == {"proj_out.weight", "pose.weight"}
        for name in model:
            (delta,) = deltas[f"{name}.weight"]
            theirs = trained.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()
            torch.testing.assert_close(delta.dense(), theirs)

    def test_peft_config_of_other_model_part_is_ignored(self, tmp_path: Path) -> None:
        assert self.scale(tmp_path, {"text_encoder.lora_alpha": 8}) == 1.0

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            '{"lora_alpha": "x"}',
            '{"lora_alpha": NaN}',
            '{"alpha_pattern": {"(": 1}}',
            '{"alpha_pattern": 3}',
        ],
    )
    def test_peft_config_that_is_invalid_is_refused(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(WeightsCorrupt, match="lora_adapter_metadata"):
            self.scale(tmp_path, text)
