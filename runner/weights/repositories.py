"""Repositories: the published files of a recipe, their source, their place in the store, and their licence.

In:   a recipe's name. Out: the `HubSource`s it needs, frozen data. Never: the network, the disk.

Only files of this table are fetched, and never a file that Python could unpickle, such as the .pth, .pt and .ckpt files
of the original repository.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from types import MappingProxyType

from runner.errors import ConfigInvalid
from runner.spec.recipes import SOURCE_WEIGHTS, Recipe, get_recipe
from runner.weights.store import RIFE
from runner.weights.variant import svdq_format

__all__ = [
    "CONVERTED",
    "FP4_FOLDER",
    "PARTS",
    "PICKLED",
    "SOURCES",
    "HubSource",
    "Pin",
    "parts_of",
    "recipe_base",
    "sources_of",
]

FP4_FOLDER = "Wan2.2-Animate-14B-FP4"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Pin:
    """The size in bytes and the sha256 that a file must have, whatever the hub lists today."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class HubSource:
    """Some files of one hub repository, and their folder in the store."""

    part: str
    repo: str
    files: tuple[str, ...]  # shell patterns on paths in the repository; `*` crosses folders
    folder: str  # of the store; "" is its root
    licence: str  # as its publisher states it; the hub's card is shown beside it
    gb: float  # approximate, for the choice of a disk before the hub is read
    revision: str = "main"
    flat: bool = False  # drop the folders that the files have in the repository
    notice: str = ""  # what a user must know before use
    pins: Mapping[str, Pin] = field(default_factory=dict)  # by name of the file, without folders

    def wants(self, path: str) -> bool:
        """Is this path of the repository fetched? Never one that may be a pickle."""
        return not path.lower().endswith(PICKLED) and any(fnmatchcase(path, pattern) for pattern in self.files)

    def place(self, path: str) -> str:
        """The place of a repository's path in the store, relative to `folder`."""
        return PurePosixPath(path).name if self.flat else path


DIFFUSERS_REPO = "Wan-AI/Wan2.2-Animate-14B-Diffusers"
LORA_REPO = "Kijai/WanVideo_comfy"
LORA_COMMIT = "8260d429d19fd7a72304cad059160b95d843913f"  # a commit that has both LoRAs under these names
ORIGINAL_PROJECT_REPO = "treksis/video-lab"

SOURCES: Mapping[str, HubSource] = MappingProxyType(
    {
        source.part: source
        for source in (
            HubSource(
                part="components",
                repo=DIFFUSERS_REPO,
                files=(
                    *("tokenizer/*", "text_encoder/*", "image_encoder/*", "image_processor/*", "vae/*", "scheduler/*"),
                    *("model_index.json", "transformer/config.json"),
                ),
                folder=SOURCE_WEIGHTS,
                licence="Apache-2.0",
                gb=13,
            ),
            HubSource(
                part="transformer",
                repo=DIFFUSERS_REPO,
                files=("transformer/*.safetensors", "transformer/*.json"),
                folder=SOURCE_WEIGHTS,
                licence="Apache-2.0",
                gb=69.1,
            ),
            HubSource(
                part="preprocess",
                repo="Wan-AI/Wan2.2-Animate-14B",
                files=("process_checkpoint/det/yolov10m.onnx", "process_checkpoint/pose2d/*"),
                folder="",
                licence="Apache-2.0; the detector AGPL-3.0",
                gb=2.6,
                notice="yolov10m.onnx is under AGPL-3.0: a service that uses it must meet that licence's duties",
            ),
            HubSource(
                part="fp4",
                repo=ORIGINAL_PROJECT_REPO,
                files=("*quantized_transformer.safetensors", "*quantize_config.json"),
                folder=FP4_FOLDER,
                licence="none stated; made from Apache-2.0 weights",
                gb=9.9,
                flat=True,
            ),
            HubSource(
                part="fp4-text-encoder",
                repo=ORIGINAL_PROJECT_REPO,
                files=("*quantized_text_encoder.safetensors",),
                folder=FP4_FOLDER,
                licence="none stated; made from Apache-2.0 weights",
                gb=6.7,
                flat=True,
            ),
            HubSource(
                part="distill-lora",
                repo=LORA_REPO,
                files=("Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors",),
                folder="distill_lora",
                licence="Apache-2.0, by lightx2v",
                gb=0.74,
                revision=LORA_COMMIT,
                flat=True,
                pins={
                    "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors": Pin(
                        738_005_744, "85c4a61c30e0497aa44b91d93a893b624708461a56fe5485183b28fa07e2dfb3"
                    )
                },
            ),
            HubSource(
                part="relight-lora",
                repo=LORA_REPO,
                files=("LoRAs/Wan22_relight/WanAnimate_relight_lora_fp16.safetensors",),
                folder="loras",
                licence="Apache-2.0, part of Wan2.2-Animate",
                gb=1.44,
                revision=LORA_COMMIT,
                flat=True,
                pins={
                    "WanAnimate_relight_lora_fp16.safetensors": Pin(
                        1_436_672_440, "fc646c74c73f4b251f5fd9bc440ef21b03b27305f499966c68b2b3aa31498561"
                    )
                },
            ),
        )
    }
)
PARTS = tuple(SOURCES)

# Files that a script of tools/ makes from published ones, with the same bytes every time.
CONVERTED: Mapping[str, Pin] = MappingProxyType(
    {RIFE: Pin(22_674_496, "e8872b7bb84d366c4e63c2066f0033509ea7a5bb73f7a79251b2fe5376c95d89")}
)

# Recipe without modifiers → the parts that it needs.
NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bf16": ("components", "transformer", "preprocess"),
        "fp32": ("components", "transformer", "preprocess"),
        "fp4": ("components", "fp4", "preprocess"),
        "fp4-distill": ("components", "fp4", "distill-lora", "preprocess"),
        "fp4-fast": ("components", "fp4", "distill-lora", "preprocess"),
    }
)


def recipe_base(recipe: Recipe | str) -> str:
    """Return a recipe's name without its modifiers. Raises ConfigInvalid for an unknown name."""
    name = recipe if isinstance(recipe, str) else recipe.name
    base = name.partition("+")[0]
    if base not in NEEDED:
        get_recipe(name)  # raises for an unknown name
        raise ConfigInvalid(f"recipe {name!r} has no published files to fetch", todo="Recipes: " + ", ".join(NEEDED))
    return base


def parts_of(recipe: Recipe | str) -> tuple[str, ...]:
    """List the parts that `recipe` needs, in the order of the table.

    No file in an SVDQ format is published: a recipe with such a format needs the source to make it from.
    """
    needed = set(NEEDED[recipe_base(recipe)])
    if svdq_format(get_recipe(recipe) if isinstance(recipe, str) else recipe):
        needed = needed - {"fp4"} | {"transformer"}
    return tuple(part for part in PARTS if part in needed)


def sources_of(recipe: Recipe | str, parts: Iterable[str] | None = None) -> list[HubSource]:
    """List the sources of a recipe, or those of `parts` instead. Raises ConfigInvalid for an unknown part."""
    names = parts_of(recipe) if parts is None else tuple(parts)
    unknown = [part for part in names if part not in SOURCES]
    if unknown:
        raise ConfigInvalid(f"no part {unknown[0]!r} of the published files", todo="Parts: " + ", ".join(PARTS))
    return [SOURCES[part] for part in PARTS if part in names]
