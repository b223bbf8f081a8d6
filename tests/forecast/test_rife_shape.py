"""RIFE's shape: tensors, operations and bytes against what torch counts on the network itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from runner.finishing.rife import RifeInterpolator, RifeNetwork
from runner.forecast.rife_shape import RifeShape, padded
from runner.forecast.seconds import find_device
from runner.weights.rife_file import check_rife
from tests.finishing.tiny_rife import TINY, tiny_network
from tests.generation.live_bytes import LiveBytes


def test_the_published_shape_is_the_default():
    shape = RifeShape()
    assert check_rife(shape.tensors) == shape
    assert len(shape.tensors) == 158 and shape.weight_bytes == 4 * 5_664_776
    heavy = RifeShape(16, tuple(2 * width for width in shape.widths))
    assert check_rife(heavy.tensors) == heavy


def test_the_tensors_are_the_network_s_own():
    for shape in (TINY, RifeShape()):
        with torch.device("meta"):
            found = {name: tuple(tensor.shape) for name, tensor in RifeNetwork(shape).state_dict().items()}
        assert found == shape.tensors


@pytest.mark.parametrize("shape", [TINY, RifeShape()])
def test_operations_are_those_that_torch_counts(shape):
    network, frame = RifeNetwork(shape), torch.zeros(1, 3, 64, 128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(frame, frame)
    assert counter.get_total_flops() == shape.frame_flop(100, 50)


def test_memory_is_what_is_alive():
    frame = np.zeros((100, 120, 3), np.uint8)
    interpolator = RifeInterpolator(tiny_network())
    with LiveBytes() as live:
        interpolator.between(frame, frame + 1)
    assert 0.95 < live.peak / TINY.peak_bytes(120, 100) <= 1
    assert (padded(100), padded(120), padded(128)) == (128, 128, 128)


def test_a_faster_gpu_takes_less_time():
    slow, fast = find_device("RTX 4090"), find_device("H200")
    assert slow is not None and fast is not None
    assert 0 < RifeShape().frame_seconds(832, 480, fast) < RifeShape().frame_seconds(832, 480, slow) < 1
