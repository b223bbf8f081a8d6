"""Read options: the properties of a published FP4 file that names, shapes and dtypes do not show.

In:   quantize_config.json's content, `--assume` words. Out: `ReadOptions`, the list of options that are only defaults,
      the exact translation of codes and scales into this project's format. Never: files of tensors, layers' names.

    nibble   low | high           which half of a byte holds the even input column
    codes    e2m1 | ascending | table   0..7 are 0..6, bit 3 the sign; or -6..6 in order; or by the config's table
    scale    multiply | divide    w = code * scale, or w = code / scale
    unit     one | six            a code is worth its value, or its value over 6 (the scale is then the group's absmax)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from runner.errors import ConfigInvalid, WeightsCorrupt
from runner.quantization.formats.e2m1 import LARGEST, VALUES

__all__ = ["CHOICES", "ReadOptions", "all_read_options", "group_in_config", "options_from_config", "parse_read_options"]

CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "nibble": ("low", "high"),
    "codes": ("e2m1", "ascending", "table"),
    "scale": ("multiply", "divide"),
    "unit": ("one", "six"),
}
# Keys of a config that may state an option, and below, beginnings of words in their values for each choice.
KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "nibble": ("nibble", "nibble_order", "packing_order", "pack_order", "packing"),
    "codes": ("codes", "code_order"),
    "scale": ("scale", "scale_direction", "scale_mode", "scale_op"),
    "unit": ("unit", "scale_unit", "scale_kind"),
}
WORDS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "nibble": {"low": ("low", "lsb", "little"), "high": ("high", "msb", "big")},
    "codes": {"e2m1": ("e2m1", "sign"), "ascending": ("ascending", "sorted")},
    "scale": {"multiply": ("multiply", "mul", "times"), "divide": ("divide", "div", "inverse", "recip")},
    "unit": {"one": ("one",), "six": ("six", "absmax", "amax")},
}
TABLES: Final = ("table", "lut", "codebook", "fp4_table", "fp4_values", "e2m1_values", "values", "quant_map", "code")
LARGEST_ENTRY: Final = 1e30
GROUPS: Final = ("group_size", "block_size", "blocksize", "group", "q_group_size")
ASCENDING: Final = tuple(sorted(VALUES, key=lambda value: (value, str(value)[0] != "-")))  # -6 … -0, 0 … 6


@dataclass(frozen=True)
class ReadOptions:
    """How to read codes and scales; the defaults are this project's format."""

    nibble: str = "low"
    codes: str = "e2m1"
    scale: str = "multiply"
    unit: str = "one"
    table: tuple[float, ...] | None = None  # sixteen values in code order, for codes="table"

    def words(self) -> dict[str, str]:
        """key → choice, in the words of `--assume`."""
        return {key: getattr(self, key) for key in CHOICES}

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.words().items())

    def translation(self) -> tuple[Tensor | None, float]:
        """(uint8 [256] from the file's bytes to E2M1 bytes, or None where they are the same; the factor of scales)."""
        values: Sequence[float] = VALUES
        if self.codes == "ascending":
            values = ASCENDING
        elif self.codes == "table":
            if self.table is None:
                raise ConfigInvalid("codes=table, but the config has no table of sixteen values")
            values = self.table
        codes, factor = _to_e2m1(values)
        low, high = torch.arange(256) & 0xF, torch.arange(256) >> 4
        if self.nibble == "high":
            low, high = high, low
        bytes_ = (codes[low] | codes[high] << 4).to(torch.uint8)
        same = torch.equal(bytes_, torch.arange(256, dtype=torch.uint8))
        return None if same else bytes_, factor / (LARGEST if self.unit == "six" else 1.0)


