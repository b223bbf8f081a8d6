from __future__ import annotations

import pytest

from runner.batch.ledger import Decision, Ledger
from runner.errors import ConfigInvalid
from runner.storage import open_storage
from runner.verbs.status import read_status


def test_a_folder_that_holds_nothing_is_told_from_one_without_failures(tmp_path):
    """A mistyped path must not read as "0 failed"."""
    with pytest.raises(ConfigInvalid, match="--out"):
        read_status(open_storage(tmp_path / "mistyped"))
    open_storage(tmp_path).write_bytes("runs/r/0-of-1.summary.json", b"{}")
    assert read_status(open_storage(tmp_path)) == []


def test_a_job_under_way_is_running(tmp_path):
    storage = open_storage(tmp_path)
    Ledger(storage).begin("a", Decision("run", "", attempt=2), "f", "r")
    (row,) = read_status(storage)
    assert (row.id, row.status, row.attempt) == ("a", "running", 2)
    assert "attempt 2" in row.detail
