"""Submit settings: one frozen value per platform of `video-lab submit`, with the flags that all platforms share.

In:   the values of flags. Out: `SubmitAwsBatchSettings`, …; ConfigInvalid for an invalid value; it names the flag.
Never: ranges and names that a platform checks: these are in launch/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runner.errors import ConfigInvalid
from runner.launch.submission import Submission
from runner.spec.recipes import MEMORY_CHOICES
from runner.verbs.flag_values import (
    AUTO,
    are_texts,
    are_variables,
    is_age,
    is_one_of,
    is_path,
    is_price,
    is_recipe,
    is_run_id,
    is_seconds,
    is_shards,
    is_store,
    is_text,
    is_whole,
)
from runner.verbs.flags import choice, flag, switch
from runner.verbs.settings import MANIFEST, SelectionSettings, default_models

if TYPE_CHECKING:
    from runner.spec.manifest import Manifest

__all__ = [
    "STARTUP",
    "WITHIN",
    "SubmitAwsBatchSettings",
    "SubmitGcpBatchSettings",
    "SubmitKubernetesSettings",
    "SubmitSettings",
    "SubmitSlurmSettings",
]

SHARES = ("index", "any")
WITHIN = "1h"  # with --shards auto
# Assumed, not measured: two minutes for a machine and the image, two for 23 GB of weights (fp4-distill with its
# encoders) from a bucket nearby at 200 MB/s, one to load them.
STARTUP = "5m"


@dataclass(frozen=True, kw_only=True)
class SubmitSettings(SelectionSettings):
    """Settings of every platform: the run and its tasks. `within`, `startup` and `gpu` are for `shards` auto."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    out: str = field(metadata=flag("output folder or URI, under its name on this machine", is_text, "URI"))
    image: str = field(metadata=flag("container image of the runner, with a tag or a digest", is_text, "IMAGE"))
    models: str | None = field(
        default_factory=default_models,
        metadata=flag("model store that the tasks read (default: $VIDEO_LAB_MODELS)", is_text, "URI"),
    )
    shards: int | str = field(
        default=AUTO,
        metadata=flag(
            "number of tasks; auto: as few as end --within the time, by the forecast for --gpu",
            is_shards,
            "N|auto",
        ),
    )
    within: str | None = field(
        default=None,
        metadata=flag(
            f"with --shards auto: time limit of the tasks, from their start (default: {WITHIN})", is_age, "AGE"
        ),
    )
    startup: str | None = field(
        default=None,
        metadata=flag(
            f"with --shards auto: the part of this time until a task's first job begins (default: {STARTUP})",
            is_age,
            "AGE",
        ),
    )
    gpu: str | None = field(
        default=None, metadata=flag("with --shards auto: GPU of the forecast, e.g. H100", is_text, "NAME")
    )
    share: Literal["index", "any"] = field(
        default=Submission.share,
        metadata=choice(
            "jobs of a task: every N-th from its index, or any that no other task holds; several GPUs per task: any",
            SHARES,
        ),
    )
    gpus_per_task: int = field(
        default=Submission.gpus_per_task,
        metadata=flag("GPUs per task, with one process on each", partial(is_whole, 1), "N"),
    )
    cpus: int = field(default=Submission.cpus, metadata=flag("CPUs per task", partial(is_whole, 1), "N"))
    memory_gib: int = field(
        default=Submission.memory_gib, metadata=flag("host memory per task, in GiB", partial(is_whole, 1), "GIB")
    )
    disk_gib: int = field(
        default=Submission.disk_gib,
        metadata=flag("disk per task for models and temporary files, in GiB", partial(is_whole, 1), "GIB"),
    )
    spot: bool = field(default=False, metadata=switch("use spot machines, which the provider may take back"))
    name: str | None = field(
        default=None, metadata=flag("name of the job (default: from the manifest's name)", is_text, "NAME")
    )
    run_id: str | None = field(
        default=None, metadata=flag("name of the run (default: the job's name and the time, UTC)", is_run_id, "ID")
    )
    recipe: str | None = field(
        default=None, metadata=flag("weights, precision and steps; replaces the manifest's recipe", is_recipe, "NAME")
    )
    memory: str | None = field(
        default=None,
        metadata=flag("memory mode; replaces the manifest's", partial(is_one_of, MEMORY_CHOICES), "MODE"),
    )
    attempts: int = field(
        default=Submission.attempts, metadata=flag("starts per task, at most", partial(is_whole, 1), "N")
    )
    max_attempts: int | None = field(
        default=None, metadata=flag("attempts per job, as in `video-lab run`", partial(is_whole, 0), "N")
    )
    drain_s: float = field(
        default=Submission.drain_s, metadata=flag("seconds for the running job after a signal", is_seconds, "S")
    )
    time_limit: str = field(default="24h", metadata=flag("time limit of one start of a task", is_age, "AGE"))
    env: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "environment variable of the tasks, not a credential; repeatable",
            are_variables,
            "NAME=VALUE",
            repeatable=True,
        ),
    )
    gpu_hour: float | None = field(
        default=None, metadata=flag("price of one hour of one GPU, for the report", is_price, "PRICE")
    )
    upload_inputs: str | None = field(
        default=None,
        metadata=flag(
            "copy local inputs to this prefix, each content once; the tasks read them there", is_store, "URI"
        ),
    )
    render_only: Path | None = field(
        default=None, metadata=flag("write the job into this folder, and send nothing", is_path, "DIR")
    )

    def check_together(self) -> None:
        super().check_together()
        if not self.models:
            raise ConfigInvalid(
                "no model store was named", where="--models", todo="Give --models URI, or set VIDEO_LAB_MODELS"
            )
        if self.render_only is not None and self.upload_inputs is not None:
            raise ConfigInvalid(
                "--render-only sends nothing, but --upload-inputs sends the inputs", todo="Leave one of them out"
            )
        if self.shards == AUTO and self.gpu is None:
            raise ConfigInvalid(
                "--shards auto needs a GPU for its forecast",
                where="--gpu",
                todo="Give e.g. --gpu H100, or the number of tasks: --shards 8",
            )
        if self.shards != AUTO:
            for name, value in (("--within", self.within), ("--startup", self.startup), ("--gpu", self.gpu)):
                if value is not None:
                    raise ConfigInvalid(
                        f"is for --shards auto, but --shards is {self.shards}",
                        where=name,
                        todo="Leave one of them out",
                    )


