"""Ray cluster: opens a local or remote cluster and starts workers in it; the only file that calls Ray.

In:   the address of `run --on`. Out: a `RayCluster` with its nodes and workers; Ray's errors as RunnerErrors.
Never: jobs; which worker gets a job (hand_out.py), what a worker does (ray_worker.py).

Ray is started and stopped in a separate thread, which runs as long as the cluster is open. There are three reasons:
in the main thread `ray.init` would replace the handler of SIGTERM; the processes that Ray starts end with the thread
that started them (PR_SET_PDEATHSIG); and a connection that hangs can be abandoned.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import structlog

from runner.batch.stop import Stop
from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid, RunnerError, as_runner_error
from runner.launch.ray_actor import make_actor_class
from runner.launch.ray_address import FLAG, find_address, split_address

__all__ = ["RayActor", "RayCluster", "RayNode", "RayPlace", "WorkerGone", "WorkerSilent"]

OPEN_S = 90.0  # time limit to start Ray or connect to it; 9 s measured on two cores
PORT_S = 5.0  # time limit to connect to a cluster's port
STORE_BYTES = 128 * 2**20  # Ray's local object store, for settings and messages; frames never pass through Ray
CALLS_AT_ONCE = 8  # to one worker: a long poll for messages, and short calls at the same time

# Ray's errors after which the worker no longer exists, or never started because its node ended.
GONE = {"RayActorError", "NodeDiedError", "WorkerCrashedError", "LocalRayletDiedError", "ActorUnschedulableError"}

Answer = Callable[[Any, Exception | None], None]  # (return value, error), called from any thread


class WorkerGone(Exception):
    """The worker's process has ended, or its node is gone."""


class WorkerSilent(Exception):
    """The worker cannot be reached now. It is unknown whether it executed the call."""


@dataclass(frozen=True)
class RayNode:
    """A running node. `name`: its host and the beginning of its id, because a host may run several nodes."""

    id: str
    name: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class RayPlace:
    """A place for one worker on a node. `cpus`, `gpus`: requested from Ray. `sharing`: workers on this machine."""

    node: RayNode
    slot: int
    cpus: int
    gpus: int
    sharing: int

    @property
    def name(self) -> str:
        return f"{self.node.name}/{self.slot}"


class RayActor:
    """One worker."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle

    def ask(self, answer: Answer, method: str, *values: Any) -> None:
        """Call a method of the worker; call `answer` from another thread when the method has returned.

        The error is WorkerGone, WorkerSilent, or a RunnerError.
        """

        def hear(future: Any) -> None:
            error = future.exception()
            answer(None if error is not None else future.result(), None if error is None else _worker_error(error))

        try:
            future = getattr(self._handle, method).remote(*values).future()
        except Exception as error:  # e.g. the connection to the cluster is gone
            answer(None, _worker_error(error))
            return
        future.add_done_callback(hear)

    def kill(self) -> None:
        """Kill the worker's process now."""
        with suppress(Exception):  # the worker or its cluster has ended already
            self._ray.kill(self._handle, no_restart=True)


