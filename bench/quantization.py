"""FP4 and SVDQuant: errors of formats and methods, CPU cost of quantising and dequantising, beside other libraries.

    python bench/quantization.py [--small] [--json PATH]

Errors are relative (L2). "output" is the error of X W^T, where one channel of X in two hundred is 20 times as large;
the activation method was calibrated on other inputs of the same kind. Costs are CPU seconds, because other programs on
the machine affect them little. "products" are those of one layer in 8 bits, by the definition of its numbers. torchao
and comfy-kitchen are compared if they are installed. GPU: bench/quantization_gpu.py.

"SVDQuant W4A4" has three matrices of 1536 x 1536 and 512 tokens; 256 calibrate, the others measure. "outlier": 15 input
channels are 20 times as large, 10 columns of the weight 4 times; "structured": the same plus a part of rank 64 whose
singular values fall as 1/i. "W4A4": activations in four bits too; "W4A16": activations unchanged. The ratios are of
W4A4 errors; a row is better if its ratio is below 1. cache-dit's quantiser is compared if it is installed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from _quantization import (
    NOT_MEASURED,
    Peer,
    Rows,
    cpu_seconds,
    finish,
    gaussian,
    original_dequantize,
    peers,
    relative_error,
    show,
    touched_bytes,
)
from _svdq import show_svdquant, splitting, svdquant
from torch import Tensor

from runner.forecast.precisions import PRECISIONS, REFERENCE
from runner.quantization.formats.e2m1 import FORMATS, G32, NVFP4, Format, dequantize
from runner.quantization.formats.scales import Method, quantize
from runner.quantization.kernels.dequantize import KERNELS, pick_kernel
from runner.quantization.linear import FP4Linear

MODEL_WEIGHTS = 17.2327e9  # in the 521 linears of Wan2.2-Animate-14B
TOKENS = 256
SPLIT, SMALL_SPLIT = 1536, 512  # sides of SVDQuant's matrices
METHODS: tuple[Method, ...] = ("absmax", "mse", "activation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the tables here too")
    parser.add_argument("--small", action="store_true", help="1024 x 1024 weights, one repeat: to see that it runs")
    options = parser.parse_args()
    size, repeats = (1024, 1) if options.small else (5120, 3)
    others, missing = peers()
    weight = gaussian(size, size)
    tables = {
        "errors": errors(weight, others, missing),
        "quantize": quantizing(weight, repeats, others, missing),
        "dequantize": dequantizing(weight, repeats, others, missing),
        "products": multiplying(weight, repeats),
        "svdquant": svdquant(SMALL_SPLIT if options.small else SPLIT),
        "gpu": [
            {"gpu": NOT_MEASURED, "why": "this benchmark stays on the CPU; run `make bench-gpu` on a CUDA machine"}
        ],
    }
    titles = {
        "errors": f"Error, {size} x {size} gaussian",
        "quantize": f"Quantising {size} x {size}, {torch.get_num_threads()} threads",
        "dequantize": f"Dequantising {size} x {size}, one thread",
        "products": f"A layer of {size} x {size} on {TOKENS} tokens in bfloat16, one thread",
        "gpu": "On a GPU",
    }
    for name, title in titles.items():
        show(title, tables[name])
    show_svdquant(tables["svdquant"])
    kernel, why = pick_kernel(torch.device("cpu"), G32)
    finish(tables, options.json, [f"kernel on this device: {kernel} ({why})"])


def errors(weight: Tensor, others: list[Peer], missing: dict[str, str]) -> Rows:
    tokens, columns = 1024, weight.shape[1]
    loud = torch.randperm(columns, generator=torch.Generator().manual_seed(1))[: max(1, columns // 200)]

    def inputs(seed: int) -> Tensor:
        x = gaussian(tokens, columns, seed=seed)
        x[:, loud] *= 20
        return x

    importance, x = inputs(2).square().mean(0), inputs(3)
    wanted = x @ weight.T

    def row(name: str, method: str, bits: float, found: Tensor) -> dict[str, object]:
        error = relative_error(found, weight)
        return {
            "format": name,
            "scales": method,
            "bits/weight": bits,
            "weight error": error,
            "SQNR dB": -20 * math.log10(error),
            "output error": relative_error(x @ found.T, wanted),
        }

    rows = [
        row(fmt.name, method, fmt.bits_per_weight, dequantize(quantize(weight, fmt, method, seen), fmt))
        for fmt in FORMATS.values()
        for method in METHODS
        for seen in [importance if method == "activation" else None]
    ]
    rows += [
        row(peer.name, "its own", peer.bits_per_weight, peer.dequantize(peer.quantize(weight)).float())
        for peer in others
    ]
    return rows + [{"format": name, "scales": why, **dict.fromkeys(list(rows[0])[2:])} for name, why in missing.items()]


def quantizing(weight: Tensor, repeats: int, others: list[Peer], missing: dict[str, str]) -> Rows:
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(4))

    def row(name: str, method: str, seconds: tuple[float, float]) -> dict[str, object]:
        cpu, wall = seconds
        return {
            "format": name,
            "scales": method,
            "CPU s": cpu,
            "wall s": wall,
            "M weights/CPU s": weight.numel() / cpu / 1e6,
            "14B model, CPU min": MODEL_WEIGHTS / weight.numel() * cpu / 60,
        }

    rows: Rows = []
    for fmt in FORMATS.values():
        for method in METHODS:
            seen = importance if method == "activation" else None
            seconds = cpu_seconds(lambda f=fmt, m=method, s=seen: quantize(weight, f, m, s), repeats)
            rows.append(row(fmt.name, method, seconds))
    rows += [row(*names, seconds) for names, seconds in splitting(weight, repeats).items()]
    for peer in others:
        rows.append(row(peer.name, "its own", cpu_seconds(lambda p=peer: p.quantize(weight), repeats)))
    return rows + [{"format": name, "scales": why, **dict.fromkeys(list(rows[0])[2:])} for name, why in missing.items()]


def dequantizing(weight: Tensor, repeats: int, others: list[Peer], missing: dict[str, str]) -> Rows:
    """Measure on one thread, so that CPU time contains only the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows: Rows = []
        for dtype in (torch.bfloat16, torch.float32):
            rows += [*_dequantizing(weight, dtype, repeats)]
        original = next(row["ns/weight"] for row in rows if row["out"] == "float32")
        for peer in others:
            stored = peer.quantize(weight)
            cpu, _ = cpu_seconds(lambda p=peer, s=stored: p.dequantize(s), repeats)
            each = cpu / weight.numel() * 1e9
            rows.append({"how": peer.name, "out": "float32", "ns/weight": each, "of the original's": each / original})
    finally:
        torch.set_num_threads(threads)
    columns = list(rows[0])
    rows = [{name: row.get(name) for name in columns} for row in rows]
    return rows + [{"how": name, "out": why, **dict.fromkeys(columns[2:])} for name, why in missing.items()]


