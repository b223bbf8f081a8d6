"""`run --on ray` on a real Ray: one machine with two GPUs that are not there; a head and two nodes on this machine.

Everything listens on 127.0.0.1. The cluster asks for a token, as Ray does by default.
"""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

import runner.verbs.run as run_verb
from runner.errors import ClusterUnavailable, ConfigInvalid
from runner.spec.manifest import parse_manifest
from runner.verbs.outcome import RunOutcome
from runner.verbs.settings import RunSettings
from tests.launch import ray_children
from tests.system_tests import system_test
from tests.verbs.test_run import Watched

pytestmark = system_test

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 120.0  # for whatever a loaded machine takes
RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on 127.0.0.1 alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "5e" * 32,
}
STORE = 80 * 2**20  # the least object store that Ray takes


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes with one each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.nodes = [add_node(cluster), add_node(cluster)]
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=STORE)


@pytest.fixture
def held(tmp_path, demo_media, monkeypatch, ray_cluster) -> Callable[..., Any]:
    """held(ids, hold="", **more): settings of a run on the cluster; the jobs of `hold` wait for `ID.go`."""
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}

    def make(ids: str, hold: str = "", breaks_once: bool = False, **more: Any) -> RunSettings:
        jobs = [
            {"id": name, **place, "prompt": "hold" if name in hold else "ok", "options": {"seed": ord(name)}}
            for name in ids
        ]
        for name, value in ray_children.patched(str(tmp_path), breaks_once).items():
            monkeypatch.setattr(run_verb, name, value)
        manifest = parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=".", source="m.json")
        common = {"manifest": manifest, "out": str(tmp_path / "out"), "cache": tmp_path / "cache", "run_id": "r1"}
        return RunSettings(**common | {"on": f"ray:{ray_cluster.address}", "workers": 2} | more)

    return make


class RunBeside:
    """A run in a thread, and its log; at the end no job is held."""

    def __init__(self, settings: RunSettings, folder: Path) -> None:
        self.outcome: RunOutcome | None = None
        self.progress = Watched()
        self._jobs, self._folder = [job.id for job in settings.manifest.jobs], folder
        self._thread = threading.Thread(target=self._run, args=(settings,))

    def __enter__(self) -> RunBeside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._jobs:
            (self._folder / f"{job}.go").touch()
        self._thread.join(LONG_S)

    def _run(self, settings: RunSettings) -> None:
        self.outcome = run_verb.run(settings, self.progress)

    def wait_for(self, is_so: Callable[[], object]) -> None:
        wait_until(lambda: is_so() or not self._thread.is_alive())
        assert self._thread.is_alive()


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begun(folder: Path) -> list[tuple[str, int]]:
    """(job, process) of each time that a job's generation has begun."""
    file = folder / "begun"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def record(folder: Path, job: str) -> dict[str, Any]:
    return json.loads((folder / f"out/jobs/{job}/result.json").read_bytes())


def digests(folder: Path, jobs: str) -> list[str]:
    return [(folder / f"jobs/{job}/frames.sha256").read_text(encoding="ascii") for job in jobs]


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == name]


