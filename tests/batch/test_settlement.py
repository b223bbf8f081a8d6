"""How jobs end: failures, further attempts, what stops a run; through the loop with a stub generator."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from runner.batch.queues import WorkList
from runner.batch.settlement import RETRY_DELAY_S
from runner.errors import StorageFull, StorageUnavailable, WeightsCorrupt, WeightsMissing
from runner.generation.protocol import Generator
from runner.records.record import AttemptMark
from runner.storage import LocalStorage
from runner.verbs.status import read_run_status
from tests.batch.loop_bench import bench
from tests.stub_generator import StubGenerator

__all__ = ["bench"]  # a fixture


def test_missing_input_fails_job_and_keeps_older_output(bench):
    bench.run(bench.job("a"), bench.job("b"))
    bench.video.unlink()
    assert bench.run(bench.job("a"), run_id="r2") == 1
    assert bench.summary["jobs"][0]["error"]["code"] == "input.not_found"
    assert bench.result("a")["status"] == "succeeded"
    assert "output.mp4" in bench.files("a")


def test_missing_input_of_new_job_is_recorded(bench):
    bench.video.unlink()
    assert bench.run(bench.job("a")) == 1
    assert bench.result("a")["error"]["code"] == "input.not_found"
    assert "video.mp4" in bench.result("a")["error"]["message"]
    assert bench.loads == 0


def test_failed_rerun_removes_stale_output_with_note(bench):
    bench.run(bench.job("a"))
    assert bench.run(bench.job("a", "fail-generate"), run_id="r2") == 1
    assert bench.files("a", parts=False) == {"result.json"}
    assert bench.result("a")["notes"] == ["the output of an earlier run was removed"]


def test_retryable_error_is_retried(bench):
    assert bench.run(bench.job("a", "flaky"), bench.job("b")) == 0
    assert bench.result("a")["attempt"] == 2
    assert bench.result("a")["reason"] == "retry after storage.unavailable"
    assert [line["status"] for line in bench.summary["jobs"]] == ["succeeded", "succeeded"]


def test_out_of_memory_is_tried_twice_then_fails(bench):
    """The exit code is 1, not 3: a scheduler that starts the same command again would only pay for the same result."""
    assert bench.run(bench.job("a", "oom"), bench.job("b")) == 1
    assert bench.generator.tries["oom"] == 2
    assert bench.result("a")["error"] == bench.result("a")["error"] | {
        "code": "resource.out_of_memory",
        "retryable": True,
    }
    assert bench.result("b")["status"] == "succeeded"


def test_job_with_max_attempts_1_is_not_retried(bench):
    assert bench.run(bench.job("a", "oom"), bench.job("b", "flaky"), max_attempts=1) == 1
    assert bench.generator.tries == {"oom": 1, "flaky": 1}


def test_unavailable_storage_is_tried_three_times_in_every_run(bench, monkeypatch):
    """Otherwise an outage of minutes would use up all attempts, and the rerun after exit code 3 would run nothing."""
    asked = []

    def away(*_):
        asked.append(1)
        raise StorageUnavailable("the stub's store is away")

    monkeypatch.setattr(StubGenerator, "prepare", away)
    for run in (1, 2):
        assert bench.run(bench.job("a"), run_id=f"r{run}") == 3
        assert (len(asked), bench.result("a")["attempt"]) == (3 * run, 3 * run)
    monkeypatch.undo()
    assert bench.run(bench.job("a"), run_id="r3") == 0


@pytest.mark.parametrize(("max_attempts", "tries"), [(0, 3), (2, 2), (3, 3), (9, 3)])
def test_retries_in_one_run_are_at_most_two_with_doubled_wait(bench, monkeypatch, max_attempts, tries):
    """The limit holds however many attempts a job may have in all its runs. The waits are two seconds, then four."""
    asked, waits, put_back = [], [], WorkList.put_back

    def away(*_):
        asked.append(1)
        raise StorageUnavailable("the stub's store is away")

    def at_once(self, item, delay_s=0.0, rank=0):
        waits.append(delay_s)
        return put_back(self, item, 0.0, rank)

    monkeypatch.setattr(StubGenerator, "prepare", away)
    monkeypatch.setattr(WorkList, "put_back", at_once)
    monkeypatch.setattr("runner.batch.settlement.RETRY_DELAY_S", RETRY_DELAY_S)
    assert bench.run(bench.job("a"), max_attempts=max_attempts) == 3
    assert len(asked) == tries
    assert waits == [2.0, 4.0][: tries - 1]
    assert [event["wait_s"] for event in bench.events if event["event"] == "job_retry"] == waits


def test_job_with_used_up_attempts_is_not_run_and_not_retryable(bench):
    for run in (1, 2):
        assert bench.run(bench.job("a", "oom"), run_id=f"r{run}") == 1
    assert bench.generator.tries == {"oom": 3}
    assert bench.run(bench.job("a", "oom"), run_id="r3") == 1
    assert bench.generator.tries == {"oom": 3}
    assert "--max-attempts 0" in bench.summary["jobs"][0]["reason"]
    assert not bench.summary["jobs"][0]["error"]["retryable"]


def test_generator_without_lower_memory_mode_logs_memory_is_lowest(bench):
    class Plain(StubGenerator):
        fall_back_memory_mode = Generator.fall_back_memory_mode  # the protocol's own answer

    bench.generator = Plain()
    assert bench.run(bench.job("a", "oom")) == 1
    assert "memory_is_lowest" in [event["event"] for event in bench.events]


class Stepping(StubGenerator):
    """Has memory for `oom` jobs once it was told to hold less; `broken`: it cannot be loaded that way."""

    lowered, broken = 0, False

    def fall_back_memory_mode(self) -> bool:
        self.lowered += 1
        if self.broken:
            raise WeightsMissing("gone")
        return True

    def generate(self, conditions, plan, timer, on_step=None, start=None):
        if self.lowered:
            conditions.request = replace(conditions.request, prompt="ok")
        timer.forecast["denoise"] = 7
        return super().generate(conditions, plan, timer, on_step, start)


def test_out_of_memory_lowers_memory_mode_once_and_is_retried(bench):
    bench.generator = Stepping()
    assert bench.run(bench.job("a", "oom"), bench.job("b")) == 0
    assert bench.generator.lowered == 1
    assert bench.result("a")["attempt"] == 2
    assert bench.result("a")["memory"]["forecast"] == {"denoise": 7}
    assert "memory_lowered" in [event["event"] for event in bench.events]


def test_memory_mode_is_lowered_for_job_that_failed_before(bench):
    bench.generator = Stepping()
    assert bench.run(bench.job("a", "oom"), max_attempts=1) == 1
    assert bench.generator.lowered == 0, "lowered for nothing: there was no try left"
    assert bench.run(bench.job("a", "oom"), run_id="r2") == 0
    assert (bench.generator.lowered, bench.result("a")["attempt"]) == (1, 3)


def test_model_that_cannot_load_in_lower_memory_mode_ends_run(bench):
    bench.generator = Stepping(frames=6)
    bench.generator.broken = True
    assert bench.run(bench.job("a", "oom"), bench.job("b"), bench.job("c")) == 2
    assert bench.generator.lowered == 1
    assert "engine_failed" in [event["event"] for event in bench.events]
    assert bench.summary["stopped_by"] is not None


class FullDisk(LocalStorage):
    """Takes the outputs of job `a`, then is full."""

    def publish(self, local, key, **conditions):
        if "/a/" not in key:
            raise StorageFull("no space left on the device", where=key)
        return super().publish(local, key, **conditions)


def test_full_disk_stops_run_and_keeps_done_jobs(bench):
    bench.generator = StubGenerator(generate_s=0.2)
    jobs = [bench.job(name) for name in "abcde"]
    assert bench.run(*jobs, storage=FullDisk(bench.folder / "out")) == 3
    assert bench.result("a")["status"] == "succeeded"
    assert bench.summary["counts"]["not_run"] >= 1
    assert bench.summary["stopped_by"]
    assert bench.run(*jobs, run_id="r2") == 0
    assert [line["status"] for line in bench.summary["jobs"]] == ["skipped", *["succeeded"] * 4]


def test_weights_that_cannot_load_stop_run_with_2(bench, monkeypatch):
    def load():
        raise WeightsCorrupt("truncated", where="transformer.safetensors")

    monkeypatch.setattr(StubGenerator, "prepare", lambda *_: load())
    assert bench.run(bench.job("a"), bench.job("b"), bench.job("c")) == 2
    assert bench.summary["counts"]["not_run"] >= 1


def test_job_that_crashes_process_three_times_is_not_run_again(bench, tmp_path):
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from tests.batch.loop_bench import Bench
        bench = Bench(Path({str(tmp_path)!r}))
        bench.run(bench.job("a"), bench.job("bad", "crash"), bench.job("c"), run_id=sys.argv[1])
    """)
    for run in ("c1", "c2", "c3"):
        done = subprocess.run([sys.executable, "-c", script, run], cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == 9
    # its neighbours died with it in the first run; from the second on the suspects ran last and alone
    for name in "ac":
        assert bench.result(name)["status"] == "succeeded"
        assert bench.result(name)["attempt"] <= 2
    assert bench.run(bench.job("a"), bench.job("bad", "crash"), bench.job("c"), run_id="c4") == 1
    assert bench.result("bad")["error"]["code"] == "job.crashed"
    assert bench.result("bad")["attempt"] == 3
    assert bench.summary["counts"]["skipped"] == 2


def test_status_of_crashed_forced_rerun_is_lost_until_next_run(bench):
    bench.run(bench.job("a"))
    (bench.folder / "out/jobs/a/attempt.json").write_bytes(
        AttemptMark(job_id="a", attempt=1, fingerprint="f", run_id="r", host="h", started_at="t").to_json()
    )
    assert [row.status for row in read_run_status(bench.out).rows] == ["lost"]
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert [row.status for row in read_run_status(bench.out).rows] == ["succeeded"]
