"""Library messages: turn messages of libraries (Python's `logging` and `warnings`) into events `library_message`.

In:   records of `logging`, of the levels of the libraries' loggers. Out: for each a structlog line, and a line in the
event files of the open runs.
Never: importing a library; changing `logging` for a program that calls a verb. Only `capture_library_messages` changes
it; the command line and the processes of `--gpus` call that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

import structlog

__all__ = ["capture_library_messages", "hide_library_messages", "library_messages_in"]

EVENT = "library_message"
OURS = "runner"  # the runner's own events go to `logging` if the program has not configured structlog

Level = Literal["debug", "info", "warning", "error"]


def capture_library_messages() -> None:
    """Turn every record of `logging` and every warning of `warnings` into an event, for the rest of the process.

    Libraries such as transformers add a handler for standard error to their logger at their first import, and stop
    propagation to the root. This function undoes both, also for libraries that are imported later.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _LibraryHandler) for handler in root.handlers):
        root.addHandler(_LibraryHandler())
    logging.setLoggerClass(_LibraryLogger)
    for logger in list(root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and not isinstance(logger, _LibraryLogger):
            for handler in logger.handlers.copy():
                if _prints(handler):
                    logger.removeHandler(handler)
            logger.propagate = True
    logging.captureWarnings(True)


@contextmanager
def library_messages_in(note: Callable[..., None]) -> Iterator[None]:
    """Call `note(event, level=…, logger=…, message=…)`, e.g. `EventLog.note`, for each message while the block runs.

    `note` is called from any thread and must not wait. Without `capture_library_messages` it is not called.
    """
    with _notes_lock:
        _notes.append(note)
    try:
        yield
    finally:
        with _notes_lock:
            _notes.remove(note)


def hide_library_messages(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Drop library messages below the level error (a structlog processor)."""
    if event.get("event") == EVENT and method in ("debug", "info", "warning"):
        raise structlog.DropEvent
    return event


_notes: list[Callable[..., None]] = []  # of the open runs
_notes_lock = threading.Lock()


class _LibraryLogger(logging.Logger):
    """A logger whose records reach the root, past the handlers that its library added for standard error."""

    def callHandlers(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = self
        while logger is not None:
            for handler in logger.handlers:
                if record.levelno >= handler.level and (logger.parent is None or not _prints(handler)):
                    handler.handle(record)
            logger = logger.parent


def _prints(handler: logging.Handler) -> bool:
    """Return whether a library added the handler to write to the terminal. Subclasses have other purposes."""
    return type(handler) is logging.StreamHandler


class _LibraryHandler(logging.Handler):
    """Makes an event of each record.

    It takes no lock, unlike other handlers: an upload of events may itself cause a record, in this thread or in
    another that this thread waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.local()

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] == OURS:
            return
        busy = getattr(self._thread, "busy", False)
        self._thread.busy = True
        try:
            with suppress(Exception):  # a message that cannot be shown must not stop the run
                self._write(record, show=not busy)
        finally:
            self._thread.busy = busy

    def _write(self, record: logging.LogRecord, *, show: bool) -> None:
        """Write the event. `show`: in the log too; False inside a log call, which would repeat endlessly."""
        level = _level(record.levelno)
        try:
            message = _formatter.format(record)
        except Exception:  # the library's arguments do not fit its own text
            message = f"{record.msg} {record.args}"
        fields = {"logger": record.name, "message": message.strip()}
        for note in _notes.copy():
            note(EVENT, level=level, **fields)
        if show:
            getattr(structlog.get_logger(), level)(EVENT, **fields)


def _level(number: int) -> Level:
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"


_formatter = logging.Formatter()  # the text, and the traceback where there is one
