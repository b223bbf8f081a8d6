"""Slurm scripts: the text of `run.sbatch`, `report.sbatch` and `submit.sh`.

In:   a checked `Submission` and `SlurmSettings`. Out: text; the same text for the same values.
Never: the cluster; credentials: tasks inherit the submitter's environment.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from runner.launch.submission import FINAL_CODES, Submission, report_words, run_words
from runner.records.output_layout import MANIFEST, run_folder
from runner.storage import is_remote

__all__ = ["SlurmSettings", "bound_folders", "log_name", "report_script", "run_script", "signal_s", "submit_script"]

END_S = 60  # seconds that publishing and a requeue get after the drain; assumed
REPORT_S, REPORT_CPUS, REPORT_GIB = 3600, 2, 8  # of the closing report; assumed

# What the image sets (Dockerfile, ENV) and what Python reads. Apptainer passes the host's variables on, and prefers
# them to the image's; these would be meant for other programs.
IMAGE_VARIABLES = (
    "HF_HOME",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "TMPDIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "VIDEO_LAB_CACHE",
    "VIDEO_LAB_MODELS",
    "XDG_CACHE_HOME",
)


@dataclass(frozen=True)
class SlurmSettings:
    """What a cluster's users choose; all may be left to the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # of the render tasks, e.g. a GPU model
    sbatch_flags: tuple[str, ...] = ()  # more `--key=value` of the render tasks, e.g. --gres=gpu:h100:1, --tmp=100G
    bind: tuple[str, ...] = ()  # more folders that tasks see, e.g. one to which links in the inputs' folders lead
    cache: str | None = None  # folder of each node that keeps synced models; None: one that ends with the task
    report_partition: str | None = None  # where the GPU partition takes no jobs without GPUs


def signal_s(submission: Submission) -> int:
    """Seconds before the time limit at which a task gets SIGTERM."""
    return math.ceil(submission.drain_s) + END_S


def log_name(submission: Submission, ids: str) -> str:
    """The file of a task's output, `ids` in its name: beside the run's other files, or where sbatch is called."""
    name = f"{submission.name}-{ids}.log"
    if is_remote(submission.out):
        return name
    return str(PurePosixPath(submission.out) / run_folder(submission.run_id) / name)


def bound_folders(submission: Submission, settings: SlurmSettings) -> list[str]:
    """The local folders that a task reads or writes, none of them within another."""
    folders = {PurePosixPath(place) for place in (submission.out, submission.models) if not is_remote(place)}
    folders |= {
        PurePosixPath(place).parent for place in (submission.manifest, *submission.inputs) if not is_remote(place)
    }
    folders |= {PurePosixPath(folder) for folder in settings.bind}
    return sorted(str(folder) for folder in folders if not folders.intersection(folder.parents))


def run_script(submission: Submission, settings: SlurmSettings) -> str:
    """The array job: a task a shard. One shard is an array as well, so that names and variables are the same."""
    gpus = f"gpu:{submission.gpus_per_task}"
    directives = {
        **_shared_directives(submission, settings),
        "partition": settings.partition,
        "constraint": settings.constraint,
        "array": f"0-{submission.shards - 1}",
        "output": _pattern(submission, "%A_%a"),
        "cpus-per-task": submission.cpus,
        "mem": f"{submission.memory_gib}G",
        "gres": gpus,
        "time": _duration(submission.time_limit_s),
        "signal": f"TERM@{signal_s(submission)}",
    }
    container = _container(submission, settings, ["--nv"])
    words = run_words(submission)
    head = [
        f"# Run {submission.run_id}: {submission.shards} tasks, {submission.gpus_per_task} GPU each. submit.sh submits"
        " it, and report.sbatch after it.",
        "#",
        f"# One task by hand, without Slurm; SCRATCH is a folder with {submission.disk_gib} GB that you may write:",
        f"#   {shlex.join([*container, '--bind', 'SCRATCH:/cache', submission.image, *words])}",
    ]
    return _script(
        submission,
        head,
        [*_directive_lines(directives), *(f"#SBATCH {shlex.quote(flag)}" for flag in settings.sbatch_flags)],
        task="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}",  # a job id alone can mean the whole array
        step=["--cpus-per-task", str(submission.cpus), f"--gres={gpus}"],
        cache=settings.cache,
        container=container,
        words=words,
    )


def report_script(submission: Submission, settings: SlurmSettings) -> str:
    """The closing job; submitted with `--dependency=afterany:ID`, which holds also where tasks failed."""
    directives = {
        **_shared_directives(submission, settings),
        "job-name": f"{submission.name}-report",
        "partition": settings.report_partition or settings.partition,
        "output": _pattern(submission, "report-%j"),
        "cpus-per-task": REPORT_CPUS,
        "mem": f"{REPORT_GIB}G",
        "time": _duration(REPORT_S),
    }
    return _script(
        submission,
        [f"# The report of run {submission.run_id}. submit.sh submits it: it starts when all tasks have ended."],
        _directive_lines(directives),
        task="${SLURM_JOB_ID}",
        step=["--cpus-per-task", str(REPORT_CPUS)],
        cache=None,
        container=_container(submission, settings, []),
        words=report_words(submission),
    )


