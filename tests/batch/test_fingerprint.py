from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from runner.batch.fingerprint import differences, fingerprint, fingerprint_parts
from runner.batch.inputs import InputIndex
from runner.errors import InputNotFound
from runner.records.record import InputRecord
from runner.spec.field_marks import Introduced
from runner.spec.manifest import Job
from runner.spec.options import JobOptions, MaskOptions, PreprocessOptions
from runner.spec.recipes import RECIPES, Recipe, get_recipe
from runner.spec.regression_limits import RegressionLimits
from runner.storage.file_hashes import FileHashes

IDENTITY = {"transformer": "sha256:" + "0" * 64}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "ref.png").write_bytes(b"reference")
    (tmp_path / "video.mp4").write_bytes(b"video")
    return Job("a", str(tmp_path / "ref.png"), str(tmp_path / "video.mp4"), None, "dance", JobOptions(), 1)


def parts_of(job: Job) -> dict:
    return fingerprint_parts(job, InputIndex(FileHashes()).identify(job), IDENTITY)


def test_local_inputs_are_identified_by_their_bytes(job, tmp_path):
    found = InputIndex(FileHashes()).identify(job)
    assert found["video"].identity == "sha256:" + hashlib.sha256(b"video").hexdigest()
    assert found["video"].bytes == 5


def test_fingerprint_of_moved_or_renamed_input_is_unchanged(job, tmp_path):
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(b"reference")
    assert parts_of(job) == parts_of(replace(job, id="b", reference=str(moved), line=9))


def test_fingerprint_with_regression_limits_is_unchanged(job):
    limits = RegressionLimits.model_validate({"same_frames": False, "psnr_min": 30, "seconds_max": "2x"})
    assert parts_of(replace(job, regression=limits)) == parts_of(job)


def test_fingerprint_with_changed_option_differs(job):
    base = fingerprint(parts_of(job))
    for change in ({"seed": 1}, {"fps": 8}, {"output": {"crf": 20}}, {"preprocess": {"parity": True}}):
        assert fingerprint(parts_of(replace(job, options=JobOptions.model_validate(change)))) != base


def test_fingerprint_with_changed_contents_prompt_or_weights_differs(job, tmp_path):
    base = fingerprint(parts_of(job))
    assert fingerprint(parts_of(replace(job, prompt="sit"))) != base
    assert (
        fingerprint(fingerprint_parts(job, InputIndex(FileHashes()).identify(job), {"transformer": "sha256:1"})) != base
    )
    (tmp_path / "video.mp4").write_bytes(b"other")
    assert fingerprint(parts_of(job)) != base


def test_missing_input_is_named_in_error(job, tmp_path):
    (tmp_path / "video.mp4").unlink()
    with pytest.raises(InputNotFound, match=r"video\.mp4"):
        InputIndex(FileHashes()).identify(job)


def test_differences_are_listed_as_readable_lines():
    old = {"options.seed": 41, "input.video": "sha256:" + "a" * 64, "gone": 1}
    new = {"options.seed": 42, "input.video": "sha256:" + "b" * 64, "new": None}
    assert differences(old, new) == [
        "gone: 1 → (unset)",
        "input.video: sha256:aaaaaaaa → sha256:bbbbbbbb",
        "new: (unset) → None",
        "options.seed: 41 → 42",
    ]


class LaterMask(MaskOptions):
    soft: Annotated[int, Introduced(0)] = Field(default=0, ge=0)


class LaterPreprocess(PreprocessOptions):
    mask: LaterMask = LaterMask()


class LaterOptions(JobOptions):
    """Two options that are later than version 0.1.0, one of them nested."""

    glow: Annotated[float, Introduced(0)] = Field(default=0.0, ge=0)
    preprocess: LaterPreprocess = LaterPreprocess()


class RaisedOptions(LaterOptions):
    glow: Annotated[float, Introduced(0)] = Field(default=0.5, ge=0)


@pytest.mark.parametrize("later", [LaterOptions(), RaisedOptions(glow=0)])
def test_later_option_with_introduced_default_keeps_fingerprint(job, later):
    assert fingerprint(parts_of(replace(job, options=later))) == fingerprint(parts_of(job))


def test_later_option_with_raised_default_changes_fingerprint(job):
    assert fingerprint(parts_of(replace(job, options=RaisedOptions()))) != fingerprint(parts_of(job))


def test_later_option_missing_in_record_has_introduced_default(job, monkeypatch):
    monkeypatch.setattr("runner.batch.fingerprint.JobOptions", LaterOptions)
    old = parts_of(job)
    options = LaterOptions.model_validate({"glow": 0.5, "preprocess": {"mask": {"soft": 3}}, "seed": 7})
    new = parts_of(replace(job, options=options))
    assert differences(old, new) == [
        "options.glow: 0 → 0.5",
        "options.preprocess.mask.soft: 0 → 3",
        "options.seed: 42 → 7",
    ]
    assert differences(new, old) == [
        "options.glow: 0.5 → 0",
        "options.preprocess.mask.soft: 3 → 0",
        "options.seed: 7 → 42",
    ]
    assert differences(new, {**new, "options.glow": 1.0}) == ["options.glow: 0.5 → 1.0"]


def test_later_recipe_field_missing_in_record_has_introduced_default(monkeypatch):
    @dataclass(frozen=True)
    class LaterRecipe(Recipe):
        optics: Annotated[str, Introduced("first")] = "first"

    monkeypatch.setattr("runner.batch.fingerprint.Recipe", LaterRecipe)
    plain = get_recipe("bf16")
    given = {field.name: getattr(plain, field.name) for field in fields(plain)}
    assert LaterRecipe(**given).effective() == plain.effective()
    assert LaterRecipe(**given, optics="second").effective() == {**plain.effective(), "optics": "second"}
    old = {"model.recipe.grid": "official"}
    assert differences(old, {**old, "model.recipe.optics": "second"}) == ["model.recipe.optics: first → second"]


