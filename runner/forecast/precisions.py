"""GEMM precisions: list the precisions of the transformer's large matrix products, one row each.

Out: `PRECISIONS`, and which of them a GPU should use.
Never: torch, devices, layers. Dtypes and backends are names, which `quantization.kernels.low_bit` resolves.

A precision is a suffix of a recipe's name (`+fp8`). To add one, write a row here, and its backends in
`quantization/kernels/`. A precision is not a storage format: weights stored in the format `nvfp4`
(`quantization/formats/e2m1.py`) compute in any precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = [
    "DEFAULT_PRECISION",
    "PRECISIONS",
    "REFERENCE",
    "Capability",
    "GemmBackend",
    "GemmPrecision",
    "advised",
    "device_rates",
    "fastest_first",
]

Capability = tuple[int, int]  # of CUDA: (9, 0) for an H200
REFERENCE: Final = "reference"  # the backend that defines a precision's numbers, in plain arithmetic on any device
DEFAULT_PRECISION: Final = "bf16"


@dataclass(frozen=True)
class GemmBackend:
    """One implementation of a product. Records have its `name`; `function` is `module:function`."""

    name: str
    function: str


@dataclass(frozen=True)
class GemmPrecision:
    """One row. Errors are relative: a layer's output against its 16-bit result, with gaussian weights and activations.

    Of the activations 0.5 % of the channels are thirty times as large. The tests of the kernels measure the errors.

    `layout` of both operands: `exact`: not quantised. `rows`: codes with a float32 scale per row (per token, per output
    channel). `blocks`: the blocks of the weight's storage format. `svdq`: groups on both sides and a low-rank part in
    16 bits, of a weight that is stored so; each of these layers has a smoothing factor and quantises its input itself.
    """

    name: str
    layout: Literal["exact", "rows", "blocks", "svdq"]
    dtype: str  # of a code, as torch names it
    runs_on: Callable[[Capability], bool]  # the GPU has units for these numbers, at a useful rate
    largest: float = 0.0  # magnitude of a code
    rotated: bool = False  # both operands are multiplied by an orthogonal matrix before they are rounded
    multiples: tuple[int, int] = (1, 1)  # of a layer's inputs and outputs
    stored_format: str | None = None  # the format that the weights must be stored in; None: any
    reference: GemmBackend | None = None
    backends: tuple[GemmBackend, ...] = ()  # on CUDA, best first
    activation_error: float = 0.0
    weight_error: float = 0.0  # of rounding 4-bit weights to this precision; 0 if they are used unchanged
    # The largest relative difference of a kernel from the reference. Rounding its result to 16 bits is .0017. Hopper's
    # fast sums of e4m3, which keep 14 bits, are .003 off at 13,824 columns, by a model of them.
    agreement: float = 0.01
    visible: bool = False  # its error is visible in the frames: used only if requested by name, never chosen
    tensor_scale: bool = False  # per-tensor scaling of activations: rows quantised separately get other codes
    code_bytes: int = 0  # bytes of a code in rows: of an activation at an eager block's peak, of a kept weight
    # Peak memory of one compiled block, in units of its hidden states [S, d], at 14B shapes. It includes the input that
    # the caller keeps, and excludes attention's scratch memory. Counted in Inductor's code of the block (torch 2.13),
    # except where a comment gives another source. The default is an assumption: twice the inside of the feed-forward
    # part, 2 + 2 x 2.7.
    fused_units: float = 7.4
    # Bytes of memory traffic for each activation number that is quantised, beyond the traffic of the bf16 block.
    activation_traffic: float = 0.0
    # Bytes per number inside the feed-forward part that a separate GELU pass moves, if the kernel for codes does GELU.
    gelu_traffic: float = 0.0
    # Whether FP4 weights are dequantised to 16 bits before the product; and bytes of memory traffic per weight after
    # that, including the `code_bytes` that the product reads. With kept codes only these `code_bytes` remain.
    dequantized: bool = True
    weight_traffic: float = 0.0
    advised_on: Callable[[Capability], bool] = lambda capability: False
    rates: Mapping[str, float] = field(default_factory=dict)  # device of `seconds.DEVICES` → TFLOP/s, large products
    estimated: frozenset[str] = frozenset()  # the devices among these whose rate was not measured with this product
    # Only for `svdq`, weights and activations alike: bytes of group scales per code of half a byte; and 16-bit numbers
    # beside a weight for each of its inputs and each of its outputs.
    group_bytes: float = 0.0
    vectors: tuple[int, int] = (0, 0)

    @property
    def error_limit(self) -> float:
        """The self-test's limit: both errors, taken as independent, plus a quarter for non-gaussian weights."""
        return 1.25 * (self.activation_error**2 + self.weight_error**2) ** 0.5

    def find_backend(self, name: str) -> GemmBackend | None:
        """Return the backend of this name, which may be the reference; None if there is none."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        return self.reference if name == REFERENCE else None

    def problem_of_shape(self, out_features: int, in_features: int) -> str | None:
        """Return why a layer of this shape cannot use this precision; None if it can."""
        inner, outer = self.multiples
        if in_features % inner or out_features % outer:
            return f"[{out_features}, {in_features}] is no multiple of [{outer}, {inner}]"
        return None


_SVDQ_PRODUCTS: Final = "runner.quantization.kernels.svdq_products"
# Kernels round differently when they divide by the smoothing factor and by scales, so single codes differ by one: .023
# by emulation (x / s in float32; reciprocals in bfloat16), and as much by comfy-kitchen's arithmetic on a CPU. Without
# the low-rank part the difference is .3 or more.
_SVDQ_AGREEMENT: Final = 0.05
_ROWS_REFERENCE: Final = GemmBackend(REFERENCE, "runner.quantization.kernels.rowwise:reference")

PRECISIONS: Final[Mapping[str, GemmPrecision]] = {
    row.name: row
    for row in (
        GemmPrecision(
            "bf16",
            layout="exact",
            dtype="bfloat16",
            fused_units=6.0,
            runs_on=lambda capability: True,
            rates={"RTX 5090": 240, "RTX 4090": 160, "L40S": 270, "A100": 267, "H200": 763, "H100": 763},
        ),
        GemmPrecision(
            "fp8",
            layout="rows",
            dtype="float8_e4m3fn",
            largest=448.0,
            multiples=(16, 16),
            reference=_ROWS_REFERENCE,
            backends=(GemmBackend("scaled_mm", "runner.quantization.kernels.rowwise:rowwise"),),
            activation_error=0.027,
            weight_error=0.0275,
            code_bytes=1,
            fused_units=6.05,  # 2 of hidden states, 2.7 inside the feed-forward part, 1.35 of its codes
            # The norm's kernel writes the codes. Counted in generated code: 430 GB a step at 832x480x81, bf16's 400.
            activation_traffic=0.55,
            weight_traffic=4.0,  # quantise: 2 read, 1 written; the product reads 1 (kernels/low_bit.py)
            runs_on=lambda capability: capability >= (8, 9),
            # GeForce 8.9 and 12.0: int8 GEMM has twice the throughput of fp8. L40S: both have the same.
            advised_on=lambda capability: capability[0] in (9, 10, 11),
            rates={"RTX 5090": 390, "RTX 4090": 300, "L40S": 500, "H200": 1085, "H100": 1085},
        ),
        GemmPrecision(
            "int8",
            layout="rows",
            dtype="int8",
            largest=127.0,
            rotated=True,
            multiples=(16, 16),
            reference=_ROWS_REFERENCE,
            backends=(
                GemmBackend("comfy_kitchen", "runner.quantization.kernels.rowwise:comfy_kitchen"),
                GemmBackend("int_mm", "runner.quantization.kernels.rowwise:int_mm"),
            ),
            activation_error=0.012,
            weight_error=0.0088,
            code_bytes=1,
            fused_units=6.05,  # 2 of hidden states, 2.7 inside the feed-forward part, 1.35 of its codes
            # A separate operator, which is not fused with the kernel before. GELU, rotate, quantise: 2 read, 1 written.
            activation_traffic=3.0,
            gelu_traffic=4.0,  # 2 read, 2 written
            weight_traffic=4.0,  # rotate and quantise: 2 read, 1 written; the product reads 1
            # On 10.x and 11.x the rate of int8 is a fraction of fp8's.
            runs_on=lambda capability: capability >= (8, 0) and capability[0] not in (10, 11),
            advised_on=lambda capability: capability >= (8, 0) and capability[0] not in (9, 10, 11),
            rates={"RTX 5090": 580, "RTX 4090": 540, "L40S": 500, "A100": 464, "H200": 1160, "H100": 1160},
        ),
        GemmPrecision(
            "nvfp4",
            layout="blocks",
            dtype="float4_e2m1fn_x2",
            largest=6.0,
            multiples=(32, 16),
            stored_format="nvfp4",
            visible=True,
            tensor_scale=True,
            reference=GemmBackend(REFERENCE, "runner.quantization.kernels.nvfp4:reference"),
            backends=(GemmBackend("scaled_mm", "runner.quantization.kernels.nvfp4:block_scaled"),),
            activation_error=0.090,
            activation_traffic=0.55,  # an assumption: as fp8, the norm's kernel writes the codes
            dequantized=False,
            weight_traffic=0.13,  # its scales are rearranged for the product: read and written
            runs_on=lambda capability: capability[0] in (10, 12),
            rates={"RTX 5090": 1140},
        ),
        GemmPrecision(
            "svdq-int4",
            layout="svdq",
            dtype="int8",
            largest=7.0,
            stored_format="svdq-int4",
            visible=True,
            reference=GemmBackend(REFERENCE, f"{_SVDQ_PRODUCTS}:reference"),
            backends=(
                GemmBackend("cache_dit", f"{_SVDQ_PRODUCTS}:cache_dit"),
                GemmBackend("comfy_kitchen", f"{_SVDQ_PRODUCTS}:comfy_kitchen"),
            ),
            # Against 16 bits with the stored weight, [5120, 5120], with the self-test's activations: .165 to .171 for a
            # layer smoothed by its weight alone, which does not know their outliers; .06 if calibrated on them.
            activation_error=0.17,
            agreement=_SVDQ_AGREEMENT,
            group_bytes=2 / 64,  # bfloat16
            vectors=(1, 0),  # the smoothing factor
            # Derived, during the feed-forward part's second product, one operator: 2 for hidden states, 2.7 for its
            # input, .72 for the input's codes with scales, .01 for the low-rank part, 1 for its output.
            fused_units=6.43,
            activation_traffic=2.5 + 2 / 64,  # by a separate kernel: 2 read, half a byte and the scales written
            dequantized=False,
            weight_traffic=0.5 + 2 / 64,  # the product reads them as they are stored
            # Architectures that the kernels were compiled for; Hopper and sm_100 have no units for integers of 4 bits.
            runs_on=lambda capability: capability in ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1)),
            # RTX 5090: published, of the instruction alone, which is emulated there (main-horse.github.io, "5090 mm
            # perf"): a bound. The others are estimates, for no rate of these kernels is published.
            # RTX 4090: FLUX.1's transformer takes 218 ms (nunchaku, issue 66). Of its 59.5 TFLOP in products at 4,608
            # tokens, 470 TFLOP/s are left if only attention's 91 ms are taken off, 1,040 if this module's elementwise
            # work and codes are too: the geometric mean. L40S: that, as its int8 is to the RTX 4090's.
            # A100: converting sums of 4-bit products to floats is the bottleneck there. A kernel with groups of 128 has
            # .45 of the 16-bit rate (arXiv 2606.08761); FLUX.1 in nunchaku takes .91 of bf16's time (its issue 64),
            # so bf16's rate is an upper bound. The rate is the geometric mean of both, 120 and 267.
            rates={"RTX 5090": 79, "RTX 4090": 700, "L40S": 650, "A100": 180},
            estimated=frozenset({"RTX 4090", "L40S", "A100"}),
        ),
        GemmPrecision(
            "svdq-nvfp4",
            layout="svdq",
            dtype="float4_e2m1fn_x2",
            largest=6.0,
            stored_format="svdq-nvfp4",
            visible=True,
            reference=GemmBackend(REFERENCE, f"{_SVDQ_PRODUCTS}:reference"),
            backends=(
                GemmBackend("cache_dit", f"{_SVDQ_PRODUCTS}:cache_dit"),
                GemmBackend("scaled_mm", f"{_SVDQ_PRODUCTS}:scaled_mm"),
            ),
            activation_error=0.075,  # as above: .068 to .074; calibrated .04
            agreement=_SVDQ_AGREEMENT,
            group_bytes=1 / 16,  # e4m3
            vectors=(1, 1),  # the smoothing factor, and a factor a row
            fused_units=6.47,  # as int4's, .76 of codes with scales
            activation_traffic=2.5 + 1 / 16,
            dequantized=False,
            weight_traffic=0.5 + 1 / 16,
            runs_on=lambda capability: capability in ((12, 0), (12, 1)),
            # An estimate: nunchaku's kernel, low-rank part and bias in it, measured on an RTX PRO 6000 Blackwell at
            # four shapes of 4,352 rows in bf16: 708, 988, 1,220 and 1,008 TFLOP/s (ultism/svdquant-kernels); their
            # mean, by the nominal rates of both cards, 1,676 and 2,000.
            rates={"RTX 5090": 820},
            estimated=frozenset({"RTX 5090"}),
        ),
    )
}


def advised(capability: Capability | None) -> str:
    """Return the precision to recommend on this GPU; `bf16` if none is faster, and on a CPU (None)."""
    if capability is None:
        return DEFAULT_PRECISION
    return next((row.name for row in PRECISIONS.values() if row.advised_on(capability)), DEFAULT_PRECISION)


def fastest_first(capability: Capability | None) -> tuple[str, ...]:
    """Return the precisions to try for speed: the advised one, then others that the device has units for, `bf16` last.

    Precisions with a visible error are left out. On a CPU (None) nothing is faster than `bf16`, the recipe's precision.
    """
    best = advised(capability)
    if capability is None or best == DEFAULT_PRECISION:
        return (DEFAULT_PRECISION,)
    others = (r.name for r in PRECISIONS.values() if r.layout != "exact" and not r.visible and r.runs_on(capability))
    return (best, *(name for name in others if name != best), DEFAULT_PRECISION)


def device_rates(device: str) -> dict[str, float]:
    """Return precision → TFLOP/s of large products on a device of `seconds.DEVICES`; others do not run there."""
    return {row.name: row.rates[device] for row in PRECISIONS.values() if device in row.rates}
