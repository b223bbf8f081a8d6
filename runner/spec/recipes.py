"""Recipes: named, frozen choices of weights, precision, sampler and steps. A run has one recipe for all its jobs.

In:   a recipe's name and its modifiers, each after a plus sign, in any order. Out: `Recipe`, plain data for the record.
Never: paths, devices, tensors. A dtype is a name here; `wan_animate` maps it to torch's.

    fp4-distill+fp8                   GEMM precision: bf16, fp8, int8, nvfp4; or svdq-int4, svdq-nvfp4, for weights
                                      that are stored in that format
    fp4-distill+int8-attention        8-bit self-attention on a GPU, by comfy-kitchen or SageAttention
    fp4-distill+bf16-vae              the autoencoder in bfloat16, not float32: faster, within rounding; or fp16-vae
    fp4-distill+unipc+steps4          the sampler: euler, unipc, dpmpp, res2s; the denoising steps of jobs that set none
    fp4-distill+beta57                sigma schedule: official-grid, diffusers-grid, beta57; and shift3 (or shift2.5)

`fp4-fast` leaves the first three to the device and refuses a modifier for one of them. The choice for each device, and
its reasons, are in `generation/runtime/fast_choice.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

from runner.errors import ConfigInvalid
from runner.forecast.precisions import DEFAULT_PRECISION, PRECISIONS
from runner.spec.field_marks import HashedAs, Introduced, NotHashed

__all__ = [
    "DEFAULT_RECIPE",
    "EIGHT_BIT_ATTENTION",
    "EXACT_ATTENTION",
    "FAST_RECIPE",
    "MEMORY_CHOICES",
    "MODES",
    "RECIPES",
    "SAMPLER_ROWS",
    "SCHEDULE_MODIFIERS",
    "MemoryChoice",
    "Mode",
    "Recipe",
    "SamplerRow",
    "VaeDtype",
    "get_recipe",
]


Mode = Literal["resident", "stream", "minimal"]  # where weights are kept during a run; the first needs the most memory
MODES: tuple[Mode, ...] = get_args(Mode)
MemoryChoice = Literal["auto", Mode]  # values of --memory
MEMORY_CHOICES: tuple[MemoryChoice, ...] = get_args(MemoryChoice)


EXACT_ATTENTION: Final = "exact"
EIGHT_BIT_ATTENTION: Final = "int8"
VaeDtype = Literal["float16", "bfloat16", "float32"]  # of the autoencoder


@dataclass(frozen=True)
class Recipe:
    """How a run renders. Where its weights are kept and the device are not part of a recipe.

    A new field is marked with the default that it was introduced with: `Annotated[str, Introduced("x")]`, see
    `field_marks.py`.
    """

    name: Annotated[str, NotHashed()]
    steps: Annotated[int, NotHashed()]  # denoising steps of jobs that set none
    scheduler: str  # the sampler: a name in SAMPLER_ROWS
    schedule: Annotated[str, HashedAs("grid")]  # of sigmas: in SCHEDULE_MODIFIERS, one that the sampler accepts
    shift: float  # of the sigma schedule
    dtype: Literal["bfloat16", "float32"]  # transformer and encoders
    vae_dtype: VaeDtype
    weights: str  # folder of the components in the model store
    summary: Annotated[str, NotHashed()]
    fp4: bool = False  # the transformer's linears in four bits; variant.py finds the file
    distilled: bool = False  # with the step-distillation LoRA, merged into the file or kept beside it
    compute: str = DEFAULT_PRECISION  # GEMM precision of the transformer; `bf16` stands for `dtype`
    attention: Literal["exact", "int8"] = EXACT_ATTENTION  # of the transformer's self-attention
    family: Annotated[str, Introduced("wan-animate")] = "wan-animate"  # the model, a row of generation/families.py
    # How `compute`, `attention` and `vae_dtype` are chosen. "": by the recipe. "fast": by the device, among what passes
    # its self-tests there; these three fields are then the fallback where nothing faster passes.
    choice: Annotated[Literal["", "fast"], Introduced("")] = ""

    @property
    def eight_bit_attention(self) -> bool:
        return self.attention != EXACT_ATTENTION

    def as_dict(self) -> dict[str, object]:
        """All fields but the summary, for the record. `schedule` has the key `grid` there, as in version 0.1.0."""
        fields = {"grid" if key == "schedule" else key: value for key, value in asdict(self).items()}
        del fields["summary"]
        return fields

    def effective(self) -> dict[str, object]:
        """Return the fields that decide the frames, for the fingerprint. Steps are hashed among the job's options."""
        from runner.spec.hashed_fields import RECIPE_KEYS, hashed_values  # pydantic is slow to import, for `--help`

        return hashed_values(self, RECIPE_KEYS)


