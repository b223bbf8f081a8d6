from __future__ import annotations

import json

import pytest

from runner.errors import ConfigInvalid
from runner.generation.recipes import DEFAULT_RECIPE, RECIPES, get_recipe
from runner.generation.schedule import make_scheduler


def test_the_shipped_recipes():
    assert {"fp4-distill", "fp4", "bf16", "fp32"} <= set(RECIPES)
    assert DEFAULT_RECIPE == "fp4-distill"
    assert get_recipe("bf16").steps == 20
    assert get_recipe("bf16").vae_dtype == "float32"
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert make_scheduler(recipe.scheduler, grid=recipe.grid, shift=recipe.shift)
        json.dumps(recipe.as_dict())


def test_prose_does_not_change_the_fingerprint():
    assert "summary" not in get_recipe("bf16").as_dict()


def test_an_unknown_recipe_gets_a_suggestion_and_the_list():
    with pytest.raises(ConfigInvalid, match=r"did you mean 'bf16'.*fp4-distill, fp4, bf16, fp32") as caught:
        get_recipe("bf61")
    assert caught.value.exit_code == 2


def test_only_the_distilled_recipe_has_few_steps_and_the_lora():
    """Six Euler steps are enough for a model that was distilled for few, and for no other."""
    distilled, plain = get_recipe("fp4-distill"), get_recipe("fp4")
    assert (distilled.steps, distilled.scheduler, distilled.fp4, distilled.distilled) == (6, "euler", True, True)
    assert (plain.steps, plain.scheduler, plain.fp4, plain.distilled) == (20, "unipc", True, False)
    assert not get_recipe("bf16").fp4
    assert distilled.as_dict() != plain.as_dict()
