"""Checkpoint: stores quantised, with a bound on memory, killed in the middle, damaged in every way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runner.errors import ConfigInvalid, StorageFull, WeightsCorrupt, WeightsMissing
from runner.quantization.files import checkpoint_write
from runner.quantization.files.checkpoint_read import load_quantized
from runner.quantization.files.quantized_header import check_file
from runner.quantization.files.safetensors_stream import data_sha256
from runner.quantization.formats.e2m1 import FORMATS, G32, NVFP4, dequantize
from runner.quantization.formats.scales import quantize
from runner.quantization.lora.read import read_lora
from runner.quantization.rules import RULES, linear_shapes, transformer_on_meta
from tests.quantization.random_stores import TINY, WIDE, inputs, random_weights, write_store
from tests.system_tests import system_test

NAME = "quantized_transformer.safetensors"
FP32_PARTS = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "motion_synthesis_weight", "rope"}
ROOT = Path(__file__).resolve().parents[3]
# Of one device bits can be promised; a GPU has a test of its own.
quantize_store = partial(checkpoint_write.quantize_store, device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "transformer", TINY, shard_bytes=300_000)


@pytest.fixture(scope="module", params=FORMATS.values(), ids=FORMATS)
def made(request, store, tmp_path_factory):
    """(format, summary) of the tiny store, quantised; not to be changed."""
    return request.param, quantize_store(store, tmp_path_factory.mktemp("made") / NAME, request.param)


def test_quantize_store_writes_tensors_of_quantize(store, made):
    fmt, summary = made
    weights, stored = random_weights(TINY), load_file(summary.path)
    linears = linear_shapes(transformer_on_meta(TINY))
    expected = {}
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if layer in linears and name.endswith(".weight"):
            expected |= {f"{layer}.{suffix}": part for suffix, part in quantize(tensor, fmt).items()}
        else:
            expected[name] = tensor if FP32_PARTS & set(name.split(".")) else tensor.bfloat16()
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    assert summary.layers == len(linears)
    assert (summary.path.parent / "config.json").read_bytes() == (store / "config.json").read_bytes()
    assert sorted(p.name for p in summary.path.parent.iterdir()) == ["config.json", NAME]


def test_quantize_store_writes_metadata_of_file(store, made):
    fmt, summary = made
    shards = sorted(store.glob("*.safetensors"))
    assert len(shards) > 2
    listing = "".join(f"{hashlib.sha256(s.read_bytes()).hexdigest()}  {s.name}\n" for s in shards)
    raw = summary.path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    with safe_open(summary.path, framework="np") as opened:
        assert opened.metadata() == {
            "format": "pt",
            "video_lab.format": fmt.name,
            "video_lab.scale_method": "mse",
            "video_lab.group": str(fmt.group),
            "video_lab.loras": "[]",
            "video_lab.version": "0.1.0",
            "video_lab.source_sha256": hashlib.sha256(listing.encode()).hexdigest(),
            "video_lab.sha256": hashlib.sha256(data).hexdigest(),
        }
    assert data_sha256(summary.path) == summary.sha256 == check_file(summary.path).sha256
    assert summary.source_sha256 == hashlib.sha256(listing.encode()).hexdigest()
    assert summary.bytes == len(raw)


def test_tensor_offset_is_aligned(made):
    _, summary = made
    for info in check_file(summary.path).header.tensors.values():
        assert info.start % info.dtype.itemsize == 0, info


def test_quantize_store_of_one_bfloat16_file_quantises_and_records_sha256(tmp_path):
    source = write_store(tmp_path / "transformer", TINY, torch.bfloat16)
    summary = quantize_store(source, tmp_path / "out" / NAME, G32, "absmax")
    weight = random_weights(TINY)["blocks.0.ffn.net.2.weight"].bfloat16()
    stored = load_file(summary.path)
    assert torch.equal(stored["blocks.0.ffn.net.2.weight_packed"], quantize(weight, G32, "absmax")["weight_packed"])
    only = next(source.glob("*.safetensors"))
    assert summary.source_sha256 == hashlib.sha256(only.read_bytes()).hexdigest()


def test_quantize_store_with_rule_keeps_its_layers(store, tmp_path):
    summary = quantize_store(store, tmp_path / NAME, G32, "absmax", RULES["sensitive"].keep)
    assert set(summary.kept) == {
        "proj_out",
        "face_encoder.out_proj",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
    }
    stored, weights = load_file(summary.path), random_weights(TINY)
    assert torch.equal(stored["proj_out.weight"], weights["proj_out.weight"].bfloat16())
    name = "condition_embedder.time_embedder.linear_1.weight"
    assert torch.equal(stored[name], weights[name])
    model = transformer_on_meta(TINY)
    load_quantized(model, summary.path)
    assert type(model.proj_out) is torch.nn.Linear and model.proj_out.weight.dtype == torch.bfloat16


def test_merge_is_applied_to_every_parameter_before_quantising(store, tmp_path):
    seen = []

    class Applied:
        name, sha256, strength = "distill", "ab" * 32, 0.5

    def add_one(name, weight):
        assert weight.dtype == torch.float32
        seen.append(name)
        return weight + 1

    summary = quantize_store(store, tmp_path / NAME, G32, "absmax", loras=[Applied()], merge=add_one)
    weights, stored = random_weights(TINY), load_file(summary.path)
    assert sorted(seen) == sorted(weights)
    wanted = quantize(weights["proj_out.weight"] + 1, G32, "absmax")
    assert torch.equal(stored["proj_out.weight_scale"], wanted["weight_scale"])
    assert torch.equal(stored["blocks.0.norm2.bias"], weights["blocks.0.norm2.bias"] + 1)
    assert check_file(summary.path).loras == ({"name": "distill", "sha256": "ab" * 32, "strength": 0.5},)


def test_lora_file_is_merged_and_recorded(store, tmp_path):
    """Calculated by hand: one pair in the original's names, one norm, one tensor that has no place in this model."""
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator) * 0.1
    diff = torch.randn(64, generator=generator)
    lora = tmp_path / "distill.safetensors"
    save_file(
        {
            "diffusion_model.blocks.1.self_attn.q.lora_down.weight": down,
            "diffusion_model.blocks.1.self_attn.q.lora_up.weight": up,
            "diffusion_model.blocks.1.norm3.diff": diff,
            "diffusion_model.blocks.9.norm3.diff": diff.clone(),
        },
        lora,
    )
    summary = quantize_store(store, tmp_path / "out" / NAME, G32, loras=[read_lora(lora, strength=0.5)])
    weights, stored = random_weights(TINY), load_file(summary.path)
    merged = weights["blocks.1.attn1.to_q.weight"] + 0.5 * up @ down
    parts = {suffix: stored[f"blocks.1.attn1.to_q.{suffix}"] for suffix in G32.tensors(64, 64)}
    torch.testing.assert_close(dequantize(parts, G32), dequantize(quantize(merged, G32), G32), rtol=0.01, atol=0.05)
    assert (dequantize(parts, G32) - merged).norm() < 0.12 * merged.norm()
    torch.testing.assert_close(stored["blocks.1.norm2.weight"], weights["blocks.1.norm2.weight"] + 0.5 * diff)
    assert [key.partition(": ")[2] for key in summary.untargeted] == ["diffusion_model.blocks.9.norm3.diff"]
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert check_file(summary.path).loras == ({"name": "distill", "sha256": digest, "strength": 0.5},)


