"""Compute: the decision by hand, the layers that take part, the self-test's refusals, and frames in 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from runner.errors import ConfigInvalid
from runner.forecast.precisions import PRECISIONS, advised
from runner.generation.runtime.compute import (
    GemmChoice,
    _name_code_kernel,
    activations,
    apply_precision,
    decide,
    is_token_wise,
    self_test,
)
from runner.generation.runtime.streaming import BlockStream
from runner.generation.wan_animate.compiled import CompiledBlocks
from runner.generation.wan_animate.loading import load_pipeline
from runner.generation.wan_animate.low_memory import chunked_block
from runner.generation.wan_animate.transformer import Switches, run_block
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.kernels import low_bit, rowwise, svdq_products
from runner.quantization.kernels.low_bit import EXACT, LowBitLinear
from runner.quantization.linear import FP4Linear
from runner.quantization.rules import WAN_ANIMATE_14B, linear_shapes, transformer_on_meta
from runner.quantization.svdq_linear import SvdqLinear
from runner.spec.options import DEFAULT_PROMPT
from runner.spec.recipes import get_recipe
from runner.timing import StageTimer
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore
from tests.generation.fp4_stores import psnr
from tests.generation.stub_conditions import MemoryConditions
from tests.generation.wan_animate.test_compiled import Case
from tests.generation.wan_animate.test_pipeline import job_options, make_plan, rendered_here, sampling
from tests.generation.wan_animate.test_transformer import in_four_bits, load
from tests.quantization.svdq_layers import quantize_linear, quantize_weight

RIGHT = ("scaled_mm", "agrees with the definition")
CPU = torch.device("cpu")

# capability -> which computes have fast units there, and which of them is worth asking for
DEVICES = {
    (7, 5): (set(), "bf16"),
    (8, 0): ({"int8"}, "int8"),
    (8, 6): ({"int8"}, "int8"),
    (8, 9): ({"int8", "fp8"}, "int8"),
    (9, 0): ({"int8", "fp8"}, "fp8"),
    (10, 0): ({"fp8", "nvfp4"}, "fp8"),
    (12, 0): ({"fp8", "int8", "nvfp4"}, "int8"),
}


SVDQ = {
    "svdq-int4": {(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)},
    "svdq-nvfp4": {(12, 0), (12, 1)},
}


@pytest.mark.parametrize("capability", DEVICES, ids=str)
@pytest.mark.parametrize("compute", ["fp8", "int8", "nvfp4"])
def test_precisions_on_device_match_table_of_decisions(capability, compute):
    can, best = DEVICES[capability]
    assert PRECISIONS[compute].runs_on(capability) == (compute in can)
    assert advised(capability) == best
    assert PRECISIONS["bf16"].runs_on(capability)
    if compute in can:
        choice = decide(compute, capability, RIGHT, {"nvfp4"}, "cuda:0")
        assert (choice.compute, choice.backend, choice.why) == (compute, *RIGHT)
        return
    with pytest.raises(ConfigInvalid, match=f"sm_{capability[0]}{capability[1]}") as caught:
        decide(compute, capability, RIGHT, {"nvfp4"}, "cuda:0")
    assert f"leave out +{compute}" in caught.value.message
    assert best == "bf16" or f"ask for +{best}" in caught.value.message


@pytest.mark.parametrize("compute", SVDQ)
@pytest.mark.parametrize("capability", [*DEVICES, (10, 3), (12, 1)], ids=str)
def test_svdq_runs_only_on_devices_of_its_kernels(compute, capability):
    assert PRECISIONS[compute].runs_on(capability) == (capability in SVDQ[compute])
    if capability in SVDQ[compute]:
        assert decide(compute, capability, ("cache_dit", ""), {compute}, "cuda:0").backend == "cache_dit"
        return
    with pytest.raises(ConfigInvalid, match=f"sm_{capability[0]}{capability[1]}") as caught:
        decide(compute, capability, ("cache_dit", ""), {compute}, "cuda:0")
    assert f"leave out +{compute}" in caught.value.message


@pytest.mark.parametrize("compute", SVDQ)
def test_decide_on_svdq_requires_svdq_weights_and_product(compute):
    with pytest.raises(ConfigInvalid, match=f"these are nvfp4.*quantize --format {compute}"):
        decide(compute, (12, 0), RIGHT, {"nvfp4"}, "cuda:0")
    with pytest.raises(ConfigInvalid, match=f"stored as {compute} run as {compute} or in 16 bits.*Ask for"):
        decide("fp8", (12, 0), RIGHT, {compute}, "cuda:0")
    with pytest.raises(ConfigInvalid, match=r"undefined symbol: x; .*Install the extra `svdq`"):
        decide(compute, (12, 0), (None, "cache_dit refused: undefined symbol: x; scaled_mm refused"), {compute}, "cuda")
    assert decide("bf16", (9, 0), (None, ""), {compute}, "cuda:0").compute == "bf16"


def test_decide_on_bf16_has_no_requirements():
    assert decide("bf16", None, (None, ""), (), "cpu").backend == ""
    assert decide("bf16", (7, 0), (None, "broken"), {"g32"}, "cuda:0").compute == "bf16"
    assert advised(None) == "bf16"


def test_decide_on_named_precision_that_cannot_run_is_refused():
    with pytest.raises(ConfigInvalid, match=r"int_mm refused: off by 0\.3.*Install comfy-kitchen"):
        decide("int8", (8, 0), (None, "int_mm refused: off by 0.3"), {"g32"}, "cuda:0")
    with pytest.raises(ConfigInvalid, match=r"needs weights stored as nvfp4; these are g32.*quantize --format nvfp4"):
        decide("nvfp4", (12, 0), RIGHT, {"g32"}, "cuda:0")
    with pytest.raises(ConfigInvalid, match="these are plain"):
        decide("nvfp4", None, ("reference", ""), {"plain"}, "cpu")


def test_is_token_wise_of_14b_model_selects_layers_that_see_every_token():
    """Of the 14B model: 8 in each of 40 blocks, 2 in each of 8 face adapters; 99 % of the linears' work."""
    shapes = linear_shapes(transformer_on_meta(WAN_ANIMATE_14B))
    chosen = {name: shape for name, shape in shapes.items() if is_token_wise(name)}
    assert len(chosen) == 40 * 8 + 8 * 2
    assert sum(rows * columns for rows, columns in chosen.values()) == pytest.approx(12.4e9, rel=0.01)
    for exact in ("blocks.0.attn2.to_k", "blocks.3.attn2.add_v_proj", "face_adapter.0.to_k", "proj_out"):
        assert exact in shapes
        assert exact not in chosen
    assert {columns for _, columns in chosen.values()} == {5120, 13824}


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model(tiny_store_dir):
    return load(tiny_store_dir)


