"""The demo's models, with random weights, and its media as fixtures: built once into the repository's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".cache"


@pytest.fixture(scope="session")
def demo_models() -> Path:
    """A complete model store: tiny random weights, a detector and a pose model that find the puppet."""
    from runner.demo.build import build_demo_models

    build_demo_models(CACHE / "test-models", weights="random")
    return CACHE / "test-models"


@pytest.fixture(scope="session")
def demo_media() -> Path:
    """References, dances, masks and joints.json."""
    from runner.demo.build import build_demo_media

    build_demo_media(CACHE / "demo-media")
    return CACHE / "demo-media"
