"""The page of error codes against the classes of `runner/errors.py`: every code has exit code, cause and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner import errors

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CLASSES = [value for name in errors.__all__ if isinstance(value := getattr(errors, name), type)]
CODES = sorted({found.code for found in CLASSES})
ROWS = {
    row[0]: row[1:]
    for row in re.findall(r"^\| \[`([a-z._]+)`\]\(#[a-z._]+\) \| (.+) \| (.+) \| (.+) \|$", PAGE, flags=re.MULTILINE)
}


def section(code: str) -> str:
    """The text below the code's own heading."""
    found = re.search(rf"^## {re.escape(code)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found, f"docs/troubleshooting.md has no section {code}"
    return found.group(1)


def test_table_of_codes_lists_each_code_once():
    assert sorted(ROWS) == CODES


@pytest.mark.parametrize("code", CODES)
def test_section_of_a_code_gives_cause_and_remedy(code: str):
    cause, remedy = section(code).split("**Remedy.**")
    assert len(cause.partition("**Cause.**")[2].split()) >= 5
    assert len(remedy.split()) >= 5


@pytest.mark.parametrize("code", CODES)
def test_row_of_a_code_has_the_exit_codes_of_its_classes(code: str):
    _, exit_codes, _ = ROWS[code]
    known = {found.exit_code for found in CLASSES if found.code == code}
    assert known & {int(number) for number in re.findall(r"\d", exit_codes)} or code == "storage.denied"
    extra = {1} if code.startswith("storage.") else {2} if code == "input.not_found" else set()
    assert {int(number) for number in re.findall(r"\d", exit_codes)} <= known | extra


@pytest.mark.parametrize("code", CODES)
def test_row_of_a_code_says_whether_the_run_stops(code: str):
    effect = ROWS[code][0]
    stops = {found.stops_run for found in CLASSES if found.code == code}
    assert (stops == {False}) == effect.startswith("go on")
    assert (True in stops) == bool(re.search(r"stop|none starts$|nothing was submitted", effect))


@pytest.mark.parametrize("code", CODES)
def test_link_of_a_row_leads_to_its_section(code: str):
    """A heading's anchor is its text in lower case without the points."""
    assert f"[`{code}`](#{code.replace('.', '')})" in PAGE
