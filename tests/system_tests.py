"""System tests: what needs programs of the system, many processes or a whole benchmark; they run where
VIDEO_LAB_SYSTEM_TESTS=1 is set."""

from __future__ import annotations

import os

import pytest

__all__ = ["ASKED_FOR", "NOT_ASKED_FOR", "system_test"]

ASKED_FOR = os.environ.get("VIDEO_LAB_SYSTEM_TESTS") == "1"
NOT_ASKED_FOR = "VIDEO_LAB_SYSTEM_TESTS=1 is not set"

system_test = pytest.mark.skipif(not ASKED_FOR, reason=NOT_ASKED_FOR)
