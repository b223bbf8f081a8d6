"""Jobs that go on in their middle, with the stub generator: frames and files equal those of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runner.batch.lease import Leases
from runner.batch.progress import SilentProgress
from runner.errors import LeaseLost, StorageFull, StorageUnavailable
from runner.generation.protocol import DRIFT, ResumePoint
from runner.records.drift_record import DriftRecord
from runner.storage import LocalStorage, open_storage
from tests.batch.loop_bench import SIGTERM, Bench, bench
from tests.stub_generator import StubGenerator

__all__ = ["bench"]  # the fixture

SEGMENTS = 6


def six(bench: Bench, **settings) -> StubGenerator:
    """The generator of the next run: six segments of three frames."""
    bench.generator = StubGenerator(frames=18, segments=SEGMENTS, **settings)
    return bench.generator


def output(bench: Bench, name: str) -> dict[str, bytes]:
    """Every file of a job that is published, but for its record."""
    root = bench.folder / "out/jobs" / name
    files = {path for path in root.rglob("*") if path.is_file() and path.name != "result.json"}
    # The folder of frames has a token of its own in each attempt.
    return {
        "/".join(part for part in path.relative_to(root).parts if len(part) != 8 or "." in part): path.read_bytes()
        for path in files
    }


def undisturbed(bench: Bench, tmp_path: Path, **options) -> dict[str, bytes]:
    alone = Bench(tmp_path / "alone")
    six(alone)
    assert alone.run(alone.job("a", **options)) == 0
    return output(alone, "a")


class Places(SilentProgress):
    """Notes where each step was, and the phases."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def phase(self, job_id, phase):
        self.told.append(phase)

    def step(self, job_id, at):
        self.told.append(f"{at.segment}/{at.segments} {at.step}/{at.steps}")


class StopsAt(StubGenerator):
    """Told to stop, twice, when it has generated so many segments: the running job is given up at once."""

    def __init__(self, bench: Bench, after: int, *, middle: bool) -> None:
        super().__init__(frames=18, segments=SEGMENTS)
        self.bench, self.after, self.middle = bench, after, middle

    def generate(self, conditions, plan, timer, on_step=None, start=None):
        steps = self.after * plan.steps + (1 if self.middle else 0)

        def step(done: int, total: int) -> None:
            if done > steps:
                self.bench.stop.request(SIGTERM)
                self.bench.stop.request(SIGTERM)
            if on_step is not None:
                on_step(done, total)

        return super().generate(conditions, plan, timer, step, start)


@pytest.mark.parametrize("format", ["mp4", "png"])
@pytest.mark.parametrize("middle", [False, True], ids=["after", "in the middle"])
@pytest.mark.parametrize("done", [1, 2, 5])
def test_stopped_job_resumes_and_has_same_files(bench, tmp_path, done, middle, format):
    wanted = undisturbed(bench, tmp_path, output={"format": format})
    bench.generator = StopsAt(bench, done, middle=middle)
    assert bench.run(bench.job("a", output={"format": format})) == 143
    kept = {name.rpartition("/")[2] for name in bench.files("a")}
    assert kept == {f"{n:04d}.tar" for n in range(1, done + 1)} | {f"{done:04d}.state"}
    bench.stop = type(bench.stop)()
    generator = six(bench)
    assert bench.run(bench.job("a", output={"format": format}), run_id="r2") == 0
    assert generator.started_at == [done]
    assert output(bench, "a") == wanted
    record = bench.result("a")
    assert record["resumed_at_segment"] == done + 1
    assert f"resumed at segment {done + 1}/6" in record["notes"]
    assert record["attempt"] == 1
    assert record["efficiency"]["segments_generated"] == SEGMENTS - done
    assert len(record["steps_s"]) == 2 * (SEGMENTS - done)
    (told,) = [event for event in bench.events if event["event"] == "job_resumed"]
    assert (told["segment"], told["segments"]) == (done + 1, SEGMENTS)


def test_progress_of_retried_job_waits_and_begins_at_its_segment(bench):
    bench.progress = Places()
    six(bench)
    assert bench.run(bench.job("a", "flaky-at-4")) == 0
    steps = [f"{segment}/6 {step}/2" for segment in range(1, 7) for step in (1, 2)]
    first = ["loading the model", "preparing", "generating", *steps[:9], "waiting", "waiting"]
    assert bench.progress.told == [*first, "preparing", "generating", *steps[8:], "publishing"]


