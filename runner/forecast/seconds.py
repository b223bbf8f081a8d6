"""Seconds: forecast how long a known GPU takes for a plan, from the models' shapes and the GPU's rates.

In:   shapes, a window, the settings of the engine. Out: seconds by part: a forecast, never a measurement.
Never: torch, a device. The rates are published measurements of large kernels, or estimates, which are marked. The
record has the forecast beside the seconds that a job took; `bench/engine.py` shows it beside measured rates.

One denoising step is forecast as matrix products at the rate of their precision, self-attention at its kernel's rate,
and memory traffic: elementwise work between them, and the quantisation of activations and weights. SVDQuant's low-rank
part adds products in 16 bits; nunchaku's kernels need no extra memory traffic for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from runner.forecast.bytes import SVDQ_RANK, vae_traffic
from runner.forecast.flops import TERA, Costs
from runner.forecast.precisions import DEFAULT_PRECISION, PRECISIONS, Capability, device_rates

__all__ = ["DEVICES", "DeviceSpeed", "EngineBuild", "Seconds", "find_device", "forecast_seconds"]

# Bytes that elementwise kernels read and write per channel and token in one block. Eager, each operation alone: 66 GB
# per block at 34,320 tokens x 5,120. Fused between the products: 10.0 GB, counted in the eight Triton kernels that
# Inductor (torch 2.13) writes for the 14B block in bf16. Face adapters, 4 % of that, are not counted.
EAGER_BYTES, FUSED_BYTES = 375, 57
# Bytes per weight for dequantisation. One pass: 4.5 bits read, two bytes written. Stepwise: each step is a tensor.
ONE_PASS_BYTES, STEPWISE_BYTES = 2.5625, 34.0
# The rate of the autoencoder's convolutions, without memory traffic, as a share of the bf16 product's rate: in float32
# (TF32) and in 16 bits. Derived: published decoding times (14.5 s in float32, 8.4 s in bfloat16, same work) are .16 and
# .27 of that rate, including the traffic of the library's code, 3,309 and 2,443 GB per window. Without this traffic, by
# the rates below, they are .23 to .25 and .43 to .49 (RTX 5090, RTX 4090, A100, H200): the middle is taken.
VAE_SHARE: Mapping[str, float] = MappingProxyType({"float32": 0.24, "bfloat16": 0.46, "float16": 0.46})
# The same for the motion encoder's small convolutions, eight faces at a time, including their traffic: an estimate.
CONDITIONING_SHARE = 0.15
MEASURED, ESTIMATED = "published measurements", "estimates"  # source of rates; see `GemmPrecision.estimated`


@dataclass(frozen=True)
class DeviceSpeed:
    """Rates of one GPU: large kernels in TFLOP/s, and the copy speed of its memory."""

    name: str
    pattern: str  # regular expression for the driver's name of the device
    matmul: Mapping[str, float]  # GEMM precision → TFLOP/s, from `PRECISIONS`; a missing one does not run there
    attention: float  # bfloat16, head_dim 128, the best backend in torch or diffusers
    attention_8bit: float | None  # queries and keys in eight bits, kernel alone; None: no rate is known
    copy_gb_s: float  # read and written
    source: str = MEASURED
    capability: Capability | None = None  # None: not known

    def estimates(self, compute: str) -> bool:
        """Return whether the rate of products in `compute`, a row of `PRECISIONS`, is an estimate here."""
        return self.source == ESTIMATED or self.name in PRECISIONS[compute].estimated


def _device(
    name: str,
    pattern: str,
    capability: Capability,
    attention: float,
    attention_8bit: float | None,
    copy_gb_s: float,
    source: str = MEASURED,
) -> DeviceSpeed:
    rates = device_rates(name)
    return DeviceSpeed(name, pattern, rates, attention, attention_8bit, copy_gb_s, source, capability)


# Attention on sm_90 is cuDNN's, which the engine uses there: 595 TFLOP/s on an H100 SXM at 16k tokens, head_dim 128,
# without mask (FlashAttention-3, arXiv 2407.08608, figure 5; 617 at 2k). The other rates are read from SageAttention's
# charts at 32k. Its 882 in 8 bits on an H100 are for an fp8 kernel that the engine does not use, because it has
# produced noise on Wan models. For the 8-bit kernels that the engine would use on sm_90 no rate is published.
DEVICES: tuple[DeviceSpeed, ...] = (
    _device("RTX 5090", r"\b5090(?! (D|Laptop))", (12, 0), 214, 554, 1509),
    _device("RTX 4090", r"\b4090(?! (D|Laptop))", (8, 9), 164, 431, 920, "8 bit: estimates"),
    _device("L40S", r"L40S", (8, 9), 164, 431, 780, ESTIMATED),
    _device("A100", r"A100", (8, 0), 204, 278, 1700),
    _device("H200", r"H200|GH200", (9, 0), 595, None, 4055, "attention: of an H100"),
    _device("H100", r"H100", (9, 0), 595, None, 2800, "products: of an H200"),
)


@dataclass(frozen=True)
class EngineBuild:
    """The settings of the engine that decide seconds; the defaults are the engine's on a GPU."""

    compute: str = DEFAULT_PRECISION  # a row of `PRECISIONS`
    fp4: bool = True  # weights are dequantised at every use
    stepwise: bool = False  # by a look-up in steps, as the original scripts do, instead of one pass
    fused: bool = True  # compiled blocks
    shared: bool = True  # a window has a conditioning cache (transformer.py)
    attention_8bit: bool = False
    vae: str = "float32"  # a key of VAE_SHARE
    blank_again: bool = False  # the blank first window is encoded for every job
    codes_kept: bool = False  # the weights' 8-bit codes are kept (memory_plan.py): only the product reads them
    library_walk: bool = False  # the autoencoder runs by the library's code

    def __post_init__(self) -> None:
        if self.codes_kept and PRECISIONS[self.compute].layout != "rows":
            raise ValueError(f"codes cannot be kept for products in {self.compute}")
        if self.vae not in VAE_SHARE:
            raise ValueError(f"vae {self.vae!r}: one of {', '.join(VAE_SHARE)}")