def test_run_with_lost_worker_and_lost_node_renders_each_job_once(held, tmp_path, ray_cluster):
    """A worker is killed, a node removed, another one added: each job is done once, with a single process's frames."""
    jobs = "abcdefgh"
    with capture_logs() as events, RunBeside(held(jobs, hold=jobs), tmp_path) as run:
        # Each worker generates one job and has prepared another.
        run.wait_for(lambda: len(named(events, "job_prepared")) == 4)
        (first, killed), (second, gone) = begun(tmp_path)
        os.kill(killed, signal.SIGKILL)
        run.wait_for(lambda: len(begun(tmp_path)) == 3)  # by a worker that was started for it
        again, third = begun(tmp_path)[2]
        assert (again, third not in (killed, gone)) == (first, True)

        places = {event["pid"]: event["worker"] for event in named(events, "ray_worker_started")}
        assert places[third] == places[killed]
        (lost,) = [node for node in ray_cluster.nodes if f"-{node.node_id[:6]}/" in places[gone]]
        ray_cluster.remove_node(lost, allow_graceful=False)
        ray_cluster.nodes = [node for node in ray_cluster.nodes if node is not lost] + [add_node(ray_cluster)]
        run.wait_for(lambda: len(begun(tmp_path)) == 4)
        assert begun(tmp_path)[3][0] == second
    outcome = run.outcome
    assert outcome is not None and outcome.exit_code == 0
    assert [(line.id, line.status) for line in outcome.lines] == [(job, "succeeded") for job in jobs]
    times = {job: [name for name, _ in begun(tmp_path)].count(job) for job in jobs}
    assert times == {job: 2 if job in (first, second) else 1 for job in jobs}  # no job was rendered twice
    assert [record(tmp_path, job)["attempt"] for job in (first, second)] == [2, 2]
    assert {record(tmp_path, job)["run_id"] for job in jobs} == {"r1"}
    assert sorted(event["job"] for event in named(events, "job_succeeded")) == list(jobs)
    assert sorted(told[1] for told in run.progress.told if told[0] == "finished") == list(jobs)
    assert {event["pid"] for event in named(events, "ray_worker_died")} == {killed, gone}
    assert len({event["worker"] for event in named(events, "ray_worker_started")}) == 3  # with the new node's

    alone = RunSettings(manifest=held(jobs).manifest, out=str(tmp_path / "alone"), cache=tmp_path / "cache")
    assert run_verb.run(alone).exit_code == 0
    assert digests(tmp_path / "out", jobs) == digests(tmp_path / "alone", jobs)


def test_engine_failure_in_one_worker_does_not_stop_others(held, tmp_path):
    with capture_logs() as events:
        outcome = run_verb.run(held("abcd", breaks_once=True))
    assert outcome.exit_code == 0
    assert {line.status for line in outcome.lines} == {"succeeded"}
    (failed,) = named(events, "ray_worker_failed")
    assert failed["code"] == "weights.missing"
    assert len({pid for _, pid in begun(tmp_path)}) == 1


