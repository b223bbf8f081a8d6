"""Submit: what is sent, in which order, and that nothing is when something is wrong; on a real S3 protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid, InputUnreadable
from runner.spec.manifest import Manifest, parse_manifest
from runner.verbs.plan import plan
from runner.verbs.settings import PlanSettings
from runner.verbs.submit import Submitted, submit_to
from runner.verbs.submit_settings import SubmitSettings
from tests.paper_platform import PaperPlatform

KEY = "out/runs/night-7/manifest.jsonl"


class Bench:
    """A bucket, a platform, and the settings of a run of three jobs whose inputs lie in the bucket."""

    def __init__(self, client: Any, bucket: str, folder: Path) -> None:
        self.client, self.bucket, self.folder = client, bucket, folder
        self.platform = PaperPlatform()

    def manifest(self, *jobs: dict[str, Any]) -> str:
        """The path of a manifest; without jobs the three."""
        inputs = {"reference": f"s3://{self.bucket}/in/r.png", "video": f"s3://{self.bucket}/in/v.mp4"}
        document = {"version": 1, "recipe": "bf16", "jobs": jobs or [{"id": name} | inputs for name in "abc"]}
        path = self.folder / "Night 7.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return str(path)

    def settings(self, **given: Any) -> SubmitSettings:
        needed = {
            "manifest": given.get("manifest") or self.manifest(),
            "out": f"s3://{self.bucket}/out",
            "models": f"s3://{self.bucket}/models",
            "image": "registry.example.com/video-lab:0.1.0",
            "run_id": "night-7",
        }
        if "gpu" not in given:
            needed["shards"] = 2
        return SubmitSettings(**needed | given)

    def submit(self, **given: Any) -> Submitted:
        return submit_to(self.platform, self.settings(**given))

    def refused(self, error: type[Exception] = ConfigInvalid, **given: Any) -> str:
        """What is said; nothing was asked of the platform's servers, and nothing was written."""
        with pytest.raises(error) as caught:
            self.submit(**given)
        assert not {"ask", "keep_manifest", "submit"} & set(self.platform.calls)
        assert self.stored() == {}
        return str(caught.value)

    def stored(self) -> dict[str, bytes]:
        listed = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        read = (self.client.get_object(Bucket=self.bucket, Key=item["Key"])["Body"].read() for item in listed)
        return dict(zip((item["Key"] for item in listed), read, strict=True))

    def kept(self) -> Manifest:
        return parse_manifest(self.stored()[KEY].decode(), base="/", source="m.jsonl", foreign=["gs"])


@pytest.fixture
def bench(aws_env, moto_s3, tmp_path) -> Bench:
    server = aws_env(moto_s3)
    return Bench(server.client, server.make_bucket(), tmp_path)


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_submit_keeps_manifest_before_job_is_submitted(bench):
    found = bench.submit(
        recipe="fp4-distill", memory="stream", max_attempts=5, env=["OMP_NUM_THREADS=8", "A=b=c"], time_limit="90m",
        spot=True, gpu_hour=2.5, drain_s=15, cpus=4,
    )  # fmt: skip
    assert bench.platform.calls == ["check", "check", "render", "ask", "keep_manifest", "submit"]
    assert list(bench.stored()) == [KEY]
    assert [(job.id, job.video) for job in bench.kept().jobs] == [(n, f"s3://{bench.bucket}/in/v.mp4") for n in "abc"]
    assert bench.kept().recipe == "bf16"
    (submission,) = bench.platform.seen
    root = f"s3://{bench.bucket}"
    assert (submission.name, submission.run_id, submission.image) == (
        "night-7",
        "night-7",
        "registry.example.com/video-lab:0.1.0",
    )
    places = (submission.out, submission.manifest, submission.models)
    assert places == (f"{root}/out", f"{root}/{KEY}", f"{root}/models")
    assert submission.run_flags == ("--recipe", "fp4-distill", "--memory", "stream", "--max-attempts", "5")
    assert dict(submission.environment) == {"OMP_NUM_THREADS": "8", "A": "b=c"}
    assert (submission.time_limit_s, submission.spot, submission.gpu_hour) == (5400, True, 2.5)
    assert (submission.drain_s, submission.cpus, submission.shards) == (15.0, 4, 2)
    assert submission.inputs == (f"{root}/in/r.png", f"{root}/in/v.mp4")
    assert (found.platform, found.jobs, found.tasks.tasks, found.files) == (
        "paper",
        3,
        2,
        ("job.yaml", "submit.sh", "manifest.jsonl"),
    )
    assert [(job.role, job.id) for job in found.ids] == [("run", "17"), ("report", "18")]
    assert found.watch == ("paper watch 17", "paper watch 18")
    assert (found.folder, found.uploaded) == (None, 0)


