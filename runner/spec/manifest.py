"""Manifest: read and check the jobs to render.

In:   YAML or JSON lines, from a path, a URI or stdin. Out: `Manifest`, a tuple of valid jobs; or ManifestInvalid with
      all problems at once, each with its line, its key and, where there is one, a suggestion.
Never: whether the inputs exist (validate.py), the weights of a recipe, earlier results.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import IO, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic.json_schema import models_json_schema

from runner.errors import ConfigInvalid, ManifestInvalid
from runner.spec.checks import Problems, check, merge, without
from runner.spec.matrix import ID_PATTERN, check_id, matrix_ids
from runner.spec.options import DEFAULT_PROMPT, POSE, REFERENCE, Frozen, JobOptions, whole_number
from runner.spec.recipes import MemoryChoice, get_recipe
from runner.spec.regression_limits import RegressionLimits
from runner.spec.source import is_json_lines, read_json_lines, read_source, read_yaml, resolve_place
from runner.spec.text import Located, TextInvalid, join_path

__all__ = ["Job", "Manifest", "load_manifest", "manifest_schema", "parse_manifest"]

MAX_JOBS = 200_000


@dataclass(frozen=True)
class Job:
    """One video to render. `reference`, `video` and `mask` are absolute paths or URIs."""

    id: str
    reference: str
    video: str
    mask: str | None
    prompt: str
    options: JobOptions
    line: int | None  # in the manifest, from 1
    official: str | None = None  # folder of the official script's files; reference and video are then two of them
    regression: RegressionLimits = field(default=RegressionLimits())  # the job's, over those of the manifest


@dataclass(frozen=True)
class Manifest:
    """A manifest. Its jobs are first the listed ones, in order, then those of the matrix, videos varying fastest."""

    version: int
    recipe: str | None
    memory: str | None
    jobs: tuple[Job, ...]
    source: str


# The keys of a manifest. Options are validated where they are merged, so here they are any mapping.
_OptionValues = Annotated[
    dict[str, Any] | None, WithJsonSchema({"anyOf": [{"refers": "JobOptions"}, {"type": "null"}]})
]
_Id = Annotated[str, AfterValidator(check_id), WithJsonSchema({"type": "string", "pattern": f"^{ID_PATTERN}$"})]
_Place = Annotated[str, Field(min_length=1)]
_Limits = Annotated[
    RegressionLimits | None,
    Field(description="how far a render may differ from its baseline; a job's override the manifest's, key by key"),
]


def _known_version(value: Any) -> Any:
    if whole_number(value) != 1:
        raise ValueError(f"{value} is unknown; this runner reads version: 1")
    return value


_Version = Annotated[Literal[1], BeforeValidator(_known_version)]


def _known_recipe(name: str) -> str:
    try:
        get_recipe(name)
    except ConfigInvalid as err:
        end = "" if err.what.endswith("?") else "."
        raise ValueError(f"{err.what}{end} {err.todo}") from err
    return name


_RUN_KEYS = ("version", "recipe", "memory")  # keys of the run, not of its jobs
_RecipeName = Annotated[str, Field(min_length=1), AfterValidator(_known_recipe)]


class Defaults(Frozen):
    """Values for all jobs that do not set them."""

    prompt: str | None = Field(default=None, description="what the character does, in words")
    options: _OptionValues = Field(default=None, description="options; each job's are merged over them, key by key")


class CommonFields(Defaults):
    """The fields of a job besides its inputs. A matrix has them for all its jobs."""

    regression: _Limits = None


class Entry(CommonFields):
    """One job."""

    id: _Id | None = Field(default=None, description="unique; becomes the folder of the job's output")
    custom_id: _Id | None = Field(default=None, description="another name of id")
    reference: _Place = Field(description="image of the character: a path or s3:// URI")
    video: _Place = Field(description="driving video: a path or s3:// URI")
    mask: _Place | None = Field(
        default=None, description="replace mode: video or image, white where the character goes; null: made by SAM 2"
    )


class OfficialEntry(CommonFields):
    """One job whose inputs are the official script's files, in the folder that `preprocess.from` names."""

    id: _Id | None = Field(default=None, description="unique; becomes the folder of the job's output")
    custom_id: _Id | None = Field(default=None, description="another name of id")


