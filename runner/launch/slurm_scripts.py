"""Slurm scripts: the text of `run.sbatch`, `report.sbatch` and `submit.sh`.

In:   a checked `Submission` and `SlurmSettings`. Out: text; the same text for the same values.
Never: requests to the cluster; credentials: tasks inherit the submitter's environment.
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

END_S = 60  # seconds for publishing and a requeue after the drain; assumed
REPORT_S, REPORT_CPUS, REPORT_GIB = 3600, 2, 8  # resources of the report job; assumed

# Variables that the image sets (Dockerfile, ENV) and that Python reads. Apptainer passes the host's variables on and
# prefers them to the image's, but the host's values are meant for other programs.
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
    """Settings that users of a cluster choose. All have defaults of the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # of the render tasks, e.g. a GPU model
    sbatch_flags: tuple[str, ...] = ()  # more `--key=value` of the render tasks, e.g. --gres=gpu:h100:1, --tmp=100G
    bind: tuple[str, ...] = ()  # more folders for the tasks, e.g. a folder that links in the inputs' folders point to
    cache: str | None = (
        None  # folder of each node that keeps synced models; None: a folder that is removed with the task
    )
    report_partition: str | None = None  # needed if the GPU partition refuses jobs without GPUs


def signal_s(submission: Submission) -> int:
    """Return how many seconds before the time limit a task gets SIGTERM."""
    return math.ceil(submission.drain_s) + END_S


def log_name(submission: Submission, ids: str) -> str:
    """Return the path of a task's log, with `ids` in its name: in the run's folder, or where sbatch is called."""
    name = f"{submission.name}-{ids}.log"
    if is_remote(submission.out):
        return name
    return str(PurePosixPath(submission.out) / run_folder(submission.run_id) / name)


def bound_folders(submission: Submission, settings: SlurmSettings) -> list[str]:
    """Return the local folders that a task reads or writes, without folders inside others of them."""
    folders = {PurePosixPath(place) for place in (submission.out, submission.models) if not is_remote(place)}
    folders |= {
        PurePosixPath(place).parent for place in (submission.manifest, *submission.inputs) if not is_remote(place)
    }
    folders |= {PurePosixPath(folder) for folder in settings.bind}
    return sorted(str(folder) for folder in folders if not folders.intersection(folder.parents))


def run_script(submission: Submission, settings: SlurmSettings) -> str:
    """Return the array job: one task per shard. One shard is an array too, so that names and variables are equal."""
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
        f"# To run one task by hand, without Slurm (SCRATCH: a writable folder with {submission.disk_gib} GB):",
        f"#   {shlex.join([*container, '--bind', 'SCRATCH:/cache', submission.image, *words])}",
    ]
    return _script(
        submission,
        head,
        [*_directive_lines(directives), *(f"#SBATCH {shlex.quote(flag)}" for flag in settings.sbatch_flags)],
        task="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}",  # a job id without the task can mean the whole array
        step=["--cpus-per-task", str(submission.cpus), f"--gres={gpus}"],
        cache=settings.cache,
        container=container,
        words=words,
    )


def report_script(submission: Submission, settings: SlurmSettings) -> str:
    """Return the report job. It is submitted with `--dependency=afterany:ID`, so it also runs after failed tasks."""
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
    """Return `submit.sh`, which copies the manifest and submits both scripts."""
    manifest = shlex.quote(submission.manifest)
    if is_remote(submission.manifest):
        copy = f"aws s3 cp {MANIFEST} {manifest}"
    else:
        copy = f"mkdir -p {shlex.quote(str(PurePosixPath(submission.manifest).parent))}\ncp {MANIFEST} {manifest}"
    return f"""\
#!/usr/bin/env bash
# Submits run {submission.run_id}: the array of run.sbatch, and report.sbatch, which starts when all tasks have ended.
# The tasks inherit this shell's environment: set the credentials for the storage before you run this script.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

{copy}
run=$(sbatch --parsable run.sbatch)
run=${{run%%;*}} # sbatch prints ID;CLUSTER if there are several clusters
if ! report=$(sbatch --parsable "--dependency=afterany:$run" report.sbatch); then
  echo "the report job was refused; cancelling job $run" >&2
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
    """Return `#SBATCH` lines; sbatch reads quotes as a shell does. None: no line; True: a flag without a value."""
    return [
        f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for name, value in directives.items()
        if value is not None
    ]


def _pattern(submission: Submission, ids: str) -> str:
    """Return the log's path for `--output`, where % introduces only the job's numbers."""
    return log_name(submission, "\0").replace("%", "%%").replace("\0", ids)


def _duration(seconds: int) -> str:
    """Return whole minutes, Slurm's unit. Rounded down, so that the user's limit is not exceeded."""
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:00"


def _container(submission: Submission, settings: SlurmSettings, flags: Sequence[str]) -> list[str]:
    """Return Apptainer's command up to the image, without the bind of /cache."""
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
    """Return a batch script that runs `words` in the container as a step; the exit code decides if `task` is requeued.

    The step gets SIGTERM before the time limit (`--signal` without B:) and when the grace period of a preemption begins
    (slurm.conf, GraceTime: "the job's tasks are immediately sent SIGCONT and SIGTERM", the batch script only at its
    end). Only a command that srun starts is a step.
    """
    final = " | ".join(str(code) for code in (0, *FINAL_CODES))
    lines = [
        "#!/usr/bin/env bash",
        *head,
        *directives,
        "set -uo pipefail",
        "",
        "# The task inherits the submitter's environment (--export=ALL), and Apptainer passes it on to the container.",
        "# So no file contains credentials. Apptainer also mounts the home folder with ~/.aws.",
        *_cache_lines(cache),
        "",
        "# For these variables the image's values are used.",
        f"unset {' '.join(IMAGE_VARIABLES)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(submission.environment.items())),
        "",
        f"attempts={submission.attempts}",
        f"task={task}",
        "export SLURM_EXIT_ERROR=3 # for failures of srun itself, which are not failures of the run",
        "",
        "# A step gets SIGTERM when it must drain. This script gets SIGTERM after the drain time, and ignores it to",
        "# read the step's exit code.",
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
        "# Finished, failed because of the jobs themselves, or configured wrongly: a restart would not help.",
        "case $code in",
        f'  {final}) exit "$code" ;;',
        "esac",
        "starts=$((${SLURM_RESTART_COUNT:-0} + 1))",
        "if ((starts >= attempts)); then",
        '  echo "exit code $code at start $starts of $attempts: given up" >&2',
        '  exit "$code"',
        "fi",
        "# A task that was cancelled, or that Slurm requeues itself, has another state.",
        'if [[ $(squeue --noheader --states=all --jobs="$task" --format=%T) == RUNNING ]]; then',
        '  echo "exit code $code at start $starts of $attempts: requeued" >&2',
        '  scontrol requeue "$task"',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _cache_lines(cache: str | None) -> list[str]:
    """Return lines that set $cache, a writable folder of the node: the container's own root is read-only."""
    if cache is not None:
        return [f"cache={shlex.quote(cache)}", 'mkdir -p "$cache" || exit 3']
    return [
        'cache=$(mktemp -d "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/video-lab.XXXXXXXX") || exit 3',
        "trap 'rm -rf \"$cache\"' EXIT",
    ]
