"""Attention: which implementation the self-attention runs on, by device, and the trial that it must pass.

In:   a loaded transformer, a device, a dtype. Out: processors that name a backend; what was chosen, and why.
Never: cross-attention and the faces' attention: they are 2 % of the work and stay on the library's default.

    sm_90            FlashAttention 3 where its package is installed, else cuDNN, which reaches twice the rate of
                     torch's flash kernels there, and less than theirs elsewhere
    other CUDA       torch's flash kernels; for float32 the library's default, for no flash kernel takes it
    CPU              the library's default

8-bit self-attention (`sage`: int8 keys and queries) runs where it is asked for and SageAttention 2.1.1 or later is
installed. Its error against exact attention is measured on a trial of the model's own shape and goes to the record.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import structlog

from runner.errors import ConfigInvalid

if TYPE_CHECKING:
    import torch

__all__ = ["LIMITS", "AttentionBackend", "apply_attention", "available_backends", "candidates", "pick_backend", "trial"]

Capability = tuple[int, int]
DEFAULT: Final = "native"
EIGHT_BIT: Final = ("sage", "_sage_qk_int8_pv_fp16_cuda")
# Relative error of the output against float32 on gaussian input. Two bfloat16 roundings are .003 together.
LIMITS: Final[Mapping[str, float]] = MappingProxyType({"exact": 0.01, "8 bit": 0.06})
TRIAL_TOKENS: Final = 2 * 1024 + 40  # no multiple of any tile


@dataclass(frozen=True)
class AttentionBackend:
    """`name` as diffusers' attention dispatch has it, and why this one."""

    name: str
    why: str


def candidates(
    capability: Capability | None, dtype: str, available: Collection[str], eight_bit: bool = False
) -> list[AttentionBackend]:
    """What to try, best first; the last one always works. Pure.

    `capability`: (9, 0) for an H200, None for a CPU. `available`: names that the library could run here. Raises
    ConfigInvalid, with what to do, where 8 bits are asked for and nothing here does them.
    """
    if eight_bit:
        return [_in_eight_bits(capability, dtype, available)]
    if capability is None:
        return [AttentionBackend(DEFAULT, "a CPU has torch's own")]
    fallback = AttentionBackend(DEFAULT, "torch's own choice")
    if dtype not in ("bfloat16", "float16"):
        return [AttentionBackend(DEFAULT, f"no flash kernel takes {dtype}")]
    wanted = [AttentionBackend("_native_flash", f"flash kernels lead on sm_{capability[0]}{capability[1]}")]
    if capability == (9, 0):
        wanted = [
            AttentionBackend("_flash_3", "FlashAttention 3 is installed, made for sm_90"),
            AttentionBackend("_native_cudnn", "cuDNN leads torch's flash kernels on sm_90"),
            AttentionBackend("_native_flash", "flash kernels"),
        ]
    return [*(backend for backend in wanted if backend.name in available), fallback]


def _in_eight_bits(capability: Capability | None, dtype: str, available: Collection[str]) -> AttentionBackend:
    if capability is None or capability < (8, 0) or dtype not in ("bfloat16", "float16"):
        raise ConfigInvalid(
            "8-bit attention needs a CUDA device of capability 8.0 or later and a model in 16 bits",
            todo="Leave it out: attention is exact then",
        )
    # On sm_90 the package's own choice is its fp8 kernel, which has given noise on Wan models.
    name = EIGHT_BIT[1] if capability == (9, 0) else EIGHT_BIT[0]
    if name not in available:
        raise ConfigInvalid(
            "8-bit attention was asked for, but SageAttention 2.1.1 or later is not installed",
            todo="Build it from its repository (the package index has 1.0.6 only), or leave it out: "
            "attention is exact then",
        )
    return AttentionBackend(name, "asked for; SageAttention is installed")


def available_backends() -> frozenset[str]:
    """Names that diffusers would run here, as far as packages decide. Those that download (`*_hub`) are none."""
    from diffusers.models import attention_dispatch as dispatch

    found = {DEFAULT}
    for backend in dispatch.AttentionBackendName:
        if backend.value.endswith("_hub"):
            continue
        try:
            dispatch._check_attention_backend_requirements(backend)
        except RuntimeError:
            continue
        found.add(backend.value)
    return frozenset(found)


def pick_backend(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, *, eight_bit: bool = False
) -> tuple[str, str, float]:
    """(name, why, relative error in the trial) of the first candidate that computes attention right on `device`.

    Raises ConfigInvalid where 8 bits were asked for and are not there, or miss their limit.
    """
    import torch

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    said = str(dtype).removeprefix("torch.")
    limit, refused = LIMITS["8 bit" if eight_bit else "exact"], list[str]()
    for backend in candidates(capability, said, available_backends(), eight_bit):
        try:
            error = trial(backend.name, device, dtype, heads, head_dim)
        # Whatever a kernel, a driver or a package raises: the answer is the next candidate, and this reason.
        except Exception as err:
            text = str(err).strip()
            refused.append(f"{backend.name} refused: {type(err).__name__}: {text.splitlines()[0] if text else ''}")
            continue
        if error <= limit:
            return backend.name, "; ".join([backend.why, *refused]), error
        refused.append(f"{backend.name} refused: error {error:.4f}, {limit} allowed")
    raise ConfigInvalid(
        f"no attention computes right on {device}: {'; '.join(refused)}",
        todo="Leave out 8-bit attention" if eight_bit else "Check the driver and the installed torch",
    )


def trial(backend: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> float:
    """Relative error of `backend` against float32 attention, on one seeded input of up to four of the heads."""
    import torch
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    from runner.quantization.kernels.low_bit import relative_error

    tokens = TRIAL_TOKENS if device.type == "cuda" else 40
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, min(heads, 4), head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    with torch.no_grad():
        found = dispatch_attention_fn(query, key, value, backend=AttentionBackendName(backend))
        q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
        weights = (q @ k.transpose(2, 3) * head_dim**-0.5).softmax(dim=-1)
        wanted = (weights @ v).transpose(1, 2)
    return relative_error(found, wanted)


def apply_attention(model: Any, device: torch.device, dtype: torch.dtype, *, eight_bit: bool = False) -> dict[str, Any]:
    """Name the backend on every block's self-attention; what was chosen and why. See `pick_backend` for errors."""
    first = model.blocks[0].attn1
    heads = first.heads
    name, why, error = pick_backend(device, dtype, heads, first.inner_dim // heads, eight_bit=eight_bit)
    for block in model.blocks:
        block.attn1.set_attention_backend(name)
    structlog.get_logger().debug("attention_chosen", backend=name, why=why, error=round(error, 5))
    return {"attention": name, "attention_why": why, "attention_error": round(error, 5)}
