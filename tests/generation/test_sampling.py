from __future__ import annotations

import math
import subprocess
import sys
from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from runner.errors import ConfigInvalid
from runner.generation.sampling import (
    SAMPLERS,
    SCHEDULES,
    DPMSolverSampler,
    EulerSampler,
    Res2sSampler,
    beta57_sigmas,
    count_evaluations,
    denoise,
    diffusers_sigmas,
    end_at_sigma_min,
    make_sampler,
    official_sigmas,
    res_2s_step,
    unipc_sigmas,
)
from runner.spec.recipes import SAMPLER_ROWS, SCHEDULE_MODIFIERS
from tests.generation.library_schedulers import beta57_indices, library_scheduler

CPU = torch.device("cpu")
COMBINATIONS = [(name, schedule) for name, row in SAMPLER_ROWS.items() for schedule in row.schedules]
OF_THE_LIBRARY = [pair for pair in COMBINATIONS if pair[0] in ("euler", "unipc")]
OFFICIAL_6 = [1, 0.9615, 0.9091, 0.8333, 0.7143, 0.5, 0]
BETA57 = {  # steps: levels of the table, shift 5, shift 8
    4: (
        [999, 719, 361, 96],
        [1, 0.92784, 0.73938, 0.34942, 0],
        [1, 0.95364, 0.81947, 0.46218, 0],
    ),
    6: (
        [999, 835, 596, 361, 168, 43],
        [1, 0.96225, 0.88105, 0.73938, 0.50418, 0.18707, 0],
        [1, 0.97607, 0.92219, 0.81947, 0.61933, 0.26911, 0],
    ),
    8: (
        [999, 889, 719, 535, 361, 211, 96, 24],
        [1, 0.97588, 0.92784, 0.85242, 0.73938, 0.57359, 0.34942, 0.11364, 0],
        [1, 0.98479, 0.95364, 0.90236, 0.81947, 0.68277, 0.46218, 0.17021, 0],
    ),
    20: (
        [999, 968, 918, 857, 790, 719, 645, 572, 499, 428, 361, 297, 238, 185, 137, 96, 62, 35, 16, 4],
        [
            1, 0.99364, 0.98268, 0.96796, 0.94981, 0.92784, 0.90123, 0.87029, 0.83333, 0.78976, 0.73938,
            0.67974, 0.61094, 0.53326, 0.44459, 0.34942, 0.2516, 0.15734, 0.07959, 0.02451, 0,
        ],
        [
            1, 0.99602, 0.9891, 0.97973, 0.96803, 0.95364, 0.93589, 0.91479, 0.88889, 0.85736, 0.81947,
            0.77252, 0.7153, 0.64639, 0.56155, 0.46218, 0.34976, 0.23003, 0.12154, 0.03865, 0,
        ],
    ),
}  # fmt: skip


def sigmas_of(sampler: str, schedule: str, steps: int, shift: float) -> np.ndarray:
    return SAMPLERS[sampler].sigmas(schedule, steps, shift)


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
def test_schedules_equal_published_sigmas(schedule, shift, expected):
    assert schedule(len(expected) - 1, shift) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("steps", BETA57)
def test_beta57_sigmas_equal_published_list(steps):
    indices, *levels = BETA57[steps]
    for shift, expected in zip((5.0, 8.0), levels, strict=True):
        sigmas = beta57_sigmas(steps, shift)
        assert sigmas == pytest.approx(expected, abs=6e-6)
        assert unshifted(sigmas, shift) * 1000 - 1 == pytest.approx([*indices, -1], abs=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 6, 9, 21, 56, 97])
def test_beta57_sigmas_are_levels_nearest_to_each_quantile(steps):
    """The kept level is the one where the area below the density is nearest to 1 - i / steps."""
    whole = math.gamma(0.5) * math.gamma(0.7) / math.gamma(1.2)

    def area(x: float) -> float:  # of x^-.5 (1 - x)^-.3 from 0 to x, where x is the square of the variable
        return quad(lambda root: 2 * (1 - root * root) ** -0.3, 0, math.sqrt(min(1, max(0, x))))[0] / whole

    wanted = []
    for i in range(steps):
        near = beta57_indices(steps)[np.argmin(abs(beta57_indices(steps) - 999 * (1 - i / steps)))]
        while area((near - 0.5) / 999) > 1 - i / steps:
            near -= 1
        while near < 999 and area((near + 0.5) / 999) < 1 - i / steps:
            near += 1
        wanted.append(near)
    found = np.rint(unshifted(beta57_sigmas(steps, 5.0)[:-1], 5.0) * 1000 - 1).astype(int)
    assert found.tolist() == sorted(set(wanted), reverse=True)


