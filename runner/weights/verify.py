"""Verify: are the model files of a recipe there, whole, and the ones that were published? Nothing is loaded.

In:   the store's folder, a recipe. Out: a row for each file: ok, corrupt, missing, or unknown where nobody ever wrote
      down what it should be. Also the plan of a quantised file, layer by layer, and the comparison that settles how a
      published FP4 file is to be read.
Never: the network, a repair (that is `fetch`), tensors of a whole model.

Every file is hashed in full, however well it is known: that is the point of it. It is compared with the first of these:
the checksum in its own metadata (files of `quantize`), the pinned one (repositories.py), the hub's record beside it,
what an earlier run remembered of this very file.
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
    """What was found out about one file. `path` is relative to the store."""

    path: str
    status: Status
    bytes: int
    sha256: str | None  # of the bytes; of the data section for a file of `quantize`
    note: str


@dataclass(frozen=True)
class Settled:
    """How near each reading of one layer comes to its source. `assume`: the words for `--assume`, if one is right."""

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
    """A row for each file that `recipe` reads, and for each LoRA there is. Reads everything once, a file at a time.

    `cache`: the folder where runs remember what they hashed. `on_row` is called with each row as it is known: a store
    takes minutes. Damage is a row, not an exception. Raises ConfigInvalid for a recipe that is none, WeightsMissing
    when there is no such folder, StorageDenied for what may not be read.
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
    """What a quantised transformer holds, layer by layer, from the config in the store. See quantization/rules.py.

    `rank`: of an SVDQ format's factors, by default the format's. Raises ConfigInvalid for a format, a rule or a rank
    that is none, WeightsMissing without a config.
    """
    from runner.quantization.formats.fp4_layout import LAYOUTS, Layout
    from runner.quantization.rules import get_rule, plan_sizes

    layouts: dict[str, Layout | SvdqLayout] = {**LAYOUTS, **SVDQ_LAYOUTS}
    layout = layouts.get(fmt)
    if layout is None:
        raise ConfigInvalid(f"no format {fmt!r}", todo="Formats: " + ", ".join(layouts))
    if rank is not None:
        if not isinstance(layout, SvdqLayout):
            raise ConfigInvalid(f"{fmt} has no rank", todo=f"--rank is of {' and '.join(SVDQ_LAYOUTS)}")
        try:
            layout = layout.with_rank(rank)
        except ValueError as err:
            raise ConfigInvalid(str(err), todo="Leave --rank out, or take one of these") from err
    return plan_sizes(transformer_config(models), layout, get_rule(rule))


