"""Attention: choose the implementation of self-attention for a device, after a trial that it must pass.

In:   a loaded transformer, a device, a dtype. Out: processors that name a backend; the choice and its reason.
Never: cross-attention and the faces' attention: they are 2 % of the work and keep the library's default.

BACKENDS has a row for each implementation, best first. On sm_90 cuDNN reaches twice the rate of torch's flash kernels;
elsewhere it is slower than they are. Self-attention in 8 bits runs if it is requested: by comfy-kitchen's INT8 kernel,
which the GPU image has, else by SageAttention 2.1.1 or later, which must be built. Its error against exact attention is
measured in a trial with the model's shape and is written to the record.

Kernels of other packages are opaque to torch.compile: a custom operator wraps each call. The packages call
`torch.cuda.set_device`, functions under `torch.compiler.disable`, or pybind kernels. No graph can contain these, and a
block is compiled as one graph or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

import structlog
import torch
from diffusers.models import attention_dispatch as dispatch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from runner.errors import ConfigInvalid

__all__ = [
    "BACKENDS",
    "LIMITS",
    "AttentionBackend",
    "apply_attention",
    "available_backends",
    "candidates",
    "pick_backend",
    "run_attention",
    "set_backend",
    "trial",
]

Capability = tuple[int, int]
# Relative error of the output against float32 on gaussian input. Two bfloat16 roundings are .003 together.
LIMITS: Final[Mapping[str, float]] = MappingProxyType({"exact": 0.01, "8 bit": 0.06})
TRIAL_TOKENS: Final = 2 * 1024 + 40  # no multiple of any tile
HALVES: Final = frozenset({"bfloat16", "float16"})
EVERY: Final = HALVES | {"float32"}


def by_diffusers(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention by diffusers' dispatch, with the backend of this name."""
    return dispatch.dispatch_attention_fn(query, key, value, backend=dispatch.AttentionBackendName(name))


