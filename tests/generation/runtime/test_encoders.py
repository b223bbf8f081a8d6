"""Encoders: loaded when first needed, offloaded after use, and the same frames with every offload device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from runner.errors import WeightsCorrupt
from runner.generation.runtime.encoders import Encoder, Encoders, runs_by_layer
from runner.generation.runtime.text_cache import PromptCache
from runner.generation.wan_animate.loading import find_encoders, load_pipeline
from runner.quantization.files.text_encoder import load_text_encoder, quantize_text_encoder
from runner.spec.recipes import get_recipe
from runner.timing import StageTimer
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore

CPU = torch.device("cpu")
RECIPE = get_recipe("fp32")


class Loader:
    """Makes the same small model each time it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> nn.Module:
        self.calls += 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


@torch.no_grad()
def asked(encoder: Encoder, timer: StageTimer | None = None) -> torch.Tensor:
    with encoder.loaded(timer or StageTimer()) as model:
        return model(torch.ones(1, 4))


@pytest.mark.parametrize("offload", ["device", "host", "disk"])
@pytest.mark.parametrize("layers", [False, True], ids=["whole", "layer by layer"])
def test_encoder_with_any_offload_device_gives_same_output(offload, layers):
    load = Loader()
    expected = Loader()()(torch.ones(1, 4))
    encoder = Encoder("text_encoder", load, by_layer=lambda offload, device: layers and offload != "device")
    encoder.set_offload(CPU, offload)
    assert load.calls == 0  # placed, not read
    timer = StageTimer()
    for _ in range(3):
        assert torch.equal(asked(encoder, timer), expected)
        assert encoder.is_loaded is (offload != "disk")
        if encoder.is_loaded:
            away = {parameter.device.type for parameter in encoder.model.parameters()}
            assert away == ({"meta"} if layers and offload != "device" else {"cpu"})
    loads = 3 if offload == "disk" else 1
    assert load.calls == encoder.loads == loads
    assert timer.counters == {"text_encoder_loads": loads}
    assert set(timer.seconds) == {"load_encoders"}


def test_encoder_moved_between_offload_devices_keeps_its_weights():
    load = Loader()
    expected = Loader()()(torch.ones(1, 4))
    encoder = Encoder("text_encoder", load, by_layer=lambda offload, device: offload != "device")
    for offload in ("device", "host", "device", "host"):
        encoder.set_offload(CPU, offload)
        assert torch.equal(asked(encoder), expected)
    assert load.calls == 1
    encoder.set_offload(CPU, "disk")
    assert not encoder.is_loaded
    with pytest.raises(ValueError, match="no offload device 'cloud'"):
        encoder.set_offload(CPU, "cloud")  # type: ignore[arg-type]


def test_encoder_is_offloaded_after_failed_use():
    encoder = Encoder("text_encoder", Loader())
    encoder.set_offload(CPU, "disk")
    with pytest.raises(KeyError), encoder.loaded(StageTimer()):
        raise KeyError
    assert not encoder.is_loaded


@pytest.mark.parametrize(
    ("offload", "device", "expected"),
    [("device", "cuda", False), ("host", "cuda", True), ("disk", "cuda", True), ("host", "cpu", False)],
)
def test_runs_by_layer_on_gpu_with_offloaded_weights_is_true(offload, device, expected):
    assert runs_by_layer(offload, torch.device(device)) is expected


def test_encoder_load_without_job_is_counted_in_next_job():
    encoder, timer = Encoder("text_encoder", Loader()), StageTimer()
    assert encoder.model is encoder.model
    asked(encoder, timer)
    assert timer.counters == {"text_encoder_loads": 1}
    assert timer.seconds == {}


@pytest.fixture(scope="module")
def found(tiny_store_dir) -> Encoders:
    return find_encoders(ResolvedRecipe(ModelStore(tiny_store_dir), RECIPE), torch.float32)[0]


def test_find_encoders_reads_no_weights_and_gives_sizes(found, tiny_store_dir):
    assert not any(encoder.is_loaded for encoder in found)
    sizes = {name: sum(p.nbytes for p in encoder.model.parameters()) for name, encoder in zip("ti", found, strict=True)}
    assert (found.text.nbytes, found.image.nbytes) == (sizes["t"], sizes["i"])
    assert found.nbytes == sum(sizes.values())


