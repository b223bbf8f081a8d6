"""Checkpoint, writing: quantise a diffusers store's transformer, tensor by tensor, into one file.

In:   the folder of a transformer (config.json, safetensors in shards or one, float32 or 16 bits), a scheme, a rule.
Out:  the file, which is written whole or not at all, and config.json beside it.
Never: recipes, jobs, more than one tensor (and the next, on its way to a GPU) in memory, for models of any size.

All shapes are known before the first weight is read. So the header is written first; the tensors follow in the order
of reading. Other threads hash the shards while they are quantised, from the same pages of the page cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import runner
from runner.errors import ConfigInvalid, WeightsCorrupt
from runner.hashing import combine
from runner.quantization.files.bf16_source import Bf16Source, open_source
from runner.quantization.files.file_header import PLACEHOLDER
from runner.quantization.files.quantized_header import (
    LORAS_KEY,
    SHA256_KEY,
    SOURCE_KEY,
    VERSION_KEY,
)
from runner.quantization.files.safetensors_stream import StreamWriter, read_tensor
from runner.quantization.files.schemes import Fp4Scheme, Scheme
from runner.quantization.formats.e2m1 import Format
from runner.quantization.formats.scales import Method
from runner.quantization.rules import kept_in_fp32, linear_shapes, stored_dtype, transformer_on_meta

if TYPE_CHECKING:
    from runner.quantization.lora.apply import Lora

__all__ = [
    "Summary",
    "WriteProgress",
    "keep_none",
    "quantize_store",
    "write_checkpoint",
]

Merge = Callable[[str, Tensor], Tensor]
HASHERS = 2  # threads; sha256 of 1-2 GB/s in each is as fast as a fast disk


@dataclass(frozen=True)
class WriteProgress:
    """The progress after a tensor, in the source's bytes."""

    name: str
    tensors: int
    of_tensors: int
    bytes: int
    of_bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Source read so far, GB (1e9 bytes) a second."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds left at the present average speed."""
        return self.seconds * (self.of_bytes - self.bytes) / self.bytes if self.bytes else float("inf")


@dataclass(frozen=True)
class Summary:
    """The result of quantising. Digests are of the source's shards, and of the new file's data."""

    path: Path
    format: str
    method: str
    device: str  # and the reason of the choice
    layers: int
    kept: tuple[str, ...]  # linears that a rule, or the format, left in 16 bits
    uncalibrated: tuple[str, ...]  # quantised by their weights alone, since calibration has no inputs of them
    source_bytes: int
    bytes: int
    seconds: float  # of reading, computing and writing, hashes included
    source_sha256: str
    sha256: str
    loras: tuple[dict[str, object], ...]
    untargeted: tuple[str, ...]  # tensors of LoRAs without a target in this model
    metadata: Mapping[str, str]  # of the scheme, as in the file
    errors: Mapping[str, float]  # layer → relative error of its weight, where the scheme computes it


