"""Quantised header: read the header of a file of `quantize` and check its names, shapes and dtypes.

In:   the path of a quantised transformer. Out: its description, or WeightsCorrupt with the tensor's name.
Never: tensors, torch, the file's model: a run checks its files before it imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from runner.errors import WeightsCorrupt
from runner.quantization.files.file_header import PLACEHOLDER, SafetensorsHeader, TensorInfo, read_header
from runner.quantization.formats.fp4_layout import LAYOUTS, Layout
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS, SvdqLayout

__all__ = [
    "AGAIN",
    "CALIBRATION_KEY",
    "FORMAT_KEY",
    "GROUP_KEY",
    "LORAS_KEY",
    "METHOD_KEY",
    "RANK_KEY",
    "REFITS_KEY",
    "SHA256_KEY",
    "SMOOTHINGS",
    "SMOOTHING_KEY",
    "SOURCE_KEY",
    "VERSION_KEY",
    "QuantizedFile",
    "check_file",
    "refuse_foreign",
]

FORMAT_KEY: Final = "video_lab.format"
METHOD_KEY: Final = "video_lab.scale_method"
GROUP_KEY: Final = "video_lab.group"
SOURCE_KEY: Final = "video_lab.source_sha256"
LORAS_KEY: Final = "video_lab.loras"
VERSION_KEY: Final = "video_lab.version"
RANK_KEY: Final = "video_lab.rank"  # this and the next ones: of SVDQ files
SMOOTHING_KEY: Final = "video_lab.smoothing"  # `calibrated` | `weights`: the source of smoothing factors
CALIBRATION_KEY: Final = "video_lab.calibration"  # JSON: counts of jobs, steps and rows; `{}` without calibration
REFITS_KEY: Final = "video_lab.refits"  # rounds in which the low-rank part was fitted again after rounding
SHA256_KEY: Final = "video_lab.sha256"
SMOOTHINGS: Final = ("calibrated", "weights")
FLOATS: Final = ("bfloat16", "float32")  # dtypes of tensors that are not quantised
AGAIN = "Make it again with `video-lab quantize`, or fetch it again"

# Names of tensors that only quantised layers have. SVDQ: those of both precisions, and two of other programs' files.
FP4_PART: Final = re.compile(r"\.weight_")
SVDQ_SUFFIXES: Final = {suffix for layout in SVDQ_LAYOUTS.values() for suffix in layout.tensor_table(1, 1)}
SVDQ_PART: Final = re.compile(rf"\.({'|'.join(sorted(SVDQ_SUFFIXES | {'smooth_factor_orig', 'wtscale'}))})$")
# Other programs' files of SVDQ layers: a key of their metadata → the program; files without such a key: by tensors.
FOREIGN_KEYS: Final = {
    "cache_dit_svdq_ptq": "a checkpoint of cache-dit",
    "quantization_config": "a checkpoint of nunchaku",
}
FOREIGN_FACTORS: Final = (".proj_down", ".lora_down")


@dataclass(frozen=True)
class QuantizedFile:
    """A checked header. `layers`: quantised linear → (out_features, in_features), as padded in an SVDQ file.

    `chosen`, for the record: `rank`, `smoothing`, `calibration` and `refits` of an SVDQ file; else empty.
    """

    header: SafetensorsHeader
    layout: Layout | SvdqLayout
    layers: Mapping[str, tuple[int, int]]
    loras: tuple[dict[str, object], ...]
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """sha256 of the data section, as recorded when the file was made."""
        return self.header.metadata[SHA256_KEY]

    def tensor_names(self, layer: str) -> dict[str, str]:
        """Suffix → name of a layer's tensors."""
        return {suffix: f"{layer}.{suffix}" for suffix in self.layout.tensor_table(*self.layers[layer])}