# -- one value per platform --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SubmitAwsBatchSettings(SubmitSettings):
    """`video-lab submit aws-batch`."""

    queue: str = field(metadata=flag("job queue: its name or ARN", is_text, "NAME"))
    report_queue: str | None = field(
        default=None, metadata=flag("queue of the job that writes the report (default: --queue)", is_text, "NAME")
    )
    job_role: str | None = field(
        default=None,
        metadata=flag("role with which tasks read and write (default: the machine's role)", is_text, "ARN"),
    )
    execution_role: str | None = field(
        default=None, metadata=flag("role that pulls the image (default: the machine's role)", is_text, "ARN")
    )
    region: str | None = field(default=None, metadata=flag("region (default: the environment's)", is_text, "NAME"))
    log_group: str | None = field(
        default=None, metadata=flag("existing log group of CloudWatch Logs (default: /aws/batch/job)", is_text, "NAME")
    )
    share_identifier: str | None = field(
        default=None, metadata=flag("share identifier, for a queue with a scheduling policy", is_text, "NAME")
    )
    cache_folder: str | None = field(
        default=None,
        metadata=flag(
            "folder of the machine that keeps models between tasks; the launch template creates it", is_text, "DIR"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class SubmitGcpBatchSettings(SubmitSettings):
    """`video-lab submit gcp-batch`. Paths are gs:// URIs; the jobs mount their buckets."""

    location: str = field(metadata=flag("region, e.g. us-central1", is_text, "NAME"))
    machine_type: str | None = field(default=None, metadata=flag("machine type, e.g. g2-standard-16", is_text, "NAME"))
    gpu_type: str | None = field(
        default=None, metadata=flag("GPU model, for a machine type without GPUs", is_text, "NAME")
    )
    project: str | None = field(default=None, metadata=flag("project (default: gcloud's project)", is_text, "NAME"))
    service_account: str | None = field(
        default=None, metadata=flag("service account of the tasks (default: Compute Engine's)", is_text, "E-MAIL")
    )


@dataclass(frozen=True, kw_only=True)
class SubmitKubernetesSettings(SubmitSettings):
    """`video-lab submit kubernetes`."""

    namespace: str | None = field(
        default=None, metadata=flag("namespace of the Jobs (default: default)", is_text, "NAME")
    )
    service_account: str | None = field(default=None, metadata=flag("service account of the pods", is_text, "NAME"))
    secret: str | None = field(
        default=None,
        metadata=flag("existing Secret; its keys become environment variables of the pods", is_text, "NAME"),
    )
    node_selector: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "use only nodes with this label, e.g. of a GPU model; repeatable", are_texts, "LABEL=VALUE", repeatable=True
        ),
    )
    toleration: tuple[str, ...] = field(
        default=(),
        metadata=flag("also use nodes with this taint; repeatable", are_texts, "KEY[=VALUE][:EFFECT]", repeatable=True),
    )
    context: str | None = field(
        default=None, metadata=flag("kubectl context (default: the current one)", is_text, "NAME")
    )


@dataclass(frozen=True, kw_only=True)
class SubmitSlurmSettings(SubmitSettings):
    """`video-lab submit slurm`. Paths can be folders that all nodes share, and the image a .sif file."""

    partition: str | None = field(default=None, metadata=flag("partition of the tasks", is_text, "NAME"))
    account: str | None = field(default=None, metadata=flag("account that is charged", is_text, "NAME"))
    qos: str | None = field(default=None, metadata=flag("quality of service", is_text, "NAME"))
    constraint: str | None = field(
        default=None, metadata=flag("constraint on the nodes, e.g. a GPU model", is_text, "TEXT")
    )
    sbatch_flag: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "extra flag for sbatch, e.g. --sbatch-flag=--gres=gpu:h100:1; repeatable",
            are_texts,
            "--KEY=VALUE",
            repeatable=True,
        ),
    )
    bind: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "extra folder for the containers, e.g. the target of links; repeatable", are_texts, "DIR", repeatable=True
        ),
    )
    cache_folder: str | None = field(
        default=None, metadata=flag("folder of each node that keeps models between tasks", is_text, "DIR")
    )
    report_partition: str | None = field(
        default=None,
        metadata=flag("partition of the job that writes the report (default: --partition)", is_text, "NAME"),
    )
