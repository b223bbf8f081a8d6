"""SVDQ export: read by diffusers' Nunchaku Lite and by cache-dit themselves, on a CPU; whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import structlog
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from runner.errors import ConfigInvalid, StorageFull, WeightsCorrupt, WeightsMissing
from runner.quantization.files import quantized_header, svdq_export
from runner.quantization.files.file_header import SafetensorsHeader, TensorInfo
from runner.quantization.files.quantized_header import QuantizedFile, check_file
from runner.quantization.files.svdq_export import export_svdq, plan_export
from runner.quantization.formats.svdq import (
    effective_weight,
    svdq_linear,
    torch_table,
    unpack_lowrank,
    unpack_scales,
    unpack_vector,
    unpack_weight,
)
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.rules import WAN_ANIMATE_14B, kept_in_fp32, linear_shapes, stored_dtype, transformer_on_meta
from tests.quantization.random_stores import TINY, write_store
from tests.quantization.svdq_files import LAYOUTS, metadata_of, write_svdq

WIDE = dict(TINY) | {  # every side a multiple of 128, but for proj_out
    "attention_head_dim": 64,
    "text_dim": 128,
    "freq_dim": 128,
    "ffn_dim": 256,
    "image_dim": 128,
    "added_kv_proj_dim": 128,
    "face_encoder_hidden_dim": 128,
    "motion_encoder_dim": 128,
}
IN_FLOAT32 = ["condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2"]
LITE_FILES = {"config.json", "diffusion_pytorch_model.safetensors"}
PRECISIONS = [layout.precision for layout in LAYOUTS]


@pytest.fixture(scope="module", params=LAYOUTS, ids=PRECISIONS)
def wide(request, tmp_path_factory):
    """A file whose sides need no padding: what check_file says of it. Not to be changed."""
    return check_file(write_svdq(tmp_path_factory.mktemp("wide") / "q.safetensors", WIDE, request.param))


@pytest.fixture(scope="module", params=LAYOUTS, ids=PRECISIONS)
def narrow(request, tmp_path_factory):
    """A file with padded layers, made without calibration."""
    path = tmp_path_factory.mktemp("narrow") / "q.safetensors"
    return check_file(write_svdq(path, TINY, request.param, smoothing="weights", calibration="{}"))


def export(file, kind, folder):
    path = file.header.path
    return export_svdq(path, kind, folder, path.with_name("config.json"))


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def same_bytes(one, other):
    return (
        one.dtype is other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


# The models as their readers hold them


@pytest.fixture(scope="module")
def lite():
    """`diffusers.quantizers.nunchaku.utils`, which downloads kernels when it is imported: without them."""
    from diffusers.quantizers.nunchaku.nunchaku_quantizer import NunchakuLiteQuantizer
    from diffusers.utils import constants, import_utils

    stub = ModuleType("kernels")
    stub.get_kernel = lambda *args, **kwargs: SimpleNamespace(ops=None)
    name = "diffusers.quantizers.nunchaku.utils"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kernels", stub)
        patch.setattr(import_utils, "_kernels_available", True)
        patch.setattr(import_utils, "_kernels_version", "0.17.2")
        patch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
        patch.setattr(NunchakuLiteQuantizer, "validate_environment", lambda self, *args, **kwargs: None)  # no GPU here
        patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def cache_dit():
    """It sets an environment variable, which is undone; see tests/quantization/formats/test_svdq_peer.py."""
    before = dict(os.environ)
    module = importlib.import_module("cache_dit")
    importlib.import_module("cache_dit.quantization.svdquant.ptq")
    os.environ.clear()
    os.environ.update(before)
    return module


def compute_by_definition(model, kind, layout):
    """Replace the readers' kernels, which want a GPU: `svdq_linear` of the tensors that each layer holds; how many."""
    replaced = [layer for layer in model.modules() if type(layer) is kind]

    def forward(layer):
        held = {name: tensor.data for name, tensor in layer.named_parameters()}
        tensors = {suffix: held[suffix] for suffix in layout.tensor_table(1, 1)}
        bias = unpack_vector(held["bias"])[: layer.out_features] if "bias" in held else None
        return lambda x: svdq_linear(x, tensors, layout, layer.out_features, bias)

    for layer in replaced:
        layer.forward = forward(layer)
    return len(replaced)


