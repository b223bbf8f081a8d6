"""Library messages: what libraries say by Python's `logging` and `warnings`, as events `library_message`.

In:   records of `logging`, of the levels that the libraries' loggers have. Out: for each a structlog line, and a line
in the event files of the runs that are open.
Never: importing a library; changing `logging` for a program that calls a verb: only `capture_library_messages` does,
which the command line and the processes of `--gpus` call.
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
OURS = "runner"  # our own events go to `logging` where the program has not configured structlog

Level = Literal["debug", "info", "warning", "error"]


def capture_library_messages() -> None:
    """Let every record of `logging`, and every warning of `warnings`, become an event. For the rest of the process.

    Libraries such as transformers add a handler for standard error to their logger when they are first imported, and
    let nothing go on to the root. Neither holds from now on, whether they were imported before or are later.
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
    """Inside, `note(event, level=…, logger=…, message=…)`, e.g. `EventLog.note`, is called of each one too.

    From any thread. It must not wait. Without `capture_library_messages` it is not called.
    """
    with _notes_lock:
        _notes.append(note)
    try:
        yield
    finally:
        with _notes_lock:
            _notes.remove(note)


def hide_library_messages(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: library messages below an error are not shown."""
    if event.get("event") == EVENT and method in ("debug", "info", "warning"):
        raise structlog.DropEvent
    return event


_notes: list[Callable[..., None]] = []  # of the runs that are open
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
    """Whether it is one that libraries add to write to the terminal. Subclasses have purposes of their own."""
    return type(handler) is logging.StreamHandler


class _LibraryHandler(logging.Handler):
    """Makes an event of each record. Unlike other handlers it takes no lock: an upload of events may itself lead to a
    record, in this thread or in one that this thread waits for."""

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
            with suppress(Exception):  # a message that cannot be shown stops nothing
                self._tell(record, show=not busy)
        finally:
            self._thread.busy = busy

    def _tell(self, record: logging.LogRecord, *, show: bool) -> None:
        """`show`: in the log too, which shall not lead to a record that leads to the log again."""
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
