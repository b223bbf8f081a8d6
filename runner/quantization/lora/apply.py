"""LoRA: merge LoRAs into a transformer's parameters before quantising, or keep them beside quantised weights.

In:   LoRAs as read.py reads them, and a model or its parameters. Out: the changes of each parameter (`plan_merge`), a
      merged parameter (`merge_param`), or a model that computes as if merged (`attach`, `attached`) and has its former
      bits again afterwards (`detach`).
Never: files, jobs, the names of recipes.

    weight += strength * alpha / rank * up @ down      (1 for alpha / rank where the file has no alpha)
    weight, bias, table += strength * diff

Every tensor of a file is applied, norms and biases included. Tensors without a target in the model are listed; a shape
that contradicts the model is an error. Never merge into quantised weights: most of the change is smaller than their
step and would be lost in rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from runner.errors import WeightsCorrupt
from runner.quantization.lora.read import Delta, Full, Lora, LowRank, parse_deltas, read_lora

__all__ = [
    "Addend",
    "Delta",
    "Full",
    "HoldsCodes",
    "HoldsLora",
    "Lora",
    "LowRank",
    "MergePlan",
    "attach",
    "attached",
    "detach",
    "merge_param",
    "parse_deltas",
    "plan_merge",
    "read_lora",
]

_ATTACHED = "_attached_loras"


@dataclass(frozen=True, eq=False)
class Addend:
    """One delta with its LoRA's name and strength."""

    lora: str
    strength: float
    delta: Delta


@dataclass(frozen=True, eq=False)
class MergePlan:
    """applied: parameter -> its addends, in the order of the LoRAs. untargeted: "LoRA: key", sorted."""

    applied: Mapping[str, tuple[Addend, ...]] = field(default_factory=dict)
    untargeted: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> int:
        """The number of the files' tensors that are applied."""
        return sum(len(addend.delta.keys) for addends in self.applied.values() for addend in addends)


def plan_merge(loras: Sequence[Lora], shapes: Mapping[str, Sequence[int]]) -> MergePlan:
    """Assign the changes of `loras` to a model's parameters. `shapes`: its parameters' names (the library's) -> shapes.

    Raises WeightsCorrupt for a shape that contradicts the model's, and for a LoRA without any target.
    """
    applied: dict[str, list[Addend]] = {}
    untargeted: list[str] = []
    for lora in loras:
        hits = 0
        untargeted += [f"{lora.name}: {key}" for key in lora.unread]
        for param, deltas in lora.deltas.items():
            for delta in deltas:
                if param not in shapes:
                    untargeted += [f"{lora.name}: {key}" for key in delta.keys]
                    continue
                _check_shape(lora.name, delta, param, tuple(shapes[param]))
                applied.setdefault(param, []).append(Addend(lora.name, lora.strength, delta))
                hits += 1
        if not hits:
            raise WeightsCorrupt(
                f"none of its {sum(len(d) for d in lora.deltas.values())} changes has a target in this model; "
                f"the first is for {next(iter(lora.deltas), 'nothing')}",
                where=_file(lora.name),
                todo="It was made for another model",
            )
    return MergePlan({param: tuple(addends) for param, addends in applied.items()}, sorted(untargeted))


def _check_shape(lora: str, delta: Delta, param: str, shape: tuple[int, ...]) -> None:
    if delta.shape != shape:
        raise WeightsCorrupt(
            f"{delta.keys[0]} changes a tensor of shape {list(delta.shape)}, but {param} has {list(shape)}",
            where=_file(lora),
            todo="It was made for another model, or for another size of it",
        )


def _file(lora: str) -> str:
    return f"{lora}.safetensors"


@torch.no_grad()
def merge_param(name: str, weight: Tensor, plan: MergePlan) -> Tensor:
    """Return `weight` in float32 with all addends of `plan`, on its device; the input does not change.

    Where the plan adds nothing, the result may be the input itself. Beside the result it needs 32 MB and the factors.
    """
    addends = plan.applied.get(name, ())
    if not addends:
        return weight.to(torch.float32)
    merged = weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for addend in addends:
        _check_shape(addend.lora, addend.delta, name, tuple(merged.shape))
        addend.delta.add_to(merged, addend.strength)
    return merged


