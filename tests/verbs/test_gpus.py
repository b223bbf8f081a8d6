"""GPUs: several processes on one manifest. They compute nothing, or the stub's frames; the places have no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

import runner.verbs.gpus as gpus_module
import runner.verbs.run as run_verb
from runner.batch.loop import Engine
from runner.batch.shared_run import SharedRun
from runner.batch.stop import Stop
from runner.errors import ConfigInvalid
from runner.launch.mailbox import Mailbox
from runner.records.record import JobLine
from runner.regression.kept_limits import limits_by_job
from runner.spec.manifest import parse_manifest
from runner.spec.regression_limits import RegressionLimits
from runner.storage import open_storage
from runner.verbs.gpus import GpuPlace, find_gpus, places_for, run_processes
from runner.verbs.settings import RunSettings
from tests.stub_generator import StubGenerator
from tests.verbs import gpu_children
from tests.verbs.gpu_children import MINE
from tests.verbs.test_run import Watched, limited

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path, demo_media):
    """settings(ids, **more): of a run whose jobs are the demo's files, rendered by whatever the test says."""
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}

    def make(ids: str = "a", **more: Any) -> RunSettings:
        jobs = [{"id": name, **place, "prompt": "ok", "options": {"seed": ord(name)}} for name in ids]
        manifest = parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=".", source="m.json")
        common = {"manifest": manifest, "out": str(tmp_path / "out"), "cache": tmp_path / "cache"}
        return RunSettings(**common | {"run_id": "r1", "shard": "any"} | more)

    return make


def start(
    settings: RunSettings,
    run: Callable[..., Any],
    processes: int = 2,
    progress: Any = None,
    stop: Stop | None = None,
    **more: Any,
) -> tuple[SharedRun, list[dict[str, Any]]]:
    """What the processes came to, and the log."""
    places = [GpuPlace(f"GPU {index}", {MINE: str(index)}) for index in range(processes)]
    ids = [job.id for job in settings.manifest.jobs]
    stop = stop or Stop(settings.drain_s)
    with capture_logs() as events:
        shared = run_processes(settings, places, run, ids, progress or Watched(), stop=stop, **more)
    return shared, events


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def statuses(lines: tuple[JobLine, ...]) -> dict[str, str]:
    return {line.id: line.status for line in lines}


# -- which GPUs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "variables", "count", "expected"),
    [
        ("all", {}, 3, ["0", "1", "2"]),
        ("0,2", {}, 3, ["0", "2"]),
        ("1", {}, 2, ["1"]),
        ("all", {"CUDA_VISIBLE_DEVICES": "3,1"}, 8, ["3", "1"]),
        ("1", {"CUDA_VISIBLE_DEVICES": "3,1"}, 8, ["1"]),
        ("0", {"CUDA_VISIBLE_DEVICES": "GPU-8f2e, MIG-11"}, 0, ["GPU-8f2e"]),
        ("all", {"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 4, ["0", "1"]),
    ],
)
def test_find_gpus_returns_requested_gpus(asked, variables, count, expected):
    assert find_gpus(asked, variables, lambda: count) == expected


@pytest.mark.parametrize(
    ("asked", "variables", "count", "message"),
    [
        ("all", {}, 0, "the driver of this machine finds no GPU"),
        ("all", {"CUDA_VISIBLE_DEVICES": ""}, 4, "CUDA_VISIBLE_DEVICES= names no GPU"),
        ("all", {"CUDA_VISIBLE_DEVICES": "-1"}, 4, "names no GPU"),
        ("0,3", {}, 3, "no GPU 3: the driver has 3"),
        ("2", {"CUDA_VISIBLE_DEVICES": "6,7"}, 8, "no GPU 2: CUDA_VISIBLE_DEVICES=6,7 has 2"),
    ],
)
def test_find_gpus_refuses_missing_gpus(asked, variables, count, message):
    with pytest.raises(ConfigInvalid, match=r"^--gpus: ") as caught:
        find_gpus(asked, variables, lambda: count)
    assert message in caught.value.message
    assert caught.value.todo


def test_run_with_gpus_but_no_gpu_is_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigInvalid, match="names no GPU"):
        run_verb.run(RunSettings(manifest="gone.yaml", out=str(tmp_path / "out"), gpus="all"))
    assert not (tmp_path / "out").exists()


def test_run_with_gpus_refuses_source(settings):
    with pytest.raises(ConfigInvalid, match="not from a source"):
        run_verb.run(settings(gpus="all"), source=Mailbox())


