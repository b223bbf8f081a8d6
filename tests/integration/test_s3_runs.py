"""Manifest, models, inputs and outputs all on a real S3 server; then again on one that a test can break."""

from __future__ import annotations

import json

import pytest
import yaml

from runner.cli import main
from runner.storage import open_storage

pytestmark = pytest.mark.s3
OPTIONS = {"size": "64x96", "fps": 8, "max_frames": 5, "steps": 1}


def put_all(bucket: str, demo_models, demo_media) -> None:
    """The store, two references, a dance and a manifest that names them in three ways."""
    storage = open_storage(f"s3://{bucket}/lab")
    for path in demo_models.rglob("*"):
        if path.is_file() and ".building" not in path.parts:
            storage.publish(path, f"models/{path.relative_to(demo_models)}")
    storage.publish(demo_media / "references/anna.png", "in/refs/anna.png")
    storage.publish(demo_media / "references/bela.png", "in/refs/贝拉 1.png")
    storage.publish(demo_media / "dances/wave.mp4", "in/wave.mp4")
    jobs = [
        {"id": "relative", "reference": "refs/anna.png", "video": "wave.mp4"},
        {"id": "absolute", "reference": "refs/贝拉 1.png", "video": f"s3://{bucket}/lab/in/wave.mp4"},
        {"id": "gone", "reference": "refs/anna.png", "video": "nothing.mp4"},
    ]
    text = yaml.safe_dump({"version": 1, "recipe": "fp32", "defaults": {"options": OPTIONS}, "jobs": jobs})
    storage.write_bytes("in/m.yaml", text.encode())


def command(bucket: str, tmp_path, run_id: str) -> list[str]:
    base = f"s3://{bucket}/lab"
    words = ["run", f"{base}/in/m.yaml", "--out", f"{base}/out", "--models", f"{base}/models"]
    return [*words, "--cache", str(tmp_path / "cache"), "--run-id", run_id]


@pytest.fixture(params=["seaweedfs_s3", "moto_s3"])
def server(request):
    return request.getfixturevalue(request.param)


def test_a_whole_run_on_s3(server, aws_env, tmp_path, demo_models, demo_media, capsys):
    aws_env(server)
    bucket = server.make_bucket()
    put_all(bucket, demo_models, demo_media)
    assert main(command(bucket, tmp_path, "r1")) == 1  # one input is gone
    out = open_storage(f"s3://{bucket}/lab/out")
    for job in ("relative", "absolute"):
        record = json.loads(out.read_bytes(f"jobs/{job}/result.json"))
        assert record["status"] == "succeeded"
        assert record["output"]["identity"].startswith("etag:")
        assert record["inputs"]["video"]["identity"].startswith("etag:")
        assert out.stat(f"jobs/{job}/output.mp4").bytes == record["output"]["bytes"]
        out.fetch(f"jobs/{job}/output.mp4", tmp_path / "movie.mp4")
    assert json.loads(out.read_bytes("jobs/gone/result.json"))["error"]["code"] == "input.not_found"
    left = {info.key for info in out.list("runs/r1/")}
    events = [f"events-{number:04d}.jsonl" for number in range(1, len(left) - 2)]
    shard = {f"runs/r1/00000-of-00001.{kind}" for kind in ("summary.json", "metrics.prom", *events)}
    assert left == shard | {"runs/r1/jobs.json"}
    # again: what is done stays done, and no model file is downloaded twice
    capsys.readouterr()
    assert main(command(bucket, tmp_path, "r2")) == 1
    summary = json.loads(out.read_bytes("runs/r2/00000-of-00001.summary.json"))
    assert {line["id"]: line["status"] for line in summary["jobs"]} == {
        "relative": "skipped",
        "absolute": "skipped",
        "gone": "failed",
    }
    assert "models.file" not in capsys.readouterr().err
    # an output that somebody replaced is not what the record says
    out.write_bytes("jobs/relative/output.mp4", b"something else")
    assert main(command(bucket, tmp_path, "r3")) == 1
    summary = json.loads(out.read_bytes("runs/r3/00000-of-00001.summary.json"))
    assert summary["jobs"][0]["status"] == "succeeded"
    assert "output" in summary["jobs"][0]["reason"]


