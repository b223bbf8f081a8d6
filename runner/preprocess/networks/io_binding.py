"""IO binding: a session whose inputs and outputs have their places on the device.

In:   an onnxruntime session and a device. Out: `run(names, feeds)` as the session's own, arrays in and arrays out.
Never: what the network computes.

The runtime's `run` allocates on the device for every call and copies through pageable memory, which the driver copies
once more. Here each input has one place on the device, as large as the largest batch so far, as have outputs of known
shape, and results land in page-locked memory. Who fills its pictures into `host_array` saves the last copy. Buffers are
torch's: its allocators keep and reuse them, and its statistics count them.

On a GPU all of a run is on one stream, that on which the session was told to compute (`user_compute_stream`), and only
that stream is waited for. torch's default stream is the one on which another thread denoises: a copy there would stand
behind what that thread has queued. The binding's own `synchronize_outputs` waits for the whole device, and holds
Python's lock while it does, so that the other thread could not queue any more.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

__all__ = ["BoundSession", "host_array", "known_shape"]

TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class BoundSession:
    """Stands for an `InferenceSession`. One run at a time, as the places are shared; results are the caller's own."""

    def __init__(self, session: Any, device: str, stream: Any | None = None) -> None:
        """device: "cuda:N", or "cpu", where the same calls work and gain nothing.

        stream: the torch.cuda.Stream on which the session computes; it is kept, as the session has its address alone.
        """
        import torch

        self.session, self.device, self.stream = session, device, stream
        self._device = torch.device(device)
        self._declared = {output.name: output for output in session.get_outputs()}
        self._inputs = {item.name: item for item in session.get_inputs()}
        self._places: dict[str, Any] = {}  # name → torch tensor [capacity, …] on the device
        self._lock = threading.Lock()

    def get_inputs(self) -> Sequence[Any]:
        return self.session.get_inputs()

    def get_outputs(self) -> Sequence[Any]:
        return self.session.get_outputs()

    def get_providers(self) -> Sequence[str]:
        return self.session.get_providers()

    def run(self, names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Arrays of the outputs `names`, for C-contiguous `feeds`. The same numbers as the session's own `run`."""
        import torch

        with self._lock, self._on_stream():
            binding = self.session.io_binding()
            where = (self._device.type, self._device.index or 0)
            sizes: dict[str, int] = {}
            for name, array in feeds.items():
                place = self._place(name, array.shape, array.dtype)
                place.copy_(torch.from_numpy(array), non_blocking=True)
                binding.bind_input(name, *where, array.dtype.type, array.shape, place.data_ptr())
                sizes |= _sizes_by_name(self._inputs[name].shape, array.shape)
            bound = {}
            for name in names:
                output = self._declared[name]
                shape, kind = known_shape(output.shape, sizes), TYPES.get(output.type)
                if shape is None or kind is None:
                    # Allocated by the runtime, which alone knows its size; copied to the host on its stream.
                    binding.bind_output(name, "cpu")
                    continue
                bound[name] = self._place(name, shape, np.dtype(kind))
                binding.bind_output(name, *where, kind, shape, bound[name].data_ptr())
            self.session.run_with_iobinding(binding)  # releases Python's lock, and waits for its own stream
            copies = {name: self._fetched(tensor) for name, tensor in bound.items()}
            if self.stream is not None:
                self.stream.synchronize()  # releases Python's lock
            others = dict(zip(names, binding.get_outputs(), strict=True)) if len(copies) < len(names) else {}
            return [copies[name] if name in copies else others[name].numpy() for name in names]

    def _on_stream(self) -> AbstractContextManager[Any]:
        """A context in which torch copies and allocates on the session's stream."""
        if self.stream is None:
            return nullcontext()
        import torch

        return torch.cuda.stream(self.stream)

    def _place(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        """The tensor [*shape] at the start of this name's place, made larger first if need be."""
        import torch

        held = self._places.get(name)
        if held is None or held.shape[1:] != tuple(shape[1:]) or len(held) < shape[0]:
            self._places.pop(name, None)  # given back before the larger one is asked for
            held = torch.empty(tuple(shape), dtype=getattr(torch, dtype.name), device=self._device)
            self._places[name] = held
        return held[: shape[0]]

    def _fetched(self, tensor: Any) -> np.ndarray:
        array = host_array(tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")), self.device)
        import torch

        torch.from_numpy(array).copy_(tensor, non_blocking=self.stream is not None)
        return array


def host_array(shape: tuple[int, ...], dtype: np.dtype[Any] | type, device: str | None) -> np.ndarray:
    """An array, not yet filled, to hand to a network on `device`: page-locked for a GPU, plain otherwise.

    Page-locked memory is slow to get; torch keeps what is given back, so that only the first of a size costs that.
    """
    if device is None or not device.startswith("cuda"):
        return np.empty(shape, dtype)
    import torch

    array: np.ndarray = torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True).numpy()
    return array


def known_shape(declared: Sequence[Any] | None, sizes: dict[str, int]) -> tuple[int, ...] | None:
    """A declared shape with its named sizes put in; None if one of them is not known before the run."""
    found = [size if isinstance(size, int) else sizes.get(str(size), 0) for size in declared or ()]
    return tuple(found) if found and all(size > 0 for size in found) else None


def _sizes_by_name(declared: Sequence[Any], shape: Sequence[int]) -> dict[str, int]:
    return {name: size for name, size in zip(declared, shape, strict=True) if isinstance(name, str)}
