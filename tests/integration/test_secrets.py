"""Secrets: planted in every place that a command reads, and looked for in every byte that it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from runner.cli import main
from tests.system_tests import system_test

MARK = "hush"  # every planted secret holds it, and nothing else does
SIGNED = "X-Amz-Credential=AKIA%2Fhush01&X-Amz-Date=20240101&X-Amz-Signature=hush02"


def secret_files(folder: Path, media: Path) -> dict:
    """A manifest's text. Local inputs carry presigned query strings in their names; some cannot be read."""
    shutil.copy(media / "dances/wave.mp4", folder / f"wave.mp4?{SIGNED}")
    shutil.copy(media / "references/anna.png", folder / "anna.png?sig=hush03&sv=1")
    (folder / "text.mp4?token=hush04").write_text("no video")
    good = {"reference": "anna.png?sig=hush03&sv=1", "video": f"wave.mp4?{SIGNED}"}
    bad = {
        "missing": {"video": f"nothing.mp4?{SIGNED}"},
        "text": {"video": "text.mp4?token=hush04"},
        "user": {"video": "s3://AKIA:hush/05+@bucket/clip.mp4"},
        "prompted": {"prompt": "Authorization: Bearer hush06", "video": "text.mp4?token=hush04"},
        "said": {"prompt": "with hush-from-the-environment", "video": "nothing.mp4"},
    }
    jobs = [{"id": "good", **good}, *({"id": name, **good, **change} for name, change in bad.items())]
    matrix = {"references": ["anna.png?sig=hush03&sv=1"], "videos": ["clip?X-Amz-Signature=hush07"]}
    options = {"size": "64x96", "fps": 8, "max_frames": 5, "steps": 1}
    return {"version": 1, "recipe": "fp32", "defaults": {"options": options}, "jobs": jobs, "matrix": matrix}


@pytest.fixture
def planted(tmp_path, demo_models, demo_media, monkeypatch):
    """(manifest, flags of `run`, the output folder), with secrets in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-from-the-environment")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hush-for-the-session")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hush08@127.0.0.1:1")
    manifest = tmp_path / "m.yaml"
    manifest.write_text(yaml.safe_dump(secret_files(tmp_path, demo_media)), encoding="utf-8")
    out = tmp_path / "out?sig=hush09"
    flags = ["--out", str(out), "--models", str(demo_models), "--cache", str(tmp_path / "cache"), "--run-id", "r"]
    return manifest, flags, out


def written(out: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Everything that is there to read: file or stream → its text."""
    printed = capfd.readouterr()
    files = {
        str(path): path.read_bytes().decode(errors="replace")
        for root in (out, out.parent / "cache")
        for path in root.rglob("*")
        if path.is_file()
    }
    return {"stdout": printed.out, "stderr": printed.err} | files


def leaks(texts: dict[str, str]) -> dict[str, list[str]]:
    found = {name: [line[:300] for line in text.splitlines() if MARK in line] for name, text in texts.items()}
    return {name: lines for name, lines in found.items() if lines}


def test_a_run_writes_no_secret_and_reads_what_was_named(planted, capfd):
    manifest, flags, out = planted
    assert main(["run", str(manifest), *flags, "--verbose"]) == 1
    texts = written(out, capfd)
    assert leaks(texts) == {}
    assert {"result.json", "r"} <= {Path(name).name for name in texts} | {path.name for path in out.rglob("*")}
    record = json.loads((out / "jobs/good/result.json").read_text("utf-8"))
    assert record["status"] == "succeeded"
    assert record["inputs"]["video"]["uri"].endswith(
        "/wave.mp4?X-Amz-Credential=***&X-Amz-Date=20240101&X-Amz-Signature=***"
    )
    errors = {line["id"]: line["error"] for line in summary(out)["jobs"]}
    assert errors.pop("good") is None
    assert "nothing.mp4?X-Amz-Credential=***&X-Amz-Date=20240101&X-Amz-Signature=***" in errors["missing"]["message"]
    assert "s3://AKIA:***@bucket" in errors["user"]["message"]
    assert len(errors) == 6 and all(error["code"].startswith("input.") for error in errors.values())

    assert main(["run", str(manifest), *flags, "--verbose", "--log-format", "json"]) == 1
    texts = written(out, capfd)
    assert leaks(texts) == {}
    assert all(json.loads(line) for line in texts["stderr"].splitlines())
    assert {line["id"]: line["status"] for line in summary(out)["jobs"]}["good"] == "skipped"  # done stays done

    record["error"] = {"code": "internal", "message": "https://u:hush10@h", "stage": "fetch", "retryable": False}
    (out / "jobs/good/result.json").write_text(json.dumps(record), encoding="utf-8")  # as version 0.1.0 wrote it
    for command in (["status", str(out)], ["status", "--json", str(out)]):
        assert main(command) == 1
        texts = {"stdout": capfd.readouterr().out}
        assert leaks(texts) == {} and "https://u:***@h" in texts["stdout"]