def test_submit_freezes_chosen_jobs_and_lowers_shards_to_job_count(bench):
    found = bench.submit(only=["[ab]"], limit=1, shards=16)
    assert [job.id for job in bench.kept().jobs] == ["a"]
    assert bench.platform.seen[0].shards == 1
    assert found.tasks.reason == "--shards 16, lowered: there is 1 job"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Night 7.yaml", "night-7"),
        ("s3://bucket/shows/2026-01-31.jsonl", "run-2026-01-31"),
        ("贝拉.yaml", "run"),
        ("-", "run"),
        ("a" * 50 + ".yaml", "a" * 40),
        ("x" * 39 + "-b.yaml", "x" * 39),
    ],
)
def test_submit_takes_name_and_run_id_from_manifest_name(bench, source, name):
    text = json.dumps({"id": "a", "reference": "s3://b/r.png", "video": "s3://b/v.mp4"})
    manifest = parse_manifest(text, base="/", source=source.replace(".yaml", ".jsonl"))
    found = bench.submit(manifest=manifest, run_id=None)
    assert found.name == name
    assert re.fullmatch(rf"{name}-\d{{8}}T\d{{6}}Z", found.run_id)
    assert list(bench.stored()) == [f"out/runs/{found.run_id}/manifest.jsonl"]
    assert bench.submit(manifest=manifest, name="other", run_id=None).run_id.startswith("other-2")


def test_submit_names_mounted_buckets_as_tasks_see_them(bench):
    bench.platform = PaperPlatform(mounts="/mnt")
    job = {"id": "a", "reference": "gs://show/r.png", "video": "gs://show/v.mp4"}
    found = bench.submit(manifest=bench.manifest(job), models="gs://show/models/", render_only=bench.folder / "job")
    words = yaml.safe_load((bench.folder / "job/job.yaml").read_text("utf-8"))
    assert (words["models"], words["inputs"]) == ("/mnt/show/models", ["/mnt/show/r.png", "/mnt/show/v.mp4"])
    frozen = (bench.folder / "job/manifest.jsonl").read_text("utf-8")
    assert json.loads(frozen.splitlines()[1]) == {"id": "a", "reference": "/mnt/show/r.png", "video": "/mnt/show/v.mp4"}
    assert found.manifest == f"s3://{bench.bucket}/{KEY}"


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_submit_names_every_unusable_place_with_jobs(bench, monkeypatch):
    monkeypatch.chdir(bench.folder)
    here = {"reference": "r.png", "video": "s3://bucket/v.mp4"}
    jobs = [{"id": f"j{n}"} | here for n in range(5)]
    jobs += [
        {"id": "g", "reference": "s3://bucket/r.png", "video": "s3://bucket/v.mp4", "mask": "m.png",
         "options": {"mode": "replace"}},
        {"id": "o", "options": {"preprocess": {"from": "official/o"}}},
        {"id": "gs", "reference": "gs://bucket/r.png", "video": "s3://user:secret-word@bucket/v.mp4"},
    ]  # fmt: skip
    said = bench.refused(manifest=bench.manifest(*jobs), out="out", models="models")
    head, *lines = said.splitlines()
    assert "nothing was sent: the tasks cannot use 7 places. Put the files where the tasks can read them, or" in head
    assert "--upload-inputs s3://bucket/prefix" in head
    local = "is on this machine; the tasks run on other machines"
    assert lines == [
        f"  OUT {bench.folder}/out {local}",
        f"  the model store {bench.folder}/models {local}",
        f"  reference {bench.folder}/r.png of j0, j1, j2 and 2 more {local}",
        f"  mask {bench.folder}/m.png of g {local}",
        f"  official files {bench.folder}/official/o of o {local}",
        "  reference gs://bucket/r.png of gs is in a store that the tasks cannot read",
        "  video s3://user:secret-word@bucket/v.mp4 of gs seems to hold a credential, and would be written into files",
    ]
    assert bench.platform.calls == []


