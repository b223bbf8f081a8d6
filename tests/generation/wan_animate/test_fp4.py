"""FP4 recipes on the tiny model: each way of having the weights, against bf16; LoRAs by job; files that are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runner.batch.job_source import ShardJobs
from runner.batch.ledger import Ledger
from runner.batch.loop import Batch, Engine
from runner.batch.memory_sampler import MemorySampler
from runner.batch.progress import SilentProgress
from runner.batch.stop import Stop
from runner.batch.summary import SummaryWriter
from runner.errors import WeightsCorrupt, WeightsMissing
from runner.generation.families import EngineSettings
from runner.generation.wan_animate.generator import WanAnimateGenerator
from runner.generation.wan_animate.loading import load_pipeline
from runner.generation.wan_animate.loras import JobLoras, lora_parts
from runner.quantization.files.checkpoint_read import load_quantized
from runner.quantization.files.text_encoder import quantize_text_encoder
from runner.quantization.formats.e2m1 import FORMATS, dequantize
from runner.quantization.formats.scales import quantize
from runner.quantization.linear import FP4Linear
from runner.quantization.lora.apply import attached, merge_param, plan_merge, read_lora
from runner.records.events import EventLog
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.spec.recipes import SOURCE_WEIGHTS, get_recipe
from runner.storage import LocalStorage
from runner.weights.resolved import ResolvedRecipe, resolve_recipe
from runner.weights.store import ModelStore
from runner.weights.variant import TEXT_FILE
from tests.generation.fp4_stores import (
    DISTILL,
    OWN,
    PUBLISHED,
    MemoryPreprocessor,
    psnr,
    rendered,
    source_weights,
    transformer_config,
    write_own,
    write_seed,
    write_source,
)
from tests.quantization.lora_files import write_published
from tests.safetensors_headers import first_of, redeclare

CPU = torch.device("cpu")
DISTILLED = get_recipe("fp4-distill")
# The same solver and steps with the source's weights: what FP4 is compared with.
SOURCE = replace(DISTILLED, name="source", fp4=False, distilled=False)
LAYER = "blocks.1.ffn.net.2"  # [64, 128]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_onnx(monkeypatch) -> None:
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)


@pytest.fixture(scope="module")
def source(tiny_store_dir, tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "models", tiny_store_dir)


@pytest.fixture(scope="module")
def own(source, tmp_path_factory) -> Path:
    return write_own(tmp_path_factory.mktemp("own") / "models", source)


@pytest.fixture(scope="module")
def seed(source, tmp_path_factory) -> Path:
    return write_seed(tmp_path_factory.mktemp("seed") / "models", source)


@pytest.fixture
def mine(own, tmp_path) -> Path:
    """A copy of `own` to be changed."""
    return Path(shutil.copytree(own, tmp_path / "mine"))


def load(root: Path, recipe=DISTILLED, **settings: Any) -> WanAnimateGenerator:
    return WanAnimateGenerator.load(resolve_recipe(ModelStore(root), recipe), EngineSettings(device="cpu", **settings))


@pytest.fixture(scope="module")
def frames(source, own, seed) -> dict[str, np.ndarray]:
    """One job by every way: bf16 with and without the LoRA, merged FP4, FP4 and the LoRA beside."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)
        generator = load(source, SOURCE)
        made["bf16 without it"] = rendered(generator)
        generator.loras = None
        assert generator.pipeline is not None
        with attached(generator.pipeline.transformer, [read_lora(source / DISTILL)]):
            made["bf16"] = rendered(generator)
        made |= {"merged": rendered(load(own)), "beside": rendered(load(seed))}
    return made


def decibels(frames: Mapping[str, np.ndarray], record_property: Callable[[str, object], None]) -> dict[str, float]:
    """Against bf16 with the LoRA, by name, and in the record of the test."""
    found = {name: psnr(made, frames["bf16"]) for name, made in frames.items() if name != "bf16"}
    record_property("psnr_db", {name: round(value, 1) for name, value in found.items()})
    return found


def test_merged_file_renders_near_bf16_frames(own, frames, record_property):
    assert not (own / SOURCE_WEIGHTS / "transformer").exists()
    assert not (own / DISTILL).exists()
    assert frames["merged"].shape == (5, 64, 48, 3)
    assert frames["merged"].std() > 5
    found = decibels(frames, record_property)
    assert found["merged"] > 31  # 33.8; a tiny random model forgives less than a trained one
    assert found["bf16 without it"] < 28  # the LoRA shows: 25.9


