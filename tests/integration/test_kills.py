"""Runs killed by SIGKILL, at file operations, requests and random instants, lose nothing: `tests/faults/trials.py`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.trial_process import run_trials
from tests.system_tests import system_test


def check_landed(rows: list[dict[str, Any]], at_least: int) -> None:
    """Kills that come after the end test nothing."""
    assert sum(row["landed"] for row in rows) >= at_least, rows
    moments = {moment for row in rows for moment, n in row["when"].items() if n}
    assert {"generating", "both"} & moments and {"delivering", "both"} & moments, rows


def test_twelve_kills_over_a_local_folder(tmp_path, capsys):
    arguments = ("--stores", "local", "--scenarios", "fresh,other seeds", "--trials", "12")
    rows, printed = run_trials("kills", tmp_path, *arguments)
    with capsys.disabled():
        print(f"\n{printed}")
    check_landed(rows, 11)


@system_test
def test_eight_kills_over_s3(tmp_path, capsys):
    arguments = ("--stores", "s3", "--scenarios", "other seeds", "--trials", "8")
    rows, printed = run_trials("kills", tmp_path, *arguments)
    with capsys.disabled():
        print(f"\n{printed}")
    check_landed(rows, 7)


def test_innocent_jobs_are_not_called_crashed(tmp_path, capsys):
    """Six kills of one output, each in a generation or at a random instant."""
    arguments = ("--stores", "local", "--formats", "mp4", "--scenarios", "fresh", "--trials", "0", "--series", "4")
    rows, printed = run_trials("kills", tmp_path, *arguments)
    with capsys.disabled():
        print(f"\n{printed}")
    assert sum(row["when"].get("generating", 0) for row in rows) >= 8, rows


@pytest.mark.soak
@pytest.mark.parametrize("format", ["mp4", "png"])
def test_a_kill_at_every_file_operation_and_at_random_instants(tmp_path, format, capsys):
    arguments = ("--stores", "local", "--formats", format, "--trials", "200", "--series", "20", "--every-point")
    rows, printed = run_trials("kills", tmp_path, *arguments)
    with capsys.disabled():
        print(f"\n{printed}")
    check_landed(rows, 400)


@pytest.mark.soak
@pytest.mark.parametrize("format", ["mp4", "png"])
def test_a_kill_at_every_request_and_at_random_instants(tmp_path, format, capsys):
    arguments = ("--stores", "s3", "--formats", format, "--scenarios", "fresh,other seeds", "--trials", "60")
    rows, printed = run_trials("kills", tmp_path, *arguments, "--series", "5", "--every-point")
    with capsys.disabled():
        print(f"\n{printed}")
    check_landed(rows, 200)


@pytest.mark.soak
@pytest.mark.s3
def test_kills_over_a_real_s3_server(tmp_path, seaweedfs_s3, capsys):
    rows, printed = run_trials(
        "kills", tmp_path, "--stores", "s3", "--trials", "100", "--series", "3", server=seaweedfs_s3
    )
    with capsys.disabled():
        print(f"\n{printed}")
    check_landed(rows, 70)
