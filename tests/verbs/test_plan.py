from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from runner.errors import ConfigInvalid, StorageDenied
from runner.generation.families import get_family
from runner.preprocess.prepare import Preprocessor
from runner.spec.manifest import parse_manifest
from runner.spec.recipes import get_recipe
from runner.storage import fetch_input
from runner.storage.disk_cache import DiskCache
from runner.verbs.json_objects import plan_object
from runner.verbs.plan import (
    RunForecast,
    SvdqForecast,
    choose_gpu,
    forecast_jobs,
    forecast_seconds,
    foreseen_mode,
    plan,
)
from runner.verbs.probes import Driver, Gpu, ProbeFailed, Probes
from runner.verbs.settings import PlanSettings, RunSettings
from runner.verbs.tables import print_plan
from tests.preprocess.test_poses import LARGE, SMALL, EachDisc, film
from tests.preprocess.tiny_networks import build_detector, build_pose


def machine_with(monkeypatch, *names):
    def driver(self):
        if not names:
            raise ProbeFailed("no driver")
        return Driver("580.65.06", tuple(Gpu(name, 1, 1) for name in names))

    monkeypatch.setattr(Probes, "driver", driver)


def test_choose_gpu_prefers_requested_gpu_to_local_one(monkeypatch):
    recipe = get_recipe("fp4-distill")
    machine_with(monkeypatch, "NVIDIA L40S")
    assert choose_gpu(None, recipe).name == "L40S"
    assert choose_gpu("h200", recipe).name == "H200"
    machine_with(monkeypatch, "Tesla T4")
    assert choose_gpu(None, recipe) is None
    machine_with(monkeypatch)
    assert choose_gpu(None, recipe) is None


def test_choose_gpu_refuses_requested_gpu_without_forecast():
    with pytest.raises(ConfigInvalid, match=r"GPU 'T4' is not known.*RTX 5090"):
        choose_gpu("T4", get_recipe("fp4-distill"))
    with pytest.raises(ConfigInvalid, match=r"A100 has no fp8.*bf16, int8"):
        choose_gpu("A100", get_recipe("fp4-distill+fp8"))


@pytest.fixture
def manifest(demo_media):
    jobs = [
        {"id": "here", "reference": "references/anna.png", "video": "dances/wave.mp4", "options": {"size": "832x480"}},
        {"id": "gone", "reference": "references/anna.png", "video": "dances/none.mp4"},
    ]
    return parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=str(demo_media), source="m.json")


def settings(**given):
    return PlanSettings(manifest="m.json", models=None, **given)


def test_forecast_jobs_on_known_gpu_shows_seconds(manifest, monkeypatch, capsys):
    machine_with(monkeypatch)
    (here, gone), gpu = forecast_jobs(manifest.jobs, settings(gpu="RTX 5090"), manifest)
    assert gpu == "RTX 5090" and gone.error.code == "input.not_found"
    assert (here.plan.segments, here.plan.segment_frames) == (1, 49)
    # 49 of 81 frames: more than half the products, less than half of the attention.
    assert 0.3 * 62 < here.plan.seconds < 0.6 * 62
    assert 10e9 < here.memory["resident"] < 24e9 and here.memory["stream"] < 9e9 and here.memory["minimal"] < 6e9
    print_plan([here, gone], gpu)
    printed = capsys.readouterr().out
    assert "GB resident / stream / minimal" in printed and f"/ {here.memory['stream'] / 1e9:.3g} /" in printed
    assert "s on RTX 5090" in printed and f"{here.plan.seconds:.3g}" in printed and "(forecast, without" in printed


def planned(demo_media, recipe, gpu, tmp_path, capsys):
    """What `plan` finds for one job of 48 frames, and what it prints."""
    inputs = {"reference": f"{demo_media}/references/anna.png", "video": f"{demo_media}/dances/wave.mp4"}
    manifest = {"version": 1, "jobs": [{"id": "a", **inputs, "options": {"size": "832x480"}}]}
    (tmp_path / "m.json").write_text(json.dumps(manifest | ({"recipe": recipe} if recipe else {})))
    found = plan(PlanSettings(manifest=str(tmp_path / "m.json"), models=None, gpu=gpu, cache=tmp_path))
    print_plan(found.jobs, found.gpu, found.warnings, found.fast, found.svdq)
    return found, capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["fp4-distill", None])