def test_published_files_with_distill_lora_render_near_bf16_frames(seed, frames, record_property):
    files = sorted(p.name for p in (seed / SOURCE_WEIGHTS / "transformer").iterdir())
    assert files == ["config.json"]
    assert decibels(frames, record_property)["beside"] > 28.5  # 31.1: scales by absmax, groups twice as wide
    assert psnr(frames["beside"], frames["merged"]) > 28.5  # 30.9


def test_published_files_as_fp4_render_without_distill_lora(seed, frames, record_property):
    """`fp4` runs with the solver of the compared frames; the distill LoRA in the store is not used."""
    generator = load(seed, replace(get_recipe("fp4"), scheduler=DISTILLED.scheduler))
    assert "kept beside it" not in generator.description["transformer"]
    assert "loras_beside" not in generator.description
    made = rendered(generator)
    record_property("psnr_db", round(psnr(made, frames["bf16 without it"]), 1))
    assert psnr(made, frames["bf16 without it"]) > 28  # 29.8
    assert psnr(made, frames["bf16"]) < 28


def test_merged_weights_and_lora_beside_differ_only_by_rounding(source, own, seed):
    """The effective weight of a layer: with the LoRA merged before quantisation, or added to the 4-bit weight."""
    lora = read_lora(source / DISTILL)
    name = f"{LAYER}.weight"
    weight = source_weights(source)[name]
    exact = merge_param(name, weight, plan_merge([lora], {name: weight.shape}))
    acting = {}
    for way, root in (("merged", own), ("beside", seed)):
        layer = load(root).pipeline.transformer.get_submodule(LAYER)
        assert isinstance(layer, FP4Linear)
        bare = layer(torch.zeros(1, layer.in_features))
        acting[way] = (layer(torch.eye(layer.in_features)) - bare).T
    errors = {way: relative(made, exact) for way, made in acting.items()}
    assert errors["merged"] < 0.1
    assert errors["beside"] < 0.12
    assert relative(acting["merged"], acting["beside"]) < np.hypot(*errors.values()) * 1.1
    assert relative(weight, exact) > 2 * errors["beside"]  # the LoRA is more than the rounding of either


def relative(made: torch.Tensor, exact: torch.Tensor) -> float:
    return float((made - exact).norm() / exact.norm())


def test_searched_scales_have_less_error_than_absmax(source):
    weights = [t for name, t in source_weights(source).items() if name.endswith(("to_q.weight", "net.2.weight"))]

    def error(fmt: str, method: Any) -> float:
        lost = [(dequantize(quantize(w, FORMATS[fmt], method), FORMATS[fmt]) - w).norm() ** 2 for w in weights]
        return float((sum(lost) / sum(w.norm() ** 2 for w in weights)) ** 0.5)

    errors = error("g32", "absmax"), error("g32", "mse"), error("nvfp4", "mse")
    print("relative error of weights: g32 absmax, g32 mse, nvfp4 mse:", *(f"{e:.4f}" for e in errors))
    assert max(errors[1:]) < 0.9 * errors[0]  # fresh weights are uniform: NVFP4's finer groups gain nothing on those


def test_description_of_fp4_generator_contains_loaded_files(own, seed):
    merged, beside = load(own).description, load(seed).description
    shapes = {name: tensor.nbytes for name, tensor in load_file(own / OWN).items()}
    assert merged["transformer_bytes"] == sum(shapes.values())
    assert (merged["fp4_layers"], beside["fp4_layers"]) == (65, 65)
    assert (merged["format"], beside["format"]) == ("nvfp4", "g32")
    assert merged["load_s"] > 0
    assert merged["kernel_why"]
    assert json.loads(merged["made_with"]["video_lab.loras"])[0]["name"] == "distill"
    assert "beside" not in merged["transformer"]
    assert "distill.safetensors kept beside it" in beside["transformer"]
    assert beside["loras_beside"]["untargeted"] == 0
    assert (merged["unverified"], beside["unverified"]) == ([], [])
    json.dumps([merged, beside])


def test_description_lists_unverified_conventions_of_published_file(source, tmp_path, frames):
    silent = write_seed(tmp_path / "models", source, config=None)
    generator = load(silent)
    assert set(generator.description["unverified"]) == {"nibble", "codes", "scale", "unit"}
    assert np.array_equal(rendered(generator), frames["beside"])
    told = load(silent, assume={"nibble": "high", "scale": "multiply"})
    assert set(told.description["unverified"]) == {"codes", "unit"}
    assert not np.array_equal(rendered(told), frames["beside"])


