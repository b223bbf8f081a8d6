"""Which files a recipe takes, among all that a store may hold: a question of names alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from runner.errors import ConfigInvalid, WeightsMissing
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.spec.recipes import get_recipe
from runner.weights.variant import (
    choose_variant,
    formats_in,
    lora_file,
    lora_files,
    quantize_command,
    quantized_folder,
    svdq_format,
    text_file,
    variant_folders,
    wanted_fp4,
)

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
def test_choose_variant_takes_best_present_variant(tmp_path, held, recipe):
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


def test_choose_variant_error_distinguishes_missing_weights_and_missing_lora(tmp_path):
    with pytest.raises(WeightsMissing, match="no FP4 transformer"):
        choose_variant(tmp_path, DISTILLED)
    hold(tmp_path, f"{BASE}/{TRANSFORMER}", CONFIG)
    with pytest.raises(WeightsMissing, match=f"has {BASE}/{TRANSFORMER}, but no distill LoRA in distill_lora/"):
        choose_variant(tmp_path, DISTILLED)


def test_choose_variant_of_source_recipe_takes_source(tmp_path):
    hold(tmp_path, CONFIG, f"{BASE}-distill/{TRANSFORMER}", f"{BASE}-distill/{TEXT}", LORA)
    variant = choose_variant(tmp_path, SOURCE)
    assert (variant.kind, variant.transformer) == ("source", (tmp_path / CONFIG).parent)
    assert (variant.loras, variant.text_encoder, variant.files) == ((), None, ())


def test_choose_variant_prefers_config_beside_file(tmp_path):
    hold(tmp_path, CONFIG, f"{BASE}-plain/{TRANSFORMER}")
    assert choose_variant(tmp_path, PLAIN).config == tmp_path / CONFIG
    own = f"{BASE}-plain/config.json"
    hold(tmp_path, own)
    assert choose_variant(tmp_path, PLAIN).config == tmp_path / own
    (tmp_path / own).unlink()
    (tmp_path / CONFIG).unlink()
    with pytest.raises(WeightsMissing, match=r"config\.json is neither.*" + CONFIG):
        choose_variant(tmp_path, PLAIN)


def test_variant_files_include_all_that_decide_frames(tmp_path):
    hold(tmp_path, CONFIG, f"{BASE}/{TRANSFORMER}", f"{BASE}/{TEXT}", f"{BASE}/quantize_config.json", LORA)
    names = {path.relative_to(tmp_path).as_posix() for path in choose_variant(tmp_path, DISTILLED).files}
    assert names == {CONFIG, f"{BASE}/{TRANSFORMER}", f"{BASE}/{TEXT}", f"{BASE}/quantize_config.json", LORA}


def test_text_file_of_own_folder_of_recipe_comes_first(tmp_path):
    assert text_file(tmp_path, DISTILLED) is None
    for folder in (BASE, f"{BASE}-plain", f"{BASE}-distill"):
        hold(tmp_path, f"{folder}/{TEXT}")
        assert text_file(tmp_path, DISTILLED) == tmp_path / folder / TEXT
    assert text_file(tmp_path, PLAIN) == tmp_path / f"{BASE}-plain" / TEXT
    assert text_file(tmp_path, SOURCE) is None


def test_quantized_folder_is_named_by_recipe_and_format():
    assert quantized_folder(DISTILLED) == f"{BASE}-distill"
    assert quantized_folder(PLAIN) == f"{BASE}-plain"
    for fmt, stem in STEMS.items():
        assert (
            quantized_folder(DISTILLED, fmt) == quantized_folder(get_recipe(f"fp4-distill+{fmt}")) == f"{stem}-distill"
        )
        assert quantized_folder(PLAIN, fmt) == f"{stem}-plain"
    assert quantized_folder(DISTILLED, "g32") == f"{BASE}-distill"


def test_lora_files_of_job_are_found_by_name(tmp_path):
    hold(tmp_path, "loras/style.safetensors", "loras/old.ckpt")
    style = tmp_path / "loras/style.safetensors"
    assert lora_file(tmp_path, "style") == style
    assert lora_files(tmp_path, (("style", 0.5),), replace=True) == {"style": (style, 0.5)}
    for name in ("old", "Style"):
        with pytest.raises(WeightsMissing, match=f"no LoRA '{name}'; it has: style"):
            lora_file(tmp_path, name)
    with pytest.raises(ConfigInvalid, match="'style' twice"):
        lora_files(tmp_path, (("style", 0.5), ("style", 1.0)), replace=False)


def test_lora_files_of_replace_job_include_relighting_lora(tmp_path):
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
def test_wanted_fp4_selects_files_of_recipe(key, recipes):
    assert {recipe.name for recipe in (DISTILLED, PLAIN, SOURCE) if wanted_fp4(recipe)(key)} == recipes


# Recipes that need an SVDQ format

STEMS = {fmt: f"Wan2.2-Animate-14B-{fmt.upper()}" for fmt in SVDQ_LAYOUTS}
every_format = pytest.mark.parametrize(("fmt", "stem"), STEMS.items(), ids=STEMS)


def test_formats_in_folder_follow_its_name():
    assert STEMS == {"svdq-int4": "Wan2.2-Animate-14B-SVDQ-INT4", "svdq-nvfp4": "Wan2.2-Animate-14B-SVDQ-NVFP4"}
    for fmt, stem in STEMS.items():
        assert formats_in(f"{stem}-distill") == formats_in(f"{stem}-plain") == (fmt,)
    assert formats_in(BASE) == formats_in(f"{BASE}-distill") == ("g32", "nvfp4")


@every_format
def test_svdq_format_of_recipe_is_format_of_its_modifier(fmt, stem):
    assert svdq_format(get_recipe(f"fp4-distill+steps4+{fmt}")) == fmt
    assert [svdq_format(get_recipe(name)) for name in ("fp4-distill", "fp4+nvfp4", "bf16", "fp4-fast")] == [None] * 4
    assert variant_folders(get_recipe(f"fp4-distill+{fmt}")) == (f"{stem}-distill", f"{stem}-plain")
    assert variant_folders(get_recipe(f"fp4+{fmt}")) == (f"{stem}-plain",)
    assert quantize_command(get_recipe(f"fp4-distill+{fmt}+steps4")) == (
        f"video-lab quantize --recipe fp4-distill --format {fmt}"
    )


@every_format
def test_choose_variant_of_svdq_takes_file_of_own_folder_only(tmp_path, fmt, stem):
    """With every FP4 file there, and one in the other SVDQ format."""
    distilled, plain = get_recipe(f"fp4-distill+{fmt}"), get_recipe(f"fp4+{fmt}")
    other = next(name for name in STEMS.values() if name != stem)
    hold(tmp_path, CONFIG, *(f"{folder}/{TRANSFORMER}" for folder in (BASE, f"{BASE}-distill", f"{other}-distill")))
    for recipe, base in ((distilled, "fp4-distill"), (plain, "fp4")):
        with pytest.raises(WeightsMissing, match=f"has no transformer in {fmt}") as caught:
            choose_variant(tmp_path, recipe)
        message = caught.value.message
        assert f"video-lab quantize --recipe {base} --format {fmt}" in message
        assert f"There is no published file in {fmt}" in message
        assert f"video-lab weights fetch --recipe {base}+{fmt}" in message
    hold(tmp_path, f"{stem}-plain/{TRANSFORMER}")
    with pytest.raises(WeightsMissing, match=f"has {stem}-plain/{TRANSFORMER}, but no distill LoRA") as caught:
        choose_variant(tmp_path, distilled)
    assert "fetches the LoRA" in caught.value.message
    hold(tmp_path, LORA)
    for recipe, beside in ((plain, ()), (distilled, (tmp_path / LORA,))):
        variant = choose_variant(tmp_path, recipe)
        assert (variant.kind, variant.transformer) == ("quantized", tmp_path / f"{stem}-plain" / TRANSFORMER)
        assert variant.loras == beside
    hold(tmp_path, f"{stem}-distill/{TRANSFORMER}")
    variant = choose_variant(tmp_path, distilled)
    assert (variant.transformer, variant.loras) == (tmp_path / f"{stem}-distill" / TRANSFORMER, ())
    assert choose_variant(tmp_path, DISTILLED).transformer == tmp_path / f"{BASE}-distill" / TRANSFORMER


@every_format
def test_text_file_of_fp4_folder_serves_svdq_recipe(tmp_path, fmt, stem):
    recipe = get_recipe(f"fp4-distill+{fmt}")
    assert text_file(tmp_path, recipe) is None
    for folder in (BASE, f"{BASE}-plain", f"{BASE}-distill", f"{stem}-plain", f"{stem}-distill"):
        hold(tmp_path, f"{folder}/{TEXT}")
        assert text_file(tmp_path, recipe) == tmp_path / folder / TEXT
    assert text_file(tmp_path, DISTILLED) == tmp_path / f"{BASE}-distill" / TEXT


@every_format
@pytest.mark.parametrize(
    ("key", "recipes"),
    [
        ("{stem}-distill/{file}", {"fp4-distill"}),
        ("{stem}-plain/{file}", {"fp4-distill", "fp4"}),
        ("{stem}-plain/config.json", {"fp4-distill", "fp4"}),
        ("{stem}/{file}", set()),
        ("{base}/{file}", set()),
        ("{base}-plain/config.json", set()),
        ("{base}/{text}", {"fp4-distill", "fp4"}),
        ("{base}-distill/{text}", {"fp4-distill"}),
        ("{stem}-distill/{text}", {"fp4-distill"}),
        ("{lora}", {"fp4-distill"}),
    ],
)
def test_wanted_fp4_selects_files_of_svdq_recipe(fmt, stem, key, recipes):
    path = key.format(stem=stem, base=BASE, file=TRANSFORMER, text=TEXT, lora=LORA)
    wants = {base for base in ("fp4-distill", "fp4") if wanted_fp4(get_recipe(f"{base}+{fmt}"))(path)}
    assert wants == recipes
    assert not wanted_fp4(DISTILLED)(f"{stem}-distill/{TRANSFORMER}")