def test_run_with_sigterm_drains_and_rerun_finishes_jobs(held, tmp_path, ray_cluster):
    """The jobs that are under way end, the others wait for the rerun."""
    settings, manifest = held("abcdef", hold="abcdef"), tmp_path / "m.json"
    listed = [
        {"id": job.id, "reference": job.reference, "video": job.video, "prompt": job.prompt}
        | {"options": {"seed": ord(job.id)}}
        for job in settings.manifest.jobs
    ]
    manifest.write_text(json.dumps({"version": 1, "jobs": listed}), encoding="utf-8")
    words = [str(manifest), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--workers", "2"]
    words += ["--on", "ray:auto", "--log-format", "json", "--drain-s", "60", "--json"]
    command = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.ray_command", str(tmp_path), *words],
        cwd=ROOT,
        env={**os.environ, **RAY, "RAY_ADDRESS": ray_cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(command.stderr))
    reader.start()
    try:
        wait_until(lambda: len(begun(tmp_path)) == 2)
        command.send_signal(signal.SIGTERM)
        wait_until(lambda: sum('"stopping"' in line for line in log) == 2)
        for job in "abcdef":
            (tmp_path / f"{job}.go").touch()
        assert command.wait(LONG_S) == 143, "".join(log)
        assert not [line for line in log if not line.startswith("{")]  # Ray itself says nothing
    finally:
        command.kill()
        command.wait()
        reader.join()
    assert len(begun(tmp_path)) == 2
    again = run_verb.run(held("abcdef", hold="abcdef", run_id="r2"))
    assert (again.exit_code, again.counts["skipped"]) == (0, 2)
    assert sorted(name for name, _ in begun(tmp_path)) == list("abcdef")


def test_cluster_without_gpu_or_matching_version_is_refused(held, monkeypatch):
    with pytest.raises(ConfigInvalid, match="the Ray cluster has no GPU"):
        run_verb.run(held("a", workers=None))
    monkeypatch.setattr("runner.launch.ray_driver.describe_code", lambda: "9.9 (another)")
    with pytest.raises(
        ConfigInvalid, match=r"node .*: video-lab-runner has version .*; this machine has 9\.9 \(another\)"
    ):
        run_verb.run(held("a"))
    monkeypatch.setattr("ray._private.utils.compute_version_info", lambda: ("2.40.0", "3.12.1"))
    with pytest.raises(ConfigInvalid, match="has another version"):
        run_verb.run(held("a"))


def test_run_at_address_without_listener_raises_cluster_unavailable(held, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ClusterUnavailable, match="nothing answers"):
            run_verb.run(held("a", on=f"ray:127.0.0.1:{free.getsockname()[1]}"))
    assert not (tmp_path / "out/runs").exists()  # else `status` would tell of jobs that wait


def test_run_with_wrong_ray_token_exits_2_with_cluster_denied(held, tmp_path, ray_cluster):
    """In a process of its own: Ray reads the token once."""
    held("a")
    (tmp_path / "m.json").write_text('{"version": 1, "jobs": [{"id": "a", "reference": "r", "video": "v"}]}')
    words = [str(tmp_path / "m.json"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    words += ["--on", f"ray:{ray_cluster.address}", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.ray_command", str(tmp_path), *words],
        cwd=ROOT,
        env={**os.environ, **RAY, "RAY_AUTH_TOKEN": "0a" * 32},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cluster.denied" in done.stderr and "RAY_AUTH_MODE=token" in done.stderr


def test_run_on_ray_with_two_gpus_gives_frames_of_single_process(tmp_path, demo_models, demo_media):
    """The real engine. The GPUs are not there, so that it computes on the CPU: `--device auto` asks torch."""
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    options = {"size": "64x96", "fps": 16, "max_frames": 9, "steps": 2}
    jobs = [{"id": job, **place, "options": {**options, "seed": ord(job)}} for job in "abc"]
    (tmp_path / "m.json").write_text(json.dumps({"version": 1, "jobs": jobs}), encoding="utf-8")
    common = [sys.executable, "-m", "runner.cli", "run", str(tmp_path / "m.json"), "--models", str(demo_models)]
    common += ["--cache", str(tmp_path / "cache"), "--log-format", "json"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    alone = subprocess.run([*common, "--out", "alone"], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert alone.returncode == 0, alone.stderr
    log: list[str] = []
    command = subprocess.Popen(
        [*common, "--out", "ray", "--on", "ray"],
        cwd=tmp_path,
        env=env | {"CUDA_VISIBLE_DEVICES": "0,1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    reader = threading.Thread(target=lambda: log.extend(command.stderr))
    reader.start()
    try:
        wait_until(lambda: any('"ray_worker_started"' in line for line in log) or command.poll() is not None)
        addresses = listening(command.pid)
        assert command.wait(LONG_S) == 0, "".join(log)
    finally:
        command.kill()
        command.wait()
        reader.join()
    events = [json.loads(line) for line in log if line.startswith("{")]
    assert len({event["pid"] for event in named(events, "ray_worker_started")}) == 2
    assert digests(tmp_path / "ray", "abc") == digests(tmp_path / "alone", "abc")
    assert addresses and all(ipaddress.ip_address(found.removeprefix("::ffff:")).is_loopback for found in addresses)


def listening(pid: int) -> set[str]:
    """The addresses on which a process and those that it started listen."""
    found = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.Error):
            found |= {one.laddr.ip for one in process.net_connections() if one.status == psutil.CONN_LISTEN}
    return found