def test_plan_shows_seconds_of_fast_recipe(demo_media, recipe, monkeypatch, tmp_path, capsys):
    machine_with(monkeypatch, "NVIDIA GeForce RTX 5090")
    found, printed = planned(demo_media, recipe, None, tmp_path, capsys)
    asked, fast = found.fast.asked_s, found.fast.forecast_s
    assert asked == found.jobs[0].seconds and fast < 0.6 * asked
    words = "int8 products, 8-bit attention, autoencoder in 16 bits"
    assert f"fp4-fast: {asked:.3g} → {fast:.3g} s (forecast), with {words}\n" in printed
    assert plan_object(found)["fast"] == {
        "recipe": "fp4-fast", "compute": "int8", "attention": "int8", "vae_bits": 16,
        "forecast_s": fast, "asked_s": asked,
    }  # fmt: skip
    same, _ = planned(demo_media, "fp4-fast", None, tmp_path, capsys)
    assert same.jobs[0].seconds == same.fast.forecast_s == fast and same.fast.asked_s is None


def test_plan_shows_choices_of_fast_recipe(demo_media, monkeypatch, tmp_path, capsys):
    machine_with(monkeypatch)
    found, printed = planned(demo_media, "fp4-fast", "H200", tmp_path, capsys)
    words = "fp8 products, exact attention, autoencoder in 16 bits"
    assert f"fp4-fast: {found.jobs[0].seconds:.3g} s (forecast), with {words}" in printed
    chosen, _ = planned(demo_media, "fp4-distill+fp8+bf16-vae", "H200", tmp_path, capsys)
    assert (found.jobs[0].seconds, found.jobs[0].memory) == (chosen.jobs[0].seconds, chosen.jobs[0].memory)


@pytest.mark.parametrize(
    ("recipe", "gpu"), [("fp4-distill", None), ("fp4-fast", None), ("fp4-distill+fp8", "H200"), ("fp4", "H200")]
)
def test_plan_without_gpu_or_for_other_recipe_omits_fast_recipe(demo_media, recipe, gpu, monkeypatch, tmp_path, capsys):
    machine_with(monkeypatch)
    found, printed = planned(demo_media, recipe, gpu, tmp_path, capsys)
    assert found.fast is None and "fp4-fast" not in printed and plan_object(found)["fast"] is None


@pytest.mark.parametrize(
    ("word", "size", "gpus", "published"),
    [
        ("svdq-int4", "9.63", ["RTX 5090", "RTX 4090", "L40S", "A100"], {"RTX 5090"}),
        ("svdq-nvfp4", "10.2", ["RTX 5090"], set()),
    ],
)
@pytest.mark.parametrize("gpu", [None, "RTX 5090"])
def test_plan_shows_file_and_seconds_of_svdq_recipe(
    demo_media, word, size, gpus, published, gpu, monkeypatch, tmp_path, capsys
):
    machine_with(monkeypatch)
    recipe = f"fp4-distill+{word}"
    found, printed = planned(demo_media, recipe, gpu, tmp_path, capsys)
    seconds = dict(found.svdq.seconds)
    assert list(seconds) == gpus
    for name in gpus:
        assert planned(demo_media, recipe, name, tmp_path, capsys)[0].jobs[0].seconds == seconds[name]
    each = ", ".join(f"{name} {'' if name in published else '~'}{seconds[name]:.3g} s" for name in gpus)
    line = f"{word}: {size} GB of weights (forecast); forecast for all jobs: {each}; ~: the GEMM rate is an estimate\n"
    assert printed.endswith(line)
    told = plan_object(found)["svdq"]
    assert told == {
        "compute": word, "file_bytes": found.svdq.file_bytes, "file_in_store": False,
        "gpus": [
            {"gpu": name, "forecast_s": seconds[name], "rate": "published" if name in published else "estimate"}
            for name in gpus
        ],
    }  # fmt: skip
    assert json.dumps(told)


def test_svdq_forecast_sums_jobs_that_can_be_planned(demo_media, monkeypatch, tmp_path):
    machine_with(monkeypatch)
    inputs = {"reference": f"{demo_media}/references/anna.png", "video": f"{demo_media}/dances/wave.mp4"}
    options = {"size": "832x480", "output": {"interpolate": 2}}
    jobs = [{"id": "a", **inputs, "options": options}, {"id": "b", **inputs, "options": {"size": "832x480"}}]
    gone = {"id": "gone", **inputs, "video": f"{demo_media}/dances/none.mp4"}
    path, recipe = tmp_path / "m.json", {"version": 1, "recipe": "fp4-distill+svdq-nvfp4"}

    def forecast(jobs):
        path.write_text(json.dumps(recipe | {"jobs": jobs}))
        return plan(PlanSettings(manifest=str(path), models=None, gpu="5090", cache=tmp_path))

    found = forecast([*jobs, gone])
    assert found.svdq.seconds == {"RTX 5090": pytest.approx(sum(row.seconds for row in found.jobs[:2]))}
    assert found.jobs[0].seconds > found.jobs[1].seconds
    none = forecast([gone]).svdq
    assert (none.seconds, none.estimated) == ({}, frozenset())
    assert str(none) == "svdq-nvfp4: 10.2 GB of weights (forecast)"


