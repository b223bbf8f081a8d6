"""The float emulation of 8-bit attention: its arithmetic, and that it stands in for self-attention alone."""

from __future__ import annotations

import importlib

import pytest
import torch

from runner.generation.runtime.attention import LIMITS
from runner.generation.wan_animate import transformer
from runner.quantization.kernels.low_bit import relative_error
from tests.bench.run_bench import ROOT


@pytest.fixture
def emulation(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("_emulated_attention")


def draw(tokens, head_dim, heads=2, keys=None):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, n, heads, head_dim, generator=generator) for n in (tokens, keys or tokens, keys or tokens)
    )


def exact(query, key, value):
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).float()


# Each of the kernel's rotations and tiles: (tokens, head_dim).
CASES = [(200, 32), (378, 32), (378, 64), (200, 128), (1000, 128), (1100, 128), (300, 200)]


@pytest.mark.parametrize(("tokens", "head_dim"), CASES)
def test_on_gaussian_input_8_bits_lose_what_the_trial_allows_and_many_bits_nothing(emulation, tokens, head_dim):
    """Published of the kernel: about 0.015. A bit more halves the error."""
    given = draw(tokens, head_dim)
    errors = {bits: relative_error(emulation.emulated_attention(*given, bits), exact(*given)) for bits in (7, 8, 16)}
    assert 0.010 < errors[8] < 0.025 < LIMITS["8 bit"]
    assert errors[7] == pytest.approx(2 * errors[8], rel=0.1)
    assert errors[16] < 1e-4


def test_it_takes_other_keys_than_queries_and_keeps_the_dtype(emulation):
    query, key, value = (x.bfloat16() for x in draw(40, 64, keys=300))
    found = emulation.emulated_attention(query, key, value)
    assert (found.shape, found.dtype) == (query.shape, torch.bfloat16)
    assert relative_error(found.float(), exact(query, key, value)) < 0.03


@pytest.mark.parametrize(("width", "keys", "size"), [(64, 256, 4), (64, 257, 64), (128, 257, 128), (256, 257, 128)])
def test_the_rotation_is_orthogonal_and_spreads_a_channel_over_its_block(emulation, width, keys, size):
    rotation = emulation.rotate(torch.eye(width), width, keys)
    assert torch.allclose(rotation @ rotation.T, torch.eye(width), atol=1e-5)
    assert rotation.abs().max() == pytest.approx(size**-0.5)
    assert (rotation != 0).sum(dim=1).eq(size).all()


def test_a_channel_that_stands_out_is_spread_before_it_is_rounded(emulation, monkeypatch):
    query, key, value = draw(400, 128)
    query[..., 3] *= 30
    key[..., 3] /= 30  # scores as before; query's other channels would be lost below its scale
    wanted = exact(query, key, value)
    rotated = relative_error(emulation.emulated_attention(query, key, value), wanted)
    monkeypatch.setattr(emulation, "rotate", lambda x, width, keys: x)
    plain = relative_error(emulation.emulated_attention(query, key, value), wanted)
    assert 2 * rotated < plain


def test_tokens_share_scales_as_in_the_packages_buffers(emulation):
    """32 scales for 128 queries, 64 at width 256; four for a tile of keys."""
    assert emulation.query_groups(128, 8).unique().numel() == 32
    assert emulation.query_groups(128, 16).unique().numel() == 64
    assert emulation.query_groups(40, 8)[[0, 8, 16, 24, 1, 32]].tolist() == [0, 0, 0, 0, 1, 8]
    for tile in (64, 128):
        assert emulation.key_groups(256, tile).unique(return_counts=True)[1].tolist() == [tile // 4] * (256 // tile * 4)
    assert emulation.key_groups(128, 64)[[0, 1, 8, 9, 2, 6, 64]].tolist() == [0, 0, 0, 0, 1, 3, 4]


def test_a_large_token_takes_precision_from_those_of_its_scale_alone(emulation):
    """Each value at most half a step of its own group's scale away."""
    x = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, 5] *= 1000
    groups = emulation.query_groups(64, 8)
    off = (emulation.round_to_scale(x, groups, 127) - x).abs().amax(dim=(0, 1, 3))
    for group in groups.unique():
        assert off[groups == group].max() <= x[:, :, groups == group].abs().max() / 127 / 2 * 1.001
    assert off[13] > 20 * off[12] and groups[13] == groups[5]


@pytest.mark.parametrize(("score", "kept"), [(7.0, False), (5.0, True)])
def test_weights_below_half_a_level_of_the_largest_are_lost(emulation, score, kept):
    """exp(-7) = .0009, exp(-5) = .0067; half a level is .00196. The sum of weights holds the lost ones too."""
    query, key, value = torch.zeros(1, 300, 1, 64), torch.zeros(1, 300, 1, 64), torch.ones(1, 300, 1, 64)
    query[..., 0] = key[:, 0, :, 0] = (score * 8) ** 0.5
    value[:, 0] = 0
    found, wanted = emulation.emulated_attention(query, key, value), exact(query, key, value)
    assert wanted.min() > 0.2
    assert found.eq(0).all() if not kept else found.isclose(wanted, rtol=0.2).all()


def test_zeros_stay_zeros(emulation):
    zeros = torch.zeros(1, 300, 2, 64)
    assert emulation.emulated_attention(zeros, zeros, zeros).eq(0).all()


class Processor:
    _attention_backend = None


class Attention:
    def __init__(self):
        self.processor = Processor()


class Block:
    def __init__(self):
        self.attn1, self.attn2 = Attention(), Attention()


class Model:
    def __init__(self):
        self.blocks = [Block(), Block()]


def test_only_self_attention_is_emulated_and_only_within(emulation):
    model, before = Model(), transformer.run_attention
    read = transformer.KeyValue(*draw(300, 32)[1:])
    query = draw(300, 32)[0]
    block = model.blocks[1]
    plain = transformer.attend(block.attn1, query, read)
    with emulation.emulating(model):
        inside = transformer.attend(block.attn1, query, read)
        assert torch.equal(inside, emulation.emulated_attention(query, *read[:2]).flatten(2, 3))
        assert torch.equal(transformer.attend(block.attn2, query, read), plain)
    assert not torch.equal(inside, plain)
    assert transformer.run_attention is before
    assert torch.equal(transformer.attend(block.attn1, query, read), plain)
