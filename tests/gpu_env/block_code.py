"""Generates the CUDA code of the 14B model's block for a device that is not there, and compiles its kernels.

    python -m tests.gpu_env.block_code                  a table of all cases
    python -m tests.gpu_env.block_code sm_90 bf16 …     JSON of these cases, for the tests

The block is the real one (5120 wide, 34,320 tokens: 832x480, 81 frames), FP4 or SVDQ weights without numbers,
compiled as `CompiledBlocks` does, through Dynamo, AOTAutograd and Inductor. It stops where the code would be loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from runner.forecast.precisions import DEFAULT_PRECISION, PRECISIONS
from runner.generation.runtime.attention import available_backends, candidates, set_backend
from runner.generation.runtime.compute import is_token_wise
from runner.generation.wan_animate.compiled import CompiledBlocks
from runner.generation.wan_animate.transformer import CrossAttended, KeyValue, Rope
from runner.quantization.formats.e2m1 import G32
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.kernels.rowwise import code_dtype
from runner.quantization.linear import FP4Linear
from runner.quantization.packed_layers import swap_linears
from runner.quantization.rules import WAN_ANIMATE_14B, kept_in_fp32, stored_dtype, transformer_on_meta
from runner.quantization.svdq_linear import SvdqLinear
from tests.gpu_env.fake_cuda import DEVICES, fake_cuda
from tests.gpu_env.generated_code import GeneratedCode, TensorFacts
from tests.gpu_env.known_torch import find_private
from tests.quantization.kernels.ahead_of_time import resources

__all__ = ["CASES", "HIDDEN_BYTES", "TOKENS", "BlockCode", "Case", "CompiledKernel", "block_codes", "print_table"]

ROOT = Path(__file__).resolve().parents[2]
TOKENS, WIDTH, HEADS = 34_320, 5120, 40
HIDDEN_BYTES = TOKENS * WIDTH * 2
TEXT, IMAGE, LORA_RANK = 512, 257, 64
PLAIN = "plain"


@dataclass(frozen=True)
class Case:
    """`backend`: a GEMM backend of the precision, empty for exact products. `lora`: one of rank 64 beside every weight.
    `kept`: the codes of the weights are kept."""

    architecture: str
    precision: str
    backend: str = ""
    lora: bool = False
    kept: bool = False

    def __str__(self) -> str:
        return " ".join([self.architecture, self.word])

    @property
    def word(self) -> str:
        """`int8:int_mm+lora+kept`"""
        backend = f":{self.backend}" if self.backend else ""
        return self.precision + backend + "+lora" * self.lora + "+kept" * self.kept

    @classmethod
    def parse(cls, architecture: str, word: str) -> Case:
        named, *more = word.split("+")
        precision, _, backend = named.partition(":")
        return cls(architecture, precision, backend, "lora" in more, "kept" in more)


def _cases() -> list[Case]:
    """Every precision that runs on a device, by its first backend; int8 by torch's product as well."""
    found = []
    for architecture in ("sm_80", "sm_90", "sm_120"):
        for row in PRECISIONS.values():
            if row.layout != "blocks" and row.runs_on(DEVICES[architecture].capability):
                found.append(Case(architecture, row.name, row.backends[0].name if row.backends else ""))
    found.append(Case("sm_89", "fp8", "scaled_mm"))
    found.append(Case("sm_80", "int8", "int_mm"))
    found += [Case("sm_90", "bf16", lora=True), Case("sm_120", "int8", "comfy_kitchen", lora=True)]
    found += [Case("sm_120", "svdq-nvfp4", "cache_dit", lora=True)]
    found += [Case("sm_90", "fp8", "scaled_mm", kept=True), Case("sm_120", "int8", "comfy_kitchen", kept=True)]
    return found


CASES = _cases()


@dataclass(frozen=True)
class CompiledKernel:
    """A Triton kernel as it was compiled for one of the configurations that Inductor would time. Bytes a thread:
    `stack` and `local`; `shared`, bytes a block."""

    name: str
    config: str
    registers: int
    stack: int
    local: int
    shared: int