def submit_script(submission: Submission) -> str:
    """`submit.sh`: puts the manifest in its place and submits both scripts."""
    manifest = shlex.quote(submission.manifest)
    if is_remote(submission.manifest):
        copy = f"aws s3 cp {MANIFEST} {manifest}"
    else:
        copy = f"mkdir -p {shlex.quote(str(PurePosixPath(submission.manifest).parent))}\ncp {MANIFEST} {manifest}"
    return f"""\
#!/usr/bin/env bash
# Submits run {submission.run_id}: the array of run.sbatch, and report.sbatch, which starts when all tasks have ended.
# The tasks inherit this shell's environment: set the storage's credentials here, before.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

{copy}
run=$(sbatch --parsable run.sbatch)
run=${{run%%;*}} # ID;CLUSTER where there are several clusters
if ! report=$(sbatch --parsable "--dependency=afterany:$run" report.sbatch); then
  echo "the report was refused; job $run is taken back" >&2
  scancel "$run"
  exit 1
fi
echo "run $run, report ${{report%%;*}}"
"""


def _shared_directives(submission: Submission, settings: SlurmSettings) -> dict[str, object]:
    return {
        "job-name": submission.name,
        "account": settings.account,
        "qos": settings.qos,
        "nodes": 1,
        "ntasks": 1,
        "open-mode": "append",
        "export": "ALL",
        "requeue" if submission.attempts > 1 else "no-requeue": True,
    }


def _directive_lines(directives: dict[str, object]) -> list[str]:
    """`#SBATCH` lines; sbatch reads quotes as a shell does. None: none; True: without a value."""
    return [
        f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for name, value in directives.items()
        if value is not None
    ]


def _pattern(submission: Submission, ids: str) -> str:
    """The log's name for `--output`, in which % stands for the job's numbers alone."""
    return log_name(submission, "\0").replace("%", "%%").replace("\0", ids)


def _duration(seconds: int) -> str:
    """In whole minutes, which is what Slurm counts in; rounded down, as the limit is the user's."""
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:00"


def _container(submission: Submission, settings: SlurmSettings, flags: Sequence[str]) -> list[str]:
    """Apptainer's command up to the image, without the bind of /cache."""
    command = ["apptainer", "run", *flags]
    for folder in bound_folders(submission, settings):
        command += ["--bind", folder]
    return command


def _script(
    submission: Submission,
    head: Iterable[str],
    directives: Iterable[str],
    *,
    task: str,
    step: Sequence[str],
    cache: str | None,
    container: Sequence[str],
    words: Sequence[str],
) -> str:
    """A batch script that runs `words` in the container as a step, and decides by its exit code what becomes of `task`.

    The step gets SIGTERM before the time limit (`--signal` without B:) and when the grace period of a preemption begins
    (slurm.conf, GraceTime: "the job's tasks are immediately sent SIGCONT and SIGTERM", the batch script only at its
    end). A command without srun would be no step.
    """
    final = " | ".join(str(code) for code in (0, *FINAL_CODES))
    lines = [
        "#!/usr/bin/env bash",
        *head,
        *directives,
        "set -uo pipefail",
        "",
        "# The task inherits the submitter's environment (--export=ALL), and Apptainer passes it on: so credentials",
        "# reach the container, and no file has them. Apptainer also mounts the home folder, with ~/.aws.",
        *_cache_lines(cache),
        "",
        "# Of these the image's own values hold.",
        f"unset {' '.join(IMAGE_VARIABLES)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(submission.environment.items())),
        "",
        f"attempts={submission.attempts}",
        f"task={task}",
        "export SLURM_EXIT_ERROR=3 # of srun's own failures, which say nothing about the run",
        "",
        "# A step gets SIGTERM when there is time to drain. This script gets it when that time is over, and stays to",
        "# see the exit code.",
        "trap : TERM CONT",
        f"srun --ntasks=1 --mpi=none --input=none {shlex.join(step)} \\",
        f'  {shlex.join(container)} --bind "$cache:/cache" \\',
        f"  {shlex.quote(submission.image)} {shlex.join(words)} &",
        "step=$!",
        "code=0",
        'wait "$step" || code=$?',
        'while ((code > 128)) && kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not the step',
        "  code=0",
        '  wait "$step" || code=$?',
        "done",
        "",
        "# Done, failed by the jobs' own fault, or configured wrongly: another start would find the same.",
        "case $code in",
        f'  {final}) exit "$code" ;;',
        "esac",
        "starts=$((${SLURM_RESTART_COUNT:-0} + 1))",
        "if ((starts >= attempts)); then",
        '  echo "exit code $code at start $starts of $attempts: given up" >&2',
        '  exit "$code"',
        "fi",
        "# A task that was cancelled, or that Slurm itself requeues, has another state.",
        'if [[ $(squeue --noheader --states=all --jobs="$task" --format=%T) == RUNNING ]]; then',
        '  echo "exit code $code at start $starts of $attempts: requeued" >&2',
        '  scontrol requeue "$task"',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _cache_lines(cache: str | None) -> list[str]:
    """The container's root is read-only; /cache must be a folder of the node that the user may write."""
    if cache is not None:
        return [f"cache={shlex.quote(cache)}", 'mkdir -p "$cache" || exit 3']
    return [
        'cache=$(mktemp -d "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/video-lab.XXXXXXXX") || exit 3',
        "trap 'rm -rf \"$cache\"' EXIT",
    ]