@pytest.mark.parametrize(("image", "words"), [("video-lab", "has no tag"), ("Video Lab:1", "not an image reference")])
def test_submit_with_untagged_image_is_refused_before_inputs_are_read(bench, image, words):
    assert words in bench.refused(image=image, gpu="H100")


def test_submit_reports_platform_check_error_first(bench):
    bench.platform.fails["check"] = ConfigInvalid("too many")
    assert bench.refused() == "too many"


@pytest.mark.parametrize("error", [ClusterDenied("no"), ClusterUnavailable("away"), ConfigInvalid("no such queue")])
def test_submit_refused_by_platform_writes_nothing(bench, error):
    bench.platform.fails["ask"] = error
    video = bench.folder / "v.mp4"
    video.write_bytes(b"video")
    job = {"id": "a", "reference": "s3://bucket/r.png", "video": str(video)}
    with pytest.raises(type(error)):
        bench.submit(manifest=bench.manifest(job), upload_inputs=f"s3://{bench.bucket}/inputs")
    assert bench.stored() == {}
    assert bench.platform.calls[-1] == "ask"


def test_submit_with_run_id_of_other_manifest_is_refused(bench):
    bench.submit()
    bench.submit()
    before = bench.stored()
    with pytest.raises(ConfigInvalid, match="another manifest was submitted with this run id") as caught:
        bench.submit(only=["a"])
    assert caught.value.where == f"s3://{bench.bucket}/{KEY}"
    assert bench.stored() == before
    assert bench.platform.calls.count("submit") == 2


def test_submit_that_cannot_keep_manifest_submits_nothing(bench):
    with pytest.raises(Exception, match="bucket"):
        bench.submit(out="s3://no-such-bucket-here/out")
    assert "submit" not in bench.platform.calls


# -- copying inputs ----------------------------------------------------------------------------------------------------


def test_submit_with_upload_inputs_copies_local_inputs_once(bench):
    for name in ("r.png", "v.mp4", "official/src_ref.png", "official/src_pose.mp4", "official/src_face.mp4"):
        path = bench.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    jobs = [
        {"id": "a", "reference": "r.png", "video": "v.mp4"},
        {"id": "b", "reference": "r.png", "video": f"s3://{bench.bucket}/in/v.mp4"},
        {"id": "o", "options": {"preprocess": {"from": "official"}}},
    ]
    root = f"s3://{bench.bucket}/inputs"
    found = bench.submit(manifest=bench.manifest(*jobs), upload_inputs=root + "/")
    a, b, o = bench.kept().jobs
    digest = hashlib.sha256(b"r.png").hexdigest()[:32]
    assert (a.reference, b.reference, b.video) == (
        f"{root}/{digest}/r.png",
        f"{root}/{digest}/r.png",
        f"s3://{bench.bucket}/in/v.mp4",
    )
    assert re.fullmatch(rf"{root}/[0-9a-f]{{32}}/official", o.official)
    stored = bench.stored()
    for place in (a.reference, a.video, *(f"{o.official}/{name}" for name in ("src_ref.png", "src_face.mp4"))):
        assert stored[place.removeprefix(f"s3://{bench.bucket}/")].decode().endswith(place.rpartition("/")[2])
    assert found.uploaded == 5
    assert bench.platform.calls == ["check", "check", "render", "ask", "keep_manifest", "submit"]
    with capture_logs() as log:
        assert bench.submit(manifest=bench.manifest(*jobs), upload_inputs=root).uploaded == 0
    assert [line["event"] for line in log].count("already_there") == 5
    assert bench.stored() == stored


