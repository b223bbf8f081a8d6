from __future__ import annotations

import json
import math
import os
import socket
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runner.batch.summary import SummaryWriter
from runner.errors import InputNotFound, OutOfMemory, StorageUnavailable
from runner.records.events import EventLog
from runner.records.record import ErrorRecord, JobLine, ProcessUsage
from runner.storage import LocalStorage, open_storage
from tests.hand_clock import HandClock
from tests.records.test_record import a_failure

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


def test_a_process_tells_how_its_seconds_were_spent(storage):
    clock = HandClock(100.0)
    summary = writer(storage, clock=clock)
    clock.now = 130.0
    summary.note_loading(110.0)
    summary.note_work(12.5, "NVIDIA H200")
    summary.note_work(2.5, "")  # an attempt that ended before it generated: the device stays known
    clock.now = 160.0
    summary.add(JobLine(id="a", **OK))
    (process,) = read(storage)["processes"]
    assert (process["host"], process["pid"]) == (socket.gethostname(), os.getpid())
    assert (process["device"], process["seconds"], process["finished"]) == ("NVIDIA H200", 60.0, False)
    assert (process["work_s"], process["loading"]) == (15.0, [{"begin_s": 10.0, "end_s": 30.0}])
    usage = ProcessUsage.model_validate(process)
    assert (usage.loading_s, usage.idle_s) == (20.0, 25.0)
    clock.now = 170.0
    summary.finish(None, None)
    (process,) = read(storage)["processes"]
    assert (process["seconds"], process["finished"]) == (70.0, True)


def test_a_shard_that_is_started_anew_keeps_what_its_earlier_processes_did(storage):
    first = writer(storage)
    first.note_work(3.0, "GPU")
    first.add(JobLine(id="a", **OK))  # and then it is killed
    second = writer(storage)
    second.note_work(4.0, "GPU")
    second.add(JobLine(id="a", **OK))
    second.finish(None, None)
    found = read(storage)["processes"]
    assert [(process["work_s"], process["finished"]) for process in found] == [(3.0, False), (4.0, True)]


@pytest.mark.parametrize("data", [b"{", b"{}", b"\xff", b"[1]"])
def test_a_summary_that_cannot_be_read_is_written_anew(storage, data):
    storage.write_bytes("runs/r/0-of-1.summary.json", data)
    writer(storage).finish(None, None)
    assert len(read(storage)["processes"]) == 1


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


class Counted(LocalStorage):
    """Counts what is written, and takes `takes_s` of the clock for it."""

    takes_s = 0.0

    def __init__(self, root, now):
        super().__init__(root)
        self.now, self.written, self.times = now, 0, []

    def write_bytes(self, key, data):
        self.now[0] += self.takes_s
        self.written += len(data)
        self.times.append(self.now[0])
        super().write_bytes(key, data)


def run(tmp_path, count: int, every_s: float, takes_s: float = 0.0) -> Counted:
    now = [0.0]
    storage = Counted(tmp_path, now)
    storage.takes_s = takes_s
    ids = [f"j{n}" for n in range(count)]
    summary = writer(storage, ids=ids, clock=lambda: now[0])
    for name in ids:
        now[0] += every_s
        summary.add(JobLine(id=name, **OK))
    ended = len(storage.times)
    summary.finish(None, None)
    assert read(storage)["counts"]["succeeded"] == count
    storage.times = storage.times[:ended]
    return storage


def test_a_slow_store_is_not_written_at_every_job(tmp_path):
    """Rewriting whole files may take a tenth of the time, whatever the number of jobs."""
    storage = run(tmp_path, 200, every_s=1.0, takes_s=1.0)
    assert len(storage.times) <= 0.1 * storage.now[0] + 2


def test_many_jobs_that_end_at_once_are_written_a_few_times(tmp_path):
    """Each summary holds all jobs, so one at every job would be quadratic."""
    storage = run(tmp_path, 2000, every_s=0.001)
    whole = (tmp_path / "runs/r/0-of-1.summary.json").stat().st_size
    assert storage.written <= 14 * whole


def test_a_summary_of_many_jobs_is_as_old_as_a_minute_or_a_fiftieth_of_the_run(tmp_path):
    storage = run(tmp_path, 600, every_s=50.0)
    times = storage.times[::2]  # the summary and the metrics are written together
    gaps = list(pairwise(times))
    assert all(later - earlier <= max(60.0, 0.02 * later) + 50.0 for earlier, later in gaps)
    assert len(times) <= 60 + 50 * math.log(30_000 / 3000) + 10


def test_events_are_flushed_with_the_summary(storage):
    written = []
    events = EventLog(written.append, at_once=False, quiet=True)
    summary = writer(storage, events=events)
    events.emit("job_started", job="a")
    summary.add(JobLine(id="a", **OK))
    events.emit("run_finished")
    summary.finish(None, None)
    assert [json.loads(line)["event"] for line in b"".join(written).splitlines()] == ["job_started", "run_finished"]
    assert len(written) == 2


def read_families(path) -> list:
    return list(text_string_to_metric_families(path.read_text(encoding="utf-8")))


def test_metrics_of_two_shards_and_two_runs_have_no_series_in_common(tmp_path, storage):
    for run_id in ("night-1", "night-2"):
        for shard in ("0-of-2", "1-of-2"):
            summary = writer(storage, run_id=run_id, shard=shard)
            summary.add(failed("a", InputNotFound("x")), a_failure(caches={"pose_cache_hits": 1}))
            if shard == "1-of-2":  # the other one still runs
                summary.finish(None, None)
    families = [family for path in tmp_path.glob("runs/*/*.metrics.prom") for family in read_families(path)]
    series = [(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples]
    assert len(series) == len(set(series)) > 4 * 30
    assert len({(family.name, family.documentation, family.type) for family in families}) == len(families) / 4


def test_gpu_seconds_never_decrease_and_add_up_to_the_seconds_of_the_process(tmp_path, storage):
    """A job that is under way at a writing has worked for some seconds that are not noted yet."""
    clock = [0.0]
    summary = writer(storage, clock=lambda: clock[0])
    seconds = []

    def read_seconds() -> None:
        (found,) = (
            family for family in read_families(tmp_path / "runs/r/0-of-1.metrics.prom") if "gpu_s" in family.name
        )
        assert {sample.labels["device"] for sample in found.samples} == {"NVIDIA H200"}
        seconds.append({sample.labels["kind"]: sample.value for sample in found.samples})

    clock[0] = 10.0
    summary.note_loading(4.0)
    # (job, seconds of work, when it left the device, when it was published)
    for name, work_s, until, published in (
        ("a", 28.0, 40.0, 90.0),
        ("b", 60.0, 100.0, 200.0),
        ("c", 99.0, 200.0, 201.0),
    ):
        clock[0] = published
        summary.note_work(work_s, "NVIDIA H200", until)
        summary.add(JobLine(id=name, **OK))
        read_seconds()
    clock[0] = 210.0
    summary.finish(None, None)
    read_seconds()
    assert seconds == [
        {"work": 28.0, "loading": 6.0, "idle": 6.0},
        {"work": 88.0, "loading": 6.0, "idle": 6.0},
        {"work": 187.0, "loading": 6.0, "idle": 7.0},
        {"work": 187.0, "loading": 6.0, "idle": 17.0},
    ]
