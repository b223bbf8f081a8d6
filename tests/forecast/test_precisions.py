"""GEMM precisions: the rows are complete, one row adds a precision everywhere, and its facts stand nowhere else."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from runner.errors import ConfigInvalid
from runner.forecast.bytes import code_bytes, workspace_bytes
from runner.forecast.flops import PRODUCTION
from runner.forecast.precisions import (
    DEFAULT_PRECISION,
    PRECISIONS,
    REFERENCE,
    GemmBackend,
    GemmPrecision,
    advised,
    device_rates,
    fastest_first,
)
from runner.forecast.seconds import DEVICES
from runner.spec.recipes import DEFAULT_RECIPE, Recipe, get_recipe

ROOT = Path(__file__).resolve().parents[2]
SHAPE = PRODUCTION.transformer


@pytest.fixture
def stub(monkeypatch) -> GemmPrecision:
    """A precision that is one row of the table and nothing else."""
    row = replace(
        PRECISIONS["fp8"],
        name="stub",
        dtype="float8_e5m2",
        largest=57344.0,
        rotated=True,
        multiples=(64, 32),
        backends=(GemmBackend("stub_mm", "runner.quantization.kernels.stub_kernel:multiply"),),
        activation_error=0.06,
        weight_error=0.06,
        code_bytes=3,
        runs_on=lambda capability: capability[0] == 5,
        advised_on=lambda capability: capability[0] == 5,
        rates={"H200": 5000},
    )
    monkeypatch.setitem(PRECISIONS, "stub", row)
    return row


def test_precision_rows_are_complete():
    for name, row in PRECISIONS.items():
        assert row.name == name
        assert row.estimated <= row.rates.keys() <= {device.name for device in DEVICES}
        if row.layout == "exact":
            assert name == DEFAULT_PRECISION
            assert row.rates.keys() == {device.name for device in DEVICES}
            continue
        assert row.backends
        assert row.reference is not None and row.find_backend(REFERENCE) is row.reference
        assert [row.find_backend(backend.name) for backend in row.backends] == list(row.backends)
        assert row.find_backend("none") is None
        assert row.largest > 0
        assert 0 < row.activation_error <= row.error_limit < 0.25
    assert get_recipe(DEFAULT_RECIPE).compute == Recipe.compute == DEFAULT_PRECISION


def test_precision_rows_with_own_groups_are_svdq_only():
    """The other format with groups is `FP4_BYTES`."""
    for row in PRECISIONS.values():
        assert (row.layout == "svdq") == (row.group_bytes > 0) == (row.vectors != (0, 0))
        if row.layout == "svdq":
            assert row.stored_format == row.name and row.visible and not row.dequantized and row.code_bytes == 0
            # Codes and their scales are written by a kernel that reads 16 bits; a product reads those of a weight.
            assert row.weight_traffic == 0.5 + row.group_bytes == row.activation_traffic - 2


def test_svdq_rows_run_on_compiled_architectures_only():
    """What the kernels were compiled for. No unit of Hopper or of sm_100 multiplies integers of four bits."""
    known = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
    found = {name: [at for at in known if PRECISIONS[name].runs_on(at)] for name in ("svdq-int4", "svdq-nvfp4")}
    assert found == {"svdq-int4": [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)], "svdq-nvfp4": [(12, 0), (12, 1)]}
    assert not {row for at in known for row in fastest_first(at)} & found.keys()  # asked for by name


@pytest.mark.parametrize(("name", "limit"), [("fp8", 0.0482), ("int8", 0.0186), ("nvfp4", 0.1125)])
def test_precision_row_has_expected_error_limit(name, limit):
    assert PRECISIONS[name].error_limit == pytest.approx(limit, abs=1e-4)


def test_precision_rows_have_dtypes_in_torch_and_backends_in_kernels():
    import torch

    from runner.quantization.formats.e2m1 import FORMATS
    from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS

    for row in PRECISIONS.values():
        assert isinstance(getattr(torch, row.dtype), torch.dtype)
        assert row.stored_format in (None, *FORMATS, *SVDQ_LAYOUTS)
        assert (row.layout == "svdq") == (row.stored_format in SVDQ_LAYOUTS)
        if row.layout == "rows":
            dtype = getattr(torch, row.dtype)
            assert row.largest == (torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)).max
            assert row.code_bytes == dtype.itemsize


def test_fp4_bytes_equal_those_of_storage_formats():
    from runner.forecast.bytes import FP4_BYTES
    from runner.quantization.formats.e2m1 import FORMATS

    assert {fmt.bits_per_weight / 8 for fmt in FORMATS.values()} == {FP4_BYTES}


@pytest.mark.parametrize("rank", [16, 32, 128])
def test_svdq_bytes_equal_those_of_layout(rank):
    """Padded sides too: 5120 -> 64, and odd ones of small models."""
    from runner.forecast.bytes import SVDQ_RANK, SVDQ_TILE, svdq_bytes
    from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS, TILE

    assert SVDQ_TILE == TILE
    for name, layout in SVDQ_LAYOUTS.items():
        assert layout.rank == SVDQ_RANK
        assert layout.bits_per_weight / 8 == 0.5 + PRECISIONS[name].group_bytes
        for shape in ((5120, 5120), (13_824, 5120), (30_720, 5120), (64, 5120), (40, 72)):
            assert svdq_bytes(*shape, compute=name, rank=rank) == layout.with_rank(rank).bytes(*shape)


def test_new_precision_row_is_recipe_modifier(stub):
    recipe = get_recipe("fp4-distill+steps4+stub")
    assert (recipe.compute, recipe.name) == ("stub", "fp4-distill+stub+steps4")
    with pytest.raises(
        ConfigInvalid, match=r"did you mean 'stub'.*bf16, fp8, int8, nvfp4, svdq-.*, stub, int8-attention"
    ):
        get_recipe("fp4-distill+stubb")
    with pytest.raises(ConfigInvalid, match="has both 'stub' and 'fp8'"):
        get_recipe("fp4-distill+stub+fp8")


def test_new_precision_row_counts_in_forecast(stub):
    eight, window = code_bytes(SHAPE, 832, 480, 81, compute="fp8"), (832, 480, 81)
    assert code_bytes(SHAPE, *window, compute="stub") == 3 * eight > 0
    assert code_bytes(SHAPE, *window, compute="nvfp4") == code_bytes(SHAPE, *window, compute="bf16") == 0
    weight = SHAPE.dim * SHAPE.ffn_dim
    more = workspace_bytes(SHAPE, compute="stub") - workspace_bytes(SHAPE)
    assert more == 3 * weight
    assert device_rates("H200")["stub"] == 5000
    assert "stub" not in device_rates("A100")


def test_new_precision_row_is_used_by_decide(stub):
    from runner.generation.runtime.compute import decide

    assert advised((5, 0)) == "stub"
    assert decide("stub", (5, 0), ("stub_mm", "right"), {"g32"}, "cuda:0").backend == "stub_mm"
    with pytest.raises(
        ConfigInvalid, match=r"precision 'stub' .*sm_90\) has no fast units.*leave out \+stub, or ask for"
    ):
        decide("stub", (9, 0), ("stub_mm", "right"), {"g32"}, "cuda:0")
    with pytest.raises(ConfigInvalid, match=r"precision 'fp8' .*sm_50.*leave out \+fp8, or ask for \+stub"):
        decide("fp8", (5, 0), (None, "broken"), {"g32"}, "cuda:0")


def test_new_precision_row_sets_layer_and_checks_shapes(stub):
    import torch
    from torch import nn

    from runner.quantization.kernels.low_bit import LowBitLinear, relative_error

    assert stub.problem_of_shape(32, 64) is None
    assert stub.problem_of_shape(32, 48) == "[32, 48] is no multiple of [32, 64]"
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(5, 64)
    with torch.no_grad():
        exact = layer(x)
        low = LowBitLinear(layer, "stub", REFERENCE)(x)
    assert 0.01 < relative_error(low, exact) < stub.error_limit


def test_precision_row_with_missing_backend_is_error(stub, monkeypatch):
    import torch

    from runner.generation.runtime.compute import decide
    from runner.quantization.kernels import low_bit

    cpu = torch.device("cpu")
    problem = low_bit._check_backend("stub_mm", "stub", cpu)
    assert problem == "ModuleNotFoundError: No module named 'runner.quantization.kernels.stub_kernel'"
    without = replace(stub, name="bare", reference=GemmBackend(REFERENCE, "runner.quantization.kernels.rowwise:gone"))
    monkeypatch.setitem(PRECISIONS, "bare", without)
    probed = low_bit.pick_gemm_backend(cpu, "bare")
    assert probed[0] is None
    with pytest.raises(ConfigInvalid, match=r"no backend here computes it right on cpu: reference refused: .*'gone'"):
        decide("bare", None, probed, {"g32"}, "cpu")


# Where a name of a precision may stand as a text, and what it means there, beside the table itself.
ELSEWHERE = {
    "fp8": (),
    "int8": (
        "runner/preprocess/",  # the precision of the pose network
        "runner/cli.py",  # the same
        "runner/verbs/",  # the same
        "runner/spec/recipes.py",  # of the attention
        "runner/quantization/formats/stored_dtypes.py",  # a dtype in a file
        "runner/quantization/formats/svdq_layout.py",  # the same
    ),
    "nvfp4": (
        "runner/quantization/formats/",  # the storage format
        "runner/quantization/kernels/svdq_products.py",  # the numbers of another one, `SvdqLayout.precision`
        "runner/cli.py",  # the same
        "runner/verbs/",  # the same
        "runner/demo/",  # the same
    ),
    "svdq-int4": ("runner/quantization/formats/svdq_layout.py",),  # the storage format
    "svdq-nvfp4": ("runner/quantization/formats/svdq_layout.py",),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_precision_name_is_in_table_only(name):
    """Outside the places in `ELSEWHERE`, no other module has the name of a precision as a constant."""
    table = ROOT / "runner/forecast/precisions.py"
    found = []
    for path in sorted((ROOT / "runner").rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if path == table or place.startswith(ELSEWHERE[name]):
            continue
        constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        found += [f"{place}:{node.lineno}" for node in constants if node.value == name]
    assert found == [], f"{name!r}: make it a field of GemmPrecision"
    assert f'"{name}"' in table.read_text()
