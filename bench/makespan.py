"""Makespan: unequal jobs on several workers of this machine: `run --on ray` and `--shard any` against static shards.

    python bench/makespan.py [--jobs N] [--workers N] [--mean-s S] [--shares NAMES] [--json PATH]

These are real runs in real time on a local folder: the command line, loop, leases, Ray and its driver are the
product's. Only the stages of the model sleep (`_sleeping_stages.py`). Generation takes log-normal seconds (sigma 0.8)
around the mean, in random order; preparing takes 0.2 s. Time is measured from the moment when every worker has its
first job (so the start of processes and Ray is left out) to the end of the last job in the records. The driver gets the
true seconds as its forecast; the other two ways need no forecast.

The bound is the larger of the seconds of all jobs over the workers, and the longest job. Beside it are the computed
time of static shards, and the list schedule that begins with the longest job.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _json_file import write_json  # noqa: E402
from _sleeping_stages import GATE_S, OPEN, PREPARE_S  # noqa: E402
from PIL import Image  # noqa: E402

SHARES = ("static", "any", "ray")
NAMES = {"static": "static shards", "any": "--shard any", "ray": "--on ray"}
SIGMA = 0.8
RUN_S = 900.0  # until a run must have ended


def draw_seconds(jobs: int, mean_s: float, seed: int) -> list[float]:
    chance = random.Random(seed)
    return [round(mean_s * math.exp(chance.gauss(-(SIGMA**2) / 2, SIGMA)), 2) for _ in range(jobs)]


def list_schedule(seconds: list[float], workers: int) -> float:
    """The makespan of longest first, nothing else counted."""
    loads = [0.0] * workers
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(loads, loads[0] + each)
    return max(loads)


def write_jobs(folder: Path, seconds: list[float]) -> Path:
    Image.new("RGB", (8, 8), "red").save(folder / "ref.png")
    (folder / "video.mp4").write_bytes(b"not opened by the stub")
    manifest = folder / "m.jsonl"
    common = {"reference": str(folder / "ref.png"), "video": str(folder / "video.mp4")}
    lines = [
        {"id": f"job{index:03d}", "prompt": f"{each:.2f}", "options": {"seed": index, "keep_audio": False}} | common
        for index, each in enumerate(seconds)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return manifest


def run(share: str, manifest: Path, workers: int, folder: Path) -> dict[str, Any]:
    """One run of all jobs; RuntimeError if a job was not done once."""
    folder.mkdir()
    gate, out = folder / "gate", folder / "out"
    gate.mkdir()
    words = [str(manifest), "--out", str(out), "--cache", str(folder / "cache"), "--run-id", "makespan"]
    words += ["--log-format", "json"]
    own = {
        "static": [["--shard", f"{index}/{workers}"] for index in range(workers)],
        "any": [["--shard", "any"]] * workers,
        "ray": [["--on", "ray", "--workers", str(workers)]],
    }[share]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{index}.log").open("wb") for index in range(len(own))]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "_sleeping_stages.py"), str(gate), *words, *more],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for more, log in zip(own, logs, strict=True)
    ]
    try:
        opened = open_gate(gate, workers, processes)
        codes = [process.wait(timeout=RUN_S) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for log in logs:
            log.close()
    records = [json.loads(path.read_bytes()) for path in sorted(out.glob("jobs/*/result.json"))]
    jobs = len(manifest.read_text().splitlines())
    if any(codes) or len(records) != jobs or any(record["attempt"] != 1 for record in records):
        said = "".join((folder / f"{index}.log").read_text()[-3000:] for index in range(len(own)))
        raise RuntimeError(f"exit codes {codes}, {len(records)} of {jobs} jobs:\n{said}")
    ended = max(datetime.fromisoformat(record["finished_at"]).timestamp() for record in records)
    return {"share": share, "seconds": round(ended - opened, 2)}


def open_gate(gate: Path, workers: int, processes: list[subprocess.Popen[bytes]]) -> float:
    """Wait until every worker has its first job, then let them begin; the time of day."""
    deadline = time.monotonic() + GATE_S
    while len(list(gate.glob("ready-*"))) < workers:
        if time.monotonic() > deadline or any(process.poll() not in (None, 0) for process in processes):
            raise RuntimeError("not every worker has begun a job")
        time.sleep(0.05)
    opened = datetime.now(UTC).timestamp()
    (gate / OPEN).touch()
    return opened


def bench(jobs: int, workers: int, mean_s: float, shares: list[str], seed: int) -> dict[str, Any]:
    seconds = draw_seconds(jobs, mean_s, seed)
    bound_s = max(sum(seconds) / workers, *seconds)
    rows = []
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as name:
        folder = Path(name)
        manifest = write_jobs(folder, seconds)
        for share in shares:
            row = run(share, manifest, workers, folder / share)
            rows.append(row | {"ratio": round(row["seconds"] / bound_s, 3)})
    return {
        "bench": "makespan",
        "jobs": jobs,
        "workers": workers,
        "job_s": {"total": round(sum(seconds), 2), "least": min(seconds), "most": max(seconds)},
        "prepare_s": PREPARE_S,
        "bound_s": round(bound_s, 2),
        "static_by_addition_s": round(max(sum(seconds[place::workers]) for place in range(workers)), 2),
        "longest_first_by_addition_s": round(list_schedule(seconds, workers), 2),
        "cores": os.cpu_count(),
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    job_s, bound_s = found["job_s"], found["bound_s"]
    lines = [
        f"{found['jobs']} jobs of {job_s['least']:.1f} to {job_s['most']:.1f} s on {found['workers']} workers, "
        f"{found['cores']} cores; bound {bound_s:.1f} s",
        f"{'':<32}{'seconds':>9}{'ratio':>8}",
    ]
    for what, name in (("static_by_addition_s", "static shards"), ("longest_first_by_addition_s", "longest first")):
        lines.append(f"{name + ', by addition':<32}{found[what]:>9.1f}{found[what] / bound_s:>8.3f}")
    for row in found["rows"]:
        lines.append(f"{NAMES[row['share']]:<32}{row['seconds']:>9.1f}{row['ratio']:>8.3f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=32, metavar="N", help="of the run (32)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes (4)")
    parser.add_argument("--mean-s", type=float, default=4.0, metavar="S", help="seconds of a job, the mean (4)")
    parser.add_argument("--shares", default=",".join(SHARES), metavar="NAMES", help="of static, any, ray (all)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the jobs' seconds (1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args(argv)
    shares = arguments.shares.split(",")
    found = bench(arguments.jobs, arguments.workers, arguments.mean_s, shares, arguments.seed)
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
