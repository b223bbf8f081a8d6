"""Fields later than version 0.1.0: when they are hashed, under which key, and what an incomplete one raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import Field

from runner.spec.field_marks import HashedAs, Introduced, NotHashed
from runner.spec.hashed_fields import OPTION_KEYS, RECIPE_KEYS, hashed_values, introduced_defaults
from runner.spec.options import Frozen, JobOptions, LoraOption, MaskOptions, PreprocessOptions
from runner.spec.recipes import RECIPES, Recipe


class LaterMask(MaskOptions):
    soft: Annotated[int, Introduced(0)] = Field(default=2, ge=0, description="pixels")


class LaterPreprocess(PreprocessOptions):
    mask: LaterMask = LaterMask()


class LaterLora(LoraOption):
    from_step: Annotated[int, Introduced(0)] = 0


class Tint(Frozen):
    gain: Annotated[float, Introduced(1.0)] = 1.0
    match: Annotated[bool, Introduced(False)] = False


class LaterOptions(JobOptions):
    glow: Annotated[float, Introduced(0)] = Field(default=0.5, ge=0, description="of the light")
    preprocess: LaterPreprocess = LaterPreprocess()
    loras: tuple[LaterLora, ...] = ()
    tint: Tint = Tint()
    grain: Annotated[Tint | None, Introduced(None)] = None
    note: Annotated[str, NotHashed()] = ""


def later(values: dict[str, Any]) -> dict[str, Any]:
    """What is hashed beyond what version 0.1.0 hashed."""
    old = hashed_values(JobOptions(), OPTION_KEYS)
    return {key: value for key, value in values.items() if key not in old or old[key] != value}


def test_the_real_fields_are_each_of_one_kind():
    """Fails where an option or a recipe field is added without `Introduced`."""
    assert OPTION_KEYS >= hashed_values(JobOptions(), OPTION_KEYS).keys() >= {"seed", "preprocess.mask.kernel"}
    assert introduced_defaults(JobOptions, OPTION_KEYS).keys().isdisjoint(OPTION_KEYS)
    for recipe in RECIPES.values():
        assert hashed_values(recipe, RECIPE_KEYS).keys() >= RECIPE_KEYS
    assert introduced_defaults(Recipe, RECIPE_KEYS).keys().isdisjoint(RECIPE_KEYS)


def test_a_later_field_is_hashed_where_it_differs_from_the_default_it_was_introduced_with():
    assert later(hashed_values(LaterOptions(), OPTION_KEYS)) == {"glow": 0.5, "preprocess.mask.soft": 2}
    silent = LaterOptions(glow=0, preprocess=LaterPreprocess(mask=LaterMask(soft=0)))
    assert later(hashed_values(silent, OPTION_KEYS)) == {}
    assert list(hashed_values(silent, OPTION_KEYS)) == list(hashed_values(JobOptions(), OPTION_KEYS))
    changed = silent.model_copy(update={"tint": Tint(gain=2, match=True), "grain": Tint(), "note": "x"})
    assert later(hashed_values(changed, OPTION_KEYS)) == {"tint.gain": 2.0, "tint.match": True, "grain": {}}
    changed = silent.model_copy(update={"grain": Tint(gain=3)})
    assert later(hashed_values(changed, OPTION_KEYS)) == {"grain": {"gain": 3.0}}


def test_false_is_not_the_default_zero():
    class Options(JobOptions):
        sharpen: Annotated[bool | int, Introduced(0)] = 0

    assert "sharpen" not in hashed_values(Options(), OPTION_KEYS)
    assert hashed_values(Options(sharpen=False), OPTION_KEYS)["sharpen"] is False


def test_a_later_field_inside_a_list():
    options = LaterOptions(loras=(LaterLora(name="relight"), LaterLora(name="film", from_step=2)))
    assert hashed_values(options, OPTION_KEYS)["loras"] == [
        {"name": "relight", "strength": 1.0},
        {"name": "film", "strength": 1.0, "from_step": 2},
    ]


def test_what_a_missing_key_means():
    assert introduced_defaults(LaterOptions, OPTION_KEYS) == {
        **introduced_defaults(JobOptions, OPTION_KEYS),
        "glow": 0,
        "preprocess.mask.soft": 0,
        "tint.gain": 1.0,
        "tint.match": False,
        "grain": None,
    }


class Noise(Frozen):
    start: Annotated[int, HashedAs("seed")] = 42


class Renamed(Frozen):
    what: Annotated[str, HashedAs("mode", {"puppeteer": "animate"})] = "puppeteer"
    noise: Noise = Noise()
    loras: tuple[LoraOption, ...] = ()


def test_a_renamed_or_moved_field_keeps_its_key_and_its_values():
    known = frozenset({"mode", "seed", "loras", "loras[].name", "loras[].strength"})
    assert hashed_values(Renamed(), known) == {"mode": "animate", "seed": 42, "loras": []}
    assert hashed_values(Renamed(what="replace"), known)["mode"] == "replace"


def test_a_renamed_field_of_a_dataclass():
    @dataclass(frozen=True)
    class Sampler:
        sampler: Annotated[str, HashedAs("scheduler", {"euler-1": "euler"})]
        sigmas: Annotated[str, HashedAs("grid")] = "official"
        family: Annotated[str, Introduced("wan-animate")] = "wan-animate"
        summary: Annotated[str, NotHashed()] = "prose"

    known = frozenset({"scheduler", "grid"})
    assert hashed_values(Sampler("euler-1"), known) == {"scheduler": "euler", "grid": "official"}
    assert hashed_values(Sampler("unipc", family="ltx"), known)["family"] == "ltx"


class Bare(JobOptions):
    glow: float = 0.0


class BareMask(MaskOptions):
    soft: int = 0


class BarePreprocess(PreprocessOptions):
    mask: BareMask = BareMask()


class BareDeep(JobOptions):
    preprocess: BarePreprocess = BarePreprocess()


class BareLora(LoraOption):
    from_step: int = 0


class BareInList(JobOptions):
    loras: tuple[BareLora, ...] = ()


class OldMarkedLater(JobOptions):
    seed: Annotated[int, Introduced(42)] = 42


class Lacking(Frozen):
    seed: int = 42


class Twice(JobOptions):
    start: Annotated[int, HashedAs("seed")] = 42


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Bare, r"Bare\.glow is no key of version 0\.1\.0: declare it as Annotated\[…, Introduced\(DEFAULT\)\]"),
        (BareDeep, r"BareDeep\.preprocess\.mask\.soft is no key"),
        (BareInList, r"BareInList\.loras\[\]\.from_step is no key"),
        (OldMarkedLater, r"OldMarkedLater\.seed is a key of version 0\.1\.0: remove Introduced"),
        (Twice, r"Twice: two fields are hashed as 'seed'"),
        (Lacking, r"Lacking lacks \['fps', .*mark the field that took its place with HashedAs\('fps'\)"),
    ],
)
def test_a_field_of_no_kind_is_refused_with_what_to_write(cls, message):
    with pytest.raises(TypeError, match=message):
        hashed_values(cls(), OPTION_KEYS)
    with pytest.raises(TypeError, match=message):
        introduced_defaults(cls, OPTION_KEYS)


def test_the_marks_do_not_show_in_the_exported_schema():
    class Plain(JobOptions):
        glow: float = Field(default=0.5, ge=0, description="of the light")

    class Marked(JobOptions):
        glow: Annotated[float, Introduced(0)] = Field(default=0.5, ge=0, description="of the light")

    plain, marked = Plain.model_json_schema(), Marked.model_json_schema()
    assert plain["properties"] == marked["properties"]
