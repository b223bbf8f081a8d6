"""Int8: a network whose matrix products are computed in 8 bits on the CPU, made once from the published file.

In:   a float ONNX model and a folder to keep results in. Out: the int8 model's folder, or why this network stays in
float32. Never: devices, what the network finds.

Only products with constant weights are converted, each column of weights with a scale of its own, activations with one
measured as they come (dynamic quantisation: no pictures are needed to calibrate). In a ViT that is nearly all of the
work; convolutions converted like that are slower than in float32, so a network that consists of them stays as it is.
Weights get 7 bits: the products of two pairs then fit into the 16 bits in which AVX2 adds them up, where 8 would
saturate, and every CPU computes the same integers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from runner.errors import ConfigInvalid, WeightsCorrupt
from runner.storage.disk import os_errors
from runner.storage.file_hashes import content_sha256

__all__ = ["FORMAT", "LEAST_AGREEMENT", "LEAST_SHARE", "int8_key", "make_int8", "model_files"]

FORMAT = 1  # raise when the same model would be converted otherwise
GRAPH = "end2end.onnx"  # so that the folder opens like a published one
NOTES = "int8.json"
LEAST_SHARE = 0.5  # of the weights in matrix products; below, nothing is gained
LEAST_AGREEMENT = 0.95  # correlation of the outputs; random ViT-H weights have 0.999
PROBES = 2
EXTERNAL = 1 << 30  # bytes of weights above which they go beside the graph: protobuf ends at 2 GiB
PRODUCTS = ("MatMul", "Gemm")
FLOATING = (1, 10, 11, 16)  # TensorProto's float, float16, double, bfloat16


def model_files(graph: Path) -> list[Path]:
    """The graph and the files that hold its weights: its folder's, or its neighbours of the same name, sorted."""
    if graph.name == GRAPH:
        beside = list(graph.parent.rglob("*"))
    else:
        beside = list(graph.parent.glob(f"{escape(graph.stem.removesuffix('_model'))}*"))
    others = {p for p in beside if p.is_file() and p.suffix != ".onnx" and not p.name.startswith(".")}
    return sorted({graph, *others})


def int8_key(graph: Path) -> str:
    """sha256, hex, of all that decides the int8 model: the model's files and what converts them."""
    files = {file.relative_to(graph.parent).as_posix(): content_sha256(file) for file in model_files(graph)}
    parts = {"files": files, "format": FORMAT, "onnxruntime": metadata_version("onnxruntime")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def metadata_version(module: str) -> str:
    """Version of the installed distribution behind a module: onnxruntime comes under several names."""
    owners = metadata.packages_distributions().get(module) or [module]
    return metadata.version(owners[0])


def make_int8(graph: Path, folder: Path) -> tuple[Path | None, str]:
    """(folder of the int8 model of `graph`, how it was made), or (None, why the network stays in float32).

    Made once for each model under `folder`/int8; whoever asks meanwhile, in this process or another, waits. Needs about
    the model's size in scratch space there, and three times that in memory. Raises ConfigInvalid where the `onnx`
    package is missing, WeightsCorrupt where the model cannot be read or its int8 form does not do the same, StorageFull
    and the like.
    """
    from filelock import FileLock

    home = folder / "int8"
    made = home / int8_key(graph)
    with os_errors(home, writing=True):
        if not (made / NOTES).is_file():
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / f".{made.name}.lock"):
                if not (made / NOTES).is_file():
                    _make(graph, made)
    notes = json.loads((made / NOTES).read_text())
    return (made if notes["int8"] else None), notes["why"]


