"""Memos: what jobs share, kept by what it was made from, within one budget of bytes over all of it.

In:   a memo's name, a key of all that decides the value, and how to make it. Out: the value, and counts of hits and
      misses. Never: what the values mean, jobs, files.

Values are kept in the host's memory; the least recently used is dropped first. A hit is handed out on the device where
the value was made, with the same bits, precision and strides.

Nothing here may depend on the transformer: a job's LoRAs change it. Text and image encoder and autoencoder have none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cachetools import LRUCache
from torch import Tensor

from runner.timing import StageTimer

__all__ = ["HOST_BYTES", "Memos", "Use"]

# A window of 81 frames at 480x832 keeps 4 MB of skeletons in bfloat16; its blank scene has 10 MB in float32.
HOST_BYTES = 512 * 2**20
Key = tuple[str, Hashable]


@dataclass
class Use:
    """Of one memo since it was made; `bytes` and `entries` are what it holds now."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    bytes: int = 0


class Held(NamedTuple):
    value: Tensor  # on the host
    device: torch.device  # where it was made


class Memos:
    """All memos of a pipeline. May be used by several threads at once; two that miss one key both make the value.

    `share`: the part of the budget that a memo may fill at the expense of others.
    """

    def __init__(self, max_bytes: int = HOST_BYTES, *, share: Mapping[str, float] | None = None) -> None:
        if max_bytes < 0:
            raise ValueError(f"a budget must not be negative: {max_bytes} bytes")
        # Iterating gives the oldest first, because `_find` inserts what it finds anew.
        self._cache: LRUCache[Key, Held] = LRUCache(max_bytes, getsizeof=lambda held: held.value.nbytes)
        self._share = dict(share or {})
        self._lock = threading.Lock()
        self.use: dict[str, Use] = {}

    def get(self, name: str, key: Hashable, make: Callable[[], Tensor], timer: StageTimer) -> Tensor:
        """What `make` returned for `key` last time, else what it returns now. The caller must not write into it.

        Counts `name`_cache_hits or `name`_cache_misses and notes the bytes kept. A `make` that raises leaves no trace.
        """
        with self._lock:
            use = self.use.setdefault(name, Use())
            held = self._find((name, key))
            use.hits, use.misses = use.hits + (held is not None), use.misses + (held is None)
        timer.count(f"{name}_cache_{'misses' if held is None else 'hits'}")
        if held is not None:
            value = held.value.to(held.device)
        else:
            value = make()
            kept = Held(value.to("cpu"), value.device)
            with self._lock:
                self._keep((name, key), kept)
        timer.gauge(f"{name}_cache_bytes", use.bytes)
        return value

    def clear(self) -> None:
        """Forget all values; the counts of hits and misses stay."""
        with self._lock:
            for key in list(self._cache):
                self._drop(key)

    @property
    def host_bytes(self) -> int:
        """Kept now, at most the budget."""
        return int(self._cache.currsize)

    def _find(self, key: Key) -> Held | None:
        held = self._cache.pop(key, None)
        if held is not None:
            self._cache[key] = held
        return held

    def _keep(self, key: Key, held: Held) -> None:
        """Unless it is larger than the budget, or than all that may make room for it."""
        size, most = held.value.nbytes, self._cache.maxsize
        if size > most or key in self._cache:  # another thread may have been quicker
            return
        while self._cache.currsize + size > most:
            oldest = self._oldest(key[0], size)
            if oldest is None:
                return
            self._drop(oldest)
        self._cache[key] = held
        self.use[key[0]].entries += 1
        self.use[key[0]].bytes += size

    def _oldest(self, name: str, size: int) -> Key | None:
        """What makes room for `size` bytes of memo `name`: of a memo that is above its share with them, its own oldest.

        Thus a long clip does not push out all else. None if that memo has nothing to give.
        """
        for shared, part in self._share.items():
            filled = self.use.get(shared, Use()).bytes + size * (shared == name)
            if filled > part * self._cache.maxsize:
                return next((key for key in self._cache if key[0] == shared), None)
        return next(iter(self._cache))

    def _drop(self, key: Key) -> None:
        size = self._cache.pop(key).value.nbytes
        self.use[key[0]].entries -= 1
        self.use[key[0]].bytes -= size
