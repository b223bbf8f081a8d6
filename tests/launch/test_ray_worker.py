"""Ray worker: messages, jobs and signals, without Ray. What a worker runs is a function of the test's."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runner.errors import ConfigInvalid
from runner.generation.protocol import JobDemand
from runner.launch import ray_worker
from runner.launch.ray_actor import make_actor_class
from runner.launch.ray_worker import RayWorker, WorkerOrder, describe_code
from runner.records.record import JobLine
from runner.spec.manifest import Job
from runner.spec.options import JobOptions


@dataclass(frozen=True)
class Settings:
    out: str
    drain_s: float = 1.0
    device: str = "auto"


@dataclass
class Ended:
    exit_code: int
    lines: tuple[JobLine, ...] = ()
    error: Any = None
    seen: list[Any] = field(default_factory=list)


def job(name: str) -> Job:
    return Job(name, "r.png", "v.mp4", None, "", JobOptions(), None)


def take_all(settings: Settings, progress: Any, *, source: Any, share: Any) -> Ended:
    """Ends each job at once, until no more come or a signal does."""
    progress.phase(settings.device, "preparing")
    while (todo := source.take()) is not None:
        progress.finished(JobLine(id=todo.job.id, status="succeeded", reason="test"))
        source.settle()
    return Ended(share.processes)


def wait_for_stop(settings: Settings, progress: Any, *, source: Any, share: Any) -> Ended:
    assert share.stop.requested.wait(60)
    return Ended(share.stop.exit_code)


def order(run: Any, out: Path, **more: Any) -> WorkerOrder:
    return WorkerOrder(run, Settings(str(out)), workers=7, gpu=False, folder=os.getcwd(), **more)


def messages_of(worker: RayWorker, until: str = "ended") -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    while not found or found[-1][0] not in (until, "failed"):
        seen, more = worker.fetch(len(found), 60.0)
        found += more
        assert seen == len(found)
    return found


def test_jobs_go_in_and_messages_come_out(tmp_path):
    worker = RayWorker(order(take_all, tmp_path))
    assert worker.send(job("a")) and worker.send(job("b"))
    assert worker.send(job("a"))  # asked again, as the answer was lost: it counts once
    worker.end()
    found = messages_of(worker)
    assert [message[1].id for message in found if message[0] == "finished"] == ["a", "b"]
    assert found[-1] == ("ended", 7, (), None)


def test_a_worker_knows_what_all_jobs_ask_for(tmp_path):
    """The model must be ready for those that it has not been sent yet."""
    demands = (JobDemand((480, 832), 81), JobDemand((1280, 720), 81))

    def tell(settings: Settings, progress: Any, *, source: Any, share: Any) -> Ended:
        progress.phase(str(share.demands == demands), "preparing")
        return Ended(0)

    worker = RayWorker(order(tell, tmp_path, demands=demands))
    assert messages_of(worker)[0] == ("phase", "True", "preparing")


def test_an_answer_that_was_lost_is_given_again(tmp_path):
    """Until the driver says that it has the messages."""
    worker = RayWorker(order(take_all, tmp_path))
    worker.end()
    worker.join()
    seen, found = worker.fetch(0, 0.0)
    assert (seen, [message[0] for message in found]) == (2, ["phase", "ended"])
    assert worker.fetch(0, 0.0) == (2, found)
    assert worker.fetch(1, 0.0) == (2, found[1:])
    assert worker.fetch(2, 0.0) == (2, [])


def test_a_question_without_an_answer_ends(tmp_path):
    worker = RayWorker(order(wait_for_stop, tmp_path))
    assert worker.fetch(0, 0.01) == (0, [])
    worker.stop(15)
    assert messages_of(worker)[-1] == ("ended", 143, (), None)


def test_out_must_be_the_folder_that_the_driver_wrote_to(tmp_path):
    (tmp_path / "runs/r1").mkdir(parents=True)
    (tmp_path / "runs/r1/jobs.json").write_bytes(b"{}")
    for data, what in ((b"{}", "ended"), (b"another", "failed")):
        worker = RayWorker(order(take_all, tmp_path, shared_file=("runs/r1/jobs.json", data)))
        worker.end()
        found = messages_of(worker)[-1]
        assert found[0] == what
    assert isinstance(found[1], ConfigInvalid)
    assert "OUT is not the same folder on node" in found[1].message


@pytest.mark.parametrize(
    ("gpu", "known", "device"), [(True, ["NVIDIA H200"], "cuda"), (True, [], "auto"), (False, ["NVIDIA H200"], "auto")]
)
def test_a_gpu_that_the_driver_knows_is_computed_on(tmp_path, monkeypatch, gpu, known, device):
    """Not one that Ray was only told of: there torch decides."""
    monkeypatch.setattr(ray_worker, "environment", lambda: {"gpus": known})
    worker = RayWorker(WorkerOrder(take_all, Settings(str(tmp_path)), workers=1, gpu=gpu, folder=os.getcwd()))
    worker.end()
    assert messages_of(worker)[0] == ("phase", device, "preparing")


def test_a_bug_is_told_with_its_traceback(tmp_path):
    worker = RayWorker(order(partial(int, "x"), tmp_path))
    found = messages_of(worker)
    assert found[-1][0] == "failed" and found[-1][1].code == "internal"
    (log,) = [message for message in found if message[0] == "log"]
    assert (log[1], log[2]["event"]) == ("error", "worker_broke") and "Traceback" in log[2]["exception"]


def test_an_actor_says_what_code_it_has(monkeypatch):
    actor = make_actor_class()()
    assert actor.describe()["code"] == describe_code()
    assert actor.describe()["pid"] == os.getpid()
    monkeypatch.setitem(__import__("sys").modules, "runner.launch.ray_worker", None)
    assert "missing" in actor.describe()