def test_job_killed_while_generating_resumes(bench, tmp_path):
    """The process ends several times without any cleanup. No attempt with progress counts."""
    wanted = undisturbed(bench, tmp_path)
    script = f"""
import os, sys
from pathlib import Path
from tests.batch.loop_bench import Bench
from tests.stub_generator import StubGenerator
bench = Bench(Path({str(bench.folder)!r}))
class Dies(StubGenerator):
    def generate(self, conditions, plan, timer, on_step=None, start=None):
        first = 0 if start is None else start.segment
        for segment in super().generate(conditions, plan, timer, on_step, start):
            yield segment
            if segment.index == first + 1:
                os.environ["STATE"] = str(segment.index)
                while not list((bench.folder / "out").rglob(f"{{segment.index + 1:04d}}.state")):
                    pass
                os._exit(9)
bench.generator = Dies(frames=18, segments=6)
bench.run(bench.job("a"), max_attempts=1)
"""
    root = Path(__file__).resolve().parents[2]
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 9
    generator = six(bench)
    assert bench.run(bench.job("a"), run_id="r2", max_attempts=1) == 0
    assert generator.started_at == [4]
    assert output(bench, "a") == wanted


def test_job_with_all_segments_kept_is_only_published(bench, tmp_path):
    wanted = undisturbed(bench, tmp_path)

    class Away(LocalStorage):
        def publish(self, local, key, **conditions):
            if key.endswith("output.mp4"):
                raise StorageUnavailable("away", where=key)
            return super().publish(local, key, **conditions)

    six(bench)
    assert bench.run(bench.job("a"), storage=Away(bench.folder / "out")) == 3
    generator = six(bench)
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert generator.started_at == [SEGMENTS]
    assert output(bench, "a") == wanted
    assert "resumed after segment 6/6" in bench.result("a")["notes"]


def test_retry_within_run_resumes_after_last_segment(bench, tmp_path):
    """A retryable error is raised in the fourth segment."""
    wanted = undisturbed(bench, tmp_path)
    generator = six(bench)
    assert bench.run(bench.job("a", "flaky-at-3")) == 0
    assert generator.started_at == [0, 3]
    assert output(bench, "a") == wanted


@pytest.mark.parametrize("place", ["cache", "off"])
def test_segments_kept_in_cache_or_not_at_all_give_same_output(bench, tmp_path, place):
    wanted = undisturbed(bench, tmp_path)
    bench.kept = open_storage(tmp_path / "cache") if place == "cache" else "off"
    bench.generator = StopsAt(bench, 3, middle=False)
    assert bench.run(bench.job("a")) == 143
    assert bench.files("a") == set()
    bench.stop = type(bench.stop)()
    generator = six(bench)
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert generator.started_at == [3 if place == "cache" else 0]
    assert output(bench, "a") == wanted
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "nothing is left there"


@pytest.mark.parametrize(
    ("change", "why"), [("device", "device: stub → another"), ("seed", "the kept segments were made with other inputs")]
)
def test_resume_with_unfit_segments_begins_again_with_reason(bench, tmp_path, change, why):
    bench.generator = StopsAt(bench, 3, middle=False)
    assert bench.run(bench.job("a")) == 143
    bench.stop = type(bench.stop)()
    options = {"seed": 7} if change == "seed" else {}
    wanted = undisturbed(bench, tmp_path, **options)
    generator = six(bench, device="another" if change == "device" else "stub")
    assert bench.run(bench.job("a", **options), run_id="r2") == 0
    assert generator.started_at == [0]
    assert output(bench, "a") == wanted
    record = bench.result("a")
    assert record["resumed_at_segment"] is None
    assert any(note.startswith(f"began at segment 1/6: {why}") for note in record["notes"]), record["notes"]
    assert [event["reason"].startswith(why) for event in bench.events if event["event"] == "job_not_resumed"] == [True]


