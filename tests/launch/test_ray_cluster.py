"""Ray cluster: what Ray's errors mean. On a real Ray: tests/integration/test_ray_runs.py."""

from __future__ import annotations

import socket

import pytest

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid, InputUnreadable, InternalError
from runner.launch import ray_cluster
from runner.launch.ray_cluster import RayCluster, WorkerGone, WorkerSilent


class AuthenticationError(Exception):
    """As ray.exceptions names it."""


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (AuthenticationError("no token"), ClusterDenied, "RAY_AUTH_MODE=token"),
        (ConnectionError("Unauthenticated: InvalidAuthToken: missing"), ClusterDenied, "requires its token"),
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.9"), ConfigInvalid, "Ray: 2.9"),
        (RuntimeError("Can't find a `node_ip_address.json` file"), ConfigInvalid, "ray start --address"),
        (ConnectionError("Could not find any running Ray instance."), ClusterUnavailable, "ray start --head"),
        (ConfigInvalid("as it is"), ConfigInvalid, "as it is"),
    ],
)
def test_opening_error_of_ray_becomes_runner_error(error, kind, text):
    found = ray_cluster._opening_error(error, "--on ray:auto")
    assert type(found) is kind
    assert text in found.message


def ray_error(*names: str, cause: Exception | None = None) -> Exception:
    kind: type = Exception
    for name in names:
        kind = type(name, (kind,), {})
    error = kind("first line\nsecond")
    error.cause = cause
    return error


def test_worker_error_of_ray_call_becomes_runner_error():
    assert type(ray_cluster._worker_error(ray_error("RayActorError", "ActorUnavailableError"))) is WorkerSilent
    gone = ray_cluster._worker_error(ray_error("RayActorError", "ActorDiedError"))
    assert (type(gone), str(gone)) == (WorkerGone, "first line")
    assert type(ray_cluster._worker_error(ray_error("ActorUnschedulableError"))) is WorkerGone
    own = InputUnreadable("of the worker")
    assert ray_cluster._worker_error(ray_error("RayTaskError", cause=own)) is own
    assert type(ray_cluster._worker_error(ray_error("RayTaskError", cause=KeyError("x")))) is InternalError


def test_cluster_at_address_without_listener_raises_cluster_unavailable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cluster = RayCluster(f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(ClusterUnavailable, match="nothing answers"):
            cluster.__enter__()


def test_cluster_without_ray_installed_says_how_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray.util.scheduling_strategies", None)
    with pytest.raises(ConfigInvalid, match=r"pip install 'video-lab-runner\[ray\]'"):
        RayCluster(None).__enter__()
