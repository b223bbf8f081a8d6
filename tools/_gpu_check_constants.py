"""Proposals for the forecast's constants from a GPU check: old value, new value and the measured key.

In:   the findings of a check. Out: rows for a person to read; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from _gpu_check_findings import Findings, number

from runner.forecast.seconds import EAGER_BYTES, FUSED_BYTES, VAE_SHARE, find_device
from runner.generation.runtime.memory_plan import CONTEXT_BYTES

__all__ = ["proposals"]

GB = 1e9


def proposals(findings: Findings) -> list[dict[str, Any]]:
    """Return rows of constant, old, new, key; none for another scale than full, or for an unknown device."""
    if not findings.full_scale:
        return []
    name = str(findings.row("choices", "machine").get("gpu") or "")
    found = [*speeds(findings, name), *bytes_of_blocks(findings), *autoencoder(findings, name)]
    return [
        {"constant": constant, "old": old, "new": float(f"{new:.3g}"), "key": key}
        for constant, old, new, key in found
        if new is not None
    ]


Proposal = tuple[str, float | None, float | None, str]


def speeds(findings: Findings, name: str) -> Iterator[Proposal]:
    """Yield rates of DEVICES, from the kernels of the compiled block."""
    device = find_device(name)
    label = device.name if device else name
    copy = number(findings.row("block", "copy").get("gb_s"))
    yield f"DEVICES[{label}].copy_gb_s", device and device.copy_gb_s, copy, "block.copy: gb_s"
    for row in findings.rows("block", "blocks", attention_8bit=False):
        spent, tflop = row["kernels"]["ms"], number(row.get("products_tflop_a_block"))
        if row["broken"] or not tflop:
            continue
        compute, by = row["compute"], f"block.blocks[{row['compute']} {row['product']}]".replace(" ]", "]")
        old = device.matmul.get(compute) if device else None
        rate = tflop / spent["products"] * 1e3 if spent["products"] else None
        yield f"DEVICES[{label}].matmul[{compute}]", old, rate, f"{by}: kernels.ms.products"
        if compute == "bf16" and copy:
            moved = spent["elementwise"] / 1e3 * copy * GB / row["channels_a_block"]
            yield "FUSED_BYTES", FUSED_BYTES, moved, f"{by}: kernels.ms.elementwise x block.copy"
            eager = number(row.get("eager_ms"))
            if eager:
                more = (eager - row["ms"]) / 1e3 * copy * GB / row["channels_a_block"]
                yield "EAGER_BYTES", EAGER_BYTES, moved + more, f"{by}: eager_ms - ms (of the chunked block)"
    for kind, field in (("exact", "attention"), ("8 bit", "attention_8bit")):
        rows = [row for row in findings.rows("block", "attention", kind=kind) if number(row.get("tflop_s"))]
        rate = max((float(row["tflop_s"]) for row in rows), default=None)
        old = getattr(device, field) if device else None
        yield f"DEVICES[{label}].{field}", old, rate, f"block.attention[{kind}]: the best tflop_s"


def bytes_of_blocks(findings: Findings) -> Iterator[Proposal]:
    """Yield a compiled block's peak in units of hidden states, and the process's memory outside the allocator."""
    for row in findings.rows("block", "blocks", attention_8bit=False):
        if not row["broken"] and number(row.get("units")):
            what = f"{row['compute']} {row['product']}".strip()
            key = f"block.blocks[{what}]: units, beside planned_units"
            yield f"block units, fused, {what}", number(row["planned_units"]), number(row["units"]), key
    beside = [
        row["nvml_bytes"] - row["reserved_bytes"]
        for row in findings.rows("autoencoder", "autoencoder")
        if number(row.get("nvml_bytes")) and number(row.get("reserved_bytes"))
    ]
    key = "autoencoder: nvml_bytes - reserved_bytes, the largest"
    yield "CONTEXT_BYTES", CONTEXT_BYTES, max(beside, default=None), key


def autoencoder(findings: Findings, name: str) -> Iterator[Proposal]:
    """Yield the convolutions' rates without traffic, as shares of the bf16 product's, and bytes beyond the forecast."""
    device = find_device(name)
    for dtype in ("float32", "bfloat16", "float16"):
        today = {"dtype": dtype, "layout": "channels_last", "benchmark": dtype != "float32", "walk": "ours"}
        row = findings.row("autoencoder", "autoencoder", what="decode", **today)
        if device and row:
            moved = row["traffic_bytes"] / device.copy_gb_s / 1e9
            new = row["tflop"] / (row["ms"] / 1e3 - moved) / device.matmul["bf16"]
            key = f"autoencoder[decode {dtype}]: tflop / (ms - traffic_bytes at copy_gb_s)"
            yield f"VAE_SHARE[{dtype}]", VAE_SHARE[dtype], new, key
        for what in ("decode", "encode"):
            row = findings.row("autoencoder", "autoencoder", what=what, **today)
            if row and number(row.get("allocated_bytes")):
                yield bytes_of(row, what, dtype)


def bytes_of(row: Mapping[str, Any], what: str, dtype: str) -> Proposal:
    key = f"autoencoder[{what} {dtype}]: allocated_bytes, beside forecast_bytes"
    return (
        f"autoencoder's peak bytes, {what}, {dtype}",
        number(row["forecast_bytes"]),
        number(row["allocated_bytes"]),
        key,
    )
