"""GCP machines: one GPU of one model, or an error that says what to ask for."""

from __future__ import annotations

import pytest

from runner.errors import ConfigInvalid
from runner.launch.gcp_machines import choose_machine


@pytest.mark.parametrize(
    ("machine_type", "gpu_type", "gpu"),
    [
        ("g2-standard-16", None, "nvidia-l4"),
        ("g2-standard-16", "nvidia-l4", "nvidia-l4"),
        ("a2-highgpu-1g", None, "nvidia-tesla-a100"),
        ("a2-ultragpu-1g", None, "nvidia-a100-80gb"),
        ("a3-highgpu-1g", None, "nvidia-h100-80gb"),
        ("n1-standard-8", "nvidia-tesla-t4", "nvidia-tesla-t4"),
        (None, "nvidia-tesla-t4", "nvidia-tesla-t4"),
    ],
)
def test_a_machine_has_one_gpu_of_a_known_model(machine_type, gpu_type, gpu):
    machine = choose_machine(machine_type, gpu_type)
    assert (machine.type, machine.gpu) == (machine_type, gpu)


@pytest.mark.parametrize(
    ("machine_type", "gpu_type", "says"),
    [
        (None, None, "neither"),
        (None, "nvidia-l4", "g2-standard-"),
        (None, "nvidia-h200-141gb", "a3-ultragpu-"),
        ("g2-standard-24", None, "one GPU"),  # two
        ("a2-highgpu-8g", None, "one GPU"),
        ("a3-ultragpu-8g", None, "one GPU"),
        ("g2-standard-16", "nvidia-tesla-t4", "has nvidia-l4"),
        ("n1-standard-8", None, "no GPU model"),
        ("n1-standard-8", "nvidia-l4", "cannot be attached"),
    ],
)
def test_what_does_not_fit_together_is_refused(machine_type, gpu_type, says):
    with pytest.raises(ConfigInvalid) as caught:
        choose_machine(machine_type, gpu_type)
    assert says in caught.value.message
    assert caught.value.todo


def test_g4_machines_boot_from_the_only_disks_that_they_take():
    assert choose_machine("g4-standard-48", None).disk == "hyperdisk-balanced"
    assert choose_machine("g2-standard-16", None).disk == "pd-balanced"
