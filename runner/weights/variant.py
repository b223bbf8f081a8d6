"""Variant: choose the files of a recipe's transformer and text encoder among those in a store.

In:   the store's root and a recipe. Out: a `Variant` with its reason, or WeightsMissing with all ways to get the files.
Never: tensors. A store may hold the source, files of `quantize`, and the published FP4 files, all at once.

    Wan2.2-Animate-14B-FP4-distill/   written by `quantize` for fp4-distill, the LoRA merged: taken first
    Wan2.2-Animate-14B-FP4-plain/     written by `quantize` for fp4; for fp4-distill with distill_lora/ beside it
    Wan2.2-Animate-14B-FP4/           as published, no LoRA merged; for fp4-distill with distill_lora/ beside it

A recipe whose precision needs an SVDQ format (`+svdq-int4`) uses other folders, which only `quantize` writes:
`Wan2.2-Animate-14B-SVDQ-INT4-distill/` and `-plain/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from runner.errors import ConfigInvalid, JobWeightsMissing, WeightsMissing
from runner.forecast.precisions import DEFAULT_PRECISION, PRECISIONS
from runner.quantization.formats.fp4_layout import LAYOUTS
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.spec.recipes import Recipe

__all__ = [
    "DISTILL_FOLDER",
    "LORA_FOLDER",
    "PUBLISHED_FOLDER",
    "TEXT_FILE",
    "TRANSFORMER_FILE",
    "Variant",
    "choose_variant",
    "formats_in",
    "lora_file",
    "lora_files",
    "quantize_command",
    "quantized_folder",
    "svdq_format",
    "text_file",
    "variant_folders",
    "wanted_fp4",
]

MODEL = "Wan2.2-Animate-14B"
PUBLISHED_FOLDER = f"{MODEL}-FP4"
TRANSFORMER_FILE = "quantized_transformer.safetensors"
TEXT_FILE = "quantized_text_encoder.safetensors"
QUANTIZE_CONFIG = "quantize_config.json"
DISTILL_FOLDER = "distill_lora"
LORA_FOLDER = "loras"
RELIGHT = "relight"  # in the name of the LoRA that replace jobs get


@dataclass(frozen=True)
class Variant:
    """The files to load. `source`: a folder of plain weights; `quantized`: a file of `quantize`; `published`: the
    original project's file."""

    kind: Literal["source", "quantized", "published"]
    transformer: Path  # folder or file
    config: Path  # the transformer's config.json
    loras: tuple[Path, ...]  # kept beside the weights, for every job
    text_encoder: Path | None  # an INT4 file; None: the plain folder
    why: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The files beside the plain components that influence frames, for the fingerprint."""
        extra = [] if self.kind == "source" else [self.transformer, self.config]
        if self.kind == "published":
            extra += [path for path in (self.transformer.with_name(QUANTIZE_CONFIG),) if path.is_file()]
        return (*extra, *self.loras, *((self.text_encoder,) if self.text_encoder else ()))


def svdq_format(recipe: Recipe) -> str | None:
    """The SVDQ format that the recipe's precision needs its weights in; None where it takes other formats."""
    row = PRECISIONS[recipe.compute]
    return row.stored_format if row.layout == "svdq" else None


def quantized_folder(recipe: Recipe, fmt: str | None = None) -> str:
    """The folder that `quantize` writes for an FP4 recipe in the number format `fmt`; default: the recipe's format."""
    return f"{_stem(fmt or svdq_format(recipe))}-{'distill' if recipe.distilled else 'plain'}"


def variant_folders(recipe: Recipe) -> tuple[str, ...]:
    """Folders of the store that may hold the recipe's transformer, the best first."""
    return tuple(folder for _, folder, _ in _places(recipe))


def formats_in(folder: str) -> tuple[str, ...]:
    """The number formats that a file of `quantize` may have in the store's folder of this name."""
    svdq = next((name for name in SVDQ_LAYOUTS if folder.startswith(f"{_stem(name)}-")), None)
    return (svdq,) if svdq else tuple(LAYOUTS)


def quantize_command(recipe: Recipe) -> str:
    """The command that makes the recipe's file."""
    fmt = svdq_format(recipe)
    base = recipe.name.partition("+")[0] if fmt else recipe.name
    return f"video-lab quantize --recipe {base}" + (f" --format {fmt}" if fmt else "")


def _stem(fmt: str | None) -> str:
    """A folder's name without its suffix."""
    return f"{MODEL}-{fmt.upper()}" if fmt is not None and fmt in SVDQ_LAYOUTS else PUBLISHED_FOLDER


def choose_variant(root: Path, recipe: Recipe) -> Variant:
    """Choose the files of `recipe` in the store at `root`. Raises WeightsMissing, which lists every way to get them."""
    source = root / recipe.weights / "transformer"
    if not recipe.fp4:
        return Variant("source", source, source / "config.json", (), None, f"recipe {recipe.name} runs the source")
    text = text_file(root, recipe)
    distill = tuple(sorted((root / DISTILL_FOLDER).glob("*.safetensors")))
    unmerged: Path | None = None  # a file that lacks the LoRA that this recipe needs beside it
    for kind, name, merged in _places(recipe):
        folder = root / name
        file = folder / TRANSFORMER_FILE
        beside = () if merged or not recipe.distilled else distill
        if not file.is_file():
            continue
        if recipe.distilled and not merged and not distill:
            unmerged = unmerged or file
            continue
        own = folder / "config.json"
        config = own if own.is_file() else source / "config.json"
        if not config.is_file():
            raise WeightsMissing(
                "the transformer's config.json is neither beside the quantised file nor in the source's folder",
                where=file,
                todo=f"Put transformer/config.json of the published model at {source.relative_to(root)}/config.json",
            )
        why = f"{file.relative_to(root)} is there"
        if beside:
            why += f", {', '.join(path.name for path in beside)} kept beside it"
        return Variant(kind, file, config, beside, text, why)
    raise _no_transformer(root, recipe, unmerged)


