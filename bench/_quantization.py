"""Shared parts of the two quantisation benchmarks: the baseline, the peers, tables, clocks."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _json_file import write_json
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from runner.quantization.formats.e2m1 import VALUES, Format

NOT_MEASURED = "not measured"
Rows = list[dict[str, object]]


def original_dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype, group: int = 32) -> Tensor:
    """Dequantise as the original scripts do: unpack, stack, int64 look-up, scale, cast, each step in a new tensor."""
    table = torch.tensor(VALUES, dtype=dtype, device=packed.device)
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1).long()
    values = table[codes].view(codes.shape[0], -1, group) * scale.to(dtype).unsqueeze(-1)
    return values.view(codes.shape)


@dataclass(frozen=True)
class Peer:
    """Another library's 4-bit format: `quantize` from float32 to its own object, `dequantize` back to float32."""

    name: str
    bits_per_weight: float
    quantize: Callable[[Tensor], object]
    dequantize: Callable[[object], Tensor]


def peers() -> tuple[list[Peer], dict[str, str]]:
    """Return (peers that import and run here, name → reason for the others)."""
    found: list[Peer] = []
    missing: dict[str, str] = {}
    for names, make in (
        (("torchao NVFP4", "torchao MXFP4"), _torchao),
        (("comfy-kitchen NVFP4",), _comfy_kitchen),
    ):
        try:
            for peer in make():
                peer.dequantize(peer.quantize(torch.ones(128, 128)))
                found.append(peer)
        # A wheel for another platform may raise any error; the table shows it.
        except Exception as err:
            text = str(err).strip().splitlines()
            missing.update(dict.fromkeys(names, f"not available: {type(err).__name__}: {text[0] if text else ''}"))
    return found, missing


def _torchao() -> list[Peer]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def nvfp4(weight: Tensor) -> object:
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))

    def mxfp4(weight: Tensor) -> object:
        return MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)

    def back(stored: object) -> Tensor:
        return stored.dequantize(torch.float32)

    return [Peer("torchao NVFP4", 4.5, nvfp4, back), Peer("torchao MXFP4", 4.25, mxfp4, back)]


def _comfy_kitchen() -> list[Peer]:
    import comfy_kitchen

    def quantize(weight: Tensor) -> object:
        factor = weight.abs().max() / (448 * 6)
        return (factor, *comfy_kitchen.quantize_nvfp4(weight, factor))

    def back(stored: object) -> Tensor:
        factor, codes, scales = stored
        return comfy_kitchen.dequantize_nvfp4(codes, factor, scales, torch.float32)

    return [Peer("comfy-kitchen NVFP4", 4.5, quantize, back)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def cpu_seconds(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return (CPU, wall) seconds of the cheapest of `repeats` runs, after a warm-up run."""
    best = (float("inf"), float("inf"))
    for run in range(-1, repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if run >= 0:
            best = min(best, (cpu, wall))
    return best


def touched_bytes(fmt: Format, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Return the bytes that a dequantisation must at least read and write."""
    return fmt.bytes(rows, columns) + rows * columns * dtype.itemsize


def show(title: str, rows: Rows) -> None:
    """Print one table; floats with four digits, None as a dash."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for at, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=160).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finish(tables: dict[str, Rows], path: Path | None, notes: Sequence[str] = ()) -> None:
    """Print the notes, and write everything with the machine's description as JSON to `path`."""
    for note in notes:
        print(note)
    write_tables(tables, path, notes)


def write_tables(tables: dict[str, Rows], path: Path | None, notes: Sequence[str] = ()) -> None:
    """Write the tables with the machine's description as JSON to `path`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
    write_json(path, {"machine": machine, **tables, "notes": list(notes)})
