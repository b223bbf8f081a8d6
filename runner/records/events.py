"""Events: what happens in a run, as structured lines on the terminal and in the run's `.events.jsonl`.

In:   an event's name and fields. Out: a structlog line on standard error (for people, or JSON for machines) and the
same as one JSON object a line in a local file. Never: what an event means. A line that cannot be written is lost; it
stops nothing.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import structlog

from runner.timing import now

__all__ = ["EventLog", "configure_logging"]


def configure_logging(style: Literal["auto", "console", "json"] = "auto", *, verbose: bool = False) -> None:
    """Send structlog to standard error: coloured and aligned for a terminal, plain elsewhere, or JSON."""
    renderer: Any
    if style == "json":
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=style == "auto" and sys.stderr.isatty(), pad_event_to=18)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True)
            if style == "json"
            else structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=cast(TextIO, _Stderr())),
    )


class _Stderr:
    """Whatever standard error is at the moment of writing: programs and tests may redirect it after set-up.

    Nobody may be reading it any more (`2>&1 | head`), or its disk may be full: hours of rendering do not end for that.
    """

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


class EventLog:
    """Writes each event to the log and, as JSON, to `path`. Safe from any thread."""

    def __init__(self, path: Path | None = None, *, quiet: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._quiet = quiet
        self._log = structlog.get_logger()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def emit(self, event: str, *, level: Literal["debug", "info", "warning", "error"] = "info", **fields: Any) -> None:
        """Note `event`; values must be JSON-able."""
        with self._lock:
            if not self._quiet:
                getattr(self._log, level)(event, **fields)
            if self.path is not None:
                line = {"time": now(), "event": event, "level": level, **fields}
                with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
