"""Compiled: compile `run_block` to fused kernels, as one graph for all blocks, before steps are timed.

In:   shapes of a window, the transformer's blocks. Out: a block forward that computes what `run_block` computes, within
      the rounding of another order of sums. Never: a failed job. If compilation fails or its result is wrong, blocks
      run eagerly, and the log, the record and the end of the run give the reason.

Fused are norm with modulation, RMSNorm with rotation, gate with residual, GELU, and the quantisation of activations. In
eager mode they move 66 GB per block at 832x480, 81 frames. Products and attention use the same kernels in both modes.
An FP4 layer is one opaque operator, so that the compiler neither unpacks a weight early nor separates it from its use.

A graph is valid for one set of shapes: windows of one size, LoRAs of one rank. All blocks share it, wherever their
weights are in memory. `warm` makes the graphs that a job needs, on one block of each structure, and compares the first
results with the eager ones. A job with known shapes compiles nothing. Code is cached on disk between runs.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
import torch
from torch import Tensor

from runner.generation.runtime.device import as_out_of_memory
from runner.generation.runtime.eager_blocks import eager_by_plan
from runner.generation.runtime.memory_plan import MemoryPlan
from runner.generation.wan_animate.low_memory import choose_eager_block
from runner.generation.wan_animate.transformer import (
    BlockForward,
    Context,
    CrossAttended,
    KeyValue,
    Rope,
    Switches,
    rotary_angles,
    run_block,
)

__all__ = [
    "TOLERANCES",
    "CompiledBlocks",
    "keep_code",
    "make_block_forward",
    "structure_of",
    "wants_compile",
]

# Largest relative difference between compiled and eager. Another order of sums differs by a few units in the last
# place. A wrong graph differs by far more.
TOLERANCES: Final = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
MOST_GRAPHS: Final = 48  # kept at once, so that a manifest of many sizes does not fill the memory with code
# Dynamo's own limit of 8 graphs a function would turn the ninth size of a manifest into an error.
RECOMPILE_LIMIT: Final = 2 * MOST_GRAPHS


def wants_compile(switches: Switches, device: torch.device, plan: MemoryPlan | None = None) -> tuple[bool, str]:
    """Return whether to compile, and why. Pure. `plan`: None for a pipeline whose models were moved by hand."""
    if plan is not None and (why := eager_by_plan(plan)):
        return False, why
    if switches.compile is not None:
        return switches.compile, "asked for" if switches.compile else "switched off"
    if device.type == "cuda":
        return True, "on CUDA, blocks are limited by memory traffic outside their products"
    return False, "on a CPU, eager blocks keep the order of sums and so the library's bits"


def make_block_forward(
    switches: Switches, device: torch.device, plan: MemoryPlan | None = None
) -> tuple[CompiledBlocks | None, str]:
    """Return a replacement of `run_block`, or None if blocks run eagerly; and why. Compiles nothing yet.

    `low_memory.choose_eager_block` runs blocks if compilation fails, and to compare with.
    """
    wanted, why = wants_compile(switches, device, plan)
    structlog.get_logger().debug("compile_chosen", compile=wanted, why=why)
    if not wanted:
        return None, why
    return CompiledBlocks(why=why, eager=choose_eager_block(device, plan is not None and plan.chunked)), why


def keep_code(cache: Path) -> None:
    """Store compiled code under `cache` from now on, unless the environment names another folder.

    Call it before the first compilation, at which torch reads the variables.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))


def fuse_multiply_adds() -> None:
    """Let generated kernels contract a * b + c into one operation, unless the environment sets this already.

    So do the Triton releases of torch 2.10 to 2.13, where it is the default. Triton 3.10 turns it off, and results
    would change in their last bits with the release. Inductor itself asks for it with each kernel that it generates
    (torch 2.13: `TritonKernel.triton_meta_common`); this holds for kernels with which it passes nothing.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def allow_graphs() -> None:
    """Let torch keep RECOMPILE_LIMIT graphs of one function. Beyond its limit of 8 it would run new ones uncompiled.

    Two models whose blocks differ (a float32 one, a quantised one) share a limit.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)


def structure_of(block: Any) -> Hashable:
    """Return what decides a block's graph beside shapes: the precision of its layers, and their LoRAs and codes.

    A LoRA within kept codes changes no graph: torch finds the existing one, and `warm` compares it once more.

    It reads plain attributes only: offloaded parameters may have no shape at the moment.
    """
    return tuple(
        (
            name,
            module.compute,
            module.backend,
            getattr(module, "holds_codes", False),
            getattr(module, "lora_rank", 0),
            getattr(module, "bias_delta", None) is None,
        )
        for name, module in block.named_modules()
        if hasattr(module, "compute")
    )


