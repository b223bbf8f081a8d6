"""Recipes: named, frozen choices of weights, precision, solver and steps. A run names one; a job never changes it.

In:   a name and, after plus signs in any order, words that change it. Out: `Recipe`, plain data for the record.
Never: paths, devices, tensors: a dtype is a name until `wan_animate` turns it into one of torch's.

    fp4-distill+fp8                   what the matrix products compute in: bf16, fp8, int8, nvfp4; or svdq-int4,
                                      svdq-nvfp4, of weights that are stored so
    fp4-distill+int8-attention        8-bit self-attention on a GPU, by comfy-kitchen or SageAttention
    fp4-distill+bf16-vae              the autoencoder in bfloat16, not float32: faster, within rounding; or fp16-vae
    fp4-distill+unipc+steps4          the solver: euler, unipc, dpmpp, res2s; denoising steps where the job does not say
    fp4-distill+beta57                the noise levels: official-grid, diffusers-grid, beta57, and shift3 (or shift2.5)

`fp4-fast` leaves the first three to the device: a word for one of them is refused. What is chosen where, and why, is in
`generation/runtime/fast_choice.py`.
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
    "SCHEDULE_WORDS",
    "MemoryChoice",
    "Mode",
    "Recipe",
    "SamplerRow",
    "VaeDtype",
    "get_recipe",
]


Mode = Literal["resident", "stream", "minimal"]  # where weights live during a run; the first needs the most memory
MODES: tuple[Mode, ...] = get_args(Mode)
MemoryChoice = Literal["auto", Mode]  # what a run may ask for
MEMORY_CHOICES: tuple[MemoryChoice, ...] = get_args(MemoryChoice)


EXACT_ATTENTION: Final = "exact"
EIGHT_BIT_ATTENTION: Final = "int8"
VaeDtype = Literal["float16", "bfloat16", "float32"]  # of the autoencoder


@dataclass(frozen=True)
class Recipe:
    """How a run renders, but for where its weights lie and what device it has.

    A new field says with what default it was introduced: `Annotated[str, Introduced("x")]`, see `field_marks.py`.
    """

    name: Annotated[str, NotHashed()]
    steps: Annotated[int, NotHashed()]  # denoising steps where the job does not say
    scheduler: str  # the sampler: a name in SAMPLER_ROWS
    schedule: Annotated[str, HashedAs("grid")]  # of sigmas: a name in SCHEDULE_WORDS, one that the sampler accepts
    shift: float  # of the sigma schedule
    dtype: Literal["bfloat16", "float32"]  # transformer and encoders
    vae_dtype: VaeDtype
    weights: str  # folder of the components in the model store
    summary: Annotated[str, NotHashed()]
    fp4: bool = False  # the transformer's linears in four bits, see variant.py for the file
    distilled: bool = False  # with the step-distillation LoRA, merged into the file or kept beside it
    compute: str = DEFAULT_PRECISION  # of the transformer's matrix products; `bf16`: in `dtype`, whatever that is
    attention: Literal["exact", "int8"] = EXACT_ATTENTION  # of the transformer's self-attention
    family: Annotated[str, Introduced("wan-animate")] = "wan-animate"  # the model, a row of generation/families.py
    # Who chooses `compute`, `attention` and `vae_dtype`. "": the recipe. "fast": the device where it runs, among what
    # passes its self-tests there; these three fields are then what is left where nothing faster passes.
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
        """What decides the frames, for the fingerprint. A job's own steps do, and they are among its options."""
        from runner.spec.hashed_fields import RECIPE_KEYS, hashed_values  # pydantic is slow to import, for `--help`

        return hashed_values(self, RECIPE_KEYS)


@dataclass(frozen=True)
class SamplerRow:
    """How a recipe names a sampler, and what it combines with.

    `generation/sampling.py` has its arithmetic and what it costs, under the same name.
    """

    word: str  # in a recipe's name
    schedules: tuple[str, ...]  # the sigma schedules that it accepts


SCHEDULE_WORDS: Mapping[str, str] = MappingProxyType(  # sigma schedule -> its word in a recipe's name
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
                "as fp4-distill, with the fastest products, attention and autoencoder that pass their tests there",
                fp4=True, distilled=True, choice="fast",
            ),
            Recipe(
                "fp4", 20, "unipc", "official", 5.0, "bfloat16", "float32", SOURCE_WEIGHTS,
                "FP4 weights, 20 UniPC steps", fp4=True,
            ),
            Recipe(
                "bf16", 20, "unipc", "official", 5.0, "bfloat16", "float32", SOURCE_WEIGHTS,
                "the published weights in bfloat16, 20 UniPC steps as the hub's scheduler; autoencoder in float32",
            ),
            Recipe(
                "fp32", 20, "unipc", "official", 5.0, "float32", "float32", SOURCE_WEIGHTS,
                "the same in float32: twice the memory, for comparisons and for machines without a GPU",
            ),
        )
    }
)  # fmt: skip
DEFAULT_RECIPE = "fp4-distill"
FAST_RECIPE = "fp4-fast"
CHOSEN = ("compute", "attention", "vae_dtype")  # the fields that `choice` leaves to the device


MOST_STEPS = 100  # as a job's own
MOST_SHIFT = 100.0  # far beyond any use: by then all levels but the last lie above .95


class Word(NamedTuple):
    """One word after a plus sign: the field that it sets, to what."""

    field: str
    value: Any
    text: str


