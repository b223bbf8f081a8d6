"""Targets: what reads bytes from outside, each as a function of one file's bytes.

A target returns, or raises RunnerError with a message, within DEADLINE_S of CPU and within MEMORY_BYTES. `verdict` runs
one input and says how it broke that rule, if it did.

A file `seed-*` of the corpus is a valid input; a file `found-*` is an input that broke the rule once, or a limit that
has to hold.
"""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

from runner.errors import InternalError, RunnerError
from tests.fuzz.mutation import Step, mutated, parse

__all__ = ["CORPUS", "DEADLINE_S", "TARGETS", "Target", "bounded_memory", "clear", "verdict"]

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[2]
DEADLINE_S = 2.0  # an input of a megabyte takes a tenth of that on a slow core
MEMORY_BYTES = 1 << 30  # beyond what the process holds before: torch alone maps more
JSON = ("json", parse)


@dataclass(frozen=True)
class Target:
    """`read(folder, data)` is called with an empty folder. `split` finds the document among the bytes."""

    name: str
    read: Callable[[Path, bytes], object]
    split: Callable[[bytes], tuple[Any, Callable[[bytes], bytes]]]

    def warm_up(self, folder: Path) -> None:
        """Read the seeds, which are valid, without a limit: what is imported on the way counts against no input."""
        assert self.seeds
        for data in self.seeds:
            clear(folder)
            self.read(folder, data)

    @property
    def seeds(self) -> list[bytes]:
        """Valid inputs, from which others are made."""
        return _seeds(self.name)

    def input(self, seed: int, steps: list[Step]) -> bytes:
        """What a program makes of one seed."""
        return mutated(self.seeds[seed % len(self.seeds)], steps, self.seeds, self.split)


@cache
def _seeds(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("seed-*"))]


class Overdue(BaseException):
    """Raised by the alarm; no `except Exception` of the code under test stops it."""


def verdict(target: Target, folder: Path, data: bytes) -> str | None:
    """None where the rule holds; else one line that is the same for inputs that break it in the same place."""
    clear(folder)
    begin = time.thread_time()
    try:
        with _alarm():
            target.read(folder, data)
    except RunnerError as err:
        if isinstance(err, InternalError) or not err.what.strip():
            return f"{type(err).__name__} with the message {err.message[:80]!r}"
    except Overdue as err:
        return f"still busy after {10 * DEADLINE_S:g} s, {_place(err)}"
    except BaseException as err:
        if isinstance(err, KeyboardInterrupt):
            raise
        return f"{type(err).__name__} {_place(err)}"
    taken = time.thread_time() - begin
    return f"took more than {DEADLINE_S:g} s of CPU" if taken > DEADLINE_S else None


def clear(folder: Path) -> None:
    """Remove the last input. No file is written over: a tensor of it may still be mapped."""
    for old in folder.iterdir():
        old.unlink()


def _place(err: BaseException) -> str:
    """The project's innermost line."""
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if "/runner/" in frame.filename]
    if not frames:
        return "outside of runner"
    return f"in {Path(frames[-1].filename).relative_to(ROOT)}, {frames[-1].name}"


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Overdue

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 10 * DEADLINE_S)  # of the clock: the machine may be busy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """MemoryError for what would map MEMORY_BYTES more than there is now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# How a document lies in a file


def _whole(data: bytes) -> tuple[Any, Callable[[bytes], bytes]]:
    return parse(data), lambda text: text


def _one_line(data: bytes) -> tuple[Any, Callable[[bytes], bytes]]:
    """The longest line, which is a job or the defaults."""
    lines = data.splitlines()
    at = max(range(len(lines)), key=lambda i: len(lines[i]))
    return parse(lines[at]), lambda text: b"\n".join([*lines[:at], text, *lines[at + 1 :]])


def _yaml(data: bytes) -> tuple[Any, Callable[[bytes], bytes]]:
    """The seeds that are JSON, which YAML contains; the others are text."""
    return _whole(data) if data.startswith(b"{") else (None, lambda text: text)


def _header(data: bytes) -> tuple[Any, Callable[[bytes], bytes]]:
    stop = 8 + int.from_bytes(data[:8], "little")
    return parse(data[8:stop]), lambda text: len(text).to_bytes(8, "little") + text + data[stop:]


# What reads


def _manifest(suffix: str, folder: Path, data: bytes) -> None:
    from runner.spec.manifest import load_manifest

    path = folder / f"m{suffix}"
    path.write_bytes(data)
    load_manifest(str(path))


def _record(name: str, folder: Path, data: bytes) -> None:
    """No error at all for a record, whatever it holds; and a decision, or a RunnerError, from what it says."""
    from runner.batch.ledger import Ledger
    from runner.storage.local import LocalStorage

    storage = LocalStorage(folder.parent / "out")
    storage.write_bytes(f"jobs/a/{name}.json", data)
    ledger = Ledger(storage)
    try:
        ledger.result("a") if name == "result" else ledger.attempt("a")
    except RunnerError as err:
        raise AssertionError("a broken record is no record") from err
    ledger.decide("a", "f" * 64, {"options": {"seed": 1}})


