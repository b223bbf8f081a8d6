"""Whole runs on a real Slurm of this machine, with two fake GPUs. Apptainer alone is replaced: by a script that takes
its words and runs the product, or a stub, from this checkout, and that passes signals on as Apptainer does."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runner.batch.shards import Shard
from runner.cli import main
from runner.errors import ClusterUnavailable, ConfigInvalid
from runner.launch.slurm import Slurm
from runner.launch.submission import Submission, SubmittedJob
from tests.slurm_cluster import RENDER, URGENT, SlurmCluster, slurm_cluster, wait_until
from tests.system_tests import system_test

__all__ = ["slurm_cluster"]  # a fixture

pytestmark = [system_test, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]

APPTAINER = f"""#!/usr/bin/env bash
[[ $1 == run ]] || exit 255
shift
while [[ $1 == --* ]]; do
  case $1 in
    --nv) shift ;;
    --bind)
      folder=${{2%%:*}}
      [[ -d $folder ]] || {{ echo "bind: no folder $folder" >&2; exit 255; }}
      [[ $2 == *:/cache ]] && export VIDEO_LAB_CACHE=$folder/video-lab TMPDIR=$folder
      shift 2
      ;;
    *) exit 255 ;;
  esac
done
[[ -f $1 ]] || exit 255
shift
echo "container of task ${{SLURM_ARRAY_TASK_ID-none}} on GPU ${{CUDA_VISIBLE_DEVICES-none}}"
{shlex.quote(sys.executable)} "$PROGRAM" "$@" &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"; code=$?
while ((code > 128)) && kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
exit "$code"
"""

# Jobs are generated once the file of the variable GO is there.
STUB = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
if sys.argv[1] != "run":
    from runner.cli import main
    sys.exit(main())
from tests.faults.stub_runs import run_command
from tests.stub_generator import StubGenerator
class Held(StubGenerator):
    def generate(self, *values, **more):
        while not os.path.exists(os.environ["GO"]):
            time.sleep(0.05)
        yield from super().generate(*values, **more)
sys.exit(run_command(sys.argv[2:], Held, {{}}))
"""

# Task 0 finds no storage, whenever it starts; task 1 is configured wrongly; task 2 is killed at its first start.
CODES = """
import os, signal, sys
task = os.environ.get("SLURM_ARRAY_TASK_ID")
if sys.argv[1] == "run" and task == "2" and "SLURM_RESTART_COUNT" not in os.environ:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit({"0": 3, "1": 2}.get(task, 0) if sys.argv[1] == "run" else 0)
"""

WAITING = """
import sys, time
if sys.argv[1] == "run":
    time.sleep(600)
"""