def _make(graph: Path, made: Path) -> None:
    """Fill the folder `made`; it appears whole."""
    try:
        import onnx
    except ImportError as err:
        raise ConfigInvalid(
            "an int8 network is made with the package onnx, which is not installed",
            where=graph,
            todo="pip install 'video-lab-runner[int8]', or use --pose-precision fp32",
        ) from err
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # onnx's own dependency

    from runner.preprocess.networks.providers import opening_failed

    begin = time.monotonic()
    try:
        share = _share_of_products(onnx.load(str(graph), load_external_data=False).graph)
    except DecodeError as err:
        raise opening_failed(err, graph, "cpu") from err
    prefix = f".making-{made.name[:16]}-"
    for left in made.parent.glob(f"{prefix}*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=prefix) as scratch:
        out = Path(scratch) / "int8"
        out.mkdir()
        if share < LEAST_SHARE:
            why = f"only {share:.0%} of its weights are in matrix products; 8-bit convolutions are slower than float32"
            notes: dict[str, Any] = {"int8": False, "why": why}
        else:
            agreement = _convert(graph, Path(scratch), out)
            if agreement is not None and not agreement >= LEAST_AGREEMENT:
                raise WeightsCorrupt(
                    f"its int8 form does something else (correlation of the outputs {agreement:.3f})",
                    where=graph,
                    todo="Use --pose-precision fp32; if that finds nobody either, fetch the model again",
                )
            said = "" if agreement is None else f", outputs correlate {agreement:.4f}"
            notes = {"int8": True, "why": f"{share:.0%} of its weights as 8-bit integers{said}"}
        (out / NOTES).write_text(json.dumps(notes))
        if made.exists():  # a folder without notes: somebody removed files from it
            shutil.rmtree(made)
        os.replace(out, made)
    size = sum(file.stat().st_size for file in made.iterdir())
    log = structlog.get_logger()
    log.info("int8", model=graph.name, seconds=round(time.monotonic() - begin, 1), bytes=size, **notes)


def _share_of_products(graph: Any) -> float:
    """Of all floating weights in the graph, the share that matrix products multiply by, 0…1. Only shapes are read."""
    tensors = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = node.attribute[0].t
    constants = {name: prod(item.dims) for name, item in tensors.items() if item.data_type in FLOATING}
    for node in graph.node:  # half-precision files: a weight, cast or transposed where it is used
        if node.op_type in ("Cast", "Transpose", "Identity") and node.input[0] in constants:
            constants[node.output[0]] = constants.pop(node.input[0])
    products = {node.input[1] for node in graph.node if node.op_type in PRODUCTS}
    whole = sum(constants.values())
    return sum(constants.get(name, 0) for name in products) / whole if whole else 0.0


def _convert(graph: Path, scratch: Path, out: Path) -> float | None:
    """Write the int8 model into `out`; how well its outputs correlate with the original's, None where that is flat."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = model_files(graph)
    big = sum(file.stat().st_size for file in files) > EXTERNAL
    # Constants are folded first: the quantiser does not see a weight behind a cast. The runtime does that, and writes
    # into our scratch; the quantiser would write beside the model, in a store that may be read-only.
    folded = scratch / "folded.onnx"
    wanted = _answers(_open(graph, folded, big or len(files) > 1))  # else it would go on naming the model's own files
    with _quiet():
        quantize_dynamic(
            folded,
            out / GRAPH,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=big,
        )
    got = _answers(_open(out / GRAPH))
    if not np.isfinite(got).all():
        return float("nan")
    if not wanted.std() or not got.std():
        return None  # a network that sees nothing in noise
    return float(np.corrcoef(wanted.ravel(), got.ravel())[0, 1])


def _open(graph: Path, folded: Path | None = None, external: bool = False) -> Any:
    """A session on the CPU; with `folded`, it also writes the graph with its constants computed."""
    import onnxruntime

    from runner.preprocess.networks.providers import opening_failed, usable_cpus

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = usable_cpus()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folded is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        if external:
            name = f"{folded.name}.data"
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", name)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes", str(1 << 10)
            )
    without = ["MatMulAddFusion", "ConstantSharing"]  # products stay products
    try:
        return onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=without if folded else None
        )
    except Exception as err:  # onnxruntime has no public exception types
        raise opening_failed(err, graph, "cpu") from err


def _answers(session: Any) -> np.ndarray:
    """The first output for PROBES pictures of smooth noise, always the same ones, one at a time."""
    (item,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in item.shape]
    draw = np.random.default_rng(0)
    answers = []
    for _ in range(PROBES):
        coarse = draw.standard_normal([*shape[:2], -(-shape[2] // 16), -(-shape[3] // 16)])
        picture = np.kron(coarse, np.ones((16, 16)))[..., : shape[2], : shape[3]]
        kind = np.float16 if item.type == "tensor(float16)" else np.float32
        answers.append(session.run(None, {item.name: picture.astype(kind)})[0].astype(np.float64))
    return np.stack(answers)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to prepare the model, on the root logger: it was prepared."""
    root = logging.getLogger()
    drop = lambda record: "pre-processing before quantization" not in record.getMessage()  # noqa: E731
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)