class ByDefinition(nn.Module):
    """A layer of the file that was exported, with four-bit activations."""

    def __init__(self, tensors, layout, out_features, bias):
        super().__init__()
        self.call = lambda x: svdq_linear(x, tensors, layout, out_features, bias)

    def forward(self, x):
        return self.call(x)


def reference_model(file, config):
    """The model that the file is for, every quantised layer by the definition; the time embedder in float32."""
    stored, layout = load_file(file.header.path), file.layout
    model = transformer_on_meta(config)
    shapes = linear_shapes(model)
    for layer in file.layers:
        names = file.tensor_names(layer)
        tensors = {suffix: stored.pop(name) for suffix, name in names.items()}
        out_features, in_features = shapes[layer]
        if layer in IN_FLOAT32:
            stored[f"{layer}.weight"] = effective_weight(tensors, layout)[:out_features, :in_features]
            continue
        parent, _, leaf = layer.rpartition(".")
        bias = stored.pop(f"{layer}.bias", None)
        setattr(model.get_submodule(parent), leaf, ByDefinition(tensors, layout, out_features, bias))
    model.load_state_dict(stored, strict=True, assign=True)
    return model


def inputs(config):
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 36, 3, 8, 8, generator=g).bfloat16(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, config["text_dim"], generator=g).bfloat16(),
        "encoder_hidden_states_image": torch.randn(1, 5, config["image_dim"], generator=g).bfloat16(),
        "pose_hidden_states": torch.randn(1, 16, 2, 8, 8, generator=g).bfloat16(),
        "face_pixel_values": torch.randn(1, 3, 5, 32, 32, generator=g).clamp(-1, 1).bfloat16(),
        "return_dict": False,
    }


def check_layer(held, file, stored, layer):
    """Does a reader's layer hold the codes, scales, factors and vectors that the file does, by our unpacking?"""
    precision = file.layout.precision
    unpack = {
        "qweight": lambda tensor: unpack_weight(tensor, precision),
        "wscales": lambda tensor: unpack_scales(tensor, precision),
        "proj_down": lambda tensor: unpack_lowrank(tensor, down=True),
        "proj_up": lambda tensor: unpack_lowrank(tensor, down=False),
    }
    for suffix, name in file.tensor_names(layer).items():
        decode = unpack.get(suffix, unpack_vector)
        assert same_bytes(decode(held.pop(suffix)), decode(stored[name])), name
    bias = stored.get(f"{layer}.bias")
    assert ("bias" in held) == (bias is not None)
    if bias is not None:
        plain = unpack_vector(held.pop("bias"))
        assert same_bytes(plain[: bias.numel()], bias)
        assert not plain[bias.numel() :].any()


# Nunchaku Lite


def test_export_to_lite_is_read_by_from_pretrained(wide, lite, tmp_path):
    from diffusers import WanAnimateTransformer3DModel

    folder = export(wide, "lite", tmp_path / "lite")
    assert names_in(folder) == LITE_FILES
    model, report = WanAnimateTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert [report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")] == [[]] * 4
    stored = load_file(wide.header.path)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is lite.SVDQW4A4Linear}
    assert layers.keys() == wide.layers.keys() - set(IN_FLOAT32)
    for name, layer in layers.items():
        held = {suffix: tensor.data for suffix, tensor in layer.named_parameters()}
        check_layer(held, wide, stored, name)
        if wide.layout.precision == "nvfp4":
            assert same_bytes(held.pop("wtscale"), torch.ones(1).bfloat16())
        assert not held
    for name, tensor in model.named_parameters():
        if name in stored and name.rpartition(".")[0] not in layers:
            assert same_bytes(tensor.data, stored[name].bfloat16()), name
    assert compute_by_definition(model, lite.SVDQW4A4Linear, wide.layout) == len(layers)
    reference = reference_model(wide, WIDE)
    for tensor in reference.parameters():
        tensor.data = tensor.data.bfloat16()  # tables stay in float32, there too
    with torch.no_grad():
        (found,), (expected,) = model(**inputs(WIDE)), reference(**inputs(WIDE))
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(found, expected)


