"""Settings: one frozen value a verb, checked when it is made.

In:   the values of flags, as text from the command line or as Python values. Out: `RunSettings`, `PlanSettings`, …;
ConfigInvalid for a value that cannot be meant, which names the flag. Never: files, networks or devices: whether a store
or a folder is there is found out by the verb.

A field has the name of its flag, with `_` for `-`. The default of a flag stands here and nowhere else. These are
dataclasses, because `--help` reads them: importing pydantic would make it slow.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from runner.batch.shards import choose_shard
from runner.errors import ConfigInvalid
from runner.spec.recipes import DEFAULT_RECIPE, MEMORY_CHOICES, get_recipe

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
    "Flag",
    "ModelSettings",
    "NetworkSettings",
    "PlanSettings",
    "PreprocessSettings",
    "QuantizeSettings",
    "RootSettings",
    "RunSettings",
    "Settings",
    "ShardSettings",
    "StatusSettings",
    "ValidateSettings",
    "VerifySettings",
    "default_cache",
    "flag_name",
    "flags_of",
    "home_folder",
    "parse_age",
]

PosePrecision = Literal["fp32", "int8"]
ScaleMethod = Literal["mse", "absmax"]
TensorrtMode = Literal["off", "auto", "on"]

DEVICES = ("auto", "cpu", "cuda")
CHECKPOINTS = ("out", "cache", "off")
NUMBER_FORMATS = ("nvfp4", "g32")
SCALES: tuple[ScaleMethod, ...] = get_args(ScaleMethod)  # the first is the default

MAX_EMBED_MB = 1024
MAX_REASON = 2000  # characters

AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds

Check = Callable[[str, Any], Any]  # (name of the flag, value) -> the value as the field holds it; raises ConfigInvalid


@dataclass(frozen=True)
class Flag:
    """How a field is written on the command line, and what it may hold."""

    help: str
    check: Check
    metavar: str | None  # None: a switch, which takes no value
    positional: bool = False
    repeatable: bool = False


def _flag(help: str, check: Check, metavar: str | None, **more: bool) -> Mapping[str, Flag]:
    return {"flag": Flag(help, check, metavar, **more)}


def _wrong(flag: str, value: object, wanted: str, todo: str) -> ConfigInvalid:
    return ConfigInvalid(f"must be {wanted}, not {value!r}", where=flag, todo=todo)


# -- what a flag may hold ----------------------------------------------------------------------------------------------


def _is_text(flag: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _wrong(flag, value, "text", "Give a str, or a path where a path is meant")
    return text


def _is_path(flag: str, value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise _wrong(flag, value, "a path on this machine", "Give a str or a Path")
    return Path(value)


def _is_switch(flag: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(flag, value, "True or False", f"Give True for what {flag} does")
    return value


def _is_one_of(choices: Sequence[str], flag: str, value: Any) -> str:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
        hint = f"; did you mean {near[0]}?" if near else ""
        wanted = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ConfigInvalid(
            f"must be {wanted}, not {value!r}{hint}", where=flag, todo=f"Write e.g. {flag} {choices[0]}"
        )
    return str(value)


def _is_whole(least: int, flag: str, value: Any) -> int:
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        text = int(text)
    if not isinstance(text, int) or isinstance(text, bool) or text < least:
        raise _wrong(flag, value, f"a whole number, {least} or more", f"Write e.g. {flag} {least + 3}")
    return text


def _is_seconds(flag: str, value: Any) -> float:
    try:
        seconds = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not seconds >= 0:
        raise _wrong(flag, value, "a number of seconds, 0 or more", f"Write e.g. {flag} 20")
    return seconds


def _is_megabytes(flag: str, value: Any) -> float:
    try:
        size = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        size = math.nan
    if not 0 <= size <= MAX_EMBED_MB:
        raise _wrong(flag, value, f"a number of megabytes, 0 to {MAX_EMBED_MB}", f"Write e.g. {flag} 4")
    return size


def _is_reason(flag: str, value: Any) -> str:
    text = " ".join(_is_text(flag, value).split())
    if not text or len(text) > MAX_REASON:
        raise _wrong(flag, value, f"a text of 1 to {MAX_REASON} characters", f"Write e.g. {flag} 'new LoRA, looked at'")
    return text


def _is_time(flag: str, value: Any) -> str:
    try:
        found = datetime.fromisoformat(_is_text(flag, value))
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise _wrong(flag, value, "a time with its zone, ISO 8601", f"Write e.g. {flag} 2026-01-31T04:00:00Z")
    return found.astimezone(UTC).isoformat(timespec="milliseconds")


def _is_age(flag: str, value: Any) -> str:
    try:
        parse_age(_is_text(flag, value))
    except ValueError as error:
        raise ConfigInvalid(str(error), where=flag, todo=f"Write e.g. {flag} 1h") from error
    return str(value)


def _are_texts(flag: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(flag, value, "a list of texts", f"Give a list; on the command line repeat {flag}")
    return tuple(_is_text(flag, item) for item in value)


def _is_manifest(flag: str, value: Any) -> str | Manifest:
    if isinstance(value, str | os.PathLike):
        return _is_text(flag, value)
    from runner.spec.manifest import Manifest

    if not isinstance(value, Manifest):
        raise _wrong(flag, value, "a path, a URI, - or a Manifest", "Give a path, or what load_manifest returns")
    return value


def _named(flag: str, judge: Callable[[], object]) -> None:
    """Call `judge`; what it refuses names the flag."""
    try:
        judge()
    except ConfigInvalid as error:
        where = None if flag in error.what else flag
        raise ConfigInvalid(error.what, where=where, todo=error.todo) from error


def _is_recipe(flag: str, value: Any) -> str:
    name = _is_text(flag, value)
    _named(flag, lambda: get_recipe(name))
    return name


def _is_run_id(flag: str, value: Any) -> str:
    from runner.records.output_layout import SUMMARY, run_key
    from runner.storage.base import check_key

    run_id = _is_text(flag, value)
    try:
        check_key(run_key(run_id, "shard", SUMMARY))
    except ConfigInvalid as error:
        raise ConfigInvalid(error.what, where=flag, todo="It is a folder's name: write e.g. night-7") from error
    return run_id


def _is_spot(flag: str, value: Any) -> str:
    from runner.batch.spot import choose_notices

    kind = _is_text(flag, value)
    _named(flag, lambda: choose_notices(kind))
    return kind


def _are_gpus(flag: str, value: Any) -> str:
    text = _is_text(flag, value).replace(" ", "")
    numbers = text.split(",")
    if text != "all" and not all(re.fullmatch(r"[0-9]{1,4}", number) for number in numbers):
        raise _wrong(flag, value, "all, or numbers from 0 with commas between them", f"Write e.g. {flag} all")
    if len({number if text == "all" else int(number) for number in numbers}) < len(numbers):
        raise _wrong(flag, value, "numbers of which no two are equal", "Give each GPU once")
    return text


def _is_rule(flag: str, value: Any) -> str:
    name = _is_text(flag, value)
    if name != ALL_LAYERS:  # the other rules are known where torch is
        from runner.quantization.rules import get_rule

        _named(flag, lambda: get_rule(name))
    return name


def _is_assumptions(flag: str, value: Any) -> str:
    from runner.quantization.files.assumptions import parse_assumptions

    text = _is_text(flag, value)
    _named(flag, lambda: parse_assumptions(text))
    return text


def _are_parts(flag: str, value: Any) -> tuple[str, ...]:
    from runner.weights.repositories import sources_of

    parts = _are_texts(flag, value)
    _named(flag, lambda: sources_of(DEFAULT_RECIPE, parts))
    return parts


def _are_revisions(flag: str, value: Any) -> tuple[str, ...]:
    texts = _are_texts(flag, value)
    for text in texts:
        if "=" not in text:
            raise _wrong(flag, text, "REPO=REVISION", f"Write e.g. {flag} owner/name=main")
    return texts


def _is_job_options(flag: str, value: Any) -> str | Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    import yaml

    text = _is_text(flag, value)
    try:
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigInvalid(
            f"is no YAML ({error})", where=flag, todo="Write e.g. '{fps: 30, size: 480x832}'"
        ) from error
    return text


def parse_age(text: str) -> float:
    """`30m` → 1800.0 seconds; the units are s, m, h and d. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no age: write 30m, 1h, 2d or 0s")
    return float(found[1]) * AGE_UNITS[found[2]]


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