@dataclass(frozen=True)
class BlockCode:
    """`attention`: the self-attention's backend. The block is one graph: Dynamo refuses any other (`fullgraph`)."""

    attention: str
    code: GeneratedCode
    kernels: tuple[CompiledKernel, ...]

    @property
    def peak_units(self) -> float:
        """In hidden states [S, d], the caller's among them."""
        return 1 + self.code.peak / HIDDEN_BYTES

    @property
    def bytes_a_channel(self) -> float:
        """That its Triton kernels read and write, for each channel of each token."""
        return sum(map(self.code.traffic, self.code.triton_launches)) / (TOKENS * WIDTH)


def read(printed: Mapping[str, Any]) -> BlockCode:
    """From one case's JSON."""
    tensors = {name: TensorFacts(tuple(shape), size, of) for name, (shape, size, of) in printed["tensors"].items()}
    code = GeneratedCode(printed["code"], tensors)
    kernels = tuple(CompiledKernel(**kernel) for kernel in printed["kernels"])
    return BlockCode(printed["attention"], code, kernels)


@cache
def block_codes(architecture: str) -> dict[Case, BlockCode]:
    """All cases of an architecture, generated in one process of its own: torch remembers the device."""
    words = [case.word for case in CASES if case.architecture == architecture]
    with tempfile.TemporaryDirectory() as caches:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.gpu_env.block_code", architecture, *words],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": f"{caches}/triton"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-6000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    return {Case.parse(architecture, word): read(found) for word, found in printed.items()}


class _Written(Exception):
    """The code is written: nothing more is wanted of torch."""


