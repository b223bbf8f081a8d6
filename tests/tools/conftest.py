"""tools/ is a folder of scripts and no package: its modules are found by their own names, as the scripts find them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