def settle_against(models: Path, source: Path, *, layer: str | None = None, file: Path | None = None) -> Settled:
    """Compare one layer of a published FP4 file with the weights it was made from, in every way that it can be read.

    `source`: a folder of the transformer in full precision, or a store with one. `layer`: by default the first that is
    quantised and lies in the source; a single shard of the source is enough. `file`: by default the store's.
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
    lies = {name: shard for shard in shards for name in read_header(shard).tensors}
    names = [layer] if layer is not None else list(published.layers)
    name = next((name for name in names if f"{name}.weight" in lies), None)
    if name is None:
        raise WeightsMissing(
            f"holds no weights of {layer or 'any quantised layer'}",
            where=source,
            todo="Give the folder with the transformer's safetensors in bf16 or float32; one shard of them is enough",
        )
    weight = read_tensor(lies[f"{name}.weight"], f"{name}.weight")
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
            "holds no config.json of a transformer",
            where=models,
            todo="It is small: video-lab weights fetch --part components, or copy it to "
            f"{SOURCE_WEIGHTS}/transformer/config.json",
        )
    return read_json(path)


def _expected(models: Path, recipe: Recipe, parts: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """(file, what to say if it is not there), in the order they are used."""
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
    yield from ((path, "") for path in store.dwpose if path.is_file())  # optional, like the next: listed where it is
    if store.rife.is_file():
        yield store.rife, ""
    yield from ((path, "") for path in sorted(store.segmenter.glob("*")) if path.suffix in (*PLAIN, ".safetensors"))


def _has_own_config(models: Path, recipe: Recipe) -> bool:
    """Does the recipe run a file that lies beside its own config.json?"""
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
            return  # the index is damaged: its row says so, and what it would name nobody knows
        yield from ((path, FETCH) for path in files or [folder / f"{WEIGHTS[name]}.safetensors"])


def _quantised(models: Path, recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Our own file of this recipe, or an unmerged one and, for `fp4-distill`, the LoRA that goes with it."""
    own, fmt = models / quantized_folder(recipe), svdq_format(recipe)
    folders = [models / name for name in variant_folders(recipe)]
    for folder in folders:
        yield from ((path, "") for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors"))
    if (text := text_file(models, recipe)) is not None and text.parent not in folders:
        yield text, ""
    if recipe.distilled and (own / TRANSFORMER_FILE).is_file():
        return
    if not any((folder / TRANSFORMER_FILE).is_file() for folder in folders):
        if fmt is None:
            yield models / FP4_FOLDER / TRANSFORMER_FILE, f"{FETCH}, or make it: video-lab quantize"
        else:
            yield own / TRANSFORMER_FILE, f"not published; make it: {quantize_command(recipe)}"
    if recipe.distilled and not list((models / "distill_lora").glob("*.safetensors")):
        yield models / "distill_lora" / next(iter(SOURCES["distill-lora"].pins)), FETCH


def _pose_files(graph: Path) -> list[Path]:
    """The graph and the files that hold its weights (see weights/store.py)."""
    if graph.name == "end2end.onnx":
        beside: Iterable[Path] = graph.parent.rglob("*")
    else:
        beside = graph.parent.glob(f"{graph.stem.removesuffix('_model')}*")
    return sorted({graph, *(p for p in beside if p.is_file() and ".cache" not in p.parts)})


def _contradictions(models: Path, rows: dict[Path, Row]) -> Iterator[tuple[Path, WeightsCorrupt]]:
    """Files that are whole and do not fit together: indexes and shards; a quantised file and its model."""
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
    """Does a quantised file hold the model of its config? Headers only. Raises WeightsCorrupt."""
    from runner.quantization.files.checkpoint_read import check_model
    from runner.quantization.files.file_header import read_header
    from runner.quantization.files.published import read_published
    from runner.quantization.files.quantized_header import FORMAT_KEY, refuse_foreign
    from runner.quantization.rules import transformer_on_meta

    header = read_header(path)
    refuse_foreign(header)
    # Published files lie in one folder alone; a file in any other has to be ours.
    ours = FORMAT_KEY in header.metadata or path.parent.name != FP4_FOLDER
    described = check_quantized(path) if ours else None
    own = path.with_name("config.json")
    try:
        config = read_json(own) if own.is_file() else transformer_config(models)
    except WeightsMissing:
        return  # a row of its own says that the config is missing
    model = transformer_on_meta(config)
    if described is not None:
        check_model(described, model)
    else:
        read_published(path, model)


def _examine(path: Path, models: Path, hashes: FileHashes) -> Row:
    """Size, header and checksum of a file that is there."""
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
        return Row(_name(path, models), "ok", pin.bytes, made, "as the tool makes it of the published file")
    said = read_header(path).metadata.get(METADATA_KEY)
    if said is None or not SHA256.fullmatch(said):
        return _compare(path, models, hashes)
    found = data_sha256(path)
    status: Status = "ok" if found == said else "corrupt"
    note = "as recorded when it was made" if found == said else f"its own record says {said}: make or fetch it again"
    return Row(_name(path, models), status, path.stat().st_size, found, note)


def _compare(path: Path, models: Path, hashes: FileHashes) -> Row:
    """The bytes against whoever knows what they should be."""
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
        return row("corrupt", f"{size} bytes; published are {pin.bytes}, sha256 {pin.sha256}: {FETCH}")
    recorded = _record(path, models)
    if recorded is not None:
        same = found == recorded if SHA256.fullmatch(recorded) else git_sha1(path) == recorded
        return row("ok", "as the hub listed it") if same else row("corrupt", f"the hub listed {recorded}: {FETCH}")
    known = hashes.known(path)
    if known is not None:
        if known == found:
            return row("ok", "unchanged since it was first used; nobody recorded what was published")
        return row("corrupt", "its bytes have changed, its size and time have not: suspect the disk")
    return row("unknown", "whole, as far as can be told; nobody recorded its checksum")


def _record(path: Path, models: Path) -> str | None:
    """The checksum in the hub's record of this file, wherever between it and the store's root that lies."""
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
