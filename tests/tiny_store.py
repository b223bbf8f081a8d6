"""The tiny model store, built once a session: `tiny_store_dir`, and its pipeline as the library itself loads it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a store with tiny models of random weights, without the ONNX files. Not to be written into."""
    from runner.demo.tiny_model import build_tiny_store

    root = tmp_path_factory.mktemp("models")
    build_tiny_store(root)
    return root