@pytest.mark.parametrize("compute", ["fp8", "int8"])
@pytest.mark.parametrize("four_bits", [True, False], ids=["g32", "plain"])
def test_apply_precision_sets_token_wise_layers_and_returns_numbers(model, compute, four_bits):
    if four_bits:
        in_four_bits(model)
    weights = {name: id(p) for name, p in model.named_parameters()}
    said = apply_precision(model, get_recipe(f"fp32+{compute}"), CPU)
    assert {name: id(p) for name, p in model.named_parameters()} == weights
    low = {n for n, m in model.named_modules() if isinstance(m, FP4Linear | LowBitLinear) and m.compute == compute}
    assert low == {n for n, _ in model.named_modules() if is_token_wise(n)}
    assert (said["compute"], said["compute_product"], said["compute_layers"]) == (compute, "reference", len(low))
    assert said["compute_kept_exact"] == 0
    kernels = {"fp8": "torch: no CUDA device"}
    kernels["int8"] = f"{kernels['fp8']}; behind GELU {kernels['fp8']}"
    assert said["compute_rows"] == kernels[compute]
    tested = said["compute_self_test"]
    assert len(tested) == 3  # square, in and out of the feed-forward part
    for numbers in tested.values():
        assert 0.25 * PRECISIONS[compute].activation_error < numbers["error"] <= numbers["limit"]
        assert numbers["off_definition"] == 0
    assert apply_precision(model, get_recipe("fp32"), CPU)["compute"] == "bf16"
    assert all(m.compute == EXACT for m in model.modules() if isinstance(m, FP4Linear | LowBitLinear))


def test_name_code_kernel_names_only_own_kernels():
    for row in PRECISIONS.values():
        for backend in row.backends:
            ours = row.layout == "rows" or (row.layout == "svdq" and backend.name == "scaled_mm")
            name = _name_code_kernel(GemmChoice(row.name, backend.name, ""), CPU)
            assert name.startswith("torch: no CUDA device") if ours else name == ""


def in_svdq(model, layout) -> None:
    """Every linear layer but the last projection, as in a file of `quantize`; smoothed by the weight alone."""
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "proj_out"]:
        model.set_submodule(name, quantize_linear(layer, layout))


