"""`video-lab submit` as it is typed: exit codes by cause, and that nothing is half submitted."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.cli import main
from runner.spec.manifest import load_manifest
from tests.launch.recorded_tools import RecordedTools

IMAGE = "registry.example.com/video-lab:0.1.0"
FORBIDDEN = 'Error from server (Forbidden): jobs.batch is forbidden: User "ann" cannot create resource "jobs"'
UNREACHABLE = "Unable to connect to the server: dial tcp 192.0.2.1:443: i/o timeout"
PLATFORMS = {
    "aws-batch": ["--queue", "gpus"],
    "gcp-batch": ["--location", "us-central1", "--machine-type", "g2-standard-16"],
    "kubernetes": [],
    "slurm": [],
}


class Desk:
    """A bucket, a manifest whose inputs lie in it, and stand-ins for the platforms' tools."""

    def __init__(self, client: Any, bucket: str, tools: RecordedTools, folder: Path) -> None:
        self.client, self.bucket, self.tools, self.folder = client, bucket, tools, folder
        self.root = f"s3://{bucket}"

    def manifest(self, inputs: str) -> str:
        """A manifest of two jobs whose inputs lie below `inputs`."""
        jobs = [{"id": name, "reference": f"{inputs}/r.png", "video": f"{inputs}/v.mp4"} for name in "ab"]
        path = self.folder / "night.yaml"
        path.write_text(yaml.safe_dump({"version": 1, "recipe": "bf16", "jobs": jobs}), encoding="utf-8")
        return str(path)

    def submit(self, platform: str, *more: str, inputs: str = "", **places: str) -> int:
        image = "/shared/video-lab.sif" if platform == "slurm" else IMAGE
        given = {"out": f"{self.root}/out", "models": f"{self.root}/models", "image": image, "shards": "2"} | places
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        manifest = self.manifest(inputs or f"{self.root}/in")
        return main(["submit", platform, manifest, *words, "--run-id", "r-1", *PLATFORMS[platform], *more])

    def keys(self) -> list[str]:
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])]


@pytest.fixture
def desk(aws_env, moto_s3, tmp_path, monkeypatch) -> Desk:
    server = aws_env(moto_s3)
    tools = RecordedTools(tmp_path, "kubectl", "gcloud", "sbatch", "scontrol", "scancel")
    monkeypatch.setenv("PATH", tools.path)
    monkeypatch.delenv("VIDEO_LAB_MODELS", raising=False)
    return Desk(server.client, server.make_bucket(), tools, tmp_path)


