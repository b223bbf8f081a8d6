"""Rerun: the cost of a run in which every job is done already: seconds, requests and written bytes.

    python bench/rerun.py [--jobs N] [--latency-ms MS] [--stores NAMES] [--json PATH]

One job is rendered by the stub generator, and its folder is copied under the names of N jobs. Their inputs are those of
a matrix of references times videos with N jobs, all with one content. Then `video-lab run` gets the manifest of all N,
with an engine that must not be loaded. The S3 server is a fake in this process (`_fake_s3.py`) with the real botocore;
each request waits for the latency, and requests of several threads wait in parallel.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from _fake_s3 import ENVIRONMENT, FakeS3  # noqa: E402
from _json_file import write_json  # noqa: E402

from tests.faults.file_operations import FileOperations  # noqa: E402
from tests.faults.stub_runs import import_all, run_command  # noqa: E402
from tests.stub_generator import StubGenerator  # noqa: E402

# Of 10,000 jobs at 20 ms a request.
LIMIT_JOBS, LIMIT_LATENCY_MS, LIMIT_S, LIMIT_BYTES = 10_000, 20.0, 60.0, 200_000_000
SERIAL_REQUESTS = 5  # a job: two inputs, record, mark and output, one after the other
SAMPLE, SAMPLE_REFERENCE, SAMPLE_VIDEO = "sample-job", "sample-reference.png", "sample-video.mp4"
REFERENCE, VIDEO = b"a reference, which the stub does not open", b"a video, neither " * 64
BUCKET = "bench"


def job_line(name: str, folder: str, reference: str, video: str) -> str:
    options = {"seed": 1, "keep_audio": False}
    job = {"id": name, "reference": f"{folder}/{reference}", "video": f"{folder}/{video}", "prompt": "ok"}
    return json.dumps(job | {"options": options}) + "\n"


def names_of(jobs: int) -> list[tuple[str, str, str]]:
    """(job, reference, video) of each job of a square matrix."""
    side = math.ceil(math.sqrt(jobs))
    return [(f"job-{i:06d}", f"reference-{i % side:04d}.png", f"video-{i // side:04d}.mp4") for i in range(jobs)]


def copies(key: str, data: bytes, jobs: list[tuple[str, str, str]]) -> Iterator[tuple[str, bytes]]:
    """A file of the sample job under the names of all jobs; texts name the job and its inputs."""
    text = key.endswith(".json")
    for job, reference, video in jobs:
        own = data
        if text:
            own = data.replace(SAMPLE.encode(), job.encode())
            own = own.replace(SAMPLE_REFERENCE.encode(), reference.encode()).replace(
                SAMPLE_VIDEO.encode(), video.encode()
            )
        yield key.replace(SAMPLE, job), own


class LocalOutput:
    """Files on this disk."""

    def __init__(self, folder: Path) -> None:
        self.inputs, self.out = str(folder / "in"), str(folder / "out")
        self._folder = folder

    def add_input(self, name: str, data: bytes) -> None:
        path = self._folder / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    def files(self) -> dict[str, bytes]:
        top = Path(self.out)
        return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}

    def add(self, key: str, data: bytes) -> None:
        path = Path(self.out, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def remove(self, key: str) -> None:
        Path(self.out, key).unlink()

    @contextmanager
    def measured(self, found: dict[str, Any], latency_s: float) -> Iterator[None]:
        operations = FileOperations([Path(self.out)], lambda name, path: None)
        operations.install()
        yield
        found["bytes_written"] = operations.written


class S3Output:
    """Objects of the fake server."""

    def __init__(self, server: FakeS3) -> None:
        self.inputs, self.out = f"s3://{BUCKET}/in", f"s3://{BUCKET}/out"
        self._server = server

    def add_input(self, name: str, data: bytes) -> None:
        self._server.put(f"{BUCKET}/in/{name}", data)

    def files(self) -> dict[str, bytes]:
        top = f"{BUCKET}/out/"
        return {k.removeprefix(top): s.data for k, s in self._server.objects.items() if k.startswith(top)}

    def add(self, key: str, data: bytes) -> None:
        self._server.put(f"{BUCKET}/out/{key}", data)

    def remove(self, key: str) -> None:
        del self._server.objects[f"{BUCKET}/out/{key}"]

    @contextmanager
    def measured(self, found: dict[str, Any], latency_s: float) -> Iterator[None]:
        self._server.reset(latency_s)
        yield
        found["bytes_written"] = self._server.written
        found["requests"] = dict(sorted(self._server.requests.items()))
        found["requests_at_once"] = self._server.most_at_once
        self._server.latency_s = 0.0


Output = LocalOutput | S3Output


def run(folder: Path, output: Output, lines: list[str], run_id: str, load: Callable[[], Any]) -> int:
    """Run `video-lab run` in this process with its output in a file, and return the exit code."""
    (folder / "m.jsonl").write_text("".join(lines), encoding="utf-8")
    words = [str(folder / "m.jsonl"), "--out", output.out, "--cache", str(folder / "cache"), "--run-id", run_id]
    sys.stdout.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with (folder / f"{run_id}.log").open("wb") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            code = run_command([*words, "--log-format", "json"], load, {"weights": "stub"})
            sys.stdout.flush()
            return code
    finally:
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


def rerun(store: str, jobs: int, latency_s: float, folder: Path, server: FakeS3) -> dict[str, Any]:
    """Numbers of one store. RuntimeError if a job was not skipped."""
    folder.mkdir()
    output: Output = LocalOutput(folder) if store == "local" else S3Output(server)
    for name, data in ((SAMPLE_REFERENCE, REFERENCE), (SAMPLE_VIDEO, VIDEO)):
        output.add_input(name, data)
    code = run(
        folder, output, [job_line(SAMPLE, output.inputs, SAMPLE_REFERENCE, SAMPLE_VIDEO)], "sample", StubGenerator
    )
    if code != 0:
        raise RuntimeError((folder / "sample.log").read_text()[-2000:])
    names = names_of(jobs)
    for reference in {reference for _, reference, _ in names}:
        output.add_input(reference, REFERENCE)
    for video in {video for _, _, video in names}:
        output.add_input(video, VIDEO)
    for key, data in output.files().items():
        output.remove(key)
        if key.startswith(f"jobs/{SAMPLE}/"):
            for own_key, own_data in copies(key, data, names):
                output.add(own_key, own_data)
    inputs = len({reference for _, reference, _ in names}) + len({video for _, _, video in names})
    found: dict[str, Any] = {"store": store, "jobs": jobs, "inputs": inputs, "latency_ms": 0.0, "requests": None}
    if store != "local":
        found["latency_ms"] = latency_s * 1000

    def load() -> Any:
        raise RuntimeError("a job was not done: the engine was loaded")

    lines = [job_line(job, output.inputs, reference, video) for job, reference, video in names]
    before = resource.getrusage(resource.RUSAGE_SELF)
    with output.measured(found, latency_s):
        begin = time.perf_counter()
        code = run(folder, output, lines, "rerun", load)
        found["seconds"] = round(time.perf_counter() - begin, 2)
    after = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu_s"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)
    summary = next(data for key, data in output.files().items() if key.endswith(".summary.json"))
    counts = json.loads(summary)["counts"]
    if code != 0 or counts["skipped"] != jobs:
        raise RuntimeError(f"exit code {code}, {counts}:\n{(folder / 'rerun.log').read_text()[-2000:]}")
    if found["requests"] is not None:
        found["requests_a_job"] = round(sum(found["requests"].values()) / jobs, 3)
        found["serial_s"] = round(SERIAL_REQUESTS * jobs * latency_s, 1)
        found["ratio"] = round(found["serial_s"] / found["seconds"], 1)
    if jobs == LIMIT_JOBS and found["latency_ms"] in (0.0, LIMIT_LATENCY_MS):
        found["within_limits"] = found["seconds"] <= LIMIT_S and found["bytes_written"] <= LIMIT_BYTES
    return found


def bench(jobs: int, latency_ms: float, stores: list[str]) -> dict[str, Any]:
    os.environ.update(ENVIRONMENT)
    import_all()
    server = FakeS3()
    server.install()
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as folder:
        rows = []
        for store in stores:
            rows.append(rerun(store, jobs, latency_ms / 1000, Path(folder) / store, server))
            shutil.rmtree(Path(folder) / store)
    return {"bench": "rerun", "rows": rows}


def table(found: dict[str, Any]) -> str:
    lines = []
    for row in found["rows"]:
        where = "on S3" if row["store"] == "s3" else "on a local disk"
        lines.append(f"{row['jobs']} done jobs of {row['inputs']} inputs {where}")
        lines.append(f"  seconds                  {row['seconds']:>13.2f}  of CPU {row['cpu_s']:.2f}")
        each = row["bytes_written"] / row["jobs"]
        lines.append(f"  bytes written            {row['bytes_written']:>13,}  {each:.0f} a job")
        if row["requests"] is not None:
            kinds = ", ".join(f"{kind} {n}" for kind, n in row["requests"].items())
            lines.append(f"  requests a job           {row['requests_a_job']:>13.3f}  {kinds}")
            lines.append(f"  requests at once, at most{row['requests_at_once']:>13}")
            serial = f"{SERIAL_REQUESTS} serial requests a job, s"
            lines.append(f"  {serial:<25}{row['serial_s']:>13.1f}  {row['ratio']:.1f}x; {row['latency_ms']:g} ms each")
        if "within_limits" in row:
            kept = "kept" if row["within_limits"] else "BROKEN"
            lines.append(f"  limits of {LIMIT_S:.0f} s and {LIMIT_BYTES / 1e6:.0f} MB: {kept}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=LIMIT_JOBS, metavar="N", help="done jobs (10,000)")
    parser.add_argument(
        "--latency-ms", type=float, default=LIMIT_LATENCY_MS, metavar="MS", help="of each request to S3 (20)"
    )
    parser.add_argument("--stores", default="s3,local", metavar="NAMES", help="of s3, local (both)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args(argv)
    found = bench(arguments.jobs, arguments.latency_ms, arguments.stores.split(","))
    print(table(found))
    write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
