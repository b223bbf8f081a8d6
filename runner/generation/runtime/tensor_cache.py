"""Tensor cache: keep tensors that several jobs share in host memory, within one budget of bytes.

In:   a name (the kind of value), a key of everything that decides the value, a function that makes it.
Out:  the value, and counts of hits and misses. Never: what the values mean, jobs, files.

Values are kept in host memory; the least recently used is evicted first. A hit returns the value on the device where it
was made, with the same bits, dtype and strides.

No cached value may depend on the transformer, which a job's LoRAs change. Text encoder, image encoder and autoencoder
have no LoRAs.
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

__all__ = ["HOST_BYTES", "TensorCache", "Use"]

# A window of 81 frames at 480x832 keeps 4 MB of skeletons in bfloat16; its blank scene has 10 MB in float32.
HOST_BYTES = 512 * 2**20
Key = tuple[str, Hashable]


@dataclass
class Use:
    """Counts of one name: `hits` and `misses` since the cache was made, `entries` and `bytes` now."""

    hits: int = 0
    misses: int = 0
    entries: int = 0
    bytes: int = 0


class CachedTensor(NamedTuple):
    value: Tensor  # on the host
    device: torch.device  # on which it was made


class TensorCache:
    """A pipeline's cache of tensors. Thread-safe; two threads that miss one key at the same time both make the value.

    `share`: name -> the part of the budget above which values of this name evict each other and no others.
    """

    def __init__(self, max_bytes: int = HOST_BYTES, *, share: Mapping[str, float] | None = None) -> None:
        if max_bytes < 0:
            raise ValueError(f"a budget must not be negative: {max_bytes} bytes")
        # Iteration yields the oldest entry first, because `_find` inserts an entry again when it is used.
        self._cache: LRUCache[Key, CachedTensor] = LRUCache(max_bytes, getsizeof=lambda entry: entry.value.nbytes)
        self._share = dict(share or {})
        self._lock = threading.Lock()
        self.use: dict[str, Use] = {}

    def get(self, name: str, key: Hashable, make: Callable[[], Tensor], timer: StageTimer) -> Tensor:
        """Return the cached value for `key`, else what `make` returns. The caller must not write into it.

        Counts `name`_cache_hits or `name`_cache_misses and records the cached bytes. If `make` raises, nothing is
        cached.
        """
        with self._lock:
            use = self.use.setdefault(name, Use())
            cached = self._find((name, key))
            use.hits, use.misses = use.hits + (cached is not None), use.misses + (cached is None)
        timer.count(f"{name}_cache_{'misses' if cached is None else 'hits'}")
        if cached is not None:
            value = cached.value.to(cached.device)
        else:
            value = make()
            made = CachedTensor(value.to("cpu"), value.device)
            with self._lock:
                self._keep((name, key), made)
        timer.gauge(f"{name}_cache_bytes", use.bytes)
        return value

    def clear(self) -> None:
        """Drop all values; the counts of hits and misses stay."""
        with self._lock:
            for key in list(self._cache):
                self._drop(key)

    @property
    def host_bytes(self) -> int:
        """Bytes cached now, at most the budget."""
        return int(self._cache.currsize)

    def _find(self, key: Key) -> CachedTensor | None:
        entry = self._cache.pop(key, None)
        if entry is not None:
            self._cache[key] = entry
        return entry

    def _keep(self, key: Key, entry: CachedTensor) -> None:
        """Cache `entry`, unless it is larger than the budget or than the entries that it may evict."""
        size, most = entry.value.nbytes, self._cache.maxsize
        if size > most or key in self._cache:  # another thread may have cached it first
            return
        while self._cache.currsize + size > most:
            oldest = self._oldest(key[0], size)
            if oldest is None:
                return
            self._drop(oldest)
        self._cache[key] = entry
        self.use[key[0]].entries += 1
        self.use[key[0]].bytes += size

    def _oldest(self, name: str, size: int) -> Key | None:
        """Return the key to evict for `size` more bytes of `name`; None if there is none.

        A name that would exceed its share evicts its own oldest entry, so that a long clip does not evict all others.
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
