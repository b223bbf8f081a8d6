from __future__ import annotations

from dataclasses import replace

import pytest

from runner.errors import ConfigInvalid
from runner.forecast.precisions import PRECISIONS, fastest_first
from runner.forecast.seconds import DEVICES, find_device
from runner.generation.runtime.fast_choice import (
    attention_fallbacks,
    choice_words,
    choose,
    fallbacks,
    foresee,
    foresee_any,
    order_choices,
    try_each,
)
from runner.generation.segments import plan_job
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe

FAST, DISTILL = get_recipe("fp4-fast"), get_recipe("fp4-distill")


def right(*_: str) -> None:
    """Nothing is wrong with what is tried."""


@pytest.mark.parametrize(
    ("capability", "gpu", "compute", "eight_bit", "half_vae"),
    [
        ((7, 5), None, ("bf16",), False, False),
        ((8, 0), "A100", ("int8", "bf16"), True, True),
        ((8, 6), None, ("int8", "bf16"), True, True),
        ((8, 9), "RTX 4090", ("int8", "fp8", "bf16"), True, True),
        ((8, 9), "L40S", ("int8", "fp8", "bf16"), True, True),
        ((9, 0), "H200", ("fp8", "int8", "bf16"), False, True),
        ((9, 0), None, ("fp8", "int8", "bf16"), False, True),
        ((10, 0), None, ("fp8", "bf16"), False, True),
        ((12, 0), "RTX 5090", ("int8", "fp8", "bf16"), True, True),
        ((12, 0), None, ("int8", "fp8", "bf16"), True, True),
        (None, None, ("bf16",), False, False),
    ],
)
def test_order_choices_on_each_architecture_gives_expected_order(capability, gpu, compute, eight_bit, half_vae):
    """The best choice comes first. sm_90 has no 8-bit attention, because those kernels are for older units."""
    order = order_choices(FAST, capability, find_device(gpu))
    assert (order.compute, order.eight_bit_attention, order.half_vae) == (compute, eight_bit, half_vae)
    assert order.why.keys() == {"compute", "attention", "vae"} and all(order.why.values())


def test_fastest_first_leaves_out_precisions_with_visible_error():
    visible = {row.name for row in PRECISIONS.values() if row.visible}
    assert visible == {"nvfp4", "svdq-int4", "svdq-nvfp4"}
    capabilities = [None, *((major, minor) for major in range(7, 13) for minor in (0, 3, 6, 9))]
    assert not visible & {name for capability in capabilities for name in fastest_first(capability)}


def test_order_choices_without_faster_8_bit_attention_keeps_exact_attention():
    gpu = find_device("A100")
    assert gpu is not None
    slower = replace(gpu, attention_8bit=gpu.attention)
    for speed in (slower, replace(gpu, attention_8bit=None)):
        order = order_choices(FAST, (8, 0), speed)
        assert not order.eight_bit_attention and "nothing in 8 bits" in order.why["attention"]


def test_choose_without_16_bit_convolutions_keeps_autoencoder_in_float32():
    order = order_choices(FAST, (12, 0), None, "cuDNN 9.10 is avoided")
    assert choose(order, right, right).running.vae_dtype == "float32"
    assert order.why["vae"] == "float32: cuDNN 9.10 is avoided"


def test_choose_with_failed_part_falls_back_for_that_part_only():
    order = order_choices(FAST, (12, 0))
    all_right = choose(order, right, right)
    assert all_right.as_dict() | {"why": {}} == {
        "asked": "fast", "compute": "int8", "attention": "int8", "vae": "bfloat16", "why": {},
    }  # fmt: skip

    broken = {"int8": "off by 0.5"}
    one = choose(order, broken.get, right)
    assert (one.running.compute, one.running.attention, one.running.vae_dtype) == ("fp8", "int8", "bfloat16")
    assert one.why["compute"].endswith("int8 refused: off by 0.5")
    none = choose(order, lambda name: f"no {name} here", right)
    assert (none.running.compute, none.running.attention) == ("bf16", "int8")
    assert none.why["compute"].endswith("int8 refused: no int8 here; fp8 refused: no fp8 here")

    exact = choose(order, right, lambda: "comfy-kitchen is not installed")
    assert (exact.running.compute, exact.running.attention) == ("int8", "exact")
    assert exact.why["attention"].endswith("refused, exact instead: comfy-kitchen is not installed")


