"""Outcome: jobs by status."""

from __future__ import annotations

from runner.records.record import JobLine
from runner.verbs.outcome import counts_of_lines


def test_counts_are_of_all_statuses():
    lines = [
        JobLine(id=name, status=status, reason="test")
        for name, status in zip("abcd", ("succeeded", "failed", "failed", "not_run"), strict=True)
    ]
    assert counts_of_lines(lines) == {"total": 4, "succeeded": 1, "skipped": 0, "failed": 2, "not_run": 1}
