from __future__ import annotations

import json
import re
import shutil
import socket
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from runner.errors import ConfigInvalid, JobWeightsCorrupt, NotFinite, OutOfMemory, WeightsCorrupt, WeightsMissing
from runner.forecast.flops import PRODUCTION
from runner.forecast.seconds import find_device
from runner.generation.families import EngineSettings
from runner.generation.protocol import ClipInfo, Request, SegmentPlan
from runner.generation.runtime.device import hardware_model
from runner.generation.runtime.finite import FiniteChecks
from runner.generation.runtime.memory_plan import PREPROCESS_EXTRA, make_plan
from runner.generation.runtime.tensor_cache import HOST_BYTES
from runner.generation.wan_animate.autoencoder import decode_latents
from runner.generation.wan_animate.compiled import CompiledBlocks
from runner.generation.wan_animate.generator import WanAnimateGenerator, _model_name
from runner.generation.wan_animate.loading import load_pipeline
from runner.quantization.rules import WAN_ANIMATE_14B
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
from runner.timing import StageTimer
from runner.weights.resolved import ResolvedRecipe, resolve_recipe
from runner.weights.store import ModelStore
from tests.generation.stub_conditions import MemoryConditions

CPU = torch.device("cpu")
OPTIONS = JobOptions(steps=2, max_segment_frames=5)


class MemoryPreprocessor:
    """Stands where the real one does; gives conditions that live in memory."""

    def __init__(self) -> None:
        self.description = {"detector": "none"}
        self.asked: list[tuple] = []

    @classmethod
    def load(cls, detector: Path, pose: Path, *, device: str = "cpu", **optional: object) -> MemoryPreprocessor:
        assert detector.is_file()
        assert pose.is_file()
        assert device == "cpu"
        return cls()

    def prepare(self, reference, video, options, *, mask=None, face_size=512, timer):
        self.asked.append((reference, video, options, mask, face_size))
        return MemoryConditions(9)


@pytest.fixture
def store(tiny_store_dir, tmp_path) -> ModelStore:
    root = tmp_path / "models"
    shutil.copytree(tiny_store_dir, root)
    for name in ("det/yolov10m.onnx", "pose2d/vitpose_h_wholebody.onnx"):
        file = root / "process_checkpoint" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"graph")
    return ModelStore(root)


@pytest.fixture
def generator(store, monkeypatch) -> WanAnimateGenerator:
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)
    return WanAnimateGenerator.load(resolve_recipe(store, get_recipe("fp32")), EngineSettings(device="cpu"))


def prepared(generator):
    request = Request(Path("anna.png"), Path("dance.mp4"), "a dance", OPTIONS)
    return generator.prepare(request, StageTimer())


def rendered(generator, conditions, on_step=None) -> np.ndarray:
    plan = generator.plan(conditions.clip.frames, conditions.clip.size, OPTIONS)
    return np.concatenate([s.frames for s in generator.generate(conditions, plan, StageTimer(), on_step)])


def test_generator_renders_frames_of_request(generator):
    conditions = prepared(generator)
    assert conditions.clip == ClipInfo(9, Fraction(16), 48, 64, 0.0)
    assert generator.preprocessor.asked == [(Path("anna.png"), Path("dance.mp4"), OPTIONS, None, 32)]
    frames = rendered(generator, conditions)
    assert frames.shape == (9, 64, 48, 3)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, rendered(generator, conditions))
    conditions.close()
    assert conditions.source.closed


def test_generator_description_and_identity_name_loaded_weights(generator, store):
    assert generator.identity == ResolvedRecipe(store, get_recipe("fp32")).digests
    description = generator.description
    assert description["device"] == "cpu"
    assert description["device_why"] == "asked for"
    assert description["recipe"]["name"] == "fp32"
    assert description["preprocess"] == {"detector": "none"}
    assert description["transformer_bytes"] == sum(p.nbytes for p in generator.pipeline.transformer.parameters())