@dataclass(frozen=True)
class Seconds:
    """A job's forecast. `step`: one model evaluation, by part. `fixed`: the job's other work on the device, by part."""

    step: Mapping[str, float]
    evaluations: int  # over all windows
    fixed: Mapping[str, float]

    @property
    def step_s(self) -> float:
        return sum(self.step.values())

    @property
    def total_s(self) -> float:
        return self.evaluations * self.step_s + sum(self.fixed.values())


def find_device(name: str | None) -> DeviceSpeed | None:
    """Return the GPU that `name` means, as a driver or a person writes it; None if it is not in DEVICES."""
    if name is None:
        return None
    return next((d for d in DEVICES if re.search(d.pattern, name, re.IGNORECASE)), None)


def forecast_seconds(
    costs: Costs,
    device: DeviceSpeed,
    build: EngineBuild,
    *,
    size: tuple[int, int],
    segment_frames: int,
    segments: int,
    evaluations: int,
    guided: bool = False,
    blank_from: int | None = None,
) -> Seconds:
    """Forecast the seconds of one job on `device`. `size`: (width, height). `evaluations`: of the model, per window.

    `blank_from`: the frame from which the scene of a window after the first is blank; None: it is not blank.
    Not included: text and image encoders, loading and compilation for a first job, and preprocessing, which runs in
    parallel. Raises ValueError for a precision that the device does not have.
    """
    if build.compute not in device.matmul:
        raise ValueError(f"{device.name} has no {build.compute}; it has {', '.join(device.matmul)}")
    model, calls = costs.transformer, 1 + guided
    window = (*size, segment_frames)
    exact_rate = device.matmul[DEFAULT_PRECISION]
    attention = model.self_attention_flop(*window)
    conditioning = model.conditioning_flop(*window)
    large = model.forward_flop(*window) - attention - conditioning
    rate = device.attention_8bit if build.attention_8bit and device.attention_8bit else device.attention
    precision, rows = PRECISIONS[build.compute], model.num_layers * model.tokens(*window)  # rows: tokens of all blocks
    through_memory = rows * model.dim * (FUSED_BYTES if build.fused else EAGER_BYTES)
    per_weight = (STEPWISE_BYTES if build.stepwise else ONE_PASS_BYTES) if build.fp4 else 0.0
    svdq = precision.layout == "svdq"
    numbers = model.separate_activation_numbers if svdq else model.activation_numbers
    codes = numbers * precision.activation_traffic - model.ffn_dim * precision.gelu_traffic
    if build.codes_kept:
        weights = model.block_weights * float(precision.code_bytes)
    else:
        weights = model.block_weights * (per_weight * precision.dequantized + precision.weight_traffic)
    if not build.shared:  # these linears are always exact
        weights += model.conditioning_weights * per_weight
    step = {
        "products": large / TERA / device.matmul[build.compute],
        "attention": attention / TERA / rate,
        "elementwise": through_memory / device.copy_gb_s / 1e9,
        "activations to codes": rows * codes / device.copy_gb_s / 1e9,
        "weights to the compute": weights / device.copy_gb_s / 1e9,
        "shared work again": 0.0 if build.shared else conditioning / TERA / exact_rate / CONDITIONING_SHARE,
    }
    if svdq:
        step["low-rank part"] = model.low_rank_flop(*window, rank=SVDQ_RANK) / TERA / exact_rate
    encoding, decoding = _autoencoder(costs, device, build, window)
    reference, _ = _autoencoder(costs, device, build, (*size, 1))
    later, _ = _autoencoder(costs, device, build, window, blank_from)
    fixed = {
        # Poses and scenes; the first scene is blank and cached.
        "encode": (segments + build.blank_again) * encoding + (segments - 1) * later + reference,
        "decode": segments * decoding,
        "shared once a window": segments * calls * conditioning / TERA / exact_rate / CONDITIONING_SHARE
        if build.shared
        else 0.0,
    }
    return Seconds({part: calls * s for part, s in step.items()}, segments * evaluations, fixed)


def _autoencoder(
    costs: Costs, device: DeviceSpeed, build: EngineBuild, window: tuple[int, int, int], blank_from: int | None = None
) -> tuple[float, float]:
    """Forecast the seconds of encoding and decoding a window: convolutions and memory traffic.

    `blank_from`: as in `VaeShape.encode_flop`. Operations that are not run move no bytes. Their share of the bytes is
    taken to be their share of the operations, although at full size it is larger.
    """
    rate = device.matmul[DEFAULT_PRECISION] * VAE_SHARE[build.vae] * TERA
    encoding, decoding = vae_traffic(costs.vae, *window, dtype=build.vae, library=build.library_walk)
    copied, whole = device.copy_gb_s * 1e9, costs.vae.encode_flop(*window)
    run = whole if build.library_walk else costs.vae.encode_flop(*window, blank_from)
    return run / rate + encoding / copied * run / whole, costs.vae.decode_flop(*window) / rate + decoding / copied
