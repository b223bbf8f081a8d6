"""Text cache: keep embeddings of prompts on local disk, so that each text is encoded once.

In:   a folder, a digest of tokenizer and encoder, a text, a function that embeds it. Out: the embedding, bit for bit.
Never: models. `storage/disk_cache.py` handles files, locks and the size limit: files are written by rename and hold a
digest, the least recently used are deleted first, and processes that need one text at the same time encode it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runner.generation.runtime.finite import not_finite
from runner.storage.disk_cache import DiskCache, key, remembered
from runner.timing import StageTimer

__all__ = ["MAX_BYTES", "PromptCache"]

MAX_BYTES = 256 << 20  # a prompt of 30 tokens takes 240 kB in bfloat16: about a thousand prompts
NAME = "prompt_disk_cache"
# The integer type of the same width in which a file stores the bits: numpy has no bfloat16.
BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}


class PromptCache:
    """The cache folder for one encoder. Safe for any number of processes and threads."""

    def __init__(self, root: Path, identity: Mapping[str, str], max_bytes: int = MAX_BYTES) -> None:
        """`identity`: everything except the text that decides an embedding: files' sha256, library versions, device."""
        self.identity = dict(identity)
        self.files = DiskCache(root, max_bytes)

    @classmethod
    def open(cls, root: Path, encoder: str, dtype: str, device: torch.device) -> PromptCache:
        """Open the cache for `encoder` (a digest of tokenizer and text encoder) in `dtype` on `device`."""
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
        return cls(root, {"encoder": encoder, "encoder_dtype": dtype, "device": where, **versions})

    def get(self, text: str, tokens: int, dtype: torch.dtype, make: Callable[[], Tensor], timer: StageTimer) -> Tensor:
        """Return [1, tokens, text_dim] in `dtype`: from disk on the host, else what `make` returns, on its device.

        Counts prompt_disk_cache_hits or _misses. An unusable folder is reported and costs only time. Raises NotFinite
        if `make` returns NaN or infinity, so that no such embedding is written to disk.
        """
        made: list[Tensor] = []

        def arrays() -> dict[str, np.ndarray]:
            made.append(make())
            on_host = made[0].detach().cpu()
            if not bool(torch.isfinite(on_host).all()):
                raise not_finite("encode_prompt", "a prompt's embedding")
            return to_arrays(on_host)

        name = key({"prompt": text, "tokens": tokens, "dtype": str(dtype), **self.identity})
        found = remembered(self.files, name, arrays, timer, NAME)
        return made[0] if made else from_arrays(found, tokens, dtype)


def to_arrays(embedding: Tensor) -> dict[str, np.ndarray]:
    """Return the bits of [1, tokens, text_dim] without the rows of zeros at the end, which belong to no token."""
    bits = embedding.detach().cpu().contiguous().view(_int_of(embedding.dtype)).numpy().view(BITS[embedding.dtype])
    used = np.flatnonzero(bits[0].any(axis=1))
    return {"bits": bits[0, : used[-1] + 1 if len(used) else 0]}


def from_arrays(arrays: Mapping[str, np.ndarray], tokens: int, dtype: torch.dtype) -> Tensor:
    """Return the embedding from `to_arrays`' arrays, on the host."""
    bits = arrays["bits"]
    whole = np.zeros((1, tokens, bits.shape[1]), bits.dtype)
    whole[0, : len(bits)] = bits
    return torch.from_numpy(whole.view(np.int16 if bits.dtype.itemsize == 2 else np.int32)).view(dtype)


def _int_of(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype.itemsize == 2 else torch.int32