@pytest.mark.parametrize(("steps", "intervals"), [(20, 20), (96, 96), (97, 96), (100, 99), (200, 195), (300, 287)])
def test_beta57_sigmas_with_equal_neighbours_are_shorter(steps, intervals):
    sigmas = beta57_sigmas(steps, 5.0)
    assert len(sigmas) == intervals + 1 and (np.diff(sigmas) < 0).all()


def shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    return shift * levels / (1 + (shift - 1) * levels)


def unshifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return sigmas / (shift - (shift - 1) * sigmas)


def closed_form(sampler: str, schedule: str, steps: int, shift: float) -> np.ndarray:
    """float64, written down from the definitions, not from any code.

    official: n equal parts of [0, 1], shifted once. UniPC: n equal parts of [1/1000, 1], shifted once. diffusers: n
    points between the shifted ends 1 and 1/1000, all of them shifted again. beta57: levels of thousandths, shifted
    once. res_2s: 1/1000, shifted once, before the 0.
    """
    if schedule == "diffusers":
        return np.append(shifted(np.linspace(1, shifted(np.array(0.001), shift), steps), shift), 0)
    if schedule == "beta57":
        levels = np.append(shifted((beta57_indices(steps) + 1) / 1000, shift), 0)
    elif sampler == "unipc":
        return np.append(shifted(1 - 0.999 * np.arange(steps) / steps, shift), 0)
    else:
        levels = shifted(np.arange(steps, -1, -1) / steps, shift)
    return np.insert(levels, -1, shifted(np.array(0.001), shift)) if sampler == "res_2s" else levels


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 6, 20])
@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_schedules_equal_their_closed_forms(sampler, schedule, steps, shift):
    sigmas = sigmas_of(sampler, schedule, steps, shift)
    assert sigmas.dtype == np.float64 and sigmas.shape == (steps + 1 + (sampler == "res_2s"),)
    assert sigmas == pytest.approx(closed_form(sampler, schedule, steps, shift), abs=2e-6)
    assert (np.diff(sigmas) < 0).all() and sigmas[-1] == 0
    if schedule == "official" and sampler == "unipc":  # its parts end a thousandth above 0
        assert sigmas == pytest.approx(official_sigmas(steps, shift), abs=1e-3 * shift)


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0, 5.0, 8.0, 12.25])
@pytest.mark.parametrize("steps", [1, 2, 4, 6, 7, 20, 50, 99])
@pytest.mark.parametrize(("sampler", "schedule"), OF_THE_LIBRARY)
def test_schedules_equal_library_sigmas_in_every_float32_bit(sampler, schedule, steps, shift):
    scheduler = library_scheduler(sampler, schedule, shift)
    scheduler.set_timesteps(steps, device="cpu")
    sigmas = sigmas_of(sampler, schedule, steps, shift)
    if sampler == "unipc":
        sigmas[0] -= 1e-6  # the scheduler's own, before it takes the logarithm of what is left to 1
    assert np.array_equal(sigmas.astype(np.float32), scheduler.sigmas.numpy())