def test_resumed_job_begins_again_if_generator_changes_device(bench, tmp_path):
    """For example, the blocks cannot be compiled this time, which shows in the first segment."""
    bench.generator = StopsAt(bench, 3, middle=False)
    assert bench.run(bench.job("a")) == 143
    bench.stop = type(bench.stop)()

    class Changing(StubGenerator):
        def generate(self, conditions, plan, timer, on_step=None, start=None):
            for segment in super().generate(conditions, plan, timer, on_step, start):
                self.device = "stub, eager"
                yield segment

    wanted = undisturbed(bench, tmp_path)
    generator = bench.generator = Changing(frames=18, segments=SEGMENTS)
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert generator.started_at == [3, 0]
    assert output(bench, "a") == wanted
    record = bench.result("a")
    assert record["resumed_at_segment"] is None
    assert record["efficiency"]["segments_generated"] == SEGMENTS
    assert record["notes"][-1] == "began at segment 1/6: device: stub → stub, eager"


def test_single_segment_or_unresumable_generator_keeps_no_segments(bench):
    bench.generator = StubGenerator(segments=1)
    bench.kept = open_storage(bench.folder / "kept")
    assert bench.run(bench.job("a")) == 0
    bench.generator = StubGenerator(segments=3, resumable=False)
    assert bench.run(bench.job("b")) == 0
    assert list(bench.kept.list()) == []


def test_damaged_segment_is_not_published(bench, tmp_path):
    wanted = undisturbed(bench, tmp_path)
    bench.generator = StopsAt(bench, 3, middle=False)
    assert bench.run(bench.job("a")) == 143
    (part,) = (bench.folder / "out").rglob("0002.tar")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    bench.stop = type(bench.stop)()
    generator = six(bench)
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert generator.started_at == [0]
    assert output(bench, "a") == wanted


@pytest.mark.parametrize("error", [StorageUnavailable, StorageFull])
def test_segments_that_cannot_be_kept_do_not_fail_job(bench, tmp_path, error):
    """The next segment is kept together with the missing one."""
    wanted = undisturbed(bench, tmp_path)

    class AwayOnce(LocalStorage):
        failures = 2

        def publish(self, local, key, **conditions):
            if "/parts/" in key and "0002" in key and self.failures:
                self.failures -= 1
                raise error("away", where=key)
            return super().publish(local, key, **conditions)

    bench.kept = AwayOnce(tmp_path / "kept")
    bench.generator = StopsAt(bench, 4, middle=False)
    assert bench.run(bench.job("a")) == 143
    assert "segment_not_kept" in [event["event"] for event in bench.events]
    bench.stop = type(bench.stop)()
    generator = six(bench)
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert generator.started_at == [4]
    assert output(bench, "a") == wanted


def test_stop_signal_ends_job_after_running_segment(bench):
    """A segment takes 0.6 s. The time that is left fits the running one alone, however long encoding takes."""
    bench.stop = type(bench.stop)(drain_s=1.1)

    class Signalled(StubGenerator):
        def generate(self, conditions, plan, timer, on_step=None, start=None):
            def step(done: int, total: int) -> None:
                if done == 2 * 10 + 1:
                    bench.stop.request(signal.SIGTERM)
                if on_step is not None:
                    on_step(done, total)

            return super().generate(conditions, plan, timer, step, start)

    bench.generator = Signalled(frames=18, segments=SEGMENTS, generate_s=0.6 * SEGMENTS)
    assert bench.run(bench.job("a", steps=10)) == 143
    assert [name.rpartition("/")[2] for name in bench.files("a") if name.endswith(".state")] == ["0003.state"]
    assert "attempt.json" not in bench.files("a"), "it was given back"


def test_segment_that_cannot_end_in_time_is_abandoned_at_once(bench):
    """The run does not wait for the end of the remaining time."""
    bench.stop = type(bench.stop)(drain_s=30.0)
    seen = []

    class Signalled(StubGenerator):
        def generate(self, conditions, plan, timer, on_step=None, start=None):
            def step(done: int, total: int) -> None:
                seen.append(done)
                if done == 4:
                    bench.stop.request(signal.SIGTERM)
                if on_step is not None:
                    on_step(done, total)

            return super().generate(conditions, plan, timer, step, start)

    bench.generator = Signalled(frames=18, segments=2, generate_s=200.0)
    assert bench.run(bench.job("a", steps=100)) == 143
    assert len(seen) <= 5, "a segment takes 100 s"
    assert bench.files("a") == set()


