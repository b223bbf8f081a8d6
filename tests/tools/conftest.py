"""tools/ and bench/ are folders of scripts, no packages: modules are found by their own names, as scripts find them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[2] / folder) for folder in ("tools", "bench"))
