"""Int8: make a network with 8-bit matrix products for the CPU, once from each published file.

In:   a float ONNX model and a cache folder. Out: the int8 model's folder, or the reason why this network stays in
      float32. Never: devices, the meaning of the network's output.

Dynamic quantisation: only products with constant weights are converted, with per-channel scales for weights; scales of
activations are measured at run time, so that no calibration pictures are needed. In a ViT these products are nearly all
of the work. Convolutions converted in this way are slower than in float32, so a network of convolutions is not
converted. Weights have 7 bits. Then the sum of two products fits into the 16 bits in which AVX2 adds them, where 8 bits
would saturate, and every CPU computes the same integers.
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

FORMAT = 1  # raise when the conversion of the same model changes
GRAPH = "end2end.onnx"  # so that the folder opens like a published one
NOTES = "int8.json"
LEAST_SHARE = 0.5  # of the weights that must be in matrix products; with less, int8 is not faster
LEAST_AGREEMENT = 0.95  # correlation of the outputs; random ViT-H weights have 0.999
PROBES = 2
EXTERNAL = 1 << 30  # bytes of weights above which they are stored beside the graph: protobuf's limit is 2 GiB
PRODUCTS = ("MatMul", "Gemm")
FLOATING = (1, 10, 11, 16)  # TensorProto's float, float16, double, bfloat16


def model_files(graph: Path) -> list[Path]:
    """Return the graph and the files of its weights, sorted: those in its folder, or beside it with the same name."""
    if graph.name == GRAPH:
        beside = list(graph.parent.rglob("*"))
    else:
        beside = list(graph.parent.glob(f"{escape(graph.stem.removesuffix('_model'))}*"))
    others = {p for p in beside if p.is_file() and p.suffix != ".onnx" and not p.name.startswith(".")}
    return sorted({graph, *others})


def int8_key(graph: Path) -> str:
    """Return the sha256 (hex) of all that decides the int8 model: the model's files and the converter's version."""
    files = {file.relative_to(graph.parent).as_posix(): content_sha256(file) for file in model_files(graph)}
    parts = {"files": files, "format": FORMAT, "onnxruntime": metadata_version("onnxruntime")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def metadata_version(module: str) -> str:
    """Return the version of the distribution that has a module: onnxruntime has several names."""
    owners = metadata.packages_distributions().get(module) or [module]
    return metadata.version(owners[0])


def make_int8(graph: Path, folder: Path) -> tuple[Path | None, str]:
    """Return (folder of the int8 model of `graph`, how it was made), or (None, why the network stays in float32).

    It is made once for each model, in `folder`/int8; other callers, also in other processes, wait for it. This needs
    about the model's size of disk space there, and three times as much memory. Raises ConfigInvalid if the package
    `onnx` is missing, WeightsCorrupt if the model cannot be read or its int8 form gives other outputs, StorageFull and
    the like.
    """
    from filelock import FileLock

    cache = folder / "int8"
    made = cache / int8_key(graph)
    with os_errors(cache, writing=True):
        if not (made / NOTES).is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f".{made.name}.lock"):
                if not (made / NOTES).is_file():
                    _make(graph, made)
    notes = json.loads((made / NOTES).read_text())
    return (made if notes["int8"] else None), notes["why"]


def _make(graph: Path, made: Path) -> None:
    """Make the folder `made`. It is written under another name and renamed when it is complete."""
    try:
        import onnx
    except ImportError as err:
        raise ConfigInvalid(
            "making an int8 network needs the package onnx, which is not installed",
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
    for left in made.parent.glob(f"{prefix}*"):  # of a killed process: this one has the lock
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
                    f"its int8 form gives other outputs (correlation {agreement:.3f})",
                    where=graph,
                    todo="Use --pose-precision fp32; if that finds no person either, fetch the model again",
                )
            correlation = "" if agreement is None else f", outputs correlate {agreement:.4f}"
            notes = {"int8": True, "why": f"{share:.0%} of its weights as 8-bit integers{correlation}"}
        (out / NOTES).write_text(json.dumps(notes))
        if made.exists():  # a folder without notes: files were removed from it
            shutil.rmtree(made)
        os.replace(out, made)
    size = sum(file.stat().st_size for file in made.iterdir())
    log = structlog.get_logger()
    log.info("int8", model=graph.name, seconds=round(time.monotonic() - begin, 1), bytes=size, **notes)


def _share_of_products(graph: Any) -> float:
    """Return the share (0…1) of the graph's floating-point weights in matrix products. Only shapes are read."""
    tensors = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = node.attribute[0].t
    constants = {name: prod(item.dims) for name, item in tensors.items() if item.data_type in FLOATING}
    for node in graph.node:  # in half-precision files a weight may be cast or transposed before its use
        if node.op_type in ("Cast", "Transpose", "Identity") and node.input[0] in constants:
            constants[node.output[0]] = constants.pop(node.input[0])
    products = {node.input[1] for node in graph.node if node.op_type in PRODUCTS}
    whole = sum(constants.values())
    return sum(constants.get(name, 0) for name in products) / whole if whole else 0.0


def _convert(graph: Path, scratch: Path, out: Path) -> float | None:
    """Write the int8 model into `out`. Returns the correlation of its outputs with the original's; None if outputs are
    constant."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = model_files(graph)
    big = sum(file.stat().st_size for file in files) > EXTERNAL
    # Constants are folded first: the quantiser does not find a weight behind a cast. The runtime folds them into the
    # scratch folder; the quantiser would write beside the model, in a store that may be read-only. External weights are
    # copied too: otherwise the folded graph would refer to the model's files.
    folded = scratch / "folded.onnx"
    expected = _outputs(_open(graph, folded, big or len(files) > 1))
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
    got = _outputs(_open(out / GRAPH))
    if not np.isfinite(got).all():
        return float("nan")
    if not expected.std() or not got.std():
        return None  # the network finds nothing in noise
    return float(np.corrcoef(expected.ravel(), got.ravel())[0, 1])


def _open(graph: Path, folded: Path | None = None, external: bool = False) -> Any:
    """Open a session on the CPU. With `folded`, also write the graph with folded constants there."""
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
    without = ["MatMulAddFusion", "ConstantSharing"]  # so that products stay MatMul and Gemm nodes
    try:
        return onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=without if folded else None
        )
    except Exception as err:  # onnxruntime has no public exception types
        raise opening_failed(err, graph, "cpu") from err


def _outputs(session: Any) -> np.ndarray:
    """Return the first output for PROBES pictures of smooth noise, one at a time. The pictures are always the same."""
    (item,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in item.shape]
    draw = np.random.default_rng(0)
    outputs = []
    for _ in range(PROBES):
        coarse = draw.standard_normal([*shape[:2], -(-shape[2] // 16), -(-shape[3] // 16)])
        picture = np.kron(coarse, np.ones((16, 16)))[..., : shape[2], : shape[3]]
        kind = np.float16 if item.type == "tensor(float16)" else np.float32
        outputs.append(session.run(None, {item.name: picture.astype(kind)})[0].astype(np.float64))
    return np.stack(outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the quantiser's advice on the root logger to prepare the model: it is prepared."""
    root = logging.getLogger()
    drop = lambda record: "pre-processing before quantization" not in record.getMessage()  # noqa: E731
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)
