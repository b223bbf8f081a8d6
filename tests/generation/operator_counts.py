"""What operators would cost a GPU, counted on any device, even `meta`: kernel launches and bytes to and from memory.

Each operator that is no view counts as one launch that reads its tensors once and writes its results once. Caches and
what a kernel reads twice (a convolution's overlapping inputs, say) are not seen, nor is fusion: these are eager counts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["OperatorCounts"]

# Memory without contents, and views that their schemas do not declare as such.
FREE = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"})
WRITE_ONLY = frozenset({"aten::zero_", "aten::fill_"})


class OperatorCounts(TorchDispatchMode):
    """Within `with OperatorCounts() as counts`: `launches` and `bytes` by the operator's name (`aten::copy_`)."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and name not in FREE:
            read = () if name in WRITE_ONLY else args[1:] if name == "aten::copy_" else (args, kwargs)
            self.launches[name] += 1
            self.bytes[name] += _bytes(read) + _bytes(out)
        return out


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, torch.Tensor))