class CompiledBlocks:
    """A BlockForward: `run_block` compiled, or `eager` after that has failed (`broken` has the reason).

    `graphs`: how many sets of shapes and structures were compiled. `worst`: the largest difference from eager.
    """

    def __init__(self, *, backend: str = "inductor", why: str = "asked for", eager: BlockForward = run_block) -> None:
        self.backend, self.why, self.broken, self.worst = backend, why, "", 0.0
        self._eager = eager
        self._ready: set[Hashable] = set()
        fuse_multiply_adds()
        allow_graphs()
        self._compiled: BlockForward = torch.compile(run_block, fullgraph=True, dynamic=False, backend=backend)

    @property
    def graphs(self) -> int:
        return len(self._ready)

    @property
    def description(self) -> dict[str, Any]:
        """How blocks run, and the largest difference from eager, for the record."""
        if self.broken:
            return {"compile": "eager", "compile_why": self.broken}
        return {"compile": self.backend, "compile_why": self.why, "compile_off_eager": self.worst}

    def __call__(self, block: Any, hidden: Tensor, modulation: Tensor, rope: Rope, attended: CrossAttended) -> Tensor:
        if self.broken:
            return self._eager(block, hidden, modulation, rope, attended)
        try:
            return self._compiled(block, hidden, modulation, rope, attended)
        except Exception as err:
            # The compiled block overwrites nothing, so the eager one can start again.
            if as_out_of_memory(err, hidden.device, doing="running a block") is not None:
                raise
            self._give_up(f"compiling failed: {_error_summary(err)}")
            return self._eager(block, hidden, modulation, rope, attended)

    def warms(self, transformer: Any, contexts: Sequence[Context], grid: tuple[int, int, int]) -> bool:
        """Return whether `warm` would compile anything for these arguments."""
        return not self.broken and bool(self._missing(transformer, contexts, grid))

    @torch.no_grad()
    def warm(
        self,
        transformer: Any,
        contexts: Sequence[Context],
        grid: tuple[int, int, int],
        blocks: Iterable[Any] | None = None,
    ) -> int:
        """Compile all graphs for windows of `grid` (latent frames, H/8, W/8) with these contexts; return how many.

        `blocks`: as in `denoise_step`, for streamed blocks; closed when no more are needed. Nothing runs if all graphs
        exist. Raises only what a full device raises.
        """
        missing = {} if self.broken else self._missing(transformer, contexts, grid)
        if not missing:
            return 0
        if len(self._ready) + len(missing) > MOST_GRAPHS:
            torch._dynamo.reset()
            self._ready.clear()
            missing = self._missing(transformer, contexts, grid)
        wanted = {index for index, _, _ in missing.values()}
        source = iter(transformer.blocks if blocks is None else blocks)
        made = 0
        try:
            for index, block in enumerate(source):
                if index in wanted:
                    for key, (at, context, _) in missing.items():
                        if at == index and not self.broken:
                            self._try(block, dummies(transformer, context, grid, block))
                            self._ready.add(key)
                            made += 1
                if self.broken or index >= max(wanted):
                    break
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        return 0 if self.broken else made

    def _missing(
        self, transformer: Any, contexts: Sequence[Context], grid: tuple[int, int, int]
    ) -> dict[Hashable, tuple[int, Context, Any]]:
        """Return, for missing graphs, key → (first index of a block structure, a context of its shapes, the block)."""
        found: dict[Hashable, tuple[int, Context, Any]] = {}
        for index, block in enumerate(transformer.blocks):
            structure = structure_of(block)
            for context in contexts:
                image = None if context.image is None else tuple(context.image.shape)
                key = (structure, grid, tuple(context.text.shape), context.text.dtype, image)
                if key not in self._ready:
                    found.setdefault(key, (index, context, block))
        return found

    def _try(self, block: Any, given: tuple[Tensor, Tensor, Rope, CrossAttended]) -> None:
        """Compile for these shapes, and compare the result once with eager."""
        found = self(block, *given)
        if self.broken:
            return
        # Eager runs last, as it may overwrite the hidden states.
        off, limit = difference(found, self._eager(block, *given)), TOLERANCES[found.dtype]
        self.worst = max(self.worst, off)
        if off > limit:
            self._give_up(f"compiled blocks differ by {off:.3g} from the eager result, {limit} is allowed")

    def _give_up(self, reason: str) -> None:
        self.broken = reason
        structlog.get_logger().warning("compile_failed", why=reason, instead="blocks run eagerly, which is slower")


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return ||found - wanted|| / ||wanted|| of [B, S, d], infinite if a value is not finite; makes no large copies."""
    off = of = 0.0
    for some, other in zip(found.split(4096, dim=1), wanted.split(4096, dim=1), strict=True):
        off += float((some.float() - other.float()).square().sum())
        of += float(other.float().square().sum())
    relative = (off / of) ** 0.5 if of else float("nan")
    return relative if relative < float("inf") else float("inf")


def dummies(
    transformer: Any, context: Context, grid: tuple[int, int, int], block: Any
) -> tuple[Tensor, Tensor, Rope, CrossAttended]:
    """Return noise in the shapes, dtypes and strides that `denoise_step` passes to a block of such a window."""
    text, config = context.text, transformer.config
    batch, width = text.shape[0], config.num_attention_heads * config.attention_head_dim
    tokens = 1
    for size, side in zip(grid, config.patch_size, strict=True):
        tokens *= size // side

    generator = torch.Generator(text.device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=text.device, dtype=text.dtype)

    def read(many: int) -> KeyValue:
        return KeyValue(*(noise(batch, many, block.attn2.heads, width // block.attn2.heads) for _ in range(2)))

    image = None if context.image is None else read(context.image.shape[1])
    rope = rotary_angles(transformer, text.new_empty((batch, 1, *grid)))
    attended = CrossAttended(read(text.shape[1]), image)
    return noise(batch, tokens, width), noise(batch, 6, width), rope, attended


def _error_summary(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {' '.join(lines[:2]) or 'no message'}"  # the first may only name the failed part
