from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid
from runner.launch.slurm import Slurm
from runner.launch.submission import Submission
from tests.launch.recorded_tools import RecordedTools, complaints

MANIFEST = "/lustre/out/runs/night/manifest.jsonl"
SUBMISSION = Submission(
    name="night-renders",
    run_id="night",
    manifest=MANIFEST,
    out="/lustre/out",
    models="/lustre/models",
    image="/lustre/images/video-lab.sif",
    shards=3,
    attempts=3,
    inputs=("/lustre/in/a/ref.png", "/lustre/in/a/clip.mp4", "/lustre/in/b/ref.png", "s3://bucket/clip.mp4"),
    environment={"AWS_ENDPOINT_URL": "https://store.example/it's"},
)
ON_S3 = replace(SUBMISSION, manifest="s3://b/out/runs/night/manifest.jsonl", out="s3://b/out", models="s3://b/models")


def directives(script: str) -> dict[str, str]:
    """The flags of the script's #SBATCH lines, read as sbatch reads them: to the first command, the last one counts."""
    found: dict[str, str] = {}
    for line in script.splitlines()[1:]:
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = word.partition("=")
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


# What is rendered


def test_render_is_reproducible_and_passes_shellcheck():
    settings = Slurm(partition="gpu", bind=("/lustre/with space",), cache="/local/cache")
    files = settings.render(SUBMISSION)
    assert files == settings.render(SUBMISSION)
    assert sorted(files) == ["report.sbatch", "run.sbatch", "submit.sh"]
    for text in (*files.values(), *Slurm().render(ON_S3).values()):
        assert complaints(text) == ""


def test_run_sbatch_requests_resources_of_task():
    settings = Slurm(partition="gpu", account="team", qos="long", constraint="h100&nvme", sbatch_flags=("--tmp=200G",))
    asked = directives(settings.render(SUBMISSION)["run.sbatch"])
    assert asked == {
        "--job-name": "night-renders",
        "--partition": "gpu",
        "--account": "team",
        "--qos": "long",
        "--constraint": "h100&nvme",
        "--nodes": "1",
        "--ntasks": "1",
        "--array": "0-2",
        "--cpus-per-task": "8",
        "--mem": "60G",
        "--gres": "gpu:1",
        "--time": "24:00:00",
        "--signal": "TERM@80",  # 20 s to drain, and a minute to publish
        "--requeue": "",
        "--open-mode": "append",
        "--export": "ALL",
        "--output": "/lustre/out/runs/night/night-renders-%A_%a.log",
        "--tmp": "200G",
    }


def test_report_sbatch_requests_no_gpu_and_has_no_dependency():
    asked = directives(Slurm(partition="gpu", report_partition="cpu").render(SUBMISSION)["report.sbatch"])
    assert (asked["--partition"], asked["--job-name"]) == ("cpu", "night-renders-report")
    assert not {"--gres", "--array", "--dependency", "--constraint", "--signal"} & asked.keys()
    assert directives(Slurm(partition="gpu").render(SUBMISSION)["report.sbatch"])["--partition"] == "gpu"


def test_log_path_is_in_run_folder_or_in_folder_of_sbatch_call():
    assert directives(Slurm().render(ON_S3)["run.sbatch"])["--output"] == "night-renders-%A_%a.log"
    odd = replace(SUBMISSION, out="/lustre/100%")
    assert directives(Slurm().render(odd)["run.sbatch"])["--output"].startswith("/lustre/100%%/runs/")


def test_run_sbatch_with_1_shard_and_1_attempt_is_array_without_requeue():
    asked = directives(Slurm().render(replace(SUBMISSION, shards=1, attempts=1))["run.sbatch"])
    assert asked["--array"] == "0-0"
    assert "--no-requeue" in asked
    assert "--requeue" not in asked


def test_sbatch_flag_of_user_overrides_rendered_flag():
    settings = Slurm(sbatch_flags=("--gres=gpu:h100:1", "--mem=100G"))
    asked = directives(settings.render(SUBMISSION)["run.sbatch"])
    assert (asked["--gres"], asked["--mem"]) == ("gpu:h100:1", "100G")
    assert "--mem=100G" not in settings.render(SUBMISSION)["report.sbatch"]


