"""Settings: one frozen value a verb, checked when it is made.

In:   the values of flags, as text from the command line or as Python values. Out: `RunSettings`, `PlanSettings`, …;
ConfigInvalid for a value that cannot be meant, which names the flag. Never: files, networks or devices: whether a store
or a folder is there is found out by the verb.

A field has the name of its flag, with `_` for `-`, see flags.py. The default of a flag stands here and nowhere else.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from runner.batch.shards import choose_shard
from runner.errors import ConfigInvalid
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.spec.recipes import DEFAULT_RECIPE, MEMORY_CHOICES, get_recipe
from runner.verbs.flag_values import (
    ALL_LAYERS,
    are_gpus,
    are_parts,
    are_revisions,
    are_texts,
    check_by,
    is_age,
    is_export,
    is_interval,
    is_job_options,
    is_manifest,
    is_megabytes,
    is_on,
    is_one_of,
    is_path,
    is_price,
    is_rank,
    is_read_options,
    is_reason,
    is_recipe,
    is_rule,
    is_run_id,
    is_seconds,
    is_spot,
    is_text,
    is_time,
    is_whole,
)
from runner.verbs.flags import Settings, choice, flag, switch

if TYPE_CHECKING:
    from runner.spec.manifest import Manifest

__all__ = [
    "NUMBER_FORMATS",
    "SCALES",
    "ApproveSettings",
    "CleanSettings",
    "CompareSettings",
    "DemoSettings",
    "DoctorSettings",
    "FetchSettings",
    "InspectSettings",
    "ModelSettings",
    "NetworkSettings",
    "PlanSettings",
    "PreprocessSettings",
    "QuantizeSettings",
    "ReportSettings",
    "RootSettings",
    "RunSettings",
    "SelectionSettings",
    "ShardSettings",
    "StatusSettings",
    "ValidateSettings",
    "VerifySettings",
    "default_cache",
    "home_folder",
]

PosePrecision = Literal["fp32", "int8"]
ScaleMethod = Literal["mse", "absmax"]
TensorrtMode = Literal["off", "auto", "on"]

DEVICES = ("auto", "cpu", "cuda")
CHECKPOINTS = ("out", "cache", "off")
NUMBER_FORMATS = ("nvfp4", "g32", *SVDQ_LAYOUTS)
SCALES: tuple[ScaleMethod, ...] = get_args(ScaleMethod)  # the first is the default


# -- defaults that depend on the machine -------------------------------------------------------------------------------


def default_cache() -> Path:
    """$VIDEO_LAB_CACHE, else below the home folder."""
    named = os.environ.get("VIDEO_LAB_CACHE")
    return Path(named) if named else home_folder() / ".cache" / "video-lab"


def default_models() -> str | None:
    """$VIDEO_LAB_MODELS."""
    return os.environ.get("VIDEO_LAB_MODELS")


def default_demo_models() -> str:
    """$VIDEO_LAB_MODELS, else a folder below the working directory."""
    return default_models() or ".cache/demo-models"


def home_folder() -> Path:
    """The home folder; below the folder for temporary files where the user has none (a container with --user)."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"video-lab-{os.getuid()}"


# -- fields that several verbs have ------------------------------------------------------------------------------------

