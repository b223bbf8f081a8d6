"""Published FP4 files: read another project's `quantized_transformer.safetensors` as g32, recognised by its shapes.

In:   the file, quantize_config.json if there is one, the model on the meta device, `--assume` words.
Out:  the filled model, with the found and the assumed read options; or the error of each reading of one layer.
Never: guesses about sizes: a file that does not fit the model is refused, with the tensor's name.

A quantised layer has, under its name and any suffix, a tensor with two codes a byte for every weight and a tensor with
one scale for every 32 (64, 128) weights. Names may have a prefix (`transformer.`, `model.`) and may be the original
Wan's. Matrices that are no nn.Linear (the motion encoder's) are dequantised, since their modules read `weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from runner.errors import WeightsCorrupt
from runner.quantization.files.checkpoint_read import fill
from runner.quantization.files.file_header import SafetensorsHeader, read_header
from runner.quantization.files.json_reading import read_json_object
from runner.quantization.files.published_names import PublishedPiece, as_diffusers
from runner.quantization.files.read_options import ReadOptions, all_read_options, group_in_config, options_from_config
from runner.quantization.formats.e2m1 import G32, dequantize
from runner.quantization.rules import kept_in_fp32, linear_shapes, stored_dtype

__all__ = [
    "Comparison",
    "PublishedFile",
    "PublishedLayer",
    "PublishedLoaded",
    "compare_layer",
    "load_published",
    "read_published",
    "settle",
]

GROUPS: Final = (32, 64, 128)  # g32 can represent each of them exactly
FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
CODES: Final = (torch.uint8, torch.int8)
SCALES: Final = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)
# Where several shapes fit, the usual names decide.
PACKED_NAMES: Final = ("weight_packed", "qweight", "packed", "packed_weight", "weight_q", "weight_fp4", "weight")
SCALE_NAMES: Final = ("weight_scale", "weight_scales", "scales", "scale", "absmax", "weight_absmax", "wscales")
TABLE_NAME: Final = re.compile(r"(codebook|lut|table|quant_map|fp4_values|code)$")
SMALL: Final = 16  # elements; layers' sizes, flags and tables of codes are not larger
SAMPLE_ROWS: Final = 256
# Relative error of a layer: 4-bit rounding gives 0.1, wrong readings give 0.8 and more.
RIGHT: Final = 0.25
WRONG: Final = 0.5


@dataclass(frozen=True)
class PublishedLayer:
    """One quantised matrix: `owner`.weight [out, in]."""

    owner: str
    shape: tuple[int, int]
    packed: PublishedPiece
    scale: PublishedPiece
    group: int


@dataclass(frozen=True)
class PublishedFile:
    """A recognised published file. `layers` by owner; `plain`: parameter → its tensor."""

    header: SafetensorsHeader
    layers: Mapping[str, PublishedLayer]
    plain: Mapping[str, PublishedPiece]
    ignored: tuple[str, ...]
    config: Mapping[str, Any]
    table: tuple[float, ...] | None

    @property
    def path(self) -> Path:
        return self.header.path

    def read_options(self, given: Mapping[str, str] | None = None) -> tuple[ReadOptions, list[str]]:
        """Return (the read options, the choices that neither the config nor `given` makes)."""
        return options_from_config(self.config, given, self.table)

    def tensors(
        self, layer: PublishedLayer, how: ReadOptions, rows: int | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """Return (the first `rows` of a layer as g32, the largest relative rounding error of its scales in bf16).

        Raises WeightsCorrupt for scales that are NaN, infinite, negative, or zero where they divide.
        """
        out, wide = layer.shape
        rows = min(rows or out, out)
        packed = layer.packed.read(self.path).reshape(out, wide // 2)[:rows].view(torch.uint8)
        scale = layer.scale.read(self.path).reshape(out, wide // layer.group)[:rows]
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        exact = scale.float()
        translation, factor = how.translation()
        if not bool(torch.isfinite(exact).all()) or bool((exact < 0).any()):
            raise WeightsCorrupt(f"{layer.scale.key} holds scales that are NaN, infinite or negative", where=self.path)
        if how.scale == "divide":
            if bool((exact == 0).any()):
                raise WeightsCorrupt(
                    f"{layer.scale.key} holds zeros, and scale=divide would divide by them", where=self.path
                )
            exact = 1 / exact
        exact = exact * factor
        stored = exact.to(torch.bfloat16)
        if not bool(torch.isfinite(stored).all()):
            raise WeightsCorrupt(f"{layer.scale.key} holds scales too large for bfloat16", where=self.path)
        rounding = float(((stored.float() - exact).abs() / exact.clamp(min=2.0**-126)).max())
        if layer.group != G32.group:
            stored = stored.repeat_interleave(layer.group // G32.group, dim=1)
        if translation is not None:
            packed = _translate(packed, translation)
        return {"weight_packed": packed.contiguous(), "weight_scale": stored.contiguous()}, rounding


@dataclass(frozen=True)
class PublishedLoaded:
    """The source of a filled model, and how it was read. `assumed`: the options that are only defaults."""

    path: Path
    layers: tuple[str, ...]  # quantised, nn.Linear
    dequantised: tuple[str, ...]  # matrices that are quantised in the file and not in the model
    groups: tuple[int, ...]
    options: ReadOptions
    assumed: tuple[str, ...]
    ignored: tuple[str, ...]
    scale_rounding: float  # largest relative error of scales in bf16; that of weights is about 0.1
    bytes: int


def _translate(packed: Tensor, table: Tensor, step: int = 1 << 22) -> Tensor:
    """Translate each byte by a table of 256, block by block, since indices take four bytes each."""
    flat, result = packed.reshape(-1), torch.empty(packed.numel(), dtype=torch.uint8)
    for start in range(0, flat.numel(), step):
        result[start : start + step] = table.index_select(0, flat[start : start + step].int())
    return result.view(packed.shape)


def read_published(path: Path, model: nn.Module, config: Path | None = None) -> PublishedFile:
    """Recognise `path` as weights of `model` (on the meta device, unchanged). Reads the header and tables of codes.

    `config`: quantize_config.json, by default the one beside the file, if any. Raises WeightsMissing, WeightsCorrupt.
    """
    header = read_header(path)
    config = config or path.with_name("quantize_config.json")
    settings = read_json_object(config, "Download it again", "Download it again") if config.is_file() else {}
    pieces = as_diffusers(header)
    params = {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups, plain, loose = _sort(pieces, params)
    stated = group_in_config(settings)
    layers: dict[str, PublishedLayer] = {}
    tables: dict[str, tuple[float, ...]] = {}
    for owner, parts in groups.items():
        layers[owner] = _recognise(owner, params[f"{owner}.weight"], parts, header, loose)
        if stated is not None and stated != layers[owner].group:
            raise WeightsCorrupt(
                f"{layers[owner].scale.key} has a scale for every {layers[owner].group} weights, "
                f"{config.name} says {stated}",
                where=path,
            )
    for key, piece in list(loose.items()):
        if piece.numel in (8, 16) and piece.dtype.is_floating_point and TABLE_NAME.search(key):
            tables[key] = tuple(piece.read(path).float().reshape(-1).tolist())
    if len(set(tables.values())) > 1:
        raise WeightsCorrupt(f"its tables of codes differ: {', '.join(sorted(tables)[:2])}", where=path)
    for key, piece in loose.items():
        scales = piece.dtype.is_floating_point and "scale" in key
        if piece.numel > SMALL or scales or "zero" in key:
            raise WeightsCorrupt(f"{key} ({piece.dtype} {list(piece.shape)}) belongs to no known layer", where=path)
    for name, shape in params.items():
        owner = name.rpartition(".")[0]
        if name not in plain and not (name.endswith(".weight") and owner in layers):
            raise WeightsCorrupt(
                f"no tensor for {name} {list(shape)}", where=path, todo="Check that the file is of this model"
            )
        if name in plain and plain[name].shape != shape:
            raise WeightsCorrupt(
                f"{plain[name].key} is {list(plain[name].shape)}, the model asks for {list(shape)}", where=path
            )
        if name in plain and plain[name].dtype not in FLOATS:
            dtypes = " or ".join(str(dtype) for dtype in FLOATS)
            raise WeightsCorrupt(f"{plain[name].key} is {plain[name].dtype}, not {dtypes}", where=path)
    if not layers:
        raise WeightsCorrupt("no layer in it is quantised", where=path)
    return PublishedFile(header, layers, plain, tuple(sorted(loose)), settings, next(iter(tables.values()), None))


def _sort(
    pieces: Mapping[str, PublishedPiece], params: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, PublishedPiece]], dict[str, PublishedPiece], dict[str, PublishedPiece]]:
    """(owner → suffix → tensor of layers that may be quantised, plain parameters, other tensors)."""
    owners = {name.removesuffix(".weight") for name, s in params.items() if name.endswith(".weight") and len(s) == 2}
    groups: dict[str, dict[str, PublishedPiece]] = {}
    plain: dict[str, PublishedPiece] = {}
    loose: dict[str, PublishedPiece] = {}
    for name, piece in pieces.items():
        if name in params and piece.dtype in FLOATS and piece.shape == params[name]:
            plain[name] = piece
            continue
        owner = _owner(name, owners)
        if owner:
            groups.setdefault(owner, {})[name[len(owner) + 1 :]] = piece
        elif name in params:
            plain[name] = piece  # of a wrong shape or dtype, which the caller refuses
        else:
            loose[name] = piece
    for owner in [owner for owner in groups if f"{owner}.weight" in plain]:
        loose |= {part.key: part for part in groups.pop(owner).values()}
    return groups, plain, loose


def _owner(name: str, owners: set[str]) -> str | None:
    """The longest of `owners` that, followed by a dot or an underscore, begins `name`; or None."""
    ends = [i for i, letter in enumerate(name) if letter in "._"]
    return next((name[:end] for end in reversed(ends) if name[:end] in owners), None)


def _recognise(
    owner: str,
    shape: tuple[int, ...],
    parts: Mapping[str, PublishedPiece],
    header: SafetensorsHeader,
    loose: dict[str, PublishedPiece],
) -> PublishedLayer:
    """Find codes and scales among a layer's tensors; the others go to `loose`. Raises WeightsCorrupt."""
    out, wide = shape
    scales: dict[str, tuple[PublishedPiece, int]] = {}
    for suffix, piece in parts.items():
        fits = [g for g in GROUPS if wide % g == 0 and _is_grid(piece.shape, out, wide // g)]
        if fits and piece.dtype in SCALES:
            scales[suffix] = piece, fits[0]
    scale = _choose(scales, SCALE_NAMES)
    group = scales[scale][1] if scale is not None else GROUPS[0]
    codes = {s: p for s, p in parts.items() if p.dtype in CODES and _holds_codes(p.shape, out, wide, group)}
    packed = _choose(codes, PACKED_NAMES)
    if packed is None or scale is None:
        seen = ", ".join(f"{p.key} {p.dtype} {list(p.shape)}" for p in parts.values())
        what = "scales" if scale is None else "codes"
        raise WeightsCorrupt(
            f"{owner} [{out}, {wide}]: no {what} that add up (two codes a byte, a scale for every "
            f"{', '.join(map(str, GROUPS))}); it has {seen}",
            where=header.path,
            todo="Only E2M1 in groups along the input is supported: quantise from the full weights instead",
        )
    loose |= {part.key: part for suffix, part in parts.items() if suffix not in (packed, scale)}
    return PublishedLayer(owner, (out, wide), codes[packed], scales[scale][0], group)


def _holds_codes(shape: tuple[int, ...], out: int, wide: int, group: int) -> bool:
    """Is it a shape of codes in the weight's row-major order: [out, in/2], flat, or by groups?"""
    groups = wide // group
    by_groups = ((out, groups, group // 2), (out * groups, group // 2))
    return _is_grid(shape, out, wide // 2) or shape in by_groups


def _is_grid(shape: tuple[int, ...], rows: int, columns: int) -> bool:
    """Is it [rows, columns], or flat? Dimensions of one do not count."""
    real = tuple(n for n in shape if n != 1)
    return real in (tuple(n for n in (rows, columns) if n != 1), (rows * columns,))


def _choose(candidates: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    """The only candidate, or the only one with a usual name, or None."""
    if len(candidates) > 1:
        usual = [suffix for suffix in candidates if suffix.replace(".", "_").strip("_") in names]
        return usual[0] if len(usual) == 1 else None
    return next(iter(candidates), None)


@torch.no_grad()
def load_published(
    model: nn.Module,
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    config: Path | None = None,
    given: Mapping[str, str] | None = None,
) -> PublishedLoaded:
    """Fill `model` (as `rules.transformer_on_meta` makes it) from a published file, in place: FP4Linear in g32.

    Codes in another order are translated exactly. Scales become bf16, with a rounding error of at most 0.4 %, beside
    10 % of the weights; the result has the error. `given`: the words of `--assume`.
    """
    published = read_published(path, model, config)
    how, assumed = published.read_options(given)
    linears, fp32 = linear_shapes(model), kept_in_fp32(model)
    tensors: dict[str, Tensor] = {}
    worst, back = 0.0, []
    for owner, layer in published.layers.items():
        parts, rounding = published.tensors(layer, how)
        worst = max(worst, rounding)
        if owner in linears:
            tensors |= {f"{owner}.{suffix}": part.to(device) for suffix, part in parts.items()}
        else:
            name = f"{owner}.weight"
            tensors[name] = dequantize(parts, G32).to(device, stored_dtype(name, fp32, dtype))
            back.append(owner)
    for name, piece in published.plain.items():
        tensor = piece.read(path)
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsCorrupt(f"{piece.key} holds NaN or infinite values", where=path)
        tensors[name] = tensor.to(device, stored_dtype(name, fp32, dtype))
    quantised = {owner: layer.shape for owner, layer in published.layers.items() if owner in linears}
    fill(model, G32, quantised, tensors, device)
    return PublishedLoaded(
        path=path,
        layers=tuple(quantised),
        dequantised=tuple(back),
        groups=tuple(sorted({layer.group for layer in published.layers.values()})),
        options=how,
        assumed=tuple(assumed),
        ignored=published.ignored,
        scale_rounding=worst,
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


@dataclass(frozen=True, order=True)
class Comparison:
    """One reading of a layer, and the relative error (L2) of its weights."""

    error: float
    options: ReadOptions = field(compare=False)


def compare_layer(published: PublishedFile, layer: str, source_weight: Tensor) -> list[Comparison]:
    """Compare every reading of `layer` with `source_weight` [out, in], on the first 256 rows; smallest error first.

    Impossible readings (a division by zero) have an infinite error. Raises WeightsCorrupt for a layer that is missing
    or has another shape.
    """
    found = published.layers.get(layer)
    if found is None or found.shape != tuple(source_weight.shape):
        has = f"is {list(found.shape)}" if found else "is not quantised"
        raise WeightsCorrupt(f"{layer} {has}; the source has {list(source_weight.shape)}", where=published.path)
    source = source_weight[:SAMPLE_ROWS].float()
    how, _ = published.read_options()
    comparisons = []
    for one in all_read_options(how.table):
        try:
            parts, _ = published.tensors(found, one, SAMPLE_ROWS)
            error = float((dequantize(parts, G32) - source).norm() / source.norm())
        except WeightsCorrupt:
            error = float("inf")
        comparisons.append(Comparison(error, one))
    return sorted(comparisons)


def settle(comparisons: list[Comparison]) -> ReadOptions | None:
    """Return the reading with the error of 4-bit rounding, or None if a reading with another error is near it."""
    close = [one for one in comparisons if one.error < WRONG]
    if not close or close[0].error > RIGHT or close[-1].error != close[0].error:
        return None  # equal errors are allowed: those readings give equal numbers (a table may hold the usual order)
    return close[0].options
