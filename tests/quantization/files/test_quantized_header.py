"""Quantised header, of SVDQ files: what is whole is described; what is damaged or foreign is refused, and why.

FP4 files are refused in `test_checkpoint_read.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from runner.errors import WeightsCorrupt
from runner.quantization.files.quantized_header import check_file
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.rules import linear_shapes, transformer_on_meta
from tests.quantization.random_stores import TINY
from tests.quantization.svdq_files import LAYOUTS, random_layer, write_svdq

NAME = "quantized_transformer.safetensors"
Q = "blocks.0.attn1.to_q"
INT4, NVFP4 = LAYOUTS
COMMON = ("wscales", "smooth_factor", "proj_down", "proj_up")
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])


@every_layout
def test_check_file_of_valid_file_returns_description(tmp_path, layout):
    file = check_file(write_svdq(tmp_path / NAME, TINY, layout))
    assert file.layout == layout
    linears = linear_shapes(transformer_on_meta(TINY))
    assert "proj_out" in linears
    assert dict(file.layers) == {name: layout.padded(*shape) for name, shape in linears.items() if name != "proj_out"}
    assert set(file.tensor_names(Q)) == set(layout.tensor_table(1, 1))
    assert file.chosen == {
        "rank": 16,
        "smoothing": "calibrated",
        "calibration": {"jobs": 2, "steps": 6, "rows": 4096},
        "refits": 1,
    }


def test_check_file_runs_without_torch(tmp_path):
    path = write_svdq(tmp_path / NAME, TINY, INT4, smoothing="weights", calibration="{}")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from runner.quantization.files.quantized_header import check_file\n"
        "file = check_file(Path(sys.argv[1])); print(file.layout.name, len(file.layers), file.chosen['calibration'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [INT4.name, "36", "{}"]


@every_layout
@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"rank": None}, r"video_lab\.rank in its metadata is missing, not a number"),
        ({"rank": "thirty"}, r"video_lab\.rank in its metadata is 'thirty', not a number"),
        ({"rank": "-16"}, r"'-16', not a number"),
        ({"rank": "\u0661\u0666"}, r"not a number"),
        ({"rank": "24"}, r"video_lab\.rank in its metadata is '24', a rank of 24: multiples of 16 up to 512"),
        ({"rank": "999999"}, r"multiples of 16 up to 512"),
        ({"rank": "32"}, r"factors of rank 16, and video_lab\.rank says 32"),
        ({"smoothing": None}, r"video_lab\.smoothing in its metadata is missing, not calibrated or weights"),
        ({"smoothing": "none"}, r"video_lab\.smoothing in its metadata is 'none', not calibrated or weights"),
        ({"calibration": None}, r"video_lab\.calibration is no JSON object"),
        ({"calibration": "[]"}, r"video_lab\.calibration is no JSON object \(it is list\)"),
        ({"calibration": "{"}, r"video_lab\.calibration is no JSON object"),
        ({"refits": None}, r"video_lab\.refits in its metadata is missing"),
        ({"refits": "1.5"}, r"video_lab\.refits in its metadata is '1\.5'"),
        ({"group": "32"}, r"video_lab\.group is '32'; svdq-\w+ has (64|16)"),
        ({"loras": '{"a": 1}'}, r"video_lab\.loras is no list \(it is dict\)"),
        ({"source_sha256": "0" * 64}, "not finished"),
        ({"format": "svdq-int8"}, r"'svdq-int8', not one of g32, nvfp4, svdq-int4, svdq-nvfp4"),
    ],
)
def test_check_file_with_bad_metadata_is_refused(tmp_path, layout, metadata, says):
    path = write_svdq(tmp_path / NAME, TINY, layout, **metadata)
    with pytest.raises(WeightsCorrupt, match=says) as caught:
        check_file(path)
    assert caught.value.todo
    assert str(path) in caught.value.message


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


@every_layout
@pytest.mark.parametrize(
    ("change", "says"),
    [
        *((drop(f"{Q}.{suffix}"), rf"{Q}\.{suffix} is missing, svdq-") for suffix in COMMON),
        (drop(f"{Q}.qweight"), rf"{Q}\.\w+ belongs to no quantised layer"),
        (put(f"{Q}.qweight", lambda t: t.view(torch.uint8)), rf"{Q}\.qweight is torch\.uint8"),
        (put(f"{Q}.qweight", lambda t: t[:100].clone()), rf"{Q}\.qweight is torch\.int8 \[100, 64\].*int8 \[128, 64\]"),
        (put(f"{Q}.qweight", lambda t: t.flatten()), rf"{Q}\.qweight is \[8192\], not a matrix"),
        (put(f"{Q}.qweight", lambda t: t[:0].clone()), rf"{Q}\.qweight: a weight of \[0, 128\]"),
        (put(f"{Q}.smooth_factor", lambda t: t.float()), rf"{Q}\.smooth_factor is torch\.float32"),
        (put(f"{Q}.proj_up", lambda t: torch.cat([t, t], dim=1)), r"proj_up.*factors of rank 32, and \S+ says 16"),
        (put(f"{Q}.wtscale", lambda t: torch.ones(1)), rf"{Q}\.wtscale is no tensor of svdq-"),
        (put(f"{Q}.smooth_factor_orig", lambda t: torch.ones(128)), r"smooth_factor_orig is no tensor of svdq-"),
        (put("more.proj_up", lambda t: torch.ones(128, 16)), r"more\.proj_up belongs to no quantised layer"),
        (put(f"{Q}.bias", lambda t: t.half()), rf"{Q}\.bias is torch\.float16, not torch\.bfloat16 or torch\.float32"),
    ],
)  # fmt: skip
def test_check_file_with_bad_tensors_is_refused_by_name(tmp_path, layout, change, says):
    path = write_svdq(tmp_path / NAME, TINY, layout, change)
    with pytest.raises(WeightsCorrupt, match=says) as caught:
        check_file(path)
    assert caught.value.todo


def of_another_precision(layout):
    """One layer's tensors in the other precision."""

    def change(tensors):
        other = NVFP4 if layout is INT4 else INT4
        parts = random_layer(other, 64, 64, torch.Generator().manual_seed(0))
        tensors.pop(f"{Q}.wcscales", None)
        tensors.update({f"{Q}.{suffix}": tensor for suffix, tensor in parts.items()})

    return change


