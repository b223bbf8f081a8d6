"""Which torch these tests know from inside: private names are used, which a release may move without a word.

The newest minor version that pyproject.toml allows is the one that users get: there a private name that is missing is a
failure. On any other version the tests skip and say so.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

__all__ = ["IN_GPU_ENV", "find_private", "needs_gpu_env", "needs_known_torch", "newest_minor", "why_unknown"]

ROOT = Path(__file__).resolve().parents[2]


def newest_minor(requirement: str) -> tuple[int, int]:
    """The newest minor version that a bound such as `torch>=2.10,<2.14` allows: (2, 13).

    ValueError for a bound without `<major.minor`: it names no newest version.
    """
    ends = [Version(bound.version) for bound in Requirement(requirement).specifier if bound.operator == "<"]
    end = min(ends, default=Version("0"))
    if not end.minor or end.micro:
        raise ValueError(f"{requirement!r} has no upper bound of the form <major.minor")
    return end.major, end.minor - 1


@cache
def _torch_requirement() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(text for text in project["dependencies"] if Requirement(text).name == "torch")


def why_unknown(installed: str, requirement: str) -> str:
    """Why the tests do not know torch `installed`, of which pyproject.toml asks `requirement`; empty where they do."""
    known, here = newest_minor(requirement), Version(installed)
    if (here.major, here.minor) == known:
        return ""
    return f"private names of torch {known[0]}.{known[1]} are used; torch {installed} is installed"


def find_private(name: str) -> tuple[Any, str]:
    """(owner, attribute) of `module:Class.attribute`, to be replaced. LookupError, naming it, where it is not there.

    A test that needs it must stand under `needs_known_torch`.
    """
    module, _, rest = name.partition(":")
    *parents, attribute = rest.split(".")
    try:
        owner = import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        getattr(owner, attribute)
    except (ImportError, AttributeError) as err:
        raise LookupError(f"torch {version('torch')} has no {name}: {err}") from err
    return owner, attribute


def _built_for_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


IN_GPU_ENV = _built_for_cuda()
needs_gpu_env = pytest.mark.skipif(
    not IN_GPU_ENV,
    reason="torch is built without CUDA: `make test-gpu-env` runs it",
)
_UNKNOWN = why_unknown(version("torch"), _torch_requirement())
needs_known_torch = pytest.mark.skipif(bool(_UNKNOWN), reason=_UNKNOWN)
