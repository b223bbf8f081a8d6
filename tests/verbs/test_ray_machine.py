"""Ray machine: the GPUs of this machine, and what workers are told of their cores."""

from __future__ import annotations

import pytest

from runner.errors import ConfigInvalid
from runner.launch.ray_cluster import RayNode, RayPlace
from runner.verbs.ray_machine import find_own_gpus, worker_variables


def test_gpus_of_this_machine(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert find_own_gpus(None) == ["0", "1"]
    assert find_own_gpus(2) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigInvalid, match="--workers N") as caught:
        find_own_gpus(None)
    assert caught.value.where == "--on ray"


def test_the_cores_of_a_node_are_divided(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    node = RayNode("n", "n", cpus=32, gpus=4)
    told = worker_variables(RayPlace(node, 0, cpus=1, gpus=1, sharing=4))
    assert (told["OMP_NUM_THREADS"], told["OPENBLAS_NUM_THREADS"]) == ("8", "8")
    assert (told["CUDA_DEVICE_ORDER"], told["OMP_WAIT_POLICY"]) == ("PCI_BUS_ID", "PASSIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = worker_variables(RayPlace(node, 0, cpus=8, gpus=0, sharing=4))
    assert (told["OMP_NUM_THREADS"], told["MKL_NUM_THREADS"]) == ("3", "8")
    assert "CUDA_DEVICE_ORDER" not in told
