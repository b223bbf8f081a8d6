"""Verify: check that the model files of a recipe are there, whole, and the published ones. Loads no model.

In:   the store's folder, a recipe. Out: a row for each file: ok, corrupt, missing, or unknown where no checksum is
      recorded anywhere. Also the plan of a quantised file, layer by layer, and the comparison of all ways to read a
      published FP4 file.
Never: the network, a repair (that is `fetch`), tensors of a whole model.

Every file is hashed in full, even where its digest is kept. The sha256 is compared with the first known reference:
- the checksum in its own metadata (files of `quantize`);
- the pinned checksum (repositories.py);
- the hub's record beside it;
- the digest that an earlier run kept for this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing
from runner.hashing import sha256_file
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS, SvdqLayout
from runner.spec.recipes import SOURCE_WEIGHTS, Recipe, get_recipe
from runner.storage.file_hashes import FileHashes
from runner.weights.digests import MEMORY_FILE, METADATA_KEY
from runner.weights.hub import git_sha1, read_record
from runner.weights.repositories import CONVERTED, FP4_FOLDER, SOURCES, parts_of
from runner.weights.rife_file import REMEDY
from runner.weights.store import (
    COMPONENTS,
    CONFIGS,
    WEIGHTS,
    ModelStore,
    check_not_empty,
    check_quantized,
    check_weights,
    read_json,
    weight_files,
)
from runner.weights.variant import (
    MODEL,
    TRANSFORMER_FILE,
    choose_variant,
    quantize_command,
    quantized_folder,
    svdq_format,
    text_file,
    variant_folders,
)

if TYPE_CHECKING:
    from runner.quantization.files.published import Comparison
    from runner.quantization.rules import PlanRow

__all__ = ["Row", "Settled", "plan_rows", "settle_against", "verify_weights"]

Status = Literal["ok", "corrupt", "missing", "unknown"]
SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
PLAIN = (".json", ".model", ".txt")
FETCH = "fetch it: video-lab weights fetch"


@dataclass(frozen=True)
class Row:
    """The result for one file. `path` is relative to the store."""

    path: str
    status: Status
    bytes: int
    sha256: str | None  # of the bytes; of the data section for a file of `quantize`
    note: str


@dataclass(frozen=True)
class Settled:
    """The error of each reading of one layer against its source. `assume`: the words for `--assume`, if one fits."""

    file: Path
    layer: str
    comparisons: tuple[Comparison, ...]  # the nearest first
    assume: str | None


def verify_weights(
    models: Path,
    recipe: Recipe | str,
    *,
    cache: Path | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Return a row for each file that `recipe` reads and for each LoRA. Every file is read once, one at a time.

    `cache`: the folder where runs keep digests. `on_row` is called with each row at once: a store takes minutes. A
    damaged file gives a row, not an exception. Raises ConfigInvalid for an unknown recipe, WeightsMissing for a missing
    folder, StorageDenied for a file that may not be read.
    """
    parts = parts_of(recipe)
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if not models.is_dir():
        raise WeightsMissing("no such folder of models", where=models, todo="Pass --models DIR")
    hashes = FileHashes(cache / MEMORY_FILE if cache is not None else None)
    rows: dict[Path, Row] = {}

    def add(row: Row, path: Path) -> None:
        rows[path] = row
        if on_row is not None:
            on_row(row)

    for path, note in _expected(models, recipe, parts):
        if path not in rows:
            add(_missing(path, models, note) if not path.is_file() else _examine(path, models, hashes), path)
    for path, err in _contradictions(models, rows):
        if path in rows and rows[path].status != "corrupt":
            add(Row(_name(path, models), "corrupt", rows[path].bytes, rows[path].sha256, err.what), path)
    return list(rows.values())