def test_rendered_files_contain_no_credential(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-token-token")
    for text in Slurm().render(SUBMISSION).values():
        assert "hush" not in text
        assert "token-token" not in text


# What is checked


def test_check_of_default_settings_passes():
    Slurm().check(SUBMISSION)
    Slurm(partition="a,b", sbatch_flags=("--exclusive", "--gres=gpu:h100:1"), cache="/local").check(ON_S3)
    Slurm().check(replace(SUBMISSION, image="docker://registry.example/video-lab:1.2"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "night renders"}, "name"),
        ({"name": "a" * 65}, "64"),
        ({"name": "-x"}, "name"),
        ({"attempts": 0}, "1 to 10"),
        ({"attempts": 11}, "1 to 10"),
        ({"shards": 0}, "at least 1"),
        ({"gpus_per_task": 0}, "gpus per task"),
        ({"time_limit_s": 199}, "at least 200 s"),
        ({"drain_s": 65500.0, "time_limit_s": 10**6}, "at most 65475"),
        ({"image": "docker://registry.example/video-lab"}, "no tag"),
        ({"image": "registry.example/video-lab:1.2"}, "docker://"),
        ({"image": "video-lab.sif"}, "full path"),
        ({"out": "/lustre/a,b"}, "','"),
        ({"models": "models"}, "full path"),
        ({"inputs": ("/lustre/a:b/x.mp4",)}, "':'"),
        ({"models": "/lustre/$HOME"}, "interpret"),
        ({"run_flags": ("--recipe", "`id`")}, "interpret"),
        ({"environment": {"A-B": "1"}}, "variable"),
        ({"spot": True}, "partition or QOS"),
    ],
)
def test_check_of_invalid_submission_is_refused(changes, words):
    with pytest.raises(ConfigInvalid) as caught:
        Slurm().check(replace(SUBMISSION, **changes))
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"partition": "gpu night"}, "partition"),
        ({"account": ""}, "account"),
        ({"qos": "a\nb"}, "qos"),
        ({"sbatch_flags": ("-p gpu",)}, "flag"),
        ({"sbatch_flags": ("--comment=a\n#SBATCH --uid=0",)}, "flag"),
        ({"sbatch_flags": ("--array=0-9",)}, "--array is set"),
        ({"sbatch_flags": ("--no-requeue",)}, "--no-requeue is set"),
        ({"bind": ("data",)}, "full path"),
        ({"bind": ("/a:/b",)}, "':'"),
        ({"cache": "scratch"}, "full path"),
    ],
)
def test_check_of_invalid_setting_is_refused(settings, words):
    with pytest.raises(ConfigInvalid) as caught:
        Slurm(**settings).check(SUBMISSION)
    assert words in caught.value.message


def test_check_of_spot_with_partition_or_qos_passes():
    Slurm(partition="preemptible").check(replace(SUBMISSION, spot=True))
    Slurm(qos="scavenger").check(replace(SUBMISSION, spot=True))


def test_place_of_local_path_is_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slurm = Slurm()
    assert slurm.place("out") == str(tmp_path / "out")
    assert slurm.place("file:///lustre/out") == "/lustre/out"
    assert slurm.place("s3://bucket/out") == "s3://bucket/out"
    assert slurm.problem_of_place("/lustre/out") is None
    assert slurm.problem_of_place("s3://bucket/a,b") is None
    assert "','" in str(slurm.problem_of_place("a,b"))
    assert "not supported" in str(slurm.problem_of_place("ftp://host/x"))


# What becomes of a task: the script itself, with programs of Slurm that write down their calls

PROGRAMS = {
    # its own flags, each with =, are dropped; the rest is run as the step
    "srun": 'while [[ $1 != apptainer ]]; do shift; done\nexec "$@"',
    "squeue": 'echo "squeue $*" >>"$CALLS"\necho "$STATE"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\nexit "$SCONTROL"',
    "apptainer": """
for word in "$@"; do [[ $word == *:/cache ]] && cache=${word%:/cache}; done
touch "$cache/writable" && echo "cache $cache" >>"$CALLS"
echo "variables ${HF_HOME-none} ${TMPDIR-none} $AWS_ENDPOINT_URL $SECRET" >>"$CALLS"
trap 'echo "drains" >>"$CALLS"; exit 143' TERM
[[ $CODE == wait ]] || exit "$CODE"
touch "$CALLS.ready"
while :; do sleep 0.05; done""",
}


