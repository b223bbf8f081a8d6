"""Events: write a run's events as structured lines to the terminal and to the run's `.events.jsonl`.

In:   an event's name and fields. Out: a structlog line on standard error (for people, or JSON for machines), and the
same as one line of JSON for a file. Never: what an event means. A failed write does not stop a run.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO, cast

import structlog

from runner.errors import RunnerError
from runner.records.library_messages import capture_library_messages, hide_library_messages
from runner.redact import escape_control, redact_tree
from runner.timing import now

__all__ = ["EventLog", "configure_logging", "default_logging"]


def configure_logging(style: Literal["auto", "console", "json"] = "auto", *, verbose: bool = False) -> None:
    """Send structlog to standard error: coloured and aligned for a terminal, plain elsewhere, or JSON.

    Messages of libraries become events `library_message`. Without `verbose`, only their errors are shown.
    """
    renderer: Any
    if style == "json":
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    else:
        colours = style == "auto" and sys.stderr is not None and sys.stderr.isatty()
        renderer = structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=18)
    structlog.configure(
        processors=[
            *([] if verbose else [hide_library_messages]),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True)
            if style == "json"
            else structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            _redact_event if style == "json" else _escape_event,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=cast(TextIO, _Stderr())),
    )
    capture_library_messages()


@contextmanager
def default_logging() -> Iterator[None]:
    """Send structlog's lines to Python's `logging` while the block runs, unless the program configured structlog.

    structlog's own default prints them on standard output. Afterwards the configuration is as before. Several threads
    may run such blocks at the same time.
    """
    with _defaults.lock:
        if not structlog.is_configured():
            structlog.configure(
                processors=[_redact_event, structlog.processors.KeyValueRenderer(key_order=["event"])],
                wrapper_class=structlog.stdlib.BoundLogger,
                logger_factory=_defaults.factory,
            )
        _defaults.inside += 1
    try:
        yield
    finally:
        with _defaults.lock:
            _defaults.inside -= 1
            if not _defaults.inside and structlog.get_config()["logger_factory"] is _defaults.factory:
                structlog.reset_defaults()


class _Defaults:
    """The number of running `default_logging` blocks, and the factory that marks their configuration."""

    def __init__(self) -> None:
        self.inside = 0
        self.lock = threading.Lock()
        self.factory = structlog.stdlib.LoggerFactory()


_defaults = _Defaults()


def _redact_event(logger: object, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Mask the secrets of an event (a structlog processor)."""
    return cast(Mapping[str, Any], redact_tree(event))


def _escape_event(logger: object, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Mask secrets and escape control characters of an event (a structlog processor)."""
    public = redact_tree(event)
    return {key: escape_control(value) if isinstance(value, str) else value for key, value in public.items()}


class _Stderr:
    """The standard error at the moment of writing, as programs and tests may redirect it after set-up.

    Write errors are ignored, so that they do not end a long run: standard error may be closed, have no reader
    (`2>&1 | head`), be on a full disk, or have an encoding without the character.
    """

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.flush()


class EventLog:
    """Writes each event to the log and, as one line of JSON, to `write`. Safe from any thread.

    `at_once`: pass each line on immediately; else lines wait for `flush`. `write` gets events of every level; the log
    shows the levels that it is configured for.
    """

    def __init__(
        self, write: Callable[[bytes], None] | None = None, *, at_once: bool = True, quiet: bool = False
    ) -> None:
        self._write, self._at_once, self._quiet = write, at_once, quiet
        self._waiting: list[bytes] = []
        self._noted: deque[bytes] = deque()  # moved to the end of `_waiting`
        self._lock = threading.Lock()
        self._log = structlog.get_logger()

    def emit(self, event: str, *, level: Literal["debug", "info", "warning", "error"] = "info", **fields: Any) -> None:
        """Write `event` with its secrets masked. Values must be JSON-able."""
        fields = redact_tree(fields)
        with self._lock:
            if not self._quiet:
                getattr(self._log, level)(event, **fields)
            if self._write is None:
                return
            self._noted.append(_line(event, level, fields))
            if self._at_once:
                with suppress(OSError, RunnerError):  # the line is written with a later one
                    self._flush()

    def note(self, event: str, *, level: Literal["debug", "info", "warning", "error"], **fields: Any) -> None:
        """Add `event` for `write` only. It never waits: a library may call it by `logging` while this log writes."""
        if self._write is None:
            return
        self._noted.append(_line(event, level, redact_tree(fields)))
        if self._at_once and self._lock.acquire(blocking=False):
            try:
                with suppress(OSError, RunnerError):  # the line is written with a later one
                    self._flush()
            finally:
                self._lock.release()

    def flush(self) -> None:
        """Pass the waiting lines to `write`. Raises its errors; then the lines wait for the next call."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        while self._noted:
            self._waiting.append(self._noted.popleft())
        if self._write is not None and self._waiting:
            self._write(b"".join(self._waiting))
            self._waiting.clear()


def _line(event: str, level: str, fields: Mapping[str, Any]) -> bytes:
    line = {"time": now(), "event": event, "level": level, **fields}
    return (json.dumps(line, ensure_ascii=False, default=str) + "\n").encode(errors="backslashreplace")
