"""Entry point of the container: pass the arguments of `docker run` to `runner.cli` and exit with its code.

It also creates the folder for temporary files. That folder is in /cache, which is a mount and may be empty at first.
"""

from __future__ import annotations

import os
import sys

from runner.cli import main

__all__ = ["ensure_temporary_folder"]


def ensure_temporary_folder(folder: str | None) -> None:
    """Create `folder` ($TMPDIR). Print a message if that fails, and continue: `--help` works without the folder."""
    if not folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as err:
        print(
            f"{folder}: cannot be made ({err.strerror}). Mount a writable folder on /cache, "
            "e.g. --tmpfs /cache:mode=1777 or -v my-cache:/cache",
            file=sys.stderr,
        )


if __name__ == "__main__":
    ensure_temporary_folder(os.environ.get("TMPDIR"))
    sys.exit(main())
