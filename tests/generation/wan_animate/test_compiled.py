"""Compiled blocks: how many graphs, the same results, and no failure that reaches a job."""

from __future__ import annotations

import os
import shutil
import zlib

import pytest
import structlog
import torch
from torch._dynamo.utils import counters

from runner.forecast.precisions import REFERENCE
from runner.generation.runtime.attention import BACKENDS, set_backend
from runner.generation.runtime.compute import is_token_wise
from runner.generation.runtime.memory_plan import make_plan
from runner.generation.wan_animate import compiled as module
from runner.generation.wan_animate.autoencoder import prepare_vae, with_channels_last
from runner.generation.wan_animate.compiled import (
    TOLERANCES,
    CompiledBlocks,
    difference,
    fuse_multiply_adds,
    keep_code,
    make_block_forward,
    structure_of,
    wants_compile,
)
from runner.generation.wan_animate.low_memory import chunked_block
from runner.generation.wan_animate.transformer import Switches, embed_context, run_block
from runner.quantization.linear import FP4Linear
from runner.spec.recipes import get_recipe
from tests.generation.runtime.test_attention import stub_package
from tests.generation.wan_animate.test_transformer import Inputs, in_four_bits, load
from tests.gpu_env.known_torch import needs_known_torch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Case:
    """A model of four blocks and a window's inputs."""

    def __init__(self, model, **size) -> None:
        self.model, self.inputs = model, Inputs(model, **size)
        self.contexts = embed_context(model, self.inputs.texts[:1], self.inputs.clip)
        self.conditioning = self.inputs.conditionings(model)[0]
        self.grid = tuple(self.inputs.hidden[0].shape[2:])

    def warm(self, step, **how) -> int:
        return step.warm(self.model, self.contexts, self.grid, **how)

    def run(self, step=None, index=0) -> torch.Tensor:
        return self.inputs.step(self.model, self.conditioning, index, block_forward=step)


@pytest.fixture(scope="module")
def one_block(tiny_store_dir):
    with torch.no_grad():
        return Case(load(tiny_store_dir))


def test_compiled_blocks_in_int8_pass_comparison_at_warming(tiny_store_dir):
    """Inductor compiles on the CPU: prepared inputs and the operator that makes their codes are in one graph."""
    model = load(tiny_store_dir, torch.bfloat16)
    in_four_bits(model)
    for name, layer in model.named_modules():
        if isinstance(layer, FP4Linear) and is_token_wise(name):
            layer.set_compute("int8", REFERENCE)
    case, step = Case(model), CompiledBlocks()
    assert (case.warm(step), step.broken, graphs()) == (1, "", 1)
    assert 0 < step.worst <= TOLERANCES[torch.bfloat16]
    assert difference(case.run(step), case.run()) <= TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("four_bits", [False, True], ids=["plain", "fp4"])
def test_compiled_blocks_need_one_graph_per_size(tiny_store_dir, four_bits):
    model = load(tiny_store_dir)
    if four_bits:
        in_four_bits(model)
    case, step = Case(model), CompiledBlocks(backend="eager")
    assert len(model.blocks) == 4
    assert case.warm(step) == 1
    assert graphs() == 1
    for index in range(2):
        assert torch.equal(case.run(step, index), case.run(None, index))
    assert graphs() == 1  # all of it was made before the first step
    assert not step.warms(model, case.contexts, case.grid)
    other = Case(model, width=64)
    assert step.warms(model, other.contexts, other.grid)
    assert other.warm(step) == 1
    assert torch.equal(other.run(step), other.run())
    assert case.warm(step) == other.warm(step) == 0
    case.run(step)
    assert (graphs(), step.graphs) == (2, 2)


def test_compiled_blocks_with_moved_weights_need_no_new_graph(tiny_store_dir):
    """A streamed block has its parameters in other memory at every step."""
    case, step = Case(load(tiny_store_dir)), CompiledBlocks(backend="eager")
    case.warm(step)
    wanted = case.run()
    for _ in range(2):
        for parameter in case.model.blocks.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(case.run(step), wanted)
    assert graphs() == 1


