"""Memos: what jobs share, kept by what it was made from, within one budget of bytes over all of it.

In:   a memo's name, a key of all that decides the value, and how to make it. Out: the value, and counts of hits and
      misses. Never: what the values mean, jobs, files.

Two levels, each the least recently used first: on the device, what its budget allows; then on the host, in pinned
memory beside a GPU, from where 10 MB are back within a millisecond; then it is gone. Where the device is the CPU there
is one level. A value is handed out as it was made: bits, precision and order in memory, whichever level it lay in.

Nothing here may depend on the transformer: a job's LoRAs change it. Text and image encoder and autoencoder have none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runner.generation.runtime.memory_plan import DEVICE_BYTES
from runner.timing import StageTimer

__all__ = ["HOST_BYTES", "Memos", "Use", "is_on_host"]

# A window of 81 frames at 480x832 keeps 4 MB of skeletons in bfloat16; its blank scene has 10 MB in float32.
HOST_BYTES = 512 * 2**20
Key = tuple[str, Hashable]


def is_on_host(value: Tensor) -> bool:
    """Does the value need no memory of an accelerator?"""
    return value.device.type == "cpu"


@dataclass
class Use:
    """Of one memo since it was made; `bytes` and `entries` are what it holds now."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    bytes: int = 0


@dataclass
class _Level:
    """Values of one kind of memory, the least recently used first."""

    max_bytes: int
    held: OrderedDict[Key, Tensor] = field(default_factory=OrderedDict)
    bytes: int = 0

    def put(self, key: Key, value: Tensor) -> None:
        self.held[key] = value
        self.bytes += value.nbytes

    def take(self, key: Key) -> Tensor:
        value = self.held.pop(key)
        self.bytes -= value.nbytes
        return value

    def oldest(self, share: Mapping[str, float]) -> Key:
        """What goes next: of a memo beyond its share, if one is, so that a long clip does not push out all else."""
        for name, part in share.items():
            own = [key for key in self.held if key[0] == name]
            if sum(self.held[key].nbytes for key in own) > part * self.max_bytes:
                return own[0]
        return next(iter(self.held))


class Memos:
    """All memos of a pipeline. For one thread.

    `share`: the part of a level that a memo may fill at the expense of others.
    `is_host`: tells a value's level; a test that has no second device passes its own.
    """

    def __init__(
        self,
        host_bytes: int = HOST_BYTES,
        device_bytes: int = DEVICE_BYTES,
        *,
        share: Mapping[str, float] | None = None,
        is_host: Callable[[Tensor], bool] = is_on_host,
        to_host: Callable[[Tensor], Tensor] | None = None,
        to_device: Callable[[Tensor, torch.device], Tensor] | None = None,
    ) -> None:
        if min(host_bytes, device_bytes) < 0:
            raise ValueError(f"a budget must not be negative: {host_bytes} and {device_bytes} bytes")
        self._host, self._device = _Level(host_bytes), _Level(device_bytes)
        self._share = dict(share or {})
        self._is_host, self._to_host, self._to_device = is_host, to_host or _to_host, to_device or _to_device
        self._home: dict[Key, torch.device] = {}  # where a value that is on the host for now was made
        self.use: dict[str, Use] = {}

    def get(self, name: str, key: Hashable, make: Callable[[], Tensor], timer: StageTimer) -> Tensor:
        """What `make` returned for `key` last time, else what it returns now. Nobody may write into it.

        Counts `name`_cache_hits or `name`_cache_misses and notes the bytes kept. A `make` that raises leaves no trace.
        """
        full = (name, key)
        use = self.use.setdefault(name, Use())
        value = self._find(full)
        if value is not None:
            use.hits += 1
            timer.count(f"{name}_cache_hits")
        else:
            use.misses += 1
            timer.count(f"{name}_cache_misses")
            value = make()
            self._keep(full, value)
        self._tally()
        timer.gauge(f"{name}_cache_bytes", use.bytes)
        return value

    def resize(self, host_bytes: int, device_bytes: int) -> None:
        """Other budgets from now on; what is too much goes at once."""
        self._host.max_bytes, self._device.max_bytes = host_bytes, device_bytes
        self._shrink()
        self._tally()

    def clear(self) -> None:
        """Forget all values; the counts stay."""
        for level in (self._host, self._device):
            level.held.clear()
            level.bytes = 0
        self._home.clear()
        self._tally()

    @property
    def host_bytes(self) -> int:
        """Kept on the host now."""
        return self._host.bytes

    @property
    def device_bytes(self) -> int:
        """Kept on the device now."""
        return self._device.bytes

    def _find(self, key: Key) -> Tensor | None:
        for level in (self._device, self._host):
            if key in level.held:
                level.held.move_to_end(key)
                value = level.held[key]
                break
        else:
            return None
        if key not in self._home:
            return value
        value = self._to_device(value, self._home[key])
        if value.nbytes <= self._device.max_bytes:  # used again: the device is where it belongs
            self._host.take(key)
            del self._home[key]
            self._device.put(key, value)
            self._shrink()
        return value

    def _keep(self, key: Key, value: Tensor) -> None:
        if self._is_host(value):
            if value.nbytes <= self._host.max_bytes:  # else all others would go, and then this one
                self._host.put(key, value)
        elif value.nbytes <= self._device.max_bytes:
            self._device.put(key, value)
        else:
            self._lower(key, value)
        self._shrink()

    def _lower(self, key: Key, value: Tensor) -> None:
        if value.nbytes <= self._host.max_bytes:  # else it would be copied only to be dropped
            self._home[key] = value.device
            self._host.put(key, self._to_host(value))

    def _shrink(self) -> None:
        while self._device.bytes > self._device.max_bytes:
            key = self._device.oldest(self._share)
            self._lower(key, self._device.take(key))
        while self._host.bytes > self._host.max_bytes:
            key = self._host.oldest(self._share)
            self._host.take(key)
            self._home.pop(key, None)

    def _tally(self) -> None:
        for use in self.use.values():
            use.entries = use.bytes = 0
        for level in (self._host, self._device):
            for (name, _), value in level.held.items():
                self.use[name].entries += 1
                self.use[name].bytes += value.nbytes


def _to_host(value: Tensor) -> Tensor:
    """A copy in pinned memory, with the same strides. Waits for the device: the copy is whole when it is named."""
    copy = torch.empty_like(value, device="cpu", pin_memory=True)
    return copy.copy_(value)


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    """Back, on the device's current stream, with the same strides. Waits, so that `value` may be dropped at once."""
    return value.to(device)
