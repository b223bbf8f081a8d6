from __future__ import annotations

import numpy as np
import pytest
import torch

from runner.errors import ConfigInvalid
from runner.generation.sampling import make_scheduler, official_sigmas

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


def shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    return shift * levels / (1 + (shift - 1) * levels)


def closed_form(scheduler: str, grid: str, steps: int, shift: float) -> np.ndarray:
    """float64 [steps + 1], written down from the definitions, not from any code.

    official: n equal parts of [0, 1], shifted once. UniPC: n equal parts of [1/1000, 1], shifted once, the first a
    millionth less, because it takes the logarithm of what is left to 1. diffusers: n points between the shifted ends 1
    and 1/1000, all of them shifted again.
    """
    if scheduler == "unipc":
        return np.append(shifted(1 - 0.999 * np.arange(steps) / steps, shift), 0) - 1e-6 * (np.arange(steps + 1) == 0)
    if grid == "diffusers":
        return np.append(shifted(np.linspace(1, shifted(np.array(0.001), shift), steps), shift), 0)
    return shifted(np.arange(steps, -1, -1) / steps, shift)


COMBINATIONS = [("euler", "official"), ("euler", "diffusers"), ("unipc", "official")]


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [4, 6, 20])
@pytest.mark.parametrize(("scheduler", "grid"), COMBINATIONS)
def test_every_combination_walks_its_closed_form(scheduler, grid, steps, shift):
    made = make_scheduler(scheduler, grid=grid, shift=shift)
    sigmas = levels(made, steps)
    expected = closed_form(scheduler, grid, steps, shift)
    assert sigmas == pytest.approx(expected, abs=2e-6)
    assert len(made.timesteps) == steps
    assert (np.diff(sigmas) < 0).all() and sigmas[-1] == 0
    # UniPC tells the model whole numbers, cut off.
    told = np.floor(expected[:-1] * 1000) if scheduler == "unipc" else expected[:-1] * 1000
    assert made.timesteps.numpy() == pytest.approx(told, abs=2e-3)
    if grid == "official":  # UniPC's parts end a thousandth above 0
        assert expected == pytest.approx(official_sigmas(steps, shift), abs=1e-3 * shift)


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [4, 6, 20])
@pytest.mark.parametrize(("scheduler", "grid"), COMBINATIONS)
def test_every_combination_steps_as_the_librarys_own(scheduler, grid, steps, shift):
    """The same flows give the same latents, bit for bit, step for step; told the official levels where it has none."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    ours = make_scheduler(scheduler, grid=grid, shift=shift)
    ours.set_timesteps(steps, device="cpu")
    if scheduler == "unipc":
        theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        theirs.set_timesteps(steps, device="cpu")
    else:
        theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
        even = {"sigmas": [1 - i / steps for i in range(steps)]} if grid == "official" else {}
        theirs.set_timesteps(**({"num_inference_steps": steps} | even), device="cpu")
    generator = torch.Generator().manual_seed(steps)
    latents = torch.randn(1, 4, 2, 3, 3, generator=generator)
    mine, other = latents, latents.clone()
    for a, b in zip(ours.timesteps, theirs.timesteps, strict=True):
        flow = torch.randn(latents.shape, generator=generator)
        mine = ours.step(flow, a, mine, return_dict=False)[0]
        other = theirs.step(flow, b, other, return_dict=False)[0]
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-6) if grid == "official" else torch.equal(mine, other)
    assert torch.isfinite(mine).all()