def _no_transformer(root: Path, recipe: Recipe, unmerged: Path | None) -> WeightsMissing:
    fmt, command = svdq_format(recipe), quantize_command(recipe)
    lacks = f"no transformer in {fmt}" if fmt else "no FP4 transformer"
    if unmerged is not None:
        lacks = f"{unmerged.relative_to(root)}, but no distill LoRA in {DISTILL_FOLDER}/"
    fetch = f"video-lab weights fetch --recipe {recipe.name}"
    if fmt is None:
        todo = (
            "One of these commands gets it:\n"
            f"  {command}        makes it from {recipe.weights}/transformer\n"
            f"  {fetch}   fetches the published files into {PUBLISHED_FOLDER}/"
        ) + (f" and {DISTILL_FOLDER}/" if recipe.distilled else "")
    elif unmerged is not None:
        todo = f"This command fetches the LoRA into {DISTILL_FOLDER}/:\n  {fetch}"
    else:
        todo = (
            f"There is no published file in {fmt}. This command makes one from {recipe.weights}/transformer:\n"
            f"  {command}\n"
            f"If the store lacks the source, this command fetches it:\n  {fetch}"
        )
    return WeightsMissing(f"recipe {recipe.name!r} has {lacks}", where=root, todo=todo)


def _places(recipe: Recipe) -> Iterator[tuple[Literal["quantized", "published"], str, bool]]:
    """(kind, folder, is the LoRA in the weights), the best first."""
    if recipe.distilled:
        yield "quantized", quantized_folder(recipe), True
    yield "quantized", f"{_stem(svdq_format(recipe))}-plain", False
    if svdq_format(recipe) is None:
        yield "published", PUBLISHED_FOLDER, False


def text_file(root: Path, recipe: Recipe) -> Path | None:
    """The INT4 text encoder that `recipe` uses instead of the plain folder, or None."""
    return next((path for folder in _text_folders(recipe) if (path := root / folder / TEXT_FILE).is_file()), None)


def _text_folders(recipe: Recipe) -> tuple[str, ...]:
    """Folders that may hold it, the best first. It has one format: the FP4 folders' file fits every FP4 recipe."""
    if not recipe.fp4:
        return ()
    fp4 = replace(recipe, compute=DEFAULT_PRECISION)
    return tuple(dict.fromkeys((*variant_folders(recipe), *variant_folders(fp4))))


def lora_file(root: Path, name: str) -> Path:
    """The file of the LoRA `name` of a job. Raises JobWeightsMissing with the names that the store has."""
    path = root / LORA_FOLDER / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in (root / LORA_FOLDER).glob("*.safetensors"))) or "none"
        raise JobWeightsMissing(
            f"the store has no LoRA {name!r}; it has: {there}",
            where=path,
            todo="Put the file there, or correct the name",
        )
    return path


def lora_files(root: Path, names: tuple[tuple[str, float], ...], *, replace: bool) -> dict[str, tuple[Path, float]]:
    """name → (file, strength) of a job's LoRAs; a replace job also gets the relighting LoRA if the store has it.

    Raises JobWeightsMissing for a name without a file, ConfigInvalid for one that is given twice.
    """
    twice = next((name for i, (name, _) in enumerate(names) if name in [other for other, _ in names[:i]]), None)
    if twice is not None:
        raise ConfigInvalid(f"a job names the LoRA {twice!r} twice", todo="Name it once, with its strength")
    found = {name: (lora_file(root, name), strength) for name, strength in names}
    if replace and not any(RELIGHT in name.lower() for name in found):
        for path in sorted((root / LORA_FOLDER).glob("*.safetensors")):
            if RELIGHT in path.stem.lower():
                return found | {path.stem: (path, 1.0)}
    return found


def wanted_fp4(recipe: Recipe) -> Callable[[str], bool]:
    """A predicate on keys of a remote store: those that an FP4 recipe may need beside the plain components."""
    transformers = set(variant_folders(recipe)) if recipe.fp4 else set()
    texts = set(_text_folders(recipe))

    def want(key: str) -> bool:
        parts = PurePosixPath(key).parts or ("",)
        if len(parts) == 2 and parts[0] in transformers:
            return parts[1] in (TRANSFORMER_FILE, TEXT_FILE, QUANTIZE_CONFIG, "config.json")
        if len(parts) == 2 and parts[0] in texts:
            return parts[1] == TEXT_FILE
        folder_ok = parts[0] == LORA_FOLDER or (recipe.distilled and parts[0] == DISTILL_FOLDER)
        return folder_ok and len(parts) == 2 and key.endswith(".safetensors")

    return want