boxes = st.tuples(*[st.integers(0, 9)] * 4).map(lambda c: [c[0], c[1], c[0] + c[2] + 1, c[1] + c[3] + 0.5])
some_options = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["animate", "replace"]),
        "size": st.sampled_from(["auto", "480x832"]),
        "fps": st.sampled_from(["source", 16, 23.976]),
        "start_s": st.floats(0, 9),
        "max_frames": st.none() | st.integers(2, 9),
        "seed": st.integers(0, 2**63 - 1),
        "steps": st.none() | st.integers(1, 100),
        "guidance_scale": st.floats(0, 20),
        "negative_prompt": st.none() | st.text(max_size=5),
        "max_segment_frames": st.sampled_from([13, 81]),
        "overlap_frames": st.sampled_from([1, 5]),
        "loras": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["a", "é"])}, optional={"strength": st.floats(-4, 4)}),
            unique_by=lambda lora: lora["name"],
        ),
        "keep_audio": st.booleans(),
        "output": st.fixed_dictionaries(
            {}, optional={"format": st.sampled_from(["mp4", "png"]), "crf": st.integers(0, 51)}
        ),
        "preprocess": st.fixed_dictionaries(
            {},
            optional={
                "parity": st.booleans(),
                "detect_every": st.none() | st.integers(1, 60),
                "subject": st.sampled_from(["largest", "centre"]) | st.integers(1, 9) | boxes,
                "pose": st.sampled_from(["vitpose", "dwpose"]),
                "mask": st.fixed_dictionaries(
                    {}, optional={"iterations": st.integers(0, 50), "w_len": st.none() | st.integers(1, 9)}
                ),
                "from": st.text("ab", min_size=1),
                "smooth": st.booleans(),
                "retarget": st.sampled_from(["off", "robust", "official", True]),
            },
        ),
    },
)


def as_version_0_1_0(options: JobOptions, prompt: str, inputs: dict[str, str], identity: dict[str, str]) -> str:
    """The fingerprint as version 0.1.0 calculated it, written anew."""
    data = json.loads(options.model_dump_json())
    del data["preprocess"]["from"]
    for name in ("face_strength", "pose_strength", "colour"):  # later ones
        del data[name]
    del data["output"]["interpolate"], data["output"]["pad_last"]
    lines = {"prompt": prompt, "output_version": 2}

    def add(value, name: str) -> None:
        if isinstance(value, dict):
            for key in value:
                add(value[key], f"{name}.{key}")
        else:
            lines[name] = value

    add(data, "options")
    add(inputs, "input")
    add(identity, "model")
    text = json.dumps(lines, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


FIRST_RECIPES = sorted(name for name, recipe in RECIPES.items() if not recipe.choice)  # those of version 0.1.0


@given(some_options, st.text(max_size=5), st.sampled_from([*FIRST_RECIPES, "fp4+euler+int8+shift2.5"]))
@example({}, "", "fp4-distill")
def test_fingerprint_of_old_options_equals_version_0_1_0(given_options, prompt, recipe):
    keys = ("scheduler", "grid", "shift", "dtype", "vae_dtype", "weights", "fp4", "distilled", "compute", "attention")
    attributes = {"grid": "schedule"}  # renamed since
    values = {key: getattr(get_recipe(recipe), attributes.get(key, key)) for key in keys}
    identity = {f"recipe.{key}": str(value) for key, value in values.items()} | IDENTITY
    inputs = {"video": InputRecord(uri="v", bytes=1, identity="sha256:1")}
    old = as_version_0_1_0(JobOptions.model_validate(given_options), prompt, {"video": "sha256:1"}, identity)
    named = {f"recipe.{key}": str(value) for key, value in get_recipe(recipe).effective().items()} | IDENTITY
    for options in (JobOptions, LaterOptions):
        job = Job("a", "r", "v", None, prompt, options.model_validate(given_options), 1)
        assert fingerprint(fingerprint_parts(job, inputs, named)) == old


def test_recipe_with_choice_by_device_has_device_independent_fingerprint():
    """It has the parts of `fp4-distill` and one more: a job that was done on one device is done for every device."""
    distill, fast = get_recipe("fp4-distill").effective(), get_recipe("fp4-fast").effective()
    assert fast == {**distill, "choice": "fast"}
    old = {f"model.recipe.{key}": str(value) for key, value in distill.items()}
    new = {f"model.recipe.{key}": str(value) for key, value in fast.items()}
    assert differences(old, new) == ["model.recipe.choice: (empty) → fast"]
    assert fingerprint(old) != fingerprint(new)


def test_old_option_with_changed_default_changes_fingerprint(job, monkeypatch):
    class Reseeded(JobOptions):
        seed: int = 43

    old, new = parts_of(job), parts_of(replace(job, options=Reseeded()))
    assert fingerprint(old) != fingerprint(new)
    assert differences(old, new) == ["options.seed: 42 → 43"]


flat = st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=6)


@given(flat, flat)
def test_equal_fingerprints_have_no_differences(old, new):
    same = fingerprint(old) == fingerprint(new)
    # JSON has one 1 where Python has 1 and True; both sides here are what JSON makes of them
    assert same == (repr(sorted(old.items())) == repr(sorted(new.items())))
    if same:
        assert differences(old, new) == []
