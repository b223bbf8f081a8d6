import torch

from runner.quantization.formats.stored_dtypes import DTYPE_BYTES, DTYPES

TORCH = {name: getattr(torch, row.torch_name) for name, row in DTYPES.items()}


def test_dtypes_are_torch_s_with_their_sizes():
    assert len(set(TORCH.values())) == len(DTYPES)
    assert {name: dtype.itemsize for name, dtype in TORCH.items()} == {name: row.bytes for name, row in DTYPES.items()}
    assert {name: getattr(torch, name).itemsize for name in DTYPE_BYTES} == dict(DTYPE_BYTES)
