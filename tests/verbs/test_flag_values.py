"""What flags may hold, asked of the checks themselves; test_settings.py asks through each verb's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import ConfigInvalid
from runner.verbs.flag_values import are_gpus, check_by, is_one_of, is_path, is_reason, is_time, is_whole, parse_age


@pytest.mark.parametrize(
    ("found", "held"),
    [
        (is_whole(0, "--n", " +7 "), 7),
        (is_path("--p", "a/b"), Path("a/b")),
        (is_time("--t", "2026-01-31T05:00:00+01:00"), "2026-01-31T04:00:00.000+00:00"),
        (is_reason("--why", "  a\n reason "), "a reason"),
        (are_gpus("--gpus", "0, 2"), "0,2"),
    ],
)
def test_flag_check_returns_value_in_type_of_field(found, held):
    assert found == held
    assert type(found) is type(held)


@pytest.mark.parametrize("value", [True, 1.0, "1.0", "", "1e3", "9" * 19, -1, None])
def test_is_whole_refuses_non_integer(value):
    with pytest.raises(ConfigInvalid) as caught:
        is_whole(0, "--n", value)
    assert caught.value.where == "--n"


def test_is_one_of_with_near_miss_suggests_choice():
    with pytest.raises(ConfigInvalid, match="did you mean cuda"):
        is_one_of(("auto", "cpu", "cuda"), "--device", "cdua")


def test_check_by_names_flag_once():
    def refuse(what: str) -> None:
        raise ConfigInvalid(what, todo="Leave it")

    for what, where in (("no such thing", "--flag"), ("--flag has no such thing", None)):
        with pytest.raises(ConfigInvalid) as caught:
            check_by("--flag", lambda what=what: refuse(what))
        assert (caught.value.where, caught.value.todo) == (where, "Leave it")


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("1h", 3600), ("2d", 172800), ("0s", 0), ("1.5h", 5400)])
def test_parse_age_returns_seconds(text, seconds):
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1 h", "1w", "1h30m", "١h"])
def test_parse_age_of_invalid_text_raises(text):
    with pytest.raises(ValueError, match=r"write e.g. 30m, 1h, 2d or 0s"):
        parse_age(text)