def test_schedules_need_no_torch():
    code = (
        "import sys; from runner.generation.sampling import SAMPLERS, SCHEDULES, count_evaluations\n"
        "own = [schedule for kind in SAMPLERS.values() for schedule in kind.own.values()]\n"
        "official = SCHEDULES['official'](6, 5.0)\n"
        "assert 'scipy' not in sys.modules, 'a heavy import'\n"
        "assert all(len(schedule(6, 5.0)) == 7 for schedule in [*SCHEDULES.values(), *own])\n"
        "assert count_evaluations('res_2s', 'beta57', 5.0, 6) == (6, 12)\n"
        "assert not {'torch', 'diffusers', 'scipy.stats'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unipc_with_official_schedule_uses_whole_timesteps():
    assert unipc_sigmas(6, 5.0) == pytest.approx(OFFICIAL_6, abs=2e-3)
    told = []
    sampler = make_sampler("unipc", "official", 5.0, 6, CPU)
    denoise(lambda x, t: (told.append(t.item()), x)[1], torch.ones(1, 1, 1, 1, 1), sampler, lambda *_: None)
    assert told == [999, 961, 909, 833, 714, 501]


@pytest.mark.parametrize(
    ("sigmas", "shift", "expected"),
    [
        ([1, 0.5, 0], 5.0, [1, 0.5, 0.00498008, 0]),  # inserted
        ([1, 0.5, 0], 8.0, [1, 0.5, 0.00794439, 0]),
        ([1, 0.5, 0.00507, 0], 5.0, [1, 0.5, 0.00507, 0]),  # near enough
        ([1, 0.5, 0.0051, 0], 5.0, [1, 0.5, 0.0051, 0.00498008, 0]),
        ([1, 0.5, 0.004, 0], 5.0, [1, 0.5, 0.00498008, 0]),  # too low: replaced
        ([1, 0.5, 0.5, 0.5, 0.2, 0], 5.0, [1, 0.5, 0.2, 0.00498008, 0]),  # repeated
        ([1, 0.5, 0.1], 5.0, [1, 0.5, 0.1]),  # does not end at 0
        ([1, 0], 5.0, [1, 0.00498008, 0]),
    ],
)
def test_end_at_sigma_min_puts_least_table_level_before_zero(sigmas, shift, expected):
    assert end_at_sigma_min(np.array(sigmas, float), shift) == pytest.approx(expected, abs=1e-7)


def test_sampler_and_schedule_tables_equal_names_in_recipe_tables():
    assert list(SAMPLERS) == list(SAMPLER_ROWS)
    assert list(SCHEDULES) == list(SCHEDULE_MODIFIERS)
    for name, row in SAMPLER_ROWS.items():
        assert set(SAMPLERS[name].own) <= set(row.schedules) <= set(SCHEDULES)


@pytest.mark.parametrize("steps", [1, 2, 57, 97])
@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_count_evaluations_equals_calls_of_sampler(sampler, schedule, steps):
    made, calls, done = make_sampler(sampler, schedule, 5.0, steps, CPU), [], []
    denoise(
        lambda x, t: (calls.append(t), x)[1],
        torch.ones(1, 1, 1, 1, 1),
        made,
        lambda i, _: done.append((made.evaluations_done(i), len(calls))),
    )
    assert all(promised == counted for promised, counted in done)
    assert count_evaluations(sampler, schedule, 5.0, steps) == (len(done), len(calls)) == (made.steps, done[-1][0])
    assert all(t.dtype == torch.float32 and t.shape == () for t in calls) or sampler == "unipc"


@pytest.mark.parametrize(
    ("sampler", "schedule", "steps", "cost"),
    [
        ("euler", "beta57", 6, (6, 6)),
        ("unipc", "beta57", 100, (99, 99)),
        ("res_2s", "official", 6, (6, 12)),
        ("res_2s", "beta57", 6, (6, 12)),
        ("res_2s", "beta57", 56, (56, 112)),
        ("res_2s", "beta57", 57, (56, 112)),  # its own list ends in the table's least level: no call for that one
        ("res_2s", "beta57", 100, (98, 196)),
    ],
)
def test_count_evaluations_returns_steps_and_calls(sampler, schedule, steps, cost):
    assert count_evaluations(sampler, schedule, 5.0, steps) == cost


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [("dpm", "official"), ("euler", "karras"), ("unipc", "diffusers"), ("res_2s", "diffusers"), ("dpmpp", "diffusers")],
)
def test_make_sampler_with_unknown_combination_is_refused(sampler, schedule):
    said = (
        r"euler \(official, diffusers, beta57\), unipc \(official, beta57\), dpmpp \(official, beta57\), "
        r"res_2s \(official, beta57\)"
    )
    with pytest.raises(ConfigInvalid, match=said):
        make_sampler(sampler, schedule, 5.0, 4, CPU)
    with pytest.raises(ConfigInvalid, match=said):
        count_evaluations(sampler, schedule, 5.0, 4)