def plan_rows(models: Path, *, fmt: str = "g32", rule: str = "all", rank: int | None = None) -> list[PlanRow]:
    """List the layers of a quantised transformer with their bytes, from the config in the store; see rules.py.

    `rank`: of an SVDQ format's factors, by default the format's. Raises ConfigInvalid for an unknown format or rule and
    for a rank that no kernel takes, WeightsMissing without a config.
    """
    from runner.quantization.formats.fp4_layout import LAYOUTS, Layout
    from runner.quantization.rules import get_rule, plan_sizes

    layouts: dict[str, Layout | SvdqLayout] = {**LAYOUTS, **SVDQ_LAYOUTS}
    layout = layouts.get(fmt)
    if layout is None:
        raise ConfigInvalid(f"there is no format {fmt!r}", todo="Formats: " + ", ".join(layouts))
    if rank is not None:
        if not isinstance(layout, SvdqLayout):
            raise ConfigInvalid(f"{fmt} has no rank", todo=f"--rank is for {' and '.join(SVDQ_LAYOUTS)}")
        try:
            layout = layout.with_rank(rank)
        except ValueError as err:
            raise ConfigInvalid(str(err), todo="Leave --rank out, or take one of these") from err
    return plan_sizes(transformer_config(models), layout, get_rule(rule))


def settle_against(models: Path, source: Path, *, layer: str | None = None, file: Path | None = None) -> Settled:
    """Compare one layer of a published FP4 file, read in every possible way, with its source weights.

    `source`: a folder of the transformer in full precision, or a store with one. `layer`: by default the first
    quantised layer that the source has; a single shard of the source is enough. `file`: by default the store's.
    Raises WeightsMissing, WeightsCorrupt (also when the layer has another shape in the source).
    """
    from runner.quantization.files.file_header import read_header
    from runner.quantization.files.published import compare_layer, read_published, settle
    from runner.quantization.files.safetensors_stream import read_tensor
    from runner.quantization.rules import transformer_on_meta

    file = file or models / FP4_FOLDER / TRANSFORMER_FILE
    published = read_published(file, transformer_on_meta(transformer_config(models)))
    folders = (source, source / "transformer", source / SOURCE_WEIGHTS / "transformer")
    shards = next((found for folder in folders if (found := sorted(folder.glob("*.safetensors")))), [])
    shard_with = {name: shard for shard in shards for name in read_header(shard).tensors}
    names = [layer] if layer is not None else list(published.layers)
    name = next((name for name in names if f"{name}.weight" in shard_with), None)
    if name is None:
        raise WeightsMissing(
            f"the source holds no weights of {layer or 'any quantised layer'}",
            where=source,
            todo="Give the folder with the transformer's safetensors in bf16 or float32; one shard of them is enough",
        )
    weight = read_tensor(shard_with[f"{name}.weight"], f"{name}.weight")
    comparisons = compare_layer(published, name, weight)
    right = settle(comparisons)
    return Settled(file, name, tuple(comparisons), str(right) if right is not None else None)


def transformer_config(models: Path) -> dict[str, Any]:
    """The transformer's config, from the first folder of the store that has one. Raises WeightsMissing."""
    folders = [models / SOURCE_WEIGHTS / "transformer", *sorted(models.glob(f"{FP4_FOLDER}*"))]
    folders += sorted(models.glob(f"{MODEL}-SVDQ-*"))
    path = next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)
    if path is None:
        raise WeightsMissing(
            "the store holds no config.json of a transformer",
            where=models,
            todo="Fetch the small files: video-lab weights fetch --part components. Or copy it to "
            f"{SOURCE_WEIGHTS}/transformer/config.json",
        )
    return read_json(path)


