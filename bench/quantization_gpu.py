"""FP4 on a GPU: dequantising full-size layers, the original eager look-up against ours, beside the machine's limits.

    python bench/quantization_gpu.py [--json PATH]

Each row: milliseconds (median of CUDA events), GB/s of the necessary bytes, its share of a measured copy's rate, its
share of the time of the layer's bf16 product at 34,320 tokens (one 81-frame segment of 480 x 832), and the error
against the reference on the CPU. Without a CUDA device every row reads "not measured".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _quantization import (
    NOT_MEASURED,
    Rows,
    finish,
    gaussian,
    original_dequantize,
    relative_error,
    show,
    touched_bytes,
)
from torch import Tensor

from runner.quantization.formats.e2m1 import FORMATS, G32, Format, dequantize
from runner.quantization.formats.scales import quantize
from runner.quantization.kernels.dequantize import KERNELS, pick_kernel
from runner.quantization.linear import FP4Linear

DEVICE = "cuda"
SHAPES = ((5120, 5120), (13824, 5120), (5120, 13824))  # [out, in] of the 14B model's large linears
TOKENS = 34_320
LORA_RANK = 64
HOWS = ("the original eager look-up", "eager", "table", "triton")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the tables here too")
    options = parser.parse_args()
    if torch.cuda.is_available():
        tables, notes = measured()
    else:
        tables, notes = not_measured(), ["no CUDA device: nothing was measured"]
    titles = {"ceilings": "What the machine does", "dequantize": "Dequantising to bf16", "quantize": "Quantising"}
    for name, rows in tables.items():
        show(titles[name], rows)
    finish(tables, options.json, notes)


def not_measured() -> dict[str, Rows]:
    cases = [(f"{rows} x {columns}", fmt) for rows, columns in SHAPES for fmt in FORMATS]
    return {
        "ceilings": [{"what": what, "value": NOT_MEASURED} for what in ("copy, GB/s", "bf16 product, TFLOP/s")],
        "dequantize": [
            {"layer": layer, "format": fmt, "how": how, "ms": NOT_MEASURED, "GB/s": NOT_MEASURED}
            for layer, fmt in cases
            for how in (HOWS if fmt == G32.name else HOWS[1:])
        ],
        "quantize": [{"layer": layer, "format": fmt, "ms": NOT_MEASURED} for layer, fmt in cases],
    }


def milliseconds(work: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Median of `repeats` runs by CUDA events; compiling, tuning and first allocations come before them."""
    times = []
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)  # larger than any L2: each run reads from memory
    for run in range(-warmup, repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if run >= 0:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_speed() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def measured() -> tuple[dict[str, Rows], list[str]]:
    copy = copy_speed()
    best = 0.0
    dequantized: Rows = []
    quantized: Rows = []
    for shape in SHAPES:
        weight = gaussian(*shape).to(DEVICE)
        x = torch.randn(TOKENS, shape[1], device=DEVICE, dtype=torch.bfloat16)
        product = product_time(weight, x)
        best = max(best, 2 * TOKENS * weight.numel() / product * 1e3)
        for fmt in FORMATS.values():
            dequantized += dequantizing(weight, fmt, product, copy)
            dequantized += layers(weight, fmt, x, product)
            quantized += quantizing(weight, fmt)
    ceilings: Rows = [
        {"what": "copy, GB/s", "value": copy / 1e9},
        {"what": f"bf16 product at {TOKENS} tokens, TFLOP/s", "value": best / 1e12},
    ]
    notes = [
        f"{fmt.name}: kernel {name} ({why})"
        for fmt in FORMATS.values()
        for name, why in [pick_kernel(torch.device(DEVICE), fmt)]
    ]
    return {"ceilings": ceilings, "dequantize": dequantized, "quantize": quantized}, notes


def product_time(weight: Tensor, x: Tensor) -> float:
    dense = weight.to(x.dtype)
    return milliseconds(lambda: F.linear(x, dense))


def row(weight: Tensor, fmt: Format, how: str, spent: float | str, **more: object) -> dict[str, object]:
    """All rows of the table have the same columns, so that a missing number shows as one."""
    columns = ("GB/s", "of a copy's", "of the product's time", "from the reference")
    layer = f"{weight.shape[0]} x {weight.shape[1]}"
    return {"layer": layer, "format": fmt.name, "how": how, "ms": spent, **dict.fromkeys(columns), **more}


def dequantizing(weight: Tensor, fmt: Format, product: float, copy: float) -> Rows:
    """The kernels alone."""
    stored = quantize(weight, fmt, "absmax")
    packed, scale, factor = stored["weight_packed"], stored["weight_scale"], stored.get("weight_scale_2")
    reference = dequantize({name: tensor.cpu() for name, tensor in stored.items()}, fmt, torch.bfloat16).float()
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=DEVICE)
    ways: dict[str, Callable[[], object]] = {
        name: lambda kernel=KERNELS[name]: kernel(packed, scale, factor, fmt, out) for name in HOWS[1:]
    }
    if fmt is G32:
        ways = {HOWS[0]: lambda: original_dequantize(packed, scale, torch.bfloat16), **ways}
    rows: Rows = []
    for how, work in ways.items():
        out.fill_(torch.nan)
        try:
            made = work()
            found = (
                made if isinstance(made, Tensor) else out
            )  # the original makes a new matrix, ours write into an existing one
            wrong = relative_error(found.float().cpu(), reference)
            del made, found
            spent = milliseconds(work)
        # E.g. no triton, no compiler, too little memory: this row shows the error, the other rows are kept.
        except Exception as err:
            rows.append(row(weight, fmt, how, f"{NOT_MEASURED}: {str(err).splitlines()[0]}"))
            continue
        speed = touched_bytes(fmt, *weight.shape, torch.bfloat16) / spent * 1e3
        ratios = {"GB/s": speed / 1e9, "of a copy's": speed / copy, "of the product's time": spent / product}
        rows.append(row(weight, fmt, how, spent, **ratios, **{"from the reference": wrong}))
    return rows


def layers(weight: Tensor, fmt: Format, x: Tensor, product: float) -> Rows:
    """Whole layers: the weight, a LoRA on it, the product."""
    layer = FP4Linear(quantize(weight, fmt, "absmax"), None, fmt)
    rows: Rows = []
    for how in ("FP4Linear", f"FP4Linear, LoRA of rank {LORA_RANK}"):
        spent = milliseconds(lambda: layer(x))
        rows.append(row(weight, fmt, how, spent, **{"of the product's time": spent / product}))
        down, up = torch.randn(LORA_RANK, weight.shape[1]), torch.randn(weight.shape[0], LORA_RANK)
        layer.set_lora([(down.bfloat16(), up.bfloat16(), 0.01)])
    return rows


def quantizing(weight: Tensor, fmt: Format) -> Rows:
    rows: Rows = []
    for method in ("absmax", "mse"):
        spent = milliseconds(lambda m=method: quantize(weight, fmt, m), repeats=5, warmup=1)
        rows.append(
            {
                "layer": f"{weight.shape[0]} x {weight.shape[1]}",
                "format": fmt.name,
                "scales": method,
                "ms": spent,
                "G weights/s": weight.numel() / spent / 1e6,
            }
        )
    return rows


if __name__ == "__main__":
    main()