@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_denoise_of_constant_flow_ends_at_data(sampler, schedule, steps):
    """For data x and noise e, the flow e - x is constant: any correct sampler ends at x, whatever its schedule."""
    made = make_sampler(sampler, schedule, 5.0, steps, CPU)
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(1, 4, 2, 3, 3, generator=generator) for _ in range(2))
    first = 1 - 1e-6 if sampler == "unipc" else 1.0
    start = (1 - first) * data + first * noise
    latents = denoise(lambda x, t: noise - data, start, made, lambda *_: None)
    assert torch.isfinite(latents).all()
    assert latents.numpy() == pytest.approx(data.numpy(), abs=1e-4)


# Data that are normal with this mean and deviation: everything about their flow is known.
MEAN, DEVIATION, START = 0.5, 0.3, 1.25


def cleaned(x, sigma):
    """What a perfect model predicts as clean, of x at this level."""
    spread = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    return MEAN + (1 - sigma) * DEVIATION**2 / spread * (x - (1 - sigma) * MEAN)


def exact(sigma: float) -> float:
    """Where the flow that begins at START is at this level; .875 at its end."""
    return (1 - sigma) * MEAN + math.hypot((1 - sigma) * DEVIATION, sigma) * START


def levels_called(sampler: str, sigmas: np.ndarray) -> list[float]:
    """At what levels the model is to be called, float64."""
    if sampler != "res_2s":
        return sigmas[:-1].tolist()
    ends = sigmas[:-1] if sigmas[-1] == 0 else sigmas
    return [level for pair in pairwise(ends) for level in (pair[0], math.sqrt(math.prod(pair)))]


def end_of_toy(sampler: str, sigmas: np.ndarray, seen: list[float] | None = None) -> float:
    """Where a sampler ends that starts at START, in float64 as far as it goes."""
    levels = iter(levels_called(sampler, sigmas))

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = next(levels)
        rounding = 1.0 if sampler == "unipc" else 1e-4  # UniPC gives whole timesteps
        assert timestep.item() == pytest.approx(sigma * 1000, abs=rounding)
        return (x - cleaned(x, sigma)) / sigma

    made = SAMPLERS[sampler].make(sigmas, CPU)
    start = torch.full((1, 1, 1, 1, 1), START, dtype=torch.float64)
    end = denoise(predict, start, made, lambda i, x: seen.append(x.item()) if seen is not None else None)
    assert next(levels, None) is None
    return end.item()


@pytest.mark.parametrize(
    ("shift", "steps", "res_2s", "euler", "euler_of_twice"),
    [
        (5, 4, 0.74814403, 0.66753153, 0.75932158),
        (5, 6, 0.82399098, 0.73593629, 0.79274142),
        (5, 8, 0.85177755, 0.75932158, 0.81077168),
        (5, 20, 0.87146144, 0.82318249, 0.84802933),
        (8, 4, 0.72697393, 0.61895309, 0.74351020),
        (8, 6, 0.79382493, 0.70610682, 0.77718189),
        (8, 8, 0.83616844, 0.74351020, 0.79813952),
        (8, 20, 0.86943298, 0.81275963, 0.84240536),
    ],
)
def test_res_2s_end_equals_original_code(shift, steps, res_2s, euler, euler_of_twice):
    """Values are from RES4LYF's code with its noise set to 0, to the last digit; Euler's are from its formula."""
    digits = 6e-9
    assert end_of_toy("res_2s", sigmas_of("res_2s", "beta57", steps, shift)) == pytest.approx(res_2s, abs=digits)
    # The samplers below calculate with float32 levels, hence the last digits.
    assert end_of_toy("euler", sigmas_of("euler", "beta57", steps, shift)) == pytest.approx(euler, abs=3e-7)
    assert end_of_toy("euler", sigmas_of("euler", "beta57", 2 * steps, shift)) == pytest.approx(
        euler_of_twice, abs=3e-7
    )


