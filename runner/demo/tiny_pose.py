"""Tiny pose: write an ONNX whole-body pose model without trained weights, which finds a puppet's joints by pixels.

In:   a path. Out: a file with ViTPose's contract: `input` float32 [N, 3, 256, 192] (RGB normalised by ImageNet's mean
      and deviation) -> `heatmaps` [N, 133, 64, 48], a gaussian of sigma 2 at each point of COCO-WholeBody. Its height
      is the confidence (0 if the joint is not seen). Never: boxes, video, onnxruntime.

A joint is the centre of its colour. Face and hands are computed from the joints as in the drawing (puppet.lift).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runner.demo.graph import Graph, Value, colour_response
from runner.demo.puppet import JOINTS, PALETTE, lift_matrix, lift_parents

__all__ = ["INPUT_SIZE", "MAP_SIZE", "build_tiny_pose"]

INPUT_SIZE, MAP_SIZE = (192, 256), (48, 64)  # width, height
POINTS = 133
MAP_SIGMA = 2.0  # as in ViTPose's training
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_REACH = 0.32  # of a colour; tints have a distance of 0.43
_DISC_SIGMA = 2.0  # crop pixels: a disc is about 6 across when a whole puppet fills the crop
_WINDOW_SIGMA = 4.0  # crop pixels of the window whose centre of mass refines the peak


def build_tiny_pose(path: Path) -> None:
    """Write the pose model to `path`. The same code gives the same bytes."""
    graph = Graph("puppet_pose", "input", ["N", 3, INPUT_SIZE[1], INPUT_SIZE[0]])
    mean, deviation = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    picture = graph("Add", graph("Mul", graph.input, deviation), mean)
    response = colour_response(graph, picture, PALETTE, _REACH)
    x, y, peak = _peak(graph, response)
    joints = _centre_of_mass(graph, response, x, y)  # [N, 23, 2]
    seen = graph("Clip", graph("Mul", graph("Sub", peak, 0.05), 5.0), 0.0, 0.98)  # [N, 23, 1]

    flat = graph("Reshape", joints, np.array([-1, 2 * len(JOINTS)]))
    points = graph("Reshape", graph("MatMul", flat, lift_matrix().T), np.array([-1, POINTS, 2]))
    confidence = graph("Min", *[graph("Gather", seen, lift_parents()[:, i], axis=1) for i in (0, 1)])
    graph.save(path, _draw(graph, points, confidence), "heatmaps", ["N", POINTS, MAP_SIZE[1], MAP_SIZE[0]])


def _peak(graph: Graph, response: Value) -> tuple[Value, Value, Value]:
    """Maximum of each joint's blurred response: x, y [N, 23, 1] in crop pixels, and the response there."""
    count, (width, height) = len(JOINTS), INPUT_SIZE
    reach = 5
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * _DISC_SIGMA**2))
    kernel = np.tile(taps / taps.sum(), (count, 1))
    blurred = graph(
        "Conv",
        response,
        kernel[:, None, :, None],
        kernel_shape=[2 * reach + 1, 1],
        pads=[reach, 0, reach, 0],
        group=count,
    )
    blurred = graph(
        "Conv",
        blurred,
        kernel[:, None, None, :],
        kernel_shape=[1, 2 * reach + 1],
        pads=[0, reach, 0, reach],
        group=count,
    )
    flat = graph("Reshape", blurred, np.array([-1, count, width * height]))
    place = graph("ArgMax", flat, axis=2, keepdims=1)
    x, y = (graph("Cast", graph(operator, place, np.int64(width)), to=1) for operator in ("Mod", "Div"))
    return x, y, graph("ReduceMax", flat, axes=[2], keepdims=1)


def _centre_of_mass(graph: Graph, response: Value, x: Value, y: Value) -> Value:
    """[N, 23, 2] crop pixels: mean position of the response, weighted by a gaussian window at (x, y).

    The window is separable, so the sums over the crop are matrix products.
    """
    width, height = INPUT_SIZE
    columns = np.arange(width, dtype=np.float32).reshape(1, 1, 1, width)
    rows = np.arange(height, dtype=np.float32).reshape(1, 1, 1, height)

    def window(positions: np.ndarray, centre: Value) -> Value:
        distance = graph("Sub", positions, graph("Unsqueeze", centre, np.array([3])))
        return graph("Exp", graph("Mul", graph("Mul", distance, distance), -1 / (2 * _WINDOW_SIGMA**2)))

    across, down = window(columns, x), window(rows, y)  # [N, 23, 1, W], [N, 23, 1, H]

    def upright(value: Value) -> Value:
        return graph("Transpose", value, perm=[0, 1, 3, 2])

    row_sums = graph("MatMul", response, upright(across))  # [N, 23, H, 1]
    row_moments = graph("MatMul", response, upright(graph("Mul", across, columns)))
    mass = graph("Add", graph("MatMul", down, row_sums), 1e-6)  # [N, 23, 1, 1]
    mean_x = graph("Div", graph("MatMul", down, row_moments), mass)
    mean_y = graph("Div", graph("MatMul", graph("Mul", down, rows), row_sums), mass)
    return graph("Concat", *[graph("Squeeze", v, np.array([3])) for v in (mean_x, mean_y)], axis=2)


def _draw(graph: Graph, points: Value, confidence: Value) -> Value:
    """Heatmaps of points [N, 133, 2] in crop pixels and confidences [N, 133, 1]. A map pixel is 4 crop pixels; both
    start at 0."""
    width, height = MAP_SIZE
    x, y = graph.several("Split", 2, graph("Mul", points, width / INPUT_SIZE[0]), axis=2)

    def bump(centre: Value, length: int) -> Value:
        distance = graph("Sub", np.arange(length, dtype=np.float32).reshape(1, 1, length), centre)
        return graph("Exp", graph("Mul", graph("Mul", distance, distance), -1 / (2 * MAP_SIGMA**2)))

    down = graph("Unsqueeze", graph("Mul", bump(y, height), confidence), np.array([3]))
    return graph("Mul", down, graph("Unsqueeze", bump(x, width), np.array([2])))