MANIFEST = flag("YAML or JSONL: a path, s3://… or - for standard input", is_manifest, "MANIFEST", positional=True)
OUT = flag("output folder or s3://bucket/prefix", is_text, "OUT", positional=True)
BASELINE = flag("folder or s3://bucket/prefix of the approved renders", is_text, "URI")
CACHE = flag("for synced models and scratch ($VIDEO_LAB_CACHE)", is_path, "DIR")
STORE = flag("model store: a folder or s3://… ($VIDEO_LAB_MODELS)", is_text, "URI")
LOCAL_STORE = flag("model store: a folder ($VIDEO_LAB_MODELS)", is_text, "DIR")
RECIPE = flag("whose files: weights and precision", is_recipe, "NAME")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which weights, and where they are computed with."""

    models: str | None = field(default_factory=default_models, metadata=STORE)
    cache: Path = field(default_factory=default_cache, metadata=CACHE)
    recipe: str | None = field(
        default=None, metadata=flag("weights, precision and steps; over the manifest's", is_recipe, "NAME")
    )
    device: str = field(default="auto", metadata=choice("auto: cuda where there is one", DEVICES))


@dataclass(frozen=True, kw_only=True)
class ShardSettings(Settings):
    """Which share of the jobs. Without a share the scheduler's environment decides, when the verb starts."""

    shard: str | None = field(
        default=None,
        metadata=flag(
            "this share of the jobs, or any: each job that no other runner holds; default: from the scheduler's "
            "environment",
            is_text,
            "I/N|any",
        ),
    )
    shard_count: int | None = field(
        default=None, metadata=flag("shares in all, where the scheduler tells only I", partial(is_whole, 1), "N")
    )

    def check_together(self) -> None:
        super().check_together()
        if self.shard is not None:
            check_by("--shard", lambda: choose_shard(self.shard, self.shard_count, {}))


