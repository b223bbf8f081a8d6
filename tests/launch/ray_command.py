"""`python -m tests.launch.ray_command FOLDER WORDS…`: `video-lab run WORDS…`, its workers compute as the stub."""

from __future__ import annotations

import sys

import runner.verbs.run as run_verb
from runner.cli import main
from tests.launch.ray_children import patched

if __name__ == "__main__":
    for name, value in patched(sys.argv[1]).items():
        setattr(run_verb, name, value)
    sys.exit(main(["run", *sys.argv[2:]]))
