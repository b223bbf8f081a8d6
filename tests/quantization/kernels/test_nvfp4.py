"""Activations in NVFP4: every number checked against the exhaustive choice, the layout against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runner.quantization.formats.e2m1 import NVFP4, VALUES, dequantize
from runner.quantization.formats.scales import quantize
from runner.quantization.kernels.low_bit import relative_error
from runner.quantization.kernels.nvfp4 import (
    Blocks,
    block_scaled,
    dequantize_blocks,
    quantize_blocks,
    reference,
    to_blocked,
)


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32))
def test_codes_are_nearest_and_of_two_scales_the_better_is_taken(values):
    x = torch.tensor(values).view(1, 32)
    blocks = quantize_blocks(x)
    assert (blocks.packed.shape, blocks.scale.shape, blocks.tensor_scale.shape) == ((1, 16), (1, 2), ())
    found = dequantize_blocks(blocks)[0].double().view(2, 16)
    grid = torch.tensor(VALUES, dtype=torch.float64)
    for group, given_values in zip(found, x[0].double().view(2, 16), strict=True):
        losses = []
        for target in (6.0, 4.0):
            wanted = float(given_values.abs().max()) / target / float(blocks.tensor_scale)
            scale = float(torch.tensor(wanted).to(torch.float8_e4m3fn).float()) * float(blocks.tensor_scale)
            best = (given_values[:, None] - grid * scale).abs().amin(dim=1)
            losses.append(float(best.square().sum()))
        energy = float(given_values.square().sum())  # of which float32 loses a part
        assert float((group - given_values).square().sum()) == pytest.approx(min(losses), rel=1e-4, abs=1e-12 * energy)


def test_zeros_signs_and_what_is_no_number():
    assert torch.equal(dequantize_blocks(quantize_blocks(torch.zeros(2, 32))), torch.zeros(2, 32))
    x = torch.tensor([[-6.0, 4.0, -0.5, 0.0] * 8])
    torch.testing.assert_close(dequantize_blocks(quantize_blocks(x)), x, rtol=0.04, atol=0)
    x[0, 3] = torch.nan
    assert not bool(torch.isfinite(dequantize_blocks(quantize_blocks(x))).any())


def test_errors_are_the_tables():
    """.087 gaussian, .079 with 0.5 % of the channels thirty times as large, .093 after a GELU."""
    weight, plain = gauss(384, 5120, seed=7), gauss(192, 5120)
    out = plain.clone()
    out[:, torch.randperm(5120, generator=torch.Generator().manual_seed(3))[:26]] *= 30
    for x, wanted in ((plain, 0.087), (out, 0.079), (torch.nn.functional.gelu(1.5 * plain), 0.093)):
        error = relative_error(dequantize_blocks(quantize_blocks(x)) @ weight.T, x @ weight.T)
        assert error == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (300, 12)], ids=str)
def test_the_layout_is_its_formula(shape):
    rows, columns = shape
    scale = (torch.arange(rows * columns) % 255 + 1).to(torch.uint8).view(shape)
    flat = to_blocked(scale)
    padded = -(-columns // 4) * 4
    assert flat.numel() == -(-rows // 128) * 128 * padded
    seen = torch.zeros_like(flat)
    for r in range(rows):
        for c in range(columns):
            at = ((r // 128) * (padded // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            assert flat[at] == scale[r, c]
            seen[at] = 1
    assert int(flat[seen == 0].sum()) == 0  # what is padded is zero


def test_the_definition_is_the_product_of_the_values():
    x, stored = gauss(24, 64), quantize(gauss(48, 64, seed=1), NVFP4)
    w = Blocks(stored["weight_packed"], stored["weight_scale"], stored["weight_scale_2"])
    wanted = dequantize_blocks(quantize_blocks(x)).double() @ dequantize(stored, NVFP4).double().T
    torch.testing.assert_close(reference(quantize_blocks(x), w, torch.float32).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (10, 12), reason="no NVFP4 units"
)
@pytest.mark.parametrize("shape", [(1000, 5120, 5120), (64, 13824, 5120)], ids=str)
def test_the_kernel_equals_the_definition_on_a_gpu(shape):
    tokens, columns, outputs = shape
    x = quantize_blocks(gauss(tokens, columns).cuda().bfloat16())
    w = quantize_blocks(gauss(outputs, columns, seed=1).cuda().bfloat16())
    assert relative_error(block_scaled(x, w, torch.bfloat16), reference(x, w, torch.float32)) < 0.005