MANIFEST = _flag("YAML or JSONL: a path, s3://… or - for standard input", _is_manifest, "MANIFEST", positional=True)
OUT = _flag("output folder or s3://bucket/prefix", _is_text, "OUT", positional=True)
BASELINE = _flag("folder or s3://bucket/prefix of the approved renders", _is_text, "URI")
CACHE = _flag("for synced models and scratch ($VIDEO_LAB_CACHE)", _is_path, "DIR")
STORE = _flag("model store: a folder or s3://… ($VIDEO_LAB_MODELS)", _is_text, "URI")
LOCAL_STORE = _flag("model store: a folder ($VIDEO_LAB_MODELS)", _is_text, "DIR")
RECIPE = _flag("whose files: weights and precision", _is_recipe, "NAME")
ALL_LAYERS = "all"


def _choice(help: str, choices: Sequence[str]) -> Mapping[str, Flag]:
    return _flag(help, partial(_is_one_of, choices), "{" + ",".join(choices) + "}")


def _switch(help: str) -> Mapping[str, Flag]:
    return _flag(help, _is_switch, None)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all settings have in common: each field is checked, and brought to its type, when the value is made."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and str(item.type).endswith("| None"):
                continue
            flag: Flag = item.metadata["flag"]
            object.__setattr__(self, item.name, flag.check(flag_name(item), value))
        self.check_together()

    def check_together(self) -> None:
        """Raise ConfigInvalid for fields that are each right and contradict each other."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which weights, and where they are computed with."""

    models: str | None = field(default_factory=default_models, metadata=STORE)
    cache: Path = field(default_factory=default_cache, metadata=CACHE)
    recipe: str | None = field(
        default=None, metadata=_flag("weights, precision and steps; over the manifest's", _is_recipe, "NAME")
    )
    device: str = field(default="auto", metadata=_choice("auto: cuda where there is one", DEVICES))


