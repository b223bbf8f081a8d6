"""LoRA files: read the changes of parameters from one file.

In:   a safetensors file in any style of keys.py, or its tensors. Out: `Lora`: name, sha256, strength, and for each
      parameter, in the library's naming, the changes to it.
Never: pickles, the model: apply.py checks that it has these parameters in these shapes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing
from runner.hashing import sha256_file
from runner.quantization.lora.keys import LoraPart, parse_keys, unsupported

__all__ = ["Delta", "Full", "Lora", "LowRank", "parse_deltas", "read_lora"]

CHUNK = 1 << 23  # elements of a change computed at once: 32 MB in float32, for every size of matrix
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
REPEATS = 3  # in a pattern of a file: each further repetition can make matching a hundred times slower
PEFT_METADATA = "lora_adapter_metadata"  # the key of PEFT's config, alpha included, in headers that diffusers writes
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")  # PEFT itself keeps the config beside the tensors


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of rank r. down [r, in, *kernel] and up [out, r], as stored (bf16, fp16 or fp32); scale = alpha / r."""

    down: Tensor
    up: Tensor
    scale: float
    keys: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add to `weight` (float32, contiguous, of this shape) in place, a chunk of rows at a time."""
        rows = weight.view(weight.shape[0], -1)
        down = self.down.to(weight.device, torch.float32).flatten(1)
        up = self.up.to(weight.device, torch.float32)
        step = max(1, CHUNK // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            rows[start : start + step].add_((up[start : start + step] @ down).mul_(strength * self.scale))

    def dense(self) -> Tensor:
        """The change itself, float32."""
        return _dense(self)


@dataclass(frozen=True, eq=False)
class Full:
    """A full change: a tensor of the parameter's shape (of a norm, a bias, a table, a convolution), times scale."""

    diff: Tensor
    keys: tuple[str, ...]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add to `weight` (float32, of this shape) in place."""
        weight.add_(self.diff.to(weight.device, torch.float32, copy=True).mul_(strength * self.scale))

    def dense(self) -> Tensor:
        """The change itself, float32."""
        return _dense(self)


Delta = LowRank | Full


def _dense(delta: Delta) -> Tensor:
    out = torch.zeros(delta.shape)
    delta.add_to(out, 1.0)
    return out


@dataclass(frozen=True, eq=False)
class Lora:
    """One file. `dataclasses.replace(lora, strength=0.5)` is the same LoRA with another strength, not read again.

    deltas: parameter in the library's naming -> its changes (a file may hold a pair and a diff for one parameter).
    unread: keys with an unknown suffix. The tensors are views of the mapped file, which must stay in its place.
    """

    name: str
    sha256: str
    strength: float
    deltas: Mapping[str, tuple[Delta, ...]]
    unread: tuple[str, ...] = ()


def read_lora(path: Path, strength: float = 1.0) -> Lora:
    """Read a LoRA of any style in keys.py. Its tensors are mapped, not copied; the file is read once, for sha256.

    For a folder that PEFT saved, alpha is read from its `adapter_config.json`.

    Raises WeightsMissing; WeightsCorrupt for other files than safetensors (pickles are never opened), a damaged one,
    NaN or Inf, a factor without its partner, factors that do not fit, another kind of adapter, or a file without LoRA;
    ConfigInvalid for a strength that is no finite number.
    """
    path = Path(path)
    if not math.isfinite(strength):
        raise ConfigInvalid(
            f"LoRA strength {strength} is no finite number", where=path.name, todo="Use 1.0 for the LoRA as trained"
        )
    if not path.is_file():
        raise WeightsMissing("no such LoRA file", where=path, todo="Check the name, or put the file there")
    if path.suffix != ".safetensors":
        raise WeightsCorrupt(
            "is not a .safetensors file; other formats are pickles, which can run code, and are never read",
            where=path,
            todo="Get the safetensors version of this LoRA",
        )
    tensors, metadata = _load(path)
    beside = path.with_name(PEFT_FILES[1])
    if path.name == PEFT_FILES[0] and PEFT_METADATA not in metadata and beside.is_file():
        metadata[PEFT_METADATA] = beside.read_text(encoding="utf-8", errors="replace")
    deltas, unread = parse_deltas(tensors, metadata, where=path)
    return Lora(path.stem, sha256_file(path), float(strength), deltas, unread)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
            metadata = file.metadata() or {}
        finite = {key: bool(torch.isfinite(tensor.float()).all()) for key, tensor in tensors.items()}
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as err:  # torch, for impossible shapes
        raise WeightsCorrupt(
            f"not a whole safetensors file ({str(err).splitlines()[0][:200]})",
            where=path,
            todo="Fetch it again, and compare its size and checksum",
        ) from err
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not (tensor.dtype == torch.int64 and key.endswith(".alpha")):
            raise WeightsCorrupt(
                f"{key} is {tensor.dtype}; a LoRA holds 16-bit or 32-bit floating-point numbers",
                where=path,
                todo="Quantised LoRAs are not supported: get the 16-bit one",
            )
        if not finite[key]:
            raise WeightsCorrupt(f"{key} holds NaN or Inf", where=path, todo="Fetch it again, or use another LoRA")
    return tensors, metadata


def parse_deltas(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, where: object = None
) -> tuple[dict[str, tuple[Delta, ...]], tuple[str, ...]]:
    """Return (parameter -> its changes, unread keys) of one file's tensors and its header's metadata.

    Raises WeightsCorrupt, which names `where`.
    """
    for key in tensors:
        if kind := unsupported(key):
            raise WeightsCorrupt(
                f"{key}: adapters with {kind!r} (DoRA, LoHa, LoKr, OFT and the like) are not supported",
                where=where,
                todo="Convert it to a plain LoRA, or merge it with the tool it was trained with",
            )
    parts = {key: part for key, part in parse_keys(tensors).items() if part is not None}
    if all(part.role == "alpha" for part in parts.values()):
        raise WeightsCorrupt(
            "holds no LoRA: none of its tensors is a low-rank factor or a difference",
            where=where,
            todo="A whole checkpoint cannot be used as a LoRA",
        )
    places = _index_places(parts, where)
    pairs = _pairs(places, tensors, where)
    config = _peft_config((metadata or {}).get(PEFT_METADATA), where)
    scales = {param: _scale(param, down.shape[0], places, tensors, config, where) for param, (down, _) in pairs.items()}

    deltas: dict[str, list[Delta]] = {}
    for (param, role), key in places.items():
        if role == "down":
            keys = tuple(places[place] for r in ("down", "up", "alpha") if (place := (param, r)) in places)
            new: Delta = LowRank(*pairs[param], scales[param], keys)
        elif role == "diff":
            new = Full(tensors[key], (key,))
        elif role == "scaled_diff":
            new = Full(tensors[key], (key,), scales.get(f"{parts[key].module}.weight", 1.0))
        else:
            continue
        deltas.setdefault(param, []).append(new)
    used = {key for changes in deltas.values() for change in changes for key in change.keys}
    return {p: tuple(d) for p, d in deltas.items()}, tuple(key for key in tensors if key not in used)


def _index_places(parts: Mapping[str, LoraPart], where: object) -> dict[tuple[str, str], str]:
    """(parameter, role) -> key. Raises WeightsCorrupt for two keys in one place: two adapters, or one of them twice."""
    places: dict[tuple[str, str], str] = {}
    for key, part in parts.items():
        other = places.setdefault((part.param, part.role), key)
        if other != key:
            raise WeightsCorrupt(
                f"{other} and {key} are the same part of {part.param}",
                where=where,
                todo="Split the file: one adapter in each",
            )
    return places


def _pairs(
    places: Mapping[tuple[str, str], str], tensors: Mapping[str, Tensor], where: object
) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameter -> (down [r, in, *kernel], up [out, r])."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for (param, role), key in places.items():
        if role not in ("down", "up"):
            continue
        down_key, up_key = places.get((param, "down")), places.get((param, "up"))
        if down_key is None or up_key is None:
            raise WeightsCorrupt(
                f"{key} has no {'down' if down_key is None else 'up'} factor beside it",
                where=where,
                todo="The file is incomplete: fetch it again",
            )
        down, up = tensors[down_key], tensors[up_key]
        pointwise = up.ndim >= 2 and all(n == 1 for n in up.shape[2:])  # up, for a convolution: [out, r, 1, 1, 1]
        if down.ndim < 2 or not pointwise or not 0 < down.shape[0] == up.shape[1]:
            raise WeightsCorrupt(
                f"{down_key} {list(down.shape)} and {up_key} {list(up.shape)} are no pair [rank, in] and [out, rank]",
                where=where,
                todo="Fetch it again",
            )
        pairs[param] = (down, up.flatten(1))
    return pairs


@dataclass(frozen=True)
class _PeftConfig:
    """The scales in PEFT's config. Patterns match the end of a layer's name; the first match applies."""

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    root_rank: bool = False  # rsLoRA: alpha / sqrt(rank)

    def scale(self, module: str, rank: int) -> float:
        alpha = next((value for pattern, value in self.patterns if pattern.match(module)), self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root_rank else rank)


def _pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern as PEFT matches layers' names. ValueError for one that may take longer than a second."""
    if len(re.findall(r"[*+?{]", text)) > REPEATS or re.search(r"\)[*+{]", text):
        raise ValueError(f"the pattern {text[:60]!r} repeats a group, or has more than {REPEATS} repetitions")
    return re.compile(rf"(.*\.)?({text})$")