class Task:
    """A task of the array, as Slurm would start it."""

    def __init__(self, folder: Path, submission: Submission = SUBMISSION, script: str = "run.sbatch") -> None:
        self.calls, self.script = folder / "calls", folder / script
        self.script.write_text(Slurm().render(submission)[script], encoding="utf-8")
        for name, body in PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
            (folder / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "SLURM_JOB_ID": "101",
            "SLURM_ARRAY_JOB_ID": "99",
            "SLURM_ARRAY_TASK_ID": "2",
            "TMPDIR": str(folder),
            "HF_HOME": "/home/me/huggingface",
            "SECRET": "s3cret",
            "STATE": "RUNNING",
            "SCONTROL": "0",
        }

    def begin(self, code: object, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.script)],
            env={**self.environment, "CODE": str(code), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, code: object, **variables: str) -> tuple[int, list[str]]:
        """Its exit code, and what was asked of Slurm."""
        process = self.begin(code, **variables)
        process.communicate(timeout=60)
        return process.returncode, self.asked()

    def asked(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith(("squeue", "scontrol"))]


REQUEUED = ["squeue --noheader --states=all --jobs=99_2 --format=%T", "scontrol requeue 99_2"]


@pytest.fixture
def task(tmp_path) -> Task:
    return Task(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_exit_code_of_final_result_is_passed_on_without_requeue(task, code):
    assert task.run(code) == (code, [])


@pytest.mark.parametrize("code", [3, 143, 134, 137, 255])
def test_task_with_retryable_exit_code_is_requeued(task, code):
    assert task.run(code) == (code, REQUEUED)


@pytest.mark.parametrize(("restarts", "asked"), [("0", REQUEUED), ("1", REQUEUED), ("2", []), ("7", [])])
def test_task_is_requeued_until_attempts_are_used(task, restarts, asked):
    assert task.run(3, SLURM_RESTART_COUNT=restarts) == (3, asked)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "PREEMPTED", ""])
def test_task_no_longer_running_in_slurm_is_not_requeued(task, state):
    """After scancel, or a preemption without a grace period: a requeue would undo the one and repeat the other."""
    assert task.run(143, STATE=state) == (143, REQUEUED[:1])


def test_refused_requeue_keeps_exit_code(task):
    assert task.run(3, SCONTROL="1") == (3, REQUEUED)


def test_report_job_is_requeued_by_its_own_id(tmp_path):
    task = Task(tmp_path, script="report.sbatch")
    assert task.run(3)[1][-1] == "scontrol requeue 101"
    assert task.run(0)[0] == 0


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_run_sbatch_with_sigterm_waits_for_step_to_drain(task):
    """At the end of a job Slurm signals the script as well as the step; the step's exit code decides."""
    process = task.begin("wait")
    try:
        wait_for(Path(f"{task.calls}.ready"))
        for _ in range(2):
            os.kill(process.pid, signal.SIGCONT)
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.1)
        assert process.poll() is None
        assert task.asked() == []
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143
    assert task.calls.read_text().splitlines().count("drains") == 1
    assert task.asked() == REQUEUED


def test_container_gets_cache_folder_and_submitter_credentials(task):
    assert task.run(0)[0] == 0
    cache, variables = task.calls.read_text().splitlines()
    assert variables == "variables none none https://store.example/it's s3cret"  # the image's HF_HOME and TMPDIR hold
    assert cache.startswith(f"cache {task.script.parent}/video-lab.")
    assert not Path(cache.removeprefix("cache ")).exists()


def test_container_command_has_binds_then_image_then_run_arguments(tmp_path):
    script = Slurm(bind=("/data/x y",)).render(SUBMISSION)["run.sbatch"]
    begin = script.index("srun --ntasks")
    words = shlex.split(script[begin : script.index("&\nstep=")].replace("\\\n", ""))
    container = words[words.index("apptainer") :]
    image = container.index(SUBMISSION.image)
    binds = ["/data/x y", "/lustre/in/a", "/lustre/in/b", "/lustre/models", "/lustre/out", "$cache:/cache"]
    assert container[:image] == ["apptainer", "run", "--nv", *(w for bind in binds for w in ("--bind", bind))]
    assert container[image + 1 : image + 5] == ["run", MANIFEST, "--out", "/lustre/out"]
    assert "--run-id" in container[image:]


# What is asked and submitted; the tools are recorded


