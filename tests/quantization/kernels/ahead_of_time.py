"""Compiles our Triton kernels for GPUs that are not there, through their own `launch`, and says what came out.

Needs the Triton that pyproject.toml pins, with the tools that its wheel brings: of its API `triton.runtime.driver`
(`set_active`, and of a driver `get_current_target`, `get_current_device`, `get_current_stream`), `JITFunction.warmup`,
and `asm` and `metadata` of what that returns. What is asserted about assembly holds for this release alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.system_tests import ASKED_FOR

__all__ = [
    "ARCHITECTURES",
    "EVERY_VARIANT",
    "NEEDS_PINNED_TRITON",
    "Built",
    "Variant",
    "build",
    "pinned_triton",
    "resources",
]

ROOT = Path(__file__).resolve().parents[3]
# A100; RTX 40 and L40S; H100 and H200; B200; RTX 50.
ARCHITECTURES = (80, 89, 90, 100, 120)
# Of 65,536 on a multiprocessor: blocks of 512 threads then fit.
MOST_REGISTERS = 128


def pinned_triton() -> str:
    """The release of Triton that the tests' extra names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pin,) = [row for row in extras["test-tools"] if row.startswith("triton==")]
    return re.split("==|;", pin)[1].strip()


def _missing_triton() -> str:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    pinned = pinned_triton()
    return "" if installed == pinned else f"the assembly is known for Triton {pinned}, {installed} is installed"


