"""Options that take more than one form."""

import pytest
from pydantic import ValidationError

from runner.spec.options import JobOptions, PreprocessOptions


@pytest.mark.parametrize(
    ("given", "meant"),
    [(True, "robust"), (False, "off"), ("off", "off"), ("robust", "robust"), ("official", "official")],
)
def test_retarget_is_a_word_or_yes_or_no(given, meant):
    assert PreprocessOptions(retarget=given).retarget == meant


@pytest.mark.parametrize("given", ["yes", "full", 1, None])
def test_other_words_are_not(given):
    with pytest.raises(ValidationError, match="robust"):
        PreprocessOptions(retarget=given)


def test_subject_is_a_word_a_number_or_a_box():
    assert PreprocessOptions().subject == "largest"
    assert PreprocessOptions(subject="centre").subject == "centre"
    assert PreprocessOptions(subject=[10, 20.5, 30, 40]).subject == (10, 20.5, 30, 40)
    assert PreprocessOptions(subject=2).subject == 2


@pytest.mark.parametrize(
    "given",
    [
        "me",
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [-1, 0, 5, 5],
        ["1", 2, 3, 4],
        None,
        [1, 2, True, 9],
        0,
        -1,
        1.0,
        True,
        "1",
        [2],
    ],
)
def test_nothing_else_is(given):
    with pytest.raises(
        ValidationError, match=r"largest, centre, a person's number from 1, or a box \[x1, y1, x2, y2\]"
    ):
        PreprocessOptions(subject=given)


@pytest.mark.parametrize("given", [[5, 5, 5, 9], [9, 1, 5, 9], [1, 9, 5, 9]])
def test_a_box_has_an_inside(given):
    with pytest.raises(ValidationError, match="left < right and top < bottom"):
        PreprocessOptions(subject=given)


def test_the_schema_takes_the_same_forms():
    forms = JobOptions.model_json_schema()["$defs"]["PreprocessOptions"]["properties"]["subject"]["anyOf"]
    assert {"type": "integer", "minimum": 1} in forms
    assert [form["type"] for form in forms] == ["string", "integer", "array"]


def test_what_was_chosen_survives_the_record():
    options = JobOptions(preprocess={"subject": [1, 2, 3, 4], "retarget": True, "smooth": True})
    assert JobOptions.model_validate(options.model_dump(mode="json")) == options