def test_description_contains_model_name_of_store(generator, store, demo_models):
    assert generator.description["model"] == "Wan2.2-Animate (4 layers of width 64)"
    recipe = get_recipe("fp32")
    assert _model_name(ResolvedRecipe(ModelStore(demo_models), recipe)) == "Wan2.2-Animate demo (4 layers of width 64)"
    path = store.component(recipe, "transformer") / "config.json"
    for other, name in ({}, "Wan2.2-Animate-14B"), ({"num_layers": 30}, "Wan2.2-Animate (30 layers of width 5120)"):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(WAN_ANIMATE_14B) | other))
        assert _model_name(ResolvedRecipe(store, recipe)) == name


def test_description_after_failed_compilation_contains_reason(generator):
    def backend(graph, _inputs):
        raise RuntimeError("Failed to find C compiler")

    assert (generator.description["compile"], generator.description["compile_why"][:8]) == ("eager", "on a CPU")
    plan = SegmentPlan(81, 81, 1, 1, 832, 480, 6, evaluations=6, tflop=1.0)
    generator.pipeline.block_forward = CompiledBlocks(backend=backend)
    rendered(generator, prepared(generator))
    assert generator.description["compile"] == "eager"
    assert "C compiler" in generator.description["compile_why"]
    assert generator.job_warnings(plan, OPTIONS) == ()  # on a CPU nothing is lost
    generator.costs, generator.speed = PRODUCTION, find_device("RTX 5090")
    generator.pipeline.compute_device = torch.device("cuda")
    (warning,) = generator.job_warnings(plan, OPTIONS)
    assert "C compiler" in warning and re.search(r"1\.\d s more a step on RTX 5090 at 832x480, 81 frames", warning)
    generator.pipeline.block_forward.broken = ""
    assert generator.job_warnings(plan, OPTIONS) == ()
    generator.pipeline.compute_device = CPU
    torch._dynamo.reset()
    generator.pipeline.block_forward = CompiledBlocks(backend="eager")
    rendered(generator, prepared(generator))
    assert (generator.description["compile"], generator.description["compile_off_eager"]) == ("eager", 0.0)
    assert generator.description["compile_why"] == "asked for"
    generator.close()
    assert generator.description["device"] == "cpu"


def test_resume_identity_contains_current_settings(generator, monkeypatch):
    first = generator.resume_identity
    assert first == {
        "device": hardware_model(CPU),
        "dtype": "float32",
        "compute": "bf16",
        "attention": "native",
        "blocks": "eager",
        "autoencoder": "float32, whole",
        "memory": "resident",
        "encoders": "device",
        "preprocess": "",
    }
    generator.pipeline.block_forward = CompiledBlocks(backend="aot_eager")
    assert generator.resume_identity["blocks"] == "compiled by aot_eager"
    generator.pipeline.block_forward.broken = "no C compiler"
    assert generator.resume_identity == first
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert generator.resume_identity["device"].endswith(", 77 threads")
    generator.close()
    assert generator.resume_identity == {}


@pytest.mark.parametrize(("place", "device", "limit"), [("device", "cuda", PREPROCESS_EXTRA), ("host", "cpu", None)])
def test_preprocessor_is_loaded_on_planned_device_within_memory_limit(store, monkeypatch, place, device, limit):
    asked = {}

    class Stopped(Exception):
        pass

    class Loading:
        @classmethod
        def load(cls, *_paths, **how):
            asked.update(how)
            raise Stopped

    models = resolve_recipe(store, get_recipe("fp32"))
    plan = replace(make_plan("stream", models.recipe), preprocess=place)
    module = "runner.generation.wan_animate.generator"
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor", Loading)
    monkeypatch.setattr(f"{module}.pick_device", lambda _asked: (torch.device("cuda"), "asked for"))
    monkeypatch.setattr(f"{module}.grow_segments", lambda _device: None)
    monkeypatch.setattr(f"{module}.plan_memory", lambda *_: (plan, {}))
    with pytest.raises(Stopped):
        WanAnimateGenerator.load(models, EngineSettings(device="cuda"))
    assert (asked["device"], asked["networks"].arena_bytes) == (device, limit)


