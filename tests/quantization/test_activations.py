"""Channel moments and samples of rows against numpy; watching leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from runner.quantization.activations import ChannelMoments, InputSamples, watching


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def test_the_mean_square_of_each_channel_over_all_that_was_seen():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=shape) for shape in ((2, 5000, 8), (3, 8), (8,))]  # one longer than a step of summing
    moments = ChannelMoments()
    for batch in batches:
        moments.see("layer", torch.from_numpy(batch).float())
    rows = np.concatenate([batch.reshape(-1, 8) for batch in batches]).astype(np.float32).astype(np.float64)
    found = moments.means()["layer"]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (rows**2).mean(0), rtol=1e-6)


def test_sums_hold_more_than_bfloat16_and_float32_could():
    """A thousand ones beside one that is 1e4: bfloat16 has no square of it, float32 no sum of such squares and ones."""
    moments = ChannelMoments()
    x = torch.ones(1001, 1, dtype=torch.bfloat16)
    x[0] = 9984.0
    moments.see("layer", x)
    assert moments.means()["layer"].item() == pytest.approx((9984.0**2 + 1000) / 1001, rel=1e-7)


def test_every_linear_is_seen_and_no_hook_stays():
    model, x = Small(), torch.randn(5, 8)
    plain = model(x)
    with watching(model, ChannelMoments()) as moments:
        assert torch.equal(model(x), plain)
    means = moments.means()
    assert set(means) == {"first", "second"}
    torch.testing.assert_close(means["first"], x.square().mean(0))
    torch.testing.assert_close(means["second"], model.norm(model.first(x)).square().mean(0).detach())
    model(x * 10)
    assert torch.equal(moments.means()["first"], means["first"])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_job_that_fails_leaves_no_hook_either():
    model = Small()
    with pytest.raises(RuntimeError), watching(model, ChannelMoments()):
        model(torch.randn(5, 9))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_spans_and_squares_are_over_all_and_rows_are_some_of_them():
    batches = [torch.randn(2, 300, 8), torch.randn(1000, 8) * 3, torch.randn(8)]
    samples = InputSamples(rows=64)
    for batch in batches:
        samples.see("layer", batch)
    everything = torch.cat([batch.reshape(-1, 8) for batch in batches])
    found = samples.inputs()["layer"]
    assert torch.equal(found.spans, everything.abs().amax(0))
    torch.testing.assert_close(found.squares, everything.square().mean(0))
    assert found.rows.shape == (64, 8) and found.rows.dtype == torch.bfloat16
    whole = {tuple(row) for row in everything.bfloat16().tolist()}
    assert (
        len({tuple(row) for row in found.rows.tolist()}) == 64 and {tuple(row) for row in found.rows.tolist()} <= whole
    )


def test_fewer_rows_than_are_kept_are_all_kept():
    samples = InputSamples(rows=64)
    for step in range(3):
        samples.see("embedder", torch.full((1, 4), float(step)))
    assert sorted(samples.inputs()["embedder"].rows[:, 0].tolist()) == [0, 1, 2]


def test_rows_are_drawn_evenly_over_all_steps():
    samples = InputSamples(rows=600)
    for step in range(6):
        samples.see("layer", torch.full((1, 2000, 1), float(step)))
    counts = torch.bincount(samples.inputs()["layer"].rows[:, 0].long(), minlength=6)
    assert bool((counts > 60).all()) and bool((counts < 140).all()), counts  # 100 each; five deviations are 46


def test_what_is_drawn_depends_on_the_layer_s_name_and_on_no_random_state():
    x = torch.arange(500.0).view(500, 1)

    def drawn(*layers: str) -> dict[str, torch.Tensor]:
        samples = InputSamples(rows=8)
        for layer in layers:
            for part in x.split(100):
                samples.see(layer, part)
        return {layer: seen.rows for layer, seen in samples.inputs().items()}

    torch.manual_seed(1)
    first = drawn("a", "b")
    torch.manual_seed(2)
    second = drawn("b", "a")
    assert torch.equal(first["a"], second["a"]) and torch.equal(first["b"], second["b"])
    assert not torch.equal(first["a"], first["b"])