def test_state_names_device_and_versions(bench):
    bench.generator = StopsAt(bench, 2, middle=False)
    assert bench.run(bench.job("a")) == 143
    from safetensors import safe_open

    (state,) = (bench.folder / "out").rglob("*.state")
    with safe_open(state, "numpy") as file:
        header = json.loads(file.metadata()["video_lab"])
    assert header["identity"]["device"] == "stub"
    assert {"version of torch", "version of av", "driver"} <= header["identity"].keys()
    assert os.path.getsize(state) < 10_000


class Suspended(StubGenerator):
    """In its third segment: another runner takes the job over, finishes it and tidies, all while this one stands still.

    What this one has kept lies there again afterwards, as of requests that arrive late.
    """

    def __init__(self, bench: Bench, finished: dict[str, bytes]) -> None:
        super().__init__(frames=18, segments=SEGMENTS)
        self.bench, self.finished = bench, finished

    def generate(self, conditions, plan, timer, on_step=None, start=None):
        job = self.bench.folder / "out/jobs/a"

        def step(done: int, total: int) -> None:
            if done == 2 * plan.steps + 1:
                wait_until(lambda: list(job.rglob("0002.state")))
                (job / "attempt.json").unlink()
                for name, data in self.finished.items():
                    (job / name).write_bytes(data)
            if done > 2 * plan.steps:
                wait_until(lambda: self.bench.lost)
            on_step(done, total)

        return super().generate(conditions, plan, timer, step, start)


def test_late_segments_of_suspended_runner_are_removed_from_done_job(bench, monkeypatch):
    six(bench)
    assert bench.run(bench.job("a")) == 0
    folder = bench.folder / "out/jobs/a"
    finished = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shutil.rmtree(folder)
    update, bench.lost = Leases.update, False

    def watched(leases: Leases, job_id: str, **changes) -> bool:
        try:
            return update(leases, job_id, **changes)
        except LeaseLost:
            bench.lost = True
            raise

    monkeypatch.setattr(Leases, "update", watched)
    bench.generator = Suspended(bench, finished)
    assert bench.run(bench.job("a"), run_id="r2", lease_s=0.6) == 0
    assert [event["event"] for event in bench.events if event["event"] == "lease_lost"] == ["lease_lost"]
    assert bench.summary["jobs"][0]["reason"] == "done"
    assert bench.files("a") == finished.keys()
    assert bench.result("a")["run_id"] == "r1"


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Drifts(StopsAt):
    """Says how its segments drift: by one delta E more in each."""

    def generate(self, conditions, plan, timer, on_step=None, start=None):
        rows = [] if start is None else list(start.values["drift"]["segments"])
        for segment in super().generate(conditions, plan, timer, on_step, start):
            rows.append({"segment": segment.index + 1, "remaining": float(segment.index), "share": 0.5, "laplacian": 1})
            drift = DriftRecord(colour="off", against="first segment", segments=rows)
            point = segment.resume
            values = {**point.values, DRIFT: drift.model_dump(mode="json")}
            yield replace(segment, drift=drift, resume=ResumePoint(point.segment, point.arrays, values))


@pytest.mark.parametrize("done", [2, SEGMENTS])
def test_record_of_resumed_job_has_drift_of_all_segments(bench, done, monkeypatch):
    """This holds also where every segment was kept and none is generated any more."""
    bench.generator = Drifts(bench, min(done, SEGMENTS - 1), middle=done < SEGMENTS)
    if done == SEGMENTS:  # everything is kept, and the output cannot be published
        bench.generator = Drifts(bench, SEGMENTS, middle=True)
        bench.out = FullAtTheEnd(bench.folder / "out")
        assert bench.run(bench.job("a")) != 0
        bench.out = LocalStorage(bench.folder / "out")
    else:
        assert bench.run(bench.job("a")) == 143
    bench.stop = type(bench.stop)()
    bench.generator = Drifts(bench, SEGMENTS, middle=True)
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert bench.generator.started_at == [done]
    record = bench.result("a")
    assert [row["segment"] for row in record["drift"]["segments"]] == list(range(1, SEGMENTS + 1))
    (warning,) = record["warnings"]
    assert "segment 6 of 6 are 5.0 delta E" in warning
    assert any(event["event"] == "job_warning" and event["message"] == warning for event in bench.events)


class FullAtTheEnd(LocalStorage):
    """Keeps the segments, but takes no output."""

    def publish(self, path, key, **more):
        if key.endswith("output.mp4"):
            raise StorageFull("full", where=key)
        return super().publish(path, key, **more)