def test_importance_changes_codes_and_uncalibrated_layers_are_listed(store, tmp_path):
    layer = "blocks.1.ffn.net.2"
    importance = {layer: torch.linspace(0.01, 4, 128)}
    summary = quantize_store(store, tmp_path / NAME, G32, "activation", importance=importance)
    weight, stored = random_weights(TINY)[f"{layer}.weight"], load_file(summary.path)
    wanted = quantize(weight, G32, "activation", importance[layer])
    assert torch.equal(stored[f"{layer}.weight_packed"], wanted["weight_packed"])
    assert not torch.equal(wanted["weight_packed"], quantize(weight, G32)["weight_packed"])
    assert layer not in summary.uncalibrated and len(summary.uncalibrated) == summary.layers - 1
    with pytest.raises(ConfigInvalid, match="calibration"):
        quantize_store(store, tmp_path / "other" / NAME, G32, "activation")


def test_pick_device_auto_with_gpu_is_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert checkpoint_write._pick_device("auto") == (
        torch.device("cpu"),
        f"no CUDA device; {torch.get_num_threads()} threads",
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "A GPU")
    assert checkpoint_write._pick_device("auto") == (torch.device("cuda"), "A GPU is there")
    assert checkpoint_write._pick_device("cpu") == (torch.device("cpu"), "asked for")


