"""IO binding: run a session with fixed buffers for its inputs and outputs on the device.

In:   an onnxruntime session and a device. Out: `run(names, feeds)` like the session's, arrays in and arrays out.
Never: the meaning of what the network computes.

The runtime's `run` allocates on the device at every call and copies through pageable memory, which the driver copies a
second time. Here each input, and each output of known shape, has one buffer on the device, as large as the largest
batch so far. Results are copied into page-locked memory. Pictures that are written into a `host_array` need no further
copy on the host. Buffers are torch's: its allocators keep and reuse them, and its statistics count them.

On a GPU the whole run is on one stream, the session's (`user_compute_stream`), and only that stream is waited for.
Another thread denoises on torch's default stream: a copy there would wait for the work that it has queued. The
binding's own `synchronize_outputs` waits for the whole device with Python's GIL held, so that the other thread could
not queue more work meanwhile.
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
    """Takes the place of an `InferenceSession`. Runs share buffers, so there is one at a time. Results are copies."""

    def __init__(self, session: Any, device: str, stream: Any | None = None) -> None:
        """device: "cuda:N"; or "cpu", where it works too, but saves nothing.

        stream: the torch.cuda.Stream on which the session computes. It is kept here: the session has only its address.
        """
        import torch

        self.session, self.device, self.stream = session, device, stream
        self._device = torch.device(device)
        self._declared = {output.name: output for output in session.get_outputs()}
        self._inputs = {item.name: item for item in session.get_inputs()}
        self._buffers: dict[str, Any] = {}  # name → torch tensor [capacity, …] on the device
        self._lock = threading.Lock()

    def get_inputs(self) -> Sequence[Any]:
        return self.session.get_inputs()

    def get_outputs(self) -> Sequence[Any]:
        return self.session.get_outputs()

    def get_providers(self) -> Sequence[str]:
        return self.session.get_providers()

    def run(self, names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs `names` for C-contiguous `feeds`. The numbers are the same as from the session's `run`."""
        import torch

        with self._lock, self._on_stream():
            binding = self.session.io_binding()
            where = (self._device.type, self._device.index or 0)
            sizes: dict[str, int] = {}
            for name, array in feeds.items():
                buffer = self._buffer(name, array.shape, array.dtype)
                buffer.copy_(torch.from_numpy(array), non_blocking=True)
                binding.bind_input(name, *where, array.dtype.type, array.shape, buffer.data_ptr())
                sizes |= _sizes_by_name(self._inputs[name].shape, array.shape)
            bound = {}
            for name in names:
                output = self._declared[name]
                shape, kind = known_shape(output.shape, sizes), TYPES.get(output.type)
                if shape is None or kind is None:
                    # The size is known only during the run: the runtime allocates it and copies it to the host.
                    binding.bind_output(name, "cpu")
                    continue
                bound[name] = self._buffer(name, shape, np.dtype(kind))
                binding.bind_output(name, *where, kind, shape, bound[name].data_ptr())
            self.session.run_with_iobinding(binding)  # releases the GIL, and waits for its own stream
            copies = {name: self._copy_to_host(tensor) for name, tensor in bound.items()}
            if self.stream is not None:
                self.stream.synchronize()  # releases the GIL
            others = dict(zip(names, binding.get_outputs(), strict=True)) if len(copies) < len(names) else {}
            return [copies[name] if name in copies else others[name].numpy() for name in names]

    def _on_stream(self) -> AbstractContextManager[Any]:
        """Return a context in which torch copies and allocates on the session's stream."""
        if self.stream is None:
            return nullcontext()
        import torch

        return torch.cuda.stream(self.stream)

    def _buffer(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        """Return the first [*shape] of this name's buffer, after enlarging the buffer if needed."""
        import torch

        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[1:] != tuple(shape[1:]) or len(buffer) < shape[0]:
            self._buffers.pop(name, None)  # freed before the larger one is allocated
            buffer = torch.empty(tuple(shape), dtype=getattr(torch, dtype.name), device=self._device)
            self._buffers[name] = buffer
        return buffer[: shape[0]]

    def _copy_to_host(self, tensor: Any) -> np.ndarray:
        array = host_array(tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")), self.device)
        import torch

        torch.from_numpy(array).copy_(tensor, non_blocking=self.stream is not None)
        return array


def host_array(shape: tuple[int, ...], dtype: np.dtype[Any] | type, device: str | None) -> np.ndarray:
    """Return an uninitialised array for the input of a network on `device`: page-locked for a GPU, else plain.

    Allocating page-locked memory is slow. torch keeps freed memory, so that only the first array of a size is slow.
    """
    if device is None or not device.startswith("cuda"):
        return np.empty(shape, dtype)
    import torch

    array: np.ndarray = torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True).numpy()
    return array


def known_shape(declared: Sequence[Any] | None, sizes: dict[str, int]) -> tuple[int, ...] | None:
    """Return a declared shape with its named sizes replaced; None if one of them is unknown before the run."""
    found = [size if isinstance(size, int) else sizes.get(str(size), 0) for size in declared or ()]
    return tuple(found) if found and all(size > 0 for size in found) else None


def _sizes_by_name(declared: Sequence[Any], shape: Sequence[int]) -> dict[str, int]:
    return {name: size for name, size in zip(declared, shape, strict=True) if isinstance(name, str)}
