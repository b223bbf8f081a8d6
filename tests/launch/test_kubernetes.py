"""Kubernetes: what is checked, what kubectl is asked, in which order, and what is taken back when it refuses."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
import yaml

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid
from runner.launch.kubernetes import Kubernetes
from runner.launch.submission import Submission, SubmittedJob
from tests.launch.recorded_tools import RecordedTools, complaints
from tests.launch.test_kubernetes_objects import SUBMISSION

FORBIDDEN = 'Error from server (Forbidden): jobs.batch is forbidden: User "ann" cannot create resource "jobs"'
UNREACHABLE = "Unable to connect to the server: dial tcp 192.0.2.1:443: i/o timeout"


@pytest.fixture
def tools(tmp_path, monkeypatch) -> RecordedTools:
    made = RecordedTools(tmp_path, "kubectl", "aws")
    monkeypatch.setenv("PATH", made.path)
    return made


def names(submission: Submission = SUBMISSION) -> list[str]:
    files = Kubernetes().render(submission)
    return [document["metadata"]["name"] for document in yaml.safe_load_all(files["job.yaml"])]


# -- what is checked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"image": "video-lab"}, "--image"),
        ({"name": "Night"}, "--name"),
        ({"name": "night_renders"}, "--name"),
        ({"name": "night-"}, "--name"),
        ({"name": "4nights"}, "--name"),
        ({"name": ""}, "--name"),
        ({"name": "n" * 48}, "--name"),
        ({"shards": 0}, "--shards"),
        ({"shards": 100_001}, "--shards"),
        ({"attempts": 0}, "--attempts"),
        ({"attempts": 11}, "--attempts"),
    ],
)
def test_check_of_submission_outside_limits_names_option(changed, flag):
    with pytest.raises(ConfigInvalid) as caught:
        Kubernetes().check(replace(SUBMISSION, **changed))
    assert caught.value.where == flag
    assert caught.value.todo


@pytest.mark.parametrize("changed", [{"name": "n" * 47}, {"shards": 1}, {"shards": 100_000}, {"attempts": 10}])
def test_check_of_submission_at_limits_passes(changed):
    submission = replace(SUBMISSION, **changed)
    Kubernetes().check(submission)
    longest = max(len(name) for name in names(submission))
    assert longest <= 63
    assert len(f"{names(submission)[0]}-{submission.shards - 1}") <= 63  # a pod's host name


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"namespace": "Renders"}, "--namespace"),
        ({"namespace": "a.b"}, "--namespace"),
        ({"namespace": ""}, "--namespace"),
        ({"service_account": "-x"}, "--service-account"),
        ({"secret": "s3_keys"}, "--secret"),
        ({"context": "--kubeconfig=x"}, "--context"),
        ({"context": ""}, "--context"),
        ({"node_selector": ("gpu",)}, "--node-selector"),
        ({"node_selector": ("=l4",)}, "--node-selector"),
        ({"node_selector": ("a/b/c=d",)}, "--node-selector"),
        ({"tolerations": ("a=b:Never",)}, "--toleration"),
        ({"tolerations": ("",)}, "--toleration"),
    ],
)
def test_invalid_setting_is_refused_with_its_option(settings, flag):
    with pytest.raises(ConfigInvalid) as caught:
        Kubernetes(**settings)
    assert caught.value.where == flag


def test_node_selectors_and_tolerations_are_rendered_in_pod():
    platform = Kubernetes(
        node_selector=("karpenter.sh/capacity-type=spot", "gpu=", "eks.amazonaws.com/capacityType=SPOT"),
        tolerations=("slow", "dedicated=gpu:NoSchedule", "night:NoExecute", "team=render"),
    )
    pod = next(yaml.safe_load_all(platform.render(SUBMISSION)["job.yaml"]))["spec"]["template"]["spec"]
    wanted = {"karpenter.sh/capacity-type": "spot", "gpu": "", "eks.amazonaws.com/capacityType": "SPOT"}
    assert pod["nodeSelector"] == wanted
    assert pod["tolerations"][1:] == [
        {"key": "slow", "operator": "Exists"},
        {"key": "dedicated", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
        {"key": "night", "operator": "Exists", "effect": "NoExecute"},
        {"key": "team", "operator": "Equal", "value": "render"},
    ]


def test_problem_of_place_refuses_local_path_and_accepts_s3():
    assert "this machine" in str(Kubernetes().problem_of_place("/data/out"))
    assert Kubernetes().problem_of_place("s3://bucket/out") is None


# -- the files ---------------------------------------------------------------------------------------------------------


def test_render_is_reproducible_and_contains_no_credential(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-one-who-submits")
    platform = Kubernetes(secret="s3-keys")
    submission = replace(SUBMISSION, environment={"B": "1", "A": "2"})
    files = platform.render(submission)
    assert files == platform.render(replace(submission, environment={"A": "2", "B": "1"}))
    assert files.keys() == {"job.yaml", "submit.sh"}
    assert "a-secret-of-the-one-who-submits" not in "".join(files.values())
    assert "&id" not in files["job.yaml"]  # YAML's references: people read this file


def test_rendered_yaml_with_special_characters_reads_back_unchanged():
    submission = replace(SUBMISSION, environment={"ODD": "a: b # c\n---\n'x'", "NUMBER": "0123", "YES": "yes"})
    run, report = yaml.safe_load_all(Kubernetes().render(submission)["job.yaml"])
    for job in (run, report):
        found = {entry["name"]: entry["value"] for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]}
        assert found == dict(submission.environment)


def test_submit_sh_passes_shellcheck():
    assert complaints(Kubernetes(context="it's").render(SUBMISSION)["submit.sh"]) == ""


# -- asking and submitting ---------------------------------------------------------------------------------------------


def test_ask_sends_server_dry_run_of_jobs(tools):
    platform = Kubernetes(namespace="renders", context="night")
    platform.ask(SUBMISSION)
    (call,) = tools.calls()
    wanted = "kubectl --context night --namespace renders create --dry-run=server -f - -o name"
    assert call.words == tuple(wanted.split())
    assert call.stdin.decode() == platform.render(SUBMISSION)["job.yaml"]


def test_ask_with_missing_service_account_or_secret_is_refused(tools):
    platform = Kubernetes(service_account="renderer", secret="s3-keys")
    platform.ask(SUBMISSION)
    assert [call.words[3:6] for call in tools.calls()[:2]] == [
        ("get", "serviceaccount", "renderer"),
        ("get", "secret", "s3-keys"),
    ]
    tools.plan(4, says='Error from server (NotFound): secrets "s3-keys" not found', code=1)
    with pytest.raises(ConfigInvalid, match="s3-keys"):
        platform.ask(SUBMISSION)
    assert len(tools.calls()) == 5  # the Jobs were not asked about


def test_ask_without_permission_to_see_secret_passes(tools):
    says = 'Error from server (Forbidden): secrets "s3-keys" is forbidden: User "ann" cannot get resource "secrets"'
    tools.plan(0, says=says, code=1)
    Kubernetes(secret="s3-keys").ask(SUBMISSION)
    assert len(tools.calls()) == 2


@pytest.mark.parametrize(
    ("says", "error", "exit_code"),
    [
        (FORBIDDEN, ClusterDenied, 2),
        (UNREACHABLE, ClusterUnavailable, 3),
        ('Error from server (NotFound): namespaces "default" not found', ConfigInvalid, 2),
    ],
)
def test_ask_with_kubectl_error_raises_error_of_its_cause(tools, says, error, exit_code):
    tools.plan(0, says=says, code=1)
    with pytest.raises(error) as caught:
        Kubernetes().ask(SUBMISSION)
    assert says in caught.value.message
    assert caught.value.exit_code == exit_code


def test_ask_without_kubectl_says_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigInvalid, match="kubectl is not installed"):
        Kubernetes().ask(SUBMISSION)


def test_submit_creates_run_then_report(tools):
    platform = Kubernetes(namespace="renders")
    files = platform.render(SUBMISSION)
    run, report = names()
    assert platform.submit(SUBMISSION, files) == (SubmittedJob("run", run), SubmittedJob("report", report))
    calls = tools.calls()
    assert [call.words for call in calls] == [
        ("kubectl", "--namespace", "renders", "create", "-f", "-", "-o", "name")
    ] * 2
    assert [json.loads(call.stdin) for call in calls] == list(yaml.safe_load_all(files["job.yaml"]))


def test_submit_sends_edited_file_as_edited(tools):
    """The files are submitted as they are, also where a user has edited them."""
    files = dict(Kubernetes().render(SUBMISSION))
    files["job.yaml"] = files["job.yaml"].replace("memory: 60Gi", "memory: 90Gi")
    Kubernetes().submit(SUBMISSION, files)
    assert json.loads(tools.calls()[0].stdin)["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"][
        "memory"
    ] == "90Gi"  # fmt: skip


@pytest.mark.parametrize(("says", "error"), [(FORBIDDEN, ClusterDenied), (UNREACHABLE, ClusterUnavailable)])
def test_refused_report_deletes_run(tools, says, error):
    tools.plan(1, says=says, code=1)
    with pytest.raises(error, match=says.split("(")[0]):
        Kubernetes().submit(SUBMISSION, Kubernetes().render(SUBMISSION))
    last = tools.calls()[2].words
    assert last[:6] == ("kubectl", "--namespace", "default", "delete", "job", names()[0])
    assert "--ignore-not-found" in last


def test_refused_run_deletes_nothing(tools):
    tools.plan(0, says=FORBIDDEN, code=1)
    with pytest.raises(ClusterDenied):
        Kubernetes().submit(SUBMISSION, Kubernetes().render(SUBMISSION))
    assert len(tools.calls()) == 1


def test_unanswered_run_is_deleted(tools):
    tools.plan(0, says=UNREACHABLE, code=1)
    with pytest.raises(ClusterUnavailable):
        Kubernetes().submit(SUBMISSION, Kubernetes().render(SUBMISSION))
    assert [call.words[3] for call in tools.calls()] == ["create", "delete"]


def test_job_that_cannot_be_deleted_is_named_with_delete_command(tools):
    tools.plan(1, says=FORBIDDEN, code=1)
    tools.plan(2, says=UNREACHABLE, code=1)
    with pytest.raises(ClusterDenied) as caught:
        Kubernetes().submit(SUBMISSION, Kubernetes().render(SUBMISSION))
    assert "could not be removed" in caught.value.message
    assert UNREACHABLE in caught.value.message and FORBIDDEN in caught.value.message
    assert f"kubectl --namespace default delete job {names()[0]}" in str(caught.value.todo)


def test_watch_gives_get_logs_delete_and_status_commands():
    platform = Kubernetes(namespace="renders", context="night")
    run, report = names()
    lines = platform.watch(SUBMISSION, (SubmittedJob("run", run), SubmittedJob("report", report)))
    words = [shlex.split(line) for line in lines]
    assert all(line[:5] == ["kubectl", "--context", "night", "--namespace", "renders"] for line in words[:3])
    assert [line[5] for line in words[:3]] == ["get", "logs", "delete"]
    assert {run, report} <= set(words[2])
    assert words[3][:3] == ["video-lab", "status", SUBMISSION.out]


# -- submit.sh ---------------------------------------------------------------------------------------------------------


def test_submit_sh_dry_runs_copies_manifest_and_creates_both_jobs(tools, tmp_path):
    run, report = names()
    tools.plan(2, prints=f"job.batch/{run}\njob.batch/{report}")
    done = tools.run_script(tmp_path / "job files", Kubernetes(context="night").render(SUBMISSION))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"job.batch/{run}", f"job.batch/{report}"]
    start = ("kubectl", "--context", "night", "--namespace", "default", "create")
    assert [call.words for call in tools.calls()] == [
        (*start, "--dry-run=server", "-f", "job.yaml"),
        ("aws", "s3", "cp", "manifest.jsonl", SUBMISSION.manifest),
        (*start, "-f", "job.yaml", "-o", "name"),
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_submit_sh_with_failed_earlier_step_creates_nothing(tools, tmp_path, failing):
    tools.plan(failing, says=FORBIDDEN, code=1)
    done = tools.run_script(tmp_path / "files", Kubernetes().render(SUBMISSION))
    assert done.returncode == 1
    assert FORBIDDEN in done.stderr
    assert len(tools.calls()) == failing + 1


def test_submit_sh_with_one_refused_job_deletes_only_accepted_job(tools, tmp_path):
    tools.plan(2, prints="job.batch/night-1", says=FORBIDDEN, code=1)  # as kubectl does: it goes on after an error
    done = tools.run_script(tmp_path / "files", Kubernetes().render(SUBMISSION))
    assert done.returncode == 1
    assert tools.calls()[3].words == ("kubectl", "--namespace", "default", "delete", "job.batch/night-1")


def test_submit_sh_with_nothing_accepted_deletes_nothing(tools, tmp_path):
    tools.plan(2, says=FORBIDDEN, code=1)
    done = tools.run_script(tmp_path / "files", Kubernetes().render(SUBMISSION))
    assert done.returncode == 1
    assert len(tools.calls()) == 3
