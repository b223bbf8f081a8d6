"""Packed layers: replace a model's linears by empty layers of a number format.

In:   a model, a format, a rule on names. Out: the model with empty layers on the meta device, and their names.
Never: values of tensors, files.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from runner.quantization.formats.e2m1 import Format
from runner.quantization.formats.svdq_layout import SvdqLayout
from runner.quantization.linear import FP4Linear
from runner.quantization.svdq_linear import SvdqLinear

__all__ = ["swap_linears"]


def swap_linears(model: nn.Module, fmt: Format | SvdqLayout, keep: Callable[[str], bool]) -> list[str]:
    """Replace `model`'s linears by empty layers of `fmt`, in place; returns their names, in the model's order.

    Replaced is every `nn.Linear`, but no subclass of it (a subclass may compute something else), unless `keep` is true
    for its dotted name. Empty layers are on the meta device and have a bias where the linear had one. Raises
    ValueError, before any change, for an input width that the format cannot hold.
    """
    chosen = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and not keep(name)}
    for name, module in chosen.items():
        if not fmt.fits(module.in_features):
            raise ValueError(
                f"{name} has {module.in_features} inputs, no multiple of {fmt.name}'s group of {fmt.group}; "
                "the recipe must keep it in 16 bits"
            )
    for name, module in chosen.items():
        size, bias, dtype = (module.in_features, module.out_features), module.bias is not None, module.weight.dtype
        shell: nn.Module
        if isinstance(fmt, SvdqLayout):
            shell = SvdqLinear.empty(*size, bias, fmt, bias_dtype=dtype)
        else:
            shell = FP4Linear.empty(*size, bias, fmt, bias_dtype=dtype)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, shell.train(module.training))
    return list(chosen)
