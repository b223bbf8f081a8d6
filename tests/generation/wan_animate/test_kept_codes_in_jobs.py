"""Kept codes on the tiny model: one step and whole jobs with the bits of a model that makes codes at each product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from runner.forecast.bytes import kept_code_bytes
from runner.forecast.seconds import find_device
from runner.generation.families import EngineSettings
from runner.generation.runtime.compute import apply_precision, is_token_wise
from runner.generation.wan_animate.compiled import CompiledBlocks
from runner.generation.wan_animate.generator import WanAnimateGenerator
from runner.quantization.formats.e2m1 import G32, NVFP4
from runner.quantization.kernels import low_bit
from runner.quantization.kernels.kept_codes import KeepsCodes, keep_codes
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
from runner.timing import StageTimer
from runner.weights.resolved import resolve_recipe
from runner.weights.store import ModelStore
from tests.generation.fp4_stores import MemoryPreprocessor, rendered, transformer_config, write_own, write_source
from tests.generation.wan_animate.test_transformer import Inputs, in_four_bits, load
from tests.quantization.lora_files import write_published

CPU = torch.device("cpu")
COMPUTES = pytest.mark.parametrize("compute", ["fp8", "int8"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor", MemoryPreprocessor)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def styled(tiny_store_dir, tmp_path_factory) -> Path:
    """A store of FP4 weights in nvfp4 and of two LoRAs for jobs."""
    source = write_source(tmp_path_factory.mktemp("source") / "models", tiny_store_dir)
    root = write_own(tmp_path_factory.mktemp("styled") / "models", source)
    (root / "loras").mkdir()
    for seed, name in ((5, "style"), (6, "other")):
        write_published(root / f"loras/{name}.safetensors", transformer_config(source), seed=seed)
    return root


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Grows by a compute with each weight that is brought to codes."""
    seen: list[str] = []
    rows = low_bit.weight_rows

    def counting(weight, compute, *codes):
        seen.append(compute)
        return rows(weight, compute, *codes)

    monkeypatch.setattr(low_bit, "weight_rows", counting)
    monkeypatch.setattr("runner.quantization.linear.weight_rows", counting)
    return seen


def with_loras(*names: str) -> dict[str, object]:
    return {"loras": [{"name": name, "strength": 0.7} for name in names]}


def loaded(root: Path, recipe: str, memory: str = "auto", *, codes: bool = True) -> WanAnimateGenerator:
    """`codes`: as it comes; else without kept codes, but otherwise the same."""
    generator = WanAnimateGenerator.load(
        resolve_recipe(ModelStore(root), get_recipe(recipe)), EngineSettings(device="cpu", memory=memory)
    )
    if not codes:
        assert generator.memory.keep_codes
        assert generator.fall_back_memory_mode()
    return generator


