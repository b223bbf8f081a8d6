"""ONNX networks: open a model file on the requested device, or raise an error with the reason.

In:   a model file (or the folder of `end2end.onnx` and its weights) and a device. Out: `Network`: names, batch, `run`.
Never: the meaning of the network's output. If CUDA is requested and the session runs on the CPU, that is an error.

On a GPU each network has its own CUDA stream, from torch's pool. So its work does not wait for the thread that
denoises, and that thread does not wait for it. The denoising runs on torch's default stream, which has the lowest
priority of CUDA. A network's stream cannot have a lower one, so both share the GPU as equals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import ConfigInvalid, OutOfMemory, WeightsCorrupt, WeightsMissing
from runner.preprocess.networks.int8 import make_int8, model_files
from runner.preprocess.networks.io_binding import BoundSession, host_array
from runner.preprocess.networks.providers import (
    CPU,
    CUDA,
    OUT_OF_MEMORY,
    TENSORRT,
    Choice,
    NetworkOptions,
    Precision,
    binding_device,
    check_precision,
    choose_providers,
    has_tensorrt_libraries,
    onnxruntime_remedy,
    opening_failed,
    usable_cpus,
)

__all__ = [
    "Network",
    "check_shape",
    "model_file",
    "open_network",
    "open_session",
]

# On a CPU a larger batch is slower and gives the same bits: see bench/results.md, "Pose batches".
CPU_BATCH = 1
FOLDER_MODEL = "end2end.onnx"  # MMDeploy's name; the official ViTPose release is a folder with this file
ELEMENTS: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


@dataclass(frozen=True)
class Network:
    """A network with one image input, of which the first output is used (exports differ in names, not in order).

    `session` has the runtime's method `run(names, feeds)`: a session, a `BoundSession`, or one that joins outputs.
    """

    session: Any
    path: Path
    provider: str
    reason: str  # why this provider was chosen, for the log and the record
    input_name: str
    output_name: str
    input_shape: tuple[int | None, ...]  # None: dynamic
    output_shape: tuple[int | None, ...]
    dtype: np.dtype[Any]  # of the input
    precision: Precision = "fp32"  # of its matrix products
    precision_why: str = ""  # if int8 was requested: how it was made, or why it was not
    host_device: str | None = None  # device for which `images` gives page-locked memory; None: plain memory
    at_once: int = 1  # images in one run of a graph that takes any number

    @property
    def batch(self) -> int | None:
        """The constant batch size of the graph; None if it takes any number."""
        return self.input_shape[0] if self.input_shape else None

    @property
    def description(self) -> dict[str, Any]:
        """Plain values for the record."""
        values: dict[str, Any] = {
            "model": self.path.name,
            "provider": self.provider,
            "why": self.reason,
            "batch": self.batch,
            "batching": f"the graph takes {self.batch} at a time"
            if self.batch
            else f"the graph takes any number, and gets {self.at_once} at a time",
            "precision": self.precision,
        }
        return values | ({"precision_why": self.precision_why} if self.precision_why else {})

    def images(self, count: int, size: tuple[int, int, int]) -> np.ndarray:
        """Return float32 [count, *size], uninitialised, in the fastest memory for `run`. The caller fills it."""
        return host_array((count, *size), np.float32, self.host_device)

    def run(self, images: np.ndarray, *, most: int | None = None) -> np.ndarray:
        """Return the first output, float32 [n, …], for images [n, 3, H, W].

        At most `most` (default: `at_once`) images are run at a time. A graph of constant batch k gets k at a time; the
        last chunk is filled up with zeros, whose outputs are dropped. If memory is short, a chunk is halved, down to
        one image; then the last bits may differ. Raises OutOfMemory.
        """
        size = self.batch or most or self.at_once
        parts = []
        for start in range(0, len(images), size):
            chunk = images[start : start + size].astype(self.dtype, copy=False)
            missing = size - len(chunk) if self.batch else 0
            if missing:
                chunk = np.concatenate([chunk, np.zeros((missing, *chunk.shape[1:]), chunk.dtype)])
            parts.append(self._run_halved(np.ascontiguousarray(chunk))[: size - missing])
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole.astype(np.float32, copy=False)

    def _run_halved(self, chunk: np.ndarray) -> np.ndarray:
        try:
            return self._run_once(chunk)
        except OutOfMemory:
            if self.batch or len(chunk) == 1:
                raise
        half = (len(chunk) + 1) // 2
        return np.concatenate([self._run_halved(chunk[:half]), self._run_halved(chunk[half:])])

    def _run_once(self, chunk: np.ndarray) -> np.ndarray:
        try:
            return self.session.run([self.output_name], {self.input_name: chunk})[0]
        except Exception as err:  # onnxruntime has no public exception types
            if any(part in str(err).lower() for part in OUT_OF_MEMORY):
                raise OutOfMemory(
                    f"{self.path.name} ran out of memory on {self.provider}",
                    where=self.path,
                    todo="Free memory on the device, or preprocess on the CPU",
                ) from err
            raise


def open_network(
    path: Path,
    device: str = "cpu",
    options: NetworkOptions | None = None,
    *,
    precision: Precision = "fp32",
    at_once: int = 1,
) -> Network:
    """Open `path` on `device`: "cpu", "cuda" or "cuda:N". Raises WeightsMissing, WeightsCorrupt, ConfigInvalid.

    at_once:   images in one run on a GPU, if the graph takes any number; on the CPU it is CPU_BATCH.
    precision: int8 works on the CPU only. A network that would not be faster with it stays in float32, with the reason
               in its description.
    """
    options = options or NetworkOptions()
    file, why = model_file(path), ""
    if precision == "int8":
        made, why = _int8(file, device, options)
        file, precision = (file, "fp32") if made is None else (model_file(made), "int8")
    at_once = CPU_BATCH if device == "cpu" else at_once
    stream = _stream(device)
    session, reason = open_session(file, device, options, stream=None if stream is None else stream.cuda_stream)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if not inputs or not outputs or inputs[0].type not in ELEMENTS:
        raise WeightsCorrupt(
            f"the graph takes {[i.type for i in inputs]}, not one float image", where=file, todo="Fetch the model again"
        )
    provider, input_shape = session.get_providers()[0], _sizes(inputs[0].shape)
    if provider == TENSORRT and input_shape and input_shape[0] is None:
        # TensorRT builds an engine for each shape. With a constant batch there is one; smaller batches are filled up.
        input_shape = (at_once, *input_shape[1:])
    bound = _bound(session, device, stream)
    return Network(
        session=bound or session,
        path=Path(path),
        provider=provider,
        reason=reason,
        input_name=inputs[0].name,
        output_name=outputs[0].name,
        input_shape=input_shape,
        output_shape=_sizes(outputs[0].shape),
        dtype=ELEMENTS[inputs[0].type],
        precision=precision,
        precision_why=why,
        host_device=bound.device if bound else None,
        at_once=at_once,
    )


def open_session(
    path: Path, device: str = "cpu", options: NetworkOptions | None = None, *, stream: int | None = None
) -> tuple[Any, str]:
    """Return (onnxruntime session, why it runs there). Raises an error if the chosen provider does not start.

    stream: address of the CUDA stream on which it computes; None: one that the runtime makes.
    """
    file = model_file(path)
    import onnxruntime

    options = options or NetworkOptions()
    limit = None
    if options.arena_bytes is not None and device != "cpu":
        # The arena also has the weights. The graphs are in float32, so weights are as large on the device as in files.
        limit = options.arena_bytes + sum(part.stat().st_size for part in model_files(file))
    choose = partial(choose_providers, device, onnxruntime.get_available_providers(), memory_limit=limit, stream=stream)
    choice = choose(
        options,
        tensorrt_libraries=options.tensorrt != "off" and has_tensorrt_libraries(),
        remedy=onnxruntime_remedy(),
    )
    if choice.first == TENSORRT and options.tensorrt == "auto":
        try:
            return _started(file, device, choice), choice.reason
        except (ConfigInvalid, WeightsCorrupt) as err:
            plain = choose(NetworkOptions(), tensorrt_libraries=False)
            return _started(file, device, plain), f"{plain.reason}; {err.what}"
    return _started(file, device, choice), choice.reason


def _started(file: Path, device: str, choice: Choice) -> Any:
    """Open a session on the first provider of `choice`. Raises ConfigInvalid if it falls back to another one."""
    import onnxruntime

    if choice.first != CPU and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA and cuDNN that came as wheels, with torch
    if choice.first == TENSORRT:
        Path(choice.providers[0][1]["trt_engine_cache_path"]).mkdir(parents=True, exist_ok=True)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors are raised as exceptions
    settings.use_deterministic_compute = True
    # With a GPU the CPU only does shape arithmetic. By default the runtime pins a thread to every core of the host,
    # even in a container with two cores, and spins there while the generator needs the cores.
    settings.intra_op_num_threads = usable_cpus() if choice.first == CPU else 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if choice.first != CPU:
        # A run with a memory pattern takes one block as large as all tensors, beside those of the first run.
        settings.enable_mem_pattern = False
    try:
        # No fallback: it would repeat a failed run on the CPU and report this on stdout only.
        session = onnxruntime.InferenceSession(str(file), settings, providers=list(choice.providers), enable_fallback=0)
    except Exception as err:  # onnxruntime has no public exception types
        raise opening_failed(err, file, device) from err
    if session.get_providers()[0] != choice.first:
        raise ConfigInvalid(
            f"onnxruntime could not start {choice.first} and fell back to {session.get_providers()[0]}",
            where=file,
            todo=f"{onnxruntime_remedy()} `video-lab doctor` shows the driver and the CUDA libraries that were found",
        )
    return session


def _stream(device: str) -> Any | None:
    """Return a CUDA stream of torch for one network; None on the CPU, and if torch has no CUDA."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index.isdigit() or not index):
        return None  # the CPU, or an unknown device, which is refused later
    import torch

    where = binding_device(CUDA, device, torch_cuda=torch.cuda.is_available())
    return torch.cuda.Stream(where) if where else None