class Matrix(CommonFields):
    """One job for each pair of a reference and a video."""

    references: list[_Place] = Field(min_length=1, description="images of characters")
    videos: list[_Place] = Field(min_length=1, description="driving videos")


class Header(Frozen):
    """The keys of a manifest besides its jobs. In JSON lines, the first line may have them."""

    version: _Version = Field(default=1, description="of this format")
    recipe: _RecipeName | None = Field(default=None, description="weights, precision and steps of the whole run")
    memory: MemoryChoice | None = Field(default=None, description="where weights are kept during the run")
    defaults: Annotated[dict[str, Any] | None, WithJsonSchema({"refers": "Defaults"})] = None
    regression: _Limits = None


class Document(Header):
    """A manifest for the Video Lab runner."""

    version: _Version = Field(description="of this format")
    jobs: Annotated[list[Any] | None, WithJsonSchema({"type": "array", "items": {"refers": "Entry"}})] = None
    matrix: Annotated[dict[str, Any] | None, WithJsonSchema({"refers": "Matrix"})] = None


def load_manifest(source: str, *, stdin: IO[str] | None = None, foreign: Collection[str] = ()) -> Manifest:
    """Read the manifest at a path, a URI, or `-` for `stdin` (default: that of the process).

    Relative inputs are relative to the manifest's folder or prefix; from stdin, to the working directory. The name
    (.yaml, .yml, .jsonl, .ndjson) decides the format, else the content. `foreign`: as for `parse_manifest`. Raises
    ManifestInvalid with all problems, and storage.* where the object store refuses or fails.
    """
    text, base = read_source(source, stdin or sys.stdin)
    return parse_manifest(text, base=base, source=source, foreign=foreign)


def parse_manifest(text: str, *, base: str, source: str = "-", foreign: Collection[str] = ()) -> Manifest:
    """Parse `text` as a manifest. Raises ManifestInvalid with all problems.

    base:    folder or URI that relative inputs start from.
    source:  the manifest's name, for messages; its ending may decide the format.
    foreign: schemes, such as `gs`, of inputs that only other machines read.
    """
    builder = _Builder(base, foreign)
    manifest = None
    try:
        if is_json_lines(text, source):
            header, entries = read_json_lines(text, builder.problems, set(Header.model_fields))
            manifest = builder.manifest(header, Header, entries, None, source)
        else:
            root = read_yaml(text, builder.problems)
            if root is not None:
                jobs = root.get("jobs")
                listed = [(f"jobs[{i}]", item) for i, item in enumerate(jobs.items() if jobs else ())]
                manifest = builder.manifest(root, Document, listed, root.get("matrix"), source)
    except TextInvalid as err:
        builder.problems.append(err.problem)
    if builder.problems or manifest is None:
        raise ManifestInvalid(builder.problems.sentences(), where="stdin" if source == "-" else source)
    return manifest


def manifest_schema() -> dict[str, Any]:
    """Return the JSON Schema of a YAML manifest. `#/$defs/Entry` is that of a line in JSON lines. Null means an
    option's default."""
    models = (Document, Entry, Defaults, Matrix, JobOptions)
    _, schema = models_json_schema([(model, "validation") for model in models], ref_template="#/$defs/{model}")
    definitions = schema["$defs"]
    document = definitions.pop("Document")
    document["patternProperties"] = {"^x-": {"description": "ignored: a place for anchors"}}
    definitions["Entry"]["oneOf"] = [{"required": ["id"]}, {"required": ["custom_id"]}]
    for name, definition in definitions.items():
        if name.endswith("Options"):
            fields = definition["properties"]
            definition["properties"] = {key: {"anyOf": [field, {"type": "null"}]} for key, field in fields.items()}
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | document | {"$defs": definitions}
    return _with_references(whole)


