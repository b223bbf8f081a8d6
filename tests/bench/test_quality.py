from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest

from runner.generation.sampling import count_evaluations
from runner.spec.recipes import get_recipe
from tests.bench.run_bench import ROOT, run_bench
from tests.system_tests import system_test


@pytest.fixture
def quality(monkeypatch) -> Any:
    """The benchmark as a module; what it does to the path and the environment ends with the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_quality", ROOT / "bench" / "quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_quality", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("quick", [True, False])
def test_sampler_trials_have_equal_counts_of_evaluations(quality, quick):
    exact, coarser, *trials = quality.sampler_trials(quick)
    assert (exact.sampler, exact.steps, exact.against) == ("euler", 12 if quick else 200, None)
    assert (coarser.sampler, 2 * coarser.steps) == ("euler", exact.steps)
    for trial in trials:
        sampler, schedule, calls = trial.name.split()
        cost = count_evaluations(trial.sampler, trial.schedule, quality.SHIFT, trial.steps)
        assert (sampler, schedule, int(calls)) == (trial.sampler, trial.schedule, cost.evaluations)
        assert trial.against == exact.name
    assert len({trial.name for trial in trials}) == len(trials) == 4 * 2 * (1 if quick else 4)


def test_nearest_orders_samplers_by_distance_to_exact_solution(quality):
    clip = np.full((2, 3, 4, 3), 100, np.uint8)
    assert quality.rms(clip, clip + np.uint8(3)) == pytest.approx(3.0)
    assert quality.rms(clip + np.uint8(3), clip) == pytest.approx(3.0)
    rows = {
        "euler official 4": {"rms_own": 3.0},
        "res_2s beta57 4": {"rms_own": 1.0},
        "euler official 6": {"rms_own": 2.0},
        "euler official 200": {},
    }
    assert quality.nearest(rows) == {"4": ["res_2s beta57", "euler official"], "6": ["euler official"]}


@pytest.mark.parametrize("count", [1, 2])
def test_identity_with_single_clip_compares_only_own_dancer(quality, count):
    """The true frames stand for a rendered clip: they are nearest to their own dancer. One clip alone has no pair."""
    results = [{"index": index, "frames": quality.held_out(index, 64).truth} for index in range(count)]
    found = quality.identity(results, 64)
    assert 0 <= found["own"]["mean"] <= found["own"]["worst"] < 10
    if count == 1:
        assert list(found) == ["own"]
    else:
        assert found["wrong reference"]["nearest"] > found["own"]["worst"]


@pytest.mark.parametrize("flags", [("--clips", "0"), ("--clips", "-1"), ("--workers", "0")], ids=" ".join)
def test_quality_flags_with_count_below_1_are_usage_error(quality, monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["quality.py", *flags])
    with pytest.raises(SystemExit) as ended:
        quality.main()
    assert ended.value.code == 2 and "must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [True, False])
def test_fast_trials_name_recipe_modifiers_alone_and_together(quality, quick):
    exact, *others = quality.fast_trials(quick)
    assert (exact.name, exact.recipe, exact.emulated) == ("fp4-distill", "fp4-distill", False)
    assert all(get_recipe(trial.recipe).name == trial.recipe for trial in others)
    together = [trial for trial in others if trial.together]
    assert together and all(trial.emulated and trial.recipe.count("+") == 2 for trial in together)
    assert len({(trial.recipe, trial.emulated) for trial in others}) == len(others) == (1 if quick else 7)


def test_fast_verdicts_judge_worse_product_and_name_overflow(quality):
    todo = quality.fast_trials(False)

    def result(fp8, int8):
        rows = {trial.name: {"psnr_own_inside": 50.0} for trial in todo} | {"fp16-vae": {}}
        return {"rows": rows | {"all, fp8": {"psnr_own_inside": fp8}, "all, int8": {"psnr_own_inside": int8}}}

    found = quality.fast_verdicts([result(36.0, 40.0), result(35.0, 33.0)], todo)
    assert (found["worst_together"], found["inside_db"], found["worst_clip_db"]) == ("all, fp8", 35.5, 33.0)
    assert found["reached"] and found["clips_not_finite"] == {"fp16-vae": 2}
    assert not quality.fast_verdicts([result(34.9, 40.0)], todo)["reached"]


def test_means_with_clip_without_measures_are_empty(quality):
    assert quality.means([{"psnr": 1.0}, {"psnr": 4.0}]) == {"psnr": 2.5}
    assert quality.means([{"psnr": 1.0}, {}]) == quality.means([{}, {}]) == {}


@system_test
def test_quality_benchmark_with_fast_flag_and_single_clip_measures_both_rows(tmp_path):
    flags = ("--fast", "--quick", "--clips", "1", "--models", str(tmp_path / "models"))
    found, printed = run_bench("quality", tmp_path, *flags)
    assert list(found["rows"]) == ["fp4-distill", "all, int8"] and "emulated in float" in printed
    assert found["rows"]["all, int8"]["psnr_own_inside"] == found["verdicts"]["inside_db"] > 25


@system_test
def test_quality_benchmark_with_single_clip_has_no_wrong_reference_row(tmp_path):
    found, printed = run_bench("quality", tmp_path, "--quick", "--clips", "1", "--models", str(tmp_path / "models"))
    assert (found["clips"], list(found["identity"])) == (1, ["own"])
    assert all(name in printed for name in found["rows"])


@system_test
def test_quality_benchmark_with_samplers_flag_ranks_all_samplers(tmp_path):
    """Two clips, four calls: all samplers are near the exact clip; the exact sampler with half its steps is nearer."""
    found, printed = run_bench("quality", tmp_path, "--samplers", "--quick", "--models", str(tmp_path / "models"))
    rows = found["rows"]
    trials = [name for name in rows if "rms_own" in rows[name]]
    assert len(trials) == 1 + 4 * 2 and all(name in printed for name in trials)
    for name in trials:
        assert 0 < rows[name]["rms_own"] < 30 and rows[name]["psnr"] > rows["copy the reference"]["psnr"], name
    (coarser,) = [name for name in trials if name.endswith(" 6")]
    assert rows[coarser]["rms_own"] == min(rows[name]["rms_own"] for name in trials if "official" in name)
    assert len(found["verdicts"]["nearest"]["4"]) == 8


@system_test
def test_quality_benchmark_with_quick_flag_gives_ordered_measures(tmp_path):
    """Two clips and few steps: the measures are in the expected order and the table holds every row."""
    found, printed = run_bench("quality", tmp_path, "--quick", "--models", str(tmp_path / "models"))
    rows, said = found["rows"], found["verdicts"]
    assert found["clips"] == 2
    ceiling = rows["autoencoder"]
    for name, row in rows.items():
        assert row["psnr"] <= ceiling["psnr"], name  # nothing is better than what the autoencoder can say
        assert row["psnr_inside"] < row["psnr"], name  # the dancer is the hard part
        assert -1 <= row["ssim_inside"] <= 1
        assert name in printed
    floor = rows["copy the reference"]["psnr_inside"]
    for steps, above in said["above_floor_db"].items():
        assert above == pytest.approx(rows[f"bf16 {steps} official"]["psnr_inside"] - floor)
    for column in ("psnr_own", "psnr_own_inside"):
        assert said[f"fp4_{column}"]["db"] == [rows[f"fp4 {method} 2"][column] for method in ("absmax", "mse", "nvfp4")]
    assert found["identity"]["own"]["mean"] < found["identity"]["wrong reference"]["mean"]
