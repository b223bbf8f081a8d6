"""The text encoder in INT4: sizes of the real one, a small random UMT5 through a file and back, and damaged files."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import UMT5Config, UMT5EncoderModel

from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing
from runner.quantization.files import text_encoder
from runner.quantization.files.text_encoder import load_text_encoder, plan_text_encoder
from runner.quantization.formats.awq import W4Linear, dequantize, quantize, tensors

XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SMALL = {"vocab_size": 96, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
LINEARS = 7 * 2
EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")  # of one parameter
QUERY = "encoder.block.1.layer.0.SelfAttention.q"
# Of one device bits can be promised, and megabytes measured; a GPU has tests of its own.
quantize_text_encoder = partial(text_encoder.quantize_text_encoder, device="cpu")
TOKENS = torch.tensor([[5, 17, 80, 33, 1, 0, 0, 0], [9, 9, 41, 60, 2, 95, 3, 1]])
MASK = (TOKENS != 0).long()


def build(folder: Path, shard_size: str = "5GB", **changes: object) -> Path:
    """A UMT5 of random weights, saved by the library itself. T5 folds the scale of attention into its queries."""
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(**{**SMALL, **changes}))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            gain = model.config.d_kv**-0.5 if name.endswith(".q") else 1.0
            torch.nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def memory_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes that a text encoder holds: `int4` (codes, scales, offsets), `embedding`, `other`. Works on meta too."""
    count = {"int4": 0, "embedding": 0, "other": 0}
    for name, parameter in model.named_parameters():  # tied parameters come once
        int4 = name.rpartition(".")[2] in text_encoder.INT4
        kind = "int4" if int4 else "embedding" if name in EMBEDDING_NAMES else "other"
        count[kind] += parameter.numel() * parameter.element_size()
    return count


def encode(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        states = model(TOKENS, attention_mask=MASK).last_hidden_state
    return states[MASK.bool()].float()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (got - expected).norm().item() / expected.norm().item()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("store") / "text_encoder", shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def quantised(source, tmp_path_factory):
    return quantize_text_encoder(source, tmp_path_factory.mktemp("out") / "quantized_text_encoder.safetensors")


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_text_encoder_of_real_size_has_2_46_gb_int4_and_2_10_gb_embedding():
    plan = plan_text_encoder(UMT5Config(**XXL).to_dict())
    assert sum(isinstance(module, W4Linear) for module in plan.modules()) == 168
    assert not any(isinstance(module, torch.nn.Linear) for module in plan.modules())
    size = memory_bytes(plan)
    weights = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    assert size["int4"] == weights // 2 + weights // 128 * 4 == pytest.approx(2.46e9, rel=0.01)
    assert size["embedding"] == 256384 * 4096 * 2 == pytest.approx(2.10e9, rel=0.01)
    assert size["other"] < 1e6
    assert 2 * size["embedding"] + size["int4"] == pytest.approx(6.66e9, rel=0.01)  # as published, in fp32


def test_quantize_text_encoder_writes_one_file_that_others_can_read(source, quantised):
    assert (quantised.linears, quantised.kept_linears) == (LINEARS, ())
    held = load_file(quantised.path)
    config = UMT5Config(**SMALL)
    assert {name: (tuple(t.shape), t.dtype) for name, t in held.items() if name.startswith(f"{QUERY}.")} == {
        f"{QUERY}.{key}": spec for key, spec in tensors(128, 128).items()
    }
    assert held["shared.weight"].shape == (config.vocab_size, 128) and held["shared.weight"].dtype == torch.bfloat16
    assert sum(name.endswith(".qweight") for name in held) == LINEARS
    metadata = metadata_of(quantised.path)
    assert UMT5Config.from_dict(json.loads(metadata["config"])).d_ff == 256
    assert (metadata["video_lab.group"], metadata["video_lab.scale_method"]) == ("128", "mse")
    raw = quantised.path.read_bytes()
    assert metadata["video_lab.sha256"] == quantised.sha256
    assert hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest() == quantised.sha256
    listing = "".join(
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(source.glob("*.safetensors"))
    )
    assert metadata["video_lab.source_sha256"] == hashlib.sha256(listing.encode()).hexdigest()
    assert quantised.bytes_written == quantised.path.stat().st_size == len(raw)
    assert [p.name for p in quantised.path.parent.iterdir()] == [quantised.path.name]


def test_loaded_text_encoder_encodes_close_to_original(source, quantised):
    original = UMT5EncoderModel.from_pretrained(source, dtype=torch.float32).eval()
    model = load_text_encoder(quantised.path, dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, W4Linear)}
    assert len(layers) == LINEARS
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight
        assert relative(dequantize(layer.qweight, layer.scales, layer.scaled_zeros), weight) < 0.1
    expected, got = encode(original), encode(model)
    assert 0.05 < relative(got, expected) < 0.2
    assert relative(encode(load_text_encoder(quantised.path)), got) < 0.02  # in bfloat16

    dense = UMT5EncoderModel.from_pretrained(source, dtype=torch.bfloat16).float().eval()  # as the file keeps the rest
    for name, layer in layers.items():  # the library's own layers, with the weights that the codes stand for
        weight = dequantize(layer.qweight, layer.scales, layer.scaled_zeros)
        dense.get_submodule(name).weight = torch.nn.Parameter(weight)
    torch.testing.assert_close(got, encode(dense), rtol=1e-4, atol=1e-4)


