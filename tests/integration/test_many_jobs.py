"""Five hundred jobs in one process: memory, descriptors and threads stay as they are after the first hundred."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOBS = 500
SLOPE_BYTES = 50_000  # a job
SCRIPT = textwrap.dedent("""
    import json, os, sys, threading
    from pathlib import Path
    import psutil
    from tests.faults.stub_runs import run_command
    from tests.stub_generator import StubGenerator

    folder, jobs = Path(sys.argv[1]), int(sys.argv[2])
    process, descriptors, threads, rss = psutil.Process(), [], [], []

    class Sampled(StubGenerator):
        # Sampled where a job begins to be generated: the ones before it have ended or are being delivered.
        def generate(self, *arguments, **keywords):
            rss.append(process.memory_info().rss)
            descriptors.append(process.num_fds())
            threads.append(process.num_threads())
            self.prepared.clear()
            return super().generate(*arguments, **keywords)

    words = [str(folder / "m.jsonl"), "--out", str(folder / "out"), "--cache", str(folder / "cache"), "--run-id", "r"]
    code = run_command([*words, "--log-format", "json"], lambda: Sampled(), {})
    found = {"code": code, "descriptors": descriptors, "threads": threads, "rss": rss}
    (folder / "found.json").write_text(json.dumps(found))
""")


def run_many(folder: Path, jobs: int) -> dict:
    (folder / "a.png").write_bytes(b"a picture, which the stub does not open")
    (folder / "b.mp4").write_bytes(b"a video, neither")
    lines = [
        {
            "id": f"job-{index:04d}",
            "reference": "a.png",
            "video": "b.mp4",
            "prompt": "ok",
            "options": {"seed": index, "keep_audio": False, "output": {"format": "png" if index % 5 == 4 else "mp4"}},
        }
        for index in range(jobs)
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-c", SCRIPT, str(folder), str(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((folder / "out/runs/r/00000-of-00001.summary.json").read_text())
    return json.loads((folder / "found.json").read_text()) | {"trend": summary["memory_trend"]}


@pytest.mark.soak
def test_five_hundred_jobs_take_no_more_memory_than_one_hundred(tmp_path, capsys):
    found = run_many(tmp_path, JOBS)
    trend = found["trend"]
    slope = trend["rss_slope_bytes_per_job"]
    early, late = slice(100, 200), slice(JOBS - 100, JOBS)
    highest = {name: [max(found[name][part]) for part in (early, late)] for name in ("descriptors", "threads")}
    with capsys.disabled():
        print(
            f"\n{JOBS} jobs: RSS {trend['rss_begin_bytes'] / 2**20:.1f} MiB after 100, "
            f"{trend['rss_end_bytes'] / 2**20:.1f} MiB at the end, slope {slope / 1000:.1f} kB a job; "
            f"highest of jobs 101 to 200 and of the last 100: "
            f"descriptors {highest['descriptors']}, threads {highest['threads']}"
        )
    assert (found["code"], trend["jobs"]) == (0, JOBS - 100)
    assert slope < SLOPE_BYTES, found["rss"][::25]
    assert highest["descriptors"][1] <= highest["descriptors"][0] + 5, found["descriptors"][::25]
    assert highest["threads"][1] <= highest["threads"][0] + 2, found["threads"][::25]