def check_file(path: Path) -> QuantizedFile:
    """Check that `path` is a file of `quantize` whose names, shapes and dtypes agree with its format. Reads its header.

    Raises WeightsMissing; WeightsCorrupt with the name of the tensor, or with the wrong key of the metadata.
    """
    header = read_header(path)
    meta = header.metadata
    known: Mapping[str, Layout | SvdqLayout] = {**LAYOUTS, **SVDQ_LAYOUTS}
    layout = known.get(meta.get(FORMAT_KEY, ""))
    if layout is None:
        refuse_foreign(header)
        problem = f"is {meta[FORMAT_KEY]!r}, not one of {', '.join(known)}" if FORMAT_KEY in meta else "is missing"
        raise WeightsCorrupt(
            f"not a file of `quantize`: {FORMAT_KEY} in its metadata {problem}", where=path, todo=AGAIN
        )
    if meta.get(GROUP_KEY) != str(layout.group):
        found = meta.get(GROUP_KEY)
        raise WeightsCorrupt(f"{GROUP_KEY} is {found!r}; {layout.name} has {layout.group}", where=path, todo=AGAIN)
    for key in (SHA256_KEY, SOURCE_KEY):
        if len(meta.get(key, "")) != len(PLACEHOLDER) or meta[key] == PLACEHOLDER:
            raise WeightsCorrupt(f"{key} was never filled in: the file was not finished", where=path, todo=AGAIN)
    loras = tuple(_parse_json(header, LORAS_KEY, list))
    if isinstance(layout, Layout):
        return QuantizedFile(header, layout, _layers(header, layout), loras)
    chosen = _read_chosen(header, layout)
    layout = layout.with_rank(chosen["rank"])
    return QuantizedFile(header, layout, _layers(header, layout), loras, chosen)


def refuse_foreign(header: SafetensorsHeader) -> None:
    """Raise WeightsCorrupt for SVDQ layers that another program stored, with its name and what to do."""
    if FORMAT_KEY in header.metadata or not any(name.endswith(FOREIGN_FACTORS) for name in header.tensors):
        return
    codes = {name.rpartition(".")[2]: info.dtype_name for name, info in header.tensors.items()}
    if "qweight" not in codes:
        return
    what = next(
        (kind for key, kind in FOREIGN_KEYS.items() if key in header.metadata), "a file in Nunchaku Lite's layout"
    )
    scales = codes.get("wscales", "")
    layout = next(
        (known for known in SVDQ_LAYOUTS.values() if known.tensor_table(1, 1)["wscales"][1] == scales),
        next(iter(SVDQ_LAYOUTS.values())),
    )
    raise WeightsCorrupt(
        f"{what}, not a file of `quantize`: it records no source, LoRAs and checksum, and its biases have another "
        "order",
        where=header.path,
        todo=f"Make one from the published weights: video-lab quantize --format {layout.name}",
    )


def _read_chosen(header: SafetensorsHeader, layout: SvdqLayout) -> dict[str, Any]:
    """Read the choices of an SVDQ file's quantiser from its metadata. Raises WeightsCorrupt with the key."""
    meta, numbers = header.metadata, {}
    for key in (RANK_KEY, REFITS_KEY):
        if re.fullmatch(r"[0-9]{1,6}", meta.get(key, ""), re.ASCII) is None:
            raise _unusable(header, key, f"not a number; {layout.name} needs it")
        numbers[key] = int(meta[key])
    try:
        layout.with_rank(numbers[RANK_KEY])
    except ValueError as err:
        raise _unusable(header, RANK_KEY, str(err)) from err
    if meta.get(SMOOTHING_KEY) not in SMOOTHINGS:
        raise _unusable(header, SMOOTHING_KEY, f"not {' or '.join(SMOOTHINGS)}")
    return {
        "rank": numbers[RANK_KEY],
        "smoothing": meta[SMOOTHING_KEY],
        "calibration": _parse_json(header, CALIBRATION_KEY, dict),
        "refits": numbers[REFITS_KEY],
    }


