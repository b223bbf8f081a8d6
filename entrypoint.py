"""The container's entry: the arguments of `docker run` go to `runner.cli`, its exit code comes back.

It also makes the folder for temporary files, which lies in /cache: mounted, and empty at first.
"""

from __future__ import annotations

import os
import sys

from runner.cli import main

__all__ = ["ensure_temporary_folder"]


def ensure_temporary_folder(folder: str | None) -> None:
    """Makes `folder` ($TMPDIR). Where that fails it says so and goes on: verbs such as `--help` need no such place."""
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