@dataclass(frozen=True)
class Site:
    """A cluster's user: programs, a shared folder, and an environment that reaches the tasks."""

    cluster: SlurmCluster
    folder: Path
    submission: Submission

    @property
    def run_folder(self) -> Path:
        return Path(self.submission.manifest).parent

    def log(self, run: str, task: int) -> str:
        return (self.run_folder / f"{self.submission.name}-{run}_{task}.log").read_text(encoding="utf-8")

    def keep_manifest(self, jobs: list[dict[str, object]]) -> None:
        self.run_folder.mkdir(parents=True)
        lines = "".join(json.dumps(job) + "\n" for job in jobs)
        Path(self.submission.manifest).write_text(lines, encoding="utf-8")

    def ends(self, run: str, tasks: int) -> list[tuple[str, str, str]]:
        """State, exit code and restarts of each task."""
        jobs = [self.cluster.job(f"{run}_{task}") for task in range(tasks)]
        return [(job["JobState"], job["ExitCode"], job["Restarts"]) for job in jobs]

    def use(self, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Containers run this Python code."""
        path = self.folder / "program.py"
        path.write_text(program, encoding="utf-8")
        monkeypatch.setenv("PROGRAM", str(path))


@pytest.fixture
def site(slurm_cluster, tmp_path, monkeypatch) -> Site:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "apptainer").write_text(APPTAINER, encoding="utf-8")
    (tmp_path / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PROGRAM", str(ROOT / "entrypoint.py"))
    (tmp_path / "image.sif").touch()
    (tmp_path / "models").mkdir()
    out = tmp_path / "out"
    submission = Submission(
        name="renders",
        run_id="night",
        manifest=str(out / "runs/night/manifest.jsonl"),
        out=str(out),
        models=str(tmp_path / "models"),
        image=str(tmp_path / "image.sif"),
        shards=2,
    )
    return Site(slurm_cluster, tmp_path, submission)


def submit(site: Site, settings: Slurm) -> tuple[str, str]:
    """As `video-lab submit` does; the ids of the array and of the report."""
    settings.check(site.submission)
    settings.ask(site.submission)
    run, report = settings.submit(site.submission, settings.render(site.submission))
    return run.id, report.id


def test_an_array_renders_all_jobs_and_the_report_follows_it(site, demo_models, demo_media):
    """By submit.sh, with the product's own entry point and models; one job of task 1 cannot succeed."""
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    options = {"size": "96x144", "max_frames": 5, "steps": 1, "keep_audio": False}
    jobs = [{"id": name, **place, "options": options} for name in "abcd"]
    jobs[3]["video"] = str(site.folder / "none.mp4")
    submission = replace(site.submission, models=str(demo_models), inputs=tuple(place.values()))
    settings = Slurm(partition=RENDER)
    settings.check(submission)
    settings.ask(submission)
    folder = site.folder / "job"
    folder.mkdir()
    (folder / "manifest.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    for name, text in settings.render(submission).items():
        (folder / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["bash", str(folder / "submit.sh")], cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    run, report = (words.split()[1] for words in done.stdout.split(","))
    site.cluster.wait_for_end(run, report)

    assert site.ends(run, 2) == [("COMPLETED", "0:0", "0"), ("FAILED", "1:0", "0")], site.log(run, 0)
    rendered = []
    for index in range(2):
        shard = Shard(index, 2)
        summary = json.loads((site.run_folder / f"{shard.name}.summary.json").read_text("utf-8"))
        assert [job["id"] for job in summary["jobs"]] == shard.take("abcd")
        rendered += [job["id"] for job in summary["jobs"] if job["status"] == "succeeded"]
    assert sorted(rendered) == ["a", "b", "c"]
    assert all((Path(site.submission.out) / f"jobs/{name}/output.mp4").stat().st_size > 0 for name in "abc")
    gpus = {site.log(run, task).partition("on GPU ")[2].split()[0] for task in range(2)}
    assert gpus == {"0", "1"}

    closing = site.cluster.job(report)
    assert closing["JobState"] == "COMPLETED"
    assert closing["StartTime"] >= max(site.cluster.job(f"{run}_{task}")["EndTime"] for task in range(2))
    found = json.loads((site.run_folder / "report.json").read_text("utf-8"))
    assert (found["counts"]["succeeded"], found["counts"]["failed"]) == (3, 1)
    assert len(found["processes"]) == 2
    assert (site.run_folder / "report.html").stat().st_size > 0


def submit_by_command(
    site: Site, jobs: list[dict[str, object]], *flags: str, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """`video-lab submit slurm`, as it is typed; the ids of the array and of the report."""
    manifest = site.folder / "jobs.jsonl"
    manifest.write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    asked = site.submission
    places = ["--out", asked.out, "--models", asked.models, "--image", asked.image]
    names = ["--name", asked.name, "--run-id", asked.run_id, "--shards", str(asked.shards)]
    code = main(["submit", "slurm", str(manifest), *places, *names, *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    ids = dict(line.split() for line in said.out.splitlines() if line.startswith(("run  ", "report ")))
    return ids["run"], ids["report"]


def test_a_preempted_task_drains_and_runs_again(site, demo_media, monkeypatch, capsys):
    """The partition's grace period is used: the running job is finished, the next one is left to the next start."""
    site.use(STUB, monkeypatch)
    monkeypatch.setenv("GO", str(site.folder / "go"))
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    options = {"keep_audio": False, "steps": 50}
    jobs = [{"id": name, **place, "prompt": "ok", "options": options} for name in "abcd"]
    run, report = submit_by_command(site, jobs, "--partition", RENDER, capsys=capsys)
    events = [site.run_folder / f"{Shard(index, 2).name}.events.jsonl" for index in range(2)]
    wait_until(lambda: all(path.exists() and '"job_prepared"' in path.read_text() for path in events), "a job of each")
    urgent = ["sbatch", "--parsable", f"--partition={URGENT}", "--gres=gpu:2", "--mem=1G", "--output=/dev/null"]
    other = site.cluster.run(*urgent, "--wrap=true").strip()
    wait_until(lambda: all('"stopping"' in site.log(run, task) for task in range(2)), "SIGTERM in both")
    (site.folder / "go").touch()
    site.cluster.wait_for_end(run, report, other)

    assert site.ends(run, 2) == [("COMPLETED", "0:0", "1")] * 2, site.log(run, 0)
    for task in range(2):
        log = site.log(run, task)
        first, requeue, second = log.partition(f"exit code 143 at start 1 of {site.submission.attempts}: requeued")
        assert requeue, log
        drained, then = Shard(task, 2).take("abcd")
        for job, here, there in ((drained, first, second), (then, second, first)):
            assert succeeded(here, job) == 1, log
            assert succeeded(there, job) == 0, log
    assert site.cluster.job(other)["StartTime"] < site.cluster.job(f"{run}_0")["StartTime"]
    assert json.loads((site.run_folder / "report.json").read_text("utf-8"))["counts"]["succeeded"] == 4


def succeeded(log: str, job: str) -> int:
    """How often the log says that the job was rendered."""
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return sum(event.get("event") == "job_succeeded" and event.get("job") == job for event in events)


def test_exit_codes_become_states_and_requeues(site, monkeypatch):
    site.use(CODES, monkeypatch)
    site.keep_manifest([])
    run, report = submit(replace(site, submission=replace(site.submission, shards=3, attempts=2)), Slurm())
    site.cluster.wait_for_end(run, report)
    assert site.ends(run, 3) == [("FAILED", "3:0", "1"), ("FAILED", "2:0", "0"), ("COMPLETED", "0:0", "1")]
    assert "exit code 3 at start 2 of 2: given up" in site.log(run, 0)
    assert "requeued" not in site.log(run, 1)
    assert "exit code 137 at start 1 of 2: requeued" in site.log(run, 2)
    assert site.cluster.state(report) == "COMPLETED"


def test_a_cancelled_run_is_not_requeued_and_its_report_is_made(site, monkeypatch):
    site.use(WAITING, monkeypatch)
    site.keep_manifest([])
    settings = Slurm(partition=RENDER)
    run, report = submit(site, settings)
    logs = [site.run_folder / f"{site.submission.name}-{run}_{task}.log" for task in range(2)]
    wait_until(lambda: all(log.exists() and "container of" in log.read_text() for log in logs), "both containers")
    jobs = (SubmittedJob("run", run), SubmittedJob("report", report))
    *looks, stop = settings.watch(site.submission, jobs)
    assert f"{run}_0" in site.cluster.run(*shlex.split(looks[0]))
    site.cluster.run(*shlex.split(stop))
    site.cluster.wait_for_end(run, report)
    assert [state for state, _, _ in site.ends(run, 2)] == ["CANCELLED"] * 2
    assert [restarts for _, _, restarts in site.ends(run, 2)] == ["0"] * 2
    assert site.cluster.state(report) == "COMPLETED"


def test_an_array_whose_report_is_refused_is_taken_back(site, monkeypatch):
    site.use(WAITING, monkeypatch)
    site.keep_manifest([])
    settings = Slurm(partition=RENDER, report_partition="nowhere")
    before = site.cluster.run("squeue", "--noheader", "--states=all", "--array", "--format=%A %T")
    with pytest.raises(ConfigInvalid, match="nvalid partition"):
        settings.submit(site.submission, settings.render(site.submission))
    after = site.cluster.run("squeue", "--noheader", "--states=all", "--array", "--format=%A %T")
    (run,) = {line.split()[0] for line in set(after.splitlines()) - set(before.splitlines())} - {""}
    site.cluster.wait_for_end(run)
    assert {state for state, _, _ in site.ends(run, 2)} == {"CANCELLED"}


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({"partition": "nowhere"}, {}, "partition"),
        ({"constraint": "no-such-feature"}, {}, "feature"),
        ({}, {"shards": 1002}, "MaxArraySize"),
        ({}, {"gpus_per_task": 3}, "node configuration"),
        ({"report_partition": "nowhere"}, {}, "partition"),
    ],
)
def test_what_the_cluster_would_refuse_is_found_before(site, settings, changes, words):
    queue = site.cluster.run("squeue", "--noheader", "--states=all", "--format=%A")
    with pytest.raises(ConfigInvalid) as caught:
        Slurm(**settings).ask(replace(site.submission, **changes))
    assert words in caught.value.message
    assert site.cluster.run("squeue", "--noheader", "--states=all", "--format=%A") == queue


def test_a_controller_that_does_not_answer(site, monkeypatch):
    conf = Path(site.cluster.environment["SLURM_CONF"]).read_text("utf-8")
    lines = [line if not line.startswith("SlurmctldPort=") else "SlurmctldPort=1" for line in conf.splitlines()]
    (site.folder / "slurm.conf").write_text("\n".join([*lines, "MessageTimeout=2", ""]), encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(site.folder / "slurm.conf"))
    with pytest.raises(ClusterUnavailable):
        Slurm().ask(site.submission)
