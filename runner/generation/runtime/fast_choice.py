"""Fast choice: choose the precision of products, attention and autoencoder for `fp4-fast` on a device.

In:   the recipe, a GPU's compute capability, its known speed, results of self-tests. Out: the recipe as it runs.
Never: a choice that failed its self-test. The fingerprint has the requested recipe, not the choice.

Each part is chosen on its own, best first, and falls back on its own:

    products       the precision advised for the GPU, then the other 8-bit precision, then the recipe's own. The backend
                   is tested before the memory is planned, the layers when they are loaded
    attention      in 8 bits if that is faster than the exact backend and passes its trial, else exact
    autoencoder    in 16 bits, unless torch does not use cuDNN for 3D convolutions in 16 bits

On a CPU nothing is faster: `fp4-fast` runs there as fp4-distill does, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from runner.errors import ConfigInvalid
from runner.forecast.precisions import Capability, fastest_first
from runner.forecast.seconds import DEVICES, DeviceSpeed, find_device
from runner.spec.recipes import EIGHT_BIT_ATTENTION, EXACT_ATTENTION, Recipe

if TYPE_CHECKING:
    import torch

__all__ = [
    "Applied",
    "FastChoice",
    "FastOrder",
    "attention_fallbacks",
    "choice_words",
    "choose",
    "fallbacks",
    "foresee",
    "foresee_any",
    "order_choices",
    "probe_choice",
    "try_each",
]

HALF: Final = "bfloat16"  # of the autoencoder; loading.py takes float16, of as many bytes, if the weights allow it
# Major capabilities with exact attention kernels of their own. 8-bit attention would use kernels with the older
# instructions (mma.sync) there, for which no rate is published.
EXACT_LEADS = (9, 10, 11)
LEAST = (8, 0)  # older GPUs have no units for bfloat16 or for the 8-bit kernels


@dataclass(frozen=True)
class FastOrder:
    """The candidates for each part of a recipe, best first. The last one of each part always works.

    `compute`: names of `PRECISIONS`. `eight_bit_attention`: try it. `why`: part → the reason, for the record.
    """

    recipe: Recipe
    compute: tuple[str, ...]
    eight_bit_attention: bool
    half_vae: bool
    why: Mapping[str, str]


@dataclass(frozen=True)
class FastChoice:
    """The recipe as it runs, and why. `vae_dtype`: of the autoencoder, once it is loaded."""

    running: Recipe
    why: Mapping[str, str]
    vae_dtype: str = ""

    def with_loaded(self, loaded: Mapping[str, Any]) -> FastChoice:
        """Return the choice after `loading.tune`, whose `loaded` has `compute`, `attention` and `vae` after the
        self-tests of the layers, and the reasons for refused candidates."""
        running = replace(self.running, compute=loaded["compute"], attention=loaded["attention"])
        more = {part: text for part, text in loaded["why"].items() if text and text not in self.why[part]}
        why = {part: f"{text}; {more[part]}" if part in more else text for part, text in self.why.items()}
        return FastChoice(running, why, loaded["vae"])

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        vae = self.vae_dtype or self.running.vae_dtype
        return {
            "asked": self.running.choice,
            "compute": self.running.compute,
            "attention": self.running.attention,
            "vae": vae,
            "why": dict(self.why),
        }


def order_choices(
    recipe: Recipe, capability: Capability | None, speed: DeviceSpeed | None = None, cudnn_problem: str | None = None
) -> FastOrder:
    """Return the candidates on a GPU of this capability (None: a CPU). Pure.

    `speed`: the known rates of the GPU. `cudnn_problem`: see `device.cudnn_problem`.
    """
    if capability is None:
        text = "no GPU: nothing is faster here than the recipe's own precision"
        return FastOrder(recipe, (recipe.compute,), False, False, dict.fromkeys(("compute", "attention", "vae"), text))
    compute = fastest_first(capability)
    architecture = f"sm_{capability[0]}{capability[1]}"
    eight_bit, attention_why = _attention(capability, speed, architecture)
    half, vae_why = _autoencoder(capability, cudnn_problem, architecture)
    some = len(compute) > 1
    fastest = f"{compute[0]} is the fastest on {architecture}" if some else f"no 8-bit products on {architecture}"
    why = {
        "compute": fastest,
        "attention": attention_why,
        "vae": vae_why,
    }
    return FastOrder(recipe, compute, eight_bit, half, why)


def _attention(capability: Capability, speed: DeviceSpeed | None, architecture: str) -> tuple[bool, str]:
    if capability < LEAST:
        return False, f"no 8-bit kernels for {architecture}"
    if capability[0] in EXACT_LEADS:
        return False, f"exact: no 8-bit kernel that runs on {architecture} is known to be faster than its exact ones"
    if speed is None:
        return True, f"8 bits are faster than the exact kernels on GPUs like {architecture}"
    eight_bit, exact = speed.attention_8bit, speed.attention
    if eight_bit is None or eight_bit <= exact:
        return False, f"exact: nothing in 8 bits is known to be faster on {speed.name}"
    return True, f"8 bits: {eight_bit:g} TFLOP/s on {speed.name}, exact {exact:g}, both published"


def _autoencoder(capability: Capability, cudnn_problem: str | None, architecture: str) -> tuple[bool, str]:
    if capability < LEAST:
        return False, f"float32: no units for bfloat16 on {architecture}"
    if cudnn_problem is not None:
        return False, f"float32: {cudnn_problem}"
    return True, "16 bits"


def choose(
    order: FastOrder, gemm_problem: Callable[[str], str | None], attention_problem: Callable[[], str | None]
) -> FastChoice:
    """Choose the first candidate of each part without a problem; keep the problems of those before it as reasons.

    `gemm_problem`: precision → why no backend computes it right here, or None. `attention_problem`: the same for
    8-bit attention. Neither is called for a candidate that always works.
    """
    why, refused, compute = dict(order.why), list[str](), order.compute[-1]
    for name in order.compute[:-1]:
        problem = gemm_problem(name)
        if problem is None:
            compute = name
            break
        refused.append(f"{name} refused: {problem}")
    why["compute"] = "; ".join([why["compute"], *refused])
    running = replace(order.recipe, compute=compute)
    if order.half_vae:
        running = replace(running, vae_dtype=HALF)
    if order.eight_bit_attention:
        problem = attention_problem()
        if problem is None:
            running = replace(running, attention=EIGHT_BIT_ATTENTION)
        else:
            why["attention"] += f"; refused, exact instead: {problem}"
    return FastChoice(running, why)


def probe_choice(recipe: Recipe, device: torch.device, heads: int, head_dim: int) -> FastChoice:
    """Choose what passes the tests without weights on `device`, for a transformer of `heads` heads."""
    import torch

    from runner.generation.runtime.attention import pick_backend
    from runner.generation.runtime.compute import capability_of
    from runner.generation.runtime.device import cudnn_problem, device_name
    from runner.quantization.kernels.low_bit import pick_gemm_backend

    def gemm_problem(compute: str) -> str | None:
        name, why = pick_gemm_backend(device, compute)
        return why if name is None else None

    def attention_problem() -> str | None:
        try:
            pick_backend(device, getattr(torch, recipe.dtype), heads, head_dim, eight_bit=True)
        except ConfigInvalid as err:
            return err.what
        return None

    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    order = order_choices(recipe, capability_of(device), find_device(device_name(device)), cudnn_problem(cudnn))
    return choose(order, gemm_problem, attention_problem)


def fallbacks(running: Recipe, capability: Capability | None) -> tuple[Recipe, ...]:
    """Return `running` and, for a fast choice, the recipes with slower products to try if layers fail their test."""
    if not running.choice:
        return (running,)
    names = fastest_first(capability)
    after = names[names.index(running.compute) :] if running.compute in names else (running.compute,)
    return tuple(replace(running, compute=name) for name in after)


def attention_fallbacks(running: Recipe) -> tuple[Recipe, ...]:
    """Return `running` and, for a fast choice with 8-bit attention, the recipe with exact attention."""
    if not running.choice or not running.eight_bit_attention:
        return (running,)
    return running, replace(running, attention=EXACT_ATTENTION)


@dataclass(frozen=True)
class Applied:
    """The result of `try_each`. `refused`: why the recipes before `recipe` were not taken; empty for the first one."""

    recipe: Recipe
    report: Mapping[str, Any]  # what `apply` returned
    refused: str


def try_each(recipes: Sequence[Recipe], apply: Callable[[Recipe], Mapping[str, Any]]) -> Applied:
    """Apply the first of `recipes` (at least one) for which `apply` does not raise ConfigInvalid.

    Raises what `apply` raises for the last one.
    """
    refused: list[str] = []
    for recipe in recipes[:-1]:
        try:
            return Applied(recipe, apply(recipe), "; ".join(refused))
        except ConfigInvalid as err:
            refused.append(f"refused when the model was loaded: {err.what}")
    return Applied(recipes[-1], apply(recipes[-1]), "; ".join(refused))


def foresee(recipe: Recipe, speed: DeviceSpeed | None) -> Recipe:
    """Return `recipe` as it runs on a known GPU if all self-tests pass there. For forecasts.

    A recipe without a choice is returned unchanged, also if `speed` is None.
    """
    if not recipe.choice or speed is None:
        return recipe
    order = order_choices(recipe, speed.capability, speed)
    return choose(order, lambda _: None, lambda: None).running


def foresee_any(recipe: Recipe) -> tuple[Recipe, ...]:
    """Return `recipe`, and how it would run on each known GPU, without repetitions."""
    return tuple(dict.fromkeys([recipe, *(foresee(recipe, speed) for speed in DEVICES)]))


def choice_words(running: Recipe) -> str:
    """Return words such as `int8 products, 8-bit attention, autoencoder in 16 bits`."""
    attention = "8-bit" if running.eight_bit_attention else "exact"
    vae = "float32" if running.vae_dtype == "float32" else "16 bits"
    return f"{running.compute} products, {attention} attention, autoencoder in {vae}"