def test_file_bytes_is_size_of_stored_file(tmp_path):
    file = tmp_path / "quantized_transformer.safetensors"
    file.write_bytes(bytes(1234))
    recipe = get_recipe("fp4-distill+svdq-int4")
    forecaster = get_family(recipe).forecaster(recipe, None)
    assert replace(forecaster, transformer=file).file_bytes() == (1234, True)
    size, stored = replace(forecaster, transformer=tmp_path).file_bytes()  # a folder is the source's
    assert (size, stored) == (pytest.approx(9.63e9, rel=0.001), False)
    said = str(SvdqForecast(recipe.compute, 9_876_000_000, True, {}, frozenset()))
    assert said == "svdq-int4: 9.88 GB of weights (in the store)"


@pytest.mark.parametrize("recipe", ["fp4-distill", "fp4-fast", "fp4-distill+nvfp4"])
def test_plan_for_other_recipe_omits_svdq_file(demo_media, recipe, monkeypatch, tmp_path, capsys):
    machine_with(monkeypatch)
    found, printed = planned(demo_media, recipe, None, tmp_path, capsys)
    assert found.svdq is None and "GB of weights" not in printed and plan_object(found)["svdq"] is None


def test_choose_gpu_without_fp4_units_refuses_svdq_nvfp4():
    with pytest.raises(ConfigInvalid, match=r"H200 has no svdq-nvfp4, which recipe .fp4-distill.svdq-nvfp4. needs"):
        choose_gpu("H200", get_recipe("fp4-distill+svdq-nvfp4"))


def test_plan_with_small_gain_omits_fast_recipe(demo_media, monkeypatch, tmp_path, capsys):
    machine_with(monkeypatch)
    monkeypatch.setattr("runner.generation.wan_animate.family.foresee", lambda recipe, device: recipe)
    assert planned(demo_media, "fp4-distill", "H200", tmp_path, capsys)[0].fast is None


def test_plan_without_gpu_shows_largest_memory_of_all_choices(demo_media, monkeypatch, tmp_path, capsys):
    machine_with(monkeypatch)
    largest = planned(demo_media, "fp4-fast", None, tmp_path, capsys)[0].jobs[0].memory
    for gpu in ("RTX 5090", "H200", "A100"):
        memory = planned(demo_media, "fp4-fast", gpu, tmp_path, capsys)[0].jobs[0].memory
        assert all(memory[mode] <= largest[mode] for mode in largest)
    distilled = planned(demo_media, "fp4-distill", None, tmp_path, capsys)[0].jobs[0].memory
    assert all(distilled[mode] <= largest[mode] for mode in largest)


def test_foreseen_mode_is_first_that_fits_every_job():
    peaks = [{"resident": 30, "stream": 9, "minimal": 5}, {"resident": 20, "stream": 14, "minimal": 7}]
    assert [foreseen_mode("auto", peaks, free) for free in (30, 29, 14, 13, 1)] == [
        "resident", "stream", "stream", "minimal", "minimal",
    ]  # fmt: skip
    assert foreseen_mode("auto", peaks, None) is None and foreseen_mode("auto", [], 30) is None
    assert foreseen_mode("stream", [], None) == "stream"


@pytest.mark.parametrize(
    ("memory", "gpu", "free", "warns"),
    [
        ("minimal", "RTX 5090", None, "more a step on RTX 5090 at 832x480, 49 frames"),
        ("minimal", None, 30e9, "more a step on L40S at 832x480"),
        ("auto", None, 6e9, "memory mode minimal"),
        ("auto", None, 44e9, ""),
        ("stream", "RTX 5090", None, ""),
        ("auto", "RTX 5090", 6e9, ""),  # of another machine's memory nothing is known
        ("minimal", None, None, ""),  # no GPU
    ],
)
def test_plan_warns_of_blocks_that_run_eagerly_on_gpu(
    demo_media, tmp_path, monkeypatch, capsys, memory, gpu, free, warns
):
    def driver(self):
        if free is None:
            raise ProbeFailed("no driver")
        return Driver("580.65.06", (Gpu("NVIDIA L40S", 48 * 10**9, int(free)),))

    monkeypatch.setattr(Probes, "driver", driver)
    job = {"reference": "references/anna.png", "video": "dances/wave.mp4"}
    jobs = [job | {"id": "small"}, job | {"id": "large", "options": {"size": "832x480"}}]
    path = demo_media / f"eager-{tmp_path.name}.json"
    path.write_text(json.dumps({"version": 1, "memory": memory, "jobs": jobs}))
    found = plan(PlanSettings(manifest=str(path), models=None, gpu=gpu, cache=tmp_path))
    path.unlink()
    assert len(found.warnings) == bool(warns) and warns in "".join(found.warnings)
    print_plan(found.jobs, found.gpu, found.warnings)
    printed = capsys.readouterr().out
    assert ("! The transformer's blocks run eagerly on the GPU" in printed) == bool(warns)


