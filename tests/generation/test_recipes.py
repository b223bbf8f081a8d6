from __future__ import annotations

import json

import pytest

from runner.errors import ConfigInvalid
from runner.generation.recipes import DEFAULT_RECIPE, RECIPES, get_recipe
from runner.generation.schedule import make_scheduler


def test_the_shipped_recipes():
    assert set(RECIPES) == {"bf16", "fp32"}
    assert DEFAULT_RECIPE in RECIPES
    assert get_recipe("bf16").steps == 20
    assert get_recipe("bf16").vae_dtype == "float32"
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert make_scheduler(recipe.scheduler, grid=recipe.grid, shift=recipe.shift)
        json.dumps(recipe.as_dict())


def test_prose_does_not_change_the_fingerprint():
    assert "summary" not in get_recipe("bf16").as_dict()


def test_an_unknown_recipe_gets_a_suggestion_and_the_list():
    with pytest.raises(ConfigInvalid, match=r"did you mean 'bf16'.*bf16, fp32") as caught:
        get_recipe("bf61")
    assert caught.value.exit_code == 2


def test_fp4_is_named_as_not_there_yet():
    with pytest.raises(ConfigInvalid, match="not in this version"):
        get_recipe("fp4-distill")
