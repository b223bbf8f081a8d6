"""The Markdown summary."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.regression.html_report import VERDICTS
from runner.regression.markdown_report import markdown
from tests.regression.report_samples import HOSTILE, make_comparison, make_finding


def cells(row: str) -> list[str]:
    """The cells of one row of a table: a pipe behind a backslash is no border."""
    assert row.startswith("| ")
    assert row.endswith(" |")
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def table(text: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("| **")]


def unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def test_counts_environment_command_and_failures_first():
    comparison = make_comparison([make_finding(verdict) for verdict in VERDICTS])
    text = markdown(comparison)
    assert text.splitlines()[0].startswith("## Night comparison: 8 jobs, 1 broken, 1 failed")
    assert "torch: 2.12.0 → 2.13.0" in unescape(text)
    assert f"```sh\n{comparison.approve}\n```\n" in text
    rows = table(text)
    assert [row[0] for row in rows] == [f"**{verdict}**" for verdict in VERDICTS][:6]  # no draft, no identical
    broken, failed = rows[:2]
    assert [unescape(cell) for cell in broken[3:]] == ["33", "24.6", "0.8612", "12.3 (1.04×)"]
    assert "the limit is 1 ΔE" in unescape(broken[2])
    assert "INPUT_NOT_FOUND" in unescape(failed[2])


def test_a_night_without_changes_has_no_table():
    text = markdown(make_comparison([make_finding("identical")], approve="", environment=[], exit_code=0))
    assert "|" not in text
    assert "```" not in text
    assert "1 identical" in text


def test_a_command_with_backticks_stays_in_its_fence():
    comparison = make_comparison([], approve="video-lab approve out --why 'a ``` b'\n# heading")
    assert "````sh\nvideo-lab approve out --why 'a ``` b' # heading\n````\n" in markdown(comparison)


@given(st.text(max_size=80))
def test_no_text_leaves_its_cell_or_becomes_markup(text):
    job = make_finding("failed", name=f"a{text}b", text=f"c{text}d", error="")
    found = markdown(make_comparison([job], environment=[], out="out", baseline="base"))
    lines = found.split("\n")
    rows = [line for line in lines if line.startswith("| **")]
    assert len(rows) == 1
    assert len(lines) == len(markdown(make_comparison([make_finding("failed", name="x")], environment=[])).split("\n"))
    row = cells(rows[0])
    assert len(row) == 7
    assert not re.search(r"(?<!\\)(?:\\\\)*[`<>\[\]*_~]", row[1])
    assert len(found.splitlines()) == len(lines) - 1  # no other kind of line end either


def test_hostile_text_is_shown_as_it_is():
    job = make_finding("failed", name=HOSTILE, error="")
    row = table(markdown(make_comparison([job])))[0]
    assert unescape(row[1]) == re.sub("[\x00\x1b]+", " ", HOSTILE).strip()


@pytest.mark.parametrize("limit", [2_000, 20_000, 200_000])
def test_it_fits_and_counts_the_rest(limit):
    jobs = [make_finding("broken", name=f"job-{number:05d}-ü") for number in range(2_000)]
    text = markdown(make_comparison(jobs), limit)
    shown = len(table(text))
    assert limit - 700 < len(text.encode()) <= limit
    assert f"\n{2_000 - shown} more jobs are in the HTML report.\n" in text
    assert [unescape(row[1]) for row in table(text)] == [job.id for job in jobs[:shown]]


def test_one_endless_error_does_not_fill_the_summary():
    jobs = [make_finding("failed", error="x" * 900_000), make_finding("broken")]
    assert len(table(markdown(make_comparison(jobs), 10_000))) == 2