def test_loaded_text_encoder_is_tied_frozen_and_in_bfloat16(quantised):
    model = load_text_encoder(quantised.path)
    assert model.dtype == torch.bfloat16  # what the pipeline casts embeddings to
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())
    size = memory_bytes(model)
    assert size["embedding"] == 96 * 128 * 2
    assert size == memory_bytes(plan_text_encoder(UMT5Config(**SMALL).to_dict()))
    assert len({id(m.workspace) for m in model.modules() if isinstance(m, W4Linear)}) == 1
    with pytest.raises(ConfigInvalid, match="float16"):
        load_text_encoder(quantised.path, dtype=torch.float16)


def rewritten(quantised, path: Path, change, **metadata: str | None) -> Path:
    held = load_file(quantised.path)
    change(held)
    kept = {**metadata_of(quantised.path), **metadata}
    save_file(held, path, {key: value for key, value in kept.items() if value is not None})
    return path


def test_published_text_encoder_with_fp32_embedding_is_read(quantised, tmp_path):
    """As published: float32 beside INT4, scales in float16, no metadata of ours, either name of the embedding."""
    expected = encode(load_text_encoder(quantised.path))

    def publish(held):
        embedding = held.pop("shared.weight").float()
        held["encoder.embed_tokens.weight"] = embedding
        for name in [name for name in held if name.endswith((".scales", ".scaled_zeros"))]:
            held[name] = held[name].half()

    path = rewritten(quantised, tmp_path / "published.safetensors", publish)
    config = {"config": metadata_of(path)["config"]}
    save_file(load_file(path), path, config)
    model = load_text_encoder(path)
    assert model.shared.weight.dtype == torch.bfloat16 and memory_bytes(model)["embedding"] == 96 * 128 * 2
    assert model.get_submodule(QUERY).scales.dtype == torch.float16
    assert relative(encode(model), expected) < 0.01

    def both(held):
        held["encoder.embed_tokens.weight"] = held["shared.weight"].clone()

    again = load_text_encoder(rewritten(quantised, tmp_path / "both.safetensors", both))
    assert torch.equal(encode(again), expected)


def poke(name, value):
    def change(held):
        held[name].view(-1)[3] = value

    return change


def drop(name):
    return lambda held: held.pop(name)


def reshape(name, *shape, dtype=None):
    def change(held):
        held[name] = torch.zeros(*shape, dtype=dtype or held[name].dtype)

    return change