def test_progress_ends_at_all_bytes_and_tensors(store, tmp_path):
    ticks = iter(range(10_000))
    seen = []
    quantize_store(store, tmp_path / NAME, G32, "absmax", progress=seen.append, clock=lambda: next(ticks))
    assert [p.tensors for p in seen] == list(range(1, len(seen) + 1))
    last = seen[-1]
    assert (last.bytes, last.tensors, last.seconds_left) == (last.of_bytes, last.of_tensors, 0)
    half = seen[len(seen) // 2]
    assert half.gb_per_s == pytest.approx(half.bytes / half.seconds / 1e9)
    assert half.seconds_left == pytest.approx(half.seconds / half.bytes * (half.of_bytes - half.bytes))


MEASURED = """
import json, re, sys, threading
from pathlib import Path
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
import torch
torch_alone = anonymous()
from runner.quantization.files.checkpoint_write import quantize_store
from runner.quantization.formats.e2m1 import FORMATS
peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
source, *outs = map(Path, sys.argv[1:])
summary = quantize_store(source, outs[0], FORMATS["g32"], "absmax")
stop.set(); watcher.join()
print(json.dumps({"peak": peak, "torch": torch_alone, "bytes": summary.source_bytes, "s": summary.seconds}), flush=True)
for out in outs[1:]:
    quantize_store(source, out, FORMATS["g32"], "mse")
"""


def start(source: Path, *outs: Path) -> subprocess.Popen[str]:
    """A process that quantises into each of `outs`, and after the first says the peak of its anonymous memory."""
    command = [sys.executable, "-c", MEASURED, str(source), *map(str, outs)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def measured_then_killed(tmp_path_factory):
    """(what was measured, the finished file, the folder of the one in whose middle the process was killed)."""
    root = tmp_path_factory.mktemp("wide")
    source = write_store(root / "transformer", WIDE, shard_bytes=64 << 20)  # 256 MB
    whole, half = root / "whole" / NAME, root / "half" / NAME
    with start(source, whole, half) as process:
        try:
            assert process.stdout is not None
            found = json.loads(process.stdout.readline())
            while not half.with_name(f"{NAME}.tmp").exists():
                assert process.poll() is None, "it ended before it wrote"
                time.sleep(0.005)
            time.sleep(0.1)
            assert process.poll() is None, "it ended before it was killed"
        finally:
            process.kill()
    yield found, whole, half.parent
    shutil.rmtree(root)


@system_test
def test_quantize_store_memory_is_bounded_by_one_tensor(measured_then_killed, record_property):
    found, whole, _ = measured_then_killed
    record_property("anonymous_mb", found["peak"] // 1_000_000)
    assert found["bytes"] > 256e6
    assert found["peak"] < 600e6, found  # all imports counted: they are about 300 MB of it, torch alone 160
    assert len(check_file(whole).layers) == len(linear_shapes(transformer_on_meta(WIDE)))


@system_test
def test_killed_quantize_store_leaves_no_file(measured_then_killed):
    _, _, folder = measured_then_killed
    assert [p.name for p in folder.iterdir()] == [f"{NAME}.tmp"]


@pytest.mark.soak
def test_quantize_store_memory_does_not_grow_with_model(tmp_path):
    """4 GB: sixteen times as much, in matrices of 16 MB."""
    config = dict(WIDE) | {"num_attention_heads": 16, "added_kv_proj_dim": 1024, "ffn_dim": 4096, "num_layers": 52}
    source = write_store(tmp_path / "transformer", config, shard_bytes=512 << 20)
    with start(source, tmp_path / "out" / NAME) as process:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
    assert process.returncode == 0
    assert found["bytes"] > 4e9
    assert found["peak"] < 600e6, found


def test_staged_file_of_killed_run_is_replaced_by_next_run(store, tmp_path):
    (tmp_path / f"{NAME}.tmp").write_bytes(b"x" * 5_000_000)
    summary = quantize_store(store, tmp_path / NAME, G32, "absmax")
    assert data_sha256(tmp_path / NAME) == summary.sha256 and summary.path.stat().st_size < 1_000_000
    assert not (tmp_path / f"{NAME}.tmp").exists()


@pytest.mark.parametrize("stop_at", [1, 40, 120])
def test_interrupted_quantize_store_keeps_existing_file(store, tmp_path, stop_at):
    (tmp_path / NAME).write_bytes(b"the old file")

    def stop(progress):
        if progress.tensors == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_store(store, tmp_path / NAME, G32, "absmax", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == b"the old file"


def test_quantize_store_on_full_disk_is_refused_at_once(store, tmp_path, monkeypatch):
    def full(fd, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    seen = []
    with pytest.raises(StorageFull):
        quantize_store(store, tmp_path / NAME, G32, "absmax", progress=seen.append)
    assert seen == [] and list(tmp_path.iterdir()) == []


def test_second_quantize_store_on_same_file_is_refused(store, tmp_path):
    def second(progress):
        if progress.tensors == 1:
            with pytest.raises(ConfigInvalid, match="another process"):
                quantize_store(store, tmp_path / NAME, NVFP4, "absmax")

    summary = quantize_store(store, tmp_path / NAME, G32, "absmax", progress=second)
    assert data_sha256(tmp_path / NAME) == summary.sha256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_quantize_store_on_gpu_writes_same_file_and_model_runs(store, tmp_path, fmt):
    here, there = (quantize_store(store, tmp_path / d / NAME, fmt, "absmax", device=d) for d in ("cpu", "cuda"))
    assert here.sha256 == there.sha256
    results = []
    for device in ("cpu", "cuda"):
        model = transformer_on_meta(TINY)
        load_quantized(model, there.path, device, torch.float32)
        assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {device}
        given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in inputs().items()}
        with torch.no_grad():
            results.append(model(**given)[0].cpu())
    assert (results[0] - results[1]).norm() < 0.01 * results[0].norm()


# Sources that must be refused.


def change_source(store: Path, folder: Path, change) -> Path:
    copy = folder / "transformer"
    shutil.copytree(store, copy)
    shard = max(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
    return copy


def spoil(tensors):
    next(t for t in tensors.values() if t.ndim == 2)[0, 0] = float("nan")


def spoil_plain(tensors):
    tensors["proj_out.bias"][0] = float("inf")


def reshape(tensors):
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:1].clone()


def narrow(tensors):
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoil, "NaN"),
        (spoil_plain, "proj_out.bias holds NaN or infinite"),
        (reshape, r"proj_out.weight has shape \[1, 64\]"),
        (narrow, "int8"),
        (lambda t: t.pop("proj_out.weight"), "proj_out.weight is not in"),
        (lambda t: t.update(stray=torch.zeros(3)), "stray"),
    ],
)
def test_quantize_store_of_inconsistent_source_is_refused(store, tmp_path, change, says):
    source = change_source(store, tmp_path, change)
    with pytest.raises(WeightsCorrupt, match=says):
        quantize_store(source, tmp_path / "out" / NAME, G32, "absmax")
    assert not list(tmp_path.glob("out/*.safetensors*"))


def test_quantize_store_of_missing_or_truncated_source_is_refused(store, tmp_path):
    with pytest.raises(WeightsMissing, match=r"config\.json"):
        quantize_store(tmp_path, tmp_path / NAME, G32)
    (tmp_path / "config.json").write_text(json.dumps(dict(TINY)))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(WeightsMissing, match="pickles are never read"):
        quantize_store(tmp_path, tmp_path / NAME, G32)
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    shard = max(copy.glob("*.safetensors"))
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 100)
    with pytest.raises(WeightsCorrupt, match="truncated"):
        quantize_store(copy, tmp_path / NAME, G32)
    shard.unlink()
    with pytest.raises(WeightsMissing):
        quantize_store(copy, tmp_path / NAME, G32)


def test_quantize_store_with_inputs_that_group_does_not_divide_names_layer(tmp_path):
    source = write_store(tmp_path / "transformer", dict(TINY) | {"freq_dim": 48})
    with pytest.raises(ConfigInvalid, match=r"time_embedder\.linear_1.*multiple"):
        quantize_store(source, tmp_path / NAME, G32)
    summary = quantize_store(source, tmp_path / "out" / NAME, G32, "absmax", RULES["sensitive"].keep)
    assert "condition_embedder.time_embedder.linear_1" in summary.kept