def test_compiled_blocks_with_named_attention_backend_have_one_graph(tiny_store_dir):
    """On a GPU self-attention has a named backend, in which the library selects torch's kernel."""
    model = load(tiny_store_dir)
    for block in model.blocks:
        block.attn1.set_attention_backend("_native_flash")
    case, step = Case(model), CompiledBlocks(backend="aot_eager")
    assert case.warm(step) == 1, step.broken
    torch.testing.assert_close(case.run(step), case.run(), rtol=1e-4, atol=1e-4)
    assert (graphs(), step.broken) == (1, "")


@torch.compiler.disable
def untraceable() -> None:
    """What packages of attention do within their calls; each of the three ends a graph."""
    torch.cuda.set_device(-1)  # which changes nothing, and needs no device
    zlib.crc32(b"a function in C, as pybind's are")


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_blocks_with_any_attention_backend_are_not_broken(one_block, monkeypatch, name):
    """Each package's function has a stub. Torch's own backends are traced and need no stub."""
    case, step = one_block, CompiledBlocks(backend="eager")
    if BACKENDS[name].opaque:
        stub_package(monkeypatch, name, untraceable)
    set_backend(case.model.blocks[0].attn1, name)
    given = module.dummies(case.model, case.contexts[0], case.grid, case.model.blocks[0])
    wanted = run_block(case.model.blocks[0], *given)
    assert torch.equal(step(case.model.blocks[0], *given), wanted)
    assert step.broken == ""


def test_warm_takes_only_needed_blocks_and_closes_iterator(tiny_store_dir):
    case, step, seen = Case(load(tiny_store_dir)), CompiledBlocks(backend="eager"), []

    def brought():
        try:
            for index, block in enumerate(case.model.blocks):
                seen.append(index)
                yield block
        finally:
            seen.append("closed")

    assert case.warm(step, blocks=brought()) == 1
    assert seen == [0, "closed"]


def test_structure_of_block_with_lora_needs_own_graph(tiny_store_dir):
    model = load(tiny_store_dir)
    in_four_bits(model)
    case, step = Case(model), CompiledBlocks(backend="eager")
    case.warm(step)
    layer = model.blocks[2].attn1.to_q
    layer.set_lora([(torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4), 0.3)])
    assert structure_of(model.blocks[2]) != structure_of(model.blocks[1]) == structure_of(model.blocks[0])
    assert case.warm(step) == 1
    assert graphs() == 2
    assert torch.equal(case.run(step), case.run())
    layer.set_lora(None)
    assert case.warm(step) == 0
    case.run(step)
    assert graphs() == 2


def test_compiled_blocks_hold_at_most_most_graphs(tiny_store_dir, monkeypatch):
    monkeypatch.setattr(module, "MOST_GRAPHS", 1)
    model, step = load(tiny_store_dir), CompiledBlocks(backend="eager")
    first, second = Case(model), Case(model, width=64)
    assert [case.warm(step) for case in (first, second, first)] == [1, 1, 1]
    assert step.graphs == 1
    assert not step.broken


@pytest.mark.parametrize("when", ["compiling", "its result"])
def test_compiled_blocks_with_failed_backend_run_eagerly(tiny_store_dir, when):
    def backend(graph, _inputs):
        if when == "compiling":
            raise RuntimeError("Failed to find C compiler")
        return lambda *given: tuple(out * 1.01 for out in graph(*given))

    case, step = Case(load(tiny_store_dir)), CompiledBlocks(backend=backend)
    with structlog.testing.capture_logs() as logged:
        assert case.warm(step) == 0
    assert [entry["event"] for entry in logged] == ["compile_failed"]
    assert {"compiling": "compiling failed: ", "its result": "differ by 0.01"}[when] in step.broken
    assert when != "compiling" or "C compiler" in step.broken
    assert step.description == {"compile": "eager", "compile_why": step.broken}
    assert not step.warms(case.model, case.contexts, case.grid)
    assert torch.equal(case.run(step), case.run())


def test_warm_with_exhausted_memory_raises(tiny_store_dir):
    def backend(graph, _inputs):
        def run(*_given):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    case, step = Case(load(tiny_store_dir)), CompiledBlocks(backend=backend)
    with pytest.raises(torch.OutOfMemoryError):
        case.warm(step)
    assert not step.broken


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_compiled_blocks_with_inductor_are_within_tolerance(tiny_store_dir):
    """Sums in another order: 1e-4 in float32. The code stays in torch's cache, so that only the first run is slow."""
    case, step = Case(load(tiny_store_dir)), CompiledBlocks()
    assert case.warm(step) == 1, step.broken
    found, wanted = case.run(step), case.run()
    assert 0 < difference(found.flatten(2), wanted.flatten(2)) < TOLERANCES[torch.float32]
    assert step.description["compile"] == "inductor"