def _unusable(header: SafetensorsHeader, key: str, why: str) -> WeightsCorrupt:
    problem = f"is {header.metadata[key]!r}, {why}" if key in header.metadata else f"is missing, {why}"
    return WeightsCorrupt(f"{key} in its metadata {problem}", where=header.path, todo=AGAIN)


def _parse_json(header: SafetensorsHeader, key: str, kind: type) -> Any:
    """Parse the value of a metadata key, a list or an object. Raises WeightsCorrupt."""
    what = "list" if kind is list else "JSON object"
    try:
        value = json.loads(header.metadata[key])
        if not isinstance(value, kind):
            raise TypeError(f"it is {type(value).__name__}")
    except (KeyError, TypeError, ValueError, RecursionError) as err:
        raise WeightsCorrupt(f"{key} is no {what} ({err})", where=header.path, todo=AGAIN) from err
    return value


def _layers(header: SafetensorsHeader, layout: Layout | SvdqLayout) -> dict[str, tuple[int, int]]:
    layers: dict[str, tuple[int, int]] = {}
    claimed: set[str] = set()
    for name, info in header.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix != layout.packed or not layer:
            continue
        if len(info.shape) != 2:
            raise WeightsCorrupt(f"{name} is {list(info.shape)}, not a matrix", where=header.path, todo=AGAIN)
        shape = layout.unpacked_shape((info.shape[0], info.shape[1]))
        try:
            table = layout.tensor_table(*shape)
        except ValueError as err:
            raise WeightsCorrupt(f"{name}: {err}", where=header.path, todo=AGAIN) from err
        for suffix, expected in table.items():
            part = header.tensors.get(f"{layer}.{suffix}")
            if part is None or (part.shape, part.dtype_name) != expected:
                raise WeightsCorrupt(
                    _difference(f"{layer}.{suffix}", part, expected, layout), where=header.path, todo=AGAIN
                )
            claimed.add(f"{layer}.{suffix}")
        layers[layer] = shape
    mark = SVDQ_PART if isinstance(layout, SvdqLayout) else FP4_PART
    stray = [name for name in header.tensors if name not in claimed and mark.search(name)]
    if stray or not layers:
        what = f"{stray[0]} belongs to no quantised layer" if stray else "no layer in it is quantised"
        if stray and stray[0].rpartition(".")[0] in layers:
            what = f"{stray[0]} is no tensor of {layout.name}"
        raise WeightsCorrupt(what, where=header.path, todo=AGAIN)
    for name, info in header.tensors.items():
        if name not in claimed and info.dtype_name not in FLOATS:
            wanted = " or ".join(f"torch.{dtype}" for dtype in FLOATS)
            raise WeightsCorrupt(f"{name} is torch.{info.dtype_name}, not {wanted}", where=header.path, todo=AGAIN)
    return layers


def _difference(
    name: str, part: TensorInfo | None, expected: tuple[tuple[int, ...], str], layout: Layout | SvdqLayout
) -> str:
    """Say how a layer's tensor differs from its format; for SVDQ, also which format or rank it would fit."""
    shape, dtype = expected
    found = f"is torch.{part.dtype_name} {list(part.shape)}" if part else "is missing"
    problem = f"{name} {found}, {layout.name} asks for torch.{dtype} {list(shape)}"
    if part is None or not isinstance(layout, SvdqLayout):
        return problem
    suffix = name.rpartition(".")[2]
    if suffix.startswith("proj_") and part.dtype_name == dtype and len(part.shape) == 2:
        return f"{problem}: factors of rank {part.shape[1]}, and {RANK_KEY} says {layout.rank}"
    other = next((row for row in SVDQ_LAYOUTS.values() if row.name != layout.name), layout)
    if suffix == "wscales" and part.dtype_name == other.tensor_table(1, 1)["wscales"][1]:
        return f"{problem}: scales of {other.name}"
    return problem
