"""SVDQ files of a random store: what is in them, what the metadata says, layers without calibration, the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from runner.errors import ConfigInvalid, WeightsCorrupt
from runner.quantization.activations import InputSamples
from runner.quantization.files.checkpoint_write import write_checkpoint
from runner.quantization.files.safetensors_stream import data_sha256
from runner.quantization.files.schemes import Fp4Scheme, SvdqScheme
from runner.quantization.formats.e2m1 import NVFP4
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.low_rank_split import split_weight
from runner.quantization.rules import RULES, linear_shapes, transformer_on_meta
from tests.quantization.random_stores import TINY, WIDE, random_weights, write_store
from tests.system_tests import system_test

NAME = "quantized_transformer.safetensors"
ROOT = Path(__file__).resolve().parents[3]
SEEN = "blocks.1.ffn.net.2"
layouts = pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "transformer", TINY, shard_bytes=300_000)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="np") as opened:
        return dict(opened.metadata())


@layouts
def test_a_file_holds_what_each_weight_alone_would_give(store, tmp_path, layout):
    layout = layout.with_rank(16)
    summary = write_checkpoint(store, tmp_path / NAME, SvdqScheme(layout, refits=1), device="cpu")
    weights, stored = random_weights(TINY), load_file(summary.path)
    linears = linear_shapes(transformer_on_meta(TINY))
    assert summary.kept == ("proj_out",) and summary.layers == len(linears) - 1
    names = set()
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if layer not in linears or layer in (name, "proj_out"):
            names.add(name)
            assert torch.equal(stored[name].float(), tensor.to(stored[name].dtype).float()), name
            continue
        names |= {f"{layer}.{suffix}" for suffix in layout.tensor_table(*linears[layer])}
    assert stored.keys() == names
    split = split_weight(weights[f"{SEEN}.weight"], layout, refits=1)
    for suffix, part in split.tensors.items():
        assert torch.equal(stored[f"{SEEN}.{suffix}"].view(torch.uint8), part.view(torch.uint8)), suffix
    assert summary.errors[SEEN] == split.error and summary.errors.keys() == linears.keys() - {"proj_out"}
    held = metadata(summary.path)
    assert {key: value for key, value in held.items() if "sha256" not in key} == {
        "format": "pt",
        "video_lab.format": layout.name,
        "video_lab.scale_method": "mse",
        "video_lab.group": str(layout.group),
        "video_lab.rank": "16",
        "video_lab.smoothing": "weights",
        "video_lab.calibration": "{}",
        "video_lab.refits": "1",
        "video_lab.loras": "[]",
        "video_lab.version": "0.1.0",
    }
    assert data_sha256(summary.path) == summary.sha256 == held["video_lab.sha256"]


@layouts
def test_two_runs_give_the_same_bytes(store, tmp_path, layout):
    first, second = (
        write_checkpoint(store, tmp_path / place / NAME, SvdqScheme(layout), device="cpu") for place in ("a", "b")
    )
    assert first.path.read_bytes() == second.path.read_bytes()


@layouts
def test_what_calibration_saw_counts_and_what_it_missed_is_listed(store, tmp_path, layout):
    samples = InputSamples(rows=64)
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(3))
    x[:, 5] *= 40
    samples.see(SEEN, x)
    inputs = samples.inputs()
    scheme = SvdqScheme(layout, inputs=inputs, calibration={"jobs": 1, "steps": 6, "rows": 64})
    summary = write_checkpoint(store, tmp_path / NAME, scheme, RULES["sensitive"].keep, device="cpu")
    held = metadata(summary.path)
    assert held["video_lab.smoothing"] == "calibrated" and held["video_lab.scale_method"] == "activation"
    assert json.loads(held["video_lab.calibration"]) == {"jobs": 1, "steps": 6, "rows": 64}
    assert len(summary.uncalibrated) == summary.layers - 1 and SEEN not in summary.uncalibrated
    assert len(summary.kept) == 4
    weight, stored = random_weights(TINY)[f"{SEEN}.weight"], load_file(summary.path)
    wanted = split_weight(weight, layout, inputs=inputs[SEEN]).tensors
    assert torch.equal(stored[f"{SEEN}.qweight"], wanted["qweight"])
    assert not torch.equal(wanted["qweight"], split_weight(weight, layout).tensors["qweight"])
    other = "blocks.0.ffn.net.2"
    free = split_weight(random_weights(TINY)[f"{other}.weight"], layout).tensors
    assert torch.equal(stored[f"{other}.qweight"], free["qweight"])


@layouts
def test_weights_are_merged_before_they_are_split(store, tmp_path, layout):
    summary = write_checkpoint(
        store, tmp_path / NAME, SvdqScheme(layout), device="cpu", merge=lambda name, weight: weight * 2
    )
    wanted = split_weight(random_weights(TINY)[f"{SEEN}.weight"] * 2, layout).tensors
    assert torch.equal(load_file(summary.path)[f"{SEEN}.proj_up"], wanted["proj_up"])


@layouts
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, layout):
    source = write_store(tmp_path / "transformer", TINY)
    file = source / "diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    with safe_open(file, framework="pt") as opened:
        assert SEEN + ".weight" in opened.keys()  # noqa: SIM118
    start = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])[f"{SEEN}.weight"]["data_offsets"][0]
    place = 8 + int.from_bytes(raw[:8], "little") + start
    raw[place : place + 4] = b"\x00\x00\xc0\x7f"
    file.write_bytes(raw)
    with pytest.raises(WeightsCorrupt, match=rf"{SEEN}\.weight: the weight holds NaN"):
        write_checkpoint(source, tmp_path / "out" / NAME, SvdqScheme(layout), device="cpu")
    assert not list(tmp_path.glob("out/*.safetensors*"))


def test_a_method_and_calibration_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigInvalid, match="without calibration"):
        Fp4Scheme(NVFP4, "activation")
    with pytest.raises(ConfigInvalid, match="with calibration"):
        Fp4Scheme(NVFP4, "mse", {})


MEASURED = """
import re, sys, threading
from pathlib import Path
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
import torch
from runner.quantization.files.checkpoint_write import write_checkpoint
from runner.quantization.files.schemes import SvdqScheme
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
source, out = map(Path, sys.argv[1:])
write_checkpoint(source, out, SvdqScheme(next(iter(SVDQ_LAYOUTS.values())), refits=1))
stop.set(); watcher.join()
print(peak)
"""


@system_test
def test_memory_is_that_of_a_tensor(tmp_path, record_property):
    """256 MB of weights; the largest is 5 MB, whose codes, packed and not, and blocks of rows come beside it."""
    source = write_store(tmp_path / "transformer", WIDE, shard_bytes=64 << 20)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out" / NAME)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    record_property("anonymous_mb", int(done.stdout) // 1_000_000)
    assert int(done.stdout) < 650e6  # imports are about 300 MB of it, and two OpenMP pools of blocks