def test_refused_credentials_stop_at_the_start(seaweedfs_s3, aws_env, tmp_path, demo_models, demo_media, capsys):
    aws_env(seaweedfs_s3)
    bucket = seaweedfs_s3.make_bucket()
    put_all(bucket, demo_models, demo_media)
    aws_env(seaweedfs_s3, AWS_SECRET_ACCESS_KEY="wrong")
    assert main(command(bucket, tmp_path, "r1")) == 2
    assert "storage.denied" in capsys.readouterr().err


def test_one_input_that_may_not_be_read_fails_its_job_alone(faulty_s3, aws_env, tmp_path, demo_models, demo_media):
    aws_env(faulty_s3)
    bucket = faulty_s3.make_bucket()
    put_all(bucket, demo_models, demo_media)
    faulty_s3.fail("403", "HEAD", " 1.png", times=99)  # 贝拉's
    faulty_s3.fail("503", "HEAD", "/in/wave.mp4", times=1)  # and one hiccup, which nobody shall notice
    assert main([*command(bucket, tmp_path, "r1")]) == 1
    out = open_storage(f"s3://{bucket}/lab/out")
    summary = json.loads(out.read_bytes("runs/r1/00000-of-00001.summary.json"))
    assert {line["id"]: (line["error"] or {}).get("code") for line in summary["jobs"]} == {
        "relative": None,
        "absolute": "storage.denied",
        "gone": "input.not_found",
    }
    message = json.loads(out.read_bytes("jobs/absolute/result.json"))["error"]["message"]
    assert "贝拉 1.png" in message
    assert "s3:GetObject" in message, "it does not say what to allow"


def test_a_missing_bucket_ends_a_command_with_2_as_a_missing_key_does(server, aws_env, tmp_path, demo_models, capsys):
    aws_env(server)
    nowhere, empty = "s3://no-such-bucket", f"s3://{server.make_bucket()}"
    manifest, cache = tmp_path / "m.yaml", ["--cache", str(tmp_path / "cache")]
    manifest.write_text(f"version: 1\njobs: [{{id: a, reference: {nowhere}/a.png, video: {nowhere}/v.mp4}}]\n")
    models = ["--models", str(demo_models), *cache]
    for root in nowhere, empty:
        commands = [
            ["validate", f"{root}/m.yaml"],
            ["plan", f"{root}/m.yaml"],
            ["run", f"{root}/m.yaml", "--out", str(tmp_path / "out"), *models],
            ["validate", "--no-inputs", str(manifest), "--models", f"{root}/models", *cache],
            ["run", str(manifest), "--out", str(tmp_path / "out"), "--models", f"{root}/models", *cache],
            ["status", f"{root}/out"],
            ["clean", f"{root}/out"],
            *([["run", str(manifest), "--out", f"{root}/out", *models]] if root == nowhere else []),
        ]
        for words in commands:
            assert main(words) == 2, words
            said = capsys.readouterr().err
            assert root in said and ("the bucket no-such-bucket does not exist. " in said) is (root == nowhere), said
    assert main(["validate", str(manifest)]) == 1
    assert "a  input.not_found: s3://no-such-bucket/a.png: the bucket no-such-bucket does" in capsys.readouterr().out
    # as an input it fails its own job alone
    assert main(["run", str(manifest), "--out", str(tmp_path / "out"), "--recipe", "fp32", *models]) == 1
    record = json.loads((tmp_path / "out/jobs/a/result.json").read_text())
    assert (record["status"], record["error"]["code"]) == ("failed", "input.not_found")
