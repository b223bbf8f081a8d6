"""Rings of slots against convolutions that keep their inputs as the library does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.generation.wan_animate.causal_slots import CausalConvolutions, CausalLayer
from tests.generation.live_bytes import LiveBytes


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def layers(many: int, channels: int = 4, *, kernel=3, padding=1) -> list[WanCausalConv3d]:
    torch.manual_seed(many)
    return [WanCausalConv3d(channels, channels, kernel, padding=padding) for _ in range(many)]


@settings(max_examples=25, deadline=None)
@given(
    many=st.integers(1, 5),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=12),
    innermost=st.booleans(),
)
def test_any_number_of_layers_and_pictures_gives_what_a_whole_clip_gives(many, counts, innermost):
    """Long enough that every layer goes round the ring, with another number of pictures each time."""
    counts = counts * (1 + 12 // len(counts))
    convs = layers(many)
    if innermost:
        for conv in convs:
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
    clip = torch.randn(1, 4, sum(counts), 5, 6)
    wanted = clip
    for conv in convs:
        wanted = torch.tanh(conv(wanted))
    kept = CausalConvolutions(CausalLayer(conv, 0, max(counts)) for conv in convs)
    found = []
    for pictures in clip.split(counts, dim=2):
        hidden = pictures
        for conv in convs:
            hidden = torch.tanh(kept.run(conv, hidden))
        found.append(hidden)
    torch.testing.assert_close(torch.cat(found, dim=2), wanted, rtol=1e-5, atol=1e-5)


def test_norm_and_silu_go_before_the_convolution_and_a_column_of_time_has_no_padding():
    (conv,), norm = layers(1, kernel=(3, 1, 1), padding=(1, 0, 0)), WanRMS_norm(4, images=False)
    norm.gamma.data = torch.randn(4, 1, 1, 1)
    clip = torch.randn(1, 4, 6, 5, 6)
    kept = CausalConvolutions([CausalLayer(conv, 0, 2)])
    found = torch.cat([kept.run(conv, pictures, norm) for pictures in clip.split(2, dim=2)], dim=2)
    torch.testing.assert_close(found, conv(F.silu(norm(clip))))


def test_halving_is_the_librarys():
    """Every second picture's sum with the two before it; the first stands alone."""
    conv = WanCausalConv3d(4, 4, (3, 1, 1), stride=(2, 1, 1))
    clip = torch.randn(1, 4, 9, 5, 6)
    kept = CausalConvolutions([])
    first, *rest = [kept.halve(conv, pictures) for pictures in clip.split([1, 4, 2, 2], dim=2)]
    assert torch.equal(first, clip[:, :, :1])
    torch.testing.assert_close(torch.cat(rest, dim=2), conv(clip))


def test_more_pictures_than_planned_are_refused():
    (conv,) = layers(1)
    with pytest.raises(ValueError, match="2 pictures at once for a ring that was planned for 1"):
        CausalConvolutions([CausalLayer(conv, 0, 1)]).run(conv, torch.zeros(1, 4, 2, 5, 5))


def test_where_channels_are_innermost_a_window_is_one_piece_of_memory(monkeypatch):
    convs, seen = layers(3), []
    for conv in convs:
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
    kept = CausalConvolutions(CausalLayer(conv, 0, 1) for conv in convs)
    forward = torch.nn.Conv3d.forward
    monkeypatch.setattr(torch.nn.Conv3d, "forward", lambda conv, x: (seen.append(x), forward(conv, x))[1])
    for _ in range(8):
        for conv in convs:
            kept.run(conv, torch.randn(1, 4, 1, 5, 6))
    assert len(seen) == 24
    assert all(window.is_contiguous(memory_format=torch.channels_last_3d) for window in seen)


def test_layers_share_memory_two_slots_each_and_three_more():
    """Two kept inputs a layer, the new one, and two that go beyond the end."""
    shape, many = (1, 16, 1, 30, 30), 7
    with torch.device("meta"):
        convs = layers(many, 16)
        x = torch.empty(shape)
    kept = CausalConvolutions(CausalLayer(conv, 0, 1) for conv in convs)
    with LiveBytes() as live:
        for conv in convs:
            kept.run(conv, x)
    slot = 16 * 32 * 32 * 4
    assert live.now == (2 * many + 3) * slot
