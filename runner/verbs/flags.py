"""Flags: defines command-line flags as fields of settings, and the base class of all settings.

In:   fields with their help and checks. Out: `Settings`, whose fields are checked when a value is made; the flags of a
class. Never: which verbs and flags exist; settings.py has them.

Settings are dataclasses, because `--help` reads them and importing pydantic would make it slow.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from runner.verbs.flag_values import Check, is_one_of, is_switch

__all__ = ["Flag", "Settings", "choice", "flag", "flag_name", "flags_of", "switch"]


@dataclass(frozen=True)
class Flag:
    """The form of a field on the command line, and the check of its value."""

    help: str
    check: Check
    metavar: str | None  # None: a switch, which takes no value; two words: the flag takes two values
    positional: bool = False
    repeatable: bool = False


def flag(help: str, check: Check, metavar: str | None, **more: bool) -> Mapping[str, Flag]:
    """Return the metadata of a field that is a flag."""
    return {"flag": Flag(help, check, metavar, **more)}


def choice(help: str, choices: Sequence[str]) -> Mapping[str, Flag]:
    """Return the metadata of a flag that takes one of a few words."""
    return flag(help, partial(is_one_of, choices), "{" + ",".join(choices) + "}")


def switch(help: str) -> Mapping[str, Flag]:
    """Return the metadata of a flag that takes no value."""
    return flag(help, is_switch, None)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of all settings. Each field is checked and converted to its type when the value is made."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and str(item.type).endswith("| None"):
                continue
            check = item.metadata["flag"].check
            object.__setattr__(self, item.name, check(flag_name(item), value))
        self.check_together()

    def check_together(self) -> None:
        """Raise ConfigInvalid for fields that are each valid but contradict each other."""


def flag_name(item: dataclasses.Field[Any]) -> str:
    """Return the flag as it is typed, e.g. `--max-attempts`; of a positional argument its metavar, e.g. `MANIFEST`."""
    found: Flag = item.metadata["flag"]
    return str(found.metavar) if found.positional else "--" + item.name.replace("_", "-")


def flags_of(settings: type[Settings]) -> list[tuple[dataclasses.Field[Any], Flag]]:
    """Return the fields of a verb's settings: its own first, then those that it shares with other verbs."""
    own = inspect.get_annotations(settings)
    items = sorted(dataclasses.fields(settings), key=lambda item: item.name not in own)
    return [(item, item.metadata["flag"]) for item in items]
