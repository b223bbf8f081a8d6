"""SVDQ residual: scales against an exhaustive search, what is stored against what it stands for."""

from __future__ import annotations

import pytest
import torch

from runner.quantization.formats.e2m1 import VALUES
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.formats.svdq_residual import Residual

layouts = pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)
ALL = slice(None)


def made(values, layout, method="mse", per_column=None):
    residual = Residual.empty(*values.shape, layout, values.device)
    residual.quantize_rows(ALL, values, layout, method, per_column)
    return residual


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@layouts
def test_searched_scales_are_near_the_best_of_all(layout):
    values = gaussian(64, 256)
    found = made(values, layout)
    groups = values.view(64, -1, layout.group)
    grid = torch.arange(-8.0, 8.0) if layout.precision == "int4" else torch.tensor(sorted(set(VALUES)))
    least = None
    for ratio in torch.linspace(0.3, 2.2, 200):
        scale = (groups.abs().amax(-1, keepdim=True) / grid.max() * ratio).unsqueeze(-1)
        error = (groups.unsqueeze(-1) - grid * scale).abs().amin(-1).square().sum(-1)
        least = error if least is None else torch.minimum(least, error)
    missed = (found.dequantize_rows(ALL) - values).square().sum()
    # e4m3 has eight scales an octave
    assert float(missed) < 1.10 * float(least.sum()), float(missed / least.sum())
    plain = (made(values, layout, "absmax").dequantize_rows(ALL) - values).square().sum()
    assert float(missed) < 0.85 * float(plain)


@layouts
def test_codes_are_chosen_for_the_scales_as_stored(layout):
    values = gaussian(32, 128)
    found = made(values, layout)
    scales = found.scales.float() * (1 if found.channels is None else found.channels.float().unsqueeze(1))
    grid = torch.arange(-8.0, 8.0) if found.channels is None else torch.tensor(VALUES)
    nearest = (values.view(32, -1, layout.group, 1) / scales[..., None, None] - grid).abs().amin(-1)
    off = (values - found.dequantize_rows(ALL)).view(32, -1, layout.group).abs() / scales.unsqueeze(-1)
    torch.testing.assert_close(off, nearest, rtol=1e-4, atol=1e-4)


@layouts
def test_rows_of_zeros_and_rows_of_any_size(layout):
    values = gaussian(5, 128) * torch.tensor([[1e-20], [1.0], [0.0], [1e20], [1e-3]])
    found = made(values, layout)
    errors = (found.dequantize_rows(ALL) - values).norm(dim=1)
    assert bool((errors <= 0.12 * values.norm(dim=1)).all()) and float(errors[2]) == 0
    assert not bool(found.scales[2].float().any())
    if found.channels is not None:
        assert float(found.channels[2]) == 1
        peaks = values.abs().amax(1)[[0, 1, 3, 4]]
        ratio = peaks / (found.channels.float()[[0, 1, 3, 4]] * 224 * 6)
        assert bool((ratio <= 1).all()) and bool((ratio > 0.99).all())  # rounded up, to a bfloat16


def test_the_lowest_integer_is_used():
    layout = next(row for row in SVDQ_LAYOUTS.values() if row.precision == "int4")
    values = torch.zeros(1, 128)
    values[0, :64] = torch.arange(64) % 16 - 8.0
    found = made(values, layout)
    assert int(found.codes.min()) == -8 and torch.equal(found.dequantize_rows(ALL), values)


@layouts
def test_columns_that_count_more_are_met_better(layout):
    values, counts = gaussian(64, 128), torch.ones(128)
    counts[::8] = 100
    weighted = made(values, layout, "activation", counts.view(-1, layout.group))

    def missed(r):
        return float(((r.dequantize_rows(ALL) - values).square() * counts).sum())

    assert missed(weighted) < 0.9 * missed(made(values, layout))


def test_values_that_are_no_numbers_are_refused():
    for layout in SVDQ_LAYOUTS.values():
        with pytest.raises(ValueError, match="NaN or infinite"):
            made(torch.full((1, 128), float("nan")), layout)