class RayCluster:
    """A cluster that this process uses inside a `with` block. Workers that it started end with the block.

    on: None for a cluster on this machine only, which is started and shut down; `auto` or HOST:PORT for a running one.
    cpus, gpus: resources of a cluster on this machine only; ignored for a running cluster.
    """

    def __init__(self, on: str | None, *, cpus: int = 1, gpus: int = 0, stop: Stop | None = None) -> None:
        self._on, self._cpus, self._gpus = on, cpus, gpus
        self._stop = stop or Stop()
        self._ray: Any = None
        self._closing = threading.Event()
        self._opened: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._hold, name="ray", daemon=True)
        self._environment: dict[str, str | None] = {}  # of this process, as it was before

    def __enter__(self) -> Self:
        """Open the cluster. Raises ConfigInvalid, ClusterDenied, ClusterUnavailable."""
        address = None if self._on is None else find_address(self._on, os.environ)
        if address not in (None, "auto"):
            _require_port(str(address))
        self._prepare_environment()  # before Ray is imported, because Ray reads it then
        try:
            _require_ray()
        except ConfigInvalid:
            self._restore_environment()
            raise
        structlog.get_logger().info("ray_opening", cluster=self._on or "here")
        self._address = address
        self._thread.start()
        try:
            error = self._opened.get(timeout=OPEN_S)
        except queue.Empty:
            error = ClusterUnavailable(
                f"Ray did not answer within {OPEN_S:.0f} s", where=self._where, todo="Check `ray status` there"
            )
        if error is not None:
            self.__exit__()
            raise error
        if threading.current_thread() is threading.main_thread():
            # Ray's core has installed a handler that prints a stack trace at SIGTERM. Install ours again.
            for signum in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(signum)) is not None:
                    signal.signal(signum, handler)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(timeout=30.0)
        self._restore_environment()

    def _restore_environment(self) -> None:
        for name, before in self._environment.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before

    @property
    def _where(self) -> str:
        return FLAG if self._on is None else f"{FLAG} ray:{self._on}"

    def nodes(self) -> list[RayNode]:
        """Return the running nodes, in a fixed order. Blocks while the cluster's head does not answer."""
        found = []
        for node in self._ray.nodes():
            if node.get("Alive"):
                resources = node.get("Resources", {})
                host, identity = node.get("NodeManagerHostname", "host"), node["NodeID"]
                name = f"{host}-{identity[:6]}"
                found.append(RayNode(identity, name, int(resources.get("CPU", 0)), int(resources.get("GPU", 0))))
        return sorted(found, key=lambda node: (node.name, node.id))

    def start(self, place: RayPlace, variables: Mapping[str, str]) -> RayActor:
        """Start a worker at `place` with `variables` added to its environment. Returns at once."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": place.cpus,
            "num_gpus": place.gpus,
            "max_concurrency": CALLS_AT_ONCE,
            "max_restarts": 0,  # the driver restarts workers itself, with the right jobs and places
            "max_task_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node.id, soft=False),
            "runtime_env": {"env_vars": dict(variables)},
        }
        return RayActor(self._ray, self._ray.remote(make_actor_class()).options(**options).remote())

    def _prepare_environment(self) -> None:
        """Set the variables that Ray reads at import or passes on to the processes that it starts."""
        chosen = {"RAY_USAGE_STATS_ENABLED": "0"}
        if self._on is None:
            # Ray then listens on 127.0.0.1 only, which is enough for one machine (Ray: ENABLE_RAY_CLUSTER).
            chosen["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            if not any(name.startswith("RAY_AUTH_") for name in os.environ):
                chosen["RAY_AUTH_TOKEN"] = _process_token()  # otherwise Ray writes a token into the home folder
        for name, value in chosen.items():
            self._environment[name] = os.environ.get(name)
            os.environ.setdefault(name, value)

    def _hold(self) -> None:
        """Open Ray, wait for the end of the block, shut Ray down. Runs in the cluster's thread."""
        error: Exception | None = None
        try:
            self._open()
        except Exception as found:
            error = _opening_error(found, self._where)
        self._opened.put(error)
        if error is None:
            self._closing.wait()
        if self._ray is not None:
            with suppress(Exception):
                self._ray.shutdown()

    def _open(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)  # our messages replace Ray's about tokens and nodes
        import ray

        if ray.is_initialized():
            raise ConfigInvalid(
                "this process is connected to a Ray cluster already", where=FLAG, todo="Call ray.shutdown() before"
            )
        self._ray = ray  # from here on Ray must be shut down
        common = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
        if self._address is None:
            ray.init(
                address="local",
                num_cpus=self._cpus,
                num_gpus=self._gpus,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                **common,
            )
        else:
            if self._address != "auto":
                _require_access(self._address)
            ray.init(address=self._address, **common)


def _require_ray() -> None:
    try:
        import ray.util.scheduling_strategies  # noqa: F401
    except ImportError as error:
        raise ConfigInvalid(
            f"Ray is not installed ({error})", where=FLAG, todo="Install the extra: pip install 'video-lab-runner[ray]'"
        ) from error


def _require_port(address: str) -> None:
    """Raise ClusterUnavailable if nothing listens at the address: Ray itself would try for a minute."""
    try:
        socket.create_connection(split_address(address), timeout=PORT_S).close()
    except OSError as error:
        raise ClusterUnavailable(
            f"nothing answers at {address} ({error})",
            where=FLAG,
            todo="Check the address and port (6379 by default), the firewall, and `ray status` on the head node",
        ) from error


def _require_access(address: str) -> None:
    """Connect once and raise the cluster's error: `ray.init` would retry for 20 s and hide the reason."""
    import ray._raylet as core

    client = getattr(core, "GcsClient", None)
    if client is not None:  # other versions of Ray lack this class; `ray.init` checks access in any case
        client(address=address)


def _opening_error(error: Exception, where: str) -> RunnerError:
    """Return the RunnerError for an error that prevented Ray from opening."""
    if isinstance(error, RunnerError):
        return error
    text = " ".join(str(error).split())
    if type(error).__name__ == "AuthenticationError" or "InvalidAuthToken" in text:
        return ClusterDenied(
            "the Ray cluster requires its token, and did not get the right one",
            where=where,
            todo="Set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN; "
            "`ray get-auth-token` on the head node prints it",
        )
    if "Version mismatch" in text:
        return ConfigInvalid(
            f"the Ray cluster has another version: {text.partition('Version mismatch:')[2].strip()}",
            where=where,
            todo="Install the same versions of Ray and Python on this machine and on all nodes",
        )
    if "raylet" in text.lower() or "node_ip_address" in text:
        return ConfigInvalid(
            f"this machine is not a node of the Ray cluster ({text[:300]})",
            where=where,
            todo="Run the command on a node of it, e.g. on the head node, or join it: ray start --address=HOST:PORT",
        )
    return ClusterUnavailable(
        f"Ray cannot be opened ({type(error).__name__}: {text[:300] or 'no reason given'})",
        where=where,
        todo="Start a cluster with `ray start --head`, or check `ray status` on its head node",
    )


def _worker_error(error: BaseException) -> Exception:
    """Return the error of a call as WorkerSilent, WorkerGone or a RunnerError, which the driver treats differently."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ActorUnavailableError" in names:
        return WorkerSilent(str(error))
    if names & GONE:
        return WorkerGone(_first_line(error))
    cause = getattr(error, "cause", None)  # of a RayTaskError: the method's exception
    return as_runner_error(cause if isinstance(cause, Exception) else error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@cache
def _process_token() -> str:
    """Return the token of this process's local clusters. It never changes: Ray reads it once per process."""
    return secrets.token_hex(32)