@runtime_checkable
class HoldsLora(Protocol):
    """A layer with quantised weights that adds LoRAs when it dequantises; `set_lora(None)` removes them."""

    in_features: int
    out_features: int

    def set_lora(self, deltas: Sequence[tuple[Tensor, Tensor, float]] | None, /) -> None:
        """Set (down [r, in], up [out, r], scale) of each delta, instead of those set before."""


@runtime_checkable
class HoldsCodes(Protocol):
    """A layer that may keep codes of its plain weight, which are stale after a change of the weight in place."""

    def drop_codes(self) -> None:
        """Drop the codes."""


@dataclass
class _Attachment:
    originals: dict[str, Tensor] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)


@torch.no_grad()
def attach(model: nn.Module, loras: Sequence[Lora]) -> MergePlan:
    """Make `model` compute as if `loras` were merged, after detaching former ones. Returns the plan.

    Quantised layers get the factors beside their weights. Plain parameters (norms, biases, tables, layers in 16 bits)
    are merged in float32 and rounded to their own dtype, in place, so that references of offloading and compiled graphs
    stay valid. Their former bits are kept in host memory for `detach`. After a failure the model is unchanged.
    """
    detach(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, HoldsLora)}
    shapes: dict[str, tuple[int, ...]] = {name: tuple(param.shape) for name, param in model.named_parameters()}
    shapes |= {f"{name}.weight": (layer.out_features, layer.in_features) for name, layer in layers.items()}
    plan = plan_merge(loras, shapes)
    state = _Attachment()
    setattr(model, _ATTACHED, state)
    try:
        for param, addends in plan.applied.items():
            owner, _, leaf = param.rpartition(".")
            if leaf == "weight" and owner in layers:
                state.layers.append(owner)
                device = next(model.get_submodule(owner).parameters()).device
                layers[owner].set_lora([_factors(addend, device) for addend in addends])
            else:
                target = model.get_parameter(param)
                state.originals[param] = target.detach().to("cpu", copy=True)
                target.copy_(merge_param(param, target, plan))
                _drop_codes(model, param)
    except BaseException:
        detach(model)
        raise
    return plan


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Undo `attach`: every parameter has its former bits again. Does nothing where nothing is attached."""
    state: _Attachment | None = getattr(model, _ATTACHED, None)
    if state is None:
        return
    for name, original in state.originals.items():
        model.get_parameter(name).copy_(original)  # a subtraction would leave rounding errors
        _drop_codes(model, name)
    for name in state.layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, HoldsLora)
        layer.set_lora(None)
    delattr(model, _ATTACHED)


def _drop_codes(model: nn.Module, param: str) -> None:
    owner, _, leaf = param.rpartition(".")
    layer = model.get_submodule(owner)
    if leaf == "weight" and isinstance(layer, HoldsCodes):
        layer.drop_codes()


@contextmanager
def attached(model: nn.Module, loras: Sequence[Lora]) -> Iterator[MergePlan]:
    """`attach` inside the block, and `detach` after it, also after an exception."""
    plan = attach(model, loras)
    try:
        yield plan
    finally:
        detach(model)


def _factors(addend: Addend, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """(down, up, scale) of a matrix's delta. A full delta is multiplied by an identity, which adds no rounding."""
    delta, scale = addend.delta, addend.strength * addend.delta.scale
    if isinstance(delta, LowRank):
        return delta.down.to(device), delta.up.to(device), scale
    diff = delta.diff.to(device)
    rows, columns = diff.shape
    if rows <= columns:
        return diff, torch.eye(rows, dtype=diff.dtype, device=device), scale
    return torch.eye(columns, dtype=diff.dtype, device=device), diff, scale
