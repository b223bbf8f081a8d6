"""What the processes of the cache's tests do: a module of its own, so that starting one imports little."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runner.storage.disk_cache import DiskCache, key, remembered
from runner.timing import StageTimer

__all__ = ["LIMIT", "make_once", "points", "same", "work"]

LIMIT = 150_000  # bytes: about four of the eight clips below


def points(frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"points": np.random.default_rng(seed).normal(size=(frames, 133, 3)).astype(np.float32)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def work(root: Path, seed: int, rounds: int) -> tuple[int, int]:
    """Put, get and damage entries of a cache that is always too small: (wrong answers, right ones)."""
    cache, rng, wrong, right = DiskCache(root, LIMIT), np.random.default_rng(seed), 0, 0
    for _ in range(rounds):
        clip = int(rng.integers(8))
        name, arrays = key({"clip": clip}), points(20 + clip, seed=clip)
        if rng.random() < 0.5:
            cache.put(name, arrays)
        if rng.random() < 0.1:
            path = root / f"{name}.safetensors"
            try:
                with path.open("r+b") as file:
                    file.truncate(int(rng.integers(path.stat().st_size)))
            except (FileNotFoundError, ValueError):
                pass
        found = cache.get(name)
        if found is not None:
            wrong += not same(found, arrays)
            right += same(found, arrays)
    return wrong, right


def make_once(root: Path, made: Path) -> tuple[dict[str, int], float]:
    """Ask for one entry, and leave a line in `made` for each time that it had to be made."""
    timer = StageTimer()

    def make() -> dict[str, np.ndarray]:
        with made.open("a") as file:
            file.write("made\n")
        return points(3, seed=9)

    arrays = remembered(DiskCache(root), key({"dance": 1}), make, timer)
    return timer.counters, float(arrays["points"].sum())
