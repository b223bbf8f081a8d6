"""Stands in for a part's process of tools/gpu_check.py; what it does is in the environment, by the part's name."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[2] / folder) for folder in ("tools", "bench"))

from _gpu_check_record import PartRecord
from gpu_check import TINY, end_with_parent, parse

options = parse()
record = PartRecord(options.json, options.inside, scale=TINY, seconds=options.seconds, show=lambda line: None)
record.add("rows", {"process": os.getpid()})
what = os.environ.get(options.inside, "done")
if what == "no device":
    record.end("failed", "config.invalid: no CUDA device")
    sys.exit(2)
if what == "dies":
    os.abort()
if what == "hangs":
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    time.sleep(60)
record.end("done")
