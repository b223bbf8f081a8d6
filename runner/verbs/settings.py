"""Settings: one frozen value per verb, checked when it is created.

In:   the values of flags, as text from the command line or as Python values. Out: `RunSettings`, `PlanSettings`, …;
ConfigInvalid for an invalid value; it names the flag. Never: files, networks or devices: the verb checks whether a
store or a folder exists.

A field has the name of its flag, with `_` for `-`, see flags.py. The default of a flag is defined here and nowhere
else. The flags that `--help` shows first are listed in commands.py.
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
    """Return $VIDEO_LAB_CACHE, or a folder below the home folder."""
    named = os.environ.get("VIDEO_LAB_CACHE")
    return Path(named) if named else home_folder() / ".cache" / "video-lab"


def default_models() -> str | None:
    """Return $VIDEO_LAB_MODELS."""
    return os.environ.get("VIDEO_LAB_MODELS")


def default_demo_models() -> str:
    """Return $VIDEO_LAB_MODELS, or a folder below the working directory."""
    return default_models() or ".cache/demo-models"


def home_folder() -> Path:
    """Return the home folder. A user without one (a container with --user) gets a folder for temporary files."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"video-lab-{os.getuid()}"


# -- fields that several verbs have ------------------------------------------------------------------------------------

MANIFEST = flag(
    "manifest in YAML or JSON lines: a path, s3://… or - for standard input", is_manifest, "MANIFEST", positional=True
)
OUT = flag("output folder of the run: a path or s3://bucket/prefix", is_text, "OUT", positional=True)
BASELINE = flag("approved renders: a folder or s3://bucket/prefix", is_text, "URI")
CACHE = flag("folder for caches, models from a bucket and temporary files (default: $VIDEO_LAB_CACHE)", is_path, "DIR")
STORE = flag("model store: a folder or s3://… (default: $VIDEO_LAB_MODELS)", is_text, "URI")
LOCAL_STORE = flag("model store: a folder (default: $VIDEO_LAB_MODELS)", is_text, "DIR")
RECIPE = flag("recipe: weights, precision and steps", is_recipe, "NAME")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The weights, and the device that computes with them."""

    models: str | None = field(default_factory=default_models, metadata=STORE)
    cache: Path = field(default_factory=default_cache, metadata=CACHE)
    recipe: str | None = field(
        default=None, metadata=flag("weights, precision and steps; replaces the manifest's recipe", is_recipe, "NAME")
    )
    device: str = field(default="auto", metadata=choice("auto: cuda if there is a GPU", DEVICES))


@dataclass(frozen=True, kw_only=True)
class ShardSettings(Settings):
    """The share of the jobs. Without one the scheduler's environment decides when the verb starts."""

    shard: str | None = field(
        default=None,
        metadata=flag(
            "share I of N of the jobs; any: each job that no other runner holds (default: from the scheduler's "
            "environment)",
            is_text,
            "I/N|any",
        ),
    )
    shard_count: int | None = field(
        default=None, metadata=flag("number of shares, if the scheduler gives only I", partial(is_whole, 1), "N")
    )

    def check_together(self) -> None:
        super().check_together()
        if self.shard is not None:
            check_by("--shard", lambda: choose_shard(self.shard, self.shard_count, {}))