def test_resume_identity_contains_device_of_preprocessing(generator):
    network = {"model": "a.onnx", "provider": "CUDAExecutionProvider", "why": "asked for", "precision": "fp32"}
    generator._description["preprocess"] = {"device": "cuda", "detector": network, "pose": network | {"why": "?"}}
    said = generator.resume_identity["preprocess"]
    assert said == "cuda, detector on CUDAExecutionProvider in fp32, pose on CUDAExecutionProvider in fp32"


def test_plan_of_tiny_model_has_its_cost(generator):
    plan = generator.plan(9, (48, 64), OPTIONS)
    assert (plan.segments, plan.segment_frames, plan.steps) == (2, 5, 2)
    assert 0 < plan.tflop < 0.1  # the tiny model's, not the 14B model's


def test_exhausted_memory_is_retryable_error_and_next_job_is_unchanged(generator):
    conditions = prepared(generator)
    before = rendered(generator, conditions)

    def exhaust(done: int, total: int) -> None:
        if done == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(OutOfMemory, match="5 frames of 48x64") as caught:
        rendered(generator, conditions, exhaust)
    assert caught.value.retryable
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert np.array_equal(rendered(generator, conditions), before)


def test_generator_passes_other_errors_unchanged(generator):
    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match=r"^stop$"):
        rendered(generator, prepared(generator), stop)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("component", "weight", "said"),
    [
        ("vae", "decoder.conv_out.bias", "vae_decode: NaN or infinity in output frame 0,"),
        ("vae", "encoder.conv_out.bias", "encode_reference: NaN or infinity in the reference's latents"),
        ("transformer", "proj_out.bias", "denoise: NaN or infinity in the latents after step 1 of 2, segment 1 of 2"),
        ("transformer", "blocks.0.ffn.net.2.weight", "denoise: .* after step 1 of 2, segment 1 of 2"),
        ("text_encoder", "encoder.final_layer_norm.weight", "encode_prompt: NaN or infinity in the prompt's embedding"),
        ("image_encoder", "pre_layrnorm.bias", "encode_image: .* the reference's CLIP features"),
    ],
)
def test_weight_that_is_not_finite_fails_job_and_names_stage(generator, component, weight, said, bad):
    model = getattr(generator.pipeline, component)
    conditions = prepared(generator)
    before = rendered(generator, conditions)
    parameter = model.get_parameter(weight)
    whole = parameter.detach().clone()
    parameter.data.view(-1)[0] = bad
    generator.pipeline.tensor_cache.clear()  # of the good weights
    with pytest.raises(NotFinite, match=said):
        rendered(generator, conditions)
    parameter.data.copy_(whole)
    assert np.array_equal(rendered(generator, conditions), before)  # nothing of what was wrong was cached


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_latents_not_finite_name_step_and_keep_earlier_segments(generator, monkeypatch, bad):
    from runner.generation.sampling import make_sampler

    calls = []

    def poisoned(*settings):
        sampler = make_sampler(*settings)
        step = sampler.step

        def wrong(*given):
            latents = step(*given)
            calls.append(latents)
            if len(calls) == 4:  # the second step of the second window
                latents[0, 3, 1, 2, 1] = bad
            return latents

        sampler.step = wrong
        return sampler

    monkeypatch.setattr("runner.generation.wan_animate.generator.make_sampler", poisoned)
    conditions = prepared(generator)
    plan = generator.plan(conditions.clip.frames, conditions.clip.size, OPTIONS)
    segments = generator.generate(conditions, plan, StageTimer())
    assert len(next(segments).frames) == 5
    with pytest.raises(NotFinite, match=r"denoise: .* after step 2 of 2, segment 2 of 2"):
        next(segments)