def _weights(folder: Path, data: bytes) -> None:
    """All readers of headers, on one file."""
    from runner.quantization.files.bf16_source import open_source
    from runner.quantization.files.file_header import read_header
    from runner.quantization.files.published import read_published
    from runner.quantization.files.published_names import as_diffusers
    from runner.quantization.files.quantized_header import check_file
    from runner.weights import store

    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(data)
    (folder / "config.json").write_text("{}")
    readers: list[Callable[[], object]] = [
        lambda: store.check_weights(folder, "diffusion_pytorch_model"),
        lambda: store.check_lora(path),
        lambda: as_diffusers(read_header(path)),
        lambda: open_source(folder).check_against({"a": (2, 3)}, ["norm"]),
        lambda: check_file(path),
        lambda: read_published(path, _model()),
    ]
    _run_each(readers)


def _run_each(readers: list[Callable[[], object]]) -> None:
    """Run all, whatever the first ones say; refused where all refuse."""
    refused: list[RunnerError] = []
    for reader in readers:
        try:
            reader()
        except RunnerError as err:
            refused.append(err)
    if len(refused) == len(readers):
        raise refused[0]


@cache
def _model() -> Any:
    from runner.quantization.rules import transformer_on_meta
    from tests.quantization.random_stores import TINY

    return transformer_on_meta(dict(TINY) | {"num_layers": 1})


def _text_encoder(folder: Path, data: bytes) -> None:
    from runner.quantization.files.text_encoder import check_text_encoder

    (folder / "text.safetensors").write_bytes(data)
    check_text_encoder(folder / "text.safetensors")


def _index(folder: Path, data: bytes) -> None:
    """The index of shards, which is read at two places."""
    from runner.quantization.files.bf16_source import open_source
    from runner.weights import store

    (folder / "diffusion_pytorch_model.safetensors.index.json").write_bytes(data)
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(_seeds("safetensors_header")[-1])

    def check() -> None:
        if all(path.is_file() for path in store.weight_files(folder, "diffusion_pytorch_model")):
            store.check_weights(folder, "diffusion_pytorch_model")

    _run_each([lambda: open_source(folder), check])


def _config(folder: Path, data: bytes) -> None:
    """A component's config.json."""
    from runner.weights.store import read_json

    (folder / "config.json").write_bytes(data)
    read_json(folder / "config.json")


def _quantize_config(folder: Path, data: bytes) -> None:
    from runner.quantization.files.published import read_published

    (folder / "quantize_config.json").write_bytes(data)
    read_published(_published(), _model(), folder / "quantize_config.json").read_options()


@cache
def _published() -> Path:
    """A file that the model's layers are read from; its bytes are all zero."""
    import tempfile

    import torch
    from safetensors.torch import save_file

    from runner.quantization.rules import linear_shapes

    tensors = {name: torch.zeros(param.shape) for name, param in _model().named_parameters()}
    for layer, (out, wide) in linear_shapes(_model()).items():
        del tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight_packed"] = torch.zeros(out, wide // 2, dtype=torch.uint8)
        tensors[f"{layer}.weight_scale"] = torch.zeros(out, wide // 32)
    path = Path(tempfile.mkdtemp(prefix="fuzz-")) / "quantized_transformer.safetensors"
    save_file(tensors, path)
    return path


def _lora(folder: Path, data: bytes) -> None:
    from runner.quantization.lora.read import read_lora

    path = folder / "a.safetensors"
    path.write_bytes(data)
    for deltas in read_lora(path).deltas.values():
        for delta in deltas:
            assert len(delta.shape) >= 0


def _peft_config(folder: Path, data: bytes) -> None:
    """The config that PEFT leaves beside its tensors."""
    from runner.quantization.lora.read import read_lora

    (folder / "adapter_model.safetensors").write_bytes(_seeds("lora")[0])
    (folder / "adapter_config.json").write_bytes(data)
    read_lora(folder / "adapter_model.safetensors")


def _s3_extra(folder: Path, data: bytes) -> None:
    from runner.storage.s3_arguments import upload_arguments

    upload_arguments({"VIDEO_LAB_S3_EXTRA": os.fsdecode(data)})


TARGETS = {
    target.name: target
    for target in (
        Target("manifest_yaml", partial(_manifest, ".yaml"), _yaml),
        Target("manifest_jsonl", partial(_manifest, ".jsonl"), _one_line),
        Target("result", partial(_record, "result"), _whole),
        Target("attempt", partial(_record, "attempt"), _whole),
        Target("safetensors_header", _weights, _header),
        Target("text_encoder", _text_encoder, _header),
        Target("weights_index", _index, _whole),
        Target("config", _config, _whole),
        Target("quantize_config", _quantize_config, _whole),
        Target("lora", _lora, _header),
        Target("peft_config", _peft_config, _whole),
        Target("s3_extra", _s3_extra, _whole),
    )
}
