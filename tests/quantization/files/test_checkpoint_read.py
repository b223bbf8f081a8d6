"""Checkpoint, reading: a model filled from a file computes what the file says; damaged files are refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.quantization.files.checkpoint_read import load_quantized
from runner.quantization.files.checkpoint_write import quantize_store
from runner.quantization.files.quantized_header import check_file
from runner.quantization.files.safetensors_stream import data_sha256
from runner.quantization.formats.e2m1 import FORMATS, dequantize
from runner.quantization.formats.svdq import effective_weight
from runner.quantization.rules import linear_shapes, transformer_on_meta
from runner.quantization.svdq_linear import SvdqLinear
from tests.quantization.random_stores import TINY, inputs, write_store
from tests.quantization.svdq_files import LAYOUTS, write_svdq
from tests.safetensors_headers import first_of, redeclare

NAME = "quantized_transformer.safetensors"


@pytest.fixture(scope="module", params=FORMATS.values(), ids=FORMATS)
def made(request, tmp_path_factory):
    """(format, summary) of the tiny store, quantised; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    store = write_store(root / "transformer", TINY, shard_bytes=300_000)
    return request.param, quantize_store(store, root / NAME, request.param)


def test_load_quantized_fills_model(made):
    fmt, summary = made
    model = transformer_on_meta(TINY)
    names = list(linear_shapes(model))
    loaded = load_quantized(model, summary.path)
    assert loaded.format == fmt and set(loaded.layers) == set(names) and loaded.sha256 == summary.sha256
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert not any(p.requires_grad for p in model.parameters())
    stored = load_file(summary.path)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in model.named_parameters()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in stored.items()
    }
    assert all(torch.equal(param, stored[name]) for name, param in model.named_parameters())
    assert loaded.bytes == sum(t.nbytes for t in stored.values())


def test_loaded_model_computes_with_dequantised_weights(made):
    """Compared with the library's own model, in which the file's dequantised weights replace every weight."""
    from diffusers import WanAnimateTransformer3DModel

    fmt, summary = made
    model = transformer_on_meta(TINY)
    load_quantized(model, summary.path, dtype=torch.float32)
    plain = WanAnimateTransformer3DModel.from_config(dict(TINY)).eval()
    stored, state = load_file(summary.path), {}
    for name in plain.state_dict():
        layer = name.removesuffix(".weight")
        if f"{layer}.weight_packed" in stored:
            parts = {suffix: stored[f"{layer}.{suffix}"] for suffix in fmt.tensors(32, 32)}
            state[name] = dequantize(parts, fmt)
        else:
            state[name] = stored[name].float()
    plain.load_state_dict(state)
    with torch.no_grad():
        ours, theirs = model(**inputs())[0], plain(**inputs())[0]
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# Files of ours that must be refused before a model is touched.


def rewrite(made, path: Path, change, metadata=None) -> Path:
    """The file again, its tensors changed by `change`, its metadata replaced where given."""
    tensors = load_file(made)
    with safe_open(made, framework="np") as opened:
        meta = opened.metadata() | (metadata or {})
    change(tensors)
    save_file(tensors, path, metadata={key: value for key, value in meta.items() if value is not None})
    return path


def nothing(tensors):
    pass


Q = "blocks.0.attn1.to_q"


def set_scale(value):
    def change(tensors):
        scale = tensors[f"{Q}.weight_scale"]
        if scale.dtype == torch.uint8:
            scale[1, 0] = 0x7F if math.isnan(value) else 0xB8  # NaN, and a negative number
        else:
            scale[1, 0] = value

    return change


def retype(name, dtype):
    def change(tensors):
        tensors[name] = tensors[name].to(dtype)

    return change


def halve(tensors):
    tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"][:, :1].clone()