@every_layout
def test_scales_of_other_precision_are_named_in_error(tmp_path, layout):
    path = write_svdq(tmp_path / NAME, TINY, layout, of_another_precision(layout))
    other = NVFP4 if layout is INT4 else INT4
    with pytest.raises(WeightsCorrupt, match=rf"{Q}\.wscales.*{layout.name} asks for.*: scales of {other.name}"):
        check_file(path)


@every_layout
def test_metadata_of_other_precision_is_refused(tmp_path, layout):
    other = NVFP4 if layout is INT4 else INT4
    path = write_svdq(tmp_path / NAME, TINY, layout, format=other.name, group=str(other.group))
    with pytest.raises(WeightsCorrupt, match=rf"wscales.*{other.name} asks for.*: scales of {layout.name}"):
        check_file(path)


def test_channel_scale_in_int4_file_is_refused(tmp_path):
    change = put(f"{Q}.wcscales", lambda t: torch.ones(128, dtype=torch.bfloat16))
    with pytest.raises(WeightsCorrupt, match=rf"{Q}\.wcscales is no tensor of {INT4.name}"):
        check_file(write_svdq(tmp_path / NAME, TINY, INT4, change))
    with pytest.raises(WeightsCorrupt, match=rf"{Q}\.wcscales is missing"):
        check_file(write_svdq(tmp_path / NAME, TINY, NVFP4, drop(f"{Q}.wcscales")))


def test_file_with_no_quantised_layer_is_refused(tmp_path):
    def empty(tensors):
        tensors.clear()
        tensors["proj_out.bias"] = torch.zeros(4)

    with pytest.raises(WeightsCorrupt, match="no layer in it is quantised"):
        check_file(write_svdq(tmp_path / NAME, TINY, INT4, empty))


CACHE_DIT = {"cache_dit_svdq_ptq": json.dumps({"format": "cache_dit_svdq_ptq", "version": 2, "rank": 16})}
NUNCHAKU = {"quantization_config": json.dumps({"method": "svdquant", "rank": 16}), "config": "{}"}


@every_layout
@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (CACHE_DIT, "a checkpoint of cache-dit, not a file of `quantize`"),
        (NUNCHAKU, "a checkpoint of nunchaku, not a file of `quantize`"),
        ({"format": "pt"}, "a file in Nunchaku Lite's layout, not a file of `quantize`"),
        (None, "a file in Nunchaku Lite's layout"),
    ],
    ids=["cache-dit", "nunchaku", "lite", "bare"],
)
def test_file_of_other_program_is_refused_with_quantize_command(tmp_path, layout, metadata, says):
    tensors = {f"{Q}.{suffix}": t for suffix, t in random_layer(layout, 64, 64, torch.Generator()).items()}
    path = tmp_path / NAME
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    with pytest.raises(WeightsCorrupt, match=says) as caught:
        check_file(path)
    assert caught.value.todo.endswith(f"video-lab quantize --format {layout.name}")


def test_older_nunchaku_names_are_recognised(tmp_path):
    save_file(
        {
            f"{Q}.qweight": torch.zeros(128, 64, dtype=torch.int8),
            f"{Q}.lora_down": torch.zeros(128, 16),
            f"{Q}.smooth": torch.ones(128),
        },
        tmp_path / NAME,
        metadata=NUNCHAKU,
    )
    with pytest.raises(WeightsCorrupt, match="a checkpoint of nunchaku"):
        check_file(tmp_path / NAME)


def test_file_without_format_metadata_is_not_recognised_as_quantised(tmp_path):
    save_file({"a.weight": torch.zeros(4, 4), "a.lora_down": torch.zeros(4, 4)}, tmp_path / NAME)
    with pytest.raises(WeightsCorrupt, match=r"not a file of `quantize`: video_lab\.format in its metadata is missing"):
        check_file(tmp_path / NAME)
    assert set(SVDQ_LAYOUTS) == {layout.name for layout in LAYOUTS}