class Waits(TorchDispatchMode):
    """What makes the host wait for a device, by name: read values, and copies by the methods that code calls."""

    METHODS = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name, method):
        return lambda tensor, *more, **named: (self.count.update([name]), method(tensor, *more, **named))[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.count[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_finite_checks_synchronize_once_per_segment_and_never_in_step(generator, monkeypatch):
    """Compared with the same job without checks: a step has no further wait, and a segment one list of flags."""
    conditions = prepared(generator)
    rendered(generator, conditions)  # encoders loaded, caches full

    def counted() -> tuple[np.ndarray, list[Counter[str]], Counter[str]]:
        with monkeypatch.context() as patch, Waits(patch) as waits:
            at: list[Counter[str]] = []
            frames = rendered(generator, conditions, lambda *_: at.append(waits.count.copy()))
        return frames, [at[1] - at[0], at[3] - at[2]], waits.count  # the second step of each window, and all

    frames, in_steps, in_all = counted()
    for name in ("add", "add_frames", "read"):
        monkeypatch.setattr(FiniteChecks, name, lambda *given: None)
    unchecked, in_unchecked_steps, in_all_unchecked = counted()
    assert np.array_equal(frames, unchecked)
    assert in_steps == in_unchecked_steps
    assert in_all - in_all_unchecked == Counter({"tolist": 2})


def test_calibrating_runs_eagerly_without_loras_and_restores_both(generator):
    step = generator.pipeline.block_forward = CompiledBlocks(backend="eager")
    loras = generator.loras

    def calibrate() -> None:
        with generator.calibrating([]) as transformer:
            assert transformer is generator.pipeline.transformer
            assert generator.pipeline.block_forward is None and generator.loras is None
            raise KeyError("while jobs were generated")

    with pytest.raises(KeyError, match="while jobs"):
        calibrate()
    assert generator.pipeline.block_forward is step and generator.loras is loras


@pytest.mark.parametrize("kind", [WeightsCorrupt, JobWeightsCorrupt])
def test_lora_error_of_recipe_stops_run_and_of_job_stops_job(generator, monkeypatch, kind):
    """The error of `JobLoras.use` is raised unchanged: the recipe's LoRA stops the run, a job's LoRA stops that job."""

    def use(options):
        raise kind("does not fit")

    monkeypatch.setattr(generator.loras, "use", use)
    conditions = prepared(generator)
    plan = generator.plan(conditions.clip.frames, conditions.clip.size, OPTIONS)
    with pytest.raises(kind) as caught:
        next(generator.generate(conditions, plan, StageTimer()))
    assert caught.value.stops_run is kind.stops_run
    assert WeightsCorrupt.stops_run and not JobWeightsCorrupt.stops_run


def test_generate_after_close_raises(generator):
    conditions = prepared(generator)
    plan = generator.plan(9, (48, 64), OPTIONS)
    generator.close()
    generator.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(generator.generate(conditions, plan, StageTimer()))


def test_text_encoder_in_second_run_of_prompt_is_not_loaded(store, monkeypatch, tmp_path):
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)
    frames = []
    for loads in (1, 0):
        run = WanAnimateGenerator.load(
            resolve_recipe(store, get_recipe("fp32")), EngineSettings(device="cpu", cache=tmp_path / "cache")
        )
        frames.append(rendered(run, prepared(run)))
        assert run.pipeline.encoders.text.loads == loads
    assert np.array_equal(*frames)


def test_tensor_cache_with_many_processes_is_divided(store, monkeypatch):
    """The number of processes is so large that none may keep anything."""
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)
    settings = EngineSettings(device="cpu", processes=HOST_BYTES)
    run = WanAnimateGenerator.load(resolve_recipe(store, get_recipe("fp32")), settings)
    rendered(run, prepared(run))
    assert run.pipeline.tensor_cache.host_bytes <= 1


def test_load_with_unknown_device_or_missing_weights_is_refused(store, monkeypatch):
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)
    with pytest.raises(ConfigInvalid):
        WanAnimateGenerator.load(resolve_recipe(store, get_recipe("fp32")), EngineSettings(device="abacus"))
    (store.root / "process_checkpoint/det/yolov10m.onnx").unlink()
    with pytest.raises(WeightsMissing, match="yolov10m"):
        WanAnimateGenerator.load(resolve_recipe(store, get_recipe("fp32")), EngineSettings(device="cpu"))


