"""Variant: which files a recipe's transformer and text encoder come from, among those that a store may hold.

In:   the store's root and a recipe. Out: a `Variant` and why, or WeightsMissing with all the ways.
Never: tensors. A store may hold the source, files of `quantize`, and the published FP4 files, all at once.

    Wan2.2-Animate-14B-FP4-distill/   what `quantize` writes for fp4-distill, the LoRA merged: taken first
    Wan2.2-Animate-14B-FP4-plain/     what `quantize` writes for fp4; for fp4-distill with distill_lora/ beside it
    Wan2.2-Animate-14B-FP4/           as published, no LoRA merged; for fp4-distill with distill_lora/ beside it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from runner.errors import ConfigInvalid, JobWeightsMissing, WeightsMissing
from runner.spec.recipes import Recipe

__all__ = [
    "DISTILL_FOLDER",
    "LORA_FOLDER",
    "PLAIN_FOLDER",
    "PUBLISHED_FOLDER",
    "TEXT_FILE",
    "TRANSFORMER_FILE",
    "Variant",
    "choose_variant",
    "lora_file",
    "lora_files",
    "quantized_folder",
    "text_file",
    "wanted_fp4",
]

PUBLISHED_FOLDER = "Wan2.2-Animate-14B-FP4"
PLAIN_FOLDER = f"{PUBLISHED_FOLDER}-plain"  # of `quantize`, without the LoRA
TRANSFORMER_FILE = "quantized_transformer.safetensors"
TEXT_FILE = "quantized_text_encoder.safetensors"
QUANTIZE_CONFIG = "quantize_config.json"
DISTILL_FOLDER = "distill_lora"
LORA_FOLDER = "loras"
RELIGHT = "relight"  # in the name of the LoRA that replace jobs get


@dataclass(frozen=True)
class Variant:
    """What to load. `source`: a folder of plain weights; `quantized`: a file of ours; `published`: the seed's file."""

    kind: Literal["source", "quantized", "published"]
    transformer: Path  # folder or file
    config: Path  # the transformer's config.json
    loras: tuple[Path, ...]  # kept beside the weights, for every job
    text_encoder: Path | None  # an INT4 file; None: the plain folder
    why: str

    @property
    def files(self) -> tuple[Path, ...]:
        """What decides the frames beyond the plain components, for the fingerprint."""
        extra = [] if self.kind == "source" else [self.transformer, self.config]
        if self.kind == "published":
            extra += [path for path in (self.transformer.with_name(QUANTIZE_CONFIG),) if path.is_file()]
        return (*extra, *self.loras, *((self.text_encoder,) if self.text_encoder else ()))


def quantized_folder(recipe: Recipe) -> str:
    """Folder that `quantize` writes for an FP4 recipe."""
    return f"{PUBLISHED_FOLDER}-{'distill' if recipe.distilled else 'plain'}"


def choose_variant(root: Path, recipe: Recipe) -> Variant:
    """The files of `recipe` in the store at `root`. Raises WeightsMissing, which lists every way to have them."""
    source = root / recipe.weights / "transformer"
    if not recipe.fp4:
        return Variant("source", source, source / "config.json", (), None, f"recipe {recipe.name} runs the source")
    text = text_file(root, recipe)
    distill = tuple(sorted((root / DISTILL_FOLDER).glob("*.safetensors")))
    unmerged: Path | None = None  # there, but without the LoRA that this recipe needs beside it
    for kind, folder, merged in _places(root, recipe):
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
                "the transformer's config.json is neither beside the FP4 file nor in the source's folder",
                where=file,
                todo=f"Put transformer/config.json of the published model at {source.relative_to(root)}/config.json",
            )
        why = f"{file.relative_to(root)} is there"
        if beside:
            why += f", {', '.join(path.name for path in beside)} kept beside it"
        return Variant(kind, file, config, beside, text, why)
    lacks = "no FP4 transformer"
    if unmerged is not None:
        lacks = f"{unmerged.relative_to(root)}, but no distill LoRA in {DISTILL_FOLDER}/ to go beside it"
    raise WeightsMissing(
        f"recipe {recipe.name!r} has {lacks}",
        where=root,
        todo="One of these makes it complete:\n"
        f"  video-lab quantize --recipe {recipe.name}        from {recipe.weights}/transformer\n"
        f"  video-lab weights fetch --recipe {recipe.name}   the published files, into {PUBLISHED_FOLDER}/"
        + (f" and {DISTILL_FOLDER}/" if recipe.distilled else ""),
    )


def _places(root: Path, recipe: Recipe) -> Iterator[tuple[Literal["quantized", "published"], Path, bool]]:
    """(kind, folder, is the LoRA in the weights), the best first."""
    if recipe.distilled:
        yield "quantized", root / f"{PUBLISHED_FOLDER}-distill", True
    yield "quantized", root / PLAIN_FOLDER, False
    yield "published", root / PUBLISHED_FOLDER, False


def text_file(root: Path, recipe: Recipe) -> Path | None:
    """The INT4 text encoder that `recipe` takes in place of the plain folder; None where it has none."""
    if not recipe.fp4:
        return None
    folders = dict.fromkeys((quantized_folder(recipe), PLAIN_FOLDER, PUBLISHED_FOLDER))
    return next((path for folder in folders if (path := root / folder / TEXT_FILE).is_file()), None)


def lora_file(root: Path, name: str) -> Path:
    """The LoRA that a job calls `name`. Raises JobWeightsMissing with what there is."""
    path = root / LORA_FOLDER / f"{name}.safetensors"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in (root / LORA_FOLDER).glob("*.safetensors"))) or "none"
        raise JobWeightsMissing(
            f"no LoRA {name!r}; there: {there}", where=path, todo="Put the file there, or mend the name"
        )
    return path


def lora_files(root: Path, names: tuple[tuple[str, float], ...], *, replace: bool) -> dict[str, tuple[Path, float]]:
    """name → (file, strength) of a job's own LoRAs; a replace job gets the relighting LoRA where the store has one.

    Raises JobWeightsMissing for a name that has no file, ConfigInvalid for one that is given twice.
    """
    twice = next((name for i, (name, _) in enumerate(names) if name in [other for other, _ in names[:i]]), None)
    if twice is not None:
        raise ConfigInvalid(
            f"a job names the LoRA {twice!r} twice", todo="Name it once, with the strength it is to have"
        )
    found = {name: (lora_file(root, name), strength) for name, strength in names}
    if replace and not any(RELIGHT in name.lower() for name in found):
        for path in sorted((root / LORA_FOLDER).glob("*.safetensors")):
            if RELIGHT in path.stem.lower():
                return found | {path.stem: (path, 1.0)}
    return found


def wanted_fp4(recipe: Recipe) -> Callable[[str], bool]:
    """Keys of a remote store that an FP4 recipe may need beyond the plain components."""
    folders = {quantized_folder(recipe), PLAIN_FOLDER, PUBLISHED_FOLDER}

    def want(key: str) -> bool:
        parts = PurePosixPath(key).parts or ("",)
        if recipe.fp4 and len(parts) == 2 and parts[0] in folders:
            return parts[1] in (TRANSFORMER_FILE, TEXT_FILE, QUANTIZE_CONFIG, "config.json")
        folder_ok = parts[0] == LORA_FOLDER or (recipe.distilled and parts[0] == DISTILL_FOLDER)
        return folder_ok and len(parts) == 2 and key.endswith(".safetensors")

    return want