@pytest.mark.parametrize(
    ("change", "metadata", "says"),
    [
        (nothing, {"video_lab.format": None}, "missing"),
        (nothing, {"video_lab.format": "int3"}, "int3"),
        (nothing, {"video_lab.group": "64"}, "'64'"),
        (nothing, {"video_lab.sha256": "0" * 64}, "not finished"),
        (nothing, {"video_lab.loras": "none"}, "video_lab.loras"),
        (halve, None, rf"{Q}\.weight_scale"),
        (retype(f"{Q}.weight_scale", torch.float16), None, rf"{Q}\.weight_scale is torch\.float16"),
        (retype(f"{Q}.weight_packed", torch.int32), None, rf"{Q}\.weight_packed is torch\.int32"),
        (lambda t: t.pop(f"{Q}.weight_scale"), None, "weight_scale is missing"),
        (lambda t: t.pop(f"{Q}.weight_packed"), None, "belongs to no quantised layer"),
    ],
)
def test_check_file_with_bad_header_is_refused(made, tmp_path, change, metadata, says):
    bad = rewrite(made[1].path, tmp_path / NAME, change, metadata)
    with pytest.raises(WeightsCorrupt, match=says) as caught:
        check_file(bad)
    assert caught.value.todo and str(bad) in caught.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_scale(float("nan")), f"{Q}.*NaN"),
        (set_scale(-1.0), f"{Q}.*negative"),
        (retype("proj_out.bias", torch.float32), r"proj_out\.bias"),
        (retype("blocks.0.norm2.weight", torch.bfloat16), r"blocks\.0\.norm2\.weight"),
        (lambda t: t.pop("blocks.0.norm2.weight"), r"blocks\.0\.norm2\.weight is missing"),
        (lambda t: t.update(more=torch.zeros(2)), "more"),
    ],
)
def test_load_quantized_with_bad_tensors_is_refused_before_model_changes(made, tmp_path, change, says):
    bad = rewrite(made[1].path, tmp_path / NAME, change)
    model = transformer_on_meta(TINY)
    before = dict(linear_shapes(model))
    with pytest.raises(WeightsCorrupt, match=says):
        load_quantized(model, bad)
    assert linear_shapes(model) == before and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("said", "claimed"), [("BF16", "I16"), ("F32", "I32")])
def test_check_file_with_floats_declared_as_integers_is_refused(made, tmp_path, said, claimed):
    bad = tmp_path / NAME
    bad.write_bytes(made[1].path.read_bytes())
    name = first_of(bad, said)
    redeclare(bad, name, claimed)
    with pytest.raises(WeightsCorrupt, match=rf"{name} is torch\.int\d\d, not torch\.bfloat16 or torch\.float32"):
        check_file(bad)


def test_load_quantized_into_model_of_other_shape_is_refused(made):
    model = transformer_on_meta(dict(TINY) | {"ffn_dim": 256})
    with pytest.raises(WeightsCorrupt, match=r"ffn"):
        load_quantized(model, made[1].path)


@pytest.mark.parametrize("size", [0, 5, 200, 100_000])
def test_check_file_of_truncated_file_is_refused(made, tmp_path, size):
    bad = tmp_path / NAME
    bad.write_bytes(made[1].path.read_bytes()[:size])
    with pytest.raises(WeightsCorrupt, match=r"empty|truncated"):
        check_file(bad)


def test_data_sha256_after_bit_flip_differs_from_header(made, tmp_path):
    raw = bytearray(made[1].path.read_bytes())
    raw[-1000] ^= 1
    bad = tmp_path / NAME
    bad.write_bytes(raw)
    assert data_sha256(bad) != check_file(bad).sha256


def test_check_file_of_pickle_or_lfs_pointer_is_refused(tmp_path):
    pickle = tmp_path / "weights.safetensors"
    pickle.write_bytes(b"\x80\x04cos\nsystem\n(S'touch x'\ntR." * 20)
    with pytest.raises(WeightsCorrupt, match="not a safetensors"):
        check_file(pickle)
    pickle.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsCorrupt, match="LFS"):
        check_file(pickle)
    with pytest.raises(WeightsMissing, match="no such file"):
        check_file(tmp_path / "none")


# Files in an SVDQ format. Their headers are refused in `test_quantized_header.py`.

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])