def test_export_to_lite_loads_strictly_into_lite_layers(wide, lite, tmp_path):
    from diffusers import NunchakuLiteQuantizationConfig

    folder = export(wide, "lite", tmp_path / "lite")
    config = json.loads((folder / "config.json").read_text())
    settings = dict(config.pop("quantization_config"))
    assert settings.pop("quant_method") == "nunchaku_lite"
    assert config == WIDE
    chosen = NunchakuLiteQuantizationConfig(**settings)
    assert chosen.compute_dtype is torch.bfloat16
    targets = settings["svdq_w4a4"].pop("targets")
    assert settings["svdq_w4a4"] == {
        "precision": wide.layout.precision,
        "group_size": wide.layout.group,
        "rank": wide.layout.rank,
    }
    settings["svdq_w4a4"]["targets"] = targets
    assert "proj_out" not in targets and len(targets) == len(wide.layers) - 2
    model = transformer_on_meta(WIDE)
    assert lite.replace_with_nunchaku_linear(model, chosen.to_dict(), chosen.compute_dtype) == len(targets)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    # Loading of a single file checks names and counts tables that the class never stores; from_pretrained does not.
    tables = {name: table for name, table in model.named_buffers() if name not in model.state_dict()}
    with pytest.raises(ValueError, match="Missing keys") as err:
        lite.check_strict_state_dict_match(model, state)
    assert set(re.findall(r"'([\w.]+)'", str(err.value))) == tables.keys()
    lite.check_strict_state_dict_match(model, state | tables)
    model.load_state_dict(state, strict=True, assign=True)
    assert "smooth_factor_orig" not in {name.rpartition(".")[2] for name in state}


@pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=PRECISIONS)
def test_export_plan_of_14b_model_has_tensors_that_lite_expects(layout, lite, tmp_path):
    model = transformer_on_meta(WAN_ANIMATE_14B)
    fp32, entries = kept_in_fp32(model), {}
    layers = {name: shape for name, shape in linear_shapes(model).items() if name != "proj_out"}
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in layers:
            entries[name] = tuple(parameter.shape), stored_dtype(name, fp32)
        else:
            table = torch_table(layout, *layers[layer])
            entries |= {f"{layer}.{suffix}": entry for suffix, entry in table.items()}
    header = {
        name: TensorInfo(name, str(dtype).removeprefix("torch."), shape, 0, 0)
        for name, (shape, dtype) in entries.items()
    }
    metadata = metadata_of(layout) | {quantized_header.SHA256_KEY: "1" * 64}
    file = QuantizedFile(
        SafetensorsHeader(tmp_path / "file", header, metadata, 0), layout, layers, (), {"smoothing": "weights"}
    )
    plan = plan_export(file, "lite", model)
    assert list(plan.decoded) == IN_FLOAT32
    settings = plan.documents["config.json"]["quantization_config"]
    targets = settings["svdq_w4a4"]["targets"]
    assert len(targets) == 518
    lite.replace_with_nunchaku_linear(model, settings, torch.bfloat16)
    patched = {
        name: (
            tuple(parameter.shape),
            # what is not Lite's is stored as in our files
            parameter.dtype if name.rpartition(".")[0] in targets else stored_dtype(name, fp32),
        )
        for name, parameter in model.named_parameters()
    }
    assert plan.tensors["diffusion_pytorch_model.safetensors"] == patched


def test_export_to_lite_with_padded_layer_is_refused(narrow, tmp_path):
    first, shape = "condition_embedder.time_proj", [384, 64]
    problem = rf"is {re.escape(str(shape))}, stored as \[384, 128\]: Nunchaku Lite does not pad"
    says = rf"q.safetensors: {re.escape(first)} {problem}"
    with pytest.raises(ConfigInvalid, match=says):
        export(narrow, "lite", tmp_path / "lite")
    assert not names_in(tmp_path)


# cache-dit