@dataclass(frozen=True)
class SamplerRow:
    """A sampler's modifier in a recipe's name, and the sigma schedules that it accepts.

    `generation/sampling.py` has its arithmetic and its cost, under the same name.
    """

    modifier: str
    schedules: tuple[str, ...]


SCHEDULE_MODIFIERS: Mapping[str, str] = MappingProxyType(  # sigma schedule -> its modifier in a recipe's name
    {"official": "official-grid", "diffusers": "diffusers-grid", "beta57": "beta57"}
)
SAMPLER_ROWS: Mapping[str, SamplerRow] = MappingProxyType(
    {
        "euler": SamplerRow("euler", ("official", "diffusers", "beta57")),
        "unipc": SamplerRow("unipc", ("official", "beta57")),
        "dpmpp": SamplerRow("dpmpp", ("official", "beta57")),
        "res_2s": SamplerRow("res2s", ("official", "beta57")),
    }
)


SOURCE_WEIGHTS = "Wan2.2-Animate-14B-Diffusers"

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe(
                "fp4-distill", 6, "euler", "official", 5.0, "bfloat16", "float32", SOURCE_WEIGHTS,
                "FP4 weights with the step-distillation LoRA: 6 Euler steps", fp4=True, distilled=True,
            ),
            Recipe(
                "fp4-fast", 6, "euler", "official", 5.0, "bfloat16", "float32", SOURCE_WEIGHTS,
                "as fp4-distill, with the fastest products, attention and autoencoder that pass their self-tests",
                fp4=True, distilled=True, choice="fast",
            ),
            Recipe(
                "fp4", 20, "unipc", "official", 5.0, "bfloat16", "float32", SOURCE_WEIGHTS,
                "FP4 weights, 20 UniPC steps", fp4=True,
            ),
            Recipe(
                "bf16", 20, "unipc", "official", 5.0, "bfloat16", "float32", SOURCE_WEIGHTS,
                "the published weights in bfloat16, 20 UniPC steps as in the published model; autoencoder in float32",
            ),
            Recipe(
                "fp32", 20, "unipc", "official", 5.0, "float32", "float32", SOURCE_WEIGHTS,
                "as bf16, but in float32: twice the memory, for comparisons and for machines without a GPU",
            ),
        )
    }
)  # fmt: skip
DEFAULT_RECIPE = "fp4-distill"
FAST_RECIPE = "fp4-fast"
CHOSEN = ("compute", "attention", "vae_dtype")  # the fields that `choice` leaves to the device


MOST_STEPS = 100  # as a job's own
MOST_SHIFT = 100.0  # far beyond any use: with it all sigmas but the last lie above 0.95


class Modifier(NamedTuple):
    """One modifier of a recipe: the field that it sets, the value, and its text after the plus sign."""

    field: str
    value: Any
    text: str


FIXED: Mapping[str, Modifier] = MappingProxyType(  # text -> modifier, of those without a number
    {
        modifier.text: modifier
        for modifier in (
            Modifier("attention", EIGHT_BIT_ATTENTION, "int8-attention"),
            Modifier("vae_dtype", "bfloat16", "bf16-vae"),
            Modifier("vae_dtype", "float16", "fp16-vae"),
            *(Modifier("scheduler", sampler, row.modifier) for sampler, row in SAMPLER_ROWS.items()),
            *(Modifier("schedule", schedule, text) for schedule, text in SCHEDULE_MODIFIERS.items()),
        )
    }
)
ORDER = (*CHOSEN, "scheduler", "schedule", "steps", "shift")  # of the modifiers in a recipe's name


def get_recipe(name: str) -> Recipe:
    """Return the recipe called `name`, e.g. `fp4-distill+fp8+steps4`.

    The name of the recipe that is returned is the shortest one: its modifiers are in a fixed order, and those that
    change nothing are left out. Raises ConfigInvalid for an unknown recipe or modifier (with a suggestion), for a
    modifier that is given twice, and for two that contradict each other.
    """
    base, *texts = name.split("+")
    if base not in RECIPES:
        near = difflib.get_close_matches(base, RECIPES, n=1)
        hint = f"; did you mean {'+'.join([*near, *texts])!r}?" if near else ""
        raise ConfigInvalid(
            f"no recipe {name!r}{hint}", todo=f"Recipes: {', '.join(RECIPES)}; after a +: {_list_modifiers()}"
        )
    recipe = RECIPES[base]
    modifiers: dict[str, Modifier] = {}
    for text in texts:
        modifier = _parse_modifier(text, name)
        other = modifiers.get(modifier.field)
        if other is not None:
            clash = f"has {text!r} twice" if other == modifier else f"has both {other.text!r} and {modifier.text!r}"
            raise ConfigInvalid(f"recipe {name!r} {clash}", todo=f"One {modifier.field} is enough: drop one of them")
        modifiers[modifier.field] = modifier
    changed = replace(recipe, **{modifier.field: modifier.value for modifier in modifiers.values()})
    _check(changed, modifiers, name)
    kept = [
        modifiers[field] for field in ORDER if field in modifiers and getattr(recipe, field) != modifiers[field].value
    ]
    if not kept:
        return recipe
    suffix = "+".join(modifier.text for modifier in kept)
    return replace(changed, name=f"{base}+{suffix}", summary=f"{recipe.summary}; changed by {suffix}")