def test_submit_names_missing_local_input_before_upload(bench):
    (bench.folder / "r.png").write_bytes(b"r")
    jobs = [
        {"id": "a", "reference": "r.png", "video": "none.mp4"},
        {"id": "o", "options": {"preprocess": {"from": "official"}}},
    ]
    said = bench.refused(manifest=bench.manifest(*jobs), upload_inputs=f"s3://{bench.bucket}/inputs")
    assert "cannot use 2 places. Put the files where the tasks can read them\n" in said
    assert f"  video {bench.folder}/none.mp4 of a cannot be copied: no such file" in said
    assert f"  official files {bench.folder}/official of o cannot be copied: {bench.folder}/official/src_" in said


# -- how many tasks ----------------------------------------------------------------------------------------------------


def test_submit_with_shards_auto_takes_tasks_by_forecast(bench, demo_media):
    for name, path in (("in/r.png", "references/anna.png"), ("in/v.mp4", "dances/wave.mp4")):
        bench.client.upload_file(str(demo_media / path), bench.bucket, name)
    inputs = {"reference": f"s3://{bench.bucket}/in/r.png", "video": f"s3://{bench.bucket}/in/v.mp4"}
    manifest = bench.manifest(*({"id": f"j{n}"} | inputs for n in range(6)))
    seconds = [job.plan.seconds for job in plan(PlanSettings(manifest=manifest, gpu="H100", models=None)).jobs]
    assert len(set(seconds)) == 1 and seconds[0] > 5
    within = 60 + 2 * seconds[0] + 1  # room for two of the six jobs
    found = bench.submit(manifest=manifest, gpu="H100", within=f"{within:.3f}s", startup="60s")
    assert (found.tasks.tasks, bench.platform.seen[0].shards) == (3, 3)
    assert found.tasks.reason.startswith("--shards auto on H100: ")
    assert bench.submit(manifest=manifest, gpu="H100", within="24h").tasks.tasks == 1
    with pytest.raises(ConfigInvalid, match=r"--within: by the forecast job j0 takes .* any number of tasks"):
        bench.submit(manifest=manifest, gpu="H100", within=f"{60 + seconds[0] / 2:.3f}s", startup="60s")


def test_submit_with_shards_auto_names_all_jobs_without_forecast(bench):
    said = bench.refused(InputUnreadable, gpu="H100")
    assert "the inputs of 3 jobs cannot be read here" in said and "--shards N" in said
    assert [line.split(":")[0] for line in said.splitlines()[1:]] == ["  a", "  b", "  c"]


# -- writing it down ---------------------------------------------------------------------------------------------------


def test_submit_with_render_only_writes_job_and_sends_nothing(bench):
    folder = bench.folder / "deep/job"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "job.yaml").write_text("an older one")
    found = bench.submit(render_only=folder)
    assert bench.platform.calls == ["check", "check", "render"]
    assert bench.stored() == {}
    assert (found.folder, found.ids, found.watch) == (str(folder), (), ())
    assert {path.name for path in folder.iterdir()} == {"notes.txt", *found.files}
    assert (folder / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((folder / "job.yaml").read_text("utf-8"))["words"][0] == "run"
    assert os.access(folder / "submit.sh", os.X_OK)
    bench.submit()
    assert (folder / "manifest.jsonl").read_bytes() == bench.stored()[KEY]


def test_submit_with_render_only_at_file_is_refused(bench):
    path = bench.folder / "job"
    path.write_text("a file")
    for folder in (path, path / "below"):
        assert "is not a folder" in bench.refused(render_only=folder)
    assert path.read_text() == "a file"
