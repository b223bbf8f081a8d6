"""Logging state: what the command line configures for its process is undone after each test."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Afterwards structlog, `logging` and `warnings` are as they were."""
    root = logging.getLogger()
    config, was_configured = structlog.get_config(), structlog.is_configured()
    handlers, kind, show = root.handlers.copy(), logging.getLoggerClass(), warnings.showwarning
    yield
    structlog.reset_defaults()
    if was_configured:
        structlog.configure(**config)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    logging.setLoggerClass(kind)
    logging.captureWarnings(False)
    warnings.showwarning = show
