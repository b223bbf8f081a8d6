"""HTML page: shared parts of the reports that are one HTML file: templates, the security policy, units, atomic writing.

In:   templates, values, a path. Out: text of a page, a file. Never: the content of a report.

A page contains its scripts and styles and allows only them, by their hashes (Content-Security-Policy). All values are
escaped. All pages share the style `page.css` and the head `page_top.html`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runner.errors import ConfigInvalid, as_runner_error

__all__ = [
    "content_policy",
    "duration",
    "may_be_linked",
    "megabytes",
    "ratio",
    "template_environment",
    "template_text",
    "written_whole",
]

LINKED = ("http", "https", "file", "")  # schemes that a browser opens; "": relative to the page
ORIGIN = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")


def template_environment(package: str, folder: str) -> Any:
    """Return a jinja2 environment for the templates of `folder` in `package` and the shared templates.

    It escapes every value and raises an error for undefined names. Raises ConfigInvalid without jinja2.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ConfigInvalid(
            "an HTML report needs the package jinja2, which is not installed",
            todo="pip install 'video-lab-runner[compare]'",
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package, folder), jinja2.PackageLoader("runner.regression", "templates")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "megabytes": megabytes, "ratio": ratio}
    return environment


def template_text(environment: Any, name: str) -> str:
    """Return a script or style of the templates, as it appears in the page."""
    source, _, _ = environment.loader.get_source(environment, name)
    return str(source)


def content_policy(script: str, style: str, *rules: str) -> str:
    """Return a Content-Security-Policy that allows only this script, this style, embedded pictures and `rules`."""
    allowed = [
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "img-src data:",
        *rules,
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(allowed)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def may_be_linked(url: str) -> bool:
    """Return whether an address may be a link in the page: no script, no host without a scheme."""
    if not url or any(ord(sign) <= 32 for sign in url):
        return False
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return False
    if parts.scheme in ("http", "https"):
        return ORIGIN.fullmatch(host) is not None
    return parts.scheme in LINKED and not host


@contextmanager
def written_whole(dest: Path, *pieces: str) -> Iterator[tuple[Path, ...]]:
    """Yield temporary paths for the page and for each of its `pieces`. At the end the page replaces `dest`.

    After an error `dest` is unchanged. All temporary paths are removed. Raises StorageFull and StorageDenied.
    """
    paths = tuple(dest.with_name(f"{dest.name}{end}.part") for end in ("", *(f".{piece}" for piece in pieces)))
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield paths
            paths[0].replace(dest)
        finally:
            for left in paths:
                with suppress(OSError):
                    left.unlink(missing_ok=True)
    except OSError as error:
        raise as_runner_error(error, where=dest) from error


def duration(seconds: float) -> str:
    """12.3 s; 4 min 05 s; 1 h 02 min."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def megabytes(size: float) -> str:
    """8.1 MB; 8.10 GB."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def ratio(value: float) -> str:
    """1.04×."""
    return f"{value:.2f}×"
