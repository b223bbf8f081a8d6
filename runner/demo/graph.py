"""Graph: write an ONNX graph line by line, like array code.

In:   operator names, inputs (names of values, or arrays that become constants), attributes. Out: an ONNX file.
Never: the meaning of the graph. Values are numbered in the order of writing, so the same code gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import ConfigInvalid

__all__ = ["Graph", "Value", "colour_response"]

_OPSET, _IR_VERSION = 17, 8  # old enough for every onnxruntime that pyproject.toml admits

Value = str  # a value's name in the graph; "" leaves an optional input out
Input = Value | np.ndarray | np.generic | float | Sequence[float]


class Graph:
    """`graph("Add", a, b)` adds a node and returns the name of its result."""

    def __init__(self, name: str, input_name: str, input_shape: Sequence[int | str]) -> None:
        try:
            import onnx  # noqa: F401
        except ImportError as err:
            raise ConfigInvalid(
                "building the demo models needs the onnx package", todo="pip install 'video-lab-runner[demo]'"
            ) from err
        self.name, self.input, self._input_shape = name, input_name, list(input_shape)
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def __call__(self, operator: str, *inputs: Input, **attributes: Any) -> Value:
        """Add a node with one result. Numbers and arrays become constants: floats float32, integers int64."""
        return self.several(operator, 1, *inputs, **attributes)[0]

    def several(self, operator: str, results: int, *inputs: Input, **attributes: Any) -> list[Value]:
        """Add a node with `results` results and return their names."""
        from onnx import helper

        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        out = [f"{operator}_{len(self._nodes)}_{k}" for k in range(results)]
        self._nodes.append(helper.make_node(operator, names, out, name=out[0], **attributes))
        return out

    def greater(self, a: Input, b: Input) -> Value:
        """Add nodes for: 1.0 where a > b, else 0.0."""
        return self("Cast", self("Greater", a, b), to=1)

    def equal(self, a: Input, b: Input) -> Value:
        """Add nodes for: 1.0 where a == b, else 0.0."""
        return self("Cast", self("Equal", a, b), to=1)

    def neighbourhood(self, operator: str, value: Value, size: int, **attributes: Any) -> Value:
        """Add a MaxPool or AveragePool over `size` x `size` (odd) around every pixel. The shape stays."""
        border = [size // 2] * 4
        return self(operator, value, kernel_shape=[size, size], pads=border, strides=[1, 1], **attributes)

    def cells(self, operator: str, value: Value, size: int) -> Value:
        """Add a MaxPool or AveragePool over disjoint `size` x `size` cells."""
        return self(operator, value, kernel_shape=[size, size], strides=[size, size])

    def save(self, path: Path, value: Value, output_name: str, output_shape: Sequence[int | str]) -> None:
        """Write the graph with `value` as its only output, after the full check of types and shapes by onnx."""
        import onnx
        from onnx import TensorProto, helper

        last = helper.make_node("Identity", [value], [output_name], name=output_name)
        graph = helper.make_graph(
            [*self._nodes, last],
            self.name,
            [helper.make_tensor_value_info(self.input, TensorProto.FLOAT, self._input_shape)],
            [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, list(output_shape))],
            self._constants,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="video-lab-demo",
        )
        onnx.checker.check_model(model, full_check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString(deterministic=True))

    def _constant(self, value: Input) -> Value:
        from onnx import numpy_helper

        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def colour_response(graph: Graph, picture: Value, colours: np.ndarray, reach: float) -> Value:
    """Add nodes that map [N, 3, H, W] RGB 0..1 to [N, K, H, W]: relu(1 - |pixel - colour|^2 / reach^2) for K colours.

    |p - c|^2 = |p|^2 - 2 c.p + |c|^2 is linear in (p, |p|^2), so one 1x1 convolution is enough.
    """
    square = graph("ReduceSum", graph("Mul", picture, picture), np.array([1]), keepdims=1)
    features = graph("Concat", picture, square, axis=1)
    weights = np.concatenate([2 * colours, -np.ones((len(colours), 1))], axis=1) / reach**2
    bias = 1 - (colours**2).sum(axis=1) / reach**2
    return graph("Relu", graph("Conv", features, weights[:, :, None, None], bias, kernel_shape=[1, 1]))