@COMPUTES
@pytest.mark.parametrize("kind", ["g32", "nvfp4", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_with_kept_codes_has_same_bits_and_makes_no_codes(tiny_store_dir, compute, kind, dtype, made):
    model = load(tiny_store_dir, getattr(torch, dtype))
    if kind != "plain":
        in_four_bits(model, {"g32": G32, "nvfp4": NVFP4}[kind])
    apply_precision(model, get_recipe(f"{'fp32' if dtype == 'float32' else 'bf16'}+{compute}"), CPU)
    inputs = Inputs(model)
    (conditioning,) = inputs.conditionings(model)
    made.clear()
    wanted = inputs.step(model, conditioning, 0)
    low = [name for name, _ in model.named_modules() if is_token_wise(name)]
    assert len(made) == len(low)
    assert keep_codes(model, getattr(torch, dtype)).layers == len(low)
    made.clear()
    assert torch.equal(inputs.step(model, conditioning, 0), wanted)
    assert made == []


@COMPUTES
def test_jobs_with_kept_codes_render_frames_of_generator_without(styled, compute, made):
    """Jobs with one LoRA, other LoRAs and none: codes of changed layers are made once per change, never in a step."""
    keeping, making = loaded(styled, f"fp4-distill+{compute}"), loaded(styled, f"fp4-distill+{compute}", codes=False)
    held = keeping.description["codes_kept"]
    layers = [m for m in keeping.pipeline.transformer.modules() if isinstance(m, KeepsCodes) and m.holds_codes]
    assert held["layers"] == held["made"] == len(layers) > 0
    assert held["nbytes"] == sum(m.out_features * (m.in_features + 4) for m in layers)
    assert held["nbytes"] == kept_code_bytes(keeping.costs.transformer, compute=compute)
    changed = sum(m.holds_codes for m in keeping.pipeline.transformer.blocks.modules() if isinstance(m, KeepsCodes))
    assert 0 < changed < len(layers)  # these LoRAs have nothing for the face adapters
    seen = []
    for loras, fresh in (((), 0), (("style",), 1), (("style",), 0), (("style", "other"), 1), ((), 1)):
        made.clear()
        job = with_loras(*loras) | {"steps": 1}
        seen.append(rendered(keeping, **job))
        assert len(made) == fresh * changed, loras
        assert np.array_equal(seen[-1], rendered(making, **job))
    assert np.array_equal(seen[0], seen[-1])
    assert not np.array_equal(seen[0], seen[1])


@COMPUTES
def test_kept_codes_of_plain_weights_include_merged_job_lora(styled, tiny_store_dir, tmp_path, compute):
    root = write_source(tmp_path / "models", tiny_store_dir)
    (root / "loras").mkdir()
    write_published(root / "loras/style.safetensors", transformer_config(root), seed=5)
    keeping, making = (loaded(root, f"bf16+{compute}", codes=codes) for codes in (True, False))
    for loras in ((), ("style",), ()):
        job = with_loras(*loras) | {"steps": 1}
        assert np.array_equal(rendered(keeping, **job), rendered(making, **job))
    assert sum(m.holds_codes for m in keeping.pipeline.transformer.modules() if isinstance(m, KeepsCodes)) > 0


def test_codes_made_again_for_loras_are_counted_and_timed(styled):
    generator = loaded(styled, "fp4-distill+int8")
    blocks = generator.pipeline.transformer.blocks
    changed = sum(layer.holds_codes for layer in blocks.modules() if isinstance(layer, KeepsCodes))
    for loras, wanted in (((), 0), (("style",), changed), (("style",), 0)):
        timer = StageTimer()
        rendered(generator, timer=timer, **with_loras(*loras), steps=1)
        assert timer.counters["codes_made"] == wanted
        assert "attach_loras" in timer.seconds


def test_fall_back_memory_mode_drops_kept_codes_first(styled):
    generator = loaded(styled, "fp4-distill+int8")
    frames, identity, model = rendered(generator), generator.resume_identity, generator.pipeline.transformer
    assert generator.fall_back_memory_mode()
    assert generator.pipeline.transformer is model  # nothing is loaded anew
    assert not any(m.holds_codes for m in model.modules() if isinstance(m, KeepsCodes))
    assert (generator.memory.mode, generator.memory.keep_codes) == ("resident", False)
    said = generator.description
    assert "codes_kept" not in said
    assert (said["memory"]["keep_codes"], said["memory"]["asked"]) == (False, "auto")
    assert "8-bit codes" in said["memory_why"]
    assert generator.resume_identity == identity
    assert np.array_equal(rendered(generator), frames)
    assert generator.fall_back_memory_mode()
    assert generator.memory.mode == "stream"


@pytest.mark.parametrize(
    ("recipe", "memory"),
    [
        ("fp4-distill", "auto"),
        ("fp4-distill+int8", "stream"),
        ("fp4-distill+int8", "minimal"),
        ("fp4-distill+nvfp4", "auto"),
    ],
)
def test_codes_are_not_kept_with_streamed_weights_or_nvfp4(styled, recipe, memory):
    generator = loaded(styled, recipe, memory)
    assert not generator.memory.keep_codes
    assert "codes_kept" not in generator.description
    rendered(generator, steps=1)
    assert not any(m.holds_codes for m in generator.pipeline.transformer.modules() if isinstance(m, KeepsCodes))


def test_forecasts_include_kept_codes(styled):
    generator, job, found = loaded(styled, "fp4-distill+int8"), JobOptions(), []
    generator.speed = find_device("RTX 5090")
    held = generator.description["codes_kept"]["nbytes"]
    for _ in range(2):
        plan = generator.plan(81, (832, 480), job)
        found.append((plan.seconds, generator.forecast(plan, job)["denoise"]))
        generator.fall_back_memory_mode()
    (seconds, peak), (seconds_without, peak_without) = found
    assert seconds < seconds_without
    assert peak - peak_without == pytest.approx(1.08 * held, abs=1)


@COMPUTES
def test_compiled_blocks_with_kept_codes_need_one_graph_for_all_loras(styled, compute):
    torch._dynamo.reset()
    counters.clear()
    generator = loaded(styled, f"fp4-distill+{compute}")
    frames = {names: rendered(generator, steps=1, **with_loras(*names)) for names in ((), ("style",))}
    step = generator.pipeline.block_forward = CompiledBlocks(backend="eager")
    for names in ((), ("style",), (), ("style",)):
        assert np.array_equal(rendered(generator, steps=1, **with_loras(*names)), frames[names])
        assert counters["stats"]["unique_graphs"] == 1
    generator.fall_back_memory_mode()
    timer = StageTimer()
    assert np.array_equal(rendered(generator, timer, steps=1), frames[()])
    assert timer.counters["compiled_graphs"] == 1  # made ready before the first step
    assert counters["stats"]["unique_graphs"] == 2
    assert not step.broken
    torch._dynamo.reset()
