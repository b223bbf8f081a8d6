from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import ConfigInvalid
from runner.forecast.precisions import PRECISIONS
from runner.generation.sampling import make_sampler
from runner.spec.hashed_fields import RECIPE_KEYS, introduced_defaults
from runner.spec.recipes import DEFAULT_RECIPE, FAST_RECIPE, RECIPES, Recipe, get_recipe

CPU = torch.device("cpu")


def test_shipped_recipes_have_expected_fields():
    assert {"fp4-distill", "fp4", "bf16", "fp32"} <= set(RECIPES)
    assert DEFAULT_RECIPE == "fp4-distill"
    assert get_recipe("bf16").steps == 20
    assert get_recipe("bf16").vae_dtype == "float32"
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert make_sampler(recipe.scheduler, recipe.schedule, recipe.shift, recipe.steps, CPU).steps == recipe.steps
        json.dumps(recipe.as_dict())


def test_recipe_as_dict_leaves_out_summary():
    assert "summary" not in get_recipe("bf16").as_dict()


def test_unknown_recipe_error_has_suggestion_and_list():
    with pytest.raises(ConfigInvalid, match=r"did you mean 'bf16'.*fp4-distill, fp4-fast, fp4, bf16, fp32") as caught:
        get_recipe("bf61")
    assert caught.value.exit_code == 2


def test_distilled_recipe_alone_has_6_steps_and_lora():
    """Six Euler steps are enough for a model that was distilled for few, and for no other."""
    distilled, plain = get_recipe("fp4-distill"), get_recipe("fp4")
    assert (distilled.steps, distilled.scheduler, distilled.fp4, distilled.distilled) == (6, "euler", True, True)
    assert (plain.steps, plain.scheduler, plain.fp4, plain.distilled) == (20, "unipc", True, False)
    assert not get_recipe("bf16").fp4
    assert distilled.as_dict() != plain.as_dict()


def test_fast_recipe_differs_from_distilled_in_choice_only():
    distilled, fast = get_recipe("fp4-distill"), get_recipe("fp4-fast")
    assert fast.name == FAST_RECIPE
    assert replace(fast, name=distilled.name, summary=distilled.summary, choice="") == distilled
    assert fast.as_dict()["choice"] == "fast" and distilled.as_dict()["choice"] == ""


def changed(name: str) -> dict[str, object]:
    """Fields in which the recipe differs from the one that it starts from."""
    recipe, base = get_recipe(name), get_recipe(name.partition("+")[0])
    skipped = ("name", "summary")
    return {
        f.name: getattr(recipe, f.name)
        for f in fields(Recipe)
        if f.name not in skipped and getattr(recipe, f.name) != getattr(base, f.name)
    }