def documented_code():
    """The lines that the module gives to a user of cache-dit."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", svdq_export.__doc__, flags=re.MULTILINE)
    (block,) = [block for block in blocks if "import cache_dit" in block]
    return textwrap.dedent(block)


def read_as_documented(folder):
    scope = {"folder": str(folder)}
    exec(compile(documented_code(), "the module's docstring", "exec"), scope)
    return scope["model"]


def test_export_to_cache_dit_is_read_by_cache_dit(wide, cache_dit, tmp_path):
    check_cache_dit(cache_dit, wide, WIDE, tmp_path / "made" / "for-cache-dit", "", "activation")


def test_export_to_cache_dit_with_padded_layers_is_read_by_cache_dit(narrow, cache_dit, tmp_path):
    check_cache_dit(cache_dit, narrow, TINY, tmp_path / "made", "_dq", "weight")


def check_cache_dit(cache_dit, file, config, folder, ending, smoothing):
    assert export(file, "cache-dit", folder) == folder
    quant_type = f"svdq_{file.layout.precision}_r16{ending}"
    assert names_in(folder) == {
        "config.json", "quant_config.json", f"{quant_type}.safetensors", "unquantized.safetensors"
    }  # fmt: skip
    assert json.loads((folder / "config.json").read_text()) == config
    model = read_as_documented(folder)
    assert model._quantize_type == quant_type
    assert model._svdq_kwargs["smooth_strategy"] == smoothing
    stored = load_file(file.header.path)
    kind = cache_dit.quantization.SVDQW4A4Linear
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is kind}
    assert layers.keys() == file.layers.keys() - set(IN_FLOAT32)
    for name, layer in layers.items():
        assert layer.wtscale == (1.0 if file.layout.precision == "nvfp4" else None)
        held = {suffix: tensor.data for suffix, tensor in layer.named_parameters()}
        assert same_bytes(held.pop("smooth_factor_orig"), held["smooth_factor"])
        check_layer(held, file, stored, name)
        assert not held
    for name, tensor in model.named_parameters():
        if name in stored and name.rpartition(".")[0] not in layers:
            assert same_bytes(tensor.data, stored[name]), name
    assert compute_by_definition(model, kind, file.layout) == len(layers)
    with torch.no_grad():
        (found,), (expected,) = model(**inputs(config)), reference_model(file, config)(**inputs(config))
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(found, expected)


def test_packed_file_of_cache_dit_export_is_read_without_folder(wide, cache_dit, tmp_path):
    """cache-dit's other way to load: from the metadata of the file, into a model in floats."""
    folder = export(wide, "cache-dit", tmp_path / "made")
    ptq = sys.modules["cache_dit.quantization.svdquant.ptq"]
    tensors, payload = ptq._load_serialized_checkpoint(str(folder / f"svdq_{wide.layout.precision}_r16.safetensors"))
    assert payload["quantized_layer_names"] == [layer for layer in wide.layers if layer not in IN_FLOAT32]
    assert {name.rpartition(".")[0] for name in tensors} == set(payload["quantized_layer_names"])
    # of a file that 1.5.0 reads: it knows fewer settings than 1.5.3 and refuses what it does not know
    with safe_open(folder / f"svdq_{wide.layout.precision}_r16.safetensors", framework="pt") as opened:
        given = json.loads(opened.metadata()["cache_dit_svdq_ptq"])
    assert given["svdq_kwargs"].keys() == {"smooth_strategy", "runtime_kernel"}


# Whole or not at all