def test_places_for_divides_cores():
    variables = {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    places = places_for(["4", "5", "6"], variables, cpus=32)
    assert [place.name for place in places] == ["GPU 4", "GPU 5", "GPU 6"]
    assert places_for(["GPU-8f2e"], variables)[0].name == "GPU-8f2e"
    threads = {"OMP_NUM_THREADS": "10", "MKL_NUM_THREADS": "10", "OPENBLAS_NUM_THREADS": "10"}
    assert places[1].variables == threads | {"CUDA_VISIBLE_DEVICES": "5"}
    assert places_for(["0"] * 8, variables, cpus=4)[0].variables["OMP_NUM_THREADS"] == "1"


def test_places_for_keeps_values_of_environment():
    """A chosen number of threads stays; without chosen GPUs, CUDA orders them as the driver does."""
    chosen = places_for(["0", "1"], {"OMP_NUM_THREADS": "7"}, cpus=32)[0].variables
    assert "OMP_NUM_THREADS" not in chosen
    assert (chosen["MKL_NUM_THREADS"], chosen["CUDA_DEVICE_ORDER"]) == ("16", "PCI_BUS_ID")
    assert (
        places_for(["0"], {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})[0].variables["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    )


# -- real processes ----------------------------------------------------------------------------------------------------


def test_two_gpu_processes_finish_one_manifest(settings, tmp_path):
    """There is one line per job in manifest order, one progress view, and one summary per process under one run id."""
    watched = Watched()
    given = limited(settings("abcdef"), *[RegressionLimits(psnr_min=30)] * 6)
    shared, events = start(given, gpu_children.run_stub, progress=watched)
    assert shared.exit_code == 0
    assert limits_by_job(open_storage(tmp_path / "out")) == dict.fromkeys("abcdef", RegressionLimits(psnr_min=30))
    assert [(line.id, line.status) for line in shared.lines] == [(name, "succeeded") for name in "abcdef"]
    records = [json.loads((tmp_path / f"out/jobs/{name}/result.json").read_bytes()) for name in "abcdef"]
    assert {record["status"] for record in records} == {"succeeded"}
    assert len(list((tmp_path / "out/runs/r1").glob("*.summary.json"))) == 2
    assert watched.told[0] == ("started", 6)
    assert watched.told[-1] == ("close",)
    finished = [told[1] for told in watched.told if told[0] == "finished"]
    assert sorted(finished) == list("abcdef")  # each once, though the other process skips it
    assert {told[1] for told in watched.told if told[0] == "step"} <= set("abcdef")
    assert {event["gpu"] for event in named(events, "run_finished")} == {"GPU 0", "GPU 1"}
    assert [event["log_level"] for event in named(events, "run")] == ["debug"] * 2  # the command says it once

    shared, events = start(settings("abcdef"), gpu_children.run_stub)
    assert statuses(shared.lines) == dict.fromkeys("abcdef", "skipped")
    assert shared.exit_code == 0
    assert sorted(event["job"] for event in named(events, "job_skipped")) == list("abcdef")  # said once, not by each
    assert not named(events, "stub_loaded")


def test_gpu_process_has_own_place_and_session(settings):
    places = places_for(["0", "7"], {"CUDA_VISIBLE_DEVICES": "0,7"}, cpus=6)
    with capture_logs() as events:
        run_processes(settings(), places, gpu_children.tell_environment, ["a"], Watched(), stop=Stop())
    told = sorted(named(events, "environment"), key=lambda event: event["gpu"])
    assert [(event["gpu"], event["CUDA_VISIBLE_DEVICES"]) for event in told] == [("GPU 0", "0"), ("GPU 7", "7")]
    assert {event["OMP_NUM_THREADS"] for event in told} == {event["OPENBLAS_NUM_THREADS"] for event in told} == {"3"}
    assert [event["session"] for event in told] == [event["pid"] for event in told]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None


def test_run_with_gpus_starts_one_process_per_gpu(settings, monkeypatch, tmp_path):
    """`run` with `gpus` passes the settings to the processes; the contact sheet is drawn once, at the end."""
    verb = run_verb.run
    monkeypatch.setattr("runner.verbs.run.find_gpus", lambda asked, variables: ["0", "1", "2"])
    monkeypatch.setattr("runner.verbs.run.build_engine", lambda *_: Engine("stub", {}, StubGenerator))
    monkeypatch.setattr("runner.verbs.run.run", gpu_children.tell_settings)
    watched = Watched()
    with capture_logs() as events:
        outcome = verb(settings("ab", gpus="all", shard=None, sheet=tmp_path / "sheet.png"), watched)
    told = named(events, "settings")
    assert len(told) == 3
    (first,) = named(events, "run")
    assert (first["log_level"], first["jobs"], first["gpus"]) == ("info", 2, ["GPU 0", "GPU 1", "GPU 2"])
    assert {(e["processes"], e["run_id"], e["shard"], e["gpus"]) for e in told} == {(3, "r1", "any", None)}
    assert (outcome.exit_code, outcome.run_id, str(outcome.shard)) == (0, "r1", "any")
    assert outcome.counts == {"total": 2, "succeeded": 2, "skipped": 0, "failed": 0, "not_run": 0}
    assert outcome.shard_reason == "--gpus all: one process on each of GPU 0, GPU 1, GPU 2"
    assert outcome.outputs == f"{tmp_path}/out/jobs/"
    assert outcome.sheet is not None


# -- death -------------------------------------------------------------------------------------------------------------


def test_jobs_of_killed_gpu_process_are_taken_over_by_others(settings):
    shared, events = start(settings("abcd"), partial(gpu_children.run_stub, dies_at="1"))
    assert statuses(shared.lines) == dict.fromkeys("abcd", "succeeded")
    assert shared.exit_code == 0
    (died,) = named(events, "gpu_process_died")
    assert (died["gpu"], died["how"], died["log_level"]) == ("GPU 1", "Killed", "error")


def test_finished_job_of_killed_gpu_process_counts(settings):
    """Its finished job counts; the exit code says that a rerun has work left."""
    watched = Watched()
    shared, _ = start(settings("abcd"), partial(gpu_children.render_some, first="ab", second="c"), 2, watched)
    assert statuses(shared.lines) == {"a": "succeeded", "b": "succeeded", "c": "succeeded", "d": "not_run"}
    assert shared.exit_code == 3
    assert sorted(told[1] for told in watched.told if told[0] == "finished") == list("abc")


def test_library_message_of_gpu_process_is_logged(settings, capfd):
    _, events = start(settings("a"), gpu_children.warn, 1)
    (told,) = named(events, "library_message")
    assert (told["log_level"], told["logger"]) == ("warning", "transformers.models")
    assert (told["message"], told["gpu"]) == ("torchvision is not installed", "GPU 0")
    assert capfd.readouterr().err == ""


def test_job_progress_is_open_until_own_gpu_process_ends(settings):
    """Another process that reads the job and skips it reports nothing about it."""
    watched = Watched()
    start(settings("a"), gpu_children.die_generating, 2, watched)
    assert [told[0] for told in watched.told] == ["started", "phase", "step", "phase", "close"]
    assert [told[2] for told in watched.told if told[0] == "phase"] == ["generating", "waiting"]


def test_gpu_processes_all_killed_exit_3(settings):
    shared, events = start(settings("ab"), partial(gpu_children.run_stub, dies_at="0"), processes=1)
    assert statuses(shared.lines) == {"a": "not_run", "b": "not_run"}
    assert shared.exit_code == 3
    assert len(named(events, "gpu_process_died")) == 1


def test_error_of_all_gpu_processes_is_raised(settings):
    with pytest.raises(ConfigInvalid) as caught:
        start(settings(), partial(gpu_children.fail, places="0"), 1)
    assert caught.value.message == "the test: this cannot be. Leave it"
    assert (caught.value.where, caught.value.todo) == ("the test", "Leave it")


def test_error_of_one_gpu_process_is_logged_and_bug_with_traceback(settings):
    shared, events = start(settings(), partial(gpu_children.fail, places="1", bug=True))
    assert (shared.exit_code, statuses(shared.lines)) == (0, {"a": "succeeded"})
    (failed,) = named(events, "gpu_process_failed")
    assert (failed["gpu"], failed["code"]) == ("GPU 1", "internal")
    (broke,) = named(events, "gpu_process_broke")
    assert "in fail" in broke["exception"] and "a bug of the test's" in broke["exception"]


@pytest.mark.parametrize(("places", "done", "cause"), [("0", "ab", None), ("1", "a", "1"), ("01", "", "0")])
def test_error_of_stopped_gpu_process_is_cause_if_jobs_are_left(settings, places, done, cause):
    shared, _ = start(settings("ab"), partial(gpu_children.stop_early, places=places, done=done))
    assert shared.exit_code == (0 if cause is None else 3)
    error = shared.error
    assert error is None if cause is None else (error.code, error.where) == ("device.lost", cause)


# -- signals -----------------------------------------------------------------------------------------------------------


class Signaller:
    """Sends signals to its own thread, each when the log has an event so many times.

    A signal to the process goes to any of its threads, most often to the main one, whose poll it interrupts. One to
    this thread shows that the poll ends without that.
    """

    def __init__(self, *steps: tuple[str, int, int]) -> None:
        self.events: list[dict[str, Any]] = []
        self.ended = threading.Event()  # of the processes: a signal would end the tests now
        self.thread = threading.Thread(target=self._send, args=(steps,))
        self.thread.start()

    def _send(self, steps: tuple[tuple[str, int, int], ...]) -> None:
        for event, count, signum in steps:
            while len(named(self.events, event)) < count:
                if self.ended.wait(0.01):
                    return
            signal.pthread_kill(threading.get_ident(), signum)


def start_signalled(settings: RunSettings, run: Callable[..., Any], *steps: tuple[str, int, int]) -> Any:
    places = [GpuPlace(f"GPU {index}", {MINE: str(index)}) for index in range(2)]
    with capture_logs() as events:
        signaller = Signaller(*steps)
        signaller.events = events
        try:
            shared = run_processes(settings, places, run, ["a"], Watched(), stop=Stop(settings.drain_s))
        finally:
            signaller.ended.set()
            signaller.thread.join()
    return shared, events


def test_signal_reaches_each_gpu_process_once(settings):
    """A second signal would stop at once. A signal that a scheduler sends directly to all processes is not counted."""
    shared, events = start_signalled(settings(), gpu_children.wait_for_stop, ("ready", 2, signal.SIGTERM))
    assert [event["direct"] for event in named(events, "ready")] == [False, False]
    stopped = [(event["name"], event["at_once"]) for event in named(events, "stopped")]
    assert stopped == [("SIGTERM", False)] * 2
    assert (shared.exit_code, statuses(shared.lines)) == (143, {"a": "not_run"})


def test_second_signal_is_passed_to_gpu_processes(settings):
    run = partial(gpu_children.wait_for_stop, at_once="yes")
    shared, events = start_signalled(settings(), run, ("ready", 2, signal.SIGINT), ("told", 2, signal.SIGTERM))
    assert [event["at_once"] for event in named(events, "stopped")] == [True, True]
    assert shared.exit_code == 130


def test_gpu_process_that_does_not_end_is_killed(settings, monkeypatch):
    monkeypatch.setattr(gpus_module, "END_S", 0.2)
    begin = time.monotonic()
    shared, events = start_signalled(settings(drain_s=0.1), gpu_children.never_end, ("ready", 2, signal.SIGTERM))
    assert time.monotonic() - begin < 60
    assert {event["gpu"] for event in named(events, "gpu_process_killed")} == {"GPU 0", "GPU 1"}
    assert shared.exit_code == 143


def test_gpu_processes_end_when_parent_is_killed(tmp_path):
    """A parent that SIGKILL ends cannot send a message; the closed connection ends the processes."""
    script = textwrap.dedent(
        """
        import sys
        from functools import partial
        from runner.batch.progress import SilentProgress
        from runner.batch.stop import Stop
        from runner.verbs.gpus import GpuPlace, run_processes
        from runner.verbs.settings import RunSettings
        from tests.verbs.gpu_children import MINE, wait_for_stop

        places = [GpuPlace(f"GPU {n}", {MINE: str(n)}) for n in range(2)]
        run = partial(wait_for_stop, folder=sys.argv[1])
        run_processes(RunSettings(manifest="m", out="o"), places, run, ["a"], SilentProgress(), stop=Stop())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    notes = [tmp_path / "0", tmp_path / "1"]

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 60
        while not all(note.is_file() and note.read_text() == text for note in notes):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    try:
        wait_for("ready")
    finally:
        parent.kill()
        parent.wait()
    wait_for("SIGTERM False")


def test_model_files_are_read_once_before_first_gpu_process_loads(settings):
    reads: list[int] = []
    with capture_logs() as seen:

        def read(go_on: Callable[[], bool]) -> None:
            assert go_on()
            reads.append(1)
            deadline = time.monotonic() + 60
            while len(named(seen, "before_load")) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)  # a process that did not wait would have loaded by now
            reads.append(len(named(seen, "loaded")))

        places = [GpuPlace(f"GPU {index}", {}) for index in range(3)]
        shared = run_processes(
            settings(), places, gpu_children.load_model, ["a"], Watched(), stop=Stop(), read_files=read
        )
    assert reads == [1, 0]
    assert len(named(seen, "loaded")) == 3
    assert shared.exit_code == 0


def test_unreadable_model_files_do_not_stop_gpu_process(settings):
    def read(go_on: Callable[[], bool]) -> None:
        raise OSError("the disk is gone")

    shared, events = start(settings(), gpu_children.load_model, 1, read_files=read)
    assert len(named(events, "loaded")) == 1
    assert named(events, "model_files_not_read")[0]["message"] == "the disk is gone"
    assert shared.exit_code == 0
