"""Limits of the machine, measured in the same run: the fastest matrix product and the fastest attention, alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _quantization import NOT_MEASURED, Rows
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU_S = 0.3  # small products take less than a scheduler's tick, so that at least one of many is undisturbed
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the median wall seconds on a GPU; on a CPU the least CPU seconds of at least `repeats` runs within CPU_S.

    Two warm-up runs are not counted.
    """
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    taken: list[float] = []
    while len(taken) < 2 + repeats or (on_cpu and sum(taken) < CPU_S):
        begin = clock()
        work()
        if not on_cpu:
            torch.cuda.synchronize(device)
        taken.append(clock() - begin)
    return min(taken[2:]) if on_cpu else statistics.median(taken[2:])


def products(shapes: list[tuple[str, int, int, int]], device: torch.device, dtype: torch.dtype) -> Rows:
    """TFLOP/s of [m, k] x [n, k]^T for each (name, m, n, k)."""
    rows: Rows = []
    for name, m, n, k in shapes:
        x = torch.randn(m, k, device=device).to(dtype)
        weight = torch.randn(n, k, device=device).to(dtype)
        spent = seconds(lambda x=x, weight=weight: F.linear(x, weight), device)
        rows.append({"what": f"product, {name}", "shape": f"{m} x {n} x {k}", "TFLOP/s": 2 * m * n * k / spent / 1e12})
        del x, weight
    return rows


def linears(block: Any, tokens: int, device: torch.device, dtype: torch.dtype, ceiling: float | None) -> Rows:
    """Return TFLOP/s of a block's linears in their current setting, with the weights converted for each product.

    Also returns their share of `ceiling` (None: not measured). The last row has all token-wise linears, in the block's
    proportions.
    """
    layers = {"attention's": (block.attn1.to_q, 6), "feed-forward's first": (block.ffn.net[0].proj, 1)}
    layers["feed-forward's second"] = (block.ffn.net[2], 1)
    rows: Rows = []
    flop_of_all = seconds_of_all = 0.0
    for name, (layer, count) in layers.items():
        n, k = layer.out_features, layer.in_features
        x = torch.randn(tokens, k, device=device).to(dtype)
        spent, flop = seconds(lambda layer=layer, x=x: layer(x), device), 2 * tokens * n * k
        rows.append({"what": f"linear, {name}", "shape": f"{tokens} x {n} x {k}", "TFLOP/s": flop / spent / 1e12})
        flop_of_all, seconds_of_all = flop_of_all + count * flop, seconds_of_all + count * spent
        del x
    rows.append({"what": "linears of a block", "shape": "", "TFLOP/s": flop_of_all / seconds_of_all / 1e12})
    return [{**row, "of the best product": row["TFLOP/s"] / ceiling if ceiling else None} for row in rows]


def attentions(heads: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Rows:
    """Return TFLOP/s of each attention backend of torch on [1, heads, tokens, width], or why it is not available."""
    query, key, value = (torch.randn(1, heads, tokens, width, device=device).to(dtype) for _ in range(3))
    flop, rows = 4 * heads * tokens**2 * width, []
    for name, backend in BACKENDS.items():
        if name == "math" and device.type != "cpu":
            continue  # at full size its score matrix alone has 94 GB
        row: dict[str, object] = {"what": f"attention, {name}", "shape": f"{heads} x {tokens} x {width}"}
        try:
            with sdpa_kernel(backend):
                spent = seconds(lambda: F.scaled_dot_product_attention(query, key, value), device)
            row["TFLOP/s"] = flop / spent / 1e12
        except RuntimeError as err:
            row["TFLOP/s"] = f"{NOT_MEASURED}: {str(err).splitlines()[0]:.40}"
        rows.append(row)
    return rows


def best(rows: Rows, prefix: str) -> float | None:
    """Return the highest rate among rows whose name begins with `prefix`."""
    found = [row["TFLOP/s"] for row in rows if str(row["what"]).startswith(prefix)]
    return max((rate for rate in found if isinstance(rate, float)), default=None)
