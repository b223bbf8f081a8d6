"""Trial process: `python -m tests.faults.trials` as a process of its own, for tests.

The process that forks the runs must have no threads, so it cannot be that of the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from tests.s3_servers import S3Server

__all__ = ["run_trials"]

ROOT = Path(__file__).resolve().parents[2]


def run_trials(
    what: str, tmp_path: Path, *arguments: str, server: S3Server | None = None
) -> tuple[list[dict[str, Any]], str]:
    """`what`: kills or runners. (rows, what was printed); fails with what went wrong."""
    target = tmp_path / "rows.json"
    words = [sys.executable, "-m", "tests.faults.trials", what, *arguments, "--json", str(target)]
    if server is not None:
        words += ["--server", json.dumps({field.name: getattr(server, field.name) for field in fields(server)})]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(target.read_text()), done.stdout
