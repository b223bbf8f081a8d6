"""Store: the paths of models in `--models`, and checks of single files; `resolved.py` lists a recipe's files.

In:   the store's root (a local folder). Out: paths, which keys of a remote store a recipe needs, WeightsCorrupt for a
      file with a wrong header.
Never: tensors. Files are opened for their headers only; pickled weights (.bin, .pt, .ckpt) are never opened at all.

Layout: the published folders, unchanged, so that a download can be put there as it is.
    Wan2.2-Animate-14B-Diffusers/{transformer,vae,text_encoder,image_encoder,tokenizer,image_processor}/
    process_checkpoint/det/yolov10m.onnx
    process_checkpoint/pose2d/vitpose_h_wholebody.onnx  (a file, or a folder with end2end.onnx and its weight files)
    rife/rife-4.25.safetensors  (optional, like the networks below process_checkpoint/ that only some jobs need)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from runner.errors import JobWeightsMissing, WeightsCorrupt, job_weight_errors
from runner.quantization.files.file_header import LFS_POINTER, SHARD_NAME
from runner.quantization.files.file_header import read_header as read_safetensors_header
from runner.quantization.files.json_reading import read_json_object
from runner.quantization.files.quantized_header import QuantizedFile, check_file, refuse_foreign
from runner.spec.options import JobOptions
from runner.spec.recipes import Recipe
from runner.weights.digests import FileDigests
from runner.weights.rife_file import check_rife_file
from runner.weights.variant import (
    LORA_FOLDER,
    RELIGHT,
    Variant,
    formats_in,
    lora_files,
    wanted_fp4,
)

__all__ = [
    "COMPONENTS",
    "DEMO_MARKER",
    "RIFE",
    "ModelStore",
    "check_lora",
    "check_quantized",
    "wanted",
    "wanted_by_jobs",
]

COMPONENTS = ("transformer", "vae", "text_encoder", "image_encoder", "tokenizer", "image_processor")

# Component -> name of its weights files, as the library that saved them chose it.
WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "image_encoder": "model",
}
# Dtypes as a safetensors header names them. 8-bit floats are not allowed: the loaders would drop their scales.
FLOATS = ("F64", "F32", "F16", "BF16")
# Kind of file -> the ending of a tensor's name -> the dtypes that it may have; all other tensors have one of FLOATS.
INTEGERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "component": {"position_ids": ("I64", "I32"), "num_batches_tracked": ("I64",)},
    "lora": {".alpha": (*FLOATS, "I64")},
    "int4": {".qweight": ("I16",)},
}
PUBLISHED_DTYPES = (*FLOATS, "U8", "I8", "F8_E8M0")  # with the codes and scales of published FP4 files
SMALL = 16  # elements; sizes, flags and tables in such a file are not larger, and may have any dtype

CONFIGS = {"tokenizer": "tokenizer_config.json", "image_processor": "preprocessor_config.json"}
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
DETECTOR = "process_checkpoint/det/yolov10m.onnx"
POSE = "process_checkpoint/pose2d/vitpose_h_wholebody.onnx"
POSE_REPACKED = "process_checkpoint/pose2d/vitpose_h_wholebody_model.onnx"  # one graph and one .bin of weights
POSE_GRAPH = "end2end.onnx"  # in the published folder
DWPOSE = ("process_checkpoint/dwpose/yolox_l.onnx", "process_checkpoint/dwpose/dw-ll_ucoco_384.onnx")
SEGMENTER = "process_checkpoint/sam2"
RIFE = "rife/rife-4.25.safetensors"  # `tools/convert_rife.py` makes it
DEMO_MARKER = "demo.json"  # `weights demo` writes it into each store that it makes
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

# Optional model → what to do where it is missing.
INSTEAD = {
    "dwpose": "Put the files there, or leave preprocess.pose at vitpose",
    "segmenter": "Put the files there, or give replace jobs a `mask:`",
    "rife": "Make it with tools/convert_rife.py (see docs/interpolation.md), or leave output.interpolate at 1",
}

HUB = {
    "weights": "Wan-AI/Wan2.2-Animate-14B-Diffusers on the Hugging Face hub",
    "preprocess": "process_checkpoint/ of Wan-AI/Wan2.2-Animate-14B on the Hugging Face hub",
}


Header = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> dtype, as the file names it, and shape


@dataclass(frozen=True)
class ModelStore:
    """A local folder of models. Each file is hashed at most once by this object."""

    root: Path
    _hashes: FileDigests = field(default_factory=FileDigests, repr=False, compare=False)

    def component(self, recipe: Recipe, name: str) -> Path:
        """Folder of one of COMPONENTS."""
        return self.root / recipe.weights / name

    @property
    def detector(self) -> Path:
        """The person detector's ONNX file."""
        return self.root / DETECTOR

    @property
    def detector_note(self) -> str:
        """What to tell a user whose video has no person for this detector; empty for all stores but the demo's."""
        demo = (self.root / DEMO_MARKER).is_file()
        return "The demo's detector finds only the demo's drawn dancers" if demo else ""

    @property
    def pose(self) -> Path:
        """The pose model's ONNX graph, in one of the three published forms."""
        for path in (self.root / POSE / POSE_GRAPH, self.root / POSE, self.root / POSE_REPACKED):
            if path.is_file():
                return path
        return self.root / POSE

    @property
    def dwpose(self) -> tuple[Path, Path]:
        """Detector and pose network of `preprocess.pose: dwpose`. Optional."""
        return self.root / DWPOSE[0], self.root / DWPOSE[1]

    @property
    def segmenter(self) -> Path:
        """Folder of the video segmenter (transformers' layout). Optional: for replace jobs without a mask."""
        return self.root / SEGMENTER

    @property
    def rife(self) -> Path:
        """The frame interpolation network. Optional: for `output.interpolate`."""
        return self.root / RIFE

    def job_extras(self, options: JobOptions, has_mask: bool) -> dict[str, list[Path]]:
        """Optional model that one job needs → its files.

        Raises JobWeightsMissing with what to do, and JobWeightsCorrupt for a header that is damaged or of another
        network.
        """
        models: dict[str, list[Path]] = {}
        if options.preprocess.pose == "dwpose":
            models["dwpose"] = list(self.dwpose)
        if options.mode == "replace" and not has_mask:
            weights = weight_files(self.segmenter, "model")
            models["segmenter"] = [self.segmenter / "config.json", *weights]
        if options.output.interpolate > 1:
            models["rife"] = [self.rife]
        for name, files in models.items():
            missing = [self._name(path) for path in files if not path.is_file()]
            if missing:
                raise JobWeightsMissing(f"no {', '.join(missing)}", where=self.root, todo=INSTEAD[name])
        if "rife" in models:
            with job_weight_errors():
                check_rife_file(self.rife)
        return models

    def loras(self, names: tuple[tuple[str, float], ...], *, replace: bool) -> dict[str, tuple[Path, float]]:
        """name → (file, strength) of a job's LoRAs. Raises JobWeightsMissing for a name without a file."""
        return lora_files(self.root, names, replace=replace)

    def file_digests(self, files: Iterable[Path], cache: Path | None = None) -> dict[Path, str]:
        """File → sha256. `cache`: a writable folder that keeps digests between runs."""
        return self._hashes.find(files, self.root, cache)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()