def multiplying(weight: Tensor, repeats: int) -> Rows:
    """Measure 8-bit products that make the weight's codes each time, and with cached codes; on one thread."""
    threads, rows = torch.get_num_threads(), list[dict[str, object]]()
    torch.set_num_threads(1)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    layer = FP4Linear.from_linear(linear, NVFP4, "absmax")
    x = gaussian(TOKENS, weight.shape[1], seed=5).bfloat16()
    try:
        with torch.no_grad():
            for precision in PRECISIONS.values():
                if precision.layout != "rows":
                    continue
                layer.set_compute(precision.name, REFERENCE)
                made, _ = cpu_seconds(lambda: layer(x), repeats)
                wanted = layer(x)
                making, _ = cpu_seconds(lambda: (layer.drop_codes(), layer.keep_codes(x.dtype)), repeats)
                kept, _ = cpu_seconds(lambda: layer(x), repeats)
                rows.append(
                    {
                        "compute": precision.name,
                        "codes made each time, CPU s": made,
                        "kept, CPU s": kept,
                        "kept, of made": kept / made,
                        "making them once, CPU s": making,
                        "same bits": str(torch.equal(layer(x), wanted)),
                    }
                )
    finally:
        torch.set_num_threads(threads)
    return rows


def _dequantizing(weight: Tensor, dtype: torch.dtype, repeats: int) -> Rows:
    out = torch.empty(weight.shape, dtype=dtype)
    half = out.numel() // 2
    copied, _ = cpu_seconds(lambda: out.view(-1)[:half].copy_(out.view(-1)[half:]), 3 * repeats)
    ceiling = out.nbytes / copied
    name = str(dtype).removeprefix("torch.")
    g32 = quantize(weight, G32, "absmax")
    original, _ = cpu_seconds(lambda: original_dequantize(g32["weight_packed"], g32["weight_scale"], dtype), repeats)

    def row(how: str, fmt: Format, cpu: float, wrong: float) -> dict[str, object]:
        speed = touched_bytes(fmt, *weight.shape, dtype) / cpu
        return {
            "how": how,
            "out": name,
            "ns/weight": cpu / weight.numel() * 1e9,
            "of the original's": cpu / original,
            "GB/s": speed / 1e9,
            "of a copy's": speed / ceiling,
            "from the reference": wrong,
        }

    reference = dequantize(g32, G32, dtype)
    found = original_dequantize(g32["weight_packed"], g32["weight_scale"], dtype)
    rows: Rows = [
        row("g32, the original eager look-up", G32, original, relative_error(found.float(), reference.float()))
    ]
    for fmt in FORMATS.values():
        stored = quantize(weight, fmt, "absmax")
        arguments = stored["weight_packed"], stored["weight_scale"], stored.get("weight_scale_2")
        reference = dequantize(stored, fmt, dtype)
        for kernel in ("eager", "table"):
            cpu, _ = cpu_seconds(lambda k=kernel, a=arguments, f=fmt: KERNELS[k](*a, f, out), repeats)
            rows.append(row(f"{fmt.name}, {kernel}", fmt, cpu, relative_error(out.float(), reference.float())))
    return rows


if __name__ == "__main__":
    main()