@dataclass(frozen=True, kw_only=True)
class ShardSettings(Settings):
    """Which share of the jobs. Without a share the scheduler's environment decides, when the verb starts."""

    shard: str | None = field(
        default=None,
        metadata=_flag(
            "this share of the jobs, or any: each job that no other runner holds; default: from the scheduler's "
            "environment",
            _is_text,
            "I/N|any",
        ),
    )
    shard_count: int | None = field(
        default=None, metadata=_flag("shares in all, where the scheduler tells only I", partial(_is_whole, 1), "N")
    )

    def check_together(self) -> None:
        super().check_together()
        if self.shard is not None:
            _named("--shard", lambda: choose_shard(self.shard, self.shard_count, {}))


@dataclass(frozen=True, kw_only=True)
class RootSettings(Settings):
    """Where inputs may lie."""

    input_root: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            "refuse inputs that lie elsewhere, symlinks followed; a folder or s3://bucket/prefix, repeatable",
            _are_texts,
            "DIR",
            repeatable=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """How the preprocessing's networks run."""

    pose_precision: PosePrecision = field(
        default="fp32",
        metadata=_choice(
            "int8: the pose network's matrix products in 8 bits, on the CPU only; made once, kept in --cache",
            get_args(PosePrecision),
        ),
    )
    tensorrt: TensorrtMode = field(
        default="off",
        metadata=_choice(
            "preprocessing through TensorRT on a GPU, engines kept in --cache; auto: where it is installed",
            get_args(TensorrtMode),
        ),
    )


