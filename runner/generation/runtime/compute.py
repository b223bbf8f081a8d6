"""Compute: set the GEMM precision of the transformer's large matrix products, and test it on the model's weights.

In:   a loaded transformer, a recipe, a device. Out: layers that compute in that precision; a report for log and record.
Never: a silent change of the requested precision: one that this device cannot compute, or computes wrong, is an error.

`forecast/precisions.py` lists the precisions and their devices. On a CPU each runs as the definition of its numbers,
for tests and demos.

Only token-wise linears take part: of a block the four of self-attention, query and output of cross-attention, and the
two of the feed-forward part; of a face adapter query and output. They are 99 % of the linears' work. Keys and values of
text, image and face, embedders, the layers of the timestep and the last projection stay exact.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog

from runner.errors import ConfigInvalid
from runner.forecast.precisions import DEFAULT_PRECISION, PRECISIONS, REFERENCE, Capability, advised

if TYPE_CHECKING:
    import torch

    from runner.spec.recipes import Recipe

__all__ = [
    "GemmChoice",
    "apply_precision",
    "capability_of",
    "decide",
    "is_token_wise",
    "self_test",
]

TOKEN_WISE: Final = re.compile(
    r"blocks\.\d+\.(attn1\.to_[qkv]|attn[12]\.to_out\.0|attn2\.to_q|ffn\.net\.0\.proj|ffn\.net\.2)"
    r"|face_adapter\.\d+\.to_(q|out)"
)
TEST_TOKENS: Final = 1024
OUTLIERS, OUTLIER_SIZE = 0.005, 30.0  # of the channels of the test's activations, and how many times larger these are


@dataclass(frozen=True)
class GemmChoice:
    """A GEMM precision, `compute` (a row of `PRECISIONS`), and the name of its backend; empty for exact products."""

    compute: str
    backend: str
    why: str


def capability_of(device: torch.device) -> Capability | None:
    """Return the compute capability: (9, 0) for an H200; None for a CPU."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_capability(device)


def decide(
    compute: str, capability: Capability | None, probed: tuple[str | None, str], formats: Iterable[str], device: str
) -> GemmChoice:
    """Return the precision and backend, and why. Pure.

    `capability`: None for a CPU. `probed`: (the backend that passed its test, or None; why), used for 8- and 4-bit
    precisions only. `formats`: of the layers that take part: a format's name, or `plain` for 16 and 32 bits.
    Raises ConfigInvalid if the device or the weights cannot do what was requested.
    """
    precision = PRECISIONS[compute]
    if precision.layout == "exact":
        return GemmChoice(compute, "", "exact: the recipe's own precision")
    instead = f"leave out +{compute}"
    better = advised(capability)
    if better not in (DEFAULT_PRECISION, compute):
        instead += f", or ask for +{better}"
    if capability is not None and not precision.runs_on(capability):
        raise ConfigInvalid(
            f"precision {compute!r} was asked for, but {device} (sm_{capability[0]}{capability[1]}) has no "
            "fast units for it",
            todo=f"For this device {instead}",
        )
    stored = precision.stored_format
    other = sorted(set(formats) - {stored})
    if stored is not None and other:
        raise ConfigInvalid(
            f"precision {compute!r} needs weights stored as {stored}; these are {', '.join(other)}",
            todo=f"Make a file with `video-lab quantize --format {stored}`, or {instead}",
        )
    bound = sorted(name for name in set(formats) & PRECISIONS.keys() if PRECISIONS[name].layout == "svdq")
    if stored is None and bound:
        raise ConfigInvalid(
            f"precision {compute!r} was asked for, but weights stored as {bound[0]} run as {bound[0]} or in 16 bits",
            todo=f"Ask for +{bound[0]}, or leave out +{compute}",
        )
    backend, why = probed
    if backend is None:
        missing = "the extra `svdq`" if precision.layout == "svdq" else "comfy-kitchen or a newer torch for CUDA"
        raise ConfigInvalid(
            f"precision {compute!r} was asked for, but no backend here computes it right on {device}: {why}",
            todo=f"Install {missing}, or {instead}",
        )
    return GemmChoice(compute, backend, why)


def is_token_wise(name: str) -> bool:
    """Return whether the layer of this name is applied to every token of the window."""
    return TOKEN_WISE.fullmatch(name) is not None