def _with_references(schema: Any) -> Any:
    """Replace `refers` by `$ref`: pydantic accepts no `$ref` in a field that it did not make itself."""
    if isinstance(schema, list):
        return [_with_references(item) for item in schema]
    if isinstance(schema, dict):
        if "refers" in schema:
            return {"$ref": f"#/$defs/{schema['refers']}"}
        return {key: _with_references(item) for key, item in schema.items()}
    return schema


class _Builder:
    """Make jobs from located values. It continues after a problem, so that one run of `validate` finds all of them."""

    def __init__(self, base: str, foreign: Collection[str] = ()) -> None:
        self.base, self.foreign = base, foreign
        self.problems = Problems()
        self.jobs: list[Job] = []
        self.ids: dict[str, tuple[str, str]] = {}  # id in lower case -> as written, and where
        self.prompt = DEFAULT_PROMPT
        self.default_options = Located({}, 0)  # without invalid values
        self.limits = RegressionLimits()  # the manifest's

    def manifest(
        self,
        root: Located,
        model: type[Header],
        entries: list[tuple[str, Located]],
        matrix: Located | None,
        source: str,
    ) -> Manifest:
        """Make the whole manifest. It is valid only if no problem was found."""
        header, wrong = check(model, root, "", self.problems)
        if header is not None and header.regression is not None:
            self.limits = header.regression
        self._defaults(without(root, wrong).get("defaults"))
        for path, node in entries:
            self._job(path, node)
        if matrix is not None and isinstance(matrix.value, dict):
            self._matrix(matrix)
        if not self.jobs and not entries and all(problem.path in _RUN_KEYS for problem in self.problems):
            self.problems.add(root.line, "", "has no jobs: list some under jobs: or span them with matrix:")
        version, recipe, memory = (header.version, header.recipe, header.memory) if header else (1, None, None)
        return Manifest(version, recipe, memory, tuple(self.jobs), source)

    def _defaults(self, node: Located | None) -> None:
        if node is None or node.value is None:
            return
        defaults, wrong = check(Defaults, node, "defaults", self.problems)
        if defaults is not None and defaults.prompt is not None:
            self.prompt = defaults.prompt
        options = merge(None, without(node, wrong).get("options"), JobOptions)
        _, self.default_options = self._check_options(options, "defaults.options")

    def _check_options(self, node: Located, path: str) -> tuple[JobOptions | None, Located]:
        """Return the options (None if any is invalid), and `node` without the invalid values.

        Rules between two options are checked only when each is valid by itself, so `node` is checked again without the
        invalid values.
        """
        options, wrong = check(JobOptions, node, path, self.problems)
        valid = options
        while valid is None:
            node = without(node, wrong)
            valid, wrong = check(JobOptions, node, path, self.problems)
        return options, node

    def _job(self, path: str, node: Located) -> None:
        folder = self._official(path, node)
        model: type[CommonFields] = OfficialEntry if folder else Entry
        entry, wrong = check(model, node, path, self.problems)
        if not isinstance(node.value, dict):
            return
        valid = without(node, wrong)
        name = self._id(path, valid, any(loc[:1] in (("id",), ("custom_id",)) for loc in wrong))
        places = {key: self._place(path, key, valid.get(key)) for key in ("reference", "video", "mask")}
        options, _ = self._options(path, valid)
        if options is None:
            return
        mask = valid.get("mask")
        if options.mode == "animate" and mask is not None and mask.value is not None:
            self.problems.add(
                mask.line,
                join_path(path, "mask"),
                "is used in mode replace only; drop it, or set options.mode: replace",
            )
        if folder and entry is not None and name is not None:
            official = (f"{folder}/{REFERENCE}", f"{folder}/{POSE}", None)
            self._add(name, official, valid, options, entry.regression, node.line, folder)
        elif entry is not None and name is not None and places["reference"] and places["video"]:
            inputs = (places["reference"], places["video"], places["mask"])
            self._add(name, inputs, valid, options, entry.regression, node.line)

    def _official(self, path: str, node: Located) -> str | None:
        """Return the folder that the job's or the default options have as `preprocess.from`; None without one."""
        if not isinstance(node.value, dict):
            return None
        preprocess = merge(self.default_options, node.get("options"), JobOptions).get("preprocess")
        place = preprocess.get("from") if preprocess is not None and isinstance(preprocess.value, dict) else None
        if place is None or not isinstance(place.value, str):
            return None
        return self._place(join_path(path, "options.preprocess"), "from", replace(place, value=place.value.rstrip("/")))

    def _options(self, path: str, node: Located) -> tuple[JobOptions | None, Located]:
        merged = merge(self.default_options, node.get("options"), JobOptions)
        return self._check_options(merged, join_path(path, "options"))

    def _add(
        self,
        name: str,
        inputs: tuple[str, str, str | None],
        node: Located,
        options: JobOptions,
        limits: RegressionLimits | None,
        line: int,
        official: str | None = None,
    ) -> None:
        entry = node.get("prompt")
        prompt = self.prompt if entry is None else DEFAULT_PROMPT if entry.value is None else entry.value
        limits = self.limits if limits is None else limits.over(self.limits)
        self.jobs.append(Job(name, *inputs, prompt, options, line, official, limits))

    def _id(self, path: str, entry: Located, reported: bool) -> str | None:
        """Return the job's id if it is valid and unique. `reported`: an invalid id is among the problems already."""
        nodes = [node for key in ("id", "custom_id") if (node := entry.get(key)) is not None and node.value is not None]
        if len(nodes) == 2:
            self.problems.add(nodes[1].line, join_path(path, "custom_id"), "is another name of id; give one of the two")
        if not nodes:
            if not reported and not any((node := entry.get(key)) and node.reported for key in ("id", "custom_id")):
                self.problems.add(entry.line, join_path(path, "id"), "is required: it names the job and its output")
            return None
        name, line = nodes[0].value, nodes[0].line
        if self._taken(name, line, join_path(path, "id")):
            return None
        self.ids[name.lower()] = (name, f"line {line}")
        return str(name)

    def _taken(self, name: str, line: int, path: str) -> bool:
        other = self.ids.get(name.lower())
        if other is None:
            return False
        same = "is" if other[0] == name else f"differs only in case from {other[0]}, which is"
        self.problems.add(line, path, f"{name} {same} taken by {other[1]}; ids are folders, and must be unique")
        return True

    def _place(self, path: str, key: str, node: Located | None) -> str | None:
        if node is None or not isinstance(node.value, str) or node.reported:
            return None
        try:
            return resolve_place(node.value, self.base, self.foreign)
        except ValueError as err:
            self.problems.add(node.line, join_path(path, key), str(err))
            return None

    def _matrix(self, node: Located) -> None:
        matrix, wrong = check(Matrix, node, "matrix", self.problems)
        valid = without(node, wrong)
        options, _ = self._options("matrix", valid)
        columns = {key: self._column(f"matrix.{key}", valid.get(key)) for key in ("references", "videos")}
        if matrix is None or options is None:
            return
        count = len(columns["references"]) * len(columns["videos"])
        if count > MAX_JOBS:
            self.problems.add(node.line, "matrix", f"spans {count} jobs; a manifest holds at most {MAX_JOBS}")
            return
        ids = matrix_ids(list(columns["references"]), list(columns["videos"]))
        for reference, (reference_line, reference_place) in columns["references"].items():
            for video, (_, video_place) in columns["videos"].items():
                name = ids[reference, video]
                if not self._taken(name, reference_line, f"matrix ({reference} × {video})"):
                    inputs = (reference_place, video_place, None)
                    self._add(name, inputs, valid, options, matrix.regression, reference_line)

    def _column(self, path: str, node: Located | None) -> dict[str, tuple[int, str]]:
        """Return name as written -> (its line, its absolute path or URI). The same file twice is a problem."""
        column: dict[str, tuple[int, str]] = {}
        lines: dict[str, int] = {}  # path or URI -> line
        for index, item in enumerate(node.items() if node else ()):
            place = self._place(f"{path}[{index}]", "", item)
            if place is None:
                continue
            if place in lines:
                self.problems.add(item.line, f"{path}[{index}]", f"is listed already, on line {lines[place]}")
            else:
                lines[place] = item.line
                column[item.value] = (item.line, place)
        return column
