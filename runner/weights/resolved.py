"""Resolved recipe: the files that a recipe uses in one store, found once per start.

In:   a store and a recipe. Out: variant, files, digests, costs and bytes, or an error that lists what is missing.
Never: tensors, torch. Headers are read; whole files only for digests that are recorded nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.errors import WeightsMissing
from runner.forecast.flops import Costs
from runner.hashing import combine
from runner.spec.recipes import Recipe
from runner.weights.store import (
    COMPONENTS,
    CONFIGS,
    DETECTOR,
    HUB,
    PICKLED,
    POSE,
    POSE_GRAPH,
    TOKENIZER_FILES,
    WEIGHTS,
    ModelStore,
    check_not_empty,
    check_variant,
    check_weights,
    onnx_files,
    read_json,
    weight_files,
)
from runner.weights.variant import Variant, choose_variant, text_file

__all__ = ["ResolvedRecipe", "resolve_recipe"]


def resolve_recipe(store: ModelStore, recipe: Recipe, cache: Path | None = None) -> ResolvedRecipe:
    """Find and check the files of `recipe` in `store`, by their headers. Takes milliseconds.

    `cache`: a writable folder that keeps digests between runs. Raises WeightsMissing with all missing files at once,
    else WeightsCorrupt for the first damaged one.
    """
    resolved = ResolvedRecipe(store, recipe, cache)
    resolved.check()
    return resolved


@dataclass(frozen=True)
class ResolvedRecipe:
    """The files of a recipe in one store. Each property is computed at its first use and kept.

    `resolve_recipe` makes a checked one.
    """

    store: ModelStore
    recipe: Recipe
    cache: Path | None = None

    @cached_property
    def variant(self) -> Variant:
        """The files of the transformer and the text encoder. Raises WeightsMissing."""
        return choose_variant(self.store.root, self.recipe)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """Those of COMPONENTS that are read from the plain folders."""
        quantised = {"transformer"} if self.recipe.fp4 else set()
        quantised |= {"text_encoder"} if text_file(self.store.root, self.recipe) else set()
        return tuple(name for name in COMPONENTS if name not in quantised)

    def component(self, name: str) -> Path:
        """Folder of one of COMPONENTS."""
        return self.store.component(self.recipe, name)

    def config(self, name: str) -> dict[str, Any]:
        """A component's parsed config. Raises WeightsMissing or WeightsCorrupt."""
        if name == "transformer":
            return read_json(self.variant.config)
        return read_json(self.component(name) / CONFIGS.get(name, "config.json"))

    @cached_property
    def costs(self) -> Costs:
        """The costs of jobs with these models, from their configs."""
        return Costs.from_configs(*(self.config(name) for name in ("transformer", "vae", "image_encoder")))

    @cached_property
    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Model → its files that influence frames, configs included."""
        models = {name: self._component_files(name) for name in self.components}
        if extra := self.variant.files:
            models["transformer"] = extra
        detector, pose = onnx_files(self.store.detector), onnx_files(self.store.pose)
        return models | {"detector": tuple(detector), "pose": tuple(pose)}

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Model → sha256 of its files, for the fingerprint: an edited config renders other frames.

        A model of several files has the digest of their sha256sum listing. digests.py finds the digests.
        """
        return {name: self._digest(files) for name, files in self.files.items()}

    @cached_property
    def text_digest(self) -> str:
        """Digest of tokenizer and text encoder (plain or INT4), which together decide the embedding of a text."""
        file = self.variant.text_encoder
        return self._digest(
            ((file,) if file else self._component_files("text_encoder")) + self._component_files("tokenizer")
        )

    @cached_property
    def bytes(self) -> Mapping[str, int]:
        """Bytes of the models beside the transformer, by file sizes: encoders, preprocess, loras."""
        text = self.variant.text_encoder or self.component("text_encoder")
        networks = [path.parent if path.name == POSE_GRAPH else path for path in (self.store.detector, self.store.pose)]
        return {
            "encoders": _total_bytes(text) + _total_bytes(self.component("image_encoder")),
            "preprocess": sum(_total_bytes(path) for path in networks),
            "loras": sum(_total_bytes(path) for path in self.variant.loras),
        }

    def check(self) -> None:
        """Check all files, see `resolve_recipe`. Raises WeightsMissing or WeightsCorrupt."""
        store, recipe = self.store, self.recipe
        if not store.root.is_dir():
            raise WeightsMissing(
                "no such folder of models",
                where=store.root,
                todo="Pass --models DIR, or make a folder of tiny models: video-lab weights demo",
            )
        missing = [line for name in self.components for line in self._missing(name)]
        missing += [f"{rel}  (from {HUB['preprocess']})" for rel in self._missing_networks()]
        todo = "Put each file at its place, or make tiny models to try the runner with: video-lab weights demo"
        also = ""
        try:
            variant = self.variant
        except WeightsMissing as err:
            if not missing:
                raise
            also, todo = f"\n  {err.what}", f"{todo}\n{err.todo}"
        if missing:
            raise WeightsMissing(
                f"recipe {recipe.name!r} lacks {len(missing)} file{'s' if len(missing) > 1 else ''}\n"
                + "\n".join(f"  {line}" for line in missing)
                + f"{also}\n",
                where=store.root,
                todo=todo,
            )
        for name in self.components:
            self.config(name)
            check_weights(self.component(name), WEIGHTS.get(name))
        check_variant(variant)
        for graph in (store.detector, store.pose):
            for file in onnx_files(graph):
                check_not_empty(file)

    def _digest(self, files: tuple[Path, ...]) -> str:
        digests = self.store.file_digests(files, self.cache)
        return combine({self._name(file): digests[file] for file in files})

    def _name(self, file: Path) -> str:
        return file.relative_to(self.store.root).as_posix()

    def _missing(self, name: str) -> list[str]:
        folder = self.component(name)
        source = f"(from {name}/ of {HUB['weights']})"
        needed = [folder / CONFIGS.get(name, "config.json")]
        lines = []
        if name == "tokenizer" and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            needed.append(folder / TOKENIZER_FILES[0])
        if name in WEIGHTS:
            files = weight_files(folder, WEIGHTS[name])
            needed += files
            if not files:
                pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLED)
                refused = f"; {pickled[0]} is a pickle, which can run code, and is never read" if pickled else ""
                lines.append(f"{self._name(folder / WEIGHTS[name])}.safetensors  {source}{refused}")
        return [f"{self._name(path)}  {source}" for path in needed if not path.is_file()] + lines

    def _missing_networks(self) -> list[str]:
        lines = [] if self.store.detector.is_file() else [DETECTOR]
        return lines if self.store.pose.is_file() else [*lines, f"{POSE} or {POSE}/{POSE_GRAPH}"]

    def _component_files(self, name: str) -> tuple[Path, ...]:
        folder = self.component(name)
        plain = [p for p in folder.glob("*") if p.is_file() and p.suffix in (".json", ".model", ".txt")]
        weights = weight_files(folder, WEIGHTS[name]) if name in WEIGHTS else []
        return tuple(sorted({*(p for p in plain if not p.name.startswith(".")), *weights}))


def _total_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 for a missing one."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
