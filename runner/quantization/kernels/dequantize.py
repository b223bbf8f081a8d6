"""Dequantising: choose an implementation for a device, and run it as one operator for torch.compile.

In:   the stored tensors of one weight, as `e2m1.Format` lists them. Out: its values, written into the caller's matrix.
Never: layers, LoRAs, files.

    triton      one pass, 0.56 bytes read and 2 written a weight; CUDA
    table       a look-up table of the two values of each of 256 bytes; any device, all cores of a CPU
    eager       the reference, `e2m1.dequantize`; any device, 16 bytes of temporary memory a weight

All three compute code * (weight_scale * weight_scale_2) in float32 and round once, so that they agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import Tensor

from runner.errors import ConfigInvalid
from runner.quantization.formats.e2m1 import FORMATS, VALUES, Format, dequantize
from runner.quantization.formats.row_blocks import on_all_cores, row_blocks

__all__ = ["KERNELS", "Kernel", "dequantize_fp4", "dequantize_into", "pick_kernel", "stored"]

# (weight_packed, weight_scale, weight_scale_2 or None, format, out [out, in] float32|bfloat16|float16, contiguous)
Kernel = Callable[[Tensor, Tensor, Tensor | None, Format, Tensor], None]

_WEIGHTS_A_BLOCK: Final = 1 << 18  # on a core; its index, values and scales then stay in the cache
_WEIGHTS_A_BLOCK_ON_CUDA: Final = 1 << 24
# The dtype that views a pair of values as one element, so that one look-up gives two weights.
_PAIR: Final = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}


def stored(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None) -> dict[str, Tensor]:
    """The arguments of a kernel under the names that `Format.tensors` gives them."""
    named = {"weight_packed": packed, "weight_scale": scale}
    return named if tensor_scale is None else {**named, "weight_scale_2": tensor_scale}


def eager(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None, fmt: Format, out: Tensor) -> None:
    """The reference as a kernel."""
    out.copy_(dequantize(stored(packed, scale, tensor_scale), fmt, out.dtype))


def table(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None, fmt: Format, out: Tensor) -> None:
    """In blocks of rows: look up the pair of values of each byte, multiply by the group's scale, write into `out`."""
    factors = fmt.group_scales(stored(packed, scale, tensor_scale))
    # With scales in bfloat16, a product in bfloat16 is rounded once, like the reference's. Then values of two bytes are
    # enough instead of four. In other cases they are not.
    exact = fmt.scale == "bf16" and out.dtype is torch.bfloat16
    values = torch.bfloat16 if exact else torch.float32
    pairs = _byte_table(values, packed.device)
    if exact:
        factors = scale
    groups = factors.shape[1]

    def work(rows: slice) -> None:
        index = packed[rows].flatten().int()
        codes = pairs.index_select(0, index).view(values).view(-1, groups, fmt.group)
        target = out[rows].view(-1, groups, fmt.group)
        if target.dtype is values:
            torch.mul(codes, factors[rows].unsqueeze(-1), out=target)
        else:
            target.copy_(codes.mul_(factors[rows].unsqueeze(-1)))

    if out.device.type == "cpu":
        on_all_cores(work, row_blocks(out.shape, _WEIGHTS_A_BLOCK))
    else:
        for rows in row_blocks(out.shape, _WEIGHTS_A_BLOCK_ON_CUDA):
            work(rows)


@cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256] integers: entry b has the bits of the values of b's low and high nibble, in the order of the columns."""
    with torch.inference_mode(False):  # the cached table may later be used outside inference mode
        low = torch.tensor(VALUES, dtype=dtype).repeat(16)
        high = torch.tensor(VALUES, dtype=dtype).repeat_interleave(16)
        return torch.stack([low, high], dim=-1).view(_PAIR[dtype]).flatten().to(device)


def triton(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None, fmt: Format, out: Tensor) -> None:
    """The Triton kernel; on a CPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 was set before the import."""
    from runner.quantization.kernels.dequantize_triton import launch

    launch(packed, scale, tensor_scale, fmt.group, out)


KERNELS: Final[dict[str, Kernel]] = {"triton": triton, "table": table, "eager": eager}


def pick_kernel(device: torch.device | str, fmt: Format) -> tuple[str, str]:
    """Choose (name in KERNELS, why) for `device`, for the log and the record; constant within a process.

    A kernel is tried on a small weight and taken only if it agrees with the reference bit for bit. This finds a Triton
    without a C compiler, and one that miscompiles, before it can damage a video.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _pick(device, fmt)


@cache
def _pick(device: torch.device, fmt: Format) -> tuple[str, str]:
    refused: list[str] = []
    for name in ("triton", "table") if device.type == "cuda" else ("table",):
        problem = _check_kernel(name, device, fmt)
        if problem is None:
            method = {"triton": "one pass", "table": "one look-up for two weights"}[name]
            return name, "; ".join([f"{method}, equal to the reference on {device}", *refused])
        refused.append(f"{name} refused: {problem}")
    return "eager", "; ".join(refused)


def _check_kernel(name: str, device: torch.device, fmt: Format) -> str | None:
    """Return why a kernel cannot be used on `device`, or None if it gives the reference's values for every dtype."""
    weight = _probe(fmt, device)
    shape = fmt.weight_shape(weight)
    for dtype in _PAIR:
        out = torch.full(shape, torch.nan, dtype=dtype, device=device)
        try:
            KERNELS[name](weight["weight_packed"], weight["weight_scale"], weight.get("weight_scale_2"), fmt, out)
        # A compiler, a driver or a missing package may raise anything: the next kernel is tried, with this reason.
        except Exception as err:
            return f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else 'no message'}"
        if not torch.equal(out, dequantize(weight, fmt, dtype)):
            return f"wrong values in {str(dtype).removeprefix('torch.')}"
    return None


def _probe(fmt: Format, device: torch.device) -> dict[str, Tensor]:
    """A small weight with every byte, many scales, and sides that are no powers of two."""
    shape = (33, 7 * fmt.group)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (size, dtype) in fmt.tensors(*shape).items():
        if name == "weight_packed":
            count = torch.Size(size).numel()
            tensors[name] = (torch.arange(count) % 256).to(torch.uint8).view(size)
        elif dtype is torch.uint8:
            tensors[name] = torch.randint(0, 0x7F, size, generator=generator).to(torch.uint8)
        else:
            tensors[name] = torch.rand(size, generator=generator).mul_(0.01).to(dtype)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@torch.library.custom_op("video_lab::dequantize_fp4", mutates_args=())
def dequantize_fp4(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    """Dequantise to a new weight [out, in] in `dtype`, by the kernel chosen for the device.

    `fmt` is a name in FORMATS. torch.compile treats it as one operator: it neither splits its graph here nor folds
    constant weights into 16-bit copies.
    """
    out = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=dtype, device=packed.device)
    dequantize_into(packed, scale, tensor_scale, fmt, out)
    return out


@dequantize_fp4.register_fake
def _(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], packed.shape[1] * 2, dtype=dtype)


def dequantize_into(packed: Tensor, scale: Tensor, tensor_scale: Tensor | None, fmt: str, out: Tensor) -> None:
    """Dequantise into `out` by the kernel chosen for its device. Raises ConfigInvalid for a dtype without a kernel."""
    if out.dtype not in _PAIR:
        raise ConfigInvalid(f"FP4 weights cannot be computed in {out.dtype}", todo="Use bfloat16, float16 or float32")
    name, _ = pick_kernel(out.device, FORMATS[fmt])
    KERNELS[name](packed, scale, tensor_scale, FORMATS[fmt], out)