def test_choose_without_faster_choice_makes_no_trial():
    def fail(*_: str) -> None:
        raise AssertionError("tried")

    assert choose(order_choices(FAST, None), fail, fail).running == FAST
    assert choose(order_choices(FAST, (7, 5)), fail, fail).running == FAST


def test_fast_recipe_fingerprint_does_not_depend_on_device_choice():
    chosen = {speed.name: foresee(FAST, speed) for speed in DEVICES}
    assert chosen["H200"] != chosen["RTX 5090"]
    assert {recipe.name for recipe in chosen.values()} == {"fp4-fast"}
    assert FAST.effective() == {**DISTILL.effective(), "choice": "fast"}


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ("RTX 5090", "int8 products, 8-bit attention, autoencoder in 16 bits"),
        ("H200", "fp8 products, exact attention, autoencoder in 16 bits"),
    ],
)
def test_foresee_returns_choice_of_named_gpu(gpu, words):
    assert choice_words(foresee(FAST, find_device(gpu))) == words
    assert foresee(DISTILL, find_device(gpu)) == DISTILL
    assert foresee(FAST, None) == FAST
    assert foresee(FAST, find_device(gpu)) in foresee_any(FAST) and FAST in foresee_any(FAST)
    assert foresee_any(DISTILL) == (DISTILL,)


@pytest.mark.parametrize(("gpu", "most", "gain"), [("RTX 5090", 31, 1.9), ("H200", 18, 1.15), ("RTX 4090", 41, 2)])
def test_plan_job_with_foreseen_choice_is_faster_than_distill(gpu, most, gain):
    """Forecasts for 832x480, 81 frames, six steps: seconds, and the speed-up over fp4-distill."""
    speed = find_device(gpu)

    def seconds(recipe) -> float:
        found = plan_job(81, (832, 480), JobOptions(), recipe, device=speed).seconds
        assert found is not None
        return found

    assert seconds(foresee(FAST, speed)) < min(most, seconds(DISTILL) / gain)


def test_fallbacks_contain_only_slower_products():
    running = choose(order_choices(FAST, (9, 0)), right, right).running
    assert [recipe.compute for recipe in fallbacks(running, (9, 0))] == ["fp8", "int8", "bf16"]
    assert [recipe.compute for recipe in fallbacks(replace(running, compute="int8"), (9, 0))] == ["int8", "bf16"]
    assert fallbacks(DISTILL, (9, 0)) == (DISTILL,)
    named = get_recipe("fp4-distill+fp8+int8-attention")
    assert fallbacks(named, (9, 0)) == attention_fallbacks(named) == (named,)
    assert [r.attention for r in attention_fallbacks(replace(running, attention="int8"))] == ["int8", "exact"]


def test_try_each_raises_for_named_precision_and_falls_back_for_chosen_one():
    def apply(recipe):
        if recipe.compute != "bf16":
            raise ConfigInvalid(f"{recipe.compute} is not right")
        return {"compute": recipe.compute}

    with pytest.raises(ConfigInvalid, match="fp8 is not right"):
        try_each(fallbacks(get_recipe("fp4-distill+fp8"), (9, 0)), apply)
    running = choose(order_choices(FAST, (9, 0)), right, right).running
    applied = try_each(fallbacks(running, (9, 0)), apply)
    assert applied.recipe.compute == applied.report["compute"] == "bf16"
    assert applied.refused == (
        "refused when the model was loaded: fp8 is not right; refused when the model was loaded: int8 is not right"
    )


def test_with_loaded_replaces_choice_by_loaded_values():
    choice = choose(order_choices(FAST, (12, 0)), {"fp8": "broken"}.get, right)
    why = {"compute": "refused when the model was loaded: int8 is off", "attention": "", "vae": "no overflow"}
    settled = choice.with_loaded({"compute": "bf16", "attention": "exact", "vae": "float16", "why": why})
    assert (settled.running.compute, settled.running.attention) == ("bf16", "exact")
    chosen = settled.as_dict()
    assert (chosen["compute"], chosen["attention"], chosen["vae"]) == ("bf16", "exact", "float16")
    assert chosen["why"]["compute"] == f"{choice.why['compute']}; {why['compute']}"
    assert chosen["why"]["attention"] == choice.why["attention"] and chosen["why"]["vae"] == "16 bits; no overflow"
    assert settled.with_loaded(chosen).as_dict() == chosen  # loaded anew, in another memory mode: each reason once
