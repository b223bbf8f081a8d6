"""SVDQ against cache-dit: its packer's bytes, its quantiser's layers, its linear as a reader of ours. All on a CPU.

What cache-dit is to this project: see `test-tools` in pyproject.toml; a run never imports it without the extra `svdq`.
"""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from runner.quantization.formats.svdq import (
    effective_weight,
    pack_lowrank,
    pack_scales,
    pack_vector,
    pack_weight,
    pad,
    svdq_linear,
    torch_table,
    unpack_lowrank,
    unpack_scales,
    unpack_vector,
    unpack_weight,
)
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS

LAYOUTS = pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=lambda layout: layout.precision)
SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(scope="module")
def peer():
    """Its packer, quantiser and linear. Importing it sets an environment variable and gives loggers handlers of its
    own; nothing of torch, diffusers or the root logger changes (compared before and after, 1.5.3)."""
    before = dict(os.environ)
    svdquant = importlib.import_module("cache_dit.quantization.svdquant")
    packing = importlib.import_module("cache_dit.quantization.svdquant.packing")
    os.environ.clear()
    os.environ.update(before)
    return SimpleNamespace(
        packer=packing.SVDQWeightPacker(bits=4),
        quantize=svdquant.quantize_linear_svdq_w4a4,
        linear=svdquant.SVDQW4A4Linear,
    )


def same_bytes(one, other):
    return (
        one.dtype is other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Its packer


@LAYOUTS
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (384, 256)])
def test_weights_are_packed_to_the_same_bytes(peer, layout, shape):
    low, high = (-8, 8) if layout.precision == "int4" else (0, 16)
    codes = torch.randint(low, high, shape, generator=generator())
    packed = peer.packer.pack_weight(codes.to(torch.int32))
    assert same_bytes(pack_weight(codes, layout.precision), packed)
    assert torch.equal(unpack_weight(packed, layout.precision).long(), codes)


@LAYOUTS
@SIXTEEN
def test_scales_are_packed_to_the_same_bytes(peer, layout, dtype):
    scales = torch.rand(256, 384 // layout.group, generator=generator()).to(dtype)
    padded = peer.packer.pad_scale(scales.view(256, 1, -1, 1), layout.group)
    packed = peer.packer.pack_scale(padded, layout.group)
    ours = scales if layout.precision == "int4" else scales.to(torch.float8_e4m3fn)
    assert same_bytes(pack_scales(ours, layout.precision), packed)
    assert same_bytes(unpack_scales(packed, layout.precision), ours)


@SIXTEEN
def test_vectors_are_packed_to_the_same_bytes(peer, dtype):
    vector = torch.randn(384, generator=generator()).to(dtype)
    packed = peer.packer.pack_scale(vector.view(-1, 1), -1)
    assert same_bytes(pack_vector(vector), packed)
    assert same_bytes(unpack_vector(packed), vector)


@SIXTEEN
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("rank", [16, 32, 48, 128])
def test_factors_are_packed_to_the_same_bytes(peer, dtype, down, rank):
    factor = torch.randn((rank, 384) if down else (384, rank), generator=generator()).to(dtype)
    packed = peer.packer.pack_lowrank_weight(factor, down=down)
    assert same_bytes(pack_lowrank(factor, down=down), packed)
    assert same_bytes(unpack_lowrank(packed, down=down), factor)


# Its quantiser


def quantized(peer, layout, inputs, outputs, rank=32):
    """(the linear, activations, cache-dit's tensors of it by our names, its bias as packed)."""
    torch.manual_seed(0)  # initial weights, and its randomised SVD
    linear, x = nn.Linear(inputs, outputs).requires_grad_(False), torch.randn(512, inputs)
    state = peer.quantize(
        linear, x, rank=rank, precision=layout.precision, torch_dtype=torch.bfloat16, return_state_dict=True
    )
    table = torch_table(layout.with_rank(rank), outputs, inputs)
    tensors = {name: state[name] for name in table}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == table
    assert state.keys() - table.keys() == {"bias", "smooth_factor_orig"}
    return linear, x, tensors, state["bias"]


def pack_again(tensors, layout):
    """Every tensor unpacked and packed."""
    precision = layout.precision
    again = {}
    for name, tensor in tensors.items():
        if name == "qweight":
            again[name] = pack_weight(unpack_weight(tensor, precision), precision)
        elif name == "wscales":
            again[name] = pack_scales(unpack_scales(tensor, precision), precision)
        elif name.startswith("proj_"):
            down = name == "proj_down"
            again[name] = pack_lowrank(unpack_lowrank(tensor, down=down), down=down)
        else:
            again[name] = pack_vector(unpack_vector(tensor))
    return again


@LAYOUTS
@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(256, 384, 32), (384, 128, 48)])
def test_its_layers_come_back_byte_for_byte(peer, layout, inputs, outputs, rank):
    _, _, tensors, bias = quantized(peer, layout, inputs, outputs, rank)
    again = pack_again(tensors, layout)
    assert all(same_bytes(again[name], tensor) for name, tensor in tensors.items())
    assert same_bytes(pack_vector(unpack_vector(bias)), bias)


