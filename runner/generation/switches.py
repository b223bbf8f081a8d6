"""Switches: which optimisations of the engine are on. Every one is on unless a benchmark turns it off.

In:   nothing. Out: names and yes or no. Never: torch, what an optimisation does; each is exact, or says in its own
module how far it is from that.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Switches"]


@dataclass(frozen=True)
class Switches:
    """`step_invariants`: work that all steps of a window share is done once a window (`transformer.py`); exact."""

    step_invariants: bool = True
