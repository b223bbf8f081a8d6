"""Ray address: reads the address of a cluster from `run --on`.

In:   the flag's text, the environment. Out: an address, or None for a cluster on this machine only.
Never: networks, Ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from runner.errors import ConfigInvalid

__all__ = ["FLAG", "find_address", "parse_on", "split_address"]

FLAG = "--on"


def parse_on(text: str) -> str | None:
    """`ray` → None, `ray:auto` → `auto`, `ray:HOST:PORT` → `HOST:PORT`. Raises ConfigInvalid."""
    kind, colon, address = text.strip().partition(":")
    if kind == "ray" and not colon:
        return None
    if kind == "ray" and address == "auto":
        return "auto"
    host, port = split_address(address)
    if kind != "ray" or not host or not 0 < port < 65536:
        raise ConfigInvalid(
            f"must be ray, ray:auto or ray:HOST:PORT, not {text!r}",
            where=FLAG,
            todo="Write e.g. --on ray, or --on ray:10.0.0.5:6379",
        )
    return address


def split_address(address: str) -> tuple[str, int]:
    """`10.0.0.5:6379` → ("10.0.0.5", 6379); ("", 0) if it is not an address. IPv6 needs brackets."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", address)
    return (match[1] or match[2], int(match[3])) if match else ("", 0)


def find_address(on: str, variables: Mapping[str, str]) -> str:
    """Return HOST:PORT, or `auto` if Ray itself looks for a cluster on this machine."""
    named = variables.get("RAY_ADDRESS", "").strip() if on == "auto" else on
    if named in ("", "auto"):
        return "auto"
    if not split_address(named)[0]:
        raise ConfigInvalid(
            f"RAY_ADDRESS={named} is not HOST:PORT",
            where=FLAG,
            todo="Give the port of the cluster's head, 6379 by default; a ray:// address is another protocol",
        )
    return named