def test_int4_text_encoder_is_preferred_and_renders_same_frames(mine, source, frames):
    """The tiny encoder has no layer as wide as a group of 128: the file keeps bf16, and frames must not change."""
    quantize_text_encoder(source / SOURCE_WEIGHTS / "text_encoder", mine / Path(OWN).with_name(TEXT_FILE), device="cpu")
    shutil.rmtree(mine / SOURCE_WEIGHTS / "text_encoder")
    before = ResolvedRecipe(ModelStore(mine), DISTILLED).digests
    assert "text_encoder" not in before
    generator = load(mine)
    assert generator.description["text_encoder"].startswith("INT4")
    assert np.array_equal(rendered(generator), frames["merged"])
    with pytest.raises(WeightsMissing, match="text_encoder"):
        resolve_recipe(ModelStore(mine), get_recipe("bf16"))


# LoRAs of jobs


@pytest.fixture
def styled(mine, source) -> Path:
    """`mine` with two LoRAs that touch every kind of parameter."""
    (mine / "loras").mkdir()
    config = transformer_config(source)
    write_published(mine / "loras/style.safetensors", config, seed=5)
    write_published(mine / "loras/WanAnimate_relight_x.safetensors", config, seed=6)
    return mine


def style(strength: float = 1.0) -> dict[str, Any]:
    return {"loras": [{"name": "style", "strength": strength}]}


def test_job_loras_apply_only_to_their_job_and_not_to_file(styled, frames):
    before = sha(styled / OWN)
    generator = load(styled)
    assert np.array_equal(rendered(generator), frames["merged"])
    with_style = rendered(generator, **style())
    assert psnr(with_style, frames["merged"]) < 35
    assert np.array_equal(rendered(generator, **style()), with_style)
    faint = rendered(generator, **style(0.25))
    assert psnr(faint, frames["merged"]) > psnr(with_style, frames["merged"])
    assert np.array_equal(rendered(generator), frames["merged"])
    assert np.array_equal(rendered(generator, **style(0.0)), frames["merged"])
    assert sha(styled / OWN) == before


def test_plain_parameters_changed_in_place_leave_file_unchanged(styled):
    pipeline, _ = load_pipeline(ResolvedRecipe(ModelStore(styled), DISTILLED), CPU)
    file, transformer = styled / OWN, pipeline.transformer
    name = "blocks.0.attn1.norm_q.weight"
    stored, before = load_file(file), sha(file)
    parameter = transformer.get_parameter(name)
    address = parameter.data_ptr()
    loras = JobLoras(transformer, ResolvedRecipe(ModelStore(styled), DISTILLED))
    loras.use(JobOptions(**style()))
    assert parameter.data_ptr() == address  # in place: compiled graphs keep their references
    assert not torch.equal(parameter, stored[name])
    assert torch.equal(load_file(file)[name], stored[name])
    assert sha(file) == before
    loras.use(JobOptions())
    assert {k: v for k, v in transformer.state_dict().items() if k in stored}.keys() == stored.keys()
    assert all(torch.equal(transformer.get_parameter(k), t) for k, t in stored.items())


def sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_replace_job_uses_relighting_lora(styled, mine, frames):
    generator = load(styled)
    relit = rendered(generator, mode="replace")
    named = {"loras": [{"name": "WanAnimate_relight_x", "strength": 0.0}]}
    dark = rendered(generator, mode="replace", **named)  # a job may take it back
    assert not np.array_equal(relit, dark)
    assert np.array_equal(rendered(generator), frames["merged"])
    (styled / "loras/WanAnimate_relight_x.safetensors").unlink()
    assert np.array_equal(rendered(load(styled), mode="replace"), dark)


def test_recipe_lora_stays_attached_after_job_lora_is_detached(source, seed, tmp_path, frames):
    root = Path(shutil.copytree(seed, tmp_path / "models"))
    (root / "loras").mkdir()
    write_published(root / "loras/style.safetensors", transformer_config(source), seed=5)
    generator = load(root)
    assert not np.array_equal(rendered(generator, **style()), frames["beside"])
    assert np.array_equal(rendered(generator), frames["beside"])


