"""Tiny detector: write an ONNX person detector without trained weights, which finds puppets by their pixels.

In:   a path. Out: a file with YOLOv10's contract: `images` float32 [1, 3, 640, 640] (RGB, 0..1, the frame stretched to
      the square) -> `output0` [1, 300, 6], rows x1, y1, x2, y2, score, class in those 640 pixels, best score first,
      unused rows zero. Never: video, onnxruntime.

A puppet is a connected component of bright or saturated pixels with a red nose near a blue and a green eye.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runner.demo.graph import Graph, Value, colour_response
from runner.demo.puppet import PALETTE, joint

__all__ = ["INPUT_SIDE", "MAX_PEOPLE", "build_tiny_detector"]

INPUT_SIDE, ROWS = 640, 300
MAX_PEOPLE = 4
_CELL = 8  # side in pixels of a cell of the coarse grid on which components grow
_GRID = INPUT_SIDE // _CELL
_GROWTH_STEPS = 110  # cells from the nose to the farthest fingertip or toe, along the body: more than one grid side
_REACH = 0.3  # of a colour: more than H.264 changes a flat patch, less than half the distance of two joint colours
_SATURATED, _BRIGHT = 0.32, 0.86  # above every scene (scenes.py), below every tint and white of a puppet
_EYE_SPAN = 17  # cells: eyes are within +-64 pixels of the nose even if a puppet fills a stretched frame
_NOSE_SEEN = 0.004  # mean response over 3 x 3 cells: two to three pixels of pure red
_LEAST_AREA = 300.0  # pixels of the square; a puppet of 80 x 60 has four times as many
_MOST_AREA = 0.6 * INPUT_SIDE**2  # a puppet covers at most half of its box; a saturated picture is one component


def build_tiny_detector(path: Path) -> None:
    """Write the detector to `path`. The same code gives the same bytes."""
    graph = Graph("puppet_detector", "images", [1, 3, INPUT_SIDE, INPUT_SIDE])
    figure = _figure(graph)
    strength, seeds = _seeds(graph)
    grown = _grow(graph, figure, seeds)
    enlarged = graph(
        "Resize",
        grown,
        "",
        np.array([1, 1, _CELL, _CELL], np.float32),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    component = graph("Mul", enlarged, figure)  # in pixels again: cells are 8 times too coarse for a box
    x1, x2 = _extent(graph, graph("ReduceMax", component, axes=[2], keepdims=0))
    y1, y2 = _extent(graph, graph("ReduceMax", component, axes=[3], keepdims=0))
    area = graph("ReduceSum", component, np.array([2, 3]), keepdims=0)

    fitting = graph("Mul", graph.greater(area, _LEAST_AREA), graph.greater(_MOST_AREA, area))
    confidence = graph("Min", graph("Add", strength, 0.62), 0.98)
    alive = graph("Mul", graph("Mul", fitting, _first_of_component(graph, grown)), graph.greater(strength, _NOSE_SEEN))
    score, order = graph.several("TopK", 2, graph("Mul", alive, confidence), np.array([MAX_PEOPLE]), axis=1)
    present, order = graph.greater(score, 0.0), graph("Reshape", order, np.array([-1]))
    columns = [graph("Mul", graph("Gather", side, order, axis=1), present) for side in (x1, y1, x2, y2)]
    columns += [score, graph("Mul", score, 0.0)]  # class 0: person
    rows = graph("Concat", *[graph("Unsqueeze", column, np.array([2])) for column in columns], axis=2)
    padded = graph("Pad", rows, np.array([0, 0, 0, 0, ROWS - MAX_PEOPLE, 0]))
    graph.save(path, padded, "output0", [1, ROWS, 6])


def _figure(graph: Graph) -> Value:
    """[1, 1, 640, 640]: 1 where most of 3 x 3 pixels are saturated or white; this removes single pixels."""
    highest = graph("ReduceMax", graph.input, axes=[1], keepdims=1)
    lowest = graph("ReduceMin", graph.input, axes=[1], keepdims=1)
    saturated = graph.greater(graph("Sub", highest, lowest), _SATURATED)
    either = graph("Max", saturated, graph.greater(lowest, _BRIGHT))
    return graph.greater(graph.neighbourhood("AveragePool", either, 3), 0.5)


def _seeds(graph: Graph) -> tuple[Value, Value]:
    """Find noses: strength [1, P] of the best cells, and [1, P, 80, 80] with a single 1 in the plane of each."""
    nose = colour_response(graph, graph.input, PALETTE[[joint("nose")]], _REACH)
    nose = graph.cells("AveragePool", nose, _CELL)
    near = graph.neighbourhood("AveragePool", nose, 3)  # a nose may be on the corner of four cells

    eyes = colour_response(graph, graph.input, PALETTE[[joint("left_eye"), joint("right_eye")]], _REACH)
    eyes = graph.neighbourhood("MaxPool", graph.cells("AveragePool", eyes, _CELL), _EYE_SPAN)
    both_eyes = graph.greater(graph("ReduceMin", eyes, axes=[1], keepdims=1), 0.01)

    # A nose is much stronger than its surroundings; a red wall or coloured noise is not.
    surroundings = graph.neighbourhood("AveragePool", nose, 21, count_include_pad=1)
    alone = graph.greater(near, graph("Mul", surroundings, 8.0))
    strength = graph("Mul", graph("Mul", near, both_eyes), alone)

    # Of two equal neighbours both would be the maximum: a slope of a thousandth over the picture makes them differ.
    slope = 1 + 1e-3 * np.arange(_GRID * _GRID).reshape(1, 1, _GRID, _GRID) / _GRID**2
    strength = graph("Mul", strength, slope)
    peak = graph("Mul", strength, graph.equal(strength, graph.neighbourhood("MaxPool", strength, 9)))
    best, place = graph.several("TopK", 2, graph("Reshape", peak, np.array([1, -1])), np.array([MAX_PEOPLE]), axis=1)
    spots = graph(
        "OneHot", graph("Reshape", place, np.array([-1])), np.array([_GRID * _GRID]), np.array([0.0, 1.0], np.float32)
    )
    spots = graph("Reshape", spots, np.array([1, MAX_PEOPLE, _GRID, _GRID]))
    seen = graph.greater(graph("Reshape", best, np.array([1, MAX_PEOPLE, 1, 1])), _NOSE_SEEN)
    return best, graph("Mul", spots, seen)


def _grow(graph: Graph, figure: Value, seeds: Value) -> Value:
    """[1, P, 80, 80]: the cells connected to each start cell, found by growing one cell at a time inside the figure."""
    within = graph.cells("MaxPool", figure, _CELL)
    within = graph.neighbourhood("MaxPool", within, 3)  # bridges the grey rings around discs
    grown = graph("Mul", seeds, within)
    for _ in range(_GROWTH_STEPS):
        grown = graph("Mul", graph.neighbourhood("MaxPool", grown, 3), within)
    return grown


def _extent(graph: Graph, profile: Value) -> tuple[Value, Value]:
    """Positions of the first 1, and one after the last 1, in [1, P, 640] of 0 and 1; each [1, P]."""
    position = np.arange(INPUT_SIDE, dtype=np.float32).reshape(1, 1, -1)
    far = 1e4
    first = graph("ReduceMin", graph("Add", graph("Mul", profile, -far), position + far), axes=[2], keepdims=0)
    last = graph("ReduceMax", graph("Mul", profile, position + 1), axes=[2], keepdims=0)
    return first, last


def _first_of_component(graph: Graph, grown: Value) -> Value:
    """[1, P]: 1 unless a stronger start cell grew over the same cells (two red spots in one body)."""
    planes = graph("Reshape", grown, np.array([MAX_PEOPLE, -1]))
    shared = graph("MatMul", planes, graph("Transpose", planes, perm=[1, 0]))
    with_stronger = graph("Mul", shared, np.tril(np.ones((MAX_PEOPLE, MAX_PEOPLE)), -1))
    overlap = graph("ReduceMax", with_stronger, axes=[1], keepdims=0)
    return graph("Reshape", graph("Sub", 1.0, graph.greater(overlap, 0.5)), np.array([1, MAX_PEOPLE]))