def test_wants_compile_depends_on_switch_and_device(monkeypatch, tmp_path):
    cuda = torch.device("cuda")
    assert wants_compile(Switches(), cuda)[0]
    assert not wants_compile(Switches(), CPU)[0]
    assert wants_compile(Switches(compile=True), CPU)[0]
    assert not wants_compile(Switches(compile=False), cuda)[0]
    assert make_block_forward(Switches(), CPU)[0] is None
    assert isinstance(make_block_forward(Switches(compile=True), CPU)[0], CompiledBlocks)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    keep_code(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


def test_compiled_blocks_set_fused_multiply_adds_in_triton(monkeypatch):
    """Triton reads the variable when it compiles a kernel without an explicit choice."""
    knobs = pytest.importorskip("triton.knobs", reason="triton is not installed")
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    step = CompiledBlocks(backend="eager")
    assert step.broken == ""
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"
    assert knobs.language.default_fp_fusion is True
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    fuse_multiply_adds()
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "0"
    assert knobs.language.default_fp_fusion is False  # so that the variable is the one that Triton reads


@needs_known_torch
def test_inductor_enables_fused_multiply_adds():
    from torch._inductor.codegen.triton import TritonKernel

    assert TritonKernel.triton_meta_common()["enable_fp_fusion"] is True


def test_make_block_forward_on_gpu_gives_reason_and_eager_block():
    cuda, recipe = torch.device("cuda"), get_recipe("fp4-distill")
    resident, stream, minimal = (make_plan(mode, recipe) for mode in ("resident", "stream", "minimal"))
    assert make_block_forward(Switches(), cuda, minimal) == (None, "memory mode minimal is for the least memory")
    assert make_block_forward(Switches(compile=True), cuda, minimal)[0] is None
    assert make_block_forward(Switches(compile=False), cuda, resident) == (None, "switched off")
    for plan in (resident, stream, None):
        step, why = make_block_forward(Switches(), cuda, plan)
        assert (step.why, step.backend) == (why, "inductor") and "limited by memory" in why
        assert step._eager is chunked_block  # its 5.4 u, not 12
    assert make_block_forward(Switches(compile=True), CPU, resident)[0]._eager is run_block


def test_difference_is_relative_and_inf_for_nan():
    one = torch.ones(1, 5000, 4)
    assert difference(one, one) == 0
    assert difference(one * 1.5, one) == pytest.approx(0.5)
    assert difference(one * torch.nan, one) == float("inf")


def test_prepare_vae_keeps_decoded_values(tiny_store_dir):
    from diffusers import AutoencoderKLWan

    folder = tiny_store_dir / get_recipe("fp32").weights / "vae"
    vae = AutoencoderKLWan.from_pretrained(folder, local_files_only=True).eval()
    latents = torch.randn(1, vae.config.z_dim, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = vae.decode(latents, return_dict=False)[0]
    assert prepare_vae(vae, Switches()) == {}
    assert torch.equal(vae.decode(latents, return_dict=False)[0], plain)
    assert with_channels_last(vae) > 10
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(vae.decode(latents, return_dict=False)[0], plain, rtol=1e-3, atol=1e-4)
    assert prepare_vae(vae, Switches(channels_last=False)) == {}
    assert vae.decoder.conv_in.weight.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_blocks_on_gpu_are_within_tolerance(tiny_store_dir):
    model = load(tiny_store_dir, torch.bfloat16)
    in_four_bits(model)
    model.to("cuda")
    inputs = Inputs(model)
    contexts = embed_context(model, [inputs.texts[0].cuda()], inputs.clip.cuda())
    step = CompiledBlocks()
    assert step.warm(model, contexts, tuple(inputs.hidden[0].shape[2:])) == 1, step.broken
    assert step.worst <= TOLERANCES[torch.bfloat16]


def test_compiled_blocks_by_default_compare_with_run_block():
    assert CompiledBlocks(backend="eager")._eager is run_block