def onnx_files(graph: Path) -> list[Path]:
    """The graph and the files of its weights: all of its folder, or those of the same name beside it."""
    if graph.name == POSE_GRAPH:
        beside: Iterable[Path] = graph.parent.rglob("*")
    else:
        beside = graph.parent.glob(f"{graph.stem.removesuffix('_model')}*")
    others = {p for p in beside if p.is_file() and p.suffix != ".onnx" and not p.name.startswith(".")}
    return sorted({graph, *others})


def wanted(recipe: Recipe) -> Callable[[str], bool]:
    """A predicate on keys of a remote store (paths relative to its root): those to copy for `recipe`."""

    fp4 = wanted_fp4(recipe)

    def want(key: str) -> bool:
        parts = PurePosixPath(key).parts
        if not parts or any(part.startswith(".") for part in parts):
            return False
        if parts[0] == recipe.weights and len(parts) > 2 and parts[1] == "transformer" and recipe.fp4:
            return parts[2] == "config.json"  # FP4 recipes do not need the source's weights
        if parts[0] == recipe.weights:
            return len(parts) > 2 and parts[1] in COMPONENTS and not key.endswith(PICKLED)
        if fp4(key):
            return True
        optional = key in (*DWPOSE, RIFE, DEMO_MARKER) or (
            key.startswith(f"{SEGMENTER}/") and not key.endswith(PICKLED)
        )
        return optional or key == DETECTOR or key.startswith(POSE.removesuffix(".onnx"))

    return want


def wanted_by_jobs(options: Iterable[JobOptions]) -> Callable[[str], bool]:
    """A predicate on keys of a remote store: those that jobs need beside the recipe's models.

    It accepts config files too, so that a store without LoRAs is not taken for an empty one.
    """
    all_options = list(options)
    names = {f"{LORA_FOLDER}/{lora.name}.safetensors" for job in all_options for lora in job.loras}
    dwpose = any(job.preprocess.pose == "dwpose" for job in all_options)
    replace = any(job.mode == "replace" for job in all_options)
    rife = any(job.output.interpolate > 1 for job in all_options)

    def want(key: str) -> bool:
        if key in names or key.endswith("/config.json") or (dwpose and key in DWPOSE) or (rife and key == RIFE):
            return True
        relight = key.startswith(f"{LORA_FOLDER}/") and RELIGHT in key.lower() and key.endswith(".safetensors")
        return replace and (relight or (key.startswith(f"{SEGMENTER}/") and not key.endswith(PICKLED)))

    return want


