"""GCP Batch: which places tasks can read, what is checked, what gcloud is asked, and what is taken back."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid
from runner.launch.gcp_batch import GcpBatch
from runner.launch.submission import SubmittedJob
from tests.launch.discovery_schema import document, problems
from tests.launch.recorded_tools import RecordedTools, complaints
from tests.launch.test_gcp_batch_files import SUBMISSION

DENIED = "ERROR: (gcloud.batch.jobs.submit) PERMISSION_DENIED: Permission 'batch.jobs.create' denied on 'projects/p'"
UNAVAILABLE = "ERROR: (gcloud.batch.jobs.submit) UNAVAILABLE: The service is currently unavailable."
NOT_FOUND = "ERROR: (gcloud.batch.jobs.delete) NOT_FOUND: Resource 'projects/p/locations/l/jobs/x' was not found"
PLATFORM = GcpBatch(location="us-central1", machine_type="g2-standard-32", project="night-renders")
FLAGS = ("--location", "us-central1", "--project", "night-renders", "--quiet")
MANIFEST = "gs://renders/out/runs/20261130-100300.AB12/manifest.jsonl"


@pytest.fixture
def tools(tmp_path, monkeypatch) -> RecordedTools:
    made = RecordedTools(tmp_path, "gcloud")
    monkeypatch.setenv("PATH", made.path)
    return made


@pytest.fixture
def names(tools) -> tuple[str, str]:
    """Of the run's job and of its report's, found in what is submitted."""
    PLATFORM.submit(SUBMISSION, PLATFORM.render(SUBMISSION))
    run, report = (call.words[4] for call in tools.calls())
    tools.forget()
    return run, report


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("gs://renders/out", "/mnt/disks/gcs/renders/out"),
        ("gs://renders/out/", "/mnt/disks/gcs/renders/out"),
        ("gs://renders", "/mnt/disks/gcs/renders"),
        ("gs://models.example.org/a b/ü.mp4", "/mnt/disks/gcs/models.example.org/a b/ü.mp4"),
    ],
)
def test_place_in_bucket_is_path_below_mount(uri, path):
    assert PLATFORM.problem_of_place(uri) is None
    assert PLATFORM.place(uri) == path


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("/data/out", "this machine"),
        ("out", "this machine"),
        ("file:///data/out", "this machine"),
        ("s3://bucket/out", "not in Google Cloud Storage"),
        ("https://host/clip.mp4", "not in Google Cloud Storage"),
        ("gs://", "not a path in a bucket"),
        ("gs://Bucket/out", "not a path in a bucket"),
        ("gs://bucket//out", "not a path in a bucket"),
        ("gs://bucket/../other", "not a path in a bucket"),
        ("gs://bucket/a/./b", "not a path in a bucket"),
    ],
)
def test_problem_of_place_outside_bucket_gives_reason(uri, reason):
    assert reason in str(PLATFORM.problem_of_place(uri))


# -- what is checked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"image": "video-lab"}, "--image"),
        ({"name": "Night"}, "--name"),
        ({"name": "night_1"}, "--name"),
        ({"name": "n" * 48}, "--name"),
        ({"shards": 0}, "--shards"),
        ({"shards": 100_001}, "--shards"),
        ({"attempts": 0}, "--attempts"),
        ({"attempts": 11}, "--attempts"),
        ({"time_limit_s": 14 * 86400 + 1}, "--time-limit"),
        ({"gpus_per_task": 2}, "--gpus-per-task"),
        ({"share": "any"}, "--share any"),
        ({"cpus": 33}, "--machine-type"),
        ({"memory_gib": 129}, "--machine-type"),
    ],
)
def test_check_of_submission_outside_limits_names_option(changed, where):
    with pytest.raises(ConfigInvalid) as caught:
        PLATFORM.check(replace(SUBMISSION, **changed))
    assert caught.value.where == where
    assert caught.value.todo


def test_check_of_share_any_is_refused_with_reason():
    with pytest.raises(ConfigInvalid, match=r"leases.*two tasks could render the same job"):
        PLATFORM.check(replace(SUBMISSION, share="any"))


@pytest.mark.parametrize(
    "changed", [{"name": "n" * 47}, {"shards": 100_000}, {"attempts": 10}, {"cpus": 32, "memory_gib": 128}]
)
def test_check_of_submission_at_limits_passes(tools, changed):
    submission = replace(SUBMISSION, **changed)
    PLATFORM.check(submission)
    for job in PLATFORM.submit(submission, PLATFORM.render(submission)):
        text = document("batch.v1.json")["resources"]["projects"]["resources"]["locations"]["resources"]["jobs"][
            "methods"
        ]["create"]["parameters"]["jobId"]["description"]
        assert "at most 63 characters" in text
        assert len(job.id) <= 63
        assert re.fullmatch(r"[a-z](?:[a-z0-9-]*[a-z0-9])?", job.id)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"location": "us"}, "--location"),
        ({"location": "us-central1-a"}, "--location"),  # a zone
        ({"location": "--us-central1"}, "--location"),
        ({"machine_type": "G2"}, "--machine-type"),
        ({"machine_type": "g2-standard-48"}, "--machine-type"),
        ({"machine_type": None, "gpu_type": "nvidia-tesla-t4,nvidia-l4"}, "--gpu-type"),
        ({"project": "My Project"}, "--project"),
        ({"service_account": "renderer"}, "--service-account"),
    ],
)
def test_invalid_setting_is_refused_with_its_option(settings, where):
    with pytest.raises(ConfigInvalid) as caught:
        GcpBatch(**{"location": "us-central1", "machine_type": "g2-standard-16", **settings})
    assert caught.value.where == where


# -- the files ---------------------------------------------------------------------------------------------------------


def test_render_is_reproducible_and_contains_no_credential(monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/ann/the-key-of-ann.json")
    submission = replace(SUBMISSION, environment={"B": "1", "A": "2"})
    files = PLATFORM.render(submission)
    assert files == PLATFORM.render(replace(submission, environment={"A": "2", "B": "1"}))
    assert files.keys() == {"run.json", "report.json", "submit.sh"}
    assert "the-key-of-ann" not in "".join(files.values())
    for name in ("run.json", "report.json"):
        assert problems("batch.v1.json", "Job", json.loads(files[name])) == []


def test_submit_sh_passes_shellcheck():
    assert complaints(PLATFORM.render(SUBMISSION)["submit.sh"]) == ""


# -- asking and submitting ---------------------------------------------------------------------------------------------


def test_ask_queries_batch_and_each_bucket(tools):
    PLATFORM.ask(SUBMISSION)
    first, *others = [call.words for call in tools.calls()]
    assert first == ("gcloud", "batch", "jobs", "list", "--limit", "1", "--format", "value(name)", *FLAGS)
    assert [words[1:5] for words in others] == [
        ("storage", "buckets", "describe", f"gs://{bucket}") for bucket in ("clips", "models.example.org", "renders")
    ]


def test_ask_refuses_missing_bucket_and_accepts_unreadable_bucket(tools):
    tools.plan(1, says="ERROR: (gcloud.storage.buckets.describe) [ann] does not have permission to access b", code=1)
    tools.plan(2, says="ERROR: (gcloud.storage.buckets.describe) gs://models.example.org not found: 404.", code=1)
    with pytest.raises(ConfigInvalid, match=r"models\.example\.org"):
        PLATFORM.ask(SUBMISSION)


@pytest.mark.parametrize(("says", "error"), [(DENIED, ClusterDenied), (UNAVAILABLE, ClusterUnavailable)])
def test_ask_with_gcloud_error_raises_error_of_its_cause(tools, says, error):
    tools.plan(0, says=says, code=1)
    with pytest.raises(error):
        PLATFORM.ask(SUBMISSION)


def test_ask_without_gcloud_says_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigInvalid, match="gcloud is not installed"):
        PLATFORM.ask(SUBMISSION)


def test_keep_manifest_copies_bytes_to_bucket(tools):
    PLATFORM.keep_manifest("gs://renders/out/", "runs/x/manifest.jsonl", b'{"id": "\xc3\xbc"}\n')
    (call,) = tools.calls()
    assert call.words == ("gcloud", "storage", "cp", "-", "gs://renders/out/runs/x/manifest.jsonl", "--quiet")
    assert call.stdin == b'{"id": "\xc3\xbc"}\n'


def test_kept_manifest_returns_bytes_or_none_when_missing(tools):
    missing = "ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:\ngs://renders/out/x"
    tools.plan(0, prints='{"id": "ü"}')
    tools.plan(1, says=missing, code=1)
    tools.plan(2, says="ERROR: (gcloud.storage.cat) HTTPError 403: ann does not have permission to read", code=1)
    assert PLATFORM.kept_manifest("gs://renders/out/", "x") == '{"id": "ü"}\n'.encode()
    assert tools.calls()[0].words == ("gcloud", "storage", "cat", "gs://renders/out/x", "--quiet")
    assert PLATFORM.kept_manifest("gs://renders/out", "x") is None
    with pytest.raises(ClusterDenied):
        PLATFORM.kept_manifest("gs://renders/out", "x")


def test_submit_sends_run_file_then_report_file(tools, tmp_path):
    """gcloud reads the files when it is called: the stand-in copies them."""
    copy = tmp_path / "copies"
    copy.mkdir()
    for call in range(2):
        tools.plan_script(call, f'for word in "$@"; do if [ -f "$word" ]; then cp "$word" {copy}/; fi; done')
    files = PLATFORM.render(SUBMISSION)
    run, report = PLATFORM.submit(SUBMISSION, files)
    assert (run.role, report.role) == ("run", "report")
    words = [call.words for call in tools.calls()]
    assert [line[:6] for line in words] == [
        ("gcloud", "batch", "jobs", "submit", run.id, "--config"),
        ("gcloud", "batch", "jobs", "submit", report.id, "--config"),
    ]
    assert all(line[7:] == FLAGS for line in words)
    assert {path.name: path.read_text() for path in copy.iterdir()} == {
        name: files[name] for name in ("run.json", "report.json")
    }
    assert not Path(words[0][6]).exists()


@pytest.mark.parametrize(("says", "error"), [(DENIED, ClusterDenied), ("boom", ConfigInvalid)])
def test_refused_report_deletes_run(tools, names, says, error):
    tools.plan(1, says=says, code=1)
    with pytest.raises(error):
        PLATFORM.submit(SUBMISSION, PLATFORM.render(SUBMISSION))
    assert [call.words[3:5] for call in tools.calls()[2:]] == [("delete", names[0])]


def test_unanswered_report_deletes_report_and_run(tools, names):
    tools.plan(1, says=UNAVAILABLE, code=1)
    tools.plan(2, says=NOT_FOUND, code=1)  # it had not been accepted
    with pytest.raises(ClusterUnavailable) as caught:
        PLATFORM.submit(SUBMISSION, PLATFORM.render(SUBMISSION))
    assert [call.words[3:5] for call in tools.calls()[2:]] == [("delete", names[1]), ("delete", names[0])]
    assert "could not be removed" not in caught.value.message


def test_refused_run_deletes_nothing(tools):
    tools.plan(0, says=DENIED, code=1)
    with pytest.raises(ClusterDenied):
        PLATFORM.submit(SUBMISSION, PLATFORM.render(SUBMISSION))
    assert len(tools.calls()) == 1


def test_unanswered_run_is_deleted(tools, names):
    tools.plan(0, says=UNAVAILABLE, code=1)
    with pytest.raises(ClusterUnavailable):
        PLATFORM.submit(SUBMISSION, PLATFORM.render(SUBMISSION))
    assert [call.words[3:5] for call in tools.calls()] == [("submit", names[0]), ("delete", names[0])]


def test_job_that_cannot_be_deleted_is_named_with_delete_command(tools, names):
    tools.plan(1, says=DENIED, code=1)
    tools.plan(2, says=UNAVAILABLE, code=1)
    with pytest.raises(ClusterDenied) as caught:
        PLATFORM.submit(SUBMISSION, PLATFORM.render(SUBMISSION))
    assert "could not be removed" in caught.value.message
    assert f"gcloud batch jobs delete {names[0]} --location us-central1" in str(caught.value.todo)


def test_watch_gives_describe_log_delete_and_status_commands(names):
    run, report = names
    lines = PLATFORM.watch(SUBMISSION, (SubmittedJob("run", run), SubmittedJob("report", report)))
    assert shlex.split(lines[0]) == ["gcloud", "batch", "jobs", "describe", run, *FLAGS]
    logs = shlex.split(lines[1])
    label = json.loads(PLATFORM.render(SUBMISSION)["run.json"])["labels"]["video-lab-run"]
    assert logs[:3] == ["gcloud", "logging", "read"]
    assert f'labels."video-lab-run"="{label}"' in logs[3]
    assert [shlex.split(line)[3:5] for line in lines[2:4]] == [["delete", run], ["delete", report]]
    assert lines[4].endswith(f"video-lab status renders/out --run {SUBMISSION.run_id} --watch")
    assert shlex.split(lines[5])[3] == f"gs://renders/out/runs/{SUBMISSION.run_id}/report.html"


# -- submit.sh ---------------------------------------------------------------------------------------------------------


def test_submit_sh_copies_manifest_and_submits_both_jobs(tools, names, tmp_path):
    run, report = names
    done = tools.run_script(tmp_path / "job files", dict(PLATFORM.render(SUBMISSION)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"run: {run}", f"report: {report}"]
    assert [call.words for call in tools.calls()] == [
        ("gcloud", "storage", "cp", "manifest.jsonl", MANIFEST),
        ("gcloud", "batch", "jobs", "submit", run, "--config", "run.json", *FLAGS),
        ("gcloud", "batch", "jobs", "submit", report, "--config", "report.json", *FLAGS),
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_submit_sh_with_nothing_accepted_deletes_nothing(tools, tmp_path, failing):
    tools.plan(failing, says=DENIED, code=1)
    done = tools.run_script(tmp_path / "files", dict(PLATFORM.render(SUBMISSION)))
    assert done.returncode == 1
    assert DENIED in done.stderr
    assert len(tools.calls()) == failing + 1


def test_submit_sh_with_refused_report_deletes_run(tools, names, tmp_path):
    tools.plan(2, says=DENIED, code=1)
    done = tools.run_script(tmp_path / "files", dict(PLATFORM.render(SUBMISSION)))
    assert done.returncode == 1
    assert tools.calls()[3].words == ("gcloud", "batch", "jobs", "delete", names[0], *FLAGS)