@pytest.mark.parametrize("compute", SVDQ)
def test_apply_precision_with_svdq_sets_token_wise_layers(model, compute, monkeypatch):
    in_svdq(model, SVDQ_LAYOUTS[compute])
    said = apply_precision(model, replace(get_recipe("fp32"), compute=compute), CPU)
    low = {n for n, m in model.named_modules() if isinstance(m, SvdqLinear) and m.compute == compute}
    assert low == {n for n, _ in model.named_modules() if is_token_wise(n)}
    assert (said["compute"], said["compute_product"], said["compute_layers"]) == (compute, "reference", len(low))
    assert "a CPU runs the format's definition" in said["compute_why"]
    assert (said["compute_kept_exact"], said["compute_rows"]) == (0, "")
    for numbers in said["compute_self_test"].values():
        assert 0 < numbers["error"] <= numbers["limit"]
        assert numbers["off_definition"] == 0
    with pytest.raises(ConfigInvalid, match=f"stored as {compute}"):
        apply_precision(model, get_recipe("fp32+fp8"), CPU)
    assert apply_precision(model, get_recipe("fp32"), CPU)["compute"] == "bf16"
    assert all(m.compute == EXACT for m in model.modules() if isinstance(m, SvdqLinear))
    right = svdq_products.reference
    monkeypatch.setattr(svdq_products, "cache_dit", lambda *given: right(*given) * 1.06)
    monkeypatch.setattr(low_bit, "pick_gemm_backend", lambda *_: ("cache_dit", "the probe passed"))
    with pytest.raises(ConfigInvalid, match=r"off the format's definition \(0.05 allowed\)"):
        apply_precision(model, replace(get_recipe("fp32"), compute=compute), CPU)


@pytest.mark.parametrize("compute", SVDQ)
@pytest.mark.parametrize("calibrated", [False, True], ids=["by weights", "calibrated"])
def test_self_test_limit_of_svdq_separates_correct_from_wrong_layers(compute, calibrated):
    """[256, 5120] of noise: correct layers are below the limit; noise and a layer without low-rank part are above."""
    torch.manual_seed(0)
    weight, layout = torch.randn(256, 5120) / 5120**0.5, SVDQ_LAYOUTS[compute]
    x = activations(256, 5120, CPU, torch.float32) if calibrated else None
    layer = SvdqLinear(quantize_weight(weight, layout, x), None, layout, 5120, 256)
    choice = decide(compute, None, ("reference", ""), {compute}, "cpu")
    numbers = self_test({"layer": layer}, choice, CPU, torch.bfloat16)["layer"]
    assert 0.1 * numbers["limit"] < numbers["error"] < 0.85 * numbers["limit"]
    assert layer.compute == compute


@pytest.mark.parametrize("compute", SVDQ)
def test_svdq_blocks_chunked_streamed_or_compiled_equal_whole_resident_blocks(model, compute):
    """Each row is quantised separately, so that chunks of rows have the same codes."""
    in_svdq(model, SVDQ_LAYOUTS[compute])
    apply_precision(model, replace(get_recipe("fp32"), compute=compute), CPU)
    case = Case(model)
    whole = case.run(run_block)
    assert torch.equal(case.run(chunked_block), whole)
    stream = BlockStream.of(model, CPU, buffers=2)
    for block_forward in (run_block, chunked_block):
        found = case.inputs.step(model, case.conditioning, 0, blocks=stream(), block_forward=block_forward)
        assert torch.equal(found, whole)
    step = CompiledBlocks(backend="eager")
    assert (case.warm(step), step.broken) == (1, "")  # one graph for all blocks
    assert torch.equal(case.run(step), whole)


def test_apply_precision_with_unsupported_shape_keeps_layer_exact(model):
    model.blocks[1].ffn.net[2] = nn.Linear(model.blocks[1].ffn.net[2].in_features, 24)
    said = apply_precision(model, get_recipe("fp32+fp8"), CPU)
    assert said["compute_kept_exact"] == 1
    assert type(model.blocks[1].ffn.net[2]) is nn.Linear


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: y * 1.02, "off the format's definition (0.01 allowed)"),
        (lambda y: y + y.std() * torch.randn(y.shape), "0.0482 allowed"),
        (lambda y: y * torch.nan, "its error is inf"),
    ],
    ids=["a scale is off", "noise", "not finite"],
)
def test_apply_precision_with_wrong_kernel_is_refused(model, monkeypatch, wrong, said):
    """The kernel passed the probe but is wrong on the weights of this model."""
    right = rowwise.reference
    monkeypatch.setattr(rowwise, "rowwise", lambda *given: wrong(right(*given)))
    monkeypatch.setattr(low_bit, "pick_gemm_backend", lambda *_: ("scaled_mm", "the probe passed"))
    with pytest.raises(ConfigInvalid, match=r"is not right on cpu: on blocks\.0\.") as caught:
        apply_precision(model, get_recipe("fp32+fp8"), CPU)
    assert said in caught.value.message


