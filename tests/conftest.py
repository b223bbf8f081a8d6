"""Fixtures that more than one test module needs; each lies in a plugin named for what it gives."""

from __future__ import annotations

import os

# Workers of the many small sessions in one test process would fight over two cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["tests.demo_store", "tests.s3_servers", "tests.shared_data", "tests.tiny_store"]
