"""Channel moments against numpy; watching leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from runner.quantization.activations import ChannelMoments, watching


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
    with watching(model) as moments:
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
    with pytest.raises(RuntimeError), watching(model):
        model(torch.randn(5, 9))
    assert not any(module._forward_pre_hooks for module in model.modules())