def test_self_test_of_too_coarse_format_is_refused(model, monkeypatch):
    """The definition itself runs, but without the rotation of rows that the limit of int8 requires."""
    layer = LowBitLinear(model.blocks[0].ffn.net[2], "int8", "reference")
    choice = decide("int8", None, ("reference", ""), {"plain"}, "cpu")
    assert self_test({"layer": layer}, choice, CPU, torch.float32)["layer"]["error"] < PRECISIONS["int8"].error_limit
    monkeypatch.setitem(PRECISIONS, "int8", replace(PRECISIONS["int8"], rotated=False))
    with pytest.raises(ConfigInvalid, match="its error is"):
        self_test({"layer": layer}, choice, CPU, torch.float32)


def test_frames_in_8_bits_are_within_psnr_limits_of_exact_frames(tiny_store_dir):
    """The limits are 30 dB for fp8 and 38 dB for int8, after three steps of the tiny model with random weights."""
    recipe = get_recipe("fp32")
    pipeline, said = load_pipeline(ResolvedRecipe(ModelStore(tiny_store_dir), recipe), CPU)
    assert (said["compute"], said["attention"], said["compile"]) == ("bf16", "native", "eager")
    conditions, options = MemoryConditions(5), job_options(steps=3, max_segment_frames=5)

    def frames():
        return rendered_here(pipeline, conditions, options)

    exact = frames()
    for compute, least in (("fp8", 30), ("int8", 38)):
        apply_precision(pipeline.transformer, get_recipe(f"fp32+{compute}"), CPU)
        low = frames()
        assert least < psnr(exact, low) < 90, compute
        assert (frames() == low).all()
    apply_precision(pipeline.transformer, recipe, CPU)
    assert (frames() == exact).all()


def test_compiled_blocks_are_warmed_once_before_steps(tiny_store_dir):
    recipe = get_recipe("fp32")
    pipeline, _ = load_pipeline(ResolvedRecipe(ModelStore(tiny_store_dir), recipe), CPU)
    assert pipeline.switches == Switches()
    conditions, options = MemoryConditions(5), job_options(steps=2, max_segment_frames=5)
    exact = rendered_here(pipeline, conditions, options)
    pipeline.block_forward = CompiledBlocks(backend="eager")
    stages = []
    for _ in range(2):
        timer = StageTimer()
        assert (rendered_here(pipeline, conditions, options, timer=timer) == exact).all()
        stages.append((timer.counters.get("compiled_graphs"), "warmup" in timer.seconds))
    assert stages == [(1, True), (None, False)]
    timer = StageTimer()
    wide = MemoryConditions(5, width=64)
    list(pipeline.render(wide, DEFAULT_PROMPT, options, make_plan(wide, options), sampling(), timer))
    assert timer.counters["compiled_graphs"] == 1  # a second size: one more
    assert not pipeline.block_forward.broken


@pytest.mark.parametrize("compute", SVDQ)
def test_self_test_of_svdq_layer_uses_inputs_like_its_calibration(compute):
    """The channels range over e^±3. With inputs of equal size in every channel, a correct layer would be refused."""
    torch.manual_seed(0)
    sizes = (1.5 * torch.randn(1024)).exp()
    weight, layout = torch.randn(256, 1024) / 32, SVDQ_LAYOUTS[compute]
    layer = SvdqLinear(quantize_weight(weight, layout, torch.randn(512, 1024) * sizes), None, layout, 1024, 256)
    choice = decide(compute, None, ("reference", ""), {compute}, "cpu")
    tested = self_test({"layer": layer}, choice, CPU, torch.bfloat16)["layer"]
    assert 0.01 < tested["error"] < 0.8 * tested["limit"]
    x = activations(256, 1024, CPU, torch.float32)
    with torch.no_grad():
        low = layer(x)
        layer.set_compute(EXACT)
        assert low_bit.relative_error(low, layer(x)) > tested["error"]
