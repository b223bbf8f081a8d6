"""Submit settings: contradictions and credentials are refused when the value is made; defaults are a submission's."""

from __future__ import annotations

import dataclasses

import pytest

from runner.cli import parse_command
from runner.errors import ConfigInvalid
from runner.launch.submission import Submission
from runner.verbs.submit_settings import SubmitSettings

GIVEN = {"manifest": "m.yaml", "out": "s3://b/out", "models": "s3://b/models", "image": "i:1", "shards": 4}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shards": "auto"}, r"^--gpu: --shards auto needs a GPU.*--gpu H100, or the number of tasks"),
        ({"within": "2h"}, r"^--within: is for --shards auto, but --shards is 4"),
        ({"startup": "2m"}, r"^--startup: is for"),
        ({"gpu": "H100"}, r"^--gpu: is for"),
        ({"models": None}, r"^--models: no model store was named"),
        ({"models": ""}, r"^--models: no model store was named"),
        ({"upload_inputs": "s3://b/in", "render_only": "job"}, r"--render-only sends nothing"),
        ({"upload_inputs": "inputs"}, r"^--upload-inputs: must be a place in an object store"),
        ({"shards": "0"}, r"^--shards: must be a whole number, 1 or more"),
        ({"shards": "all"}, r"^--shards: must be a whole number"),
        ({"gpus_per_task": 0}, r"^--gpus-per-task: must be a whole number, 1 or more"),
        ({"attempts": "0"}, r"^--attempts: must be a whole number, 1 or more"),
        ({"time_limit": "1w"}, r"^--time-limit: .*is not an age"),
        ({"share": "some"}, r"^--share: must be index or any"),
        ({"env": ["A"]}, r"^--env: must be NAME=VALUE, not 'A'"),
        ({"env": ["1A=b"]}, r"^--env: must be NAME=VALUE"),
        ({"env": ["A=1", "B=2", "A=3"]}, r"^--env: A is given twice"),
    ],
)
def test_submit_settings_with_invalid_values_are_refused(given, words):
    with pytest.raises(ConfigInvalid, match=words) as caught:
        SubmitSettings(**GIVEN | given)
    assert caught.value.todo


@pytest.mark.parametrize(
    "text",
    [
        *(
            f"{name}=abcdefgh"
            for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN")
        ),
        "DB_PASSWORD=x",
        "MY_API_KEY=abcdefgh",
        "HF_TOKEN=",
        "PROXY=http://user:pass-word@proxy.example.com",
        "URL=https://host/x?X-Amz-Signature=0123456789",
    ],
)
def test_submit_env_with_credential_is_refused_and_not_repeated(text):
    with pytest.raises(ConfigInvalid, match="holds a credential") as caught:
        SubmitSettings(**GIVEN, env=[text])
    value = text.partition("=")[2]
    assert not value or value not in caught.value.message
    assert "service account" in caught.value.message


def test_submit_env_with_secret_of_environment_is_refused(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    with pytest.raises(ConfigInvalid, match="A holds a credential"):
        SubmitSettings(**GIVEN, env=["A=x-hf_abcdefghijkl"])


def test_submit_env_with_plain_variables_is_kept():
    texts = (
        "OMP_NUM_THREADS=8",
        "AWS_DEFAULT_REGION=eu-west-1",
        "AWS_ENDPOINT_URL_S3=https://s3.example.com",
        "A=",
        "B=c=d",
    )
    assert SubmitSettings(**GIVEN, env=list(texts)).env == texts


def test_submit_settings_have_defaults_of_submission():
    made = SubmitSettings(**GIVEN)
    same = ("share", "gpus_per_task", "cpus", "memory_gib", "disk_gib", "spot", "attempts", "drain_s", "gpu_hour")
    defaults = {item.name: item.default for item in dataclasses.fields(Submission)}
    assert {name: getattr(made, name) for name in same} == {name: defaults[name] for name in same}
    assert defaults["time_limit_s"] == 24 * 3600 and made.time_limit == "24h"


def test_submit_shards_is_auto_or_number():
    assert SubmitSettings(**GIVEN | {"shards": "auto"}, gpu="H100", within="2h").shards == "auto"
    assert SubmitSettings(**GIVEN | {"shards": " 7 "}).shards == 7
    line = ["submit", "kubernetes", "m.yaml", "--out", "s3://b/o", "--models", "s3://b/m", "--image", "i:1"]
    verb, fields, _ = parse_command([*line, "--gpu", "H100", "--env", "A=1", "--env", "B=2"])
    made = verb.settings(**fields)
    assert (made.shards, made.env) == ("auto", ("A=1", "B=2"))