def _generate(model: Any, case: Case, backend: str) -> dict[str, Any]:
    """Within `fake_cuda`: {attention, code, tensors}. RuntimeError where torch writes no code, with its reason."""
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, Any] = {"attention": backend}

    def keep(code: str) -> None:
        found.update(code=code, tensors=_tensors_of(V.graph))
        raise _Written

    owner, attribute = find_private("torch._inductor.graph:GraphLowering.save_output_code")
    assert owner is GraphLowering
    before = getattr(owner, attribute)
    torch._dynamo.reset()
    block, step = model.blocks[0], CompiledBlocks()
    with torch.no_grad(), FakeTensorMode():
        _prepare(model, case, backend)
        hidden = torch.empty(1, TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
        modulation = torch.empty(1, 6, WIDTH, dtype=torch.bfloat16, device="cuda")
        rope = Rope(*(torch.empty(1, TOKENS, 1, WIDTH // HEADS // 2, device="cuda") for _ in range(2)))
        attended = CrossAttended(_key_value(TEXT), _key_value(IMAGE))
        setattr(owner, attribute, staticmethod(keep))
        try:
            step._compiled(block, hidden, modulation, rope, attended)
        except Exception as err:
            if "code" not in found:
                raise RuntimeError(f"{case}: no code was written") from err
        finally:
            setattr(owner, attribute, before)
    return found


def _key_value(tokens: int) -> KeyValue:
    shape = (1, tokens, HEADS, WIDTH // HEADS)
    return KeyValue(*(torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)))


def _prepare(model: Any, case: Case, backend: str) -> None:
    """The first block on the device, its dtypes as a store has them, computing as `case` says."""
    block, fp32 = model.blocks[0], kept_in_fp32(model)
    set_backend(block.attn1, backend)
    for name, layer in model.named_modules():
        if not name.startswith("blocks.0."):
            continue
        stored = layer.stored if isinstance(layer, FP4Linear | SvdqLinear) else {}
        for leaf, parameter in list(layer.named_parameters(recurse=False)):
            dtype = parameter.dtype if leaf in stored else stored_dtype(f"{name}.{leaf}", fp32)
            layer.register_parameter(leaf, _on_device(parameter, dtype))
        if isinstance(layer, FP4Linear | SvdqLinear):
            low = case.precision != DEFAULT_PRECISION and is_token_wise(name)
            layer.set_compute(*((case.precision, case.backend) if low else ("exact",)))
            down = torch.empty(LORA_RANK, layer.in_features, dtype=torch.bfloat16, device="cuda")
            up = torch.empty(layer.out_features, LORA_RANK, dtype=torch.bfloat16, device="cuda")
            layer.set_lora([(down, up, 1.0)] if case.lora else None)
            if case.kept and low:
                _keep_codes(layer)
    table = block.scale_shift_table
    block.scale_shift_table = _on_device(table, stored_dtype("blocks.0.scale_shift_table", fp32))


def _keep_codes(layer: FP4Linear) -> None:
    """As `keep_codes` leaves the layer, but that it has no numbers to make them of."""
    shape = layer.out_features, layer.in_features
    layer.kept_codes = torch.empty(shape, dtype=code_dtype(layer.compute), device="cuda")
    layer.kept_scale = torch.empty(shape[0], 1, device="cuda")
    layer._codes_dtype = torch.bfloat16


def _on_device(parameter: torch.Tensor, dtype: torch.dtype) -> torch.nn.Parameter:
    empty = torch.empty(tuple(parameter.shape), dtype=dtype, device="cuda")
    return torch.nn.Parameter(empty, requires_grad=False)


def _tensors_of(graph: Any) -> dict[str, tuple[list[int], int, str]]:
    """Name → (shape, bytes of storage, the operator's result that it is an item of): of buffers and inputs."""
    found: dict[str, tuple[list[int], int, str]] = {}
    for name, value in [*graph.graph_inputs.items(), *((buffer.get_name(), buffer) for buffer in graph.buffers)]:
        shape = value.maybe_get_size()
        if shape is None:
            continue  # an operator's result of several items
        sizes, strides = [int(n) for n in shape], [int(n) for n in value.get_stride()]
        numbers = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        parent = value.inputs[0].get_name() if type(value).__name__ == "MultiOutput" else ""
        found[name] = sizes, numbers * value.get_dtype().itemsize, parent
    return found


def _compile_kernels(code: GeneratedCode) -> list[CompiledKernel]:
    """Every kernel in every configuration that Inductor would choose from, by Inductor's own call of Triton."""
    owner, attribute = find_private("torch._inductor.codecache:PyCodeCache.load")
    load, found = getattr(owner, attribute), []
    for name, source in code.kernels.items():
        kernel = getattr(load(source), name)
        kernel.precompile(warm_cache_only=True)
        for result in kernel.compile_results:
            config = ", ".join(f"{key} {value}" for key, value in result.config.all_kwargs().items())
            found.append(CompiledKernel(name, config, **resources(result.kernel.asm["cubin"])))
    return found


def main(architecture: str, words: list[str]) -> dict[str, Any]:
    """{word: {attention, code, tensors, kernels}}"""
    import torch._inductor.config as inductor

    available = available_backends()
    found = {}
    settings = {"compile_threads": 1, "use_static_cuda_launcher": False}
    with fake_cuda(architecture) as device, inductor.patch(settings):
        backend = candidates(device.capability, "bfloat16", available)[0].name
        for word in words:
            case = Case.parse(architecture, word)
            model = transformer_on_meta({**WAN_ANIMATE_14B, "num_layers": 1})
            swap_linears(model, SVDQ_LAYOUTS.get(case.precision, G32), lambda name: not name.startswith("blocks."))
            generated = _generate(model, case, backend)
            kernels = _compile_kernels(GeneratedCode(generated["code"], {}))
            found[word] = {**generated, "kernels": [asdict(kernel) for kernel in kernels]}
    return found


def print_table() -> None:
    """All cases, each architecture in a process of its own."""
    for case in CASES:
        found = block_codes(case.architecture)[case]
        kernels = found.kernels
        print(
            f"{case!s:30} {len(found.code.triton_launches):2} kernels, "
            f"peak {found.peak_units:.2f} u, {found.bytes_a_channel:.1f} B a channel, "
            f"{len(kernels)} configurations, registers {min(k.registers for k in kernels)} to "
            f"{max(k.registers for k in kernels)}, spilled {sum(k.stack > 0 or k.local > 0 for k in kernels)}, "
            f"attention {found.attention}"
        )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(main(sys.argv[1], sys.argv[2:])))
    else:
        print_table()
