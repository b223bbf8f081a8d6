"""Cluster scale: a simulation of a run on many spot GPUs: makespan, GPU hours, requests, bytes of summaries, dollars.

    python bench/cluster_scale.py [--jobs N] [--gpus N] [--rates R,R,…] [--gpu NAME] [--gpu-hour PRICE] [--json PATH]

It is a simulation (`_fleet.py`), not a measurement. It compares four ways to share the jobs. Static shards: each
machine has every N-th job, in the written order or balanced by the forecast (`submit --shards auto`). `--shard any`:
runners take any job that no other runner has leased. Ray driver: a driver hands the longest jobs out first (`HandOut`).
The product's own code makes the decisions. Machines are killed at a given rate, at once or two minutes after a notice,
and each one is replaced.

Jobs: 480x832, frames log-normal around 120 with a sigma of 0.7, at least 33 and at most 1,200, in random order. Device
seconds are the product's forecast for `fp4-distill` on one GPU, times a log-normal error with a sigma of 0.1, which the
forecast does not contain. Preparing takes 0.048 s a frame: a person detector at 76 and a pose network at 29 frames a
second, as published. Delivering: 0.17 s a segment to keep it on S3 (`bench/segment_cost.py`), and 1 s, assumed. The
model is loaded in 90 s, a new machine is ready after 180 s, the driver notices a killed machine after 30 s, and a
request takes 20 ms: assumed. Requests are counted with the real loop (`_store_requests.py`), the bytes of summaries
with the real writer, how often it writes by its own rules.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _fleet import Fleet, FleetSettings, Outcome, Share, Work  # noqa: E402
from _json_file import write_json  # noqa: E402
from _store_requests import JobRequests, SummaryWeight, count_requests, weigh_summaries  # noqa: E402

from runner.batch.lease import RENEW_S  # noqa: E402
from runner.forecast.seconds import DeviceSpeed, find_device  # noqa: E402
from runner.generation.families import get_family  # noqa: E402
from runner.launch.submission import Submission  # noqa: E402
from runner.spec.options import JobOptions  # noqa: E402
from runner.spec.recipes import get_recipe  # noqa: E402

SHARES: tuple[Share, ...] = ("static", "balanced", "any", "ray")
NAMES = {"static": "static shards", "balanced": "balanced shards", "any": "--shard any", "ray": "Ray driver"}
RECIPE, SIZE = "fp4-distill", (480, 832)
MEDIAN_FRAMES, SIGMA_FRAMES, LEAST_FRAMES, MOST_FRAMES = 120, 0.7, 33, 1200
SIGMA_ERROR = 0.1
PREPARE_S, KEEP_S, PUBLISH_S = 1 / 76 + 1 / 29, 0.17, 1.0  # a frame; a segment; a job
LOAD_S, REPLACE_S, DETECT_S, NOTICE_S, LATENCY_S = 90.0, 180.0, 30.0, 120.0, 0.020
SURVEY_S = 26.8 / 10_000  # a done job: `bench/rerun.py`
ATTEMPTS = Submission.attempts  # starts that `submit` asks the platform for
PAGE = 1000  # keys of one LIST
WRITES = 3  # objects at each writing of a summary: it, the metrics, the events since the last one
# S3 Standard in us-east-1, dollars a request: published prices. DELETE is free.
DOLLARS = {"PUT": 5e-6, "LIST": 5e-6, "POST": 5e-6, "GET": 4e-7, "HEAD": 4e-7, "DELETE": 0.0}


def make_works(jobs: int, gpu: DeviceSpeed, seed: int) -> list[Work]:
    """The same jobs for every row."""
    chance = random.Random(seed)
    recipe, options = get_recipe(RECIPE), JobOptions()
    forecaster = get_family(recipe).forecaster(recipe, None)
    works = []
    for _ in range(jobs):
        drawn = round(MEDIAN_FRAMES * math.exp(chance.gauss(0.0, SIGMA_FRAMES)))
        frames = min(MOST_FRAMES, max(LEAST_FRAMES, drawn))
        plan = forecaster.plan(frames, SIZE, options, gpu)
        assert plan.seconds is not None
        each = plan.seconds / plan.segments * math.exp(chance.gauss(0.0, SIGMA_ERROR))
        works.append(Work(plan.segments, each, plan.seconds, frames * PREPARE_S, KEEP_S + PUBLISH_S))
    return works


def count_all(outcome: Outcome, works: list[Work], counted: JobRequests) -> Counter[str]:
    """Requests of a run by kind."""
    found: Counter[str] = Counter()

    def add(requests: Any, times: float) -> None:
        for kind, number in requests.items():
            found[kind] += round(number * times)

    add(counted.rendered, len(works))
    add(counted.segment, sum(work.segments - 1 for work in works))
    add(counted.done, outcome.looks["done"])
    add(counted.leased, outcome.looks["leased"])
    add(counted.renewal, outcome.lease_s / RENEW_S)
    found["LIST"] += sum(1 + done * counted.files // PAGE for done in outcome.surveys)
    found["GET"] += outcome.surveyed
    found["PUT"] += WRITES * len(outcome.summaries)
    return found


def simulate(
    works: list[Work], share: Share, settings: FleetSettings, counted: JobRequests, weight: SummaryWeight
) -> dict[str, Any]:
    """One row."""
    outcome = Fleet(works, share, settings).run()
    device_s = [work.device_s for work in works]
    bound_s = max(sum(device_s) / settings.machines, *device_s)
    requests = count_all(outcome, works, counted)
    sizes = [weight.of(lines | {"not_run": jobs - lines.total()}) for lines, jobs in outcome.summaries]
    files = settings.machines if share in ("static", "balanced") else outcome.runners
    return {
        "share": share,
        "kills_per_hour": settings.kills_per_hour,
        "notice_s": settings.notice_s,
        "makespan_s": round(outcome.makespan_s),
        "ended_s": round(outcome.ended_s),
        "bound_s": round(bound_s),
        "ratio": round(outcome.makespan_s / bound_s, 4),
        "gpu_hours": round(outcome.machine_s / 3600, 1),
        "kills": outcome.kills,
        "most_starts": max(outcome.starts),
        "given_up": sum(starts > ATTEMPTS for starts in outcome.starts),
        "lost_hours": round(outcome.lost_s / 3600, 2),
        "looks": dict(sorted(outcome.looks.items())),
        "requests": dict(sorted(requests.items())),
        "request_dollars": round(sum(DOLLARS[kind] * number for kind, number in requests.items()), 2),
        "summaries": {
            "files": files,
            "writings": len(sizes),
            "bytes_written": round(sum(sizes)),
            "largest": round(max(sizes)),
        },
    }


def bench(jobs: int, gpus: int, rates: list[float], gpu_name: str, price: float, seed: int) -> dict[str, Any]:
    gpu = find_device(gpu_name)
    if gpu is None:
        raise SystemExit(f"there is no forecast for a GPU {gpu_name!r}")
    works = make_works(jobs, gpu, seed)
    counted, weight = count_requests(), weigh_summaries()
    look_s = sum(counted.done.values()) * LATENCY_S
    plain = FleetSettings(gpus, 0.0, 0.0, LOAD_S, REPLACE_S, DETECT_S, look_s, SURVEY_S, seed)
    rows = []
    for rate in rates:
        for notice_s in (0.0, NOTICE_S) if rate else (0.0,):
            for share in SHARES:
                settings = replace(plain, kills_per_hour=rate, notice_s=notice_s)
                row = simulate(works, share, settings, counted, weight)
                row["dollars"] = round(row["gpu_hours"] * price, 2)
                rows.append(row)
    device_s = [work.device_s for work in works]
    return {
        "bench": "cluster_scale",
        "simulation": True,
        "jobs": jobs,
        "gpus": gpus,
        "gpu": gpu.name,
        "gpu_hour_price": price,
        "device_s": {
            "mean": round(sum(device_s) / jobs, 1),
            "least": round(min(device_s), 1),
            "most": round(max(device_s), 1),
        },
        "segments": sum(work.segments for work in works),
        "assumed": asdict(plain),
        "requests_counted": asdict(counted),
        "summary_weight": asdict(weight),
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    seconds = found["device_s"]
    lines = [
        f"SIMULATION: {found['jobs']} jobs of {seconds['least']:.0f} to {seconds['most']:.0f} s, mean "
        f"{seconds['mean']:.0f} s (forecast, {found['gpu']}), {found['segments']} segments, on {found['gpus']} GPUs; "
        f"bound {found['rows'][0]['bound_s'] / 3600:.2f} h",
        f"{'kills/GPU h':<14}{'share':<15}{'hours':>7}{'ratio':>7}{'GPU h':>8}{'$':>8}{'kills':>6}{'starts':>7}"
        f"{'>' + str(ATTEMPTS):>4}{'lost h':>7}"
        + "".join(f"{kind:>{width}}" for kind, width in COLUMNS.items())
        + f"{'req. $':>7}{'summaries':>10}{'written':>10}{'largest':>9}",
    ]
    for row in found["rows"]:
        how = "" if not row["kills_per_hour"] else " notice" if row["notice_s"] else " killed"
        requests, summaries = row["requests"], row["summaries"]
        lines.append(
            f"{row['kills_per_hour']:g}{how}".ljust(14)
            + f"{NAMES[row['share']]:<15}{row['makespan_s'] / 3600:>7.2f}{row['ratio']:>7.3f}{row['gpu_hours']:>8.0f}"
            f"{row['dollars']:>8.0f}{row['kills']:>6}{row['most_starts']:>7}"
            f"{row['given_up']:>4}{row['lost_hours']:>7.1f}"
            + "".join(f"{requests.get(kind, 0):>{width}}" for kind, width in COLUMNS.items())
            + f"{row['request_dollars']:>7.2f}{summaries['files']:>10}{_size(summaries['bytes_written']):>10}"
            f"{_size(summaries['largest']):>9}"
        )
    lines.append(
        "ratio: to the bound, which is the device seconds of all jobs over the GPUs, or the longest job. starts: of "
        f"one task, at most, and tasks with more than the {ATTEMPTS} that `submit` asks for.\nlost h: generated again. "
        "summaries: files at the end; bytes written, with each rewriting; one file."
    )
    return "\n".join(lines)


COLUMNS = {"GET": 9, "HEAD": 9, "LIST": 8, "PUT": 8, "DELETE": 8}


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000, metavar="N", help="of the run (10,000)")
    parser.add_argument("--gpus", type=int, default=100, metavar="N", help="machines of one GPU (100)")
    parser.add_argument("--rates", default="0,0.02,0.1,0.5", metavar="R,R", help="kills a GPU hour (0,0.02,0.1,0.5)")
    parser.add_argument("--gpu", default="L40S", metavar="NAME", help="whose seconds are forecast (L40S)")
    parser.add_argument("--gpu-hour", type=float, default=1.0, metavar="PRICE", help="dollars a GPU hour (1, assumed)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of jobs and kills (1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args(argv)
    rates = [float(word) for word in arguments.rates.split(",")]
    found = bench(arguments.jobs, arguments.gpus, rates, arguments.gpu, arguments.gpu_hour, arguments.seed)
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