FIXED: Mapping[str, Word] = MappingProxyType(
    {
        word.text: word
        for word in (
            Word("attention", EIGHT_BIT_ATTENTION, "int8-attention"),
            Word("vae_dtype", "bfloat16", "bf16-vae"),
            Word("vae_dtype", "float16", "fp16-vae"),
            *(Word("scheduler", sampler, row.word) for sampler, row in SAMPLER_ROWS.items()),
            *(Word("schedule", schedule, text) for schedule, text in SCHEDULE_WORDS.items()),
        )
    }
)
ORDER = (*CHOSEN, "scheduler", "schedule", "steps", "shift")  # of the words in a recipe's name


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`, e.g. `fp4-distill+fp8+steps4`. Its own name is the shortest: words in one order, and
    only those that change something. Raises ConfigInvalid, with a suggestion where a word is unknown, given twice or at
    odds with another."""
    base, *texts = name.split("+")
    if base not in RECIPES:
        near = difflib.get_close_matches(base, RECIPES, n=1)
        hint = f"; did you mean {'+'.join([*near, *texts])!r}?" if near else ""
        raise ConfigInvalid(f"no recipe {name!r}{hint}", todo=f"Recipes: {', '.join(RECIPES)}; after a +: {_words()}")
    recipe = RECIPES[base]
    words: dict[str, Word] = {}
    for text in texts:
        word = _word(text, name)
        other = words.get(word.field)
        if other is not None:
            said = f"says {text!r} twice" if other == word else f"says both {other.text!r} and {word.text!r}"
            raise ConfigInvalid(f"recipe {name!r} {said}", todo=f"One {word.field} is enough: drop one of them")
        words[word.field] = word
    changed = replace(recipe, **{word.field: word.value for word in words.values()})
    _check(changed, words, name)
    kept = [words[field] for field in ORDER if field in words and getattr(recipe, field) != words[field].value]
    if not kept:
        return recipe
    said = "+".join(word.text for word in kept)
    return replace(changed, name=f"{base}+{said}", summary=f"{recipe.summary}; changed by {said}")


def _fixed() -> dict[str, Word]:
    """Text → word, of those without a number: a GEMM precision each, and `FIXED`."""
    return {name: Word("compute", name, name) for name in PRECISIONS} | dict(FIXED)


def _words() -> str:
    return f"{', '.join(_fixed())}, stepsN, shiftX"


def _word(text: str, name: str) -> Word:
    """What `text` sets. Raises ConfigInvalid for a word that is none, or a number that makes no schedule."""
    if (fixed := _fixed().get(text)) is not None:
        return fixed
    if (found := re.fullmatch(r"steps([0-9]{1,9})", text)) is not None:
        steps = int(found[1])
        if 1 <= steps <= MOST_STEPS:
            return Word("steps", steps, f"steps{steps}")
        raise ConfigInvalid(f"recipe {name!r}: {steps} steps", todo=f"steps1 to steps{MOST_STEPS}")
    if (found := re.fullmatch(r"shift([0-9]{1,9}(?:\.[0-9]{1,9})?)", text)) is not None:
        shift = float(found[1])
        if 0 < shift <= MOST_SHIFT:
            return Word("shift", shift, f"shift{shift:g}")
        raise ConfigInvalid(f"recipe {name!r}: a shift of {shift:g}", todo=f"Above 0, and {MOST_SHIFT:g} at most")
    near = _meant(text)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ConfigInvalid(f"recipe {name!r} says {text!r}, which is no word{hint}", todo=f"After a +: {_words()}")


def _meant(text: str) -> str | None:
    """The word that was probably meant: other case, the number in front, a dash or sign between, a slip."""
    plain = re.sub(r"[\s_=:-]", "", text.lower())
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)?(steps?|shift)(\d+(?:\.\d+)?)?", plain)) is not None:
        number = found[1] or found[3] or ("4" if found[2] != "shift" else "3")
        return f"{'shift' if found[2] == 'shift' else 'steps'}{number}"
    squeezed = {word.replace("-", ""): word for word in _fixed()} | dict(SCHEDULE_WORDS)
    near = difflib.get_close_matches(plain, squeezed, n=1)
    return squeezed[near[0]] if near else None


def _check(recipe: Recipe, words: Mapping[str, Word], name: str) -> None:
    """Raises ConfigInvalid for words that are each right and make no recipe together."""
    sampler, schedule = recipe.scheduler, recipe.schedule
    pinned = [words[field].text for field in CHOSEN if field in words]
    if recipe.choice and pinned:
        said = "+".join([DEFAULT_RECIPE, *(words[field].text for field in ORDER if field in words)])
        raise ConfigInvalid(
            f"recipe {name!r} says {pinned[0]!r}, which {recipe.name} leaves to the device", todo=f"Say {said}"
        )
    if schedule not in SAMPLER_ROWS[sampler].schedules:
        fitting = next(row.word for row in SAMPLER_ROWS.values() if schedule in row.schedules)
        told = f"{SAMPLER_ROWS[sampler].word} and {SCHEDULE_WORDS[schedule]}"
        todo = f"Say {name}+{fitting}" if "scheduler" not in words else f"Leave out one of {told}"
        raise ConfigInvalid(f"recipe {name!r}: {sampler} does not accept the sigma schedule {schedule!r}", todo=todo)
    if PRECISIONS[recipe.compute].layout == "svdq" and not recipe.fp4:
        bases = [base.name for base in RECIPES.values() if base.fp4 and not base.choice]
        raise ConfigInvalid(
            f"recipe {name!r} runs the published weights; {recipe.compute} computes with a file of its own format",
            todo=f"Say {' or '.join(f'{base}+{recipe.compute}' for base in sorted(bases))}",
        )
    if recipe.dtype == "float32" and "compute" in words and recipe.compute == DEFAULT_PRECISION:
        raise ConfigInvalid(
            f"recipe {name!r} holds the model in float32", todo="Use recipe bf16 to compute in bfloat16"
        )
