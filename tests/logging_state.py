"""Logging state: what the command line configures for its process is undone before and after each test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from runner.records import library_messages


@pytest.fixture(autouse=True)
def logging_as_unconfigured() -> Iterator[None]:
    """structlog, `logging` and `warnings` as a program has them that has not called the command line.

    Before a test too: fixtures of a module or of the session may have called it.
    """
    _undo()
    yield
    _undo()


def _undo() -> None:
    structlog.reset_defaults()
    root = logging.getLogger()
    for handler in [one for one in root.handlers if type(one).__module__ == library_messages.__name__]:
        root.removeHandler(handler)
    logging.setLoggerClass(logging.Logger)
    logging.captureWarnings(False)