def test_missing_lora_is_refused_with_names_of_known_loras(styled):
    generator = load(styled)
    with pytest.raises(WeightsMissing, match="no LoRA 'gone'; it has: WanAnimate_relight_x, style"):
        rendered(generator, loras=[{"name": "gone"}])


@pytest.mark.parametrize("damage", ["unreadable", "of another model"])
def test_failed_lora_leaves_no_change_for_next_job(styled, source, frames, damage):
    bad = styled / "loras/bad.safetensors"
    write_published(bad, transformer_config(source) | {"ffn_dim": 64})
    if damage == "unreadable":
        bad.write_bytes(bad.read_bytes()[:-1])
        with pytest.raises(WeightsCorrupt):
            lora_parts(ModelStore(styled), JobOptions(loras=[{"name": "bad"}]))
    generator = load(styled)
    with_style = rendered(generator, **style())
    with pytest.raises(WeightsCorrupt):
        rendered(generator, loras=[{"name": "style"}, {"name": "bad"}])
    assert np.array_equal(rendered(generator), frames["merged"])
    with pytest.raises(WeightsCorrupt):
        rendered(generator, loras=[{"name": "bad"}])
    assert np.array_equal(rendered(generator, **style()), with_style)


# A whole manifest


def test_transformer_is_loaded_once_for_all_jobs_of_run(styled, tmp_path, monkeypatch):
    loads: list[Path] = []

    def counted(model: Any, path: Path, *rest: Any) -> Any:
        loads.append(path)
        return load_quantized(model, path, *rest)

    monkeypatch.setattr("runner.quantization.files.checkpoint_read.load_quantized", counted)
    results = run(tmp_path, styled, {"a": {}, "b": style(), "c": {}, "d": {"seed": 7}})
    assert loads == [styled / OWN]
    digests = {name: result["output"]["frames_sha256"] for name, result in results.items()}
    assert digests["a"] == digests["c"]
    assert len(set(digests.values())) == 3
    for result in results.values():
        assert result["engine"]["transformer_bytes"] < 420_000
        assert result["engine"]["load_s"] > 0
        assert result["engine"]["unverified"] == []
    parts = {name: result["fingerprint_parts"] for name, result in results.items()}
    assert "lora.style" in json.dumps(parts["b"])
    assert "lora.style" not in json.dumps(parts["a"])


