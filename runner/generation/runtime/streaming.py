"""Streaming: the transformer's blocks wait in host memory and pass through a few buffers on the device, in turn.

In:   a loaded transformer, a device. Out: its blocks, in order, each ready to run when it comes out of the iterator.
Never: what a block computes, LoRA files, jobs. Weights are copied as they are: results have the same bits.

A part is a block with the face adapter that follows it. Its tensors lie in one flat buffer of the host, page-locked
where the device is a GPU, and are copied in one piece:

    compute       | block 0       | block 1       | block 2       |        with two slots, block i + 1 is on its way
    copies   | 0  | 1 |           | 2 |           | 3 |                    while block i computes; with one, it waits

A slot is written again only after the work that read it: an event orders the copy behind it, on the device, so that
the host never waits. Slots live as long as the stream does and belong to no other, which is why no tensor needs
`record_stream`. Between passes every parameter is at home, on the host: whoever attaches a LoRA or changes a weight
does it there, and what was added to a block (LoRA factors beside packed weights) is packed beside it before the next
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

ALIGNED = 256  # bytes; what kernels and copies like best
PAGE = 4096  # bytes


class CopyEngine(Protocol):
    """Copies between host and slots, and the order of copies and computation."""

    def begin(self) -> None:
        """A pass begins; copies come after all work that is queued now."""

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Queue `source` into `target`, a piece of `slot`, after the work that last used the slot."""

    def use(self, slot: int) -> None:
        """Work queued from now on sees what was copied into `slot`."""

    def done(self, slot: int) -> None:
        """All work that reads `slot` is queued; a copy into it may follow behind."""

    def end(self) -> None:
        """The host's buffers may be written again: no copy from them is under way."""


class HostCopies:
    """The host computes: everything is done when the call returns, in the order of the calls."""

    def begin(self) -> None: ...

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def use(self, slot: int) -> None: ...

    def done(self, slot: int) -> None: ...

    def end(self) -> None: ...


