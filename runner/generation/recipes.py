"""Recipes: named, frozen choices of weights, precision, solver and steps. A run names one; a job never changes it.

In:   a name. Out: `Recipe`, plain data that goes into the record and the fingerprint as it is.
Never: paths, devices, tensors: a dtype is a name until `wan_animate` turns it into one of torch's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Literal

from runner.errors import ConfigInvalid

__all__ = ["DEFAULT_RECIPE", "RECIPES", "Recipe", "get_recipe"]


@dataclass(frozen=True)
class Recipe:
    """How a run renders, but for where its weights lie and what device it has."""

    name: str
    steps: int  # denoising steps where the job does not say
    scheduler: Literal["unipc", "euler"]
    grid: Literal["official", "diffusers"]  # see schedule.py
    shift: float  # of the noise levels
    dtype: Literal["bfloat16", "float32"]  # transformer and encoders
    vae_dtype: Literal["bfloat16", "float32"]
    weights: str  # folder of the components in the model store
    summary: str
    fp4: bool = False  # the transformer's linears in four bits, see variant.py for the file
    distilled: bool = False  # with the step-distillation LoRA, merged into the file or kept beside it

    def as_dict(self) -> dict[str, object]:
        """What decides the frames, for the fingerprint and the record; the summary is prose and stays out."""
        return {key: value for key, value in asdict(self).items() if key != "summary"}


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


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises ConfigInvalid with a suggestion and the list."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigInvalid(f"no recipe {name!r}{hint}", todo=f"Recipes: {', '.join(RECIPES)}")
