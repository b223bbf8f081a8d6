"""Field marks: declare at each field of the options and of a recipe how it is hashed into a fingerprint.

Every field is one of four kinds. The kind is declared in `Annotated`:

    seed: int = 42                                            a key of version 0.1.0: always hashed
    sigmas: Annotated[str, HashedAs("grid")] = "official"     such a key, renamed since: hashed under the old key
    glow: Annotated[float, Introduced(0.0)] = 0.5             later than 0.1.0: hashed only where it differs from 0.0
    summary: Annotated[str, NotHashed()] = ""                 does not change the frames

So jobs that were finished before a field was added stay finished. `Introduced` keeps the first default for ever: a
record without the key was rendered with that value. If the default changes later, the value changes, and the job runs
again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["HashedAs", "Introduced", "NotHashed"]


@dataclass(frozen=True)
class Introduced:
    """Mark of a field later than version 0.1.0, with the default it was introduced with. Never change `default`."""

    default: Any


@dataclass(frozen=True)
class HashedAs:
    """Mark of a renamed field: its key in version 0.1.0 (dotted, from the root), and the old names of its values."""

    key: str
    values: Mapping[str, str] = field(default_factory=dict)  # today's value → the value as version 0.1.0 hashed it


@dataclass(frozen=True)
class NotHashed:
    """Mark of a field that does not change the frames, or of a path whose content is hashed elsewhere."""