@pytest.mark.parametrize(
    ("name", "fields_changed", "canonical"),
    [
        ("fp4-distill+fp8", {"compute": "fp8"}, "fp4-distill+fp8"),
        ("fp4-distill+steps4+int8", {"compute": "int8", "steps": 4}, "fp4-distill+int8+steps4"),
        ("fp4-distill+unipc+nvfp4", {"compute": "nvfp4", "scheduler": "unipc"}, "fp4-distill+nvfp4+unipc"),
        ("fp4-distill+diffusers-grid", {"schedule": "diffusers"}, "fp4-distill+diffusers-grid"),
        ("fp4-distill+beta57+res2s", {"scheduler": "res_2s", "schedule": "beta57"}, "fp4-distill+res2s+beta57"),
        ("fp4+shift8+beta57", {"schedule": "beta57", "shift": 8.0}, "fp4+beta57+shift8"),
        ("bf16+dpmpp+steps12", {"scheduler": "dpmpp", "steps": 12}, "bf16+dpmpp+steps12"),
        ("fp4+diffusers-grid+euler", {"schedule": "diffusers", "scheduler": "euler"}, "fp4+euler+diffusers-grid"),
        ("bf16+shift3.0+steps006", {"shift": 3.0, "steps": 6}, "bf16+steps6+shift3"),
        ("bf16+shift2.5", {"shift": 2.5}, "bf16+shift2.5"),
        ("fp32+int8", {"compute": "int8"}, "fp32+int8"),
        ("fp4-distill+svdq-nvfp4", {"compute": "svdq-nvfp4"}, "fp4-distill+svdq-nvfp4"),
        ("fp4+steps8+svdq-int4", {"compute": "svdq-int4", "steps": 8}, "fp4+svdq-int4+steps8"),
        ("fp4-distill+bf16-vae+fp8", {"compute": "fp8", "vae_dtype": "bfloat16"}, "fp4-distill+fp8+bf16-vae"),
        ("fp4-distill+euler+steps6+official-grid+bf16+shift5", {}, "fp4-distill"),
        ("fp4-fast+steps4+unipc", {"scheduler": "unipc", "steps": 4}, "fp4-fast+unipc+steps4"),
        ("fp4-fast+beta57+shift3", {"schedule": "beta57", "shift": 3.0}, "fp4-fast+beta57+shift3"),
    ],
)
def test_recipe_modifiers_change_their_fields_only(name, fields_changed, canonical):
    recipe = get_recipe(name)
    assert changed(name) == fields_changed
    assert recipe.name == canonical
    assert get_recipe(canonical) == recipe
    assert make_sampler(recipe.scheduler, recipe.schedule, recipe.shift, recipe.steps, CPU).steps == recipe.steps


WORDS = st.fixed_dictionaries(
    {},
    optional={
        "compute": st.sampled_from(list(PRECISIONS)),
        "vae_dtype": st.just("bf16-vae"),
        "scheduler": st.sampled_from(["euler", "unipc", "dpmpp", "res2s"]),
        "schedule": st.sampled_from(["official-grid", "diffusers-grid", "beta57"]),
        "steps": st.integers(1, 100).map(lambda n: f"steps{n}"),
        "shift": st.sampled_from(["shift3", "shift5", "shift8", "shift0.5", "shift12.25"]),
    },
)


@pytest.mark.parametrize("name", RECIPES)
def test_record_of_recipe_keeps_keys_of_version_0_1_0(name):
    recorded = RECIPES[name].as_dict()
    assert recorded["grid"] == RECIPES[name].schedule
    assert list(recorded)[:5] == ["name", "steps", "scheduler", "grid", "shift"] and "schedule" not in recorded


