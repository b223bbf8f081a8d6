"""Settings: what cannot be meant is refused when the value is made, in the same words as on the command line."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from runner.cli import main
from runner.errors import ConfigInvalid
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.spec.manifest import parse_manifest
from runner.spec.recipes import get_recipe
from runner.verbs.commands import VERBS
from runner.verbs.flag_values import EXPORTS
from runner.verbs.flags import flag_name, flags_of
from runner.verbs.settings import (
    NUMBER_FORMATS,
    SCALES,
    CleanSettings,
    DemoSettings,
    DoctorSettings,
    FetchSettings,
    PlanSettings,
    PreprocessSettings,
    QuantizeSettings,
    ReportSettings,
    RunSettings,
    VerifySettings,
    default_cache,
)

RUN = {"manifest": "m.yaml", "out": "out"}
PREPROCESS = {"reference": "r.png", "video": "v.mp4", "out": "out"}

# settings, the required fields, field, wrong value, words of the message
WRONG = [
    (RunSettings, RUN, "max_attempts", "many", "must be a whole number, 0 or more, not 'many'. Write e.g. "),
    (RunSettings, RUN, "max_attempts", "-1", "must be a whole number, 0 or more, not '-1'"),
    (RunSettings, RUN, "max_attempts", "1.5", "must be a whole number, 0 or more, not '1.5'"),
    (RunSettings, RUN, "drain_s", "-0.5", "must be a number of seconds, 0 or more, not '-0.5'"),
    (RunSettings, RUN, "drain_s", "nan", "must be a number of seconds, 0 or more, not 'nan'"),
    (
        RunSettings,
        RUN,
        "memory",
        "strem",
        "must be auto, resident, stream or minimal, not 'strem'; did you mean stream?",
    ),
    (RunSettings, RUN, "device", "gpu", "must be auto, cpu or cuda, not 'gpu'"),
    (RunSettings, RUN, "recipe", "bf61", "no recipe 'bf61'; did you mean 'bf16'?"),
    (RunSettings, RUN, "run_id", "../x", "Give a valid folder name, e.g. night-7"),
    (RunSettings, RUN, "shard", "four", "'four' is not I/N"),
    (RunSettings, RUN, "shard", "4/4", "shard 4 of 4 does not exist"),
    (RunSettings, RUN, "on", "slurm", "must be ray, ray:auto or ray:HOST:PORT, not 'slurm'"),
    (RunSettings, RUN, "workers", "0", "must be a whole number, 1 or more, not '0'"),
    (RunSettings, RUN, "gpus", "two", "must be all, or numbers from 0, separated by commas, not 'two'"),
    (RunSettings, RUN, "gpus", "0,", "must be all, or numbers from 0, separated by commas, not '0,'"),
    (RunSettings, RUN, "gpus", "0,1,00", "must be different numbers, not '0,1,00'"),
    (RunSettings, RUN, "shard_count", "0", "must be a whole number, 1 or more, not '0'"),
    (RunSettings, RUN, "assume", "nibble=up", "'nibble=up' is unknown"),
    (RunSettings, RUN, "pose_precision", "int4", "must be fp32 or int8, not 'int4'; did you mean int8?"),
    (RunSettings, RUN, "tensorrt", "yes", "must be off, auto or on, not 'yes'"),
    (RunSettings, RUN, "spot", "azure", "must be aws, gcp or file:PATH, not 'azure'"),
    (RunSettings, RUN, "spot", "file:", "must be aws, gcp or file:PATH, not 'file:'"),
    (RunSettings, RUN, "spot", "aws:x", "must be aws, gcp or file:PATH, not 'aws:x'"),
    (PlanSettings, {"manifest": "m.yaml"}, "recipe", "fp5", "no recipe 'fp5'"),
    (ReportSettings, {"out": "out"}, "gpu_hour", "much", "must be a price, 0 or more, not 'much'"),
    (ReportSettings, {"out": "out"}, "run", "../x", "Give a valid folder name"),
    (CleanSettings, {"out": "out"}, "older_than", "1w", "write e.g. 30m, 1h, 2d or 0s"),
    (DoctorSettings, {}, "device", "gpu", "must be auto, cpu or cuda"),
    (PreprocessSettings, PREPROCESS, "options", "{fps: ", "is not valid YAML"),
    (QuantizeSettings, {}, "format", "fp4", "must be nvfp4, g32, svdq-int4 or svdq-nvfp4, not 'fp4'; did you"),
    (QuantizeSettings, {}, "rank", "24", "a rank of 24: multiples of 16 up to 512 are taken"),
    (QuantizeSettings, {}, "rank", "many", "must be a whole number, 1 or more, not 'many'"),
    (QuantizeSettings, {}, "refits", "-1", "must be a whole number, 0 or more, not '-1'"),
    (QuantizeSettings, {}, "scales", "best", "must be mse or absmax, not 'best'"),
    (QuantizeSettings, {}, "rule", "none", "no rule 'none'"),
    (FetchSettings, {}, "part", "lora", "no part 'lora' of the published files"),
    (FetchSettings, {}, "revision", "owner/name", "must be REPO=REVISION, not 'owner/name'"),
    (VerifySettings, {}, "format", "g16", "must be nvfp4, g32, svdq-int4 or svdq-nvfp4, not 'g16'"),
]


@pytest.mark.parametrize(("settings", "required", "field", "value", "words"), WRONG)
def test_settings_refuse_wrong_value_in_same_words_as_command_line(settings, required, field, value, words, capsys):
    (verb,) = [verb for verb in VERBS if verb.settings is settings]
    ((item, flag),) = [found for found in flags_of(settings) if found[0].name == field]
    with pytest.raises(ConfigInvalid) as caught:
        settings(**required, **{field: [value] if flag.repeatable else value})
    message = caught.value.message
    assert flag_name(item) in message and words in message
    assert caught.value.todo
    line = verb.name.split()
    for name, text in required.items():
        (needed,) = [found for found in flags_of(settings) if found[0].name == name]
        line += [text] if needed[1].positional else [flag_name(needed[0]), text]
    assert main([*line, f"{flag_name(item)}={value}"]) == 2
    assert capsys.readouterr().err == f"config.invalid: {message}\n"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_attempts", True, "a whole number"),
        ("max_attempts", None, "a whole number"),
        ("max_attempts", 2.0, "a whole number"),
        ("drain_s", True, "a number of seconds"),
        ("drain_s", [], "a number of seconds"),
        ("force", "no", "True or False, not 'no'"),
        ("force", 1, "True or False"),
        ("out", None, "text"),
        ("out", b"out", "text"),
        ("models", 5, "text"),
        ("cache", None, "a path on this machine"),
        ("sheet", 5, "a path on this machine"),
        ("input_root", "folder", "a list of texts"),
        ("input_root", [5], "text"),
        ("manifest", {"jobs": []}, "a path, a URI, - or a Manifest"),
        ("device", None, "auto, cpu or cuda"),
    ],
)
def test_settings_with_value_of_wrong_type_are_refused(field, value, words):
    with pytest.raises(ConfigInvalid, match=words):
        RunSettings(**RUN | {field: value})


def test_settings_with_contradicting_fields_are_refused():
    with pytest.raises(ConfigInvalid, match=r"--shard 0/4 and --shard-count 5 contradict"):
        RunSettings(**RUN, shard="0/4", shard_count=5)
    with pytest.raises(ConfigInvalid, match=r"--shard any and --shard-count 5 contradict"):
        RunSettings(**RUN, shard="any", shard_count=5)
    with pytest.raises(ConfigInvalid, match=r"--gpus and --device cpu contradict"):
        RunSettings(**RUN, gpus="all", device="cpu")
    for part in ({"shard": "0/2"}, {"shard_count": 2}):
        with pytest.raises(ConfigInvalid, match=r"--gpus shares all jobs"):
            RunSettings(**RUN, gpus="0,1", **part)
    assert RunSettings(**RUN, gpus="0, 2", shard="any", device="cuda").gpus == "0,2"
    for more, text in (
        ({"workers": 2}, "--workers needs --on"),
        ({"on": "ray", "gpus": "all"}, "--on and --gpus contradict"),
        ({"on": "ray", "workers": 2, "device": "cuda"}, "--workers and --device cuda contradict"),
        ({"on": "ray", "device": "cpu"}, "--on without --workers"),
        ({"on": "ray", "shard": "0/2"}, "--on gives all jobs"),
        ({"on": "ray", "shard_count": 2}, "--on gives all jobs"),
    ):
        with pytest.raises(ConfigInvalid, match=text):
            RunSettings(**RUN, **more)
    assert RunSettings(**RUN, on=" ray:auto ", workers="3", shard="any").workers == 3
    with pytest.raises(ConfigInvalid, match=r"--calibrate chooses the scales itself"):
        QuantizeSettings(calibrate="m.yaml", scales="mse")


def test_svdq_flags_with_other_format_are_refused():
    svdq, other = SVDQ_LAYOUTS
    for more in ({"rank": 32}, {"refits": 0}, {"export": ("lite", "folder")}):
        with pytest.raises(ConfigInvalid, match=f"--{next(iter(more))} is for SVDQ; nvfp4 has no low-rank factors"):
            QuantizeSettings(**more)
        QuantizeSettings(**more, format=svdq)
    with pytest.raises(ConfigInvalid, match=f"--scales mse is for FP4; {svdq} always searches"):
        QuantizeSettings(format=svdq, scales="mse")
    with pytest.raises(ConfigInvalid, match=f"needs the format {svdq}, but --format is {other}"):
        QuantizeSettings(recipe=f"fp4-distill+{svdq}", format=other)
    with pytest.raises(ConfigInvalid, match="leaves to the device"):
        QuantizeSettings(recipe="fp4-fast", format=svdq)
    with pytest.raises(ConfigInvalid, match="has both 'fp8' and"):
        QuantizeSettings(recipe="fp4-distill+fp8", format=svdq)
    for wrong in ("lite folder", ("lite",), ("lite", "a", "b"), ["torch", "folder"], ("lite", 5)):
        with pytest.raises(ConfigInvalid, match="--export"):
            QuantizeSettings(format=svdq, export=wrong)
    assert QuantizeSettings(format=svdq, export=["cache-dit", "a b"]).export == ("cache-dit", Path("a b"))


def test_quantize_settings_take_number_format_from_recipe():
    svdq = next(iter(SVDQ_LAYOUTS))
    assert (QuantizeSettings().number_format, QuantizeSettings().target_recipe) == ("nvfp4", "fp4-distill")
    implied = QuantizeSettings(recipe=f"fp4-distill+{svdq}+steps4")
    assert implied.number_format == svdq and implied.target_recipe == f"fp4-distill+{svdq}+steps4"
    told = QuantizeSettings(recipe="fp4-distill+steps4", format=svdq)
    assert told.number_format == svdq and get_recipe(told.target_recipe) == get_recipe(implied.target_recipe)
    assert QuantizeSettings(recipe="fp4-distill+fp8", format="g32").target_recipe == "fp4-distill+fp8"


def test_settings_convert_values_to_field_types(tmp_path):
    made = RunSettings(
        manifest=tmp_path / "m.yaml", out=tmp_path, cache="cache", max_attempts="5", drain_s=3, input_root=["a", "b"]
    )
    assert (made.manifest, made.out, made.cache) == (str(tmp_path / "m.yaml"), str(tmp_path), Path("cache"))
    assert (made.max_attempts, made.drain_s, made.input_root) == (5, 3.0, ("a", "b"))
    assert math.isinf(RunSettings(**RUN, drain_s="inf").drain_s)
    manifest = parse_manifest("version: 1\njobs: [{id: a, reference: r, video: v}]\n", base=".")
    assert RunSettings(manifest=manifest, out="out").manifest is manifest
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.force = True


def test_settings_read_environment_defaults_when_created(monkeypatch, tmp_path):
    monkeypatch.delenv("VIDEO_LAB_MODELS", raising=False)
    monkeypatch.delenv("VIDEO_LAB_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunSettings(**RUN).models is None
    assert DemoSettings().models == ".cache/demo-models"
    assert default_cache() == tmp_path / ".cache/video-lab" == VerifySettings().cache
    monkeypatch.setenv("VIDEO_LAB_MODELS", "/models")
    monkeypatch.setenv("VIDEO_LAB_CACHE", "/cache")
    assert (RunSettings(**RUN).models, DemoSettings().models) == ("/models", "/models")
    assert RunSettings(**RUN).cache == Path("/cache")


def test_settings_choices_match_code_below():
    from runner.preprocess.networks.providers import NetworkOptions
    from runner.quantization.files.svdq_export import EXPORT_KINDS
    from runner.quantization.formats.e2m1 import FORMATS
    from runner.quantization.formats.scales import Method
    from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
    from runner.quantization.rules import RULES

    assert set(NUMBER_FORMATS) == {*FORMATS, *SVDQ_LAYOUTS}
    assert EXPORTS == EXPORT_KINDS
    assert {*SCALES, "activation"} == set(get_args(Method))
    assert QuantizeSettings().rule in RULES
    networks = NetworkOptions()
    run = RunSettings(**RUN)
    assert (run.pose_precision, run.tensorrt) == (networks.pose_precision, networks.tensorrt)


def test_settings_import_loads_no_heavy_module():
    script = "import sys, runner.verbs.settings; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    heavy = {"argparse", "boto3", "numpy", "pydantic", "rich", "structlog", "torch", "yaml"}
    assert loaded & heavy == set()