def _to_e2m1(values: Sequence[float]) -> tuple[Tensor, float]:
    """(the E2M1 code of each of sixteen values, their common factor). Raises WeightsCorrupt for other values."""
    factor = max(abs(value) for value in values) / LARGEST
    codes = []
    for value in values:
        near = [
            code
            for code, ours in enumerate(VALUES)
            if factor
            and abs(ours * factor - value) <= 1e-3 * factor
            and (ours != 0 or _negative(ours) == _negative(value))
        ]
        codes.append(near[0] if near else 16)
    if len(values) != 16 or {VALUES[c] for c in codes if c < 16} != set(VALUES) or 16 in codes:
        raise WeightsCorrupt(
            f"its table {[round(v, 4) for v in values]} does not hold the values of E2M1 (0, .5, 1, 1.5, 2, 3, 4, 6)",
            todo="Other 4-bit formats are not supported: quantise from the full weights",
        )
    return torch.tensor(codes), factor


def _negative(value: float) -> bool:
    return str(value)[0] == "-"


def parse_read_options(text: str) -> dict[str, str]:
    """Parse `nibble=high,scale=divide` to a mapping. Raises ConfigInvalid for unknown words."""
    given: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        if key not in CHOICES or value not in CHOICES[key]:
            known = "; ".join(f"{name}={'|'.join(choices)}" for name, choices in CHOICES.items())
            raise ConfigInvalid(f"--assume {item!r} is unknown", todo=f"Known are {known}")
        given[key] = value
    return given


def options_from_config(
    config: Mapping[str, Any], given: Mapping[str, str] | None = None, table: Sequence[float] | None = None
) -> tuple[ReadOptions, list[str]]:
    """Return (the read options, the keys of CHOICES that are only defaults). `given` (`--assume`) outranks the config.

    `table`: sixteen values, or eight magnitudes, found beside the weights. An unknown value in the config leaves the
    default, and its key is listed. Raises WeightsCorrupt for a table that is not E2M1's.
    """
    flat = _flatten(config)
    found: dict[str, Any] = {}
    for key, names in KEYS.items():
        value = next((flat[name].lower() for name in names if isinstance(flat.get(name), str)), "")
        words = tuple(re.findall(r"[a-z0-9]+", value))
        hits = [choice for choice, starts in WORDS[key].items() if any(word.startswith(starts) for word in words)]
        if len(hits) == 1:
            found[key] = hits[0]
    for flag, choice in (("low_nibble_first", True), ("high_nibble_first", False)):
        if isinstance(flat.get(flag), bool):
            found["nibble"] = "low" if flat[flag] is choice else "high"
    values = next((flat[name] for name in TABLES if _is_table(flat.get(name))), table)
    if values is not None:
        full = tuple(float(v) for v in values)
        full = full if len(full) == 16 else (*full, *(-v for v in full))
        _to_e2m1(full)
        found["codes"] = "table"
        table = full
    found |= given or {}
    assumed = [key for key in CHOICES if key not in found]
    return ReadOptions(table=tuple(table) if table is not None else None, **found), assumed


def group_in_config(config: Mapping[str, Any]) -> int | None:
    """The group size in the config, or None."""
    flat = _flatten(config)
    return next((flat[name] for name in GROUPS if isinstance(flat.get(name), int)), None)


def all_read_options(table: Sequence[float] | None = None) -> Iterator[ReadOptions]:
    """All combinations; those with a table only where there is one."""
    for nibble, codes, scale, unit in product(*CHOICES.values()):
        if codes != "table" or table is not None:
            yield ReadOptions(nibble, codes, scale, unit, tuple(table) if table is not None else None)


def _is_table(value: object) -> bool:
    if not isinstance(value, list) or len(value) not in (8, 16):
        return False
    # The comparison excludes NaN, and integers that are too large for a float.
    return all(isinstance(v, int | float) and abs(v) < LARGEST_ENTRY for v in value)


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys in lower case, from nested objects too; of two equal keys the outer one counts."""
    flat: dict[str, Any] = {}
    level = [config]
    while level:
        flat |= {
            key: value
            for one in reversed(level)  # of two at one depth, the first counts
            for key, value in ((str(k).lower(), v) for k, v in one.items() if not isinstance(v, Mapping))
            if key not in flat
        }
        level = [value for one in level for value in one.values() if isinstance(value, Mapping)]
    return flat
