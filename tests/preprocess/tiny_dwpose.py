"""Two small ONNX graphs with the contracts of YOLOX and RTMPose that find coloured discs on a dark ground.

The detector's box is the exact extent of all that is coloured, written as the candidate of the cell it belongs to. The
pose model puts joint k at the centre of gravity of colour k % 4, with 0.9 as the peak in x and 0.8 in y; joints of a
colour that is not in the crop get no peak.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.preprocess.tiny_networks import _Graph

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]  # RGB
X_PEAK, Y_PEAK = 0.9, 0.8
STRIDE, FIRST_CELL = 32, 8000  # of the 20x20 grid, whose cells come last


def _save(graph: _Graph, path: Path, source: tuple[str, list], targets: list[tuple[str, list]]) -> Path:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (source, *targets)]
    made = helper.make_graph(graph.nodes, "tiny", infos[:1], infos[1:], graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def build_yolox(path: Path, batch: int | str = "batch", decoded: bool = False) -> Path:
    """[n, 3, 640, 640] → [n, 8400, 85]: one candidate with a score, the others about their own cells with none."""
    g, f = _Graph(), np.float32
    spread = g("Sub", *(g(kind, "images", axes=[1], keepdims=0) for kind in ("ReduceMax", "ReduceMin")))
    coloured = g("Cast", g("Greater", spread, f(100)), to=TensorProto.FLOAT)
    at = np.arange(640, dtype=f)[None]
    centres, lengths = [], []
    for axis in (1, 2):  # columns seen from above, then rows
        line = g("ReduceMax", coloured, axes=[axis], keepdims=0)
        last = g("ReduceMax", g("Mul", line, at + 1), axes=[1], keepdims=1)
        first = g("Sub", f(640), g("ReduceMax", g("Mul", line, 640 - at), axes=[1], keepdims=1))
        centres.append(g("Mul", g("Add", first, last), f(0.5)))
        lengths.append(g("Max", g("Sub", last, first), f(1)))
    cells = [g("Floor", g("Div", centre, f(STRIDE))) for centre in centres]
    offsets = [g("Sub", g("Div", c, f(STRIDE)), cell) for c, cell in zip(centres, cells, strict=True)]
    logs = [g("Log", g("Div", length, f(STRIDE))) for length in lengths]
    score = g("ReduceMax", coloured, axes=[1, 2], keepdims=0)
    score = g("Reshape", score, np.array([-1, 1]))
    surest = g("Mul", score, f(0.9))
    here = g("Concat", *offsets, *logs, surest, score, g("Mul", score, np.zeros((1, 79), f)), axis=1)
    index = g("Add", g("Add", cells[0], g("Mul", cells[1], f(20))), f(FIRST_CELL))  # [n, 1]
    chosen = g("Equal", index, np.arange(8400, dtype=f)[None])  # [n, 8400]
    chosen = g("Unsqueeze", chosen, np.array([2]))
    elsewhere = np.zeros((1, 1, 85), f)
    elsewhere[..., :2] = 0.5
    out = g("Where", chosen, g("Unsqueeze", here, np.array([1])), elsewhere, out=None if decoded else "output")
    if decoded:
        grid = [(x, y, s) for s in (8, 16, 32) for y in range(640 // s) for x in range(640 // s)]
        grid = np.array(grid, f)[None]
        xy, wh, scores = (
            g("Slice", out, np.array([a]), np.array([b]), np.array([2])) for a, b in ((0, 2), (2, 4), (4, 85))
        )
        xy, wh = g("Mul", g("Add", xy, grid[..., :2]), grid[..., 2:]), g("Mul", g("Exp", wh), grid[..., 2:])
        g("Concat", xy, wh, scores, axis=2, out="output")
    return _save(g, path, ("images", [batch, 3, 640, 640]), [("output", [batch, 8400, 85])])


def build_simcc(
    path: Path, batch: int | str = "batch", joints: int = 133, swapped: bool = False, declared: bool = True
) -> Path:
    """[n, 3, 384, 288] → simcc_x [n, 133, 576], simcc_y [n, 133, 768].

    `swapped`: y first. Not `declared`: how many joints there are shows only when the graph runs.
    """
    g, f = _Graph(), np.float32
    mean, std = (f(v).reshape(1, 3, 1, 1) for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    image = g("Unsqueeze", g("Add", g("Mul", "input", std), mean), np.array([1]))  # [n, 1, 3, H, W]
    away = g("Abs", g("Sub", image, f(COLOURS).reshape(1, 4, 3, 1, 1)))
    near = g("Less", g("ReduceMax", away, axes=[2], keepdims=0), f(127.5))  # [n, 4, H, W]
    near = g("Cast", near, to=TensorProto.FLOAT)
    area = g("ReduceSum", near, np.array([2, 3]), keepdims=0)  # [n, 4]
    there = g("Cast", g("Greater", area, f(0)), to=TensorProto.FLOAT)
    which = np.arange(joints) % 4
    if not declared:
        zero = g("Mul", g("ReduceMax", "input", keepdims=0), f(0))
        ones = g("NonZero", g("Add", zero, np.ones(joints, f)))  # [1, a number that depends on the input]
        which = g("Mod", g("Squeeze", ones, np.array([0])), np.array(4))
    targets = []
    for name, axis, side, peak in (("simcc_x", 2, 288, X_PEAK), ("simcc_y", 3, 384, Y_PEAK)):
        line = g("ReduceSum", near, np.array([axis]), keepdims=0)  # [n, 4, side]
        sums = g("ReduceSum", g("Mul", line, np.arange(side, dtype=f)), np.array([2]), keepdims=0)
        centre = g("Unsqueeze", g("Div", sums, g("Max", area, f(1))), np.array([2]))
        distance = g("Sub", np.arange(2 * side, dtype=f)[None, None], g("Mul", centre, f(2)))
        bump = g("Exp", g("Mul", g("Mul", distance, distance), f(-1 / 72)))  # sigma 6 bins, as in training
        bump = g("Mul", bump, g("Unsqueeze", g("Mul", there, f(peak)), np.array([2])))
        g("Gather", bump, which, axis=1, out=name)
        targets.append((name, [batch, joints if declared else "joints", 2 * side]))
    return _save(g, path, ("input", [batch, 3, 384, 288]), targets[::-1] if swapped else targets)


def coloured_frame(size: tuple[int, int], centres: list[tuple[int, int] | None], radius: int = 8) -> np.ndarray:
    """uint8 RGB: a disc of each colour at its centre (none where it is None), whole pixels, on dark grey."""
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    frame = np.full((size[1], size[0], 3), 20, np.uint8)
    for colour, centre in zip(COLOURS, centres, strict=False):
        if centre:
            frame[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2] = colour
    return frame