DAMAGES = {
    "NaN scale": (poke(f"{QUERY}.scales", float("nan")), "NaN or infinity in .*q.scales"),
    "infinite offset": (poke(f"{QUERY}.scaled_zeros", float("inf")), "NaN or infinity in .*scaled_zeros"),
    "NaN embedding": (poke("shared.weight", float("nan")), "NaN or infinity in shared.weight"),
    "no scales": (drop(f"{QUERY}.scales"), "q.scales is missing"),
    "no codes": (drop(f"{QUERY}.qweight"), "q.weight is missing"),
    "no embedding": (drop("shared.weight"), "shared.weight is missing"),
    "a stranger": (reshape("decoder.weight", 4, dtype=torch.float32), "decoder.weight belongs to no layer"),
    "group 64": (reshape(f"{QUERY}.scales", 16, 128), r"q.scales is \[16, 128\], not \[8, 128\].*groups of 128"),
    "int32 codes": (reshape(f"{QUERY}.qweight", 32, 64, dtype=torch.int32), r"qweight is \[32, 64\]"),
    "float codes": (reshape(f"{QUERY}.qweight", 32, 128, dtype=torch.float16), "qweight is torch.float16"),
    "float32 scales": (reshape(f"{QUERY}.scales", 8, 128, dtype=torch.float32), "scales is torch.float32"),
    "integer norm": (reshape("encoder.final_layer_norm.weight", 128, dtype=torch.int16), "torch.int16, not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_text_encoder_file_is_refused(quantised, tmp_path, damage):
    change, message = DAMAGES[damage]
    path = rewritten(quantised, tmp_path / "bad.safetensors", change)
    with pytest.raises(WeightsCorrupt, match=message) as caught:
        load_text_encoder(path)
    assert caught.value.where == str(path)


CONFIGS = {
    "none": (None, "no config in the file's metadata"),
    "no JSON": ("{", "not JSON"),
    "no object": ("[1]", "not a JSON object"),
    "another model": ('{"model_type": "t5"}', "model type 't5'"),
    "nonsense": ('{"model_type": "umt5", "d_model": "wide"}', "no UMT5 can be built"),
    "another size": (
        json.dumps({**SMALL, "model_type": "umt5", "d_ff": 512}),
        r"wi_0.scale.* is \[8, 256\], not \[8, 512\]",
    ),
    "more layers": (json.dumps({**SMALL, "model_type": "umt5", "num_layers": 3}), "block.2.* is missing"),
    "columns that do not fit": (
        json.dumps({**SMALL, "model_type": "umt5", "d_model": 96}),
        "in INT4, but its columns are no multiple of",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_load_text_encoder_with_wrong_config_is_refused(quantised, tmp_path, case):
    config, message = CONFIGS[case]
    path = rewritten(quantised, tmp_path / "bad.safetensors", lambda held: None, config=config)
    with pytest.raises(WeightsCorrupt, match=message):
        load_text_encoder(path)


def test_load_text_encoder_of_missing_or_truncated_file_raises_own_error(quantised, tmp_path):
    with pytest.raises(WeightsMissing):
        load_text_encoder(tmp_path / "none.safetensors")
    path = tmp_path / "short.safetensors"
    path.write_bytes(quantised.path.read_bytes()[:-100])
    with pytest.raises(WeightsCorrupt, match="truncated"):
        load_text_encoder(path)


def test_quantize_text_encoder_of_bad_store_is_refused_and_leaves_no_file(source, tmp_path):
    out = tmp_path / "out" / "x.safetensors"
    with pytest.raises(WeightsMissing, match=r"config\.json"):
        quantize_text_encoder(tmp_path, out)
    store = build(tmp_path / "store")
    held = load_file(store / "model.safetensors")
    held[f"{QUERY}.weight"][7, 7] = float("nan")
    save_file(held, store / "model.safetensors")
    with pytest.raises(WeightsCorrupt, match=re.escape(f"{QUERY}.weight")):
        quantize_text_encoder(store, out)
    assert not list(out.parent.iterdir())
    held[f"{QUERY}.weight"] = held[f"{QUERY}.weight"][:64].clone()
    save_file(held, store / "model.safetensors")
    with pytest.raises(WeightsCorrupt, match=r"\[64, 128\], not \[128, 128\]"):
        quantize_text_encoder(store, out)
    (store / "model.safetensors").unlink()
    with pytest.raises(WeightsMissing, match="index"):
        quantize_text_encoder(store, out)
    (store / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(WeightsCorrupt, match="no safetensors file beside it"):
        quantize_text_encoder(store, out)
    with pytest.raises(ConfigInvalid, match="float16"):
        quantize_text_encoder(source, out, kept_dtype=torch.float16)


def test_interrupted_quantize_text_encoder_leaves_no_file(source, tmp_path):
    out, seen = tmp_path / "x.safetensors", []

    def stop_late(read: int, total: int) -> None:
        seen.append((read, total, out.exists()))
        if read > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_text_encoder(source, out, method="absmax", progress=stop_late)
    assert not any(there for _, _, there in seen) and not out.exists()
    assert [read for read, _, _ in seen] == sorted({read for read, _, _ in seen})
    done = quantize_text_encoder(source, out, method="absmax", progress=lambda read, total: seen.append((read, total)))
    assert seen[-1] == (done.bytes_read, done.bytes_read)
    assert out.exists() and not list(tmp_path.glob("*.tmp"))


def test_quantize_text_encoder_writes_tensors_of_quantize(source, quantised):
    held, weight = load_file(quantised.path), None
    for shard in source.glob("*.safetensors"):
        weight = load_file(shard).get(f"{QUERY}.weight", weight)
    made = quantize(weight)
    assert all(torch.equal(held[f"{QUERY}.{key}"], made[key]) for key in made)


def test_quantize_text_encoder_memory_is_near_one_tensor(tmp_path):
    store = build(tmp_path / "store", d_model=768, d_ff=2048, d_kv=192, num_layers=4)
    size = sum(p.stat().st_size for p in store.glob("*.safetensors"))
    assert size > 100e6
    gc.collect()

    def anonymous() -> int:
        # What was freed, here or by an earlier test, and is merely not given back yet, is nobody's.
        ctypes.CDLL(None).malloc_trim(0)
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))

    before, seen = anonymous(), []
    quantize_text_encoder(
        store, tmp_path / "x.safetensors", method="absmax", progress=lambda *_: seen.append(anonymous() - before)
    )
    assert len(seen) > 28
    assert max(seen) < size // 3


def test_text_encoder_narrower_than_group_is_not_quantised(tmp_path):
    """The text encoder of the tiny store, 32 wide: a complete file, which loads, with nothing in INT4."""
    store = build(tmp_path / "store", d_model=32, d_kv=8, d_ff=64)
    done = quantize_text_encoder(store, tmp_path / "x.safetensors", kept_dtype=torch.float32)
    assert done.linears == 0 and len(done.kept_linears) == LINEARS
    expected = encode(UMT5EncoderModel.from_pretrained(store, dtype=torch.float32).eval())
    assert torch.equal(encode(load_text_encoder(done.path, dtype=torch.float32)), expected)


def test_linears_of_mixed_widths_are_kept_or_quantised_by_layer(tmp_path):
    done = quantize_text_encoder(build(tmp_path / "store", d_ff=192), tmp_path / "x.safetensors")
    assert done.kept_linears == tuple(f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2))
    model = load_text_encoder(done.path)
    assert isinstance(model.get_submodule(done.kept_linears[0]), torch.nn.Linear)
    assert encode(model).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_text_encoder_runs_on_cuda(quantised):
    model = load_text_encoder(quantised.path, device="cuda", dtype=torch.float32)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    with torch.no_grad():
        states = model(TOKENS.cuda(), attention_mask=MASK.cuda()).last_hidden_state
    expected = encode(load_text_encoder(quantised.path, dtype=torch.float32))
    assert relative(states.cpu()[MASK.bool()], expected) < 0.01
