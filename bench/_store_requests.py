"""Store requests: counts the product's requests to an object store for a job, and the bytes of its summaries.

It runs the real batch loop with the stub generator, botocore, and the fake server of `_fake_s3.py` in this process,
which has inputs and output. The cost of one thing is the difference of two runs that differ only in this thing.
Requests for the files of the run itself (`runs/`) are left out, because their number depends on time, see `_fleet.py`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from _fake_s3 import ENVIRONMENT, Answer, FakeS3

from runner.batch.ledger import Ledger
from runner.batch.summary import SummaryWriter
from runner.launch.mailbox import Mailbox
from runner.records.record import JobLine
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import open_storage
from tests.batch.loop_bench import Bench
from tests.stub_generator import StubGenerator

BUCKET = "scale"
LINES = 400  # of the summaries that are weighed


class JobsS3(FakeS3):
    """Counts the requests for inputs and jobs by kind. LIST: of objects or of unfinished uploads."""

    def __init__(self) -> None:
        super().__init__()
        self.of_jobs: Counter[str] = Counter()

    def answer(self, method: str, url: str, headers: dict[str, str], body: bytes) -> Answer:
        if "runs/" not in url and "runs%2F" not in url:
            of_bucket = urlsplit(url).path.strip("/").count("/") == 0
            self.of_jobs["LIST" if method == "GET" and of_bucket else method] += 1
        return super().answer(method, url, headers, body)


@dataclass(frozen=True)
class JobRequests:
    """Requests by kind, per job except `renewal`. `files`: objects of a finished job below jobs/."""

    rendered: Mapping[str, int]  # decided, taken, rendered in one segment, published
    segment: Mapping[str, int]  # each further one
    done: Mapping[str, int]  # a job that another runner has done since this one began
    leased: Mapping[str, int]  # a look at a job that another runner has
    renewal: Mapping[str, int]  # of one lease
    files: int


def count_requests() -> JobRequests:
    """Count them. RuntimeError if a run does not end as it should."""
    os.environ.update(ENVIRONMENT)
    server = JobsS3()
    server.install()
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as folder:
        made = Bench(Path(folder))
        server.put(f"{BUCKET}/in/ref.png", made.reference.read_bytes())
        server.put(f"{BUCKET}/in/video.mp4", made.video.read_bytes())

        def count(names: Sequence[str], segments: int = 1, expected: int = 0) -> Counter[str]:
            made.generator = StubGenerator(frames=6 * segments, segments=segments)
            mailbox = Mailbox()  # as no job is known at the start, each is decided by itself
            for name in names:
                uris = (f"s3://{BUCKET}/in/ref.png", f"s3://{BUCKET}/in/video.mp4")
                mailbox.send(Job(name, *uris, None, "ok", JobOptions(seed=1, keep_audio=False), None))
            mailbox.end()
            server.of_jobs.clear()
            run_id = f"run{time.monotonic_ns()}"
            code = made.run(run_id=run_id, storage=open_storage(f"s3://{BUCKET}/out"), source=mailbox)
            if code != expected:
                raise RuntimeError(f"exit code {code}: {made.summary}")
            return Counter(server.of_jobs)

        one, three = count(["a1"]), count(["b1", "b2", "b3"])
        long = count(["c1"], segments=3)
        rendered = _share(three - one, 2)
        again = count(["b1"])
        leases = Ledger(open_storage(f"s3://{BUCKET}/out"))
        server.of_jobs.clear()
        leases.begin("held", leases.decide("held", "0" * 64, {}), "0" * 64, "another")
        server.of_jobs.clear()
        leases.leases.renew_all()
        renewal = Counter(server.of_jobs)
        server.of_jobs.clear()
        leases.decide("held", "0" * 64, {})
        # Beside the decision the loop identifies both inputs again.
        leased = Counter(server.of_jobs) + Counter({"HEAD": 2})
        files = sum(key.startswith(f"{BUCKET}/out/jobs/b1/") for key in server.objects)
    return JobRequests(rendered, _share(long - one, 2), _share(again), _share(leased), _share(renewal), files)


def _share(counted: Counter[str], of: int = 1) -> dict[str, int]:
    return {kind: round(number / of) for kind, number in sorted(counted.items())}


class _Scales:
    """A storage that only counts writes and their bytes."""

    def __init__(self) -> None:
        self.bytes = self.writings = 0

    def write_bytes(self, key: str, data: bytes) -> None:
        self.bytes += len(data)
        self.writings += 1

    def read_bytes(self, key: str) -> None:
        return None


@dataclass(frozen=True)
class SummaryWeight:
    """Bytes of `summary.json` and `metrics.prom` together: `empty`, and for each line by its status.

    seconds_a_line: of CPU, to write them, a line that is not run.
    """

    empty: float
    lines: Mapping[str, float]
    seconds_a_line: float

    def of(self, lines: Mapping[str, int]) -> float:
        return self.empty + sum(self.lines[status] * number for status, number in lines.items())


def weigh_summaries() -> SummaryWeight:
    """Write real summaries of LINES jobs that were not run, succeeded or skipped, and one without jobs."""
    names = [f"job-{index:06d}" for index in range(LINES)]

    def weigh(jobs: Sequence[str], status: Any) -> tuple[int, float]:
        scales = _Scales()
        writer = SummaryWriter(
            scales,  # type: ignore[arg-type]
            run_id="4f1c2a9e-8d53-4d0e-9a1b-6f0c1f3f7a11",
            shard="ip-10-0-17-203.ec2.internal-1",
            shard_reason="--shard any",
            manifest="s3://bucket/out/runs/4f1c2a9e-8d53-4d0e-9a1b-6f0c1f3f7a11/manifest.jsonl",
            recipe="fp4-distill",
            job_ids=jobs,
            clock=lambda: 0.0,
        )
        writer._not_before = float("inf")  # only `finish` writes
        for name in jobs if status != "not_run" else ():
            ran = status == "succeeded"
            output = f"s3://bucket/out/jobs/{name}/output.mp4" if ran else None
            reason = "never run" if ran else "done"
            seconds = 151.234 if ran else None
            writer.add(JobLine(id=name, status=status, reason=reason, attempt=1, output=output, seconds=seconds))
        begin = time.process_time()
        writer.finish(None, None)
        return scales.bytes, time.process_time() - begin

    weigh([], "not_run")  # what is imported and read once
    empty = weigh([], "not_run")[0]
    found = {status: weigh(names, status) for status in ("not_run", "succeeded", "skipped")}
    lines = {status: (size - empty) / LINES for status, (size, _) in found.items()}
    return SummaryWeight(empty, lines, found["not_run"][1] / LINES)
