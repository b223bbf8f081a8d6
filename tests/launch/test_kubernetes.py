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
def test_what_kubernetes_would_refuse_is_refused_before(changed, flag):
    with pytest.raises(ConfigInvalid) as caught:
        Kubernetes().check(replace(SUBMISSION, **changed))
    assert caught.value.where == flag
    assert caught.value.todo


@pytest.mark.parametrize("changed", [{"name": "n" * 47}, {"shards": 1}, {"shards": 100_000}, {"attempts": 10}])
def test_the_ends_of_the_ranges_pass(changed):
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
def test_settings_that_cannot_work_are_refused(settings, flag):
    with pytest.raises(ConfigInvalid) as caught:
        Kubernetes(**settings)
    assert caught.value.where == flag


def test_settings_as_they_are_written():
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


def test_local_places_are_refused_and_s3_is_not():
    assert "this machine" in str(Kubernetes().problem_of_place("/data/out"))
    assert Kubernetes().problem_of_place("s3://bucket/out") is None


# -- the files ---------------------------------------------------------------------------------------------------------


def test_the_same_submission_gives_the_same_bytes_and_no_credential(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-one-who-submits")
    platform = Kubernetes(secret="s3-keys")
    submission = replace(SUBMISSION, environment={"B": "1", "A": "2"})
    files = platform.render(submission)
    assert files == platform.render(replace(submission, environment={"A": "2", "B": "1"}))
    assert files.keys() == {"job.yaml", "submit.sh"}
    assert "a-secret-of-the-one-who-submits" not in "".join(files.values())
    assert "&id" not in files["job.yaml"]  # YAML's references: people read this file


def test_the_yaml_reads_back_whatever_the_words_hold():
    submission = replace(SUBMISSION, environment={"ODD": "a: b # c\n---\n'x'", "NUMBER": "0123", "YES": "yes"})
    run, report = yaml.safe_load_all(Kubernetes().render(submission)["job.yaml"])
    for job in (run, report):
        found = {entry["name"]: entry["value"] for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]}
        assert found == dict(submission.environment)


def test_shellcheck_finds_nothing_in_the_script():
    assert complaints(Kubernetes(context="it's").render(SUBMISSION)["submit.sh"]) == ""


# -- asking and submitting ---------------------------------------------------------------------------------------------


def test_the_cluster_itself_is_asked_and_nothing_is_changed(tools):
    platform = Kubernetes(namespace="renders", context="night")
    platform.ask(SUBMISSION)
    (call,) = tools.calls()
    wanted = "kubectl --context night --namespace renders create --dry-run=server -f - -o name"
    assert call.words == tuple(wanted.split())
    assert call.stdin.decode() == platform.render(SUBMISSION)["job.yaml"]


def test_an_account_and_a_secret_that_are_named_must_exist(tools):
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


def test_who_may_not_see_secrets_may_still_submit(tools):
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
def test_what_the_cluster_answers_is_told_by_its_cause(tools, says, error, exit_code):
    tools.plan(0, says=says, code=1)
    with pytest.raises(error) as caught:
        Kubernetes().ask(SUBMISSION)
    assert says in caught.value.message
    assert caught.value.exit_code == exit_code


def test_without_kubectl_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigInvalid, match="kubectl is not installed"):
        Kubernetes().ask(SUBMISSION)


def test_the_run_is_created_then_its_report(tools):
    platform = Kubernetes(namespace="renders")
    files = platform.render(SUBMISSION)
    run, report = names()
    assert platform.submit(SUBMISSION, files) == (SubmittedJob("run", run), SubmittedJob("report", report))
    calls = tools.calls()
    assert [call.words for call in calls] == [
        ("kubectl", "--namespace", "renders", "create", "-f", "-", "-o", "name")
    ] * 2
    assert [json.loads(call.stdin) for call in calls] == list(yaml.safe_load_all(files["job.yaml"]))


