"""Switches: which optimisations of the engine are on. A benchmark turns them on and off one by one.

In:   nothing. Out: names and yes or no. Never: torch, what an optimisation does; each is exact, or says in its own
module how far it is from that.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Switches"]


@dataclass(frozen=True)
class Switches:
    """`step_invariants`: work that all steps of a window share is done once a window (`transformer.py`); exact.

    `compile`: blocks run as fused kernels (`compiled.py`): sums in another order, within stated tolerances. None: on
    CUDA, and not on a CPU, whose frames are the library's bit for bit.
    `channels_last`, `fuse_vae_norms`: the autoencoder's convolutions in the layout that CUDA's kernels prefer, and its
    norms as one kernel each (`vae_speed.py`); sums in another order. Off until a benchmark has shown that they pay.
    `memos`: what jobs share is encoded once for all of them (`memos.py`, and `prompts.py` on disk); exact.
    """

    step_invariants: bool = True
    memos: bool = True
    compile: bool | None = None
    channels_last: bool = False
    fuse_vae_norms: bool = False
