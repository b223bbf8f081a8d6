"""Real models and real people on film, beside the repository; absent outside the project's own machines."""

from __future__ import annotations

from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "real"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real detector and pose models, a clip of a man and two references."""
    if not (REAL / "person_detector.onnx").exists():
        pytest.skip("the shared folder of real models and clips is not beside the repository")
    return REAL
