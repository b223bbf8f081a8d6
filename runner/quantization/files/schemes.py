"""Schemes: quantise one linear's weight to the tensors of a number format, for `checkpoint_write`.

In:   a layer's name and its merged weight. Out: stored tensors; the scheme's keys of the file's metadata.
Never: files, sources, the order of layers.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from runner.errors import ConfigInvalid
from runner.quantization.activations import LayerInputs
from runner.quantization.files.quantized_header import (
    CALIBRATION_KEY,
    FORMAT_KEY,
    GROUP_KEY,
    METHOD_KEY,
    RANK_KEY,
    REFITS_KEY,
    SMOOTHING_KEY,
)
from runner.quantization.formats.e2m1 import Format
from runner.quantization.formats.scales import Method, quantize
from runner.quantization.formats.svdq import torch_table
from runner.quantization.formats.svdq_layout import SvdqLayout
from runner.quantization.low_rank_split import split_weight
from runner.quantization.rules import NEVER_SVDQ

__all__ = ["Fp4Scheme", "Scheme", "SvdqScheme"]

Table = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # suffix → (shape, dtype)


class Scheme(ABC):
    """A number format and a method, for one file; it records results of layers."""

    def __init__(self, name: str, method: Method, metadata: Mapping[str, str]) -> None:
        """`metadata`: of the file, beside source, LoRAs and version."""
        self.name, self.method, self.metadata = name, method, metadata
        self.uncalibrated: list[str] = []  # layers without calibration, where others have one
        self.errors: dict[str, float] = {}  # layer → relative error of its weight, where it is computed

    @abstractmethod
    def tensors(self, out_features: int, in_features: int) -> Table:
        """The tensors of one linear. Raises ValueError for a shape that cannot be stored."""

    @abstractmethod
    def quantize(self, layer: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantise `weight` [out, in] to these tensors, by suffix. Raises ValueError for NaN and infinite weights."""

    def keeps(self, layer: str) -> bool:
        """Is this linear never quantised, with any rule?"""
        return False


class Fp4Scheme(Scheme):
    """FP4: codes and scales. `importance`: layer → mean square of each input channel, for `activation` only; layers
    without an entry get `mse`."""

    def __init__(self, fmt: Format, method: Method = "mse", importance: Mapping[str, Tensor] | None = None) -> None:
        """Raises ConfigInvalid where method and importance contradict each other."""
        if (importance is not None) != (method == "activation"):
            raise ConfigInvalid(f"scale method {method!r} with{'out' if importance is None else ''} calibration data")
        super().__init__(fmt.name, method, {FORMAT_KEY: fmt.name, METHOD_KEY: method, GROUP_KEY: str(fmt.group)})
        self._format, self._importance = fmt, importance

    def tensors(self, out_features: int, in_features: int) -> Table:
        return self._format.tensors(out_features, in_features)

    def quantize(self, layer: str, weight: Tensor) -> dict[str, Tensor]:
        if self._importance is None:
            return quantize(weight, self._format, self.method)
        importance = self._importance.get(layer)
        if importance is None:
            self.uncalibrated.append(layer)
            return quantize(weight, self._format, "mse")
        return quantize(weight, self._format, "activation", importance)


class SvdqScheme(Scheme):
    """SVDQuant W4A4. `inputs`: layer → calibration statistics; layers without them are smoothed by their weights alone.
    `calibration`: counts of jobs, steps and rows of the calibration, for the metadata."""

    def __init__(
        self,
        layout: SvdqLayout,
        refits: int = 0,
        inputs: Mapping[str, LayerInputs] | None = None,
        calibration: Mapping[str, int] | None = None,
    ) -> None:
        method: Method = "mse" if inputs is None else "activation"
        metadata = {
            FORMAT_KEY: layout.name,
            METHOD_KEY: method,
            GROUP_KEY: str(layout.group),
            RANK_KEY: str(layout.rank),
            SMOOTHING_KEY: "weights" if inputs is None else "calibrated",
            CALIBRATION_KEY: json.dumps(dict(calibration or {})),
            REFITS_KEY: str(refits),
        }
        super().__init__(layout.name, method, metadata)
        self._layout, self._refits, self._inputs = layout, refits, inputs

    def tensors(self, out_features: int, in_features: int) -> Table:
        return torch_table(self._layout, out_features, in_features)

    def keeps(self, layer: str) -> bool:
        return layer in NEVER_SVDQ

    def quantize(self, layer: str, weight: Tensor) -> dict[str, Tensor]:
        inputs = None
        if self._inputs is not None:
            inputs = self._inputs.get(layer)
            if inputs is None:
                self.uncalibrated.append(layer)
        split = split_weight(weight, self._layout, self._refits, inputs)
        self.errors[layer] = split.error
        return split.tensors
