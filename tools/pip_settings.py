"""pip's settings on this machine (package sources), for tools that do not read them: uv, an image build.

In:   the output of `pip config list` (environment and files). Out: a mapping, environment variables that give uv the
same sources, or a folder with the settings for an image build. Never: the project.

    pip_settings.py FOLDER     writes FOLDER/pip.conf and FOLDER/ca.crt, prints the build's volumes, one per line
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["carry", "local_path", "parse", "read", "uv_environment"]

MOUNT = "/mnt"  # mount point of the folder in a build; it exists in every base image, so the image does not change


def read() -> dict[str, str]:
    """Return the settings of this interpreter's pip, by key without section: `find-links`, `index-url`, `cert`, …"""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    return parse(listing.stdout)


def parse(listing: str) -> dict[str, str]:
    """`pip config list` → values by key without section. An environment variable (`:env:.cert`) overrides a file.

    A section of one command (`install.find-links`) overrides `global`. Lists stay separated by white space.
    """
    ranked: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        name, separator, quoted = line.partition("=")
        section, dot, key = name.rpartition(".")
        if not separator or not dot:
            continue
        rank = {":env:": 2, "global": 0, "site": 0, "user": 0}.get(section, 1)
        if rank >= ranked.get(key, (0, ""))[0]:
            text = quoted.strip().strip("'\"").replace("\\n", " ")
            ranked[key] = (rank, " ".join(text.split()))
    return {key: text for key, (_, text) in ranked.items()}


def uv_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return uv's variables for pip's settings. As with pip, the best version of all indexes is used."""
    names = {
        "find-links": "UV_FIND_LINKS",
        "index-url": "UV_DEFAULT_INDEX",
        "extra-index-url": "UV_INDEX",
        "constraint": "UV_CONSTRAINT",
    }
    found = {uv: settings[pip] for pip, uv in names.items() if settings.get(pip)}
    if "find-links" in settings:
        found["UV_FIND_LINKS"] = ",".join(settings["find-links"].split())
    if "extra-index-url" in settings:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if settings.get("cert"):
        found["SSL_CERT_FILE"] = settings["cert"]
    return found


def local_path(location: str) -> Path | None:
    """Return the local path of a path or file: URL; None if it is on a network or does not exist."""
    parts = urlsplit(location)
    if parts.scheme not in ("", "file"):
        return None
    place = Path(unquote(parts.path))
    return place if place.is_absolute() and place.exists() else None


def carry(settings: Mapping[str, str], folder: Path) -> list[str]:
    """Write `settings` as folder/pip.conf for a build that mounts `folder` at MOUNT; return the build's volumes.

    A volume is `host:container:ro`.

    The certificate bundle and constraints are copied. Local package folders are mounted under the same paths. A simple
    index refers to files outside its folder (`../files/…`), so its parent folder is mounted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = dict(settings)
    bundle = kept.get("cert") or os.environ.get("SSL_CERT_FILE", "")
    if bundle and Path(bundle).is_file():
        shutil.copyfile(bundle, folder / "ca.crt")
        kept["cert"] = f"{MOUNT}/ca.crt"
    constraints = kept.get("constraint", "").split()
    for i, location in enumerate(constraints):
        if (place := local_path(location)) is not None:
            shutil.copyfile(place, folder / f"constraints-{i}.txt")
            constraints[i] = f"{MOUNT}/constraints-{i}.txt"
    if constraints:
        kept["constraint"] = " ".join(constraints)
    mounts = {str(folder.resolve()): MOUNT}
    for key in ("find-links", "index-url", "extra-index-url"):
        for location in kept.get(key, "").split():
            place = local_path(location)
            if place is not None:
                mount = str(place if key == "find-links" else place.parent)
                mounts[mount] = mount
    writer = configparser.RawConfigParser()
    writer["global"] = kept
    with (folder / "pip.conf").open("w", encoding="utf-8") as out:
        writer.write(out)
    return [f"{host}:{inside}:ro" for host, inside in mounts.items()]


if __name__ == "__main__":
    print("\n".join(carry(read(), Path(sys.argv[1]))))
