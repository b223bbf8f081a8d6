import pytest
import torch

from runner.quantization.formats.e2m1 import FORMATS
from runner.quantization.formats.fp4_layout import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_bytes_equal_bytes_of_tensors(layout):
    tensors = {
        suffix: torch.zeros(shape, dtype=dtype)
        for suffix, (shape, dtype) in FORMATS[layout.name].tensors(6, 5 * layout.group).items()
    }
    assert layout.bytes(6, 5 * layout.group) == sum(tensor.nbytes for tensor in tensors.values())
    assert FORMATS[layout.name].weight_shape(tensors) == (6, 5 * layout.group)