def _fixed_modifiers() -> dict[str, Modifier]:
    """Text → modifier, of those without a number: the GEMM precisions and `FIXED`."""
    return {name: Modifier("compute", name, name) for name in PRECISIONS} | dict(FIXED)


def _list_modifiers() -> str:
    return f"{', '.join(_fixed_modifiers())}, stepsN, shiftX"


def _parse_modifier(text: str, name: str) -> Modifier:
    """Return the modifier `text` of the recipe `name`. Raises ConfigInvalid if it is unknown or its number is out of
    range."""
    if (fixed := _fixed_modifiers().get(text)) is not None:
        return fixed
    if (found := re.fullmatch(r"steps([0-9]{1,9})", text)) is not None:
        steps = int(found[1])
        if 1 <= steps <= MOST_STEPS:
            return Modifier("steps", steps, f"steps{steps}")
        raise ConfigInvalid(f"recipe {name!r} has {steps} steps", todo=f"Give steps1 to steps{MOST_STEPS}")
    if (found := re.fullmatch(r"shift([0-9]{1,9}(?:\.[0-9]{1,9})?)", text)) is not None:
        shift = float(found[1])
        if 0 < shift <= MOST_SHIFT:
            return Modifier("shift", shift, f"shift{shift:g}")
        raise ConfigInvalid(
            f"recipe {name!r} has a shift of {shift:g}", todo=f"Give a number above 0 and at most {MOST_SHIFT:g}"
        )
    near = _closest_modifier(text)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ConfigInvalid(
        f"recipe {name!r} has the unknown modifier {text!r}{hint}", todo=f"After a +: {_list_modifiers()}"
    )


def _closest_modifier(text: str) -> str | None:
    """Return the modifier that `text` is probably a misspelling of: other case, the number in front, a dash or an
    equals sign between, a typing error."""
    plain = re.sub(r"[\s_=:-]", "", text.lower())
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)?(steps?|shift)(\d+(?:\.\d+)?)?", plain)) is not None:
        number = found[1] or found[3] or ("4" if found[2] != "shift" else "3")
        return f"{'shift' if found[2] == 'shift' else 'steps'}{number}"
    squeezed = {text.replace("-", ""): text for text in _fixed_modifiers()} | dict(SCHEDULE_MODIFIERS)
    near = difflib.get_close_matches(plain, squeezed, n=1)
    return squeezed[near[0]] if near else None


def _check(recipe: Recipe, modifiers: Mapping[str, Modifier], name: str) -> None:
    """Raise ConfigInvalid for modifiers that are each valid but cannot be combined."""
    sampler, schedule = recipe.scheduler, recipe.schedule
    pinned = [modifiers[field].text for field in CHOSEN if field in modifiers]
    if recipe.choice and pinned:
        instead = "+".join([DEFAULT_RECIPE, *(modifiers[field].text for field in ORDER if field in modifiers)])
        raise ConfigInvalid(
            f"recipe {name!r} has {pinned[0]!r}, which {recipe.name} leaves to the device", todo=f"Use {instead}"
        )
    if schedule not in SAMPLER_ROWS[sampler].schedules:
        fitting = next(row.modifier for row in SAMPLER_ROWS.values() if schedule in row.schedules)
        both = f"{SAMPLER_ROWS[sampler].modifier} and {SCHEDULE_MODIFIERS[schedule]}"
        todo = f"Use {name}+{fitting}" if "scheduler" not in modifiers else f"Leave out one of {both}"
        raise ConfigInvalid(f"recipe {name!r}: {sampler} does not accept the sigma schedule {schedule!r}", todo=todo)
    if PRECISIONS[recipe.compute].layout == "svdq" and not recipe.fp4:
        bases = [base.name for base in RECIPES.values() if base.fp4 and not base.choice]
        raise ConfigInvalid(
            f"recipe {name!r} runs the published weights; {recipe.compute} needs a file of its own format",
            todo=f"Use {' or '.join(f'{base}+{recipe.compute}' for base in sorted(bases))}",
        )
    if recipe.dtype == "float32" and "compute" in modifiers and recipe.compute == DEFAULT_PRECISION:
        raise ConfigInvalid(
            f"recipe {name!r} holds the model in float32", todo="Use recipe bf16 to compute in bfloat16"
        )
