"""Streaming: keep the transformer's blocks in host memory and copy them into a few prefetch buffers on the device.

In:   a loaded transformer, a device. Out: its blocks in order, each ready to run when the iterator yields it.
Never: what a block computes, LoRA files, jobs. Weights are copied unchanged, so results have the same bits.

A part is a block with the face adapter that follows it. Its tensors share one flat host buffer, which is page-locked if
the device is a GPU, and are copied in one piece:

    compute       | block 0       | block 1       | block 2       |        with two buffers, block i + 1 is copied
    copies   | 0  | 1 |           | 2 |           | 3 |                    while block i computes; with one, it waits

A buffer is written again only after the work that reads it: an event on the device orders the copy behind that work,
so the host never waits. The buffers exist as long as the stream and nothing else uses them, so no tensor needs
`record_stream`. Outside a forward pass all parameters are in host memory. LoRAs are attached and weights are changed
there. Tensors that were added to a block (LoRA factors beside packed weights) are packed beside it before the next
pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import structlog
import torch
from torch import Tensor, nn

__all__ = ["BlockStream", "CopyEngine", "CudaCopies", "HostCopies", "pin"]

ALIGNED = 256  # bytes; alignment of tensors in a buffer, for fast kernels and copies
PAGE = 4096  # bytes


class CopyEngine(Protocol):
    """Copy from the host to the prefetch buffers, and order copies and computation."""

    def begin(self) -> None:
        """Begin a pass: its copies run after all work that is queued now."""

    def copy(self, buffer: int, target: Tensor, source: Tensor) -> None:
        """Queue a copy of `source` into `target`, a piece of `buffer`, after the work that last used the buffer."""

    def use(self, buffer: int) -> None:
        """Make work that is queued from now on wait for the copies into `buffer`."""

    def done(self, buffer: int) -> None:
        """All work that reads `buffer` is queued: later copies into it run after that work."""

    def end(self) -> None:
        """Wait for all copies: afterwards the host's buffers may be written again."""


