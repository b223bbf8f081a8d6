"""Resolved: a recipe with the files that it uses in one store, asked once a start.

In:   a store and a recipe. Out: variant, files, digests, costs and bytes, or an error that lists what is missing.
Never: tensors, torch. Headers are read, and bytes only for digests that nothing else knows.
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
    """`recipe` in `store`, checked: everything it needs is there and whole, as far as headers tell. Milliseconds.

    `cache`: a writable folder that remembers digests between runs. Raises WeightsMissing with every missing file at
    once, else WeightsCorrupt for the first that is damaged.
    """
    resolved = ResolvedRecipe(store, recipe, cache)
    resolved.check()
    return resolved


@dataclass(frozen=True)
class ResolvedRecipe:
    """What a recipe runs with in one store. Each answer is found when it is first asked for, and kept.

    `resolve_recipe` makes one that has been checked.
    """

    store: ModelStore
    recipe: Recipe
    cache: Path | None = None

    @cached_property
    def variant(self) -> Variant:
        """Which files the transformer and the text encoder come from. Raises WeightsMissing."""
        return choose_variant(self.store.root, self.recipe)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """Those of COMPONENTS that come from the plain folders."""
        instead = {"transformer"} if self.recipe.fp4 else set()
        instead |= {"text_encoder"} if text_file(self.store.root, self.recipe) else set()
        return tuple(name for name in COMPONENTS if name not in instead)

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
        """What jobs cost with these very models, from their configs."""
        return Costs.from_configs(*(self.config(name) for name in ("transformer", "vae", "image_encoder")))

    @cached_property
    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Piece → the files that decide its part of the frames, configs included."""
        pieces = {name: self._component_files(name) for name in self.components}
        if extra := self.variant.files:
            pieces["transformer"] = extra
        detector, pose = onnx_files(self.store.detector), onnx_files(self.store.pose)
        return pieces | {"detector": tuple(detector), "pose": tuple(pose)}

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Piece → sha256 of its files, for the fingerprint: an edited config renders other frames.

        A piece of several files has the digest of their sha256sum listing. See digests.py for what is read.
        """
        return {name: self._digest(files) for name, files in self.files.items()}

    @cached_property
    def text_digest(self) -> str:
        """Digest of all that makes an embedding of a text: tokenizer and text encoder, whichever file that is."""
        file = self.variant.text_encoder
        return self._digest(
            ((file,) if file else self._component_files("text_encoder")) + self._component_files("tokenizer")
        )

    @cached_property
    def bytes(self) -> Mapping[str, int]:
        """Bytes of what stands beside the transformer, by the sizes of its files: encoders, preprocess, loras."""
        text = self.variant.text_encoder or self.component("text_encoder")
        networks = [path.parent if path.name == POSE_GRAPH else path for path in (self.store.detector, self.store.pose)]
        return {
            "encoders": _total_bytes(text) + _total_bytes(self.component("image_encoder")),
            "preprocess": sum(_total_bytes(path) for path in networks),
            "loras": sum(_total_bytes(path) for path in self.variant.loras),
        }

    def check(self) -> None:
        """Raises WeightsMissing or WeightsCorrupt, see `resolve_recipe`."""
        store, recipe = self.store, self.recipe
        if not store.root.is_dir():
            raise WeightsMissing(
                "no such folder of models",
                where=store.root,
                todo="Pass --models DIR, or make one: video-lab weights demo",
            )
        missing = [line for name in self.components for line in self._missing(name)]
        missing += [f"{rel}  (from {HUB['preprocess']})" for rel in self._missing_networks()]
        todo = "Put each where it belongs, or make tiny models to try the runner with: video-lab weights demo"
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
        wanted = [folder / CONFIGS.get(name, "config.json")]
        lines = []
        if name == "tokenizer" and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            wanted.append(folder / TOKENIZER_FILES[0])
        if name in WEIGHTS:
            files = weight_files(folder, WEIGHTS[name])
            wanted += files
            if not files:
                pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLED)
                refused = f"; {pickled[0]} is a pickle, which can run code, and is never read" if pickled else ""
                lines.append(f"{self._name(folder / WEIGHTS[name])}.safetensors  {source}{refused}")
        return [f"{self._name(path)}  {source}" for path in wanted if not path.is_file()] + lines

    def _missing_networks(self) -> list[str]:
        lines = [] if self.store.detector.is_file() else [DETECTOR]
        return lines if self.store.pose.is_file() else [*lines, f"{POSE} or {POSE}/{POSE_GRAPH}"]

    def _component_files(self, name: str) -> tuple[Path, ...]:
        folder = self.component(name)
        plain = [p for p in folder.glob("*") if p.is_file() and p.suffix in (".json", ".model", ".txt")]
        weights = weight_files(folder, WEIGHTS[name]) if name in WEIGHTS else []
        return tuple(sorted({*(p for p in plain if not p.name.startswith(".")), *weights}))


def _total_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