def test_plan_without_gpu_has_no_seconds_column(manifest, monkeypatch, capsys):
    machine_with(monkeypatch)
    rows, gpu = forecast_jobs(manifest.jobs, settings(), manifest)
    assert gpu is None and rows[0].plan.seconds is None
    print_plan(rows, gpu)
    printed = capsys.readouterr().out
    assert "s on" not in printed and "--gpu NAME" in printed


def test_plan_of_interpolated_job_shows_frames_rate_and_cost(demo_media, monkeypatch, capsys):
    machine_with(monkeypatch)
    job = {"reference": "references/anna.png", "video": "dances/wave.mp4"}
    doubled = {"interpolate": 2}
    jobs = [
        job | {"id": "plain", "options": {"size": "832x480"}},
        job | {"id": "double", "options": {"size": "832x480", "output": doubled}},
        job | {"id": "padded", "options": {"size": "832x480", "output": doubled | {"pad_last": True}}},
    ]
    manifest = parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=str(demo_media), source="m.json")
    (plain, double, padded), gpu = forecast_jobs(manifest.jobs, settings(gpu="RTX 5090"), manifest)
    assert plain.interpolation is None and (plain.plan.frames, plain.fps) == (48, 16)
    assert (double.interpolation.frames, padded.interpolation.frames) == (95, 96)
    assert double.interpolation.fps == padded.interpolation.fps == 32
    assert double.plan == plain.plan
    assert double.interpolation.tflop == pytest.approx(47 * 18.929e9 / 1e12, rel=1e-3)  # counted by torch at 832x512
    assert double.tflop == plain.tflop + double.interpolation.tflop
    assert plain.seconds < double.seconds < plain.seconds + 1
    assert double.memory["minimal"] == pytest.approx(plain.memory["minimal"], rel=0.02)
    found = plan_object(RunForecast((plain, double, padded), gpu))
    assert found["jobs"][0]["interpolation"] is None and found["jobs"][0]["fps"] == "16"
    assert (found["jobs"][1]["interpolation"]["frames"], found["jobs"][1]["interpolation"]["fps"]) == (95, "32")
    assert found["totals"]["tflop"] == sum(row.tflop for row in (plain, double, padded))
    print_plan([plain, double, padded], gpu)
    printed = capsys.readouterr().out
    assert "double: interpolated to 95 frames, 32 frames a second: 0.89 TFLOP" in printed
    assert "plain: interpolated" not in printed


def test_plan_on_gpu_without_compute_shows_question_mark(manifest, monkeypatch, capsys):
    machine_with(monkeypatch, "NVIDIA A100-SXM4-80GB")
    rows, gpu = forecast_jobs(manifest.jobs, settings(recipe="fp4-distill+fp8"), manifest)
    assert gpu == "A100" and rows[0].plan.seconds is None and rows[0].plan.tflop > 0
    print_plan(rows, gpu)
    assert "?" in capsys.readouterr().out


def test_plan_in_narrow_terminal_names_missing_columns(manifest, monkeypatch, capsys):
    machine_with(monkeypatch)
    rows, gpu = forecast_jobs(manifest.jobs, settings(gpu="RTX 5090"), manifest)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard output for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    print_plan(rows, gpu)
    head, here, gone, left_out, error, *_ = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert head.split()[:3] == ["job", "frames", "size"] and "s on RTX 5090" in head and "GB" not in head
    assert here.split()[0] == "here" and gone.split()[:2] == ["gone", "-"]
    assert max(len(line.rstrip()) for line in (head, here, gone)) <= 80
    assert left_out.startswith("no room for: overlap, padding, denoised, GB resident")
    assert error.startswith("gone: input.not_found: ")