# -- one value a verb --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSettings(NetworkSettings, RootSettings, ShardSettings, ModelSettings):
    """`video-lab run`. `manifest` may be a path, a URI, `-` for standard input, or a manifest that was read before."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    out: str = field(metadata=_flag("output folder or s3://bucket/prefix", _is_text, "URI"))
    run_id: str | None = field(
        default=None,
        metadata=_flag("of the summary; default: the scheduler's job id, else the time", _is_run_id, "ID"),
    )
    memory: str | None = field(
        default=None,
        metadata=_flag(
            f"where weights live: {', '.join(MEMORY_CHOICES)}; over the manifest's",
            partial(_is_one_of, MEMORY_CHOICES),
            "MODE",
        ),
    )
    force: bool = field(default=False, metadata=_switch("run every job, done or not"))
    retry_failed: bool = field(default=False, metadata=_switch("run only jobs that have failed"))
    max_attempts: int = field(default=3, metadata=_flag("attempts a job gets; 0: no limit", partial(_is_whole, 0), "N"))
    drain_s: float = field(
        default=20.0, metadata=_flag("seconds the running job gets after a signal", _is_seconds, "S")
    )
    checkpoint: str = field(
        default="out",
        metadata=_choice(
            "where the finished segments of a job are kept until it is published, so that a killed job goes on after "
            "them: below its output folder, below --cache, or nowhere",
            CHECKPOINTS,
        ),
    )
    spot: str | None = field(
        default=None,
        metadata=_flag(
            "stop early when the cloud announces that it takes this machine back, or when the file PATH appears",
            _is_spot,
            "aws|gcp|file:PATH",
        ),
    )
    assume: str | None = field(
        default=None,
        metadata=_flag(
            "how to read a published FP4 file where it does not say, e.g. nibble=high", _is_assumptions, "K=V,…"
        ),
    )
    sheet: Path | None = field(
        default=None, metadata=_flag("also draw a contact sheet of this run's outputs", _is_path, "PNG")
    )
    gpus: str | None = field(
        default=None,
        metadata=_flag(
            "a process on each of these GPUs of this machine, all or numbers; each runs as with --shard any",
            _are_gpus,
            "all|0,1,…",
        ),
    )

    def check_together(self) -> None:
        super().check_together()
        if self.gpus is None:
            return
        if self.device == "cpu":
            raise ConfigInvalid("--gpus and --device cpu contradict each other", todo="Leave one of them out")
        if (self.shard or "any").strip() != "any" or self.shard_count is not None:
            raise ConfigInvalid(
                "--gpus shares all jobs among its processes, and --shard I/N or --shard-count asks for a part of them",
                todo="Leave one of them out; --gpus on several machines shares the manifest too",
            )


@dataclass(frozen=True, kw_only=True)
class ValidateSettings(RootSettings):
    """`video-lab validate`."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    deep: bool = field(default=False, metadata=_switch("decode images whole, download s3:// inputs and open them too"))
    no_inputs: bool = field(default=False, metadata=_switch("check the manifest's text only"))
    models: str | None = field(
        default=None,
        metadata=_flag("check that this model store has the jobs' LoRAs, and whole", _is_text, "URI"),
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(RootSettings, ShardSettings, ModelSettings):
    """`video-lab plan`."""

    manifest: str | Manifest = field(metadata=MANIFEST)
    gpu: str | None = field(
        default=None,
        metadata=_flag("whose seconds to forecast, e.g. 'RTX 5090'; default: the one here", _is_text, "NAME"),
    )


@dataclass(frozen=True, kw_only=True)
class StatusSettings(Settings):
    """`video-lab status`."""

    out: str = field(metadata=OUT)


@dataclass(frozen=True, kw_only=True)
class CleanSettings(Settings):
    """`video-lab clean`."""

    out: str = field(metadata=OUT)
    older_than: str = field(default="1h", metadata=_flag("leave what is younger: 30m, 1h, 2d, 0s", _is_age, "AGE"))
    checkpoints: bool = field(
        default=False,
        metadata=_switch("finished segments of jobs that are not done too: a rerun begins at their first segment then"),
    )
    yes: bool = field(default=False, metadata=_switch("remove them; without it they are only listed"))


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """`video-lab compare`. Without `manifest`: the limits of the manifest that was run into `out`."""

    out: str = field(metadata=OUT)
    baseline: str = field(metadata=BASELINE)
    report: str | None = field(
        default=None,
        metadata=_flag("write report.html, junit.xml, comparison.json and summary.md there", _is_text, "URI"),
    )
    only: tuple[str, ...] = field(
        default=(), metadata=_flag("only jobs whose id fits; repeatable", _are_texts, "GLOB", repeatable=True)
    )
    manifest: str | Manifest | None = field(
        default=None, metadata=_flag("take the limits from this manifest's regression:", _is_manifest, "MANIFEST")
    )
    models: str | None = field(
        default=None,
        metadata=_flag("model store: compare the person's identity with its image encoder too", _is_text, "URI"),
    )
    bootstrap: bool = field(
        default=False, metadata=_switch("accept jobs that have no baseline yet as drafts: a first night")
    )
    record: bool = field(default=False, metadata=_switch("add this night to the baseline's history"))
    suggest: bool = field(default=False, metadata=_switch("print limits that follow from the nights in the history"))
    embed_mb: float = field(
        default=4.0,
        metadata=_flag("videos up to this size are put into report.html, larger ones beside it", _is_megabytes, "MB"),
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class ApproveSettings(Settings):
    """`video-lab approve`. Without `job`: all jobs of `out` that succeeded."""

    out: str = field(metadata=OUT)
    baseline: str = field(metadata=BASELINE)
    job: tuple[str, ...] = field(
        default=(), metadata=_flag("only jobs whose id fits; repeatable", _are_texts, "GLOB", repeatable=True)
    )
    why: str = field(metadata=_flag("the reason, which is kept with the baseline", _is_reason, "TEXT"))
    who: str | None = field(default=None, metadata=_flag("who approves; default: USER@HOST", _is_reason, "NAME"))
    as_of: str | None = field(
        default=None,
        metadata=_flag("leave jobs alone that were approved after this time, UTC", _is_time, "YYYY-MM-DDTHH:MM:SSZ"),
    )
    missing: bool = field(
        default=False, metadata=_switch("jobs of the baseline that are not in OUT leave the baseline, too")
    )
    replace_newer: bool = field(
        default=False, metadata=_switch("replace what was approved of a later night, or after --as-of, too")
    )
    cache: Path = field(default_factory=default_cache, metadata=CACHE)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(ModelSettings):
    """`video-lab doctor`."""

    out: str | None = field(default=None, metadata=_flag("check that this can be written", _is_text, "URI"))


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings(NetworkSettings, ModelSettings, RootSettings):
    """`video-lab preprocess`. `options`: YAML, or a mapping of job options."""

    reference: str = field(metadata=_flag("image of the character", _is_text, "URI"))
    video: str = field(metadata=_flag("driving video", _is_text, "URI"))
    mask: str | None = field(
        default=None, metadata=_flag("replace mode: white where the character goes; else it is made", _is_text, "URI")
    )
    out: Path = field(metadata=_flag("folder for the files", _is_path, "DIR"))
    options: str | Mapping[str, Any] | None = field(
        default=None, metadata=_flag("job options, e.g. '{fps: 30, size: 480x832}'", _is_job_options, "YAML")
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(ModelSettings):
    """`video-lab quantize`."""

    recipe: str = field(default=DEFAULT_RECIPE, metadata=RECIPE)
    format: str = field(default=NUMBER_FORMATS[0], metadata=_choice("number format", NUMBER_FORMATS))
    scales: ScaleMethod | None = field(
        default=None, metadata=_choice(f"how scales are chosen; not with --calibrate ({SCALES[0]})", SCALES)
    )
    calibrate: str | Manifest | None = field(
        default=None,
        metadata=_flag("render these jobs first and weight scales by activations", _is_manifest, "MANIFEST"),
    )
    lora: tuple[str, ...] = field(
        default=(), metadata=_flag("merge it too; repeatable", _are_texts, "FILE[:STRENGTH]", repeatable=True)
    )
    rule: str = field(default=ALL_LAYERS, metadata=_flag("which layers: all, or sensitive ones kept", _is_rule, "NAME"))
    text_encoder: bool = field(default=False, metadata=_switch("make the INT4 text encoder too"))

    def check_together(self) -> None:
        super().check_together()
        if self.calibrate is not None and self.scales is not None:
            raise ConfigInvalid("--calibrate chooses the scales itself", todo="Leave --scales out")


@dataclass(frozen=True, kw_only=True)
class FetchSettings(Settings):
    """`video-lab weights fetch`. Without `part`: all parts that the recipe needs."""

    models: str | None = field(default_factory=default_models, metadata=LOCAL_STORE)
    recipe: str = field(default=DEFAULT_RECIPE, metadata=RECIPE)
    part: tuple[str, ...] | None = field(
        default=None, metadata=_flag("only this part; repeatable", _are_parts, "PART", repeatable=True)
    )
    endpoint: str | None = field(default=None, metadata=_flag("the hub ($HF_ENDPOINT)", _is_text, "URL"))
    revision: tuple[str, ...] = field(
        default=(),
        metadata=_flag("branch, tag or commit; repeatable", _are_revisions, "REPO=REV", repeatable=True),
    )
    dry_run: bool = field(default=False, metadata=_switch("show files, sizes and licences only"))


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Settings):
    """`video-lab weights verify`."""

    models: str | None = field(default_factory=default_models, metadata=LOCAL_STORE)
    recipe: str = field(default=DEFAULT_RECIPE, metadata=RECIPE)
    cache: Path = field(
        default_factory=default_cache, metadata=_flag("where runs remember digests ($VIDEO_LAB_CACHE)", _is_path, "DIR")
    )
    plan: bool = field(default=False, metadata=_switch("print the quantised file layer by layer; checks nothing"))
    format: str = field(default=NUMBER_FORMATS[0], metadata=_choice("--plan: number format", NUMBER_FORMATS))
    rule: str = field(default=ALL_LAYERS, metadata=_flag("--plan: which layers", _is_rule, "NAME"))
    against: Path | None = field(
        default=None, metadata=_flag("settle how a published FP4 file is read", _is_path, "SOURCE")
    )
    layer: str | None = field(default=None, metadata=_flag("--against: this layer, not the first", _is_text, "NAME"))


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """`video-lab weights demo`."""

    models: str = field(
        default_factory=default_demo_models,
        metadata=_flag("folder for the models ($VIDEO_LAB_MODELS, else .cache/demo-models)", _is_text, "DIR"),
    )
    media: Path = field(default=Path(".cache/demo-media"), metadata=_flag("folder for the media", _is_path, "DIR"))


# -- for the command line ----------------------------------------------------------------------------------------------


def flag_name(item: dataclasses.Field[Any]) -> str:
    """As it is typed: `--max-attempts`; of a positional argument its place in the usage: `MANIFEST`."""
    flag: Flag = item.metadata["flag"]
    return str(flag.metavar) if flag.positional else "--" + item.name.replace("_", "-")


def flags_of(settings: type[Settings]) -> list[tuple[dataclasses.Field[Any], Flag]]:
    """The fields of a verb's settings, its own before those that it shares with other verbs."""
    own = inspect.get_annotations(settings)
    items = sorted(dataclasses.fields(settings), key=lambda item: item.name not in own)
    return [(item, item.metadata["flag"]) for item in items]
