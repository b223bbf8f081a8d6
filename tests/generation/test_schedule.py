from __future__ import annotations

import numpy as np
import pytest
import torch

from runner.errors import ConfigInvalid
from runner.generation.schedule import make_scheduler, official_sigmas

OFFICIAL_6 = [1, 0.9615, 0.9091, 0.8333, 0.7143, 0.5, 0]


def levels(scheduler, steps):
    scheduler.set_timesteps(steps, device="cpu")
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize(
    ("scheduler", "grid", "shift", "expected"),
    [
        ("euler", "official", 5, OFFICIAL_6),
        ("euler", "official", 5, [1, 0.9375, 0.8333, 0.625, 0]),
        ("euler", "official", 8, [1, 0.97561, 0.94118, 0.88889, 0.8, 0.61538, 0]),
        ("euler", "diffusers", 5, [1, 0.9527, 0.8832, 0.7714, 0.5616, 0.0244, 0]),
        ("euler", "diffusers", 5, [1, 0.9097, 0.7173, 0.0244, 0]),
    ],
)
def test_levels_known_from_elsewhere(scheduler, grid, shift, expected):
    sigmas = levels(make_scheduler(scheduler, grid=grid, shift=shift), len(expected) - 1)
    assert sigmas == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 6, 20])
def test_the_official_grid_is_shifted_once(steps):
    scheduler = make_scheduler("euler")
    assert levels(scheduler, steps) == pytest.approx(official_sigmas(steps, 5), abs=1e-6)
    assert scheduler.timesteps.numpy() == pytest.approx(official_sigmas(steps, 5)[:-1] * 1000, abs=1e-3)


def test_unipc_walks_the_official_grid():
    scheduler = make_scheduler("unipc", shift=5)
    sigmas = levels(scheduler, 6)
    assert sigmas == pytest.approx(OFFICIAL_6, abs=2e-3)
    assert scheduler.timesteps.tolist() == [999, 961, 909, 833, 714, 501]


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_straight_flow_is_followed_to_its_end(scheduler, steps):
    """For data x and noise e, the flow e - x is constant: any correct solver ends at x, whatever its grid."""
    solver = make_scheduler(scheduler)
    solver.set_timesteps(steps, device="cpu")
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(1, 4, 2, 3, 3, generator=generator) for _ in range(2))
    first = float(solver.sigmas[0])
    latents = (1 - first) * data + first * noise
    for timestep in solver.timesteps:
        latents = solver.step(noise - data, timestep, latents, return_dict=False)[0]
    assert torch.isfinite(latents).all()
    assert latents.numpy() == pytest.approx(data.numpy(), abs=1e-4)


def test_setting_timesteps_again_gives_the_same_grid():
    scheduler = make_scheduler("euler")
    assert np.array_equal(levels(scheduler, 6), levels(scheduler, 6))


@pytest.mark.parametrize(("scheduler", "grid"), [("dpm", "official"), ("euler", "karras"), ("unipc", "diffusers")])
def test_what_does_not_exist_is_refused(scheduler, grid):
    with pytest.raises(ConfigInvalid):
        make_scheduler(scheduler, grid=grid)
