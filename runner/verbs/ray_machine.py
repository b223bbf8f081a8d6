"""Ray machine: finds the GPUs of this machine and sets the environment variables of workers for `run --on ray`.

In:   the environment of the command. Out: the GPUs of this machine; additional variables of a worker.
Never: calling Ray.
"""

from __future__ import annotations

import os

from runner.errors import ConfigInvalid
from runner.launch.ray_cluster import RayPlace
from runner.verbs.gpus import THREAD_VARIABLES, find_gpus

__all__ = ["find_own_gpus", "worker_variables"]


def find_own_gpus(workers: int | None) -> list[str]:
    """Return all GPUs of this machine, for a cluster of it alone; none if `workers` compute on CPUs.

    Raises ConfigInvalid if there is no GPU.
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
    """Return the variables added to a worker's environment: its share of the cores, and the driver's order of GPUs.

    A number of threads in the command's environment has priority over the share; it is used for each worker.
    """
    threads = str(max(1, place.node.cpus // place.sharing))
    shared = {name: os.environ.get(name, threads) for name in THREAD_VARIABLES}
    if place.gpus:  # Ray uses the driver's numbers, in bus order; CUDA's default order is by speed
        shared["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return shared | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}  # see cli.py