def summary(out: Path) -> dict:
    (file,) = (out / "runs/r").glob("*.summary.json")
    return json.loads(file.read_text("utf-8"))


@pytest.mark.parametrize("style", ["console", "json"])
def test_commands_that_render_nothing_print_no_secret(planted, capfd, style):
    manifest, _, out = planted
    how = ["--verbose", "--log-format", style]
    for command in (["validate"], ["validate", "--deep"], ["plan", "--recipe", "fp32"]):
        assert main([*command, str(manifest), *how]) == 1
        texts = written(out, capfd)
        assert leaks(texts) == {}
        assert "X-Amz-Signature=***" in texts["stdout"].replace("\n", "")
    assert main(["doctor", "--models", "s3://AKIA:hush/11@bucket/m", "--out", "s3://bucket/o", "--device", "cpu"]) == 2
    assert leaks(written(out, capfd)) == {}


@pytest.mark.parametrize("style", ["console", pytest.param("json", marks=system_test)])
def test_what_fails_at_the_start_prints_no_secret(planted, tmp_path, capfd, monkeypatch, style):
    monkeypatch.setattr("runner.weights.hub.FIRST_WAIT_S", 0.01)
    manifest, flags, out = planted
    how = ["--verbose", "--log-format", style]
    elsewhere = ["--models", flags[3], "--cache", str(tmp_path / "cache")]
    commands = [
        (["run", str(manifest), "--out", "s3://bucket/out", *elsewhere], 3),  # the endpoint does not answer
        (["run", str(manifest), "--out", "s3://AKIA:hush/12@bucket/out", *elsewhere], 2),
        (["run", str(manifest), "--out", "https://user:hush13@host/out", *elsewhere], 2),
        (["run", str(manifest), *flags, "--models", "/nothing?password=hush14"], 2),
        (["run", str(manifest), *flags, "--recipe", "https://u:hush15@h"], 2),
        (["run", f"{manifest}?sig=hush16", *flags], 2),
        (["run", "s3://bucket/m.yaml?versionId=1&X-Amz-Signature=hush17", *flags], 3),
        (["status", "s3://AKIA:hush/18@bucket"], 2),
        (["weights", "fetch", "--endpoint", "http://user:hush19@127.0.0.1:1", *elsewhere[:2]], 3),
    ]
    for number, change in enumerate(
        (
            {"id": "clip?X-Amz-Signature=hush20"},
            {"video": "https://user:hush21-and-a-long-tail-that-is-cut-somewhere-in-the-middle@host/clip.mp4"},
            {"video": 5, "https://user:hush22@h": 1},
            {"options": {"size": "https://user:hush23-and-a-long-tail-that-is-cut-somewhere-in-the-middle@h"}},
            {"mask": "\x1b[31m?sig=hush24\u202e"},
        )
    ):
        broken = tmp_path / f"broken{number}.yaml"
        job = {"id": "a", "reference": "r.png", "video": "v.mp4"} | change
        broken.write_text(yaml.safe_dump({"version": 1, "jobs": [job]}), encoding="utf-8")
        commands.append((["run", str(broken), *flags], 2))
    for command, code in commands:
        assert main([*command, *how]) == code, command
        texts = written(out, capfd)
        assert leaks(texts) == {}, command
        assert texts["stderr"]
    with pytest.raises(SystemExit):
        main(["run", str(manifest), *flags, "--shard-count", "s3://a:hush25@b", "--nonsense=https://u:hush26@h"])
    assert leaks(written(out, capfd)) == {}


def test_an_error_of_ours_prints_its_traceback_without_secrets(planted, capfd, monkeypatch):
    def broken(settings, progress):
        raise AssertionError("https://user:hush27@host")

    monkeypatch.setattr("runner.verbs.run.run", broken)
    manifest, flags, out = planted
    assert main(["run", str(manifest), *flags]) == 1
    texts = written(out, capfd)
    assert leaks(texts) == {}
    assert "Traceback" in texts["stderr"] and "internal: AssertionError: https://user:***@host" in texts["stderr"]
