"""Int8 on the CPU: gain and cost of 8-bit matrix products, and the reason why convolutional networks stay in float32.

    python bench/pose_int8.py [--blocks N] [--crops N] [--real DIR] [--json PATH]

A network of ViT-H's width with N of its 32 blocks and random weights is converted as `--pose-precision int8` does it.
Times are CPU times per crop, one thread, batch 1, both sides in turn, the fastest of all repeats. `--real DIR`: a real
pose network and clip (wholebody_pose_*.onnx, person_detector.onnx, *.mp4). It shows how its joints would change if its
convolutions were converted too; the runner does not convert them. Joints count if their float32 confidence is above
0.5.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
from _json_file import write_json  # noqa: E402

from runner.preprocess.networks.providers import NetworkOptions  # noqa: E402
from runner.preprocess.networks.sessions import Network, open_network  # noqa: E402
from runner.preprocess.networks.vitpose import crop_of, decode_heatmaps, network_input  # noqa: E402
from runner.preprocess.networks.yolov10 import choose_person  # noqa: E402
from runner.video import VideoReader  # noqa: E402

WIDTH, TOKENS, PATCH = 1280, 192, 768  # ViT-H on 256x192 pixels
SURE = 0.5


def build_vit(path: Path, blocks: int) -> None:
    """ViTPose's contract, ViT-H's matrix products, random weights: [n, 3, 256, 192] → [n, 133, 64, 48]."""
    from onnx import helper, numpy_helper, save

    draw = np.random.default_rng(0)
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, f"c{len(constants)}"))
        return constants[-1].name

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"v{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def linear(x: str, inside: int, outside: int) -> str:
        weights = draw.standard_normal((inside, outside)) / np.sqrt(inside)
        return add("MatMul", x, constant(weights.astype(np.float32)))

    def normal(x: str) -> str:
        one, zero = constant(np.ones(WIDTH, np.float32)), constant(np.zeros(WIDTH, np.float32))
        return add("LayerNormalization", x, one, zero)

    x = linear(add("Reshape", "input", constant(np.array([-1, TOKENS, PATCH]))), PATCH, WIDTH)
    for _ in range(blocks):
        q, k, v = (linear(normal(x), WIDTH, WIDTH) for _ in range(3))
        looks = add("MatMul", q, add("Transpose", k, perm=[0, 2, 1]))
        looks = add("Softmax", add("Mul", looks, constant(np.float32(WIDTH**-0.5))))
        x = add("Add", x, linear(add("MatMul", looks, v), WIDTH, WIDTH))
        x = add("Add", x, linear(add("Relu", linear(normal(x), WIDTH, 4 * WIDTH)), 4 * WIDTH, WIDTH))
    maps = add("Transpose", linear(x, WIDTH, 133 * 16), perm=[0, 2, 1])
    shape = constant(np.array([-1, 133, 64, 48]))
    nodes.append(helper.make_node("Reshape", [maps, shape], ["heatmaps"]))
    graph = helper.make_graph(
        nodes,
        "vit",
        [helper.make_tensor_value_info("input", 1, ["n", 3, 256, 192])],
        [helper.make_tensor_value_info("heatmaps", 1, ["n", 133, 64, 48])],
        constants,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def cpu_ms(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least CPU time of each call, taken in turn; the first of each is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-1, repeats):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if i >= 0:
                found[name].append(1e3 * (time.process_time() - begin))
    return {name: round(min(times), 2) for name, times in found.items()}


def bytes_of(network: Path) -> int:
    files = network.iterdir() if network.is_dir() else [network]
    return sum(file.stat().st_size for file in files if file.suffix != ".json")


def bench_products(blocks: int, crops: int, folder: Path) -> dict[str, Any]:
    """What the runner does: float32 beside int8."""
    from runner.preprocess.networks.int8 import make_int8

    path = folder / "vit.onnx"
    build_vit(path, blocks)
    begin = time.process_time()
    made, why = make_int8(path, folder)
    assert made is not None
    making_s = round(time.process_time() - begin, 1)
    plain, ours = open_network(path), open_network(path, options=NetworkOptions(folder=folder), precision="int8")
    images = np.random.default_rng(1).standard_normal((crops, 3, 256, 192)).astype(np.float32)
    expected, got = plain.run(images), ours.run(images)
    one = images[:1]
    ms = cpu_ms({"fp32": lambda: plain.run(one), "int8": lambda: ours.run(one)}, crops)
    return {
        "blocks": blocks,
        "fp32_ms": ms["fp32"],
        "int8_ms": ms["int8"],
        "faster": round(ms["fp32"] / ms["int8"], 2),
        "fp32_bytes": bytes_of(path),
        "int8_bytes": bytes_of(made),
        "making_cpu_s": making_s,
        "why": why,
        "correlation": round(float(np.corrcoef(expected.ravel(), got.ravel())[0, 1]), 5),
        "relative_error": round(float(np.abs(expected - got).mean() / np.abs(expected).mean()), 4),
    }


def bench_convolutions(real: Path, frames: int, folder: Path) -> dict[str, Any]:
    """What the runner leaves: a network of convolutions, converted in spite of it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from runner.preprocess.networks.int8 import _open
    from runner.preprocess.networks.yolov10 import Detector

    source, folded = next(real.glob("wholebody_pose_*.onnx")), folder / "folded.onnx"
    detector, plain = Detector.load(real / "person_detector.onnx"), open_network(source)
    with VideoReader(next(real.glob("*.mp4"))) as reader:
        pictures = reader.read(np.linspace(0, reader.info.frames - 1, frames).astype(np.int64))
        size = reader.info.width, reader.info.height
    crops = [crop_of(choose_person(rows, size), size) for rows in detector.rows(list(pictures))]
    images = np.stack([network_input(*pair) for pair in zip(pictures, crops, strict=True)])
    expected = decode_heatmaps(plain.run(images), crops)
    sure = expected[..., 2] >= SURE
    _open(source, folded)
    networks: dict[str, Network] = {"float32": plain}
    for name, kinds in {"matrix products": ["MatMul", "Gemm"], "convolutions too": ["MatMul", "Gemm", "Conv"]}.items():
        path = folder / f"{name}.onnx"
        quantize_dynamic(folded, path, op_types_to_quantize=kinds, weight_type=QuantType.QUInt8)
        networks[name] = open_network(path)
    calls = {name: (lambda network=network: network.run(images[:1])) for name, network in networks.items()}
    ms = cpu_ms(calls, 10)
    rows = {}
    for name, network in networks.items():
        points = decode_heatmaps(network.run(images), crops)
        away = np.linalg.norm(points[..., :2] - expected[..., :2], axis=-1)[sure]
        rows[name] = {
            "cpu_ms": ms[name],
            "bytes": bytes_of(network.path),
            "median_px": round(float(np.median(away)), 3),
            "p99_px": round(float(np.percentile(away, 99)), 3),
            "lost_share": round(float((points[..., 2][sure] < SURE).mean()), 4),
        }
    return {"network": source.name, "frames": frames, "sure_joints": int(sure.sum()), "rows": rows}


