"""`fp4-fast` on the tiny model: on the CPU fp4-distill's bits; with a GPU's choice forced on the CPU, where the 8-bit
products run as the definition of their numbers; and every way to fall back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runner.errors import ConfigInvalid
from runner.forecast.flops import PRODUCTION
from runner.forecast.seconds import find_device
from runner.generation.families import EngineSettings
from runner.generation.runtime import attention, compute, fast_choice
from runner.generation.wan_animate import half_choice, loading
from runner.generation.wan_animate.generator import WanAnimateGenerator
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
from runner.weights.resolved import resolve_recipe
from runner.weights.store import ModelStore
from tests.generation.fp4_stores import MemoryPreprocessor, psnr, rendered, write_own, write_source

HOPPER, BLACKWELL = (9, 0), (12, 0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_onnx(monkeypatch) -> None:
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)


@pytest.fixture(scope="module")
def store(tiny_store_dir, tmp_path_factory) -> Path:
    source = write_source(tmp_path_factory.mktemp("source") / "models", tiny_store_dir)
    return write_own(tmp_path_factory.mktemp("own") / "models", source)


@pytest.fixture(scope="module")
def distilled(store) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)
        return rendered(load(store, "fp4-distill"))


def load(root: Path, recipe: str = "fp4-fast", memory: str = "resident") -> WanAnimateGenerator:
    models = resolve_recipe(ModelStore(root), get_recipe(recipe))
    return WanAnimateGenerator.load(models, EngineSettings(device="cpu", memory=memory))


def force(monkeypatch, capability: tuple[int, int]) -> None:
    """The choice of a GPU of this capability, though the CPU computes."""
    monkeypatch.setattr(compute, "capability_of", lambda _: capability)
    monkeypatch.setattr(loading, "capability_of", lambda _: capability)


def test_fast_recipe_on_cpu_equals_distilled_recipe(store, distilled):
    generator = load(store)
    assert np.array_equal(rendered(generator), distilled)
    said = generator.description
    assert said["recipe"]["name"] == "fp4-fast" and said["recipe"]["choice"] == "fast"
    assert (said["compute"], said["choice"]["compute"]) == ("bf16", "bf16")
    assert (said["choice"]["attention"], said["choice"]["vae"]) == ("exact", "float32")
    assert all("nothing is faster here" in why for why in said["choice"]["why"].values())
    assert "choice" not in load(store, "fp4-distill").description


def test_fast_recipe_with_forced_choice_renders_and_is_described(store, distilled, monkeypatch):
    force(monkeypatch, HOPPER)
    generator = load(store)
    frames = rendered(generator)
    assert not np.array_equal(frames, distilled)
    assert psnr(frames, distilled) > 30
    said = generator.description
    assert said["recipe"]["compute"] == "bf16" and generator.recipe.name == "fp4-fast"  # as it was asked for
    assert (said["compute"], said["compute_product"]) == ("fp8", "reference")
    chosen = said["choice"]
    assert (chosen["asked"], chosen["compute"], chosen["attention"], chosen["vae"]) == (
        "fast", "fp8", "exact", "float16",
    )  # fmt: skip
    assert chosen["why"]["compute"] == "fp8 is the fastest on sm_90"
    assert "a sixteenth of float16's range" in chosen["why"]["vae"]
    assert said["memory"]["vae_dtype"] == "float16" and generator.memory.vae_dtype == "float16"
    identity = generator.resume_identity
    assert identity["compute"].startswith("fp8, reference") and identity["autoencoder"].startswith("float16")


def test_fast_recipe_with_overflow_in_float16_takes_bfloat16_autoencoder(store, monkeypatch):
    force(monkeypatch, HOPPER)
    monkeypatch.setattr(half_choice, "largest_activation", lambda vae: 70_000.0)
    said = load(store).description
    assert said["choice"]["vae"] == said["memory"]["vae_dtype"] == "bfloat16"
    assert "7e+04, beyond" in said["choice"]["why"]["vae"]


def test_fast_recipe_forecasts_equal_chosen_recipe(store, monkeypatch):
    job = JobOptions(size="832x480")
    plain = load(store, "fp4-distill")
    force(monkeypatch, HOPPER)
    fast = load(store)
    for generator in (plain, fast):
        generator.costs, generator.speed = PRODUCTION, find_device("H200")
    seconds = {name: g.plan(81, (832, 480), job).seconds for name, g in (("plain", plain), ("fast", fast))}
    named = load(store, "fp4-distill+fp8+bf16-vae")
    named.costs, named.speed = PRODUCTION, find_device("H200")
    assert seconds["fast"] == named.plan(81, (832, 480), job).seconds < seconds["plain"]
    plan = fast.plan(81, (832, 480), job)
    assert fast.forecast(plan, job) == named.forecast(plan, job) != plain.forecast(plan, job)


def test_fast_recipe_identity_does_not_depend_on_device(store, monkeypatch):
    plain = load(store, "fp4-distill").identity
    found = []
    for capability in (HOPPER, BLACKWELL):
        force(monkeypatch, capability)
        generator = load(store)
        found.append((generator.description["choice"]["compute"], generator.identity, generator.recipe.effective()))
    assert [compute for compute, _, _ in found] == ["fp8", "int8"]
    assert found[0][1:] == found[1][1:] == (plain, get_recipe("fp4-fast").effective())


def test_resume_identity_of_fast_recipe_differs_with_choice(store, monkeypatch):
    force(monkeypatch, HOPPER)
    first, again = load(store).resume_identity, load(store).resume_identity
    force(monkeypatch, BLACKWELL)
    other = load(store).resume_identity
    assert first == again and {name for name in first if first[name] != other[name]} == {"compute"}


def test_fast_recipe_with_refused_product_takes_next(store, monkeypatch):
    from runner.quantization.kernels import low_bit

    force(monkeypatch, HOPPER)
    pick = low_bit.pick_gemm_backend
    monkeypatch.setattr(
        low_bit,
        "pick_gemm_backend",
        lambda device, name: (None, "no such kernel") if name == "fp8" else pick(device, name),
    )
    said = load(store).description
    assert said["compute"] == said["choice"]["compute"] == "int8"
    assert said["choice"]["why"]["compute"].endswith("fp8 refused: no such kernel")
    with pytest.raises(ConfigInvalid, match="precision 'fp8' was asked for, but no backend here computes it right"):
        load(store, "fp4-distill+fp8")


def wrong_on_one_layer(monkeypatch, *precisions: str) -> None:
    """The layers' self-test finds twice the right result on the feed-forward part's second layer."""
    by = compute._run_with

    def wrong(layer: Any, x: torch.Tensor, name: str, product: str) -> torch.Tensor:
        found = by(layer, x, name, product)
        return 2 * found if name in precisions and layer.in_features > layer.out_features else found

    monkeypatch.setattr(compute, "_run_with", wrong)


@pytest.mark.parametrize(
    ("wrong", "left"), [(("fp8",), "int8"), (("fp8", "int8"), "bf16")], ids=["then int8", "then 16 bits"]
)
def test_fast_recipe_with_failed_self_test_of_layer_takes_next_product(store, distilled, monkeypatch, wrong, left):
    force(monkeypatch, HOPPER)
    wrong_on_one_layer(monkeypatch, *wrong)
    generator = load(store)
    said = generator.description
    assert said["compute"] == said["choice"]["compute"] == generator.running.compute == left
    assert said["choice"]["why"]["compute"].count("refused when the model was loaded: precision 'fp8'") == 1
    assert "ffn.net.2" in said["choice"]["why"]["compute"]
    assert psnr(rendered(generator), distilled) > 30
    with pytest.raises(ConfigInvalid, match="is not right on cpu"):
        load(store, "fp4-distill+fp8")


def test_layers_after_fallback_to_16_bits_compute_exactly(store, distilled, monkeypatch):
    """The trial leaves no change on the layers: with the autoencoder in float32 the bits are those of fp4-distill."""
    force(monkeypatch, HOPPER)
    wrong_on_one_layer(monkeypatch, "fp8", "int8")
    monkeypatch.setattr(fast_choice, "_autoencoder", lambda *_: (False, "float32"))
    assert np.array_equal(rendered(load(store)), distilled)


def test_fast_recipe_without_8_bit_attention_backend_is_exact(store, distilled, monkeypatch):
    force(monkeypatch, BLACKWELL)
    generator = load(store)  # the CPU has none
    said = generator.description
    assert (said["choice"]["compute"], said["choice"]["attention"], said["attention"]) == ("int8", "exact", "native")
    assert "refused, exact instead: 8-bit attention needs a CUDA device" in said["choice"]["why"]["attention"]
    assert psnr(rendered(generator), distilled) > 30


def eight_bit_attention(monkeypatch, *answers: str | None) -> None:
    """Each time when 8 bits are asked for: they are there (None), or why not."""
    pick, left = attention.pick_backend, list(answers)

    def picked(*shape: Any, eight_bit: bool = False) -> tuple[str, str, float]:
        if not eight_bit:
            return pick(*shape)
        problem = left.pop(0)
        if problem is not None:
            raise ConfigInvalid(problem)
        return "native", "as if in 8 bits", 0.03

    monkeypatch.setattr(attention, "pick_backend", picked)


def test_fast_recipe_with_passed_attention_trial_runs_in_8_bits(store, monkeypatch):
    force(monkeypatch, BLACKWELL)
    eight_bit_attention(monkeypatch, None, None)
    generator = load(store)
    said = generator.description
    assert (said["choice"]["attention"], said["attention_why"]) == ("int8", "as if in 8 bits")
    assert generator.running.eight_bit_attention


@pytest.mark.parametrize("answers", [("error 0.0900, 0.06 allowed",), (None, "error 0.0900, 0.06 allowed")])
def test_fast_recipe_with_attention_above_limit_is_exact(store, monkeypatch, answers):
    """The trial fails before the memory is planned, or only after the model is loaded."""
    force(monkeypatch, BLACKWELL)
    eight_bit_attention(monkeypatch, *answers)
    generator = load(store)
    said = generator.description
    assert (said["choice"]["attention"], generator.running.eight_bit_attention) == ("exact", False)
    assert "error 0.0900, 0.06 allowed" in said["choice"]["why"]["attention"]
    assert said["attention"] == "native" and said["attention_error"] < 0.01


def test_fast_recipe_in_lower_memory_mode_keeps_choice(store, distilled, monkeypatch):
    """The choice stays even if a second trial would give another one: frames do not depend on the memory mode."""
    force(monkeypatch, HOPPER)
    with monkeypatch.context() as patch:
        wrong_on_one_layer(patch, "fp8")
        generator = load(store)
    assert generator.running.compute == "int8"
    assert generator.fall_back_memory_mode() and generator.memory.mode == "resident"  # without kept codes
    assert generator.fall_back_memory_mode()
    said = generator.description
    assert (said["memory"]["mode"], said["memory"]["vae_dtype"]) == ("stream", "float16")
    assert said["compute"] == said["choice"]["compute"] == generator.running.compute == "int8"
    assert "precision 'fp8'" in said["choice"]["why"]["compute"]
    assert psnr(rendered(generator), distilled) > 30


def test_memory_plan_of_fast_recipe_covers_fallbacks(monkeypatch):
    running = fast_choice.foresee(get_recipe("fp4-fast"), find_device("H200"))
    recipes = fast_choice.fallbacks(running, HOPPER)
    assert [recipe.compute for recipe in recipes] == ["fp8", "int8", "bf16"]
    # Codes of activations and weights take room, in 8 bits of either kind as much.
    assert loading._largest(recipes[::-1], PRODUCTION, True).compute == "int8"
    assert loading._largest(recipes, PRODUCTION, True).compute == "fp8"
    assert loading._largest(recipes[2:], PRODUCTION, True).compute == "bf16"