@LAYOUTS
def test_its_layer_stands_for_the_weight(peer, layout):
    """finishing.md §4: .0798 (int4), .0829 (nvfp4) of 256 → 384; .48 where the factors were read otherwise."""
    linear, x, tensors, bias = quantized(peer, layout, 256, 384)
    weight = effective_weight(tensors, layout)
    error = float((weight - linear.weight).norm() / linear.weight.norm())
    assert error == pytest.approx(0.0798 if layout.precision == "int4" else 0.0829, abs=0.003)
    assert torch.equal(unpack_vector(bias), linear.bias.bfloat16())
    found = svdq_linear(x, tensors, layout, 384, unpack_vector(bias))
    expected = linear(x)
    assert float((found - expected).norm() / expected.norm()) < 0.14  # with activations in four bits too


@LAYOUTS
@pytest.mark.parametrize(("inputs", "outputs"), [(192, 320), (64, 100)])
def test_layers_that_it_pads_come_back(peer, layout, inputs, outputs):
    """Our widths in its padded tensors. It pads scales with ones, codes with zeros."""
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs).requires_grad_(False), torch.randn(64, inputs)
    state = peer.quantize(
        linear, x, rank=32, precision=layout.precision, torch_dtype=torch.bfloat16, return_state_dict=True
    )
    table = torch_table(layout, outputs, inputs)
    tensors = {name: state[name] for name in table}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == table
    assert all(same_bytes(tensor, tensors[name]) for name, tensor in pack_again(tensors, layout).items())
    weight = effective_weight(tensors, layout)[:outputs, :inputs]
    assert float((weight - linear.weight).norm() / linear.weight.norm()) < 0.1
    found = svdq_linear(x, tensors, layout, outputs, unpack_vector(state["bias"])[:outputs])
    expected = linear(x)
    assert float((found - expected).norm() / expected.norm()) < 0.15


# Its linear


@LAYOUTS
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 384), (200, 100)])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_its_linear_takes_our_tensors(peer, layout, inputs, outputs, has_bias):
    g = generator(1)
    rows, columns = layout.padded(outputs, inputs)
    tensors = {
        name: torch.randint(0, 100, (*shape[:-1], shape[-1] * dtype.itemsize), generator=g, dtype=torch.uint8).view(
            dtype
        )
        for name, (shape, dtype) in torch_table(layout, outputs, inputs).items()
    }
    state = tensors | {"smooth_factor_orig": tensors["smooth_factor"]}
    bias = torch.randn(outputs, generator=g).bfloat16()
    if has_bias:
        state["bias"] = pack_vector(pad(bias, (rows,)))
    shell = peer.linear(inputs, outputs, rank=32, bias=has_bias, precision=layout.precision, torch_dtype=torch.bfloat16)
    shell.load_state_dict(state, strict=True)
    held = dict(shell.named_parameters())
    assert held.keys() == state.keys()
    assert all(same_bytes(held[name].data, tensor) for name, tensor in state.items())
    assert (shell.wtscale == 1.0) if layout.precision == "nvfp4" else (shell.wtscale is None)
    if has_bias:
        assert torch.equal(unpack_vector(held["bias"].data)[:outputs], bias)
    assert held["proj_down"].shape == (columns, 32)
