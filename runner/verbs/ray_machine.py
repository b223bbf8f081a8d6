"""Ray machine: what `run --on ray` finds and sets on the machines that its workers use.

In:   the environment of the command. Out: the GPUs of this machine; what a worker's environment has more.
Never: calling Ray.
"""

from __future__ import annotations

import os

from runner.errors import ConfigInvalid
from runner.launch.ray_cluster import RayPlace
from runner.verbs.gpus import THREAD_VARIABLES, find_gpus

__all__ = ["find_own_gpus", "worker_variables"]


def find_own_gpus(workers: int | None) -> list[str]:
    """The GPUs of a cluster of this machine alone: all; none where `workers` compute on CPUs.

    Raises ConfigInvalid where there is none.
    """
    if workers is not None:
        return []
    try:
        return find_gpus("all", os.environ)
    except ConfigInvalid as error:
        raise ConfigInvalid(
            error.what,
            where="--on ray",
            todo="Check the driver (nvidia-smi), or give --workers N to compute on CPUs",
        ) from error


def worker_variables(place: RayPlace) -> dict[str, str]:
    """What the environment of a worker has beyond its node's: its share of the cores, and the driver's order of GPUs.

    A number of threads that the command's environment has goes over the share: it is meant for each worker.
    """
    threads = str(max(1, place.node.cpus // place.sharing))
    shared = {name: os.environ.get(name, threads) for name in THREAD_VARIABLES}
    if place.gpus:  # the numbers that Ray gives are the driver's, by bus; CUDA's own are by speed
        shared["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return shared | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}  # see cli.py
