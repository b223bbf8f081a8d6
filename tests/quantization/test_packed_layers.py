"""Packed layers: which linears become shells of a format, and that nothing changes where one does not fit."""

from __future__ import annotations

import pytest
from torch import nn

from runner.quantization.formats.e2m1 import G32, NVFP4
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.linear import FP4Linear
from runner.quantization.packed_layers import swap_linears
from runner.quantization.svdq_linear import SvdqLinear


def test_swapping_takes_what_the_rule_leaves():
    class Scaled(nn.Linear):
        pass

    block = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q", "k", "v", "out")})
    block["feed"] = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    model = nn.ModuleDict(
        {"block": block, "head": nn.Linear(64, 48), "odd": nn.Linear(24, 8), "scaled": Scaled(64, 64)}
    )
    model["bare"] = nn.Linear(64, 16, bias=False)
    model.eval()
    names = swap_linears(model, G32, keep=lambda name: name in ("head", "odd"))
    assert names == [*(f"block.{name}" for name in ("q", "k", "v", "out", "feed.0", "feed.2")), "bare"]
    for name in names:
        shell = model.get_submodule(name)
        assert isinstance(shell, FP4Linear)
        assert shell.weight_packed.is_meta
        assert not shell.training
    assert (model["bare"].bias, type(model["head"]), type(model["scaled"])) == (None, nn.Linear, Scaled)
    assert model["block"]["feed"][0].out_features == 128


def test_swapping_changes_nothing_where_a_width_does_not_fit():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(24, 8))
    with pytest.raises(ValueError, match="1 has 24 inputs, no multiple of nvfp4's group of 16"):
        swap_linears(model, NVFP4, keep=lambda _name: False)
    assert type(model[0]) is nn.Linear


def test_swapping_for_svdq_takes_any_width():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(24, 8))
    assert swap_linears(model, SVDQ_LAYOUTS["svdq-int4"], keep=lambda _name: False) == ["0", "1"]
    assert type(model[1]) is SvdqLinear
    assert tuple(model[1].qweight.shape) == (128, 64)
