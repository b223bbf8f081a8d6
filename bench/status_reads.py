"""Status reads: the cost of `status` for a run of many jobs on S3: seconds, CPU seconds and requests.

    python bench/status_reads.py [--jobs N] [--latency-ms MS] [--json PATH]

One job is rendered by the stub generator, and its files are copied under the names of N jobs of one run. The server is
a fake in a separate process (`_fake_s3.py` behind real sockets) with the real botocore and its connections. Each
request waits for the latency; requests of several connections wait in parallel. Measured are a first read, and a second
read of the same reader. The peers, in the same process: two requests per job, for its mark and its record, without a
listing (as `status` did before it used listings); and boto3 reading only the records, on as many threads, without
parsing.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import responses
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _fake_s3 import ENVIRONMENT, FakeS3  # noqa: E402
from _json_file import write_json  # noqa: E402

from runner.batch.fingerprint import settings_digest  # noqa: E402
from runner.batch.ledger import Ledger  # noqa: E402
from runner.records.output_layout import RUN_JOBS, job_key, run_file_key  # noqa: E402
from runner.records.record import ResultRecord, RunJobsRecord  # noqa: E402
from runner.storage import open_storage  # noqa: E402
from runner.verbs.status import READS_AT_ONCE, StatusReader  # noqa: E402
from tests.batch.loop_bench import Bench  # noqa: E402

LIMIT_JOBS, LIMIT_LATENCY_MS, LIMIT_S = 10_000, 20.0, 30.0
BUCKET, SAMPLE = "bench", "sample-job"


def job_names(jobs: int) -> list[str]:
    return [f"job-{index:06d}" for index in range(jobs)]


def sample_files(folder: Path) -> dict[str, bytes]:
    """The files of a rendered job by their names below its folder."""
    made = Bench(folder)
    if made.run(made.job(SAMPLE), run_id="night") != 0:
        raise RuntimeError(str(made.summary))
    top = folder / "out" / "jobs" / SAMPLE
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def fill(server: FakeS3, files: dict[str, bytes], jobs: list[str]) -> None:
    """Put the run's files there, as a run on S3 leaves them: an output's identity is its ETag."""
    output = files["output.mp4"]
    server.put("etag", output)
    etag = server.objects.pop("etag").etag.strip('"')
    record = ResultRecord.model_validate_json(files["result.json"])
    assert record.output is not None
    for job in jobs:
        key = job_key(job, "output.mp4")
        made = record.output.model_copy(
            update={"key": key, "uri": f"s3://{BUCKET}/out/{key}", "identity": f"etag:{etag}:{len(output)}"}
        )
        own = files | {"result.json": record.model_copy(update={"job_id": job, "output": made}).to_json()}
        for name, data in own.items():
            server.put(f"{BUCKET}/out/{job_key(job, name)}", data)
    digest = settings_digest(record.fingerprint_parts)
    kept = RunJobsRecord(
        run_id="night", manifest="m.yaml", recipe="stub", force=False, jobs=dict.fromkeys(jobs, digest)
    )
    server.put(f"{BUCKET}/out/{run_file_key('night', RUN_JOBS)}", kept.to_json())


def serve(pipe: Connection, files: dict[str, bytes], jobs: list[str], latency_s: float) -> None:
    """The server's process: a thread a connection. Each message on `pipe` is answered with the requests since the last
    one."""
    server = FakeS3()
    fill(server, files, jobs)
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=answer_all, args=(server, connection, latency_s), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    pipe.send(listener.getsockname()[1])
    while pipe.recv():
        pipe.send(dict(sorted(server.requests.items())))
        server.requests.clear()


def answer_all(server: FakeS3, connection: socket.socket, latency_s: float) -> None:
    """Requests without a body, one after the other, until the connection closes."""
    with connection, connection.makefile("rb") as lines:
        while line := lines.readline():
            method, url, _ = line.decode().split()
            headers = {}
            while (line := lines.readline()) != b"\r\n":
                name, _, value = line.decode().partition(":")
                headers[name.strip().lower()] = value.strip()
            begin = time.perf_counter()
            answer = server.answer(method, url, headers, b"")
            time.sleep(max(0.0, latency_s - (time.perf_counter() - begin)))
            head = f"HTTP/1.1 {answer.status} {responses[answer.status]}\r\n"
            told = {"Content-Length": str(len(answer.body)), "Date": time.strftime("%a, %d %b %Y %H:%M:%S GMT")}
            head += "".join(f"{name}: {value}\r\n" for name, value in (told | answer.headers).items())
            connection.sendall(head.encode() + b"\r\n" + (b"" if method == "HEAD" else answer.body))


class Meter:
    """Measures a call: seconds, CPU seconds of this process, requests."""

    def __init__(self, pipe: Connection, jobs: int, latency_ms: float) -> None:
        self._pipe, self._jobs, self._latency_ms = pipe, jobs, latency_ms
        self.rows: list[dict[str, Any]] = []

    def measure(self, what: str, call: Callable[[], object]) -> None:
        self._pipe.send("begin")
        self._pipe.recv()
        before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        call()
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
        self._pipe.send("end")
        requests = self._pipe.recv()
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        floor_s = sum(requests.values()) * self._latency_ms / 1000 / READS_AT_ONCE
        row = {"what": what, "jobs": self._jobs, "latency_ms": self._latency_ms, "requests": requests}
        row |= {"seconds": round(seconds, 2), "cpu_s": round(cpu_s, 2), "floor_s": round(floor_s, 2)}
        self.rows.append(row)


def look_in_pairs(out: str, jobs: list[str]) -> None:
    """Two requests a job: its mark and its record."""
    ledger = Ledger(open_storage(out))
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = list(pool.map(lambda job: (ledger.leases.look(job), ledger.result(job)), jobs))
    assert all(record is not None for _, record in found)


def read_plainly(out: str, jobs: list[str]) -> None:
    """boto3 alone: the bytes of the records."""
    client = open_storage(out).client  # type: ignore[attr-defined]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        keys = [f"out/{job_key(job, 'result.json')}" for job in jobs]
        assert all(pool.map(lambda key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read(), keys))


def bench(jobs: int, latency_ms: float) -> dict[str, Any]:
    names, out = job_names(jobs), f"s3://{BUCKET}/out"
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as folder:
        files = sample_files(Path(folder))
    context = get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, files, names, latency_ms / 1000), daemon=True)
    server.start()
    try:
        os.environ.update(ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{here.recv()}"})
        os.environ["NO_PROXY"] = "127.0.0.1"
        open_storage(out).stat("warm")  # the client is made, and botocore's models are read
        meter = Meter(here, jobs, latency_ms)
        reader = StatusReader(open_storage(out))

        def look() -> None:
            counts = reader.read().counts
            if counts["succeeded"] != jobs or counts["total"] != jobs:
                raise RuntimeError(f"not all are done: {counts}")

        meter.measure("status", look)
        meter.measure("status, a second look", look)
        meter.measure("two requests a job", lambda: look_in_pairs(out, names))
        meter.measure("boto3 alone, the records", lambda: read_plainly(out, names))
    finally:
        server.kill()
        server.join()
    ours = meter.rows[0]
    for row in meter.rows:
        row["times_status"] = round(row["seconds"] / ours["seconds"], 2)
    if (jobs, latency_ms) == (LIMIT_JOBS, LIMIT_LATENCY_MS):
        ours["within_limit"] = ours["seconds"] <= LIMIT_S
    return {"bench": "status_reads", "rows": meter.rows}


def table(found: dict[str, Any]) -> str:
    first = found["rows"][0]
    lines = [f"{first['jobs']} done jobs on S3, {first['latency_ms']:g} ms a request, {READS_AT_ONCE} at once"]
    lines.append(f"  {'':<26}{'seconds':>8}{'of status':>10}{'floor':>8}{'ratio':>7}{'CPU s':>8}  requests")
    for row in found["rows"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in row["requests"].items())
        ratio = row["seconds"] / max(row["floor_s"], 0.01)
        lines.append(
            f"  {row['what']:<26}{row['seconds']:>8.2f}{row['times_status']:>9.2f}x{row['floor_s']:>8.2f}"
            f"{ratio:>6.1f}x{row['cpu_s']:>8.2f}  {kinds}"
        )
    if "within_limit" in first:
        lines.append(f"  limit of {LIMIT_S:.0f} s: {'kept' if first['within_limit'] else 'BROKEN'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=LIMIT_JOBS, metavar="N", help="done jobs (10,000)")
    parser.add_argument(
        "--latency-ms", type=float, default=LIMIT_LATENCY_MS, metavar="MS", help="of each request to S3 (20)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args(argv)
    found = bench(arguments.jobs, arguments.latency_ms)
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