@every_layout
def test_load_quantized_of_svdq_file_fills_model(tmp_path, layout):
    path = write_svdq(tmp_path / NAME, TINY, layout)
    model = transformer_on_meta(TINY)
    linears = linear_shapes(model)
    loaded = load_quantized(model, path)
    assert loaded.format == layout
    assert set(loaded.layers) == set(linears) - {"proj_out"}
    assert (loaded.chosen["rank"], loaded.chosen["smoothing"]) == (16, "calibrated")
    stored = load_file(path)
    assert {n: (p.dtype, tuple(p.shape)) for n, p in model.named_parameters()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in stored.items()
    }
    assert loaded.bytes == sum(t.nbytes for t in stored.values())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    for name in loaded.layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, SvdqLinear) and (layer.out_features, layer.in_features) == linears[name]


@every_layout
def test_model_of_svdq_file_computes_with_effective_weights(tmp_path, layout):
    """In float32; compared with the library's own model with the effective weights, cut to their width."""
    from diffusers import WanAnimateTransformer3DModel

    path = write_svdq(tmp_path / NAME, TINY, layout)
    model = transformer_on_meta(TINY)
    file = check_file(path)
    load_quantized(model, path, dtype=torch.float32)
    plain = WanAnimateTransformer3DModel.from_config(dict(TINY)).eval()
    stored, state = load_file(path), {}
    for name, param in plain.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in file.layers:
            weight = effective_weight({s: stored[n] for s, n in file.tensor_names(layer).items()}, layout)
            state[name] = weight[: param.shape[0], : param.shape[1]]
        else:
            state[name] = stored[name].float()
    plain.load_state_dict(state, strict=False)
    with torch.no_grad():
        ours, theirs = model(**inputs())[0], plain(**inputs())[0]
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def spoil(suffix, value):
    def change(tensors):
        tensors[f"{Q}.{suffix}"].view(-1)[5] = value

    return change


@every_layout
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoil("wscales", math.nan), rf"{Q}: wscales holds NaN or infinity, 1 of"),
        (spoil("wscales", -1.0), rf"{Q}: wscales holds negative scales, 1"),
        (spoil("smooth_factor", 0.0), rf"{Q}: smooth_factor holds numbers of zero or below, 1"),
        (spoil("smooth_factor", math.inf), rf"{Q}: smooth_factor holds NaN or infinity"),
        (spoil("proj_down", math.nan), rf"{Q}: proj_down holds NaN or infinity"),
        (spoil("proj_up", math.inf), rf"{Q}: proj_up holds NaN or infinity"),
        (lambda t: t.pop("proj_out.weight"), r"proj_out\.weight is missing"),
        (lambda t: t.update(more=torch.zeros(2)), "more is torch.float32"),
        (lambda t: t.update({f"{Q}.bias": torch.zeros(128, dtype=torch.bfloat16)}), rf"{Q}\.bias is .* \[128\]"),
    ],
)  # fmt: skip
def test_load_quantized_with_bad_svdq_tensors_is_refused_before_model_changes(tmp_path, layout, change, says):
    bad = write_svdq(tmp_path / NAME, TINY, layout, change)
    model = transformer_on_meta(TINY)
    before = dict(linear_shapes(model))
    with pytest.raises(WeightsCorrupt, match=says) as caught:
        load_quantized(model, bad)
    assert str(bad) in caught.value.message
    assert linear_shapes(model) == before and all(p.is_meta for p in model.parameters())


def test_svdq_channel_scales_that_are_not_finite_are_refused(tmp_path):
    bad = write_svdq(tmp_path / NAME, TINY, LAYOUTS[1], spoil("wcscales", math.inf))
    with pytest.raises(WeightsCorrupt, match=rf"{Q}: wcscales holds NaN or infinity"):
        load_quantized(transformer_on_meta(TINY), bad)


@every_layout
def test_svdq_file_of_other_model_is_refused(tmp_path, layout):
    path = write_svdq(tmp_path / NAME, TINY, layout)
    says = r"ffn\.net\.0\.proj is quantised as \[128, 128\], the model has \[256, 64\]"
    with pytest.raises(WeightsCorrupt, match=says):
        load_quantized(transformer_on_meta(dict(TINY) | {"ffn_dim": 256}), path)
    with pytest.raises(WeightsCorrupt, match=r"blocks\.1.*has no linear of that name"):
        load_quantized(transformer_on_meta(dict(TINY) | {"num_layers": 1}), path)
