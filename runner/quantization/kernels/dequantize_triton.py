"""The dequantisation kernel in Triton, for both formats and three output dtypes. Importing this needs triton.

In:   stored tensors of one weight. Out: its values, written once, in order. One program takes _BYTES packed bytes.
Never: rows and columns (a row holds whole groups, so that the matrix is one sequence of groups).

bfloat16 is read and written as integers, and rounded in this code: Triton's interpreter, in which the tests run the
kernel without a GPU, truncates where a GPU rounds. float8_e4m3fn is decoded here too: Triton has the dtype only from
compute capability 8.9 on.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

# Four packed bytes a thread become eight 16-bit values, one full-width store of adjacent columns. With more bytes a
# thread, Triton would use shared memory to bring the values into order.
_BYTES: Final = 512
_WARPS: Final = 4


def launch(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None, group: int, out: Tensor) -> None:
    """code * (scale * tensor_scale) in float32, rounded once, into `out` [out, in] float32|bfloat16|float16.

    packed uint8 [out, in/2]; scale bfloat16, or uint8 bits of e4m3fn with a tensor_scale float32 []; [out, in/group].
    All contiguous, on one device.
    """
    for tensor in (packed, scale, out):
        if not tensor.is_contiguous():
            raise ValueError("the kernel reads and writes contiguous tensors only")
    groups = scale.numel()
    bits = out.dtype is torch.bfloat16
    groups_a_program = 2 * _BYTES // group
    with torch.cuda.device_of(out):  # Triton launches on the current device, wherever the tensors lie
        _dequantize[(triton.cdiv(groups, groups_a_program),)](
            packed,
            scale.view(torch.int16) if tensor_scale is None else scale,
            tensor_scale,
            out.view(torch.int16) if bits else out,
            groups,
            GROUP_BYTES=group // 2,
            E4M3=tensor_scale is not None,
            BF16=bits,
            GROUPS=groups_a_program,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # torch rounds each operation; Triton's default depends on its release
        )


@triton.jit
def _value(code: tl.tensor) -> tl.tensor:
    # Exponent and mantissa of a code in float16's positions give its value times 2**-14; 0.5 becomes a subnormal.
    bits = ((code & 0x7) << 9) | ((code & 0x8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _bfloat16_bits(value: tl.tensor) -> tl.tensor:
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def _dequantize(
    packed: tl.tensor,
    scale: tl.tensor,
    tensor_scale: tl.tensor,
    out: tl.tensor,
    groups: tl.tensor,
    GROUP_BYTES: tl.constexpr,
    E4M3: tl.constexpr,
    BF16: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    stored = tl.load(scale + group, mask=inside, other=0).to(tl.int32)
    if E4M3:
        # In the same way, e4m3's bits in float16's positions give its value times 2**-8.
        bits = ((stored & 0x7F) << 7) | ((stored & 0x80) << 8)
        factor = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0 * tl.load(tensor_scale)
    else:
        factor = (stored << 16).to(tl.float32, bitcast=True)
    at = group[:, None] * GROUP_BYTES + tl.arange(0, GROUP_BYTES)[None, :]
    pair = tl.load(packed + at, mask=inside[:, None], other=0).to(tl.int32)
    low = _value(pair & 0xF) * factor[:, None]
    high = _value(pair >> 4) * factor[:, None]
    if BF16:
        low = _bfloat16_bits(low)
        high = _bfloat16_bits(high)
    values = tl.interleave(low, high).to(out.dtype.element_ty)
    columns = group[:, None] * (GROUP_BYTES * 2) + tl.arange(0, GROUP_BYTES * 2)[None, :]
    tl.store(out + columns, values, mask=inside[:, None])
