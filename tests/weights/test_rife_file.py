"""RIFE's file: a header of other tensors is refused, and the sentence says which one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.errors import JobWeightsCorrupt, JobWeightsMissing, WeightsCorrupt, WeightsMissing
from runner.spec.options import JobOptions
from runner.weights.repositories import CONVERTED, Pin
from runner.weights.rife_file import check_rife_file
from runner.weights.store import RIFE, ModelStore, wanted_by_jobs
from runner.weights.verify import verify_weights
from tests.finishing.tiny_rife import TINY, tiny_network, write_tiny_rife

ASKED = JobOptions(output={"interpolate": 2})


def test_check_rife_file_of_other_network_is_refused(tmp_path: Path):
    path = write_tiny_rife(tmp_path)
    assert check_rife_file(path) == TINY
    tensors = load_file(path)
    wrong = {
        r"block2\.conv0\.0\.0\.bias has shape \(5,\), not \(4,\)": tensors | {"block2.conv0.0.0.bias": torch.zeros(5)},
        r"tensor teacher\.x does not belong to the network": tensors | {"teacher.x": torch.zeros(1)},
        r"tensor encode\.cnn3\.bias is missing": {n: t for n, t in tensors.items() if n != "encode.cnn3.bias"},
        r"encode\.cnn3\.bias is int64": tensors | {"encode.cnn3.bias": torch.zeros(4, dtype=torch.int64)},
    }
    for message, changed in wrong.items():
        save_file(changed, path)
        with pytest.raises(WeightsCorrupt, match=message):
            check_rife_file(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsCorrupt):
        check_rife_file(path)
    path.unlink()
    with pytest.raises(WeightsMissing):
        check_rife_file(path)


def test_job_extras_have_rife_file_only_for_job_with_rife(tmp_path: Path):
    store = ModelStore(tmp_path)
    assert store.job_extras(JobOptions(), False) == {}
    with pytest.raises(JobWeightsMissing, match=r"rife/rife-4\.25\.safetensors.*convert_rife\.py"):
        store.job_extras(ASKED, False)
    path = write_tiny_rife(tmp_path)
    assert store.job_extras(ASKED, False) == {"rife": [path]}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JobWeightsCorrupt):
        store.job_extras(ASKED, False)
    assert store.job_extras(JobOptions(), False) == {}


def test_wanted_by_jobs_takes_rife_file_only_for_job_with_rife():
    assert wanted_by_jobs([JobOptions(), ASKED])(RIFE)
    assert not wanted_by_jobs([JobOptions()])(RIFE)


def test_verify_of_published_rife_file_is_ok_and_of_other_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def row():
        (found,) = [row for row in verify_weights(tmp_path, "fp4-distill") if row.path.startswith("rife/")]
        return found

    assert [row for row in verify_weights(tmp_path, "fp4-distill") if row.path.startswith("rife/")] == []
    path = write_tiny_rife(tmp_path)
    assert row().status == "corrupt" and CONVERTED[RIFE].sha256 in row().note
    pin = Pin(path.stat().st_size, str(row().sha256))
    monkeypatch.setattr("runner.weights.verify.CONVERTED", {RIFE: pin})
    assert row().status == "ok"
    save_file({"other": torch.zeros(1)}, path)
    assert row().status == "corrupt"


def test_verify_of_rife_file_from_other_source_uses_its_record(tmp_path: Path):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    try:
        from convert_rife import convert
    finally:
        sys.path.pop(0)
    torch.save(tiny_network().state_dict(), tmp_path / "flownet.pkl")
    convert(tmp_path / "flownet.pkl", tmp_path / RIFE, unknown=True)
    (found,) = [row for row in verify_weights(tmp_path, "fp4-distill") if row.path.startswith("rife/")]
    assert (found.status, found.note) == ("ok", "as recorded when it was made")
    data = bytearray((tmp_path / RIFE).read_bytes())
    data[-1] ^= 1
    (tmp_path / RIFE).write_bytes(data)
    (found,) = [row for row in verify_weights(tmp_path, "fp4-distill") if row.path.startswith("rife/")]
    assert found.status == "corrupt"