NEEDS_PINNED_TRITON = pytest.mark.skipif(bool(_missing_triton()), reason=_missing_triton() or "")
EVERY_VARIANT = pytest.mark.skipif(
    torch.version.cuda is None and not ASKED_FOR,
    reason="every variant is compiled with a CUDA build of torch, or where VIDEO_LAB_SYSTEM_TESTS=1 is set",
)


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched: `kernel` "rows", "rotated", "e2m1", "dequantize" or "norm_silu"; dtypes by torch's
    names.

    `form`: of rows the dtype of the codes, of rotated ones "gelu" or "plain", of E2M1 "blocked" (the scales' order), of
    dequantising the name of the format, of norm and SiLU which dimension is innermost, "channels" or "pixels".
    `columns`: of a row, or channels of these.
    """

    kernel: str
    form: str
    dtype: str
    columns: int
    capability: int


@dataclass(frozen=True)
class Built:
    """What a variant was compiled to: resources of a thread (registers; bytes of stack and local memory), shared memory
    of a block in bytes, and how often its PTX has each instruction."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: dict[str, int]

    def of(self, *beginnings: str) -> set[str]:
        """Its instructions that begin with one of these."""
        return {name for name in self.instructions if name.startswith(beginnings)}

    def check(self, *, approximate: frozenset[str] = frozenset()) -> None:
        """What holds for every kernel: nothing spilled, and each float operation rounded by itself, as torch rounds;
        but those named `approximate`."""
        assert self.registers <= MOST_REGISTERS, self
        assert (self.stack, self.local, self.of("ld.local", "st.local")) == (0, 0, set()), self
        # Of `add.f32` the assembler may make a part of a fused multiply-add; of `add.rn.f32` it may not.
        arithmetic = {name for name in self.of("add", "sub", "mul", "fma", "mad", "div") if ".f" in name}
        fusible = {name for name in arithmetic - approximate if ".rn." not in name or name.startswith(("fma", "mad"))}
        assert arithmetic and not fusible, fusible

    def conversions(self) -> set[str]:
        """Between number formats one of which is a float."""
        return {name for name in self.of("cvt") if re.search(r"\.(f|bf|e\d)", name)}


def build(variants: list[Variant], cache: Path) -> dict[Variant, Built]:
    """All of them, in one process of its own: Triton decides at its import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.quantization.kernels.ahead_of_time"],
        input=json.dumps([asdict(variant) for variant in variants]),
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Built(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    return dict(zip(variants, found, strict=True))


class AbsentGpu:
    """A driver of Triton's that names a GPU and runs nothing. Each capability is a device of its own: what was compiled
    for one is not found for another."""

    def __init__(self) -> None:
        self.capability = 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands in for a kernel: where that would be launched, this compiles it and keeps what came out."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.last = kernel, None

    def __getitem__(self, grid: Any) -> Any:
        def compile_as_launched(*args: Any, **options: Any) -> None:
            self.last = self.kernel.warmup(*args, grid=grid, **options)

        return compile_as_launched


def _launch(variant: Variant) -> None:
    from runner.forecast.precisions import PRECISIONS
    from runner.generation.wan_animate import norm_silu_triton
    from runner.generation.wan_animate.norm_silu import SMALLEST_LENGTH
    from runner.quantization.formats.e2m1 import FORMATS, LARGEST
    from runner.quantization.kernels import dequantize_triton, e2m1_codes_triton, rotated_rows_triton, rowwise_triton
    from runner.quantization.kernels.rowwise import ROTATION, SMALLEST_SCALE

    dtype, rows = getattr(torch, variant.dtype), 64
    if variant.kernel == "norm_silu":
        layout = torch.channels_last_3d if variant.form == "channels" else torch.contiguous_format
        x = torch.empty(1, variant.columns, 1, 30, 52, dtype=dtype).contiguous(memory_format=layout)
        slots = torch.empty(1, variant.columns, 3, 32, 54, dtype=dtype).contiguous(memory_format=layout)
        gamma = torch.empty(variant.columns, 1, 1, 1, dtype=dtype)
        norm_silu_triton.launch(x, gamma, None, SMALLEST_LENGTH, slots[:, :, 2:, 1:-1, 1:-1])
        return
    if variant.kernel == "rows":
        (largest,) = [row.largest for row in PRECISIONS.values() if row.layout == "rows" and row.dtype == variant.form]
        codes = torch.empty(rows, variant.columns, dtype=getattr(torch, variant.form))
        x = torch.empty(rows, variant.columns, dtype=dtype)
        rowwise_triton.launch(x, largest, SMALLEST_SCALE, codes, torch.empty(rows, 1))
        return
    if variant.kernel == "rotated":
        x, matrix = torch.empty(rows, variant.columns, dtype=dtype), torch.empty(ROTATION, ROTATION, dtype=dtype)
        codes = torch.empty(rows, variant.columns, dtype=torch.int8)
        gelu = variant.form == "gelu"
        rotated_rows_triton.launch(x, matrix, gelu, 127.0, SMALLEST_SCALE, codes, torch.empty(rows, 1))
        return
    if variant.kernel == "e2m1":
        x, smooth = torch.empty(rows, variant.columns, dtype=dtype), torch.empty(variant.columns, dtype=dtype)
        codes = torch.empty(rows, variant.columns // 2, dtype=torch.uint8)
        scales = torch.empty(128 * variant.columns // 16, dtype=torch.uint8)
        e2m1_codes_triton.launch(x, smooth, LARGEST, 448.0, SMALLEST_SCALE, codes, scales)
        return
    fmt = FORMATS[variant.form]
    stored = {name: torch.empty(size, dtype=kind) for name, (size, kind) in fmt.tensors(rows, variant.columns).items()}
    scales = stored["weight_scale"], stored.get("weight_scale_2")
    out = torch.empty(rows, variant.columns, dtype=dtype)
    dequantize_triton.launch(stored["weight_packed"], *scales, fmt.group, out)


def resources(cubin: bytes) -> dict[str, int]:
    """What a thread and a block of a compiled kernel take, by the tool of Triton's wheel: see `Built`."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    if used is None:
        raise ValueError(f"cuobjdump says no resources: {said}")
    return dict(zip(("registers", "stack", "shared", "local"), map(int, used.groups()), strict=True))


def _read(kernel: Any) -> Built:
    used = resources(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}
    instructions = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w:.]*)\s", kernel.asm["ptx"], re.MULTILINE)
    return Built(**used, instructions=dict(Counter(instructions)))


def main() -> None:
    """Variants on standard input, what they were compiled to on standard output, both JSON lists."""
    import triton

    from runner.generation.wan_animate import norm_silu_triton
    from runner.quantization.kernels import dequantize_triton, e2m1_codes_triton, rotated_rows_triton, rowwise_triton

    gpu = AbsentGpu()
    triton.runtime.driver.set_active(gpu)
    stand_ins = {
        "rows": Compiled(rowwise_triton._quantize),
        "rotated": Compiled(rotated_rows_triton._rotate_and_quantize),
        "e2m1": Compiled(e2m1_codes_triton._quantize_groups),
        "dequantize": Compiled(dequantize_triton._dequantize),
        "norm_silu": Compiled(norm_silu_triton._norm_silu),
    }
    rowwise_triton._quantize, dequantize_triton._dequantize = stand_ins["rows"], stand_ins["dequantize"]
    rotated_rows_triton._rotate_and_quantize = stand_ins["rotated"]
    norm_silu_triton._norm_silu = stand_ins["norm_silu"]
    e2m1_codes_triton._quantize_groups = stand_ins["e2m1"]
    found = []
    for row in json.load(sys.stdin):
        variant = Variant(**row)
        gpu.capability = variant.capability
        _launch(variant)
        found.append(asdict(_read(stand_ins[variant.kernel].last)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