def by_cudnn(_: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention by torch from strided views; diffusers would copy query, key and value first."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = functional.scaled_dot_product_attention(_heads_first(query), _heads_first(key), _heads_first(value))
    return _heads_first(out)


def by_comfy_kitchen(_: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """INT8 query, key, value and weights, softmax in float32. Query and key are rotated before they are rounded.

    The kernel takes [B, heads, S, head_dim] with any strides whose last is 1, and head_dim up to 256.
    """
    attend = import_module("comfy_kitchen").int8_attention
    return _heads_first(attend(_heads_first(query), _heads_first(key), _heads_first(value)))


def _heads_first(x: Tensor) -> Tensor:
    """[B, S, heads, head_dim] ↔ [B, heads, S, head_dim], a view."""
    return x.transpose(1, 2)


@dataclass(frozen=True)
class BackendRow:
    """One implementation of attention without mask, [B, S, heads, head_dim] → the same.

    `name`: in records and on a processor. `call`: takes the name, query, key and value. `opaque`: whether torch.compile
    treats the call as one operator; else it traces the library's call. `capabilities`: of the devices that it is for;
    None is a CPU. `dtypes`: of query, key and value. `why`: for the record. `package`: what must be installed beside
    torch; `install`: how.
    """

    name: str
    call: Callable[[str, Tensor, Tensor, Tensor], Tensor]
    opaque: bool
    eight_bit: bool
    capabilities: Callable[[Capability | None], bool]
    dtypes: frozenset[str]
    why: str
    package: str = ""
    install: str = ""


def _within(least: Capability, most: Capability, but: Capability | None = None) -> Callable[[Capability | None], bool]:
    return lambda capability: capability is not None and least <= capability <= most and capability != but


HOPPER: Final = (9, 0)
LATEST: Final = (99, 9)
SAGE: Final = partial(
    BackendRow,
    call=by_diffusers,
    opaque=True,
    eight_bit=True,
    dtypes=HALVES,
    why="asked for; SageAttention is installed",
    package="SageAttention 2.1.1 or later",
    install="build SageAttention from its repository (the package index has 1.0.6 only)",
)
ROWS: Final = (
    BackendRow(
        "_flash_3", by_diffusers, True, False, _within(HOPPER, HOPPER), HALVES,
        "FlashAttention 3 is installed, made for sm_90", "FlashAttention 3",
    ),
    # Opaque because cuDNN's plan decides the strides of the output, which Inductor would assert.
    BackendRow(
        "_native_cudnn", by_cudnn, True, False, _within(HOPPER, HOPPER), HALVES,
        "cuDNN is faster than torch's flash kernels on sm_90",
    ),
    BackendRow(
        "_native_flash", by_diffusers, False, False, _within((0, 0), LATEST), HALVES,
        "torch's flash kernels, the fastest except on sm_90",
    ),
    BackendRow(
        "native", by_diffusers, False, False, lambda _: True, EVERY, "torch's own choice for this device and dtype",
    ),
    BackendRow(
        "comfy_int8", by_comfy_kitchen, True, True, _within((7, 5), (12, 9)), HALVES,
        "asked for; comfy-kitchen has an INT8 kernel for 7.5 to 12.x",
        "comfy-kitchen 0.2.40 with int8_attention", "install it with pip install 'video-lab-runner[gpu]'",
    ),
    # On sm_90 the package chooses its fp8 kernel by default, which has produced noise on Wan models.
    SAGE(name="_sage_qk_int8_pv_fp16_cuda", capabilities=_within(HOPPER, HOPPER)),
    SAGE(name="sage", capabilities=_within((8, 0), LATEST, but=HOPPER)),
)  # fmt: skip
BACKENDS: Final[Mapping[str, BackendRow]] = MappingProxyType({row.name: row for row in ROWS})
OPAQUE: Final = frozenset(row.name for row in ROWS if row.opaque)


def run_attention(query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Tensor:
    """Attention of `query` [B, S, heads, head_dim] to `key` and `value` [B, T, heads, head_dim], without mask.

    `backend`: as set on a processor; None: the library's default.
    """
    if backend in OPAQUE:
        return opaque_attention(query, key, value, backend)
    found: Tensor = dispatch.dispatch_attention_fn(query, key, value, backend=backend)
    return found


@torch.library.custom_op("video_lab::attention", mutates_args=())
def opaque_attention(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    """Run a row of BACKENDS as `run_attention` does. Returns contiguous [B, S, heads, head_dim]."""
    return BACKENDS[backend].call(backend, query, key, value).contiguous()


@opaque_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class AttentionBackend:
    """`name`: a row of BACKENDS, and why this one."""

    name: str
    why: str


def candidates(
    capability: Capability | None, dtype: str, available: Collection[str], eight_bit: bool = False
) -> list[AttentionBackend]:
    """Return the backends to try, best first. The last exact one always works. Pure.

    `capability`: (9, 0) for an H200, None for a CPU. `available`: names whose packages are installed. Raises
    ConfigInvalid if 8 bits are requested and no backend here has them.
    """
    rows = _rows(capability, dtype, eight_bit)
    found = [AttentionBackend(row.name, row.why) for row in rows if row.name in available]
    if not found and not rows:
        raise ConfigInvalid(
            "8-bit attention needs a CUDA device of capability 7.5 or later and a model in 16 bits",
            todo="Leave it out: then attention is exact",
        )
    if not found:
        raise ConfigInvalid(
            f"8-bit attention was asked for, but no backend for it is here: {'; '.join(_lacking(rows, available))}",
            todo=_remedy(rows),
        )
    return found


def _rows(capability: Capability | None, dtype: str, eight_bit: bool) -> list[BackendRow]:
    return [r for r in ROWS if r.eight_bit == eight_bit and r.capabilities(capability) and dtype in r.dtypes]


def _lacking(rows: Collection[BackendRow], available: Collection[str]) -> list[str]:
    return [f"{row.package} is not installed" for row in rows if row.package and row.name not in available]


def _remedy(rows: Collection[BackendRow]) -> str:
    ways = [*(row.install for row in rows if row.install), "leave it out: then attention is exact"]
    text = ", or ".join(ways)
    return text[:1].upper() + text[1:]


def available_backends() -> frozenset[str]:
    """Return the names of backends whose packages are installed, without those that diffusers downloads (`*_hub`)."""
    found = {"native"}
    for backend in dispatch.AttentionBackendName:
        if backend.value.endswith("_hub"):
            continue
        try:
            dispatch._check_attention_backend_requirements(backend)
        except RuntimeError:
            continue
        found.add(backend.value)
    if _has_comfy_int8():
        found.add("comfy_int8")
    return frozenset(found)


def _has_comfy_int8() -> bool:
    """Return whether the function exists. The trial tests whether its CUDA extension loads and takes this device."""
    try:
        return hasattr(import_module("comfy_kitchen"), "int8_attention")
    except (ImportError, OSError, RuntimeError):  # raised if it was built for another torch or CUDA
        return False


def pick_backend(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, *, eight_bit: bool = False
) -> tuple[str, str, float]:
    """Return (name, why, relative error in the trial) of the first candidate that passes its trial on `device`.

    Raises ConfigInvalid if 8 bits were requested, and are not available or exceed their limit.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    dtype_name = str(dtype).removeprefix("torch.")
    limit, refused, available = LIMITS["8 bit" if eight_bit else "exact"], list[str](), available_backends()
    for backend in candidates(capability, dtype_name, available, eight_bit):
        try:
            error = trial(backend.name, device, dtype, heads, head_dim)
        # A kernel, a driver or a package may raise anything: then the next candidate is tried, and this reason kept.
        except Exception as err:
            text = str(err).strip()
            refused.append(f"{backend.name} refused: {type(err).__name__}: {text.splitlines()[0] if text else ''}")
            continue
        if error <= limit:
            return backend.name, "; ".join([backend.why, *refused]), error
        refused.append(f"{backend.name} refused: error {error:.4f}, {limit} allowed")
    rows = _rows(capability, dtype_name, eight_bit)
    if eight_bit:
        refused += _lacking(rows, available)
    raise ConfigInvalid(
        f"no {'8-bit ' if eight_bit else ''}attention backend passes its trial on {device}: {'; '.join(refused)}",
        todo=_remedy([r for r in rows if r.name not in available])
        if eight_bit
        else "Check the driver and the installed torch",
    )


def trial(backend: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> float:
    """Return the relative error of `backend` against float32 attention, on a seeded input of up to four heads."""
    from runner.quantization.kernels.low_bit import relative_error

    tokens = TRIAL_TOKENS if device.type == "cuda" else 40
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, min(heads, 4), head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    with torch.no_grad():
        found = run_attention(query, key, value, backend)
        q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
        weights = (q @ k.transpose(2, 3) * head_dim**-0.5).softmax(dim=-1)
        wanted = (weights @ v).transpose(1, 2)
    return relative_error(found, wanted)


def set_backend(attn: Any, name: str) -> None:
    """Set the backend on one attention's processor. Names of the library stay members of its enumeration."""
    if name in OPAQUE:
        attn.processor._attention_backend = name  # the library does not know all of them
    else:
        attn.set_attention_backend(name)


def apply_attention(model: Any, device: torch.device, dtype: torch.dtype, *, eight_bit: bool = False) -> dict[str, Any]:
    """Set the backend on every block's self-attention; report the choice. Raises as `pick_backend`."""
    first = model.blocks[0].attn1
    heads = first.heads
    name, why, error = pick_backend(device, dtype, heads, first.inner_dim // heads, eight_bit=eight_bit)
    for block in model.blocks:
        set_backend(block.attn1, name)
    structlog.get_logger().debug("attention_chosen", backend=name, why=why, error=round(error, 5))
    return {"attention": name, "attention_why": why, "attention_error": round(error, 5)}
