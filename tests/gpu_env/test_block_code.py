"""The compiled 14B block as CUDA code: kernels, copies, memory at the peak, traffic, registers. No GPU is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.forecast.flops import PRODUCTION, Costs
from runner.forecast.precisions import PRECISIONS
from runner.forecast.seconds import FUSED_BYTES
from runner.generation.runtime.memory_plan import forecast_memory, make_plan
from runner.quantization.rules import WAN_ANIMATE_14B
from runner.spec.recipes import get_recipe
from tests.gpu_env.block_code import CASES, BlockCode, Case, block_codes, print_table
from tests.gpu_env.known_torch import needs_gpu_env, needs_known_torch

pytestmark = [needs_gpu_env, needs_known_torch]

CASE = pytest.mark.parametrize("case", CASES, ids=str)
KEPT = "video_lab.kept_rows_linear"
PRODUCTS = ("video_lab.fp4_linear", "video_lab.fp4_rowwise_linear", "video_lab.svdq_linear", KEPT)


def code_of(case: Case) -> BlockCode:
    return block_codes(case.architecture)[case]


@CASE
def test_compiled_block_is_one_graph_of_at_most_9_kernels(case):
    """Dynamo would refuse a second graph. A LoRA is part of the linear's operator and adds no kernel."""
    found = code_of(case)
    names = [launch.name for launch in found.code.triton_launches]
    assert set(names) == set(found.code.kernels)
    assert 0 < len(names) <= 9, names
    if case.lora:
        without = Case(case.architecture, case.precision, case.backend)
        assert len(names) == len(code_of(without).code.triton_launches)


@pytest.mark.parametrize("case", [case for case in CASES if case.precision == "int8"], ids=str)
def test_int8_block_quantises_six_inputs(case):
    """One operator for each input; query, key and value read the same codes."""
    code = code_of(case).code
    operators = [launch for launch in code.launches if not launch.triton]
    assert len([launch for launch in operators if "rotated_codes" in launch.name]) == 6
    product = "kept_rows_linear" if case.kept else "fp4_rowwise_linear"
    products = [launch for launch in operators if product in launch.name]
    assert (len(products), len({launch.given[0] for launch in products})) == (8, 6)


@CASE
def test_query_key_and_value_reach_attention_without_copy(case):
    """One kernel norms and rotates query and key and writes both; the value comes from its product."""
    code = code_of(case).code
    attention = next(launch for launch in code.launches if not launch.triton and "attention" in launch.name)
    query, key, value = attention.given[:3]
    rotating = code.writer(query, attention)
    assert code.writer(key, attention) == rotating
    assert rotating.triton
    angles = [given for given in rotating.given if code.tensors[given].shape == (1, 34_320, 1, 64)]
    assert len(angles) == 2
    product = code.writer(value, attention)
    assert operator_of(product) in PRODUCTS


def operator_of(launch) -> str:
    return launch.name.removeprefix("torch.ops.").removesuffix(".default")


@pytest.mark.parametrize("case", [case for case in CASES if case.kept], ids=str)
def test_kept_codes_change_only_products(case):
    """The same kernels, peak and traffic; each of the eight products has codes [N, K] of a weight, and no other tensor
    of a weight's size is read or written."""
    kept, made = code_of(case), code_of(replace(case, kept=False))
    moved, moved_without = (list(map(one.code.traffic, one.code.triton_launches)) for one in (kept, made))
    assert moved == moved_without
    assert (kept.peak_units, kept.bytes_a_channel) == (made.peak_units, made.bytes_a_channel)
    operators = [operator_of(launch) for launch in kept.code.launches if not launch.triton]
    assert operators.count(KEPT) == 8
    assert not {"video_lab.fp4_linear", "video_lab.fp4_rowwise_linear"} & set(operators)
    assert [
        KEPT if name == "video_lab.fp4_rowwise_linear" else name
        for name in (operator_of(launch) for launch in made.code.launches if not launch.triton)
    ] == operators
    for launch in kept.code.launches:
        given = [kept.code.tensors[name].shape for name in launch.given if name in kept.code.tensors]
        weights = [shape for shape in given if shape in ((5120, 5120), (13_824, 5120), (5120, 13_824))]
        assert len(weights) == (not launch.triton and operator_of(launch) == KEPT)


@CASE
def test_peak_memory_is_within_memory_plan(case):
    """Compared with the plan's activations in mode resident, the caller's hidden states included; to three digits."""
    recipe = get_recipe("fp4" + (f"+{case.precision}" if case.precision != "bf16" else ""))
    costs = Costs.from_configs(dict(WAN_ANIMATE_14B), {})
    planned = forecast_memory(make_plan("resident", recipe), recipe, costs, 832, 480, 81).parts["activations"]
    units = planned / (34_320 * 5120 * 2)
    assert 5 < code_of(case).peak_units <= units + 0.005


@CASE
def test_kernel_traffic_equals_forecast(case):
    """In bytes per channel of a token. These kernels write and read the codes of fp8; separate operators write and read
    those of int8, including GELU, and those of SVDQuant."""
    precision, shape = PRECISIONS[case.precision], PRODUCTION.transformer
    wanted = FUSED_BYTES - precision.gelu_traffic * shape.ffn_dim / shape.dim
    if not precision.rotated and precision.layout != "svdq":
        wanted += precision.activation_traffic * shape.activation_numbers / shape.dim
    assert code_of(case).bytes_a_channel == pytest.approx(wanted, rel=0.005)


@CASE
def test_kernel_of_block_compiles_without_spills(case):
    """For each configuration that Inductor would time, with the Triton that users get."""
    found = code_of(case)
    assert {kernel.name for kernel in found.kernels} == set(found.code.kernels)
    assert [kernel for kernel in found.kernels if kernel.stack or kernel.local] == []
    assert all(8 <= kernel.registers <= 128 for kernel in found.kernels), found.kernels


def test_print_table_has_line_for_each_case(capsys):
    print_table()
    assert [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()] == [str(case) for case in CASES]