def test_res_2s_step_on_given_list_equals_original_code():
    sigmas = np.array([1, 0.75, 0.5, 0.25, 0.001, 0])
    expected = [  # h, a21, b1, b2, the middle
        (0.287682, 0.46570367, -0.04160931, 0.91062418, 0.86602540),
        (0.405465, 0.45257512, -0.05540392, 0.87750508, 0.61237244),
        (0.693147, 0.42255559, -0.08267358, 0.80402110, 0.35355339),
        (5.521461, 0.16965699, -0.11649560, 0.29688264, 0.01581139),
    ]
    for ends, (h, a21, b1, b2, middle) in zip(pairwise(sigmas), expected, strict=False):
        step = res_2s_step(*ends)
        assert step.h == pytest.approx(h, abs=6e-7)
        assert (step.a21, step.b1, step.b2, step.middle) == pytest.approx((a21, b1, b2, middle), abs=6e-9)
    seen: list[float] = []
    end_of_toy("res_2s", sigmas, seen)
    # The last step goes on to 0: .77270249 at sigma .001 is on the straight line between its ends.
    at_sigma_min = seen[-1] + (seen[-2] - seen[-1]) * 0.001 / 0.25
    assert [*seen[:-1], at_sigma_min, seen[-1]] == pytest.approx(
        [1.06704948, 0.90198736, 0.79303900, 0.77270249, 0.77262082], abs=6e-9
    )


@pytest.mark.parametrize("h", [1e-7, 1e-4, 9.99e-3, 1e-2, 0.3, 6.0])
def test_res_2s_step_coefficients_equal_60_digit_values(h):
    """Compared with 60 digits. The closed form of b2 has lost all digits at h = 1e-7."""
    following = 1.0
    step = res_2s_step(following * math.exp(h), following)
    with localcontext() as context:
        context.prec = 60
        z = Decimal(step.h)
        decay, half = (-z).exp(), (-z / 2).exp()
        a21, b2 = (1 - half) / z, 2 * (decay - 1 + z) / z**2
        b1 = (1 - decay) / z - b2
    assert step.a21 == pytest.approx(float(a21), rel=1e-14)
    assert step.b2 == pytest.approx(float(b2), rel=1e-12)
    assert step.b1 == pytest.approx(float(b1), abs=1e-12)


def test_res_2s_with_half_step_quarters_error():
    """Equal steps from 1 to 0.1: half the step size gives a quarter of the error, and half the error for Euler."""
    counts = (8, 16, 32, 64, 128)
    errors = {
        name: [abs(end_of_toy(name, np.linspace(1, 0.1, n + 1)) - exact(0.1)) for n in counts]
        for name in ("res_2s", "euler")
    }
    assert errors["res_2s"] == pytest.approx([2.5e-3, 6.3e-4, 1.6e-4, 3.9e-5, 9.6e-6], rel=0.03)
    assert (errors["euler"][0], errors["euler"][-1]) == pytest.approx((4.9e-2, 3.3e-3), rel=0.02)
    orders = -np.diff(np.log2(errors["res_2s"]))
    assert orders == pytest.approx(np.full(4, 2.0), abs=0.03)


def test_res_2s_on_list_without_zero_keeps_list_and_float32_latents():
    called = []
    sampler = Res2sSampler(np.array([1.0, 0.5, 0.25]), CPU)
    latents = denoise(
        lambda x, t: (called.append((x.dtype, t.item())), x)[1], torch.ones(1, 2, 1, 1, 1), sampler, lambda *_: None
    )
    assert latents.dtype == torch.float32
    assert called == [
        (torch.float32, pytest.approx(level)) for level in (1000, 1000 * 0.5**0.5, 500, 1000 * 0.125**0.5)
    ]


@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_sampler_with_more_steps_ends_nearer_to_exact_solution(sampler, schedule):
    """In the limit, each sampler solves the flow, on every schedule that it accepts."""
    steps = (5, 10, 20, 40, 80)
    errors = [abs(end_of_toy(sampler, sigmas_of(sampler, schedule, n, 5.0)) - exact(0)) for n in steps]
    assert exact(0) == pytest.approx(0.875)
    bounds = {"euler": 0.07, "unipc": 0.01, "dpmpp": 0.01, "res_2s": 0.01}
    assert errors[-1] < bounds[sampler], errors
    assert errors[-1] < errors[2] < errors[0], errors