def wide_text_encoder(folder: Path) -> Path:
    """A text encoder whose linears are wide enough for INT4."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(d_model=128, d_kv=16, num_heads=8, d_ff=256, num_layers=2, vocab_size=64)
    UMT5EncoderModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_real_encoders_run_layer_by_layer_give_same_bits(tiny_store_dir, tmp_path):
    """UMT5 plain and in INT4, and CLIP: the hooks that copy layers to the device and back change no bit."""
    store = ModelStore(tiny_store_dir)
    quantize_text_encoder(wide_text_encoder(tmp_path / "source"), tmp_path / "int4.safetensors", device="cpu")
    plain = find_encoders(ResolvedRecipe(store, RECIPE), torch.float32)[0]
    ids = torch.arange(16)[None]
    pixels = torch.rand(1, 3, 28, 28)

    def int4():
        model = load_text_encoder(tmp_path / "int4.safetensors", "cpu", torch.float32)
        assert sum(not parameter.is_floating_point() for parameter in model.parameters()) > 0
        return model

    cases = (
        (plain.text._load, lambda model: model(ids, torch.ones_like(ids)).last_hidden_state),
        (int4, lambda model: model(ids, torch.ones_like(ids)).last_hidden_state),
        (plain.image._load, lambda model: model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]),
    )
    for load, call in cases:
        results = []
        for offload in ("device", "host"):
            encoder = Encoder("x", load, by_layer=lambda offload, device: offload != "device")
            encoder.set_offload(CPU, offload)
            with encoder.loaded(StageTimer()) as model:
                results.append(call(model))
        assert torch.equal(*results)
        assert results[0].std() > 0


@torch.no_grad()
def test_text_encoder_with_prompt_cached_on_disk_is_not_loaded(tiny_store_dir, tmp_path):
    store = ModelStore(tiny_store_dir)
    pipeline, _ = load_pipeline(ResolvedRecipe(store, RECIPE), CPU)
    again, _ = load_pipeline(ResolvedRecipe(store, RECIPE), CPU)
    for pipe in (pipeline, again):
        pipe.prompts = PromptCache.open(tmp_path, ResolvedRecipe(store, RECIPE).text_digest, RECIPE.dtype, CPU)
    first, second = StageTimer(), StageTimer()
    made = pipeline.embed("a dance", first)
    assert torch.equal(again.embed("a dance", second), made)
    assert first.counters["text_encoder_loads"] == 1
    assert second.counters == {"prompt_cache_misses": 1, "prompt_disk_cache_hits": 1}
    assert not again.encoders.text.is_loaded
    again.embed("another", second)  # brought back for a new one
    assert again.encoders.text.loads == 1


def test_text_digest_changes_only_with_tokenizer_or_text_encoder(tiny_store_dir, tmp_path):
    root = tmp_path / "models"
    shutil.copytree(tiny_store_dir, root)
    before = ResolvedRecipe(ModelStore(root), RECIPE).text_digest
    assert before == ResolvedRecipe(ModelStore(tiny_store_dir), RECIPE).text_digest
    config = root / RECIPE.weights / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert ResolvedRecipe(ModelStore(root), RECIPE).text_digest == before
    for component in ("tokenizer", "text_encoder"):
        file = next((root / RECIPE.weights / component).glob("*config.json"))
        file.write_text(file.read_text() + "\n")
        now = ResolvedRecipe(ModelStore(root), RECIPE).text_digest
        assert now != before
        before = now


def test_int4_text_encoder_file_without_tensor_is_refused_before_job(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from runner.quantization.files.text_encoder import check_text_encoder

    file = tmp_path / "int4.safetensors"
    quantize_text_encoder(wide_text_encoder(tmp_path / "source"), file, device="cpu")
    model = load_text_encoder(file, "cpu", torch.bfloat16)
    tied = model.shared.weight.nbytes
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert check_text_encoder(file, torch.bfloat16) in (held, held - tied)
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    model_tensors = {name: t for name, t in load_file(file).items() if not name.endswith("final_layer_norm.weight")}
    save_file(model_tensors, file, metadata=metadata)
    with pytest.raises(WeightsCorrupt, match="final_layer_norm"):
        check_text_encoder(file, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_encoder_on_gpu_with_any_offload_device_agrees_and_frees_memory(tiny_store_dir):
    store, device, made = ModelStore(tiny_store_dir), torch.device("cuda"), []
    for offload in ("device", "host", "disk"):
        pipeline, _ = load_pipeline(ResolvedRecipe(store, RECIPE), device)
        pipeline.encoders.set_offload(device, offload)
        made.append(pipeline.embed("a dance", StageTimer()))
        on_gpu = {p.device.type for p in pipeline.encoders.text.model.parameters()}
        assert on_gpu == ({"cuda"} if offload == "device" else {"meta"})
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
