"""Two small ONNX graphs with the production contracts that find one bright disc on a dark ground.

The detector's box is the disc's exact extent. The pose model puts joint k at the disc's centre plus `SHIFTS[k]` heatmap
pixels, with about the disc's brightness as confidence; on a dark crop no confidence reaches 0.1.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RADIUS = 8  # of the shifts, heatmap pixels
SHIFTS = np.zeros((133, 2), int)  # x, y
SHIFTS[5], SHIFTS[6] = (4, 0), (-4, 0)  # shoulders, left is on the picture's right
SHIFTS[9], SHIFTS[10] = (6, 6), (-6, 6)  # wrists
SHIFTS[23:91] = [(k % 17 % 9 - 4, k // 17 * 2 - 7) for k in range(68)]  # a face 8 wide, 6 high, above the centre


class _Graph:
    def __init__(self) -> None:
        self.nodes, self.constants = [], []

    def constant(self, value) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def __call__(self, kind: str, *inputs, out: str | None = None, **attributes) -> str:
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [out], **attributes))
        return out

    def save(self, path: Path, source: tuple[str, list], target: tuple[str, list]) -> Path:
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (source, target)]
        graph = helper.make_graph(self.nodes, "tiny", [infos[0]], [infos[1]], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(path))
        return path


def build_detector(path: Path) -> Path:
    """[1, 3, 640, 640] → [1, 300, 6]: one row for all that is brighter than one half, 299 rows of zeros."""
    g, f = _Graph(), np.float32
    bright = g("Cast", g("Greater", g("ReduceMin", "images", axes=[1], keepdims=0), f(0.5)), to=TensorProto.FLOAT)
    ends = []
    for axis in (1, 2):  # columns seen from above, then rows
        line = g("ReduceMax", bright, axes=[axis], keepdims=0)
        at = np.arange(640, dtype=f)[None]
        last = g("ReduceMax", g("Mul", line, at + 1), axes=[1], keepdims=1)
        first = g("Sub", f(640), g("ReduceMax", g("Mul", line, 640 - at), axes=[1], keepdims=1))
        ends.append((first, last))
    (x1, x2), (y1, y2) = ends
    score = g("Mul", g("ReduceMax", bright, axes=[1, 2], keepdims=0), f(0.9))
    score = g("Reshape", score, np.array([1, 1]))
    row = g("Concat", x1, y1, x2, y2, score, np.zeros((1, 1), f), axis=1)
    row = g("Reshape", row, np.array([1, 1, 6]))
    g("Concat", row, np.zeros((1, 299, 6), f), axis=1, out="output0")
    return g.save(path, ("images", [1, 3, 640, 640]), ("output0", [1, 300, 6]))


def build_pose(path: Path, batch: int | str = "N") -> Path:
    """[n, 3, 256, 192] → [n, 133, 64, 48]; `batch` a number makes the graph's batch constant."""
    g, f = _Graph(), np.float32
    mean, std = f([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1), f([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    light = g("ReduceMean", g("Add", g("Mul", "input", std), mean), axes=[1], keepdims=1)
    light = g("AveragePool", light, kernel_shape=[4, 4], strides=[4, 4])
    # As wide as the disc in its crop (19 heatmap pixels): a narrower blur would leave a flat top, and no peak.
    blur = np.outer(*[np.exp(-(np.arange(-20, 21) ** 2) / 200)] * 2).astype(f)[None, None]
    light = g("Conv", light, blur / blur.sum(), kernel_shape=[41, 41], pads=[20] * 4)
    # Joint k's map is the light moved by its shift: one look-up a heatmap pixel, in the light with a border of zeros.
    light = g("Pad", light, np.array([0, 0, RADIUS, RADIUS] * 2))
    light = g("Reshape", light, np.array([-1, (64 + 2 * RADIUS) * (48 + 2 * RADIUS)]))
    rows, columns = np.arange(64)[:, None] + RADIUS, np.arange(48) + RADIUS
    index = np.stack([(rows - y) * (48 + 2 * RADIUS) + columns - x for x, y in SHIFTS])
    g("Gather", light, index, axis=1, out="heatmaps")
    return g.save(path, ("input", [batch, 3, 256, 192]), ("heatmaps", [batch, 133, 64, 48]))


def build_product_pose(path: Path, half: bool = False) -> Path:
    """`build_pose` with the blur as two matrix products, one along each side: what a network of products can do.

    `half`: weights in float16, cast where they are used, as small published files have them.
    """
    g, f = _Graph(), np.float32
    mean, std = f([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1), f([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    light = g("ReduceMean", g("Add", g("Mul", "input", std), mean), axes=[1], keepdims=1)
    light = g("AveragePool", light, kernel_shape=[4, 4], strides=[4, 4])
    for side in (48, 64):  # along columns; then, turned, along rows
        away = np.subtract.outer(np.arange(side), np.arange(side))
        blur = np.exp(-(away**2) / 200) / np.sqrt(200 * np.pi)
        weights = g("Cast", blur.astype(np.float16), to=TensorProto.FLOAT) if half else blur.astype(f)
        light = g("Add", g("MatMul", light, weights), np.full(side, 1e-3, f))  # a bias, as such layers have
        light = g("Transpose", light, perm=[0, 1, 3, 2])
    light = g("Pad", light, np.array([0, 0, RADIUS, RADIUS] * 2))
    light = g("Reshape", light, np.array([-1, (64 + 2 * RADIUS) * (48 + 2 * RADIUS)]))
    rows, columns = np.arange(64)[:, None] + RADIUS, np.arange(48) + RADIUS
    index = np.stack([(rows - y) * (48 + 2 * RADIUS) + columns - x for x, y in SHIFTS])
    g("Gather", light, index, axis=1, out="heatmaps")
    return g.save(path, ("input", ["N", 3, 256, 192]), ("heatmaps", ["N", 133, 64, 48]))
