"""GCP machines: the machine types with one GPU, their GPU models and sizes.

In:   a machine type, a GPU model. Out: the machine to request. Never: quotas, zones, prices.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.errors import ConfigInvalid

__all__ = ["Machine", "choose_machine"]

BOOT_DISK = "pd-balanced"


@dataclass(frozen=True)
class Machine:
    """A machine with one GPU. None: GCP Batch chooses the value, or it is not known here."""

    gpu: str  # as `gcloud compute accelerator-types list` names it
    type: str | None = None
    cpus: int | None = None
    memory_gib: int | None = None
    disk: str = BOOT_DISK  # type of the boot disk


# Compute Engine, "Accelerator-optimized machine family": the GPU is part of the machine type.
_FAMILIES = {
    "a2-highgpu": "nvidia-tesla-a100",
    "a2-ultragpu": "nvidia-a100-80gb",
    "a3-highgpu": "nvidia-h100-80gb",
    "a3-megagpu": "nvidia-h100-mega-80gb",
    "a3-ultragpu": "nvidia-h200-141gb",
    "a4-highgpu": "nvidia-b200",
    "g2-standard": "nvidia-l4",
    "g4-standard": "nvidia-rtx-pro-6000",
}
_ONE_GPU = {  # vCPUs, GiB
    "a2-highgpu-1g": (12, 85),
    "a2-ultragpu-1g": (12, 170),
    "a3-highgpu-1g": (26, 234),
    "g2-standard-4": (4, 16),
    "g2-standard-8": (8, 32),
    "g2-standard-12": (12, 48),
    "g2-standard-16": (16, 64),
    "g2-standard-32": (32, 128),
    "g4-standard-48": (48, 180),
}
_DISKS = {"g4-standard": "hyperdisk-balanced"}  # the only type that it supports


def choose_machine(machine_type: str | None, gpu_type: str | None) -> Machine:
    """Return the machine of a task, with one GPU. Raises ConfigInvalid for a type and a GPU that cannot be combined."""
    if machine_type is None:
        if gpu_type is None:
            todo = "Give --machine-type, e.g. g2-standard-16, or --gpu-type, e.g. nvidia-tesla-t4"
            raise ConfigInvalid("neither a machine type nor a GPU model is given", todo=todo)
        if gpu_type in _FAMILIES.values():
            todo = f"Give --machine-type, e.g. {_with(gpu_type)}"
            what = f"{gpu_type} is part of a machine type and cannot be attached to one"
            raise ConfigInvalid(what, where="--gpu-type", todo=todo)
        return Machine(gpu_type)
    family = machine_type.rpartition("-")[0]
    if (gpu := _FAMILIES.get(family)) is None:
        if gpu_type is None or gpu_type in _FAMILIES.values():
            named = "no GPU model is given" if gpu_type is None else f"{gpu_type} cannot be attached to it"
            what = f"{machine_type} has no GPU, and {named}"
            raise ConfigInvalid(what, where="--machine-type", todo="Give --gpu-type, e.g. nvidia-tesla-t4")
        return Machine(gpu_type, machine_type)
    if gpu_type not in (None, gpu):
        todo = "Leave --gpu-type out: the machine type determines the GPU model"
        raise ConfigInvalid(f"{machine_type} has {gpu}, not {gpu_type}", where="--gpu-type", todo=todo)
    if machine_type not in _ONE_GPU:
        todo = f"A task has one GPU: choose one of {', '.join(_ONE_GPU)}"
        raise ConfigInvalid(f"{machine_type} is not a machine with one GPU", where="--machine-type", todo=todo)
    cpus, memory_gib = _ONE_GPU[machine_type]
    return Machine(gpu, machine_type, cpus, memory_gib, _DISKS.get(family, BOOT_DISK))


def _with(gpu: str) -> str:
    """Return a machine type with this GPU: the largest of those with one GPU, else any of its family."""
    family = next(name for name, model in _FAMILIES.items() if model == gpu)
    fitting = [name for name in _ONE_GPU if name.startswith(family)]
    return fitting[-1] if fitting else f"{family}-…"
