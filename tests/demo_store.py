"""The demo's models and media as fixtures: built once into the repository's cache, as `make demo` does."""

from __future__ import annotations

from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".cache"


@pytest.fixture(scope="session")
def demo_models() -> Path:
    """A complete model store: tiny random weights, a detector and a pose model that find the puppet."""
    from runner.demo.build import build_demo_models

    build_demo_models(CACHE / "demo-models")
    return CACHE / "demo-models"


@pytest.fixture(scope="session")
def demo_media() -> Path:
    """References, dances, masks and joints.json."""
    from runner.demo.build import build_demo_media

    build_demo_media(CACHE / "demo-media")
    return CACHE / "demo-media"