@dataclass(frozen=True)
class _Task:
    """One tensor of the source. `layer` is set for a quantised one, whose `outputs` are the format's tensors."""

    param: str
    shard: Path
    start: int
    bytes: int
    layer: str | None
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class _Work:
    """How every tensor is converted."""

    scheme: Scheme
    device: torch.device
    merge: Merge | None

    def convert(self, task: _Task, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors to write, on the CPU. Raises WeightsCorrupt for NaN and infinities."""
        if self.merge is not None:
            tensor = self.merge(task.param, tensor.to(torch.float32))
        if task.layer is None:
            if not bool(torch.isfinite(tensor).all()):
                raise WeightsCorrupt(f"{task.param} holds NaN or infinite values", where=task.shard)
            ((name, (_, dtype)),) = task.outputs.items()
            return {name: tensor.to("cpu", dtype)}
        try:
            parts = self.scheme.quantize(task.layer, tensor)
        except ValueError as err:
            raise WeightsCorrupt(f"{task.param}: {err}", where=task.shard) from err
        return {f"{task.layer}.{suffix}": part.cpu() for suffix, part in parts.items()}


def keep_none(layer: str) -> bool:
    """The rule that quantises every linear."""
    return False


def quantize_store(
    transformer_dir: Path,
    out_file: Path,
    fmt: Format,
    method: Method = "mse",
    keep: Callable[[str], bool] = keep_none,
    loras: Sequence[Lora] = (),
    importance: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "auto",
    progress: Callable[[WriteProgress], None] | None = None,
    merge: Merge | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """`write_checkpoint` in FP4: see `Fp4Scheme` for `method` and `importance`."""
    scheme = Fp4Scheme(fmt, method, importance)
    return write_checkpoint(transformer_dir, out_file, scheme, keep, loras, device, progress, merge, clock)


def write_checkpoint(
    transformer_dir: Path,
    out_file: Path,
    scheme: Scheme,
    keep: Callable[[str], bool] = keep_none,
    loras: Sequence[Lora] = (),
    device: torch.device | str = "auto",
    progress: Callable[[WriteProgress], None] | None = None,
    merge: Merge | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Merge `loras`, quantise every nn.Linear except those of `keep`, and store the rest in bf16 or float32.

    `scheme`: a new one for each file. `merge`: a function of every parameter (name, float32 tensor) instead of merging
    `loras`, which are then only recorded. `device`: "auto" is CUDA if there is one, else all cores.

    Raises WeightsMissing and WeightsCorrupt for the source, ConfigInvalid for impossible choices, StorageFull.
    """
    where, why = _pick_device(device)
    source = open_source(transformer_dir)
    model = transformer_on_meta(source.config)
    linears = linear_shapes(model)
    shapes = source.check_against({name: tuple(p.shape) for name, p in model.named_parameters()}, _ignored(model))
    untargeted: tuple[str, ...] = ()
    if loras and merge is None:
        merge, untargeted = _merging(loras, shapes)
    kept = {name for name in linears if keep(name) or scheme.keeps(name)}
    tasks = _plan(source, shapes, linears, kept, scheme, kept_in_fp32(model))
    del model
    applied = tuple({"name": lora.name, "sha256": lora.sha256, "strength": lora.strength} for lora in loras)
    metadata = {
        "format": "pt",  # libraries check this key
        **scheme.metadata,
        SOURCE_KEY: PLACEHOLDER,
        LORAS_KEY: json.dumps(applied, ensure_ascii=False),
        VERSION_KEY: runner.__version__,
    }
    began = clock()
    work = _Work(scheme, where, merge)
    outputs = [(name, shape, dtype) for task in tasks for name, (shape, dtype) in task.outputs.items()]
    with StreamWriter(out_file, outputs, metadata, digest_key=SHA256_KEY) as writer:
        with _Digests(source.shards) as digests:
            _run(tasks, work, writer, digests, progress, clock)
            source_sha256 = digests.combined()
        writer.patch(SOURCE_KEY, source_sha256)
        source.copy_config(out_file.parent)
    assert writer.digest is not None
    return Summary(
        path=out_file,
        format=scheme.name,
        method=scheme.method,
        device=f"{where}: {why}",
        layers=sum(task.layer is not None for task in tasks),
        kept=tuple(name for name in linears if name in kept),
        uncalibrated=tuple(scheme.uncalibrated),
        source_bytes=sum(task.bytes for task in tasks),
        bytes=writer.size,
        seconds=clock() - began,
        source_sha256=source_sha256,
        sha256=writer.digest,
        loras=applied,
        untargeted=untargeted,
        metadata=scheme.metadata,
        errors=scheme.errors,
    )


def _run(
    tasks: Sequence[_Task],
    work: _Work,
    writer: StreamWriter,
    digests: _Digests,
    progress: Callable[[WriteProgress], None] | None,
    clock: Callable[[], float],
) -> None:
    """Read one tensor, compute another and write a third at the same time."""
    began, done, total = clock(), 0, sum(task.bytes for task in tasks)

    def put(tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            writer.write(name, tensor)

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as scribe:
        ahead: Future[Tensor] | None = None
        written: Future[None] | None = None
        for number, task in enumerate(tasks, start=1):
            digests.begin(task.shard)
            tensor = ahead.result() if ahead else _fetch(task, work.device)
            ahead = reader.submit(_fetch, tasks[number], work.device) if number < len(tasks) else None
            with torch.no_grad():
                outputs = work.convert(task, tensor)
            del tensor
            if written:
                written.result()
            written = scribe.submit(put, outputs)
            del outputs
            done += task.bytes
            if progress:
                progress(WriteProgress(task.param, number, len(tasks), done, total, clock() - began))
        if written:
            written.result()


def _fetch(task: _Task, device: torch.device) -> Tensor:
    """Read a tensor of the source: on a CPU mapped, with read-ahead of its pages; on CUDA copied by pinned memory."""
    tensor = read_tensor(task.shard, task.param)
    if device.type == "cuda":
        return tensor.pin_memory().to(device)
    with contextlib.suppress(OSError):  # only advice
        fd = os.open(task.shard, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, task.start, task.bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
    return tensor


def _plan(
    source: Bf16Source,
    shapes: Mapping[str, tuple[int, ...]],
    linears: Mapping[str, tuple[int, int]],
    kept: Set[str],
    scheme: Scheme,
    fp32: tuple[str, ...],
) -> list[_Task]:
    """A task for each parameter, in the order of the shards' bytes."""
    tasks = []
    for shard, info in source.tensors():
        if info.name not in shapes:
            continue  # the model's class ignores it
        layer, _, leaf = info.name.rpartition(".")
        if leaf == "weight" and layer in linears and layer not in kept:
            try:
                table = scheme.tensors(*linears[layer])
            except ValueError as err:
                raise ConfigInvalid(f"{layer}: {err}", where=shard, todo="Choose a rule that keeps this layer") from err
            outputs = {f"{layer}.{suffix}": entry for suffix, entry in table.items()}
            tasks.append(_Task(info.name, shard, info.start, info.bytes, layer, outputs))
        else:
            outputs = {info.name: (info.shape, stored_dtype(info.name, fp32))}
            tasks.append(_Task(info.name, shard, info.start, info.bytes, None, outputs))
    if not any(task.layer for task in tasks):
        raise ConfigInvalid("the rule keeps every layer: nothing is left to quantise", where=source.folder)
    return tasks


def _ignored(model: torch.nn.Module) -> tuple[str, ...]:
    return tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def _merging(loras: Sequence[Lora], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Merge, tuple[str, ...]]:
    from runner.quantization.lora.apply import merge_param, plan_merge

    plan = plan_merge(loras, shapes)
    return (lambda name, weight: merge_param(name, weight, plan)), tuple(plan.untargeted)


def _pick_device(device: torch.device | str) -> tuple[torch.device, str]:
    if device != "auto":
        return torch.device(device), "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda"), f"{torch.cuda.get_device_name()} is there"
    return torch.device("cpu"), f"no CUDA device; {torch.get_num_threads()} threads"


class _Digests:
    """sha256 of shards, each hashed in the background when its first tensor is read."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = shards
        self._running: dict[Path, Future[str]] = {}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(HASHERS, "hash")

    def __enter__(self) -> _Digests:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, shard: Path) -> None:
        if shard not in self._running:
            self._running[shard] = self._pool.submit(self._hash, shard)

    def combined(self) -> str:
        """The digest of one shard, or of the sha256sum listing of several, by name."""
        digests = {}
        for shard in self._shards:
            self.begin(shard)
            digests[shard.name] = self._running[shard].result()
        return combine(digests)

    def _hash(self, shard: Path) -> str:
        sha = hashlib.sha256()
        for block in _blocks(shard):
            if self._stop.is_set():
                break
            sha.update(block)
        return sha.hexdigest()


def _blocks(path: Path, size: int = 1 << 22) -> Iterator[memoryview]:
    buffer = bytearray(size)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            yield memoryview(buffer)[:count]
