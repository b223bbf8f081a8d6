from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from runner.errors import ConfigInvalid
from runner.generation.sampling import (
    SAMPLERS,
    SCHEDULES,
    denoise,
    diffusers_sigmas,
    make_sampler,
    official_sigmas,
    unipc_sigmas,
)
from runner.spec.recipes import SAMPLER_ROWS, SCHEDULE_NAMES, count_evaluations
from tests.generation.heun import HEUN_ROW, HeunSampler
from tests.generation.library_schedulers import library_scheduler

CPU = torch.device("cpu")
COMBINATIONS = [(name, schedule) for name, row in SAMPLER_ROWS.items() for schedule in row.schedules]
OFFICIAL_6 = [1, 0.9615, 0.9091, 0.8333, 0.7143, 0.5, 0]


def sigmas_of(sampler: str, schedule: str, steps: int, shift: float) -> np.ndarray:
    return SAMPLERS[sampler].own.get(schedule, SCHEDULES[schedule])(steps, shift)


@pytest.mark.parametrize(
    ("schedule", "shift", "expected"),
    [
        (official_sigmas, 5, OFFICIAL_6),
        (official_sigmas, 5, [1, 0.9375, 0.8333, 0.625, 0]),
        (official_sigmas, 8, [1, 0.97561, 0.94118, 0.88889, 0.8, 0.61538, 0]),
        (diffusers_sigmas, 5, [1, 0.9527, 0.8832, 0.7714, 0.5616, 0.0244, 0]),
        (diffusers_sigmas, 5, [1, 0.9097, 0.7173, 0.0244, 0]),
    ],
)
def test_levels_known_from_elsewhere(schedule, shift, expected):
    assert schedule(len(expected) - 1, shift) == pytest.approx(expected, abs=1e-4)


def shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    return shift * levels / (1 + (shift - 1) * levels)


def closed_form(sampler: str, schedule: str, steps: int, shift: float) -> np.ndarray:
    """float64 [steps + 1], written down from the definitions, not from any code.

    official: n equal parts of [0, 1], shifted once. UniPC: n equal parts of [1/1000, 1], shifted once. diffusers: n
    points between the shifted ends 1 and 1/1000, all of them shifted again.
    """
    if sampler == "unipc":
        return np.append(shifted(1 - 0.999 * np.arange(steps) / steps, shift), 0)
    if schedule == "diffusers":
        return np.append(shifted(np.linspace(1, shifted(np.array(0.001), shift), steps), shift), 0)
    return shifted(np.arange(steps, -1, -1) / steps, shift)


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 6, 20])
@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_schedules_are_their_closed_forms(sampler, schedule, steps, shift):
    sigmas = sigmas_of(sampler, schedule, steps, shift)
    assert sigmas.dtype == np.float64 and sigmas.shape == (steps + 1,)
    assert sigmas == pytest.approx(closed_form(sampler, schedule, steps, shift), abs=2e-6)
    assert (np.diff(sigmas) < 0).all() and sigmas[-1] == 0
    if schedule == "official":  # UniPC's parts end a thousandth above 0
        assert sigmas == pytest.approx(official_sigmas(steps, shift), abs=1e-3 * shift)


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0, 5.0, 8.0, 12.25])
@pytest.mark.parametrize("steps", [1, 2, 4, 6, 7, 20, 50, 99])
@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_schedules_equal_the_librarys_in_every_float32_bit(sampler, schedule, steps, shift):
    scheduler = library_scheduler(sampler, schedule, shift)
    scheduler.set_timesteps(steps, device="cpu")
    sigmas = sigmas_of(sampler, schedule, steps, shift)
    if sampler == "unipc":
        sigmas[0] -= 1e-6  # the scheduler's own, before it takes the logarithm of what is left to 1
    assert np.array_equal(sigmas.astype(np.float32), scheduler.sigmas.numpy())


