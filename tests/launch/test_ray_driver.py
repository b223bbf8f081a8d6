"""Ray driver: what it makes of workers that come, work, fail and die. The cluster is a stand-in, without Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from runner.batch.progress import SilentProgress
from runner.batch.shared_run import SharedRun
from runner.batch.stop import Stop
from runner.errors import ConfigInvalid, DeviceLost, RunnerError, WeightsMissing
from runner.generation.protocol import JobDemand
from runner.launch import ray_driver
from runner.launch.ray_cluster import RayNode, RayPlace, WorkerGone, WorkerSilent
from runner.launch.ray_driver import RayWork, run_on_ray
from runner.launch.ray_worker import describe_code
from runner.records.record import JobLine
from runner.spec.manifest import Job
from runner.spec.options import JobOptions

Reply = Callable[[Any, Exception | None], None]


@dataclass
class Settings:
    drain_s: float = 0.0


@dataclass
class StandIn:
    """A worker that ends each job at once, unless its cluster says something else of it."""

    cluster: StandInCluster
    place: RayPlace
    messages: list[tuple[Any, ...]] = field(default_factory=list)
    question: Reply | None = None
    dead: bool = False
    stops: int = 0
    done: int = 0

    def ask(self, answer: Reply, method: str, *values: Any) -> None:
        if self.dead:
            answer(None, WorkerGone("it has died"))
            return
        getattr(self, f"_{method}")(answer, *values)
        self._reply()

    def kill(self) -> None:
        self.dead = True
        self.cluster.killed += 1

    def _describe(self, answer: Reply) -> None:
        if self.place.node.id in self.cluster.slow_nodes:
            threading.Timer(0.3, answer, ({"host": "h", "pid": 1, "code": describe_code()}, None)).start()
            return
        if self.place.node.id in self.cluster.broken_nodes:
            answer({"code": "another"}, None)
            return
        answer({"host": "h", "pid": len(self.cluster.started), "code": describe_code()}, None)

    def _begin(self, answer: Reply, order: Any) -> None:
        self.cluster.orders.append(order)
        answer(None, None)
        error = self.cluster.stops_for.pop(self.place.node.id, None)
        if error is not None:
            self.messages.append(("ended", error.exit_code, (), error))

    def _send(self, answer: Reply, job: Job) -> None:
        self.cluster.sent.append((self.place.node.id, job.id))
        if self.cluster.silent > 0:
            self.cluster.silent -= 1
            answer(None, WorkerSilent("the network"))
            return
        answer(True, None)
        if self.cluster.dies.get(job.id, 0) > 0:
            self.cluster.dies[job.id] -= 1
            self.dead = True
            if self.question is not None:
                self.question(None, WorkerGone("killed"))
            return
        self.messages.append(("phase", job.id, "generating"))
        if job.id in self.cluster.frees.values():  # held until another job comes to another worker
            return
        if (freed := self.cluster.frees.get(job.id)) is not None:
            other = next(worker for worker in self.cluster.started if worker is not self)
            other._finish(freed, "succeeded")
            other._reply()
        if job.id in self.cluster.holds and [sent for _, sent in self.cluster.sent].count(job.id) == 1:
            self.cluster.holding.release()
            return
        self._finish(job.id, "succeeded")

    def _finish(self, job_id: str, status: str) -> None:
        self.done += 1
        self.messages.append(("finished", JobLine(id=job_id, status=status, reason="test")))
        error = self.cluster.lost_after.pop(job_id, None)
        if error is not None:
            self.messages.append(("ended", 3, (), error))

    def _end(self, answer: Reply) -> None:
        answer(None, None)
        self.messages.append(("ended", 0, (), None))

    def _stop(self, answer: Reply, signum: int) -> None:
        answer(None, None)
        self.stops += 1
        if not self.cluster.deaf:
            self.messages.append(("ended", 0, (), None))

    def _fetch(self, answer: Reply, seen: int, wait_s: float) -> None:
        assert seen <= len(self.messages)
        self.seen, self.question = seen, answer

    def _reply(self) -> None:
        if self.question is not None and not self.dead and len(self.messages) > self.seen:
            question, self.question = self.question, None
            question((len(self.messages), self.messages[self.seen :]), None)


@dataclass
class StandInCluster:
    living: list[RayNode]
    slow_nodes: set[str] = field(default_factory=set)
    broken_nodes: set[str] = field(default_factory=set)
    stops_for: dict[str, RunnerError] = field(default_factory=dict)  # node → of its next worker
    lost_after: dict[str, RunnerError] = field(default_factory=dict)  # job → what its worker ends with after it
    dies: dict[str, int] = field(default_factory=dict)  # job → how often it kills its worker
    holds: str = ""  # jobs that the first worker that gets them keeps
    frees: dict[str, str] = field(default_factory=dict)  # job → another one that ends when it is sent
    deaf: bool = False
    silent: int = 0  # calls that do not arrive
    sent: list[tuple[str, str]] = field(default_factory=list)
    started: list[StandIn] = field(default_factory=list)
    orders: list[Any] = field(default_factory=list)  # what its workers were told at their beginning
    killed: int = 0
    looks: int = 0
    later: list[RayNode] = field(default_factory=list)  # living after the first look
    holding: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def nodes(self) -> list[RayNode]:
        self.looks += 1
        return self.living if self.looks == 1 or not self.later else self.later

    def start(self, place: RayPlace, variables: Mapping[str, str]) -> StandIn:
        self.started.append(StandIn(self, place))
        return self.started[-1]


def nodes(*names: str) -> list[RayNode]:
    return [RayNode(name, name, cpus=2, gpus=1) for name in names]


def jobs(ids: str) -> list[Job]:
    return [Job(name, "r.png", "v.mp4", None, "", JobOptions(), None) for name in ids]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(ray_driver, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(ray_driver, "ASK_AGAIN_S", 0.01)


def drive(cluster: StandInCluster, ids: str, stop: Stop | None = None, **more: Any) -> tuple[SharedRun, list[Any]]:
    with capture_logs() as events:
        work = RayWork(print, Settings(), jobs(ids), {}, **more)
        shared = run_on_ray(nullcontext(cluster), work, SilentProgress(), stop=stop or Stop(0.0))
    return shared, events


def statuses(shared: SharedRun) -> dict[str, str]:
    return {line.id: line.status for line in shared.lines}


def named(events: list[Any], name: str) -> list[Any]:
    return [event for event in events if event["event"] == name]


def test_run_on_ray_sends_each_job_once_and_ends_workers():
    cluster = StandInCluster(nodes("a", "b"))
    shared, events = drive(cluster, "123456")
    assert (shared.exit_code, statuses(shared)) == (0, dict.fromkeys("123456", "succeeded"))
    assert sorted(job for _, job in cluster.sent) == list("123456")
    assert all(worker.dead for worker in cluster.started)
    assert len(named(events, "ray_worker_started")) == len(cluster.started)


def test_worker_order_has_demands_of_all_jobs():
    cluster, demands = StandInCluster(nodes("a", "b")), (JobDemand((1280, 720), 81),)
    drive(cluster, "12", demands=demands)
    assert [order.demands for order in cluster.orders] == [demands] * len(cluster.started)


def test_last_job_waits_for_starting_worker():
    """A busy worker would only prepare the last job and generate it after its own."""
    cluster = StandInCluster(nodes("a", "b"), slow_nodes={"b"}, frees={"2": "1"})
    shared, _ = drive(cluster, "12")
    assert (shared.exit_code, cluster.sent) == (0, [("a", "1"), ("b", "2")])


def test_dead_worker_is_replaced_and_its_jobs_are_finished():
    cluster = StandInCluster(nodes("a"), dies={"2": 1})
    shared, events = drive(cluster, "123")
    assert (shared.exit_code, statuses(shared)) == (0, dict.fromkeys("123", "succeeded"))
    assert len(cluster.started) == 2
    (died,) = named(events, "ray_worker_died")
    assert died["worker"] == "a/0"


def test_place_with_repeatedly_dying_workers_is_given_up():
    cluster = StandInCluster(nodes("a"), dies={"1": 99})
    shared, events = drive(cluster, "1")
    assert (shared.exit_code, statuses(shared)) == (3, {"1": "not_run"})
    assert len(cluster.started) == ray_driver.STARTS
    assert len(named(events, "ray_place_given_up")) == 1


def test_job_of_removed_node_moves_to_added_node():
    cluster = StandInCluster(nodes("a"), later=nodes("b"), holds="1")
    shared, events = drive(cluster, "12")
    assert statuses(shared) == dict.fromkeys("12", "succeeded")
    assert ("a", "1") in cluster.sent and ("b", "1") in cluster.sent
    assert [event["how"] for event in named(events, "ray_worker_died")] == ["its node is gone"]


def test_engine_failure_at_one_place_does_not_stop_others():
    cluster = StandInCluster(nodes("a", "b"), stops_for={"a": WeightsMissing("none", where="a")})
    shared, events = drive(cluster, "1234")
    assert shared.exit_code == 0
    assert {node for node, _ in cluster.sent} == {"b"} or ("a", "1") in cluster.sent
    assert [worker.place.node.id for worker in cluster.started].count("a") == 1  # it is not tried there again
    assert [event["code"] for event in named(events, "ray_worker_failed")] == ["weights.missing"]


def test_engine_failure_at_all_places_exits_2():
    errors = {name: WeightsMissing("none", where=name) for name in "ab"}
    shared, _ = drive(StandInCluster(nodes("a", "b"), stops_for=errors), "12")
    assert (shared.exit_code, statuses(shared)) == (2, {"1": "not_run", "2": "not_run"})
    assert shared.error is not None and shared.error.code == "weights.missing"


def test_worker_with_lost_device_is_replaced_by_new_process():
    cluster = StandInCluster(nodes("a"), lost_after={"1": DeviceLost("gone")})
    shared, _ = drive(cluster, "12")
    assert (shared.exit_code, len(cluster.started)) == (0, 2)


def test_node_with_other_code_version_is_named_and_unused():
    cluster = StandInCluster(nodes("a", "b"), broken_nodes={"a"})
    shared, events = drive(cluster, "12")
    assert shared.exit_code == 0
    assert {node for node, _ in cluster.sent} == {"b"}
    (failed,) = named(events, "ray_worker_failed")
    assert "node a: video-lab-runner has version another; this machine has" in failed["message"]
    with pytest.raises(ConfigInvalid, match="node a: video-lab-runner has version another"):
        drive(StandInCluster(nodes("a"), broken_nodes={"a"}), "12")


@pytest.mark.parametrize(("workers", "what"), [(None, "no GPU"), (2, "no CPU")])
def test_cluster_without_gpu_or_cpu_is_refused(workers, what):
    with pytest.raises(ConfigInvalid, match=what):
        drive(StandInCluster([RayNode("a", "a", cpus=0, gpus=0)]), "1", workers=workers)


def test_lost_call_to_worker_is_repeated():
    cluster = StandInCluster(nodes("a"), silent=2)
    shared, events = drive(cluster, "1")
    assert shared.exit_code == 0
    assert cluster.sent == [("a", "1")] * 3
    assert not named(events, "ray_worker_died")


def test_worker_unreachable_too_long_is_replaced(monkeypatch):
    monkeypatch.setattr(ray_driver, "SILENT_S", 0.05)
    monkeypatch.setattr(ray_driver, "ASK_AGAIN_S", 0.03)
    cluster = StandInCluster(nodes("a"), silent=3)
    shared, events = drive(cluster, "1")
    assert shared.exit_code == 0
    assert len(cluster.started) == 2
    assert "cannot be reached" in named(events, "ray_worker_died")[0]["how"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_passed_to_each_worker_once(signum, code):
    cluster = StandInCluster(nodes("a", "b"), holds="1234")
    shared, _ = drive_signalled(cluster, "1234", 2, signum)
    assert shared.exit_code == code
    assert statuses(shared) == dict.fromkeys("1234", "not_run")
    assert [worker.stops for worker in cluster.started] == [1, 1]


def test_signal_while_cluster_opens_starts_no_worker():
    stop, cluster = Stop(0.0), StandInCluster(nodes("a"))
    stop.request(signal.SIGTERM)
    shared, _ = drive(cluster, "1", stop)
    assert (shared.exit_code, statuses(shared), cluster.started) == (143, {"1": "not_run"}, [])


def test_worker_that_ignores_signal_is_killed(monkeypatch):
    monkeypatch.setattr(ray_driver, "END_S", 0.1)
    cluster = StandInCluster(nodes("a"), holds="1", deaf=True)
    shared, events = drive_signalled(cluster, "1", 1, signal.SIGTERM)
    assert shared.exit_code == 143
    assert len(named(events, "ray_worker_killed")) == 1
    assert cluster.started[0].dead


def drive_signalled(cluster: StandInCluster, ids: str, held: int, signum: int) -> tuple[SharedRun, list[Any]]:
    """Sends the signal when so many jobs are held."""

    def send() -> None:
        if all(cluster.holding.acquire(timeout=60) for _ in range(held)):
            signal.pthread_kill(threading.main_thread().ident, signum)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        return drive(cluster, ids)
    finally:
        thread.join()