def apply_precision(model: Any, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Set the GEMM precision of `model`'s token-wise linears; report the choice, why, and the self-test's numbers.

    Call it when the weights are loaded, on any device. The recipe's `bf16` changes nothing. Raises ConfigInvalid as
    `decide` does, or if an error exceeds the format's limit.
    """
    import torch
    from torch import nn

    from runner.quantization.kernels.low_bit import EXACT, LowBitLinear, pick_gemm_backend
    from runner.quantization.linear import FP4Linear
    from runner.quantization.svdq_linear import SvdqLinear

    log, compute = structlog.get_logger(), recipe.compute
    precision = PRECISIONS[compute]
    if precision.layout == "exact":
        choice = decide(compute, capability_of(device), (None, ""), (), str(device))
        for layer in model.modules():
            if isinstance(layer, FP4Linear | LowBitLinear | SvdqLinear):
                layer.set_compute(EXACT)
        return {"compute": choice.compute, "compute_why": choice.why}
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if is_token_wise(name)
        and (isinstance(layer, FP4Linear | LowBitLinear | SvdqLinear) or type(layer) is nn.Linear)
    }
    formats = {_format_name(layer) for layer in layers.values()}
    choice = decide(compute, capability_of(device), pick_gemm_backend(device, compute), formats, str(device))
    kept: dict[str, str] = {}
    for name, layer in layers.items():
        problem = precision.problem_of_shape(layer.out_features, layer.in_features)
        if problem is not None:
            kept[name] = problem
        elif isinstance(layer, FP4Linear | LowBitLinear | SvdqLinear):
            layer.set_compute(choice.compute, choice.backend)
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, LowBitLinear(layer, choice.compute, choice.backend))
    changed = {name: model.get_submodule(name) for name in layers if name not in kept}
    if not changed:
        raise ConfigInvalid(
            f"precision {compute!r} fits none of this model's {len(layers)} token-wise linears: "
            f"{next(iter(kept.values()), 'it has none')}",
            todo=f"Leave out +{compute}",
        )
    tested = self_test(changed, choice, device, getattr(torch, recipe.dtype))
    report = {
        "compute": choice.compute,
        "compute_product": choice.backend,
        "compute_why": choice.why,
        "compute_layers": len(changed),
        "compute_rows": _name_code_kernel(choice, device),
        "compute_kept_exact": len(kept),
        "compute_self_test": tested,
    }
    worst = max(entry["error"] for entry in tested.values())
    log.debug(
        "compute_chosen", compute=choice.compute, product=choice.backend, why=choice.why, layers=len(changed),
        kept_exact=len(kept), error=worst, limit=round(precision.error_limit, 4),
    )  # fmt: skip
    return report


def _name_code_kernel(choice: GemmChoice, device: torch.device) -> str:
    """Return the kernel that quantises activations, and why that one; empty if the product does it itself."""
    from runner.quantization.kernels.row_codes import name_row_kernel
    from runner.quantization.kernels.svdq_products import name_code_kernel

    match PRECISIONS[choice.compute].layout:
        case "rows":
            return name_row_kernel(device, choice.compute)
        case "svdq":
            return name_code_kernel(device, choice.backend)
        case _:
            return ""


def _format_name(layer: Any) -> str:
    """Return the name of the format in which a layer's weight is stored; `plain` for 16 and 32 bits."""
    fmt = getattr(layer, "fmt", None) or getattr(layer, "layout", None)
    return "plain" if fmt is None else str(fmt.name)


def self_test(
    layers: Mapping[str, Any], choice: GemmChoice, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Test one layer of each shape on activations with outlier channels; return relative errors by the layer's name.

    error: against the layer's exact product. off_definition: of the kernel against the format's definition, which must
    be within the precision's `agreement`. Raises ConfigInvalid with the numbers if either is too large. Afterwards the
    layers compute by `choice`. An SVDQ layer gets activations that are scaled in each channel by its smoothing factor,
    as calibration found them: it spends no codes on channels that were small there.
    """
    import torch

    from runner.quantization.kernels.low_bit import EXACT, relative_error
    from runner.quantization.svdq_linear import SvdqLinear

    first = {(layer.out_features, layer.in_features): name for name, layer in reversed(list(layers.items()))}
    precision, found = PRECISIONS[choice.compute], dict[str, dict[str, float]]()
    limit, agreement = precision.error_limit, precision.agreement
    for (rows, columns), name in sorted(first.items()):
        layer = layers[name]
        if any(p.device.type != device.type for p in layer.parameters()):
            layer = copy.deepcopy(layer).to(device)  # the original stays on its offload device
        x = activations(TEST_TOKENS if device.type == "cuda" else TEST_TOKENS // 4, columns, device, dtype)
        if isinstance(layer, SvdqLinear):
            x = (x * layer.smoothing).to(dtype)
        with torch.no_grad():
            exact = _run_with(layer, x, EXACT, "")
            defined = _run_with(layer, x, choice.compute, REFERENCE)
            low = _run_with(layer, x, choice.compute, choice.backend)
        error, off = relative_error(low, exact), relative_error(low, defined)
        found[name] = {"error": round(error, 5), "limit": round(limit, 5), "off_definition": round(off, 5)}
        if not (error <= limit and off <= agreement):
            raise ConfigInvalid(
                f"precision {choice.compute!r} by {choice.backend} is not right on {device}: on {name} "
                f"[{rows}, {columns}] its error is {error:.4f} ({limit:.4f} allowed), {off:.4f} off the format's "
                f"definition ({agreement} allowed)",
                todo=f"Leave out +{choice.compute}; please report this device and its driver",
            )
    return found


def _run_with(layer: Any, x: torch.Tensor, compute: str, backend: str) -> torch.Tensor:
    layer.set_compute(compute, backend)
    result: torch.Tensor = layer(x)
    return result


def activations(tokens: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return gaussian [tokens, columns], the same on every device; at least one channel is thirty times as large."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[: max(1, round(columns * OUTLIERS))]] *= OUTLIER_SIZE
    return x.to(device, dtype)
