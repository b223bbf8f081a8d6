"""What is attached for a job, on a model of two layers; how it looks in frames is in test_fp4.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from runner.errors import JobWeightsCorrupt, JobWeightsMissing, WeightsCorrupt
from runner.generation.wan_animate.loras import JobLoras, lora_parts
from runner.quantization.lora.read import read_lora
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore
from tests.safetensors_headers import redeclare


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


def write(root: Path, name: str, value: float, key: str = "to_q") -> Path:
    path = root / "loras" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    down, up = torch.full((1, 4), value), torch.ones(4, 1)
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
    return path


def job(*loras: tuple[str, float], **more) -> JobOptions:
    return JobOptions(loras=[{"name": name, "strength": strength} for name, strength in loras], **more)


@pytest.fixture
def model() -> Model:
    return Model().requires_grad_(False)


@pytest.fixture
def loras(model, tmp_path) -> JobLoras:
    write(tmp_path, "one", 1.0)
    write(tmp_path, "two", 2.0)
    return JobLoras(model, ResolvedRecipe(ModelStore(tmp_path), get_recipe("bf16")))


def added(model: Model, before: torch.Tensor) -> float:
    (difference,) = (model.to_q.weight - before).unique().tolist() or [0.0]
    return difference


def test_each_job_gets_its_own_and_nothing_of_the_last(model, loras):
    with torch.no_grad():
        model.to_q.weight.zero_()
    before = model.to_q.weight.clone()
    assert loras.use(job(("one", 1.0)))["tensors"] == 2
    assert added(model, before) == 1.0
    assert loras.use(job(("one", 0.5), ("two", 1.0)))["tensors"] == 4
    assert added(model, before) == 2.5
    assert loras.use(job(("two", -1.0))) == {"tensors": 2, "untargeted": 0}
    assert added(model, before) == -2.0
    loras.use(job())
    assert torch.equal(model.to_q.weight, before)


def test_jobs_that_want_the_same_share_the_work(model, loras, monkeypatch):
    loras.use(job(("one", 1.0)))
    monkeypatch.setattr("runner.quantization.lora.apply.attach", None)  # would fail if it were called
    assert loras.use(job(("one", 1.0))) == {}


def test_files_that_no_job_uses_any_more_are_not_held(loras, tmp_path, monkeypatch):
    from runner.quantization.lora import apply

    read: list[str] = []
    honest = apply.read_lora
    monkeypatch.setattr(apply, "read_lora", lambda path: (read.append(path.stem), honest(path))[1])
    for name, strength in (("one", 1.0), ("one", 0.5), ("two", 1.0), ("one", 1.0)):
        loras.use(job((name, strength)))
    assert read == ["one", "two", "one"]


@pytest.mark.parametrize("damage", ["missing", "unreadable", "of another model"])
def test_after_a_failure_the_next_job_gets_what_it_asks_for(model, loras, tmp_path, damage):
    before = model.to_q.weight.clone()
    loras.use(job(("two", 1.0)))
    bad = write(tmp_path, "bad", 1.0, key="nowhere")
    if damage == "unreadable":
        bad.write_bytes(b"\xff" * 100)
    elif damage == "missing":
        bad.unlink()
    with pytest.raises(JobWeightsMissing if damage == "missing" else JobWeightsCorrupt):
        loras.use(job(("bad", 1.0)))
    loras.use(job())
    assert torch.equal(model.to_q.weight, before)
    loras.use(job(("one", 1.0)))
    torch.testing.assert_close(model.to_q.weight, before + 1.0)


def test_replace_jobs_get_the_relighting_lora(model, loras, tmp_path):
    write(tmp_path, "x_relight_y", 4.0)
    before = model.to_q.weight.clone()
    loras.use(job(mode="replace"))
    torch.testing.assert_close(model.to_q.weight, before + 4.0)
    loras.use(job())
    assert torch.equal(model.to_q.weight, before)


@pytest.mark.parametrize(
    ("name", "claimed"), [("to_q.lora_A.weight", "I32"), ("to_q.alpha", "I32"), ("to_q.lora_B.weight", "U32")]
)
def test_floats_declared_as_integers_are_refused_before_the_first_job(tmp_path, name, claimed):
    store, path = ModelStore(tmp_path), write(tmp_path, "one", 1.0)
    tensors = load_file(path)
    save_file(tensors | {"to_q.alpha": torch.tensor(1)}, path)  # an int64, as trainers write it
    assert lora_parts(store, job(("one", 1.0)))
    save_file(tensors | {"to_q.alpha": torch.tensor(1.0)}, path)
    assert lora_parts(store, job(("one", 1.0)))
    redeclare(path, name, claimed)
    with pytest.raises(WeightsCorrupt, match=rf"{name} is {claimed}, not .*F32") as caught:
        lora_parts(store, job(("one", 1.0)))
    assert str(path) in caught.value.message
    with pytest.raises(WeightsCorrupt):
        read_lora(path)


def test_content_and_strength_are_in_a_jobs_identity(tmp_path):
    path, store = write(tmp_path, "one", 1.0), ModelStore(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert lora_parts(store, job(("one", 0.5))) == {"lora.one": f"{digest} x 0.5"}
    assert lora_parts(store, job()) == lora_parts(store, job(mode="replace")) == {}
    write(tmp_path, "x_relight", 1.0)
    assert set(lora_parts(store, job(mode="replace"))) == {"lora.x_relight"}
    with pytest.raises(JobWeightsMissing, match="no LoRA 'two'"):
        lora_parts(store, job(("two", 1.0)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JobWeightsCorrupt, match=r"one\.safetensors"):
        lora_parts(ModelStore(tmp_path), job(("one", 0.5)))