class HostCopies:
    """Copies where the CPU computes: each is done when its call returns."""

    def begin(self) -> None: ...

    def copy(self, buffer: int, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def use(self, buffer: int) -> None: ...

    def done(self, buffer: int) -> None: ...

    def end(self) -> None: ...


class CudaCopies:
    """Copies on a separate CUDA stream. A buffer has two events: `ready` after its copy, `free` after its last use."""

    def __init__(self, device: torch.device, buffers: int) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._ready = [torch.cuda.Event() for _ in range(buffers)]
        self._free = [torch.cuda.Event() for _ in range(buffers)]

    def begin(self) -> None:
        # New buffers may lie in memory that queued work still uses. After that work every buffer is free.
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        for event in self._free:
            event.record(torch.cuda.current_stream(self._device))

    def copy(self, buffer: int, target: Tensor, source: Tensor) -> None:
        self._side.wait_event(self._free[buffer])
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            self._ready[buffer].record(self._side)

    def use(self, buffer: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._ready[buffer])

    def done(self, buffer: int) -> None:
        self._free[buffer].record(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        # The last copy ends before the last block computes. While that block computes, the host queues what follows.
        self._side.synchronize()


class Place(NamedTuple):
    """The place of a tensor in a flat buffer."""

    tensor: Tensor
    host_view: Tensor  # the tensor's view of the host's buffer
    begin: int
    end: int

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.begin : self.end].view(self.host_view.dtype).view(self.host_view.shape)


class PackedBuffer:
    """Tensors in one flat buffer of the host, `flat` uint8. Each tensor's data becomes its view of the buffer."""

    def __init__(self, tensors: Sequence[Tensor], *, pinned: bool) -> None:
        ends, begin = [], 0
        for tensor in tensors:
            ends.append((begin, begin + tensor.numel() * tensor.element_size()))
            begin = -(-ends[-1][1] // ALIGNED) * ALIGNED
        self.flat = whole_pages(begin) if pinned else torch.empty(begin, dtype=torch.uint8)
        self.pin_failed = pin(self.flat) if pinned and begin else None
        self.places = []
        for tensor, (first, last) in zip(tensors, ends, strict=True):
            host_view = self.flat[first:last].view(tensor.dtype).view(tensor.shape)
            host_view.copy_(tensor)
            tensor.data = host_view
            self.places.append(Place(tensor, host_view, first, last))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the buffer holds exactly `tensors`, each still at its place."""
        return len(tensors) == len(self.places) and all(
            tensor is place.tensor and tensor.data_ptr() == place.host_view.data_ptr()
            for tensor, place in zip(tensors, self.places, strict=True)
        )


class Part:
    """Modules that are copied together: their original tensors, and those that were added since."""

    def __init__(self, modules: Sequence[nn.Module], *, pinned: bool) -> None:
        self.modules, self._pinned = modules, pinned
        self.packed = [PackedBuffer(self._tensors(), pinned=pinned)]

    def _tensors(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for module in self.modules:
            for tensor in (*module.parameters(), *module.buffers()):
                found.setdefault(id(tensor), tensor)
        return list(found.values())

    def refresh(self) -> None:
        """Pack again what was added, removed or moved since the last pass; leave the rest as it is."""
        now = {id(tensor): tensor for tensor in self._tensors()}
        base = self.packed[0]
        if not base.holds([tensor for place in base.places if (tensor := now.get(id(place.tensor))) is not None]):
            self.packed = [PackedBuffer(list(now.values()), pinned=self._pinned)]
            return
        packed = {id(place.tensor) for place in base.places}
        added = [tensor for key, tensor in now.items() if key not in packed]
        if not added:
            self.packed = [base]
        elif len(self.packed) == 1 or not self.packed[1].holds(added):
            self.packed = [base, PackedBuffer(added, pinned=self._pinned)]

    @property
    def nbytes(self) -> int:
        return sum(packed.flat.numel() for packed in self.packed)

    def restore_host_views(self) -> None:
        """Point every parameter at host memory again."""
        for packed in self.packed:
            for place in packed.places:
                place.tensor.data = place.host_view


class BlockStream:
    """The transformer's blocks, copied one after another into `buffers` prefetch buffers on `device`.

    `host_bytes`: bytes on the host. `buffer_bytes`: bytes on the device while a pass runs. `pinned`: in words, whether
    host memory is page-locked.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[nn.Module]],
        device: torch.device,
        *,
        buffers: int,
        engine: CopyEngine | None = None,
    ) -> None:
        """`parts`: modules that are copied together; the first of each is yielded. Moves their tensors to the host."""
        if buffers < 1 or not parts:
            raise ValueError(f"{buffers} buffers for {len(parts)} parts")
        cuda = device.type == "cuda"
        self._device, self._count = device, buffers
        self._parts = [Part(modules, pinned=cuda) for modules in parts]
        self._engine: CopyEngine = engine or (CudaCopies(device, buffers) if cuda else HostCopies())
        self._buffers: list[Tensor] = []
        self._running: Iterator[nn.Module] | None = None
        failed = next((why for part in self._parts for p in part.packed if (why := p.pin_failed)), None)
        self.pinned = "no GPU" if not cuda else "yes" if failed is None else f"no: {failed}"
        if failed is not None:
            structlog.get_logger().warning("host_memory_not_pinned", why=failed, effect="copies wait for the blocks")

    @classmethod
    def of(cls, transformer: Any, device: torch.device, *, buffers: int) -> BlockStream:
        """Stream all blocks of a WanAnimateTransformer3DModel with their face adapters; move the rest to `device`."""
        every = transformer.config.inject_face_latents_blocks
        adapters = transformer.face_adapter
        parts = [(b, adapters[i // every]) if i % every == 0 else (b,) for i, b in enumerate(transformer.blocks)]
        stream = cls(parts, device, buffers=buffers)
        for name, child in transformer.named_children():
            if name not in ("blocks", "face_adapter"):
                child.to(device)
        for tensor in (*transformer.parameters(recurse=False), *transformer.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)
        return stream

    def __call__(self) -> Iterator[nn.Module]:
        """Start one pass. A yielded module may run until the next one is requested or the iterator is closed.

        Call it under `torch.no_grad()`. Raises RuntimeError while another pass is neither finished nor closed.
        """
        if self._running is not None:
            raise RuntimeError("a pass over the blocks is still open: close its iterator first")
        self._running = self._run()
        return self._running

    def _run(self) -> Iterator[nn.Module]:
        engine, parts = self._engine, self._parts
        queued = 0
        using: int | None = None
        try:
            for part in parts:
                part.refresh()
            self._allocate()
            engine.begin()
            for i, part in enumerate(parts):
                while queued < min(i + self._count, len(parts)):
                    self._send(queued)
                    queued += 1
                using = i
                engine.use(i % self._count)
                self._point(i)
                yield part.modules[0]
                part.restore_host_views()
                engine.done(i % self._count)
                using = None
        finally:
            if using is not None:
                parts[using].restore_host_views()
            self._running = None
            engine.end()

    def _send(self, i: int) -> None:
        buffer, begin = self._buffers[i % self._count], 0
        for packed in self._parts[i].packed:
            end = begin + packed.flat.numel()
            self._engine.copy(i % self._count, buffer[begin:end], packed.flat)
            begin = end

    def _point(self, i: int) -> None:
        buffer, begin = self._buffers[i % self._count], 0
        for packed in self._parts[i].packed:
            flat = buffer[begin : begin + packed.flat.numel()]
            for place in packed.places:
                place.tensor.data = place.view(flat)
            begin += packed.flat.numel()

    def _allocate(self) -> None:
        wanted = max(part.nbytes for part in self._parts)
        if not self._buffers or self._buffers[0].numel() < wanted:
            self._buffers = []  # first, so that old and new buffers never exist together
            with torch.inference_mode(False):  # else they could not be written outside inference mode
                self._buffers = [
                    torch.empty(wanted, dtype=torch.uint8, device=self._device)
                    for _ in range(min(self._count, len(self._parts)))
                ]

    def release(self) -> None:
        """Free the buffers, e.g. while the autoencoder needs the device. The next pass allocates them again."""
        if self._running is not None:
            raise RuntimeError("a pass over the blocks is still open: close its iterator first")
        self._buffers = []

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers)

    @property
    def host_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)


def whole_pages(count: int) -> Tensor:
    """Return uint8 for `count` bytes, in whole pages: a locked page must not belong to two buffers."""
    size = -(-count // PAGE) * PAGE
    room = torch.empty(size + PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % PAGE
    return room[begin : begin + size]


def pin(buffer: Tensor) -> str | None:
    """Page-lock the host memory of `buffer` until it is freed. Return None, or in words why this failed.

    The memory is locked in place: torch's allocator for pinned memory rounds every size up to a power of two, which may
    take twice the bytes.
    """
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    code = int(runtime.cudaHostRegister(address, buffer.numel() * buffer.element_size(), 0))
    if code:
        forget_error()
        return f"cudaHostRegister returned {code}"
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)
    return None


def forget_error() -> None:
    """Clear the last error of the CUDA runtime: otherwise the launch of the next kernel would report it."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")  # this launch reports the error, which clears it
