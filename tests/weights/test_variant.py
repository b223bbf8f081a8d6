"""Which files a recipe takes, among all that a store may hold: a question of names alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from runner.errors import ConfigInvalid, WeightsMissing
from runner.spec.recipes import get_recipe
from runner.weights.variant import choose_variant, lora_file, lora_files, quantized_folder, text_file, wanted_fp4

DISTILLED, PLAIN, SOURCE = (get_recipe(name) for name in ("fp4-distill", "fp4", "bf16"))
BASE = "Wan2.2-Animate-14B-FP4"
TRANSFORMER, TEXT = "quantized_transformer.safetensors", "quantized_text_encoder.safetensors"
LORA = "distill_lora/x.safetensors"
CONFIG = "Wan2.2-Animate-14B-Diffusers/transformer/config.json"


def hold(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


# what the store holds -> (kind, folder, is the LoRA beside it) for fp4-distill, then for fp4; None: not complete
TABLE = {
    ("-distill",): (("quantized", "-distill", False), None),
    ("-plain",): (None, ("quantized", "-plain", False)),
    ("",): (None, ("published", "", False)),
    ("-plain", LORA): (("quantized", "-plain", True), ("quantized", "-plain", False)),
    ("", LORA): (("published", "", True), ("published", "", False)),
    ("-plain", "", LORA): (("quantized", "-plain", True), ("quantized", "-plain", False)),
    ("-distill", "-plain", "", LORA): (("quantized", "-distill", False), ("quantized", "-plain", False)),
    (LORA,): (None, None),
    (): (None, None),
}


@pytest.mark.parametrize(("held", "recipe"), itertools.product(TABLE, (DISTILLED, PLAIN)), ids=str)
def test_the_best_that_is_there_is_taken(tmp_path, held, recipe):
    hold(tmp_path, CONFIG, *(name if name == LORA else f"{BASE}{name}/{TRANSFORMER}" for name in held))
    expected = TABLE[held][0 if recipe is DISTILLED else 1]
    if expected is None:
        with pytest.raises(WeightsMissing) as caught:
            choose_variant(tmp_path, recipe)
        message = caught.value.message
        assert f"video-lab quantize --recipe {recipe.name}" in message
        assert f"video-lab weights fetch --recipe {recipe.name}" in message
        assert caught.value.exit_code == 2
        return
    kind, folder, beside = expected
    variant = choose_variant(tmp_path, recipe)
    assert (variant.kind, variant.transformer) == (kind, tmp_path / f"{BASE}{folder}" / TRANSFORMER)
    assert variant.loras == ((tmp_path / LORA,) if beside else ())
    assert f"{BASE}{folder}/{TRANSFORMER} is there" in variant.why
    assert ("x.safetensors kept beside it" in variant.why) is beside


def test_weights_without_their_lora_are_told_from_no_weights(tmp_path):
    with pytest.raises(WeightsMissing, match="no FP4 transformer"):
        choose_variant(tmp_path, DISTILLED)
    hold(tmp_path, f"{BASE}/{TRANSFORMER}", CONFIG)
    with pytest.raises(WeightsMissing, match=f"has {BASE}/{TRANSFORMER}, but no distill LoRA in distill_lora/"):
        choose_variant(tmp_path, DISTILLED)


def test_other_recipes_run_the_source_whatever_else_is_there(tmp_path):
    hold(tmp_path, CONFIG, f"{BASE}-distill/{TRANSFORMER}", f"{BASE}-distill/{TEXT}", LORA)
    variant = choose_variant(tmp_path, SOURCE)
    assert (variant.kind, variant.transformer) == ("source", (tmp_path / CONFIG).parent)
    assert (variant.loras, variant.text_encoder, variant.files) == ((), None, ())


def test_the_config_beside_the_file_is_its_own(tmp_path):
    hold(tmp_path, CONFIG, f"{BASE}-plain/{TRANSFORMER}")
    assert choose_variant(tmp_path, PLAIN).config == tmp_path / CONFIG
    own = f"{BASE}-plain/config.json"
    hold(tmp_path, own)
    assert choose_variant(tmp_path, PLAIN).config == tmp_path / own
    (tmp_path / own).unlink()
    (tmp_path / CONFIG).unlink()
    with pytest.raises(WeightsMissing, match=r"config\.json is neither.*" + CONFIG):
        choose_variant(tmp_path, PLAIN)


def test_all_that_decides_the_frames_is_in_the_identity(tmp_path):
    hold(tmp_path, CONFIG, f"{BASE}/{TRANSFORMER}", f"{BASE}/{TEXT}", f"{BASE}/quantize_config.json", LORA)
    names = {path.relative_to(tmp_path).as_posix() for path in choose_variant(tmp_path, DISTILLED).files}
    assert names == {CONFIG, f"{BASE}/{TRANSFORMER}", f"{BASE}/{TEXT}", f"{BASE}/quantize_config.json", LORA}


def test_the_text_encoder_of_the_recipes_own_folder_comes_first(tmp_path):
    assert text_file(tmp_path, DISTILLED) is None
    for folder in (BASE, f"{BASE}-plain", f"{BASE}-distill"):
        hold(tmp_path, f"{folder}/{TEXT}")
        assert text_file(tmp_path, DISTILLED) == tmp_path / folder / TEXT
    assert text_file(tmp_path, PLAIN) == tmp_path / f"{BASE}-plain" / TEXT
    assert text_file(tmp_path, SOURCE) is None


def test_where_quantize_writes():
    assert quantized_folder(DISTILLED) == f"{BASE}-distill"
    assert quantized_folder(PLAIN) == f"{BASE}-plain"


def test_a_jobs_loras_by_name(tmp_path):
    hold(tmp_path, "loras/style.safetensors", "loras/old.ckpt")
    style = tmp_path / "loras/style.safetensors"
    assert lora_file(tmp_path, "style") == style
    assert lora_files(tmp_path, (("style", 0.5),), replace=True) == {"style": (style, 0.5)}
    for name in ("old", "Style"):
        with pytest.raises(WeightsMissing, match=f"no LoRA '{name}'; there: style"):
            lora_file(tmp_path, name)
    with pytest.raises(ConfigInvalid, match="'style' twice"):
        lora_files(tmp_path, (("style", 0.5), ("style", 1.0)), replace=False)


def test_replace_jobs_get_the_relighting_lora_unless_they_name_it(tmp_path):
    hold(tmp_path, "loras/style.safetensors", "loras/WanAnimate_Relight_fp16.safetensors")
    relight = tmp_path / "loras/WanAnimate_Relight_fp16.safetensors"
    assert lora_files(tmp_path, (), replace=False) == {}
    assert lora_files(tmp_path, (), replace=True) == {relight.stem: (relight, 1.0)}
    assert lora_files(tmp_path, ((relight.stem, 0.0),), replace=True) == {relight.stem: (relight, 0.0)}
    assert set(lora_files(tmp_path, (("style", 1.0),), replace=True)) == {"style", relight.stem}


@pytest.mark.parametrize(
    ("key", "recipes"),
    [
        (f"{BASE}-distill/{TRANSFORMER}", {"fp4-distill"}),
        (f"{BASE}-plain/config.json", {"fp4-distill", "fp4"}),
        (f"{BASE}/{TRANSFORMER}", {"fp4-distill", "fp4"}),
        (f"{BASE}/quantize_config.json", {"fp4-distill", "fp4"}),
        (f"{BASE}/{TEXT}", {"fp4-distill", "fp4"}),
        (f"{BASE}/pytorch_model.bin", set()),
        (f"{BASE}/deeper/{TRANSFORMER}", set()),
        (LORA, {"fp4-distill"}),
        ("distill_lora/x.ckpt", set()),
        ("loras/style.safetensors", {"fp4-distill", "fp4", "bf16"}),
        ("loras/deeper/style.safetensors", set()),
        ("", set()),
    ],
)
def test_what_a_recipe_wants_of_a_remote_store(key, recipes):
    assert {recipe.name for recipe in (DISTILLED, PLAIN, SOURCE) if wanted_fp4(recipe)(key)} == recipes