def _expected(models: Path, recipe: Recipe, parts: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Yield (file, the note for a missing file), in the order of use."""
    for name in COMPONENTS:
        if name == "text_encoder" and text_file(models, recipe):
            yield from ((path, "") for path in sorted((models / SOURCE_WEIGHTS / name).glob("*.safetensors")))
            continue
        if name == "transformer" and _has_own_config(models, recipe):
            continue
        yield from _component(models, name, weights=name != "transformer" or not recipe.fp4)
    if recipe.fp4:
        yield from _quantised(models, recipe)
    for folder in ("distill_lora", "loras"):
        yield from ((path, "") for path in sorted((models / folder).glob("*.safetensors")))
    store = ModelStore(models)
    yield store.detector, FETCH
    yield from ((path, FETCH) for path in _pose_files(store.pose))
    yield from ((path, "") for path in store.dwpose if path.is_file())  # optional models are listed if they are there
    if store.rife.is_file():
        yield store.rife, ""
    yield from ((path, "") for path in sorted(store.segmenter.glob("*")) if path.suffix in (*PLAIN, ".safetensors"))


def _has_own_config(models: Path, recipe: Recipe) -> bool:
    """Does the recipe use a quantised file with a config.json in the same folder?"""
    try:
        variant = choose_variant(models, recipe)
    except WeightsMissing:
        return False
    return variant.kind != "source" and variant.config.parent == variant.transformer.parent


def _component(models: Path, name: str, *, weights: bool) -> Iterator[tuple[Path, str]]:
    folder = models / SOURCE_WEIGHTS / name
    yield folder / CONFIGS.get(name, "config.json"), FETCH
    plain = [p for p in folder.glob("*") if p.suffix in PLAIN and p.is_file() and not p.name.startswith(".")]
    index = f"{WEIGHTS.get(name)}.safetensors.index.json"
    yield from ((path, "") for path in sorted(plain) if weights or path.name != index)
    if weights and name in WEIGHTS:
        try:
            files = weight_files(folder, WEIGHTS[name])
        except WeightsCorrupt:
            return  # the index is damaged, as its row says: its shards are unknown
        yield from ((path, FETCH) for path in files or [folder / f"{WEIGHTS[name]}.safetensors"])


def _quantised(models: Path, recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Files of this recipe's quantised transformer, and for distilled recipes the LoRA, if it is not merged."""
    merged, fmt = models / quantized_folder(recipe), svdq_format(recipe)
    folders = [models / name for name in variant_folders(recipe)]
    for folder in folders:
        yield from ((path, "") for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors"))
    if (text := text_file(models, recipe)) is not None and text.parent not in folders:
        yield text, ""
    if recipe.distilled and (merged / TRANSFORMER_FILE).is_file():
        return
    if not any((folder / TRANSFORMER_FILE).is_file() for folder in folders):
        if fmt is None:
            yield models / FP4_FOLDER / TRANSFORMER_FILE, f"{FETCH}, or make it: video-lab quantize"
        else:
            yield merged / TRANSFORMER_FILE, f"not published; make it: {quantize_command(recipe)}"
    if recipe.distilled and not list((models / "distill_lora").glob("*.safetensors")):
        yield models / "distill_lora" / next(iter(SOURCES["distill-lora"].pins)), FETCH


def _pose_files(graph: Path) -> list[Path]:
    """The graph and the files of its weights (see weights/store.py)."""
    if graph.name == "end2end.onnx":
        beside: Iterable[Path] = graph.parent.rglob("*")
    else:
        beside = graph.parent.glob(f"{graph.stem.removesuffix('_model')}*")
    return sorted({graph, *(p for p in beside if p.is_file() and ".cache" not in p.parts)})


def _contradictions(models: Path, rows: dict[Path, Row]) -> Iterator[tuple[Path, WeightsCorrupt]]:
    """Yield whole files that contradict each other: indexes and shards; a quantised file and its model."""
    for name, stem in WEIGHTS.items():
        folder = models / SOURCE_WEIGHTS / name
        index = folder / f"{stem}.safetensors.index.json"
        sound = all(row.status in ("ok", "unknown") for path, row in rows.items() if path.parent == folder)
        if index in rows and sound:
            try:
                check_weights(folder, stem)
            except WeightsCorrupt as err:
                yield index, err
    for path, row in rows.items():
        if path.name == TRANSFORMER_FILE and row.status in ("ok", "unknown"):
            try:
                _check_quantised(path, models)
            except WeightsCorrupt as err:
                yield path, err


def _check_quantised(path: Path, models: Path) -> None:
    """Check that a quantised file holds the model of its config, by headers. Raises WeightsCorrupt."""
    from runner.quantization.files.checkpoint_read import check_model
    from runner.quantization.files.file_header import read_header
    from runner.quantization.files.published import read_published
    from runner.quantization.files.quantized_header import FORMAT_KEY, refuse_foreign
    from runner.quantization.rules import transformer_on_meta

    header = read_header(path)
    refuse_foreign(header)
    # Published files are in one folder only; a file in another folder must be one of `quantize`.
    of_quantize = FORMAT_KEY in header.metadata or path.parent.name != FP4_FOLDER
    quantized = check_quantized(path) if of_quantize else None
    beside = path.with_name("config.json")
    try:
        config = read_json(beside) if beside.is_file() else transformer_config(models)
    except WeightsMissing:
        return  # another row says that the config is missing
    model = transformer_on_meta(config)
    if quantized is not None:
        check_model(quantized, model)
    else:
        read_published(path, model)


def _examine(path: Path, models: Path, hashes: FileHashes) -> Row:
    """Check size, header and checksum of an existing file."""
    size = path.stat().st_size
    try:
        check_not_empty(path)
        if path.suffix == ".safetensors":
            return _safetensors(path, models, hashes)
        if path.suffix == ".json":
            read_json(path)
    except WeightsCorrupt as err:
        return Row(_name(path, models), "corrupt", size, None, err.what)
    return _compare(path, models, hashes)


def _safetensors(path: Path, models: Path, hashes: FileHashes) -> Row:
    from runner.quantization.files.file_header import read_header
    from runner.quantization.files.safetensors_stream import data_sha256

    pin = CONVERTED.get(_name(path, models))
    if pin is not None and (made := sha256_file(path)) == pin.sha256:
        return Row(_name(path, models), "ok", pin.bytes, made, "as the tool makes it from the published file")
    recorded = read_header(path).metadata.get(METADATA_KEY)
    if recorded is None or not SHA256.fullmatch(recorded):
        return _compare(path, models, hashes)
    found = data_sha256(path)
    status: Status = "ok" if found == recorded else "corrupt"
    note = "as recorded when it was made"
    if found != recorded:
        note = f"its metadata records {recorded}: make or fetch it again"
    return Row(_name(path, models), status, path.stat().st_size, found, note)


def _compare(path: Path, models: Path, hashes: FileHashes) -> Row:
    """Compare the file's sha256 with the first known reference."""
    name, size = _name(path, models), path.stat().st_size
    found = sha256_file(path)

    def row(status: Status, note: str) -> Row:
        return Row(name, status, size, found, note)

    made = CONVERTED.get(name)
    if made is not None:
        return row("corrupt", f"{size} bytes; the tool makes {made.bytes}, sha256 {made.sha256}: {REMEDY}")
    pin = next((p for s in SOURCES.values() for n, p in s.pins.items() if name == f"{s.folder}/{n}"), None)
    if pin is not None:
        if found == pin.sha256:
            return row("ok", "the published file")
        return row("corrupt", f"{size} bytes; the published file has {pin.bytes}, sha256 {pin.sha256}: {FETCH}")
    recorded = _record(path, models)
    if recorded is not None:
        same = found == recorded if SHA256.fullmatch(recorded) else git_sha1(path) == recorded
        return row("ok", "as the hub listed it") if same else row("corrupt", f"the hub listed {recorded}: {FETCH}")
    known = hashes.known(path)
    if known is not None:
        if known == found:
            return row("ok", "unchanged since its first use; the checksum of the published file is not recorded")
        return row("corrupt", "its bytes have changed, its size and time have not: the disk may be damaged")
    return row("unknown", "no damage found; its checksum is not recorded")


def _record(path: Path, models: Path) -> str | None:
    """The checksum in the hub's record of this file, from a folder between it and the store's root, or None."""
    for base in path.parents:
        if not base.is_relative_to(models):
            return None
        record = read_record(base, path.relative_to(base).as_posix())
        if record is not None and (SHA256.fullmatch(record[1]) or GIT_SHA1.fullmatch(record[1])):
            return record[1]
    return None


def _missing(path: Path, models: Path, note: str) -> Row:
    return Row(_name(path, models), "missing", 0, None, note or "not there")


def _name(path: Path, models: Path) -> str:
    return path.relative_to(models).as_posix()