def test_what_is_in_the_files_is_what_is_submitted(tools):
    """Also where somebody has changed them."""
    files = dict(Kubernetes().render(SUBMISSION))
    files["job.yaml"] = files["job.yaml"].replace("memory: 60Gi", "memory: 90Gi")
    Kubernetes().submit(SUBMISSION, files)
    assert json.loads(tools.calls()[0].stdin)["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"][
        "memory"
    ] == "90Gi"  # fmt: skip


@pytest.mark.parametrize(("says", "error"), [(FORBIDDEN, ClusterDenied), (UNREACHABLE, ClusterUnavailable)])
def test_where_the_report_is_refused_the_run_is_taken_back(tools, says, error):
    tools.plan(1, says=says, code=1)
    with pytest.raises(error, match=says.split("(")[0]):
        Kubernetes().submit(SUBMISSION, Kubernetes().render(SUBMISSION))
    last = tools.calls()[2].words
    assert last[:6] == ("kubectl", "--namespace", "default", "delete", "job", names()[0])
    assert "--ignore-not-found" in last


def test_a_refused_run_leaves_nothing_to_take_back(tools):
    tools.plan(0, says=FORBIDDEN, code=1)
    with pytest.raises(ClusterDenied):
        Kubernetes().submit(SUBMISSION, Kubernetes().render(SUBMISSION))
    assert len(tools.calls()) == 1


def test_a_run_that_may_have_been_accepted_is_taken_back(tools):
    tools.plan(0, says=UNREACHABLE, code=1)
    with pytest.raises(ClusterUnavailable):
        Kubernetes().submit(SUBMISSION, Kubernetes().render(SUBMISSION))
    assert [call.words[3] for call in tools.calls()] == ["create", "delete"]


def test_what_cannot_be_taken_back_is_named_with_the_command_that_removes_it(tools):
    tools.plan(1, says=FORBIDDEN, code=1)
    tools.plan(2, says=UNREACHABLE, code=1)
    with pytest.raises(ClusterDenied) as caught:
        Kubernetes().submit(SUBMISSION, Kubernetes().render(SUBMISSION))
    assert "could not be removed" in caught.value.message
    assert UNREACHABLE in caught.value.message and FORBIDDEN in caught.value.message
    assert f"kubectl --namespace default delete job {names()[0]}" in str(caught.value.todo)


def test_lines_to_paste():
    platform = Kubernetes(namespace="renders", context="night")
    run, report = names()
    lines = platform.watch(SUBMISSION, (SubmittedJob("run", run), SubmittedJob("report", report)))
    words = [shlex.split(line) for line in lines]
    assert all(line[:5] == ["kubectl", "--context", "night", "--namespace", "renders"] for line in words[:3])
    assert [line[5] for line in words[:3]] == ["get", "logs", "delete"]
    assert {run, report} <= set(words[2])
    assert words[3][:3] == ["video-lab", "status", SUBMISSION.out]


# -- submit.sh ---------------------------------------------------------------------------------------------------------


def test_the_script_asks_copies_the_manifest_and_creates_both(tools, tmp_path):
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
def test_the_script_creates_nothing_where_a_step_before_fails(tools, tmp_path, failing):
    tools.plan(failing, says=FORBIDDEN, code=1)
    done = tools.run_script(tmp_path / "files", Kubernetes().render(SUBMISSION))
    assert done.returncode == 1
    assert FORBIDDEN in done.stderr
    assert len(tools.calls()) == failing + 1


def test_the_script_takes_back_what_was_accepted_alone(tools, tmp_path):
    tools.plan(2, prints="job.batch/night-1", says=FORBIDDEN, code=1)  # as kubectl does: it goes on after an error
    done = tools.run_script(tmp_path / "files", Kubernetes().render(SUBMISSION))
    assert done.returncode == 1
    assert tools.calls()[3].words == ("kubectl", "--namespace", "default", "delete", "job.batch/night-1")


def test_the_script_takes_nothing_back_where_nothing_was_accepted(tools, tmp_path):
    tools.plan(2, says=FORBIDDEN, code=1)
    done = tools.run_script(tmp_path / "files", Kubernetes().render(SUBMISSION))
    assert done.returncode == 1
    assert len(tools.calls()) == 3