def test_schedules_need_no_torch():
    code = (
        "import sys; from runner.generation.sampling import SAMPLERS, SCHEDULES\n"
        "own = [schedule for kind in SAMPLERS.values() for schedule in kind.own.values()]\n"
        "assert all(len(schedule(6, 5.0)) == 7 for schedule in [*SCHEDULES.values(), *own])\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unipc_walks_the_official_schedule_in_whole_timesteps():
    assert unipc_sigmas(6, 5.0) == pytest.approx(OFFICIAL_6, abs=2e-3)
    told = []
    sampler = make_sampler("unipc", "official", 5.0, 6, CPU)
    denoise(lambda x, t: (told.append(t.item()), x)[1], torch.ones(1, 1, 1, 1, 1), sampler, lambda *_: None)
    assert told == [999, 961, 909, 833, 714, 501]


def test_the_tables_hold_the_names_that_a_recipe_may_say():
    assert list(SAMPLERS) == list(SAMPLER_ROWS)
    assert list(SCHEDULES) == list(SCHEDULE_NAMES)
    for name, row in SAMPLER_ROWS.items():
        assert set(SAMPLERS[name].own) <= set(row.schedules) <= set(SCHEDULES)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_a_plan_counts_the_evaluations_that_a_sampler_makes(sampler, schedule, steps):
    made, calls, done = make_sampler(sampler, schedule, 5.0, steps, CPU), [], []
    denoise(
        lambda x, t: (calls.append(t), x)[1],
        torch.ones(1, 1, 1, 1, 1),
        made,
        lambda i, _: done.append((made.evaluations_done(i), len(calls))),
    )
    assert all(promised == counted for promised, counted in done) and len(done) == made.steps
    assert count_evaluations(sampler, steps) == made.evaluations_done(made.steps - 1) == len(calls)


@pytest.mark.parametrize(("sampler", "schedule"), [("dpm", "official"), ("euler", "karras"), ("unipc", "diffusers")])
def test_what_does_not_exist_is_refused(sampler, schedule):
    with pytest.raises(ConfigInvalid, match=r"euler \(official, diffusers\), unipc \(official\)"):
        make_sampler(sampler, schedule, 5.0, 4, CPU)


@pytest.mark.parametrize(("sampler", "schedule"), [*COMBINATIONS, ("heun", "official")])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_straight_flow_is_followed_to_its_end(sampler, schedule, steps):
    """For data x and noise e, the flow e - x is constant: any correct sampler ends at x, whatever its schedule."""
    made = HeunSampler(official_sigmas(steps, 5.0), CPU)
    if sampler != "heun":
        made = make_sampler(sampler, schedule, 5.0, steps, CPU)
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(1, 4, 2, 3, 3, generator=generator) for _ in range(2))
    first = 1 - 1e-6 if sampler == "unipc" else 1.0
    start = (1 - first) * data + first * noise
    latents = denoise(lambda x, t: noise - data, start, made, lambda *_: None)
    assert torch.isfinite(latents).all()
    assert latents.numpy() == pytest.approx(data.numpy(), abs=1e-4)


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 6, 20])
@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_every_combination_steps_as_the_librarys_own(sampler, schedule, steps, shift):
    """The same velocities give the same latents and the same timesteps, bit for bit, step for step."""
    scheduler = library_scheduler(sampler, schedule, shift)
    scheduler.set_timesteps(steps, device="cpu")
    made = make_sampler(sampler, schedule, shift, steps, CPU)
    generator = torch.Generator().manual_seed(steps)
    latents = torch.randn(1, 4, 2, 3, 3, generator=generator)
    velocities = [torch.randn(latents.shape, generator=generator) for _ in range(steps)]
    mine, other, told = latents, latents.clone(), []
    for i, timestep in enumerate(scheduler.timesteps):
        mine = made.step(lambda _, t, i=i: (told.append(t), velocities[i])[1], mine, i)
        other = scheduler.step(velocities[i], timestep, other, return_dict=False)[0]
        assert torch.equal(mine, other), i
    assert torch.isfinite(mine).all()
    assert torch.equal(torch.stack(told), scheduler.timesteps) and told[0].dtype == scheduler.timesteps.dtype


def test_unipc_begins_at_its_first_level_where_two_timesteps_are_equal():
    """The library searches for the first timestep, takes the second of two equal ones and runs past the end."""
    sampler = make_sampler("unipc", "official", 50.0, 100, CPU)
    told = []
    latents = denoise(lambda x, t: (told.append(t.item()), x)[1], torch.ones(1, 1, 1, 1, 1), sampler, lambda *_: None)
    assert told[0] == told[1] == 999 and len(told) == 100
    assert torch.isfinite(latents).all()


def test_denoise_tells_each_step_and_stops_where_the_listener_raises():
    seen = []

    def on_step(i, latents):
        seen.append((i, latents.item()))
        if i == 1:
            raise KeyError("enough")

    sampler = HeunSampler(official_sigmas(4, 1.0), CPU)
    with pytest.raises(KeyError, match="enough"):
        denoise(lambda x, t: torch.ones_like(x), torch.ones(()), sampler, on_step)
    assert seen == [(0, 0.75), (1, 0.5)]


def test_heun_counts_its_evaluations():
    for steps in (1, 2, 5):
        sampler = HeunSampler(official_sigmas(steps, 5.0), CPU)
        assert HEUN_ROW.evaluations(steps) == sampler.evaluations_done(steps - 1)