class CudaCopies:
    """A stream of its own for copies, and two events a slot: `ready` after its copy, `free` after its last reader."""

    def __init__(self, device: torch.device, slots: int) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._ready = [torch.cuda.Event() for _ in range(slots)]
        self._free = [torch.cuda.Event() for _ in range(slots)]

    def begin(self) -> None:
        # Slots may be new, in memory that queued work still uses; and every slot is free after that work.
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        for event in self._free:
            event.record(torch.cuda.current_stream(self._device))

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        self._side.wait_event(self._free[slot])
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            self._ready[slot].record(self._side)

    def use(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._ready[slot])

    def done(self, slot: int) -> None:
        self._free[slot].record(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        # The last copy ends before the last block computes: the host has that block's time to queue what follows.
        self._side.synchronize()


class Place(NamedTuple):
    """Where a tensor lies in a flat buffer."""

    tensor: Tensor
    home: Tensor  # the view of it in the host's buffer
    begin: int
    end: int

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.begin : self.end].view(self.home.dtype).view(self.home.shape)


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
            home = self.flat[first:last].view(tensor.dtype).view(tensor.shape)
            home.copy_(tensor)
            tensor.data = home
            self.places.append(Place(tensor, home, first, last))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Are these its tensors, and does each still lie where it was put?"""
        return len(tensors) == len(self.places) and all(
            tensor is place.tensor and tensor.data_ptr() == place.home.data_ptr()
            for tensor, place in zip(tensors, self.places, strict=True)
        )


class Part:
    """Modules that come and go together: what they were built with, and what was added to them since."""

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
        """Pack anew what was added, taken away or moved since the last pass; what stayed is not touched."""
        now = {id(tensor): tensor for tensor in self._tensors()}
        base = self.packed[0]
        if not base.holds([tensor for place in base.places if (tensor := now.get(id(place.tensor))) is not None]):
            self.packed = [PackedBuffer(list(now.values()), pinned=self._pinned)]
            return
        own = {id(place.tensor) for place in base.places}
        added = [tensor for key, tensor in now.items() if key not in own]
        if not added:
            self.packed = [base]
        elif len(self.packed) == 1 or not self.packed[1].holds(added):
            self.packed = [base, PackedBuffer(added, pinned=self._pinned)]

    @property
    def nbytes(self) -> int:
        return sum(packed.flat.numel() for packed in self.packed)

    def go_home(self) -> None:
        for packed in self.packed:
            for place in packed.places:
                place.tensor.data = place.home


class BlockStream:
    """The transformer's blocks by way of `slots` buffers on `device`.

    `host_bytes`, `slot_bytes`: what is held on the host, and on the device while a pass runs. `pinned`: in words.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[nn.Module]],
        device: torch.device,
        *,
        slots: int,
        engine: CopyEngine | None = None,
    ) -> None:
        """`parts`: modules that come and go together; the first of each is handed out. Takes their tensors over."""
        if slots < 1 or not parts:
            raise ValueError(f"{slots} slots for {len(parts)} parts")
        cuda = device.type == "cuda"
        self._device, self._count = device, slots
        self._parts = [Part(modules, pinned=cuda) for modules in parts]
        self._engine: CopyEngine = engine or (CudaCopies(device, slots) if cuda else HostCopies())
        self._slots: list[Tensor] = []
        self._running: Iterator[nn.Module] | None = None
        failed = next((why for part in self._parts for p in part.packed if (why := p.pin_failed)), None)
        self.pinned = "no GPU" if not cuda else "yes" if failed is None else f"no: {failed}"
        if failed is not None:
            structlog.get_logger().warning("host_memory_not_pinned", why=failed, effect="copies wait for the blocks")

    @classmethod
    def of(cls, transformer: Any, device: torch.device, *, slots: int) -> BlockStream:
        """All blocks of a WanAnimateTransformer3DModel with their face adapters; the rest is moved to `device`."""
        every = transformer.config.inject_face_latents_blocks
        adapters = transformer.face_adapter
        parts = [(b, adapters[i // every]) if i % every == 0 else (b,) for i, b in enumerate(transformer.blocks)]
        stream = cls(parts, device, slots=slots)
        for name, child in transformer.named_children():
            if name not in ("blocks", "face_adapter"):
                child.to(device)
        for own in (*transformer.parameters(recurse=False), *transformer.buffers(recurse=False)):
            own.data = own.data.to(device)
        return stream

    def __call__(self) -> Iterator[nn.Module]:
        """One pass. The module that came out last may run until the next is asked for or the iterator is closed.

        Under `torch.no_grad()`. One pass at a time: RuntimeError while another is neither finished nor closed.
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
                part.go_home()
                engine.done(i % self._count)
                using = None
        finally:
            if using is not None:
                parts[using].go_home()
            self._running = None
            engine.end()

    def _send(self, i: int) -> None:
        slot, begin = self._slots[i % self._count], 0
        for packed in self._parts[i].packed:
            end = begin + packed.flat.numel()
            self._engine.copy(i % self._count, slot[begin:end], packed.flat)
            begin = end

    def _point(self, i: int) -> None:
        slot, begin = self._slots[i % self._count], 0
        for packed in self._parts[i].packed:
            flat = slot[begin : begin + packed.flat.numel()]
            for place in packed.places:
                place.tensor.data = place.view(flat)
            begin += packed.flat.numel()

    def _allocate(self) -> None:
        wanted = max(part.nbytes for part in self._parts)
        if not self._slots or self._slots[0].numel() < wanted:
            self._slots = []  # first, so that old and new ones are never there together
            with torch.inference_mode(False):  # else nothing outside inference mode could write to them later
                self._slots = [
                    torch.empty(wanted, dtype=torch.uint8, device=self._device)
                    for _ in range(min(self._count, len(self._parts)))
                ]

    def release(self) -> None:
        """Give the slots back, e.g. while the autoencoder needs the device; the next pass makes them anew."""
        if self._running is not None:
            raise RuntimeError("a pass over the blocks is still open: close its iterator first")
        self._slots = []

    @property
    def slot_bytes(self) -> int:
        return sum(slot.numel() for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)


def whole_pages(count: int) -> Tensor:
    """uint8 for `count` bytes, from the beginning of a page to the end of one: locked pages are no other buffer's."""
    size = -(-count // PAGE) * PAGE
    room = torch.empty(size + PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % PAGE
    return room[begin : begin + size]


def pin(buffer: Tensor) -> str | None:
    """Page-lock the host memory of `buffer` until it is freed; None, or why it could not be, in words.

    In place: torch's own allocator for such memory rounds every size up to a power of two, up to twice the bytes.
    """
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    code = int(runtime.cudaHostRegister(address, buffer.numel() * buffer.element_size(), 0))
    if code:
        forget_error()
        return f"cudaHostRegister returned {code}"
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)
    return None


def forget_error() -> None:
    """Take back the last error of a call to the runtime: the next kernel's launch would report it as its own."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")  # this launch does, and that clears it