def check_variant(variant: Variant) -> None:
    """Check the headers and dtypes of quantised files and of the LoRAs beside them. Raises WeightsCorrupt."""
    if variant.kind == "quantized":
        check_quantized(variant.transformer)
    elif variant.kind == "published":
        refuse_foreign(read_safetensors_header(variant.transformer))
        for name, (dtype, shape) in read_header(variant.transformer).items():
            if math.prod(shape) > SMALL:
                check_dtype(variant.transformer, name, dtype, PUBLISHED_DTYPES)
    for file in variant.loras:
        check_lora(file)
    if variant.text_encoder:
        check_dtypes(variant.text_encoder, read_header(variant.text_encoder), "int4")


def check_quantized(file: Path) -> QuantizedFile:
    """Check the header of a quantised file, and that its format is one of its folder's. Raises WeightsCorrupt."""
    quantized, formats = check_file(file), formats_in(file.parent.name)
    if quantized.layout.name not in formats:
        raise WeightsCorrupt(
            f"its weights are stored in {quantized.layout.name}; {file.parent.name}/ is for {' or '.join(formats)}",
            where=file,
            todo="Put it into the folder of its own format, or make a file with `video-lab quantize`",
        )
    return quantized


def check_lora(file: Path) -> None:
    """Check the header and dtypes of a LoRA. Raises WeightsCorrupt."""
    check_dtypes(file, read_header(file), "lora")


def check_dtypes(file: Path, header: Header, kind: str) -> None:
    """Check the dtypes of `file`'s tensors against those of its kind, a key of INTEGERS. Raises WeightsCorrupt."""
    for name, (dtype, _) in header.items():
        allowed = next((some for ending, some in INTEGERS[kind].items() if name.endswith(ending)), FLOATS)
        check_dtype(file, name, dtype, allowed)


def check_dtype(file: Path, name: str, dtype: str, allowed: tuple[str, ...]) -> None:
    """Raise WeightsCorrupt for a dtype that is not among those allowed."""
    if dtype not in allowed:
        raise WeightsCorrupt(
            f"{name} is {dtype}, not {' or '.join(allowed)}",
            where=file,
            todo="Its header was changed, or it is another kind of file: download it again",
        )


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of a component: `stem.safetensors`, or its index and all shards in it, missing ones too."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    files = [single] if single.is_file() else []
    if index.is_file():
        files += [index, *(folder / shard for shard in sorted(set(weight_map(index).values())))]
    return files


def weight_map(index: Path) -> dict[str, str]:
    """Read tensor -> shard from an index. Raises WeightsCorrupt."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
        raise WeightsCorrupt("the index names no shards", where=index, todo="Download it again")
    strays = sorted({name for name in shards.values() if not SHARD_NAME.fullmatch(name)})
    if strays:
        raise WeightsCorrupt(f"the index names {strays[0]!r}, which is no safetensors file beside it", where=index)
    return shards


def check_weights(folder: Path, stem: str | None) -> None:
    """Check that headers of a component's safetensors agree with the files' sizes and the index, and that all dtypes
    are floating.

    Raises WeightsCorrupt.
    """
    if stem is None:
        return
    held: dict[str, set[str]] = {}
    for file in weight_files(folder, stem):
        if file.suffix == ".safetensors":
            header = read_header(file)
            check_dtypes(file, header, "component")
            held[file.name] = set(header)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return
    for tensor, shard in weight_map(index).items():
        if tensor not in held[shard]:
            raise WeightsCorrupt(
                f"{tensor} is not in {shard}, where the index puts it", where=index, todo="Download both again"
            )


def read_header(file: Path) -> Header:
    """Read a safetensors header. Opening the file also checks its length against the header."""
    from safetensors import SafetensorError, safe_open

    check_not_empty(file)
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as err:
        raise WeightsCorrupt(
            f"truncated or not a safetensors file, {file.stat().st_size} bytes ({err})",
            where=file,
            todo="Download it again",
        ) from err


def check_not_empty(file: Path) -> None:
    """Raise WeightsCorrupt for an empty file and for a Git LFS pointer instead of a file."""
    with file.open("rb") as stream:
        head = stream.read(len(LFS_POINTER))
    if not head:
        raise WeightsCorrupt("the file is empty", where=file, todo="Download it again")
    if head == LFS_POINTER:
        raise WeightsCorrupt("a Git LFS pointer, not the file itself", where=file, todo="Run `git lfs pull` there")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises WeightsMissing or WeightsCorrupt."""
    return read_json_object(path, "Run `video-lab doctor` for what goes where", "Download it again")
