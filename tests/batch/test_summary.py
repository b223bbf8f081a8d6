from __future__ import annotations

import json

import pytest

from runner.batch.summary import SummaryWriter
from runner.errors import InputNotFound, OutOfMemory, StorageUnavailable
from runner.records.record import ErrorRecord, JobLine
from runner.storage import open_storage

OK = {"status": "succeeded", "reason": ""}


def failed(name: str, error) -> JobLine:
    return JobLine(id=name, status="failed", reason="", error=ErrorRecord.of(error, "prepare"))


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path)


def writer(storage, ids="abc", **more) -> SummaryWriter:
    values = {
        "run_id": "r",
        "shard": "0-of-1",
        "shard_reason": "",
        "manifest": "m",
        "recipe": "bf16",
        "job_ids": list(ids),
    }
    return SummaryWriter(storage, **(values | more))


def read(storage) -> dict:
    return json.loads(storage.read_bytes("runs/r/0-of-1.summary.json"))


def test_it_can_be_read_while_the_run_goes_on(storage):
    summary = writer(storage)
    summary.add(JobLine(id="b", **OK))
    found = read(storage)
    assert found["finished_at"] is None
    assert found["exit_code"] is None
    assert [(job["id"], job["status"]) for job in found["jobs"]] == [
        ("a", "not_run"),
        ("b", "succeeded"),
        ("c", "not_run"),
    ]


@pytest.mark.parametrize(
    ("lines", "stop", "code"),
    [
        ([JobLine(id="a", **OK), JobLine(id="b", status="skipped", reason="done")], None, 0),
        ([JobLine(id="a", **OK), failed("b", InputNotFound("x"))], None, 1),
        ([JobLine(id="a", **OK), failed("b", StorageUnavailable("x"))], None, 3),
        ([failed("a", OutOfMemory("x"))], None, 1),  # retryable within a run; a second run would end the same
        ([failed("a", InputNotFound("x")), failed("b", StorageUnavailable("x"))], None, 1),
        ([JobLine(id="a", **OK)], 143, 143),
    ],
)
def test_exit_codes(storage, lines, stop, code):
    summary = writer(storage, ids="ab")
    for line in lines:
        summary.add(line)
    assert summary.finish("SIGTERM" if stop else None, stop) == code
    assert read(storage)["exit_code"] == code
    assert read(storage)["finished_at"]


def test_a_slow_store_is_not_written_at_every_job(storage, tmp_path):
    """Rewriting whole files may take a tenth of the time, whatever the number of jobs."""
    now, writes = [0.0], []

    class Slow(type(storage)):
        def write_bytes(self, key, data):
            now[0] += 1.0
            writes.append(key)
            super().write_bytes(key, data)

    ids = [f"j{n}" for n in range(200)]
    summary = writer(Slow(tmp_path), ids=ids, clock=lambda: now[0])
    for name in ids:
        now[0] += 1.0
        summary.add(JobLine(id=name, **OK))
    assert len(writes) <= 0.1 * now[0] + 2
    summary.finish(None, None)
    assert read(storage)["counts"]["succeeded"] == 200