@dataclass(frozen=True, kw_only=True)
class SelectionSettings(Settings):
    """Which jobs of the manifest. A shard is a share of the jobs that these leave."""

    only: tuple[str, ...] = field(
        default=(), metadata=flag("only jobs whose id fits; repeatable", are_texts, "GLOB", repeatable=True)
    )
    limit: int | None = field(
        default=None,
        metadata=flag(
            "the first N jobs of the manifest, of those that --only leaves, whether they are done or not; shards are "
            "cut afterwards",
            partial(is_whole, 1),
            "N",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class RootSettings(Settings):
    """Where inputs may lie."""

    input_root: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "refuse inputs that lie elsewhere, symlinks followed; a folder or s3://bucket/prefix, repeatable",
            are_texts,
            "DIR",
            repeatable=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """How the preprocessing's networks run."""

    pose_precision: PosePrecision = field(
        default="fp32",
        metadata=choice(
            "int8: the pose network's matrix products in 8 bits, on the CPU only; made once, kept in --cache",
            get_args(PosePrecision),
        ),
    )
    tensorrt: TensorrtMode = field(
        default="off",
        metadata=choice(
            "preprocessing through TensorRT on a GPU, engines kept in --cache; auto: where it is installed",
            get_args(TensorrtMode),
        ),
    )


# -- one value a verb --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSettings(NetworkSettings, RootSettings, SelectionSettings, ShardSettings, ModelSettings):
    """`video-lab run`. `manifest` may be a path, a URI, `-` for standard input, or a manifest that was read before."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    out: str = field(metadata=flag("output folder or s3://bucket/prefix", is_text, "URI"))
    run_id: str | None = field(
        default=None,
        metadata=flag("of the summary; default: the scheduler's job id, else the time", is_run_id, "ID"),
    )
    memory: str | None = field(
        default=None,
        metadata=flag(
            f"where weights live: {', '.join(MEMORY_CHOICES)}; over the manifest's",
            partial(is_one_of, MEMORY_CHOICES),
            "MODE",
        ),
    )
    force: bool = field(default=False, metadata=switch("run every job, done or not"))
    retry_failed: bool = field(default=False, metadata=switch("run only jobs that have failed"))
    max_attempts: int = field(default=3, metadata=flag("attempts a job gets; 0: no limit", partial(is_whole, 0), "N"))
    drain_s: float = field(default=20.0, metadata=flag("seconds the running job gets after a signal", is_seconds, "S"))
    checkpoint: str = field(
        default="out",
        metadata=choice(
            "where the finished segments of a job are kept until it is published, so that a killed job goes on after "
            "them: below its output folder, below --cache, or nowhere",
            CHECKPOINTS,
        ),
    )
    spot: str | None = field(
        default=None,
        metadata=flag(
            "stop early when the cloud announces that it takes this machine back, or when the file PATH appears",
            is_spot,
            "aws|gcp|file:PATH",
        ),
    )
    assume: str | None = field(
        default=None,
        metadata=flag(
            "how to read a published FP4 file where it does not say, e.g. nibble=high", is_read_options, "K=V,…"
        ),
    )
    sheet: Path | None = field(
        default=None, metadata=flag("also draw a contact sheet of this run's outputs", is_path, "PNG")
    )
    dry_run: bool = field(
        default=False,
        metadata=switch("say which jobs would run, and why; renders nothing, loads nothing, writes nothing"),
    )
    gpus: str | None = field(
        default=None,
        metadata=flag(
            "a process on each of these GPUs of this machine, all or numbers; each runs as with --shard any",
            are_gpus,
            "all|0,1,…",
        ),
    )
    on: str | None = field(
        default=None,
        metadata=flag(
            "on Ray: a worker on each GPU of this machine, or of the cluster that RAY_ADDRESS names or that runs here "
            "(ray:auto), or of the one at HOST:PORT; run it on a node of that cluster",
            is_on,
            "ray|ray:auto|ray:HOST:PORT",
        ),
    )
    workers: int | None = field(
        default=None, metadata=flag("with --on: so many workers, on CPUs", partial(is_whole, 1), "N")
    )

    def check_together(self) -> None:
        super().check_together()
        self._check_ray()
        if self.gpus is None:
            return
        if self.device == "cpu":
            raise ConfigInvalid("--gpus and --device cpu contradict each other", todo="Leave one of them out")
        if (self.shard or "any").strip() != "any" or self.shard_count is not None:
            raise ConfigInvalid(
                "--gpus shares all jobs among its processes, and --shard I/N or --shard-count asks for a part of them",
                todo="Leave one of them out; --gpus on several machines shares the manifest too",
            )

    def _check_ray(self) -> None:
        if self.on is None:
            if self.workers is not None:
                raise ConfigInvalid("--workers says how many workers --on starts", todo="Give --on ray too")
            return
        if self.gpus is not None:
            raise ConfigInvalid(
                "--on and --gpus contradict each other", todo="Leave --gpus out: --on ray uses all GPUs of this machine"
            )
        if self.workers is not None and self.device == "cuda":
            raise ConfigInvalid(
                "--workers and --device cuda contradict each other: these workers compute on CPUs",
                todo="Leave --workers out for a worker on each GPU",
            )
        if self.workers is None and self.device == "cpu":
            raise ConfigInvalid(
                "--on without --workers starts a worker on each GPU, and --device cpu asks for none",
                todo="Give --workers N instead of --device cpu",
            )
        if (self.shard or "any").strip() != "any" or self.shard_count is not None:
            raise ConfigInvalid(
                "--on hands all jobs to its workers, and --shard I/N or --shard-count asks for a part of them",
                todo="Leave one of them out",
            )


@dataclass(frozen=True, kw_only=True)
class ValidateSettings(RootSettings, SelectionSettings):
    """`video-lab validate`."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    deep: bool = field(default=False, metadata=switch("decode images whole, download s3:// inputs and open them too"))
    no_inputs: bool = field(default=False, metadata=switch("check the manifest's text only"))
    models: str | None = field(
        default=None,
        metadata=flag("check that this model store has the jobs' LoRAs, and whole", is_text, "URI"),
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(RootSettings, SelectionSettings, ShardSettings, ModelSettings):
    """`video-lab plan`."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    gpu: str | None = field(
        default=None,
        metadata=flag("whose seconds to forecast, e.g. 'RTX 5090'; default: the one here", is_text, "NAME"),
    )


@dataclass(frozen=True, kw_only=True)
class StatusSettings(Settings):
    """`video-lab status`. `wait` and `watch` return when no job of the run is left."""

    out: str = field(metadata=OUT)
    run: str | None = field(default=None, metadata=flag("of this run; default: the newest one", is_run_id, "ID"))
    all: bool = field(
        default=False,
        metadata=switch("of more than 50 jobs show those too that are plainly done and those that have not begun"),
    )
    wait: bool = field(
        default=False,
        metadata=switch(
            "return when no job is pending, running or lost any more; with --run a run that has not begun is waited for"
        ),
    )
    watch: bool = field(default=False, metadata=switch("as --wait, and show each look, with the rate and the ETA"))
    every: float = field(default=10.0, metadata=flag("seconds between two looks", is_interval, "S"))
    timeout: str | None = field(
        default=None,
        metadata=flag("give up waiting after 30m, 2h, …, with exit code 3; default: never", is_age, "AGE"),
    )

    def check_together(self) -> None:
        if self.timeout is not None and not (self.wait or self.watch):
            raise ConfigInvalid("ends a wait, and none was asked for", where="--timeout", todo="Give --wait or --watch")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """`video-lab report`. Without `run`: the run that began last. Without `to`: into the run's own folder."""

    out: str = field(metadata=OUT)
    run: str | None = field(default=None, metadata=flag("the run; default: the one that began last", is_run_id, "ID"))
    gpu_hour: float | None = field(
        default=None,
        metadata=flag("price of an hour of one GPU: tells cost by job and by second of film", is_price, "PRICE"),
    )
    to: str | None = field(
        default=None,
        metadata=flag(
            "folder or s3://bucket/prefix for report.html and report.json; default: the run's folder below OUT",
            is_text,
            "URI",
        ),
    )
    wait: bool = field(
        default=False,
        metadata=switch("first wait until the run has begun, and no job is pending, running or lost any more"),
    )
    every: float = field(default=10.0, metadata=flag("seconds between two looks of --wait", is_interval, "S"))
    timeout: str | None = field(
        default=None,
        metadata=flag("report what there is after 30m, 2h, … of waiting; default: wait for ever", is_age, "AGE"),
    )

    def check_together(self) -> None:
        if self.timeout is not None and not self.wait:
            raise ConfigInvalid("ends a wait, and none was asked for", where="--timeout", todo="Give --wait")


@dataclass(frozen=True, kw_only=True)
class CleanSettings(Settings):
    """`video-lab clean`."""

    out: str = field(metadata=OUT)
    older_than: str = field(default="1h", metadata=flag("leave what is younger: 30m, 1h, 2d, 0s", is_age, "AGE"))
    checkpoints: bool = field(
        default=False,
        metadata=switch("finished segments of jobs that are not done too: a rerun begins at their first segment then"),
    )
    yes: bool = field(default=False, metadata=switch("remove them; without it they are only listed"))


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """`video-lab compare`. Without `manifest`: the limits of the manifest that was run into `out`."""

    out: str = field(metadata=OUT)
    baseline: str = field(metadata=BASELINE)
    report: str | None = field(
        default=None,
        metadata=flag("write report.html, junit.xml, comparison.json and summary.md there", is_text, "URI"),
    )
    only: tuple[str, ...] = field(
        default=(), metadata=flag("only jobs whose id fits; repeatable", are_texts, "GLOB", repeatable=True)
    )
    manifest: str | Manifest | None = field(
        default=None, metadata=flag("take the limits from this manifest's regression:", is_manifest, "MANIFEST")
    )
    models: str | None = field(
        default=None,
        metadata=flag("model store: compare the person's identity with its image encoder too", is_text, "URI"),
    )
    bootstrap: bool = field(
        default=False, metadata=switch("accept jobs that have no baseline yet as drafts: a first night")
    )
    record: bool = field(default=False, metadata=switch("add this night to the baseline's history"))
    suggest: bool = field(default=False, metadata=switch("print limits that follow from the nights in the history"))
    embed_mb: float = field(
        default=4.0,
        metadata=flag("videos up to this size are put into report.html, larger ones beside it", is_megabytes, "MB"),
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class ApproveSettings(Settings):
    """`video-lab approve`. Without `job`: all jobs of `out` that succeeded."""

    out: str = field(metadata=OUT)
    baseline: str = field(metadata=BASELINE)
    job: tuple[str, ...] = field(
        default=(), metadata=flag("only jobs whose id fits; repeatable", are_texts, "GLOB", repeatable=True)
    )
    why: str = field(metadata=flag("the reason, which is kept with the baseline", is_reason, "TEXT"))
    who: str | None = field(default=None, metadata=flag("who approves; default: USER@HOST", is_reason, "NAME"))
    as_of: str | None = field(
        default=None,
        metadata=flag("leave jobs alone that were approved after this time, UTC", is_time, "YYYY-MM-DDTHH:MM:SSZ"),
    )
    missing: bool = field(
        default=False, metadata=switch("jobs of the baseline that are not in OUT leave the baseline, too")
    )
    replace_newer: bool = field(
        default=False, metadata=switch("replace what was approved of a later night, or after --as-of, too")
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(ModelSettings):
    """`video-lab doctor`."""

    out: str | None = field(default=None, metadata=flag("check that this can be written", is_text, "URI"))


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings(NetworkSettings, ModelSettings, RootSettings):
    """`video-lab preprocess`. `options`: YAML, or a mapping of job options."""

    reference: str = field(metadata=flag("image of the character", is_text, "URI"))
    video: str = field(metadata=flag("driving video", is_text, "URI"))
    mask: str | None = field(
        default=None, metadata=flag("replace mode: white where the character goes; else it is made", is_text, "URI")
    )
    out: Path = field(metadata=flag("folder for the files", is_path, "DIR"))
    options: str | Mapping[str, Any] | None = field(
        default=None, metadata=flag("job options, e.g. '{fps: 30, size: 480x832}'", is_job_options, "YAML")
    )


@dataclass(frozen=True, kw_only=True)
class InspectSettings(NetworkSettings, RootSettings):
    """`video-lab inspect`. Without `models` the video is measured, and people are not looked for."""

    video: str = field(metadata=flag("driving video: a path or s3://…", is_text, "VIDEO", positional=True))
    models: str | None = field(
        default_factory=default_models,
        metadata=flag(
            "model store with the detector and the pose network: shows people ($VIDEO_LAB_MODELS)", is_text, "URI"
        ),
    )
    cache: Path = field(
        default_factory=default_cache,
        metadata=flag("for synced models, what was seen and scratch ($VIDEO_LAB_CACHE)", is_path, "DIR"),
    )
    sheet: Path | None = field(
        default=None, metadata=flag("draw frames with numbered boxes, facts and a row a person there", is_path, "PNG")
    )
    device: str = field(default="auto", metadata=choice("auto: cuda where there is one", DEVICES))


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(ModelSettings):
    """`video-lab quantize`."""

    recipe: str = field(default=DEFAULT_RECIPE, metadata=RECIPE)
    format: str | None = field(
        default=None, metadata=choice(f"number format (the recipe's, else {NUMBER_FORMATS[0]})", NUMBER_FORMATS)
    )
    scales: ScaleMethod | None = field(
        default=None,
        metadata=choice(f"how scales are chosen; not with --calibrate, not of SVDQ ({SCALES[0]})", SCALES),
    )
    calibrate: str | Manifest | None = field(
        default=None,
        metadata=flag("render these jobs first; scales and smoothing go by activations", is_manifest, "MANIFEST"),
    )
    lora: tuple[str, ...] = field(
        default=(), metadata=flag("merge it too; repeatable", are_texts, "FILE[:STRENGTH]", repeatable=True)
    )
    rule: str = field(default=ALL_LAYERS, metadata=flag("which layers: all, or sensitive ones kept", is_rule, "NAME"))
    text_encoder: bool = field(default=False, metadata=switch("make the INT4 text encoder too"))
    rank: int | None = field(default=None, metadata=flag("of SVDQ: rank of the 16-bit factors (32)", is_rank, "N"))
    refits: int | None = field(
        default=None,
        metadata=flag("of SVDQ: fit the factors N times to what rounding left (0)", partial(is_whole, 0), "N"),
    )
    export: tuple[str, Path] | None = field(
        default=None, metadata=flag("of SVDQ: write it for another program too", is_export, "{lite,cache-dit} DIR")
    )

    @property
    def number_format(self) -> str:
        """`format`, else the one that the recipe's products need."""
        compute = get_recipe(self.recipe).compute
        return self.format or (compute if compute in SVDQ_LAYOUTS else NUMBER_FORMATS[0])

    @property
    def target_recipe(self) -> str:
        """The recipe that runs the file."""
        fmt, recipe = self.number_format, get_recipe(self.recipe)
        return recipe.name if fmt not in SVDQ_LAYOUTS or recipe.compute == fmt else f"{recipe.name}+{fmt}"

    def check_together(self) -> None:
        super().check_together()
        if self.calibrate is not None and self.scales is not None:
            raise ConfigInvalid("--calibrate chooses the scales itself", todo="Leave --scales out")
        compute = get_recipe(self.recipe).compute
        if compute in SVDQ_LAYOUTS and self.number_format != compute:
            raise ConfigInvalid(
                f"--recipe {self.recipe} runs {compute}, and --format {self.format} is another",
                todo=f"Leave --format out, or write --format {compute}",
            )
        svdq = self.number_format in SVDQ_LAYOUTS
        if svdq:
            check_by("--format", lambda: get_recipe(self.target_recipe))
        if svdq and self.scales is not None:
            raise ConfigInvalid(
                f"--scales {self.scales} is of FP4, and {self.number_format} always searches its scales",
                todo="Leave --scales out",
            )
        for name in ("rank", "refits", "export"):
            if not svdq and getattr(self, name) is not None:
                raise ConfigInvalid(
                    f"--{name} is of SVDQ, and {self.number_format} has no low-rank factors",
                    todo=f"Leave it out, or write --format {next(iter(SVDQ_LAYOUTS))}",
                )


@dataclass(frozen=True, kw_only=True)
class FetchSettings(Settings):
    """`video-lab weights fetch`. Without `part`: all parts that the recipe needs."""

    models: str | None = field(default_factory=default_models, metadata=LOCAL_STORE)
    recipe: str = field(default=DEFAULT_RECIPE, metadata=RECIPE)
    part: tuple[str, ...] | None = field(
        default=None, metadata=flag("only this part; repeatable", are_parts, "PART", repeatable=True)
    )
    endpoint: str | None = field(default=None, metadata=flag("the hub ($HF_ENDPOINT)", is_text, "URL"))
    revision: tuple[str, ...] = field(
        default=(),
        metadata=flag("branch, tag or commit; repeatable", are_revisions, "REPO=REV", repeatable=True),
    )
    dry_run: bool = field(default=False, metadata=switch("show files, sizes and licences only"))


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Settings):
    """`video-lab weights verify`."""

    models: str | None = field(default_factory=default_models, metadata=LOCAL_STORE)
    recipe: str = field(default=DEFAULT_RECIPE, metadata=RECIPE)
    cache: Path = field(
        default_factory=default_cache, metadata=flag("where runs remember digests ($VIDEO_LAB_CACHE)", is_path, "DIR")
    )
    plan: bool = field(default=False, metadata=switch("print the quantised file layer by layer; checks nothing"))
    format: str = field(default=NUMBER_FORMATS[0], metadata=choice("--plan: number format", NUMBER_FORMATS))
    rank: int | None = field(default=None, metadata=flag("--plan: rank, of SVDQ (32)", partial(is_whole, 1), "N"))
    rule: str = field(default=ALL_LAYERS, metadata=flag("--plan: which layers", is_rule, "NAME"))
    against: Path | None = field(
        default=None, metadata=flag("settle how a published FP4 file is read", is_path, "SOURCE")
    )
    layer: str | None = field(default=None, metadata=flag("--against: this layer, not the first", is_text, "NAME"))


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """`video-lab weights demo`."""

    models: str = field(
        default_factory=default_demo_models,
        metadata=flag("folder for the models ($VIDEO_LAB_MODELS, else .cache/demo-models)", is_text, "DIR"),
    )
    media: Path = field(default=Path(".cache/demo-media"), metadata=flag("folder for the media", is_path, "DIR"))
