from __future__ import annotations

from dataclasses import replace

import pytest

from runner.forecast.flops import PRODUCTION
from runner.forecast.seconds import DEVICES, Build, find_device, forecast_seconds

CLIP = {"size": (832, 480), "segment_frames": 81, "segments": 1, "evaluations": 6}
SEED = Build(stepwise=True, fused=False, shared=False, blank_again=True)


def forecast(name, build, **changes):
    return forecast_seconds(PRODUCTION, find_device(name), build, **{**CLIP, **changes})


def test_the_seed_on_its_own_gpu():
    """Measured there: 272 s at 20 steps and 113 s at 6, hence 11.4 s a step."""
    assert forecast("RTX 5090", SEED).step_s == pytest.approx((272 - 113) / 14, rel=0.12)
    assert forecast("RTX 5090", SEED).total_s < 113  # loading, moving and encoding text are not in it


def test_parts_by_hand():
    """34,320 tokens: 852.6 TFLOP in products, of which 32 hardly depend on tokens; 964.9 in self-attention."""
    found = forecast("RTX 5090", Build())
    assert found.step["attention"] == pytest.approx(964.9 / 214, rel=1e-3)
    assert found.step["products"] == pytest.approx(852.6 / 240, rel=0.03)
    assert found.step["elementwise"] == pytest.approx(340 / 1509, rel=0.01)
    assert forecast("RTX 5090", SEED).step["elementwise"] == pytest.approx(40 * 66 / 1509, rel=0.01)
    assert found.step["dequantise"] == pytest.approx(44 / 1509, rel=0.3)  # 44 GB for all weights, 27 % of them kept
    assert found.fixed["decode"] == pytest.approx(275.4 / 240 / 0.16, rel=0.01)
    assert found.fixed["encode"] == pytest.approx((163.8 + 2.7) / 240 / 0.16, rel=0.01)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_each_optimisation_saves_and_none_beats_the_hardware(device):
    builds = [
        SEED,
        replace(SEED, stepwise=False),
        replace(SEED, stepwise=False, shared=True),
        replace(SEED, stepwise=False, shared=True, fused=True),
        Build(),
        Build(vae="bfloat16"),
        Build(vae="bfloat16 compiled"),
        Build(vae="bfloat16 compiled", attention_8bit=True),
    ]
    builds += [replace(builds[-1], compute=compute) for compute in ("fp8", "nvfp4") if compute in device.matmul]
    seconds = [forecast(device.name, build).total_s for build in builds]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == len(seconds)
    assert seconds[-1] > 6 * 1839 / (2 * max(device.matmul.values()))


def test_windows_steps_and_guidance_multiply():
    one = forecast("H200", Build(blank_again=True))
    two = forecast("H200", Build(blank_again=True), segments=2, evaluations=4)
    assert (one.evaluations, two.evaluations, one.step_s) == (6, 8, two.step_s)
    assert two.fixed["decode"] == pytest.approx(2 * one.fixed["decode"])
    guided = forecast("H200", Build(blank_again=True), guided=True)
    assert guided.step_s == pytest.approx(2 * one.step_s)
    assert guided.total_s < 2 * one.total_s


def test_a_compute_that_is_not_there():
    with pytest.raises(ValueError, match="A100 has no fp8; it has bf16, int8"):
        forecast("A100", Build(compute="fp8"))
    with pytest.raises(ValueError, match="one of float32"):
        Build(vae="bf16")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("rtx 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_names_as_drivers_and_people_write_them(name, found):
    assert find_device(name).name == found


@pytest.mark.parametrize("name", [None, "", "Tesla T4", "AMD Instinct MI300X", "NVIDIA GeForce RTX 5090 Laptop GPU"])
def test_unknown_devices_have_no_forecast(name):
    assert find_device(name) is None
