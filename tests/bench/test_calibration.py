"""Calibration: pairs are rendered as they are named, and the limits follow from the values."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from tests.bench.run_bench import ROOT, run_bench
from tests.system_tests import system_test


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("calibration")


def row(pair: str, must: str, *psnr: float, **others: Any) -> dict[str, Any]:
    """One pair; a job for each PSNR, whose other values are far from any limit unless `others` says them."""
    far = {"pass": (0.99, 5, 0.0, 0.1), "fail": (0.98, 6, 0.05, 0.2)}[must]
    values = dict(zip(("SSIM", "largest difference", "joint drift", "colour"), far, strict=True)) | others
    return {"pair": pair, "must": must, "jobs": {f"job{i}": {"PSNR": value, **values} for i, value in enumerate(psnr)}}


def test_the_worst_of_a_passing_pair_stands_against_the_best_of_a_failing_one(bench):
    rows = [row("crf", "pass", 45, 40), row("threads", "pass", 60, 50), row("seed", "fail", 20, 34)]
    found = bench.judge(rows)["PSNR"]
    assert found["worst passing"] == {"pair": "crf", "job": "job1", "value": 40}
    assert found["extremes"] == {"crf": 40, "threads": 50, "seed": 34}
    assert found["gaps"] == {"seed": 6}
    assert (found["tells apart"], found["limit"]) == (["seed"], 37.0)
    assert bench.caught(rows, bench.judge(rows)) == {"crf": [], "threads": [], "seed": ["job0", "job1"]}


@pytest.mark.parametrize(("failing", "limit"), [(37.0, 38.5), (37.1, None), (41.0, None)])
def test_a_gap_of_less_than_three_db_makes_no_limit(bench, failing, limit):
    found = bench.judge([row("crf", "pass", 40), row("seed", "fail", failing)])["PSNR"]
    assert found["limit"] == limit
    assert found["tells apart"] == ([] if limit is None else ["seed"])


def test_a_pair_that_is_no_gate_does_not_move_the_limit(bench):
    rows = [row("crf", "pass", 40), row("steps", "fail", 39), row("seed", "fail", 30), row("dance", "fail", 10)]
    found = bench.judge(rows)["PSNR"]
    assert (found["tells apart"], found["limit"]) == (["dance", "seed"], 35.0)
    assert bench.caught(rows, bench.judge(rows)) == {"crf": [], "steps": [], "seed": ["job0"], "dance": ["job0"]}


def test_each_metric_has_its_own_gap(bench):
    far = {"SSIM": 0.6, "largest difference": 40, "joint drift": 1.0, "colour": 9.0}
    passing = row("crf", "pass", 40, SSIM=0.9, **{"joint drift": 0.06})
    found = bench.judge([passing, row("seed", "fail", 40, **far)])
    limits = {name: judged["limit"] for name, judged in found.items()}
    assert limits == {"PSNR": None, "SSIM": 0.75, "largest difference": 22, "joint drift": 0.53, "colour": None}
    assert found["SSIM"]["gaps"] == {"seed": pytest.approx(4)}
    assert found["largest difference"]["gaps"] == {"seed": 8}
    near = {"SSIM": 0.81, "largest difference": 9, "joint drift": 0.11}
    found = bench.judge([passing, row("seed", "fail", 40, **near)])
    assert {judged["limit"] for judged in found.values()} == {None}


def test_a_job_without_joints_has_no_drift_at_them(bench):
    rows = [row("crf", "pass", 40, **{"joint drift": None}), row("seed", "fail", 20, **{"joint drift": None})]
    found = bench.judge(rows)
    assert "joint drift" not in found
    assert bench.caught(rows, found)["seed"] == ["job0"]


def test_a_render_differs_from_the_plain_one_in_what_its_name_says(bench, tmp_path):
    jobs = bench.demo_jobs(tmp_path)
    plain = bench.Render("plain").manifest(jobs)
    for pair in bench.PAIRS:
        made = pair.new.manifest(jobs)
        assert [entry["id"] for entry in made["jobs"]] == [entry["id"] for entry in plain["jobs"]]
        changed = set()
        for old, new in zip(plain["jobs"], made["jobs"], strict=True):
            changed |= {key for key in ("reference", "video") if old[key] != new[key]}
            changed |= {
                key
                for key in old["options"].keys() | new["options"].keys()
                if old["options"].get(key) != new["options"].get(key)
            }
        expected = {"seed": "seed", "steps": "steps", "reference": "reference", "dance": "video", "crf-16": "output"}
        assert changed == ({expected[pair.new.name]} if pair.new.name in expected else set()), pair.name
        assert (made["recipe"] != pair.baseline.recipe) == (pair.new.name in ("bf16-vae", "fp4"))
        assert (pair.new.environment != pair.baseline.environment) == (pair.new.name in ("one-thread", "avx2"))
    assert [pair.new.name for pair in bench.NIGHTLY_PAIRS] == [
        "one-thread",
        "avx2",
        "bf16-vae",
        "crf-16",
        "seed",
        "steps",
    ]


def test_the_nightly_jobs_are_those_of_the_manifest(bench):
    from runner.spec.manifest import load_manifest, parse_manifest

    listed = load_manifest(str(ROOT / "manifests" / "nightly.yaml")).jobs
    made = bench.json.dumps(bench.Render("plain").manifest(bench.nightly_jobs()))
    again = parse_manifest(made, base="/", source="m.json").jobs
    for old, new in zip(listed, again, strict=True):
        for name in ("id", "reference", "video", "mask", "prompt", "options"):
            assert getattr(new, name) == getattr(old, name), (old.id, name)


@system_test
def test_calibration(tmp_path, demo_media):
    """One short job: another crf passes, and another dance does not."""
    models = str(tmp_path / "models")
    found, printed = run_bench("calibration", tmp_path, "--quick", "--models", models, "--media", str(demo_media))
    assert [row["pair"] for row in found["rows"]] == ["crf 16 instead of 18", "another dance"]
    assert found["caught"] == {"crf 16 instead of 18": [], "another dance": ["one-segment"]}
    psnr = found["metrics"]["PSNR"]
    assert psnr["extremes"]["another dance"] < found["limits"]["psnr_min"] < psnr["extremes"]["crf 16 instead of 18"]
    assert f"psnr_min: {found['limits']['psnr_min']:g}" in printed