def test_plan_downloads_shared_s3_input_once(aws_env, moto_s3, demo_media, monkeypatch):
    machine_with(monkeypatch)
    server = aws_env(moto_s3)
    bucket = server.make_bucket()
    names = ("references/anna.png", "references/mira.png", "dances/wave.mp4", "dances/jacks.mp4")
    for name in names:
        server.client.upload_file(str(demo_media / name), bucket, name)
    matrix = {"references": names[:2], "videos": names[2:]}
    text = json.dumps({"version": 1, "matrix": matrix})
    manifest = parse_manifest(text, base=f"s3://{bucket}", source="m.json")
    fetched = []

    def fetch(place, folder):
        fetched.append(place)
        return fetch_input(place, folder)

    monkeypatch.setattr("runner.verbs.plan.fetch_input", fetch)
    rows, _ = forecast_jobs(manifest.jobs, settings(), manifest)
    assert [row.job_id for row in rows] == [job.id for job in manifest.jobs]
    assert sorted(fetched) == sorted(f"s3://{bucket}/{name}" for name in names)
    alone = [forecast_jobs([job], settings(), manifest)[0][0] for job in manifest.jobs]
    assert rows == alone and all(row.plan is not None for row in rows)


def test_forecast_seconds_uses_tflop_without_gpu_and_skips_unreadable_jobs(
    manifest, aws_env, moto_s3, demo_media, monkeypatch
):
    """Jobs have seconds on a known GPU, else TFLOP; a job that is unreadable or too late has no value."""
    machine_with(monkeypatch, "NVIDIA L40S")
    server = aws_env(moto_s3)
    bucket = server.make_bucket()
    server.client.upload_file(str(demo_media / "dances/wave.mp4"), bucket, "wave.mp4")
    away = replace(manifest.jobs[0], id="away", video=f"s3://{bucket}/wave.mp4")
    jobs, run = (*manifest.jobs, away), RunSettings(manifest="m.json", out="out", models=None)
    (known,), _ = forecast_jobs(jobs[:1], settings(gpu="L40S"), manifest)
    assert forecast_seconds(jobs, run, manifest) == {"here": known.plan.seconds, "away": known.plan.seconds}
    machine_with(monkeypatch)
    assert forecast_seconds(jobs, run, manifest)["here"] == known.plan.tflop
    assert forecast_seconds(jobs, run, manifest, within_s=-1) == {}


def test_plan_with_cached_poses_shows_warnings_of_run(demo_media, tmp_path, monkeypatch, capsys):
    """The job has two people and a rate above the video's; then a chosen person, and then other poses."""
    machine_with(monkeypatch)
    film(tmp_path / "two.mp4", [[(40, 64, LARGE), (140, 64, SMALL)]] * 16, fps=8)
    reference = str(demo_media / "references" / "anna.png")
    asked = [{"fps": 16}, {"fps": 16, "preprocess": {"subject": "largest"}}, {"fps": "source"}]
    jobs = [{"id": f"j{i}", "reference": reference, "video": "two.mp4", "options": o} for i, o in enumerate(asked)]
    manifest = parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=str(tmp_path), source="m.json")

    def forecast():
        return forecast_jobs(manifest.jobs, settings(cache=tmp_path / "cache"), manifest)[0]

    rate = (
        "fps 16 is above the 8 of the driving video: frames are repeated. Set fps to 8 at most, or take fps: 8 with "
        "output: {interpolate: 2}, which writes 16 frames a second."
    )
    assert [row.warnings for row in forecast()] == [(rate,), (rate,), ()]
    loaded = Preprocessor.load(build_detector(tmp_path / "detector.onnx"), build_pose(tmp_path / "pose.onnx"))
    preprocessor = Preprocessor(
        EachDisc(loaded.detector.network), loaded.pose, cache=DiskCache(tmp_path / "cache" / "poses")
    )
    job = manifest.jobs[0]
    conditions = preprocessor.prepare(fetch_input(reference, tmp_path), fetch_input(job.video, tmp_path), job.options)
    conditions.close()
    assert len(conditions.report["warnings"]) == 2
    monkeypatch.setattr("runner.video.reader.Frames", None)  # nothing is decoded
    first, chosen, other = forecast()
    assert list(first.warnings) == conditions.report["warnings"]
    assert "2 people are on screen" in first.warnings[1]
    assert (chosen.warnings, other.warnings) == ((rate,), ())
    print_plan([first])
    assert "j0: ! 2 people are on screen" in capsys.readouterr().out

    def denied(*_):
        raise StorageDenied("no")

    monkeypatch.setattr(DiskCache, "get", denied)  # a cache that cannot be read fails no plan
    assert [row.warnings for row in forecast()] == [(rate,), (rate,), ()]