@given(base=st.sampled_from(sorted(RECIPES)), words=WORDS, data=st.data())
def test_recipe_modifiers_in_any_order_give_same_recipe(base, words, data):
    def recipe_of(texts) -> object:
        try:
            return get_recipe("+".join([base, *texts]))
        except ConfigInvalid as err:
            return err.code

    shuffled = data.draw(st.permutations(list(words.values())))
    made = recipe_of(shuffled)
    assert made == recipe_of(words.values())
    if isinstance(made, Recipe):
        assert get_recipe(made.name) == made
        assert made.name.count("+") == len(changed(made.name))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fp4-distil+fp8", "did you mean 'fp4-distill[+]fp8'"),
        ("fp4+fp-8", "did you mean 'fp8'"),
        ("fp4+FP8", "did you mean 'fp8'"),
        ("fp4+nvfp", "did you mean 'nvfp4'"),
        ("fp4+6steps", "did you mean 'steps6'"),
        ("fp4+steps=4", "did you mean 'steps4'"),
        ("fp4+shift-3", "did you mean 'shift3'"),
        ("fp4+eulr", "did you mean 'euler'"),
        ("fp4-distill+diffusers", "did you mean 'diffusers-grid'"),
        ("fp4+res_2s", "did you mean 'res2s'"),
        ("fp4+beta-57", "did you mean 'beta57'"),
        ("fp4+beta57-grid", "did you mean 'beta57'"),
        (
            "fp4+karras",
            "After a [+]: bf16, fp8, int8, nvfp4, svdq-int4, svdq-nvfp4, int8-attention, bf16-vae, fp16-vae, euler, "
            "unipc, dpmpp, res2s, official-grid, diffusers-grid, beta57, stepsN",
        ),
        ("fp4+", "unknown modifier ''"),
        ("fp4+fp8+fp8", "has 'fp8' twice"),
        ("fp4+fp8+int8", "has both 'fp8' and 'int8'"),
        ("fp4+steps4+steps6", "has both 'steps4' and 'steps6'"),
        ("fp4+diffusers-grid", "Use fp4[+]diffusers-grid[+]euler"),
        ("fp4-distill+unipc+diffusers-grid", "Leave out one of unipc and diffusers-grid"),
        ("fp4-distill+res2s+diffusers-grid", "Leave out one of res2s and diffusers-grid"),
        ("fp32+bf16", "Use recipe bf16"),
        ("fp4-fast+fp8", "has 'fp8', which fp4-fast leaves to the device. Use fp4-distill[+]fp8"),
        ("fp4-fast+int8", "Use fp4-distill[+]int8"),
        ("fp4-fast+nvfp4", "Use fp4-distill[+]nvfp4"),
        ("fp4-fast+bf16", "Use fp4-distill[+]bf16"),
        ("fp4-fast+svdq-int4", "has 'svdq-int4', which fp4-fast leaves to the device. Use fp4-distill[+]svdq-int4"),
        ("bf16+svdq-int4", "runs the published weights; svdq-int4 .* Use fp4[+]svdq-int4 or fp4-distill[+]svdq-int4"),
        ("fp32+svdq-nvfp4+steps4", "Use fp4[+]svdq-nvfp4 or fp4-distill[+]svdq-nvfp4"),
        ("fp4+svdq-fp4", "did you mean 'svdq-nvfp4'"),
        ("fp4-distill+svdq-int4+nvfp4", "has both 'svdq-int4' and 'nvfp4'"),
        ("fp4-fast+int8-attention", "Use fp4-distill[+]int8-attention"),
        ("fp4-fast+bf16-vae", "Use fp4-distill[+]bf16-vae"),
        ("fp4-fast+steps4+fp16-vae+unipc", "Use fp4-distill[+]fp16-vae[+]unipc[+]steps4"),
        ("fp4-fst+steps4", "did you mean 'fp4-fast[+]steps4'"),
        ("bf16+steps0", "steps1 to steps100"),
        ("bf16+steps101", "steps1 to steps100"),
        ("bf16+shift0", "above 0"),
        ("bf16+shift1e3", "unknown modifier"),
        ("bf16+shift1000", "at most 100"),
        ("bf16+shift\u0663", "unknown modifier"),  # a digit, but none of ours
    ],
)
def test_invalid_recipe_name_is_refused_with_reason(name, said):
    with pytest.raises(ConfigInvalid, match=said) as caught:
        get_recipe(name)
    assert caught.value.exit_code == 2


def test_recipe_fingerprint_depends_on_frames_and_not_on_spelling():
    """A job's own steps are among its options, and an alias renders the same frames."""
    assert get_recipe("fp4-distill+euler+shift5").effective() == get_recipe("fp4-distill").effective()
    assert get_recipe("fp4-distill+steps4").effective() == get_recipe("fp4-distill").effective()
    for word in ("fp8", "unipc", "dpmpp", "res2s", "diffusers-grid", "beta57", "shift3"):
        assert get_recipe(f"fp4-distill+{word}").effective() != get_recipe("fp4-distill").effective()
    later = introduced_defaults(Recipe, RECIPE_KEYS)
    assert set(get_recipe("bf16").as_dict()) - set(get_recipe("bf16").effective()) == {"name", "steps", *later}
