import math

import pytest
import torch
from safetensors.torch import save_file

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.quantization.files.file_header import read_header
from runner.quantization.formats.stored_dtypes import DTYPES

TORCH = {name: getattr(torch, row.torch_name) for name, row in DTYPES.items()}


@pytest.mark.parametrize("dtype", TORCH.values(), ids=TORCH)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (5, 7)])
def test_header_says_what_torch_wrote(tmp_path, dtype, shape):
    file = tmp_path / "a.safetensors"
    other = torch.arange(6, dtype=torch.float64)
    save_file({"x": torch.zeros(shape).to(dtype), "other": other}, file, {"key": "value"})
    header = read_header(file)
    info = header.tensors["x"]
    assert (info.shape, info.dtype, info.bytes) == (shape, dtype, math.prod(shape) * dtype.itemsize)
    assert header.metadata == {"key": "value"} and header.path == file
    assert header.data_start == 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert max(part.stop for part in header.tensors.values()) == file.stat().st_size
    start, stop = header.tensors["other"].start, header.tensors["other"].stop
    assert file.read_bytes()[start:stop] == other.numpy().tobytes()


def test_absent_file_is_missing_and_cut_file_is_corrupt(tmp_path):
    with pytest.raises(WeightsMissing, match="no such file"):
        read_header(tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(100)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    with pytest.raises(WeightsCorrupt, match="truncated"):
        read_header(tmp_path / "a.safetensors")
