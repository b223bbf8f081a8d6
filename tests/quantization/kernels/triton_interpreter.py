"""Triton's interpreter, with bfloat16 as a GPU has it. Import it where TRITON_INTERPRET is set, before kernels run.

In Triton 3.7 the interpreter cuts float32 to bfloat16 instead of rounding it, and multiplies matrices of bfloat16 by
their bits. Both are replaced here by torch's conversions, which round to nearest, ties to even, as `cvt.rn.bf16.f32`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["use_torch_bfloat16", "without_device"]

PLAIN_CAST, PLAIN_DOT = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot


def widen(tensor: Any) -> Any:
    """A tensor of bfloat16 as float32, any other as it is."""
    if tensor.dtype.scalar != tl.bfloat16:
        return tensor
    bits = torch.from_numpy(np.ascontiguousarray(tensor.data).view(np.int16))
    return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


def cast(builder: Any, source: Any, wanted: Any) -> Any:
    kinds = source.dtype.scalar, wanted.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return widen(source)
    if kinds == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
    return PLAIN_CAST(builder, source, wanted)


def use_torch_bfloat16() -> None:
    """For the rest of the process."""
    interpreter.InterpreterBuilder.cast_impl = cast
    interpreter.InterpreterBuilder.create_dot = lambda builder, a, b, *rest: PLAIN_DOT(
        builder, widen(a), widen(b), *rest
    )


def without_device() -> list[Any]:
    """Launches on a device that is not there; the tensors that it was asked of are put into the list."""
    entered: list[Any] = []
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext(entered.append(tensor))
    return entered