def _bound(session: Any, device: str, stream: Any | None) -> BoundSession | None:
    """Bind the session's inputs and outputs on its GPU. None on the CPU."""
    provider = session.get_providers()[0]
    if provider == CPU:
        return None
    import torch

    where = binding_device(provider, device, torch_cuda=torch.cuda.is_available())
    return BoundSession(session, where, stream) if where else None


def _int8(file: Path, device: str, options: NetworkOptions) -> tuple[Path | None, str]:
    check_precision("int8", device)
    if options.folder is None:
        raise ConfigInvalid("there is no cache folder for int8 networks", todo="Pass --cache DIR")
    return make_int8(file, options.folder)


def model_file(path: Path) -> Path:
    """Return the .onnx file at `path`: the file itself, or `end2end.onnx` in a folder. Raises WeightsMissing."""
    path = Path(path)
    file = path / FOLDER_MODEL if path.is_dir() else path
    if not file.is_file():
        raise WeightsMissing(
            f"there is no ONNX model here{f' (no {FOLDER_MODEL} in this folder)' if path.is_dir() else ''}",
            where=path,
            todo="Put the preprocessing models of the published weights under process_checkpoint/ in --models",
        )
    return file


def check_shape(network: Network, *, input_tail: tuple[int, ...], output_tails: list[tuple[int | None, ...]]) -> None:
    """Raise WeightsCorrupt unless input and output have these sizes after the batch. None and dynamic sizes match."""

    def fits(shape: tuple[int | None, ...], tail: tuple[int | None, ...]) -> bool:
        pairs = zip(shape[1:], tail, strict=False)
        return len(shape) == len(tail) + 1 and all(a is None or b is None or a == b for a, b in pairs)

    got_in, got_out = network.input_shape, network.output_shape
    if not fits(got_in, input_tail) or not (not got_out or any(fits(got_out, tail) for tail in output_tails)):
        expected = " or ".join(str(list(tail)) for tail in output_tails)
        raise WeightsCorrupt(
            f"the graph maps {list(got_in)} to {list(got_out)}, "
            f"but after the batch {list(input_tail)} to {expected} is needed",
            where=network.path,
            todo="This is another model; check which file has this name",
        )


def _sizes(shape: list[Any]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) and size > 0 else None for size in shape or [])