def _peft_config(text: str | None, where: object) -> _PeftConfig:
    if text is None:
        return _PeftConfig()
    try:
        config = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        alpha = config.get("lora_alpha")
        patterns = tuple(
            (_pattern(pattern), float(value)) for pattern, value in (config.get("alpha_pattern") or {}).items()
        )
        parsed = _PeftConfig(None if alpha is None else float(alpha), patterns, bool(config.get("use_rslora")))
        if not all(math.isfinite(value) for value in (parsed.alpha or 0.0, *(value for _, value in patterns))):
            raise ValueError("an alpha is no finite number")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as err:
        raise WeightsCorrupt(f"its {PEFT_METADATA} cannot be read ({err})", where=where) from err
    return parsed


def _scale(
    param: str,
    rank: int,
    places: Mapping[tuple[str, str], str],
    tensors: Mapping[str, Tensor],
    config: _PeftConfig,
    where: object,
) -> float:
    """alpha / rank, by the `.alpha` tensor, else by PEFT's config; 1 without both."""
    key = places.get((param, "alpha"))
    if key is None:
        return config.scale(param.removesuffix(".weight"), rank)
    if tensors[key].numel() != 1:
        raise WeightsCorrupt(
            f"{key} {list(tensors[key].shape)} is no single number", where=where, todo="Fetch it again"
        )
    return float(tensors[key].float()) / rank
