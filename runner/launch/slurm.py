"""Slurm: a run as an array job of Apptainer containers, and a report job that depends on it.

In:   a `Submission`. Out: batch scripts, or the ids of the jobs that `sbatch` has accepted.
Never: credentials; the text of the scripts, see slurm_scripts.py.

Paths of a shared file system can be used like URIs. A task sees them under the same names.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from runner.errors import ConfigInvalid
from runner.launch.platform import Platform
from runner.launch.slurm_scripts import (
    SlurmSettings,
    bound_folders,
    log_name,
    report_script,
    run_script,
    signal_s,
    submit_script,
)
from runner.launch.submission import Submission, SubmittedJob, run_words
from runner.launch.submission_checks import check_image
from runner.launch.tool import run_tool, taken_back
from runner.storage import is_remote, local_path

__all__ = ["Slurm"]

RUN, REPORT, SUBMIT = "run.sbatch", "report.sbatch", "submit.sh"
ASK_S, SUBMIT_S = 60, 120  # time limits for Slurm's tools; assumed
MOST_ATTEMPTS = 10  # as on the other platforms
LONGEST_SIGNAL_S = 65535  # sbatch, --signal
EARLY_S = 60  # Slurm may send the signal up to so many seconds earlier (sbatch, --signal)
DOCKER = "docker://"

# Flags that the scripts set themselves and rely on.
_RESERVED_FLAGS = (
    "array",
    "dependency",
    "export",
    "no-requeue",
    "output",
    "parsable",
    "requeue",
    "signal",
    "test-only",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # the name becomes part of a file name
_SETTING = re.compile(r"[^\s'\"\\]+")
_FLAG = re.compile(r"--([a-z][a-z-]*)(=[^\n\r\0]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Apptainer's run script lets a shell evaluate the arguments (unless --no-eval, which old versions lack).
_EVALUATED = re.compile(r"[$`\\\"\n\r\0]")


@dataclass(frozen=True)
class Slurm(SlurmSettings, Platform):
    """A cluster that `sbatch` reaches. The image is a .sif file, or docker://registry/name:tag.

    `disk_gib` is not requested from Slurm, because most clusters do not manage local disks. If yours does, add --tmp
    to `sbatch_flags`.
    """

    name: ClassVar[str] = "slurm"

    def check(self, submission: Submission) -> None:
        """Raise ConfigInvalid for values that Slurm or Apptainer would refuse or interpret differently."""
        if not _NAME.fullmatch(submission.name):
            raise ConfigInvalid(
                f"{submission.name!r} cannot be the name of a job",
                where="--name",
                todo="Use 1 to 64 letters, digits, dots, dashes and underscores",
            )
        if not 1 <= submission.attempts <= MOST_ATTEMPTS:
            raise ConfigInvalid(
                f"{submission.attempts} attempts of a task", todo=f"Give 1 to {MOST_ATTEMPTS}", where="--attempts"
            )
        for what in ("shards", "gpus_per_task", "cpus", "memory_gib"):
            if getattr(submission, what) < 1:
                raise ConfigInvalid(f"{what.replace('_', ' ')}: {getattr(submission, what)}", todo="Give at least 1")
        self._check_times(submission)
        self._check_image(submission.image)
        self._check_settings()
        for name, value in submission.environment.items():
            if not _VARIABLE.fullmatch(name) or "\0" in value:
                todo = "Use letters, digits and underscores"
                raise ConfigInvalid(f"{name!r} is not a name of an environment variable", todo=todo)
        for word in (*run_words(submission), submission.image):
            if _EVALUATED.search(word):
                raise ConfigInvalid(f"{word!r} contains a character that Apptainer would interpret", todo=_PLAIN)
        for folder in bound_folders(submission, self):
            problem = self.problem_of_place(folder) if os.path.isabs(folder) else "is not a full path"
            if problem is not None:
                raise ConfigInvalid(problem, where=folder, todo="Give its full path, or rename it")
        if submission.spot and self.partition is None and self.qos is None:
            raise ConfigInvalid(
                "Slurm itself has no spot machines",
                where="--spot",
                todo="Name the partition or QOS whose jobs may be preempted, or leave --spot out",
            )

    def render(self, submission: Submission) -> Mapping[str, str]:
        return {
            RUN: run_script(submission, self),
            REPORT: report_script(submission, self),
            SUBMIT: submit_script(submission),
        }

    def ask(self, submission: Submission) -> None:
        """Check both scripts with `sbatch --test-only`."""
        files = self.render(submission)
        run_tool(["sbatch", "--version"], timeout_s=ASK_S)
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_tool(["scontrol", "show", "config"], timeout_s=ASK_S), re.M)
        if found is not None and submission.shards > int(found[1]):  # the largest index is one less
            raise ConfigInvalid(
                f"this cluster accepts arrays of at most {found[1]} tasks (MaxArraySize), not {submission.shards}",
                where="--shards",
                todo=f"Give --shards {found[1]} or less",
            )
        for name in (RUN, REPORT):
            run_tool(["sbatch", "--test-only"], stdin=files[name].encode(), timeout_s=ASK_S)

    def submit(self, submission: Submission, files: Mapping[str, str]) -> tuple[SubmittedJob, ...]:
        run = _sbatch(files[RUN])
        with taken_back(f"job {run}", ["scancel", run], timeout_s=SUBMIT_S):
            report = _sbatch(files[REPORT], f"--dependency=afterany:{run}")
        return SubmittedJob("run", run), SubmittedJob("report", report)

    def watch(self, submission: Submission, jobs: tuple[SubmittedJob, ...]) -> tuple[str, ...]:
        ids = {job.role: job.id for job in jobs}
        every = ",".join(job.id for job in jobs)
        log = log_name(submission, f"{ids['run']}_0")
        return (
            f"squeue --jobs={every}",
            f"sacct --jobs={every} --format=JobID,JobName,State,ExitCode,Elapsed,NodeList",
            f"tail -F {shlex.quote(log)}",
            f"video-lab status {shlex.quote(submission.out)} --run {submission.run_id} --watch",
            f"scancel {ids['run']}",
        )

    def place(self, uri: str) -> str:
        """Return local paths as absolute paths: the tasks see the shared file system under the same names."""
        return uri if is_remote(uri) else os.path.abspath(local_path(uri))

    def problem_of_place(self, uri: str) -> str | None:
        """Return a problem only for paths that Apptainer cannot bind."""
        if is_remote(uri):
            return None
        try:
            path = self.place(uri)
        except ConfigInvalid as error:
            return error.what
        if found := re.search(r"[,:]|" + _EVALUATED.pattern, path):
            return f"has {found[0]!r} in its name, which Apptainer cannot bind"
        return None

    def _check_times(self, submission: Submission) -> None:
        before = signal_s(submission)
        if before > LONGEST_SIGNAL_S:
            raise ConfigInvalid(
                f"{submission.drain_s:g} s are too long: Slurm sends its signal at most {LONGEST_SIGNAL_S} s before "
                "the time limit",
                where="--drain-s",
                todo=f"Give at most {LONGEST_SIGNAL_S - before + int(submission.drain_s)}",
            )
        if submission.time_limit_s < before + 2 * EARLY_S:
            raise ConfigInvalid(
                f"a time limit of {submission.time_limit_s} s is too short: SIGTERM comes up to {before + EARLY_S} s "
                "before its end",
                todo=f"Give at least {before + 2 * EARLY_S} s, or a smaller --drain-s",
            )

    def _check_image(self, image: str) -> None:
        if image.startswith(DOCKER):
            check_image(image.removeprefix(DOCKER))
        elif not (image.endswith(".sif") and os.path.isabs(image)):
            raise ConfigInvalid(
                f"{image!r} is not an image for Apptainer",
                where="--image",
                todo="Write the full path of a .sif file, or docker://registry/name:tag",
            )

    def _check_settings(self) -> None:
        for what in ("partition", "account", "qos", "constraint", "report_partition"):
            value = getattr(self, what)
            if value is not None and not _SETTING.fullmatch(value):
                kind = what.replace("_", " ")
                raise ConfigInvalid(f"{value!r} is not a valid {kind}", todo="Leave out spaces and quotes")
        for folder in (*self.bind, *([self.cache] if self.cache is not None else [])):
            if not os.path.isabs(folder) or (problem := self.problem_of_place(folder)) is not None:
                raise ConfigInvalid(
                    "is not a full path" if not os.path.isabs(folder) else str(problem),
                    where=folder,
                    todo="Give the full path of a folder on the nodes",
                )
        for flag in self.sbatch_flags:
            found = _FLAG.fullmatch(flag)
            if found is None:
                raise ConfigInvalid(
                    f"{flag!r} is not a flag of sbatch", todo="Write --key=value, e.g. --gres=gpu:h100:1"
                )
            if found[1] in _RESERVED_FLAGS:
                raise ConfigInvalid(f"{flag}: --{found[1]} is set by the script itself", todo="Leave it out")


_PLAIN = 'Use names without $, `, ", \\ and line breaks'


def _sbatch(script: str, *flags: str) -> str:
    """Submit a script and return the id of its job. Raises ConfigInvalid, ClusterDenied, ClusterUnavailable."""
    output = run_tool(["sbatch", "--parsable", *flags], stdin=script.encode(), timeout_s=SUBMIT_S)
    return output.strip().partition(";")[0]