@pytest.fixture
def tools(tmp_path, monkeypatch) -> RecordedTools:
    recorded = RecordedTools(tmp_path, "sbatch", "scontrol", "scancel")
    monkeypatch.setenv("PATH", recorded.path)
    return recorded


def test_ask_tests_both_scripts_with_sbatch(tools):
    tools.plan(1, prints="MaxArraySize            = 3\nMaxDBDMsgs = 20")
    slurm = Slurm(partition="gpu")
    slurm.ask(SUBMISSION)
    calls = tools.calls()
    assert [call.words for call in calls[2:]] == [("sbatch", "--test-only")] * 2
    files = slurm.render(SUBMISSION)
    assert [call.stdin.decode() for call in calls[2:]] == [files["run.sbatch"], files["report.sbatch"]]


def test_ask_with_array_larger_than_cluster_limit_is_refused(tools):
    tools.plan(1, prints="MaxArraySize            = 2")
    with pytest.raises(ConfigInvalid, match="at most 2 tasks"):
        Slurm().ask(SUBMISSION)
    assert len(tools.calls()) == 2


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("sbatch: error: invalid partition specified: nowhere\nInvalid partition name specified", ConfigInvalid),
        ("Batch job submission failed: Invalid account or account/partition combination specified", ClusterDenied),
        ("Batch job submission failed: User's group not permitted to use this partition", ClusterDenied),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", ClusterUnavailable),
    ],
)
def test_sbatch_error_becomes_runner_error_of_its_cause(tools, said, error):
    tools.plan(2, says=said, code=1)
    with pytest.raises(error) as caught:
        Slurm().ask(SUBMISSION)
    assert said.splitlines()[-1] in caught.value.message


def test_ask_without_sbatch_says_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigInvalid, match="sbatch is not installed"):
        Slurm().ask(SUBMISSION)


def test_submit_makes_report_depend_on_end_of_array(tools):
    tools.plan(0, prints="4711;cluster")
    tools.plan(1, prints="4712")
    slurm = Slurm()
    jobs = slurm.submit(SUBMISSION, slurm.render(SUBMISSION))
    assert [(job.role, job.id) for job in jobs] == [("run", "4711"), ("report", "4712")]
    assert [call.words for call in tools.calls()] == [
        ("sbatch", "--parsable"),
        ("sbatch", "--parsable", "--dependency=afterany:4711"),
    ]
    lines = slurm.watch(SUBMISSION, jobs)
    assert "squeue --jobs=4711,4712" in lines
    assert "tail -F /lustre/out/runs/night/night-renders-4711_0.log" in lines
    assert "scancel 4711" in lines


def test_refused_report_cancels_array(tools):
    tools.plan(0, prints="4711")
    tools.plan(1, says="Invalid partition name specified", code=1)
    with pytest.raises(ConfigInvalid, match="Invalid partition"):
        Slurm().submit(SUBMISSION, Slurm().render(SUBMISSION))
    assert tools.calls()[-1].words == ("scancel", "4711")


def test_submit_sh_copies_manifest_and_cancels_array_of_refused_report(tmp_path):
    tools = RecordedTools(tmp_path, "sbatch", "scancel", "aws")
    submission = replace(
        SUBMISSION, out=str(tmp_path / "out"), manifest=str(tmp_path / "out/runs/night/manifest.jsonl")
    )
    tools.plan(0, prints="4711;cluster")
    tools.plan(1, prints="4712;cluster")
    done = tools.run_script(tmp_path / "job", dict(Slurm().render(submission)))
    assert (done.returncode, done.stdout) == (0, "run 4711, report 4712\n"), done.stderr
    assert Path(submission.manifest).read_text() == "{}\n"
    assert [call.words[1:] for call in tools.calls()] == [
        ("--parsable", "run.sbatch"),
        ("--parsable", "--dependency=afterany:4711", "report.sbatch"),
    ]
    tools.plan(3, prints="4713")
    tools.plan(4, says="refused", code=1)
    done = tools.run_script(tmp_path / "job", dict(Slurm().render(ON_S3)))
    assert done.returncode == 1
    assert [call.words for call in tools.calls()[2:]] == [
        ("aws", "s3", "cp", "manifest.jsonl", ON_S3.manifest),
        ("sbatch", "--parsable", "run.sbatch"),
        ("sbatch", "--parsable", "--dependency=afterany:4713", "report.sbatch"),
        ("scancel", "4713"),
    ]