@dataclass(frozen=True, kw_only=True)
class SelectionSettings(Settings):
    """The selected jobs of the manifest. A shard is a share of these."""

    only: tuple[str, ...] = field(
        default=(), metadata=flag("only jobs whose id matches; repeatable", are_texts, "GLOB", repeatable=True)
    )
    limit: int | None = field(
        default=None,
        metadata=flag(
            "only the first N jobs, after --only and before --shard; jobs that are done count too",
            partial(is_whole, 1),
            "N",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class RootSettings(Settings):
    """The folders that inputs may be in."""

    input_root: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            "refuse inputs outside this folder or s3://bucket/prefix; symbolic links are followed; repeatable",
            are_texts,
            "DIR",
            repeatable=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """How the networks of the preprocessing run."""

    pose_precision: PosePrecision = field(
        default="fp32",
        metadata=choice(
            "int8: matrix products of the pose network in 8 bits, on a CPU only; made once and kept in --cache",
            get_args(PosePrecision),
        ),
    )
    tensorrt: TensorrtMode = field(
        default="off",
        metadata=choice(
            "TensorRT for the preprocessing on a GPU; engines are kept in --cache; auto: if it is installed",
            get_args(TensorrtMode),
        ),
    )


# -- one value per verb ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSettings(NetworkSettings, RootSettings, SelectionSettings, ShardSettings, ModelSettings):
    """`video-lab run`. `manifest` may be a path, a URI, `-` for standard input, or a `Manifest`."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    out: str = field(metadata=flag("output folder: a path or s3://bucket/prefix", is_text, "URI"))
    run_id: str | None = field(
        default=None,
        metadata=flag("name of the run (default: the scheduler's job id, or the time)", is_run_id, "ID"),
    )
    memory: str | None = field(
        default=None,
        metadata=flag(
            f"memory mode: {', '.join(MEMORY_CHOICES)}; replaces the manifest's",
            partial(is_one_of, MEMORY_CHOICES),
            "MODE",
        ),
    )
    force: bool = field(default=False, metadata=switch("render every job again, also jobs that are done"))
    retry_failed: bool = field(default=False, metadata=switch("render only jobs that have failed"))
    max_attempts: int = field(default=3, metadata=flag("attempts per job; 0: no limit", partial(is_whole, 0), "N"))
    drain_s: float = field(default=20.0, metadata=flag("seconds for the running job after a signal", is_seconds, "S"))
    checkpoint: str = field(
        default="out",
        metadata=choice(
            "where finished segments are kept until their job is published, so that a killed job can continue: in "
            "the job's output folder, in --cache, or nowhere",
            CHECKPOINTS,
        ),
    )
    spot: str | None = field(
        default=None,
        metadata=flag(
            "stop when the cloud announces that it takes this machine back, or when the file PATH appears",
            is_spot,
            "aws|gcp|file:PATH",
        ),
    )
    assume: str | None = field(
        default=None,
        metadata=flag(
            "how to read a published FP4 file that does not state it, e.g. nibble=high", is_read_options, "K=V,…"
        ),
    )
    sheet: Path | None = field(
        default=None, metadata=flag("also write a contact sheet of this run's outputs", is_path, "PNG")
    )
    dry_run: bool = field(
        default=False,
        metadata=switch("show which jobs would run, and why; renders and writes nothing"),
    )
    gpus: str | None = field(
        default=None,
        metadata=flag(
            "one process per GPU of this machine: all, or these numbers; they share the jobs as with --shard any",
            are_gpus,
            "all|0,1,…",
        ),
    )
    on: str | None = field(
        default=None,
        metadata=flag(
            "use Ray, one worker per GPU: of this machine (ray), of the cluster of RAY_ADDRESS or of this machine "
            "(ray:auto), or of the cluster at HOST:PORT, from one of its nodes",
            is_on,
            "ray|ray:auto|ray:HOST:PORT",
        ),
    )
    workers: int | None = field(
        default=None, metadata=flag("with --on: number of workers, on CPUs", partial(is_whole, 1), "N")
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
                "--gpus shares all jobs among its processes, but --shard I/N or --shard-count selects a part of them",
                todo="Leave one of them out; --gpus on several machines shares the manifest too",
            )

    def _check_ray(self) -> None:
        if self.on is None:
            if self.workers is not None:
                raise ConfigInvalid(
                    "--workers needs --on: it is the number of workers that --on starts", todo="Give --on ray too"
                )
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
                "--on without --workers starts a worker on each GPU, which contradicts --device cpu",
                todo="Give --workers N instead of --device cpu",
            )
        if (self.shard or "any").strip() != "any" or self.shard_count is not None:
            raise ConfigInvalid(
                "--on gives all jobs to its workers, but --shard I/N or --shard-count selects a part of the jobs",
                todo="Leave one of them out",
            )


@dataclass(frozen=True, kw_only=True)
class ValidateSettings(RootSettings, SelectionSettings):
    """`video-lab validate`."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    deep: bool = field(default=False, metadata=switch("decode images completely; download s3:// inputs and open them"))
    no_inputs: bool = field(default=False, metadata=switch("check only the text of the manifest"))
    models: str | None = field(
        default=None,
        metadata=flag("also check the LoRAs and optional networks of the jobs in this model store", is_text, "URI"),
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(RootSettings, SelectionSettings, ShardSettings, ModelSettings):
    """`video-lab plan`."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    gpu: str | None = field(
        default=None,
        metadata=flag(
            "GPU to forecast the seconds of, e.g. 'RTX 5090' (default: the GPU of this machine)", is_text, "NAME"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class StatusSettings(Settings):
    """`video-lab status`. `wait` and `watch` return when no job of the run is left."""

    out: str = field(metadata=OUT)
    run: str | None = field(default=None, metadata=flag("the run (default: the run that began last)", is_run_id, "ID"))
    all: bool = field(
        default=False,
        metadata=switch("show every job, also of a run of more than 50 jobs"),
    )
    wait: bool = field(
        default=False,
        metadata=switch("return when no job is pending, running or lost; with --run also wait for the run to begin"),
    )
    watch: bool = field(
        default=False, metadata=switch("wait, and show the status every --every seconds, with rate and ETA")
    )
    every: float = field(default=10.0, metadata=flag("seconds between two readings of the status", is_interval, "S"))
    timeout: str | None = field(
        default=None,
        metadata=flag("stop waiting after 30m, 2h, …, with exit code 3 (default: never)", is_age, "AGE"),
    )

    def check_together(self) -> None:
        if self.timeout is not None and not (self.wait or self.watch):
            raise ConfigInvalid(
                "needs --wait or --watch", where="--timeout", todo="Give one of them, or leave --timeout out"
            )


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """`video-lab report`. Without `run`: the run that began last. Without `to`: into the run's own folder."""

    out: str = field(metadata=OUT)
    run: str | None = field(default=None, metadata=flag("the run (default: the run that began last)", is_run_id, "ID"))
    gpu_hour: float | None = field(
        default=None,
        metadata=flag("price of one hour of one GPU; adds the cost per job and per second of film", is_price, "PRICE"),
    )
    to: str | None = field(
        default=None,
        metadata=flag(
            "folder or s3://bucket/prefix for report.html and report.json (default: the run's folder below OUT)",
            is_text,
            "URI",
        ),
    )
    wait: bool = field(
        default=False,
        metadata=switch("first wait until the run has begun and no job is pending, running or lost"),
    )
    every: float = field(
        default=10.0, metadata=flag("with --wait: seconds between two readings of the status", is_interval, "S")
    )
    timeout: str | None = field(
        default=None,
        metadata=flag(
            "with --wait: stop waiting after 30m, 2h, … and report what exists (default: never)", is_age, "AGE"
        ),
    )

    def check_together(self) -> None:
        if self.timeout is not None and not self.wait:
            raise ConfigInvalid("needs --wait", where="--timeout", todo="Give --wait, or leave --timeout out")


@dataclass(frozen=True, kw_only=True)
class CleanSettings(Settings):
    """`video-lab clean`."""

    out: str = field(metadata=OUT)
    older_than: str = field(
        default="1h", metadata=flag("remove only files older than this: 30m, 1h, 2d, 0s", is_age, "AGE")
    )
    checkpoints: bool = field(
        default=False,
        metadata=switch(
            "also remove finished segments of jobs that are not done; these jobs then begin at their first segment"
        ),
    )
    yes: bool = field(default=False, metadata=switch("remove the files; without this flag they are only listed"))


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """`video-lab compare`. Without `manifest`: the limits of the manifest that was run into `out`."""

    out: str = field(metadata=OUT)
    baseline: str = field(metadata=BASELINE)
    report: str | None = field(
        default=None,
        metadata=flag(
            "folder or s3://bucket/prefix for report.html, junit.xml, comparison.json and summary.md", is_text, "URI"
        ),
    )
    only: tuple[str, ...] = field(
        default=(), metadata=flag("only jobs whose id matches; repeatable", are_texts, "GLOB", repeatable=True)
    )
    manifest: str | Manifest | None = field(
        default=None, metadata=flag("take the limits (`regression:`) from this manifest", is_manifest, "MANIFEST")
    )
    models: str | None = field(
        default=None,
        metadata=flag("model store: also compare the identity of the person with its image encoder", is_text, "URI"),
    )
    bootstrap: bool = field(
        default=False, metadata=switch("accept jobs without a baseline as drafts; for a first night")
    )
    record: bool = field(default=False, metadata=switch("add this night to the history of the baseline"))
    suggest: bool = field(default=False, metadata=switch("print limits that the nights of the history keep"))
    embed_mb: float = field(
        default=4.0,
        metadata=flag(
            "embed videos up to this size in report.html; larger videos become files beside it", is_megabytes, "MB"
        ),
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class ApproveSettings(Settings):
    """`video-lab approve`. Without `job`: all jobs of `out` that succeeded."""

    out: str = field(metadata=OUT)
    baseline: str = field(metadata=BASELINE)
    job: tuple[str, ...] = field(
        default=(), metadata=flag("only jobs whose id matches; repeatable", are_texts, "GLOB", repeatable=True)
    )
    why: str = field(metadata=flag("reason of the approval; it is kept with the baseline", is_reason, "TEXT"))
    who: str | None = field(default=None, metadata=flag("who approves (default: USER@HOST)", is_reason, "NAME"))
    as_of: str | None = field(
        default=None,
        metadata=flag("refuse jobs that were approved after this time, UTC", is_time, "YYYY-MM-DDTHH:MM:SSZ"),
    )
    missing: bool = field(default=False, metadata=switch("also remove jobs from the baseline that are not in OUT"))
    replace_newer: bool = field(
        default=False, metadata=switch("also replace approvals of a later night, and approvals after --as-of")
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(ModelSettings):
    """`video-lab doctor`."""

    out: str | None = field(
        default=None,
        metadata=flag("also check that this output folder or s3://bucket/prefix can be written", is_text, "URI"),
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings(NetworkSettings, ModelSettings, RootSettings):
    """`video-lab preprocess`. `options`: YAML, or a mapping of job options."""

    reference: str = field(metadata=flag("image of the character", is_text, "URI"))
    video: str = field(metadata=flag("driving video", is_text, "URI"))
    mask: str | None = field(
        default=None,
        metadata=flag(
            "mask video for replace mode: white where the character goes (default: SAM 2 makes it)", is_text, "URI"
        ),
    )
    out: Path = field(metadata=flag("folder for the files", is_path, "DIR"))
    options: str | Mapping[str, Any] | None = field(
        default=None, metadata=flag("job options, e.g. '{fps: 30, size: 480x832}'", is_job_options, "YAML")
    )


@dataclass(frozen=True, kw_only=True)
class InspectSettings(NetworkSettings, RootSettings):
    """`video-lab inspect`. Without `models` the video is measured, and people are not searched for."""

    video: str = field(metadata=flag("driving video: a path or s3://…", is_text, "VIDEO", positional=True))
    models: str | None = field(
        default_factory=default_models,
        metadata=flag(
            "model store with the detector and the pose network, to find people (default: $VIDEO_LAB_MODELS)",
            is_text,
            "URI",
        ),
    )
    cache: Path = field(
        default_factory=default_cache,
        metadata=flag(
            "folder for caches, models from a bucket and temporary files (default: $VIDEO_LAB_CACHE)", is_path, "DIR"
        ),
    )
    sheet: Path | None = field(
        default=None,
        metadata=flag("write a picture: frames with numbered boxes, facts, one row per person", is_path, "PNG"),
    )
    device: str = field(default="auto", metadata=choice("auto: cuda if there is a GPU", DEVICES))


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(ModelSettings):
    """`video-lab quantize`."""

    recipe: str = field(default=DEFAULT_RECIPE, metadata=RECIPE)
    format: str | None = field(
        default=None, metadata=choice(f"number format (default: the recipe's, or {NUMBER_FORMATS[0]})", NUMBER_FORMATS)
    )
    scales: ScaleMethod | None = field(
        default=None,
        metadata=choice(f"how scales are chosen; not with --calibrate or SVDQ (default: {SCALES[0]})", SCALES),
    )
    calibrate: str | Manifest | None = field(
        default=None,
        metadata=flag(
            "first render the jobs of this manifest and choose scales and smoothing by their activations",
            is_manifest,
            "MANIFEST",
        ),
    )
    lora: tuple[str, ...] = field(
        default=(), metadata=flag("also merge this LoRA; repeatable", are_texts, "FILE[:STRENGTH]", repeatable=True)
    )
    rule: str = field(
        default=ALL_LAYERS, metadata=flag("layers to quantise: all, or all but sensitive ones", is_rule, "NAME")
    )
    text_encoder: bool = field(default=False, metadata=switch("also make the INT4 text encoder"))
    rank: int | None = field(
        default=None, metadata=flag("SVDQ: rank of the 16-bit factors (default: 32)", is_rank, "N")
    )
    refits: int | None = field(
        default=None,
        metadata=flag(
            "SVDQ: how often the factors are fitted again to the rounding error (default: 0)", partial(is_whole, 0), "N"
        ),
    )
    export: tuple[str, Path] | None = field(
        default=None, metadata=flag("SVDQ: also write the file for another program", is_export, "{lite,cache-dit} DIR")
    )

    @property
    def number_format(self) -> str:
        """`format`, or the format that the recipe computes in."""
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
                f"--recipe {self.recipe} needs the format {compute}, but --format is {self.format}",
                todo=f"Leave --format out, or write --format {compute}",
            )
        svdq = self.number_format in SVDQ_LAYOUTS
        if svdq:
            check_by("--format", lambda: get_recipe(self.target_recipe))
        if svdq and self.scales is not None:
            raise ConfigInvalid(
                f"--scales {self.scales} is for FP4; {self.number_format} always searches its scales",
                todo="Leave --scales out",
            )
        for name in ("rank", "refits", "export"):
            if not svdq and getattr(self, name) is not None:
                raise ConfigInvalid(
                    f"--{name} is for SVDQ; {self.number_format} has no low-rank factors",
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
    endpoint: str | None = field(
        default=None, metadata=flag("address of the model hub (default: $HF_ENDPOINT)", is_text, "URL")
    )
    revision: tuple[str, ...] = field(
        default=(),
        metadata=flag("branch, tag or commit; repeatable", are_revisions, "REPO=REV", repeatable=True),
    )
    dry_run: bool = field(default=False, metadata=switch("only show files, sizes and licences"))


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Settings):
    """`video-lab weights verify`."""

    models: str | None = field(default_factory=default_models, metadata=LOCAL_STORE)
    recipe: str = field(default=DEFAULT_RECIPE, metadata=RECIPE)
    cache: Path = field(
        default_factory=default_cache,
        metadata=flag("folder where digests of files are kept (default: $VIDEO_LAB_CACHE)", is_path, "DIR"),
    )
    plan: bool = field(default=False, metadata=switch("print the layers of the quantised file; checks nothing"))
    format: str = field(default=NUMBER_FORMATS[0], metadata=choice("with --plan: number format", NUMBER_FORMATS))
    rank: int | None = field(
        default=None, metadata=flag("with --plan: rank of SVDQ (default: 32)", partial(is_whole, 1), "N")
    )
    rule: str = field(default=ALL_LAYERS, metadata=flag("with --plan: layers to quantise", is_rule, "NAME"))
    against: Path | None = field(
        default=None,
        metadata=flag("find out how to read a published FP4 file, from the weights in SOURCE", is_path, "SOURCE"),
    )
    layer: str | None = field(
        default=None, metadata=flag("with --against: compare this layer (default: the first)", is_text, "NAME")
    )


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """`video-lab weights demo`."""

    models: str = field(
        default_factory=default_demo_models,
        metadata=flag("folder for the models (default: $VIDEO_LAB_MODELS, or .cache/demo-models)", is_text, "DIR"),
    )
    media: Path = field(default=Path(".cache/demo-media"), metadata=flag("folder for the media", is_path, "DIR"))
