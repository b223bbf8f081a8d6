from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.batch.ledger import Decision, Ledger
from runner.cli import main
from runner.errors import ConfigInvalid
from runner.storage import open_storage
from runner.verbs.status import read_run_status


def test_a_folder_that_holds_nothing_is_told_from_one_without_failures(tmp_path):
    """A mistyped path must not read as "0 failed"."""
    with pytest.raises(ConfigInvalid, match="--out"):
        read_run_status(open_storage(tmp_path / "mistyped"))
    open_storage(tmp_path).write_bytes("runs/r/0-of-1.summary.json", b"{}")
    assert read_run_status(open_storage(tmp_path)).rows == ()


def test_a_job_under_way_is_running_and_says_where_and_when_it_was_heard_of(tmp_path, capsys):
    storage = open_storage(tmp_path)
    ledger = Ledger(storage)
    ledger.begin("a", Decision("run", "", attempt=2), "f", "r")
    ledger.note_segments("a", 3)
    (row,) = read_run_status(storage).rows
    assert (row.id, row.status, row.attempt) == ("a", "running", 2)
    assert re.fullmatch(r"preparing since \S+, 3 segments finished", row.detail)
    assert row.host == socket.gethostname()
    assert 0 <= row.heard_s < 2
    main(["status", str(tmp_path)])
    assert "0 succeeded · 0 failed · 1 running · 0 lost" in capsys.readouterr().out


def test_a_job_whose_runner_is_not_heard_of_any_more_is_lost(tmp_path):
    storage = open_storage(tmp_path)
    Ledger(storage, lease_s=30).begin("a", Decision("run", ""), "f", "r")
    long_ago = time.time() - 31
    os.utime(tmp_path / "jobs/a/attempt.json", (long_ago, long_ago))
    (row,) = read_run_status(storage).rows
    assert row.status == "lost"
    assert re.search(r"its runner is not heard of any more: preparing since .*; a rerun takes it over", row.detail)
    assert 30 < row.heard_s < 33


def test_a_job_whose_process_has_ended_is_lost_at_once(tmp_path):
    begin = f"from tests.verbs.test_status import begin; begin({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", begin], check=True, cwd=Path(__file__).parents[2])
    (row,) = read_run_status(open_storage(tmp_path)).rows
    assert (row.status, "its process has ended" in row.detail) == ("lost", True)


def begin(out: str) -> None:
    """Take a job's lease and end without a word."""
    Ledger(open_storage(out)).begin("a", Decision("run", ""), "f", "r")
    os._exit(0)
