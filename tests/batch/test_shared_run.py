"""Shared run: lines and exit codes of workers that shared jobs become one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.batch.shared_run import merge_exit_codes, merge_lines
from runner.records.record import ErrorRecord, JobLine

ORDER = ("not_run", "skipped", "failed", "succeeded")


def line(name: str, status: str, attempt: int | None = None, *, retryable: bool = False) -> JobLine:
    error = None
    if status == "failed":
        code = "storage.unavailable" if retryable else "input.unreadable"
        error = ErrorRecord(code=code, message="test", stage="prepare", retryable=retryable)
    return JobLine(id=name, status=status, reason="test", attempt=attempt, error=error)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(ORDER), st.integers(1, 3))))
def test_each_job_has_the_best_that_was_said_of_it(said):
    merged = merge_lines("abc", [line(*one) for one in said])
    assert [found.id for found in merged] == list("abc")
    for found in merged:
        own = [(ORDER.index(status), attempt) for name, status, attempt in said if name == found.id]
        assert (ORDER.index(found.status), found.attempt) == max(own, default=(0, None))


def test_a_job_that_no_process_spoke_of_was_not_run():
    (found,) = merge_lines(["a"], [])
    assert (found.status, found.reason) == ("not_run", "the run ended before it")


def test_of_two_equal_lines_the_first_counts():
    first, second = line("a", "skipped"), line("a", "skipped").model_copy(update={"reason": "later"})
    assert merge_lines(["a"], [first, second]) == [first]


@pytest.mark.parametrize(
    ("lines", "codes", "expected"),
    [
        ([line("a", "succeeded"), line("b", "skipped")], [0, None], 0),  # its jobs were rendered elsewhere
        ([line("a", "succeeded")], [143, 0], 0),
        ([line("a", "failed")], [0, 1], 1),
        ([line("a", "failed", retryable=True)], [0, 3], 3),
        ([line("a", "failed"), line("b", "failed", retryable=True)], [3, None], 1),
        ([line("a", "not_run")], [0, None], 3),
        ([line("a", "failed"), line("b", "not_run")], [1, None], 3),
        ([line("a", "not_run")], [0, 3], 3),
        ([line("a", "not_run")], [2, 3], 2),
        ([line("a", "not_run")], [2, 143], 2),
        ([line("a", "not_run")], [143, 143], 143),
        ([line("a", "not_run")], [None, 130], 130),
        ([line("a", "not_run")], [1, 1], 1),  # the loop of both broke
        ([line("a", "not_run")], [], 3),
    ],
)
def test_the_exit_code_says_whether_a_rerun_helps(lines, codes, expected):
    assert merge_exit_codes(lines, codes) == expected
