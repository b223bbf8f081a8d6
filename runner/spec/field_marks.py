"""Field marks: how a field of the options or of a recipe is hashed into a fingerprint, said at the field.

Every field is one of four kinds. The kind is declared at the field, in `Annotated`:

    seed: int = 42                                            a key of version 0.1.0: hashed, whatever its value is
    sigmas: Annotated[str, HashedAs("grid")] = "official"     the same, renamed since: hashed under the old key
    glow: Annotated[float, Introduced(0.0)] = 0.5             later: hashed only where it differs from 0.0
    summary: Annotated[str, NotHashed()] = ""                 does not change the frames

So a new field leaves every old record done. `Introduced` keeps the first default for ever: a record without the key was
rendered with that value. A later change of the default is a change of the value, and the job runs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["HashedAs", "Introduced", "NotHashed"]


@dataclass(frozen=True)
class Introduced:
    """A field that is later than version 0.1.0, and the default that it was introduced with. Never change `default`."""

    default: Any


@dataclass(frozen=True)
class HashedAs:
    """The key of version 0.1.0 that the field had (dotted, from the root), and the old names of renamed values."""

    key: str
    values: Mapping[str, str] = field(default_factory=dict)  # today's value → the value as version 0.1.0 hashed it


@dataclass(frozen=True)
class NotHashed:
    """A field that does not change the frames, or a place whose content is hashed elsewhere."""