def table(found: dict[str, Any]) -> str:
    vit = found["products"]
    lines = [
        f"ViT-H's width, {vit['blocks']} of 32 blocks, random weights ({vit['why']})",
        f"{'':<22}{'CPU ms/crop':>14}{'MB':>10}",
        f"{'float32':<22}{vit['fp32_ms']:>14.1f}{vit['fp32_bytes'] / 1e6:>10.1f}",
        f"{'int8':<22}{vit['int8_ms']:>14.1f}{vit['int8_bytes'] / 1e6:>10.1f}",
        f"{vit['faster']} times as fast; heatmaps differ by {vit['relative_error']:.1%} of their mean, correlate "
        f"{vit['correlation']}; made in {vit['making_cpu_s']} s of CPU",
    ]
    if real := found.get("convolutions"):
        lines += [
            "",
            f"{real['network']}, {real['frames']} frames, {real['sure_joints']} joints; joints' distance from float32",
            f"{'in 8 bits':<22}{'CPU ms/crop':>14}{'MB':>10}{'median px':>12}{'p99 px':>10}{'lost':>9}",
        ]
        for name, row in real["rows"].items():
            lines.append(
                f"{name:<22}{row['cpu_ms']:>14.1f}{row['bytes'] / 1e6:>10.1f}{row['median_px']:>12.2f}"
                f"{row['p99_px']:>10.2f}{row['lost_share']:>9.1%}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, metavar="N", help="of ViT-H's 32 (4)")
    parser.add_argument("--crops", type=int, default=8, metavar="N", help="posed by each side (8)")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder of a real detector, pose network and clip")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args()
    if arguments.blocks < 1 or arguments.crops < 1:
        parser.error("at least one block and one crop are needed")
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Any] = {"products": bench_products(arguments.blocks, arguments.crops, Path(scratch))}
        if arguments.real:
            found["convolutions"] = bench_convolutions(arguments.real, 24, Path(scratch))
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