def multistep_closed_form(sigmas: np.ndarray, velocities: np.ndarray, start: np.ndarray) -> np.ndarray:
    """DPM-Solver++(2M) as its paper has it, for alpha = 1 - sigma; the first and last steps of first order. float64."""
    with np.errstate(divide="ignore"):
        halves = np.log(1 - sigmas) - np.log(sigmas)  # half the log of the signal-to-noise ratio
    x, before = start, None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = x - sigma * velocities[i]
        extrapolated = clean
        if before is not None and following > 0:
            ratio = (halves[i] - halves[i - 1]) / (halves[i + 1] - halves[i])
            extrapolated = clean + (clean - before) / (2 * ratio)
        x = following / sigma * x + (1 - following / sigma) * extrapolated
        before = clean
    return x


@pytest.mark.parametrize("shift", [3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@pytest.mark.parametrize("schedule", SAMPLER_ROWS["dpmpp"].schedules)
def test_dpmpp_equals_its_closed_form(schedule, steps, shift):
    """Schedules that begin at sigma 1, where the logarithm is infinite, are included."""
    sigmas = sigmas_of("dpmpp", schedule, steps, shift)
    made = make_sampler("dpmpp", schedule, shift, steps, CPU)
    random = np.random.default_rng(steps)
    start, *velocities = random.normal(size=(steps + 1, 1, 4, 2, 3, 3))
    calls = iter(velocities)
    found = denoise(
        lambda x, t: torch.from_numpy(next(calls)).float(), torch.from_numpy(start).float(), made, lambda *_: None
    )
    assert found.numpy() == pytest.approx(multistep_closed_form(sigmas, np.array(velocities), start), abs=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_dpmpp_on_library_schedule_equals_library_steps(steps):
    """On the library's own schedule, which begins below 1, bit for bit."""
    scheduler = library_scheduler("dpmpp", shift=5.0)
    scheduler.set_timesteps(steps, device="cpu")
    made = DPMSolverSampler(scheduler.sigmas.double().numpy(), CPU)
    generator = torch.Generator().manual_seed(steps)
    mine = other = torch.randn(1, 4, 2, 3, 3, generator=generator)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(mine.shape, generator=generator)
        mine = made.step(lambda _, t, v=velocity: v, mine, i)
        other = scheduler.step(velocity, timestep, other, return_dict=False)[0]
        assert torch.equal(mine, other), i
    assert torch.isfinite(mine).all()


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 6, 20])
@pytest.mark.parametrize(("sampler", "schedule"), OF_THE_LIBRARY)
def test_sampler_steps_equal_library_steps_bit_for_bit(sampler, schedule, steps, shift):
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


def test_unipc_with_two_equal_timesteps_begins_at_first_level():
    """The library searches for the first timestep, takes the second of two equal ones and runs past the end."""
    sampler = make_sampler("unipc", "official", 50.0, 100, CPU)
    told = []
    latents = denoise(lambda x, t: (told.append(t.item()), x)[1], torch.ones(1, 1, 1, 1, 1), sampler, lambda *_: None)
    assert told[0] == told[1] == 999 and len(told) == 100
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("shift", [0.01, 100.0])
@pytest.mark.parametrize(("sampler", "schedule"), COMBINATIONS)
def test_denoise_with_least_and_greatest_shift_stays_finite(sampler, schedule, shift, steps):
    made = make_sampler(sampler, schedule, shift, steps, CPU)
    generator = torch.Generator().manual_seed(steps)
    start = torch.randn(1, 4, 2, 3, 3, generator=generator)
    assert torch.isfinite(denoise(lambda x, t: x, start, made, lambda *_: None)).all()


def test_denoise_calls_on_step_each_step_and_stops_if_on_step_raises():
    seen = []

    def on_step(i, latents):
        seen.append((i, latents.item()))
        if i == 1:
            raise KeyError("enough")

    sampler = EulerSampler(official_sigmas(4, 1.0), CPU)
    with pytest.raises(KeyError, match="enough"):
        denoise(lambda x, t: torch.ones_like(x), torch.ones(()), sampler, on_step)
    assert seen == [(0, 0.75), (1, 0.5)]