def test_a_run_is_submitted_and_the_tasks_find_its_manifest(desk, capsys):
    desk.tools.plan(0, prints="job.batch/x (server dry run)")
    assert desk.submit("kubernetes", "--namespace", "renders", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert desk.keys() == ["out/runs/r-1/manifest.jsonl"]
    manifest = load_manifest(said["manifest"])
    assert [(job.id, job.video) for job in manifest.jobs] == [(name, f"{desk.root}/in/v.mp4") for name in "ab"]
    asked, *created = desk.tools.calls()
    assert "--dry-run=server" in asked.words
    jobs = [json.loads(call.stdin) for call in created]
    assert [job["metadata"]["name"] for job in jobs] == [entry["id"] for entry in said["ids"]]
    (container,) = jobs[0]["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["run", said["manifest"]]
    assert (said["platform"], said["shards"], said["jobs"], said["run_id"]) == ("kubernetes", 2, 2, "r-1")
    assert said["folder"] is None and len(said["watch"]) >= 3
    assert main(["validate", said["manifest"], "--no-inputs"]) == 0


def test_what_was_submitted_is_printed_with_the_lines_to_watch_it(desk, capsys):
    assert desk.submit("kubernetes") == 0
    said = capsys.readouterr().out
    assert "run r-1 on kubernetes: 2 jobs in 2 tasks (--shards 2)\n" in said
    assert "\nrun    night-" in said and "\nreport night-" in said
    assert f"  video-lab status {desk.root}/out --run r-1 --watch\n" in said


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_image_without_a_tag_is_refused_before_anything_is_sent(desk, platform, capsys):
    places = {name: f"gs://{desk.bucket}/{name}" for name in ("out", "models")} if platform == "gcp-batch" else {}
    inputs = f"gs://{desk.bucket}/in" if platform == "gcp-batch" else ""
    image = "docker://registry/video-lab" if platform == "slurm" else "registry/video-lab"
    assert desk.submit(platform, inputs=inputs, image=image, **places) == 2
    assert "--image: registry/video-lab has no tag" in capsys.readouterr().err
    assert (desk.keys(), desk.tools.calls()) == ([], [])


@pytest.mark.parametrize("platform", ["aws-batch", "gcp-batch", "kubernetes"])
def test_places_of_this_machine_are_refused_each_by_name_before_anything_is_sent(desk, platform, capsys):
    local = str(desk.folder / "in")
    assert desk.submit(platform, inputs=local, out=str(desk.folder / "out"), models=str(desk.folder / "models")) == 2
    said = capsys.readouterr().err
    for text in (
        f"OUT {desk.folder}/out ",
        f"{desk.folder}/models ",
        f"{local}/r.png of a, b",
        f"{local}/v.mp4 of a, b",
    ):
        assert text in said
    assert said.startswith("config.invalid: ") and "the tasks cannot use 4 places" in said
    assert (desk.keys(), desk.tools.calls()) == ([], [])
    assert not (desk.folder / "out").exists()


@pytest.mark.parametrize(("says", "code", "kind"), [(FORBIDDEN, 2, "denied"), (UNREACHABLE, 3, "unavailable")])
def test_where_the_cluster_refuses_or_is_away_nothing_is_written(desk, says, code, kind, capsys):
    desk.tools.plan(0, says=says, code=1)
    assert desk.submit("kubernetes", "--json") == code
    assert json.loads(capsys.readouterr().out)["error"]["code"] == f"cluster.{kind}"
    assert desk.keys() == []
    assert len(desk.tools.calls()) == 1


def test_where_the_job_itself_is_refused_it_is_not_half_submitted(desk, capsys):
    """The array is accepted and its report is not: the array is taken back."""
    desk.tools.plan(2, says=FORBIDDEN, code=1)
    assert desk.submit("kubernetes") == 2
    verbs = [call.words[call.words.index("default") + 1] for call in desk.tools.calls()]
    assert verbs == ["create", "create", "create", "delete"]
    assert "cluster.denied" in capsys.readouterr().err


def test_aws_that_cannot_be_reached_is_exit_code_3_and_nothing_is_written(desk, monkeypatch, capsys):
    with socket.socket() as taken:  # a port on which nothing listens while it is held
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_BATCH", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        assert desk.submit("aws-batch") == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("cluster.unavailable: ")
    assert desk.keys() == []


def test_a_tool_that_is_not_there_is_said_before_anything_is_written(desk, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(desk.folder))
    assert desk.submit("kubernetes") == 2
    assert "kubectl is not installed" in capsys.readouterr().err
    assert desk.keys() == []


def test_slurm_takes_paths_that_the_nodes_share(desk, capsys):
    out, models, inputs = (str(desk.folder / "shared" / name) for name in ("out", "models", "in"))
    places = {"out": out, "models": models}
    desk.tools.plan(4, prints="41")
    desk.tools.plan(5, prints="42")
    assert desk.submit("slurm", inputs=inputs, **places) == 0
    assert [call.words[0] for call in desk.tools.calls()] == ["sbatch", "scontrol", *["sbatch"] * 4]
    (kept,) = (desk.folder / "shared").rglob("manifest.jsonl")
    assert [job.reference for job in load_manifest(str(kept)).jobs] == [f"{inputs}/r.png"] * 2
    said = capsys.readouterr().out
    assert "run    41\nreport 42\n" in said


def test_written_files_are_all_that_submitting_needs(desk, capsys):
    """submit.sh of what was written does what the command without --render-only does."""
    written = desk.folder / "job"
    assert desk.submit("kubernetes", "--render-only", str(written)) == 0
    assert f"to submit it, run {written}/submit.sh" in capsys.readouterr().out
    assert (desk.keys(), desk.tools.calls()) == ([], [])
    assert desk.submit("kubernetes") == 0
    created = [json.loads(call.stdin) for call in desk.tools.calls()[1:]]
    assert list(yaml.safe_load_all((written / "job.yaml").read_text(encoding="utf-8"))) == created
    kept = desk.client.get_object(Bucket=desk.bucket, Key="out/runs/r-1/manifest.jsonl")["Body"].read()
    assert (written / "manifest.jsonl").read_bytes() == kept
