"""Fixtures that more than one test module needs; each lies in a plugin named for what it gives."""

from __future__ import annotations

import os

from hypothesis import settings

# As the command line does, and before torch is imported: threads that spin take the cores from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Hypothesis would fail an example that takes more than 200 ms of the clock, which a busy machine makes of any.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

pytest_plugins = [
    "tests.demo_store",
    "tests.hub_server",
    "tests.logging_state",
    "tests.s3_servers",
    "tests.shared_data",
    "tests.tiny_store",
]