def run(folder: Path, models: Path, jobs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Render `jobs` (name → options) as a run does; their records."""
    Image.new("RGB", (8, 8)).save(folder / "ref.png")
    (folder / "video.mp4").write_bytes(b"not opened")
    store, storage = ModelStore(models), LocalStorage(folder / "out")
    wide = {"steps": 2, "max_segment_frames": 5}
    inputs = str(folder / "ref.png"), str(folder / "video.mp4"), None
    listed = [Job(name, *inputs, "a dance", JobOptions(**(wide | more)), None) for name, more in jobs.items()]
    events = EventLog(quiet=True)
    summary = SummaryWriter(
        storage,
        run_id="r1",
        shard="0-of-1",
        shard_reason="test",
        manifest="m.yaml",
        recipe=DISTILLED.name,
        job_ids=list(jobs),
        events=events,
    )
    identity = ResolvedRecipe(store, DISTILLED).digests
    engine = Engine(DISTILLED.name, identity, lambda: load(models), own=lambda job: lora_parts(store, job.options))
    batch = Batch(
        ShardJobs(listed),
        engine,
        storage,
        Ledger(storage),
        summary,
        events,
        stop=Stop(),
        scratch=folder / "scratch",
        progress=SilentProgress(),
        sampler=MemorySampler(0.05),
    )
    code = batch.run()
    assert code == 0, summary.lines
    return {name: json.loads((folder / f"out/jobs/{name}/result.json").read_bytes()) for name in jobs}


# What is refused


def edit(
    file: Path, change: Callable[[dict[str, torch.Tensor]], Any], metadata: Mapping[str, str] | None = None
) -> None:
    with safe_open(file, framework="pt") as opened:
        held = dict(opened.metadata() or {})
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata=held | dict(metadata or {}))


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{LAYER}.weight_scale"]
        if scale.dtype == torch.uint8:
            scale[3, 1] = torch.tensor(value).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            scale[3, 1] = value

    return change


def recast(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"].short()


def regroup(tensors: dict[str, torch.Tensor]) -> None:
    scale = tensors[f"{LAYER}.weight_scale"]
    tensors[f"{LAYER}.weight_scale"] = scale[:, : scale.shape[1] // 2 + 1].contiguous()


HEADERS: dict[str, Callable[[Path], None]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut in its header": lambda file: file.write_bytes(file.read_bytes()[:500]),
    "empty": lambda file: file.write_bytes(b""),
    "no safetensors": lambda file: file.write_bytes(b"\xff" * 5000),
    "codes of another dtype": lambda file: edit(file, recast),
    "scales for another group": lambda file: edit(file, regroup),
}
VALUES: dict[str, Callable[[Path], None]] = {
    "NaN in a scale": lambda file: edit(file, spoil(float("nan"))),
    "a negative scale": lambda file: edit(file, spoil(-1.0)),
    "a layer that is missing": lambda file: edit(file, lambda t: [t.pop(f"{LAYER}.bias")]),
}


@pytest.mark.parametrize("damage", [*HEADERS, "another group in the metadata"])
def test_own_file_with_damaged_header_is_refused(mine, damage):
    if damage in HEADERS:
        HEADERS[damage](mine / OWN)
    else:
        edit(mine / OWN, lambda tensors: None, {"video_lab.group": "32"})
    with pytest.raises(WeightsCorrupt) as caught:
        resolve_recipe(ModelStore(mine), DISTILLED)
    assert (caught.value.exit_code, OWN in caught.value.message) == (2, True)


@pytest.mark.parametrize(("said", "claimed"), [("BF16", "I16"), ("F32", "I32")])
def test_weight_files_with_floats_declared_as_integers_are_refused(mine, seed, tmp_path, said, claimed):
    """Checked in our file, a published file, its LoRA and the INT4 text encoder, before anything is loaded."""
    text = mine / Path(OWN).with_name(TEXT_FILE)
    quantize_text_encoder(mine / SOURCE_WEIGHTS / "text_encoder", text, device="cpu")
    resolve_recipe(ModelStore(mine), DISTILLED)  # codes of int16 and uint8 belong there
    other = Path(shutil.copytree(seed, tmp_path / "models"))
    edit(other / PUBLISHED, lambda t: t.update({n: v.float() for n, v in t.items() if v.dtype == torch.bfloat16}))
    edit(other / PUBLISHED, lambda t: t.update({"proj_out.bias": t["proj_out.bias"].bfloat16()}))
    edit(other / DISTILL, lambda t: t.update({n: t[n].float() for n in sorted(t)[::2]}))
    resolve_recipe(ModelStore(other), DISTILLED)
    for file in (mine / OWN, text, other / PUBLISHED, other / DISTILL):
        root = mine if mine in file.parents else other
        if said == "F32" and file == text:
            continue  # it holds none
        name, whole = first_of(file, said), file.read_bytes()
        redeclare(file, name, claimed)
        with pytest.raises(WeightsCorrupt, match=name) as caught:
            resolve_recipe(ModelStore(root), DISTILLED)
        assert str(file) in caught.value.message
        file.write_bytes(whole)
        resolve_recipe(ModelStore(root), DISTILLED)


@pytest.mark.parametrize("damage", VALUES)
def test_own_file_with_damaged_values_is_refused_before_job(mine, damage):
    VALUES[damage](mine / OWN)
    with pytest.raises(WeightsCorrupt, match=LAYER):
        load(mine)


@pytest.mark.parametrize("damage", [*HEADERS, *VALUES, "another group in the config"])
def test_published_file_with_damage_is_refused_before_job(seed, tmp_path, damage):
    root = Path(shutil.copytree(seed, tmp_path / "models"))
    if damage in HEADERS | VALUES:
        (HEADERS | VALUES)[damage](root / PUBLISHED)
    else:
        (root / PUBLISHED).with_name("quantize_config.json").write_text('{"group_size": 64}')
    with pytest.raises(WeightsCorrupt) as caught:
        load(root)
    assert caught.value.code == "weights.corrupt"


@pytest.mark.parametrize("damage", ["cut short", "of another model"])
def test_distill_lora_with_damage_is_refused_before_job(source, seed, tmp_path, damage):
    root = Path(shutil.copytree(seed, tmp_path / "models"))
    if damage == "cut short":
        HEADERS[damage](root / DISTILL)
    else:
        write_published(root / DISTILL, transformer_config(source) | {"ffn_dim": 64})
    with pytest.raises(WeightsCorrupt, match="distill"):
        load(root)