def test_load_pipeline_opens_no_connection(tiny_store_dir, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    load_pipeline(ResolvedRecipe(ModelStore(tiny_store_dir), get_recipe("fp32")), CPU)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_load_pipeline_weights_and_dtypes_equal_library(tiny_store_dir, name):
    from diffusers import WanAnimatePipeline

    recipe = get_recipe(name)
    here, placement = load_pipeline(ResolvedRecipe(ModelStore(tiny_store_dir), recipe), CPU)
    kinds = {"default": getattr(torch, recipe.dtype), "vae": getattr(torch, recipe.vae_dtype)}
    theirs = WanAnimatePipeline.from_pretrained(tiny_store_dir / recipe.weights, torch_dtype=kinds)
    for component in ("transformer", "vae", "text_encoder", "image_encoder"):
        ours, other = (getattr(pipe, component).state_dict() for pipe in (here, theirs))
        assert ours.keys() == other.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == other[key].dtype, (component, key)
            assert torch.equal(tensor, other[key]), (component, key)
        assert not getattr(here, component).training
    assert placement["encoders"] == "cpu"
    assert here.transformer.dtype == getattr(torch, recipe.dtype)


@pytest.mark.parametrize("name", ["bf16", "bf16+euler", "bf16+bf16-vae"])
def test_bf16_recipe_renders_with_float32_latents(tiny_store_dir, monkeypatch, name):
    """The latents stay in float32 from step to step in every precision of the model."""
    recipe, decoded = get_recipe(name), []
    pipeline, _ = load_pipeline(ResolvedRecipe(ModelStore(tiny_store_dir), recipe), CPU)
    monkeypatch.setattr(
        "runner.generation.wan_animate.pipeline.decode_latents",
        lambda vae, latents, *given: (decoded.append(latents.dtype), decode_latents(vae, latents, *given))[1],
    )
    generator = WanAnimateGenerator(
        pipeline,
        recipe,
        SimpleNamespace(prepare=lambda *args, **kwargs: MemoryConditions(5)),
        costs=ResolvedRecipe(ModelStore(tiny_store_dir), recipe).costs,
        identity={},
        description={},
    )
    frames = rendered(generator, prepared(generator))
    assert frames.shape == (5, 64, 48, 3)
    assert frames.std() > 5
    assert decoded == [torch.float32]


def test_image_processor_keeps_whole_reference(tiny_store_dir):
    """A mark at the top of a tall picture reaches CLIP; the shipped processor would cut it off."""
    from PIL import Image

    pipeline, _ = load_pipeline(ResolvedRecipe(ModelStore(tiny_store_dir), get_recipe("fp32")), CPU)
    plain = Image.new("RGB", (48, 96), "grey")
    marked = plain.copy()
    marked.paste((255, 0, 0), (0, 0, 48, 12))
    processed = [pipeline.image_processor(image, return_tensors="pt").pixel_values for image in (plain, marked)]
    assert processed[0].shape == (1, 3, 28, 28)
    assert not torch.equal(*processed)
    with torch.no_grad():
        assert not torch.equal(*(pipeline.encode_image(image, CPU) for image in (plain, marked)))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "image_encoder"])
def test_weights_without_tensor_are_refused(store, component):
    folder = store.component(get_recipe("fp32"), component)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    lost = next(
        name
        for name in sorted(tensors)
        if name.endswith("norm1.weight")
        or "conv_in.weight" in name
        or "layer_norm.weight" in name
        or "attn1.to_q.weight" in name
    )
    tensors.pop(lost)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsCorrupt, match="1 missing tensor"):
        load_pipeline(ResolvedRecipe(store, get_recipe("fp32")), CPU)


def test_weights_with_tensor_of_other_shape_are_refused(store):
    file = next(store.component(get_recipe("fp32"), "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].copy()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsCorrupt):
        load_pipeline(ResolvedRecipe(store, get_recipe("fp32")), CPU)
