"""Several runners of one output at once, one killed, one suspended, one late; see `tests/faults/trials.py`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.trial_process import run_trials


def check_disturbed(rows: list[dict[str, Any]], at_least: int) -> None:
    """Kills and suspensions that come after the end test nothing, nor do runners of which one does all."""
    assert sum(row["landed"] for row in rows) >= at_least, rows
    assert sum(row["when"]["lease lost"] for row in rows) >= at_least // 3, rows
    assert sum(row["when"]["left to another"] for row in rows) >= at_least, rows


def test_two_runners_over_a_local_folder(tmp_path, capsys):
    arguments = ("--stores", "local", "--formats", "mp4", "--scenarios", "same seeds", "--runners", "2")
    arguments += ("--trials", "2", "--seed", "7")
    rows, printed = run_trials("runners", tmp_path, *arguments)
    with capsys.disabled():
        print(f"\n{printed}")
    assert [row["store"] for row in rows] == ["local"]
    assert sum(row["when"]["killed"] + row["when"]["suspended"] for row in rows) >= 2, rows
    assert all(row["when"]["renderings"] >= row["when"]["jobs"] for row in rows), rows


@pytest.mark.soak
@pytest.mark.parametrize("format", ["mp4", "png"])
def test_two_three_and_five_runners_over_a_local_folder(tmp_path, format, capsys):
    rows, printed = run_trials("runners", tmp_path, "--stores", "local", "--formats", format, "--trials", "80")
    with capsys.disabled():
        print(f"\n{printed}")
    check_disturbed(rows, 50)


@pytest.mark.soak
def test_two_three_and_five_runners_over_s3(tmp_path, capsys):
    rows, printed = run_trials("runners", tmp_path, "--stores", "s3", "--trials", "60")
    with capsys.disabled():
        print(f"\n{printed}")
    check_disturbed(rows, 35)


@pytest.mark.soak
@pytest.mark.s3
def test_two_three_and_five_runners_over_a_real_s3_server(tmp_path, seaweedfs_s3, capsys):
    rows, printed = run_trials("runners", tmp_path, "--stores", "s3", "--trials", "60", server=seaweedfs_s3)
    with capsys.disabled():
        print(f"\n{printed}")
    check_disturbed(rows, 35)