@pytest.mark.parametrize("kind", svdq_export.EXPORT_KINDS)
def test_export_records_source_and_is_refused_by_check_file(wide, kind, tmp_path):
    (tmp_path / "made").mkdir()  # an empty folder will do
    with structlog.testing.capture_logs() as events:
        assert export(wide, kind, tmp_path / "made") == tmp_path / "made"
    weights = sorted((tmp_path / "made").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    assert events == [
        {
            "event": "exported",
            "log_level": "info",
            "kind": kind,
            "folder": str(tmp_path / "made"),
            "gb": round(size / 1e9, 3),
        }
    ]
    for path in weights:
        with safe_open(path, framework="pt") as opened:
            said = opened.metadata()
        assert said["format"] == "pt"
        assert said["video_lab.exported_from_sha256"] == wide.sha256
        assert said["video_lab.loras"] == "[]" and said["video_lab.smoothing"] == "calibrated"
        with pytest.raises(WeightsCorrupt, match="not a file of `quantize`"):
            check_file(path)


def test_export_into_folder_that_is_not_empty_is_refused(wide, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigInvalid, match=r"made: the export's folder is not empty: it holds notes.txt"):
        export(wide, "lite", folder)
    assert names_in(folder) == {"notes.txt"}
    with pytest.raises(ConfigInvalid, match="is a file"):
        export(wide, "lite", folder / "notes.txt")


def test_staged_files_of_killed_export_are_overwritten(wide, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors.tmp").write_bytes(b"half")
    (folder / "config.json.tmp").write_bytes(b"{")
    export(wide, "lite", folder)
    assert names_in(folder) == LITE_FILES


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize(
    ("kind", "fails"), [("lite", "tensor"), ("cache-dit", "second file"), ("cache-dit", "document"), ("lite", "full")]
)
def test_export_that_fails_leaves_no_file(wide, kind, fails, existed, tmp_path, monkeypatch):
    folder = tmp_path / "made"
    if existed:
        folder.mkdir()
    writer = svdq_export.StreamWriter
    write, publish, count = writer.write, writer._publish, [0]

    def failing(step, number):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                raise OSError(28, "No space left on device")
            return step(*args, **kwargs)

        return call

    if fails == "tensor":
        monkeypatch.setattr(writer, "write", failing(write, 40))
    elif fails == "second file":
        monkeypatch.setattr(writer, "_publish", failing(publish, 2))
    elif fails == "full":
        monkeypatch.setattr("os.posix_fallocate", failing(lambda *args: None, 1))
    else:
        monkeypatch.setattr("json.dump", failing(json.dump, 2))
    with pytest.raises(OSError if fails == "tensor" else StorageFull):
        export(wide, kind, folder)
    monkeypatch.undo()
    assert names_in(tmp_path) == ({"made"} if existed else set())
    assert not existed or not names_in(folder)
    export(wide, kind, folder)


def test_export_of_changed_data_is_refused(wide, tmp_path):
    data = bytearray(wide.header.path.read_bytes())
    data[-5] ^= 1
    (tmp_path / "q.safetensors").write_bytes(data)
    config = wide.header.path.with_name("config.json")
    with pytest.raises(WeightsCorrupt, match=r"q.safetensors: its data has changed.*sha256"):
        export_svdq(tmp_path / "q.safetensors", "lite", tmp_path / "made", config)
    assert not (tmp_path / "made").exists()


def test_export_with_unknown_kind_or_bad_input_is_refused(wide, tmp_path):
    path, config, folder = wide.header.path, wide.header.path.with_name("config.json"), tmp_path / "made"
    with pytest.raises(ConfigInvalid, match=r"no export called .gguf.\. Exports: lite, cache-dit"):
        export_svdq(path, "gguf", folder, config)
    with pytest.raises(WeightsMissing, match="absent"):
        export_svdq(tmp_path / "absent", "lite", folder, config)
    with pytest.raises(WeightsMissing, match=r"absent.json: no such file"):
        export_svdq(path, "lite", folder, tmp_path / "absent.json")
    for text, says in (("{", "not JSON"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsCorrupt, match=says):
            export_svdq(path, "lite", folder, tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(WeightsCorrupt, match=r"quantised as \[\d+, \d+\], the model has"):
        export_svdq(path, "lite", folder, tmp_path / "config.json")
    assert not folder.exists()


def test_export_of_file_in_other_format_is_refused(tmp_path):
    from runner.quantization.files.checkpoint_write import quantize_store
    from runner.quantization.formats.e2m1 import G32

    store = write_store(tmp_path / "store", TINY)
    quantize_store(store, tmp_path / "q.safetensors", G32, "absmax", device="cpu")
    with pytest.raises(ConfigInvalid, match="weights are in g32; only SVDQ formats can be exported"):
        export_svdq(tmp_path / "q.safetensors", "lite", tmp_path / "made", store / "config.json")


def test_export_reads_one_layer_at_once(wide, tmp_path, monkeypatch):
    """Memory stays small: the names that one call reads are those of one layer."""
    calls, read = [], svdq_export._read

    def counting(file, names):
        calls.append(list(names))
        return read(file, calls[-1])

    monkeypatch.setattr(svdq_export, "_read", counting)
    export(wide, "lite", tmp_path / "made")
    assert len([name for names in calls for name in names]) == len(wide.header.tensors)
    assert max(map(len, calls)) == len(wide.layout.tensor_table(1, 1)) + 1
    for names in calls:
        assert len({name.rpartition(".")[0] for name in names}) == 1


def test_export_removes_quantization_config_of_source_config(wide, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(WIDE | {"quantization_config": {"quant_method": "other"}}))
    with contextlib.chdir(tmp_path):
        export_svdq(wide.header.path, "cache-dit", svdq_export.Path("made"), config)
    assert json.loads((tmp_path / "made" / "config.json").read_text()) == WIDE
