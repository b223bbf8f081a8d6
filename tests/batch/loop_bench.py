"""Loop bench: runs of the loop with a stub generator over one output folder; storage, files and records are real."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
from PIL import Image

from runner.batch.job_checkpoint import Checkpoints
from runner.batch.job_source import JobSource, ShardJobs
from runner.batch.ledger import Ledger
from runner.batch.loop import Batch, Engine
from runner.batch.memory_sampler import MemorySampler
from runner.batch.progress import Progress, SilentProgress
from runner.batch.stop import Stop
from runner.batch.summary import SummaryWriter
from runner.finishing.stages import StageSettings, open_stages
from runner.records.events import EventLog
from runner.records.record import schemas
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import LocalStorage, Storage
from tests.stub_generator import StubGenerator

SIGTERM = 15


class Bench:
    """One output folder, inputs, and as many runs over them as a test likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.out = LocalStorage(folder / "out")
        self.reference, self.video = folder / "ref.png", folder / "video.mp4"
        Image.new("RGB", (8, 8), "red").save(self.reference)
        self.video.write_bytes(b"not opened by the stub")
        self.loads = 0
        self.stop = Stop()
        self.progress: Progress = SilentProgress()
        self.generator = StubGenerator()
        self.own = lambda job: {}
        self.models: Path | None = None  # the model store, as the stages see it
        self.events: list[dict] = []
        self.kept: Storage | Literal["off"] | None = (
            None  # where finished segments are kept; None: on the output storage
        )

    def job(self, name: str, prompt: str = "ok", **options) -> Job:
        return Job(name, str(self.reference), str(self.video), None, prompt, JobOptions(**options), None)

    def run(self, *jobs: Job, run_id: str = "r1", storage=None, source: JobSource | None = None, **ledger) -> int:
        storage = storage or self.out

        def load() -> StubGenerator:
            self.loads += 1
            return self.generator

        stages = partial(open_stages, settings=StageSettings(self.models))
        base = f"runs/{run_id}/0-of-1"
        events = EventLog(partial(storage.append_lines, f"{base}.events.jsonl"), at_once=storage.appends, quiet=True)
        summary = SummaryWriter(
            storage,
            run_id=run_id,
            shard="0-of-1",
            shard_reason="test",
            manifest="m.yaml",
            recipe="stub",
            job_ids=[job.id for job in jobs],
            events=events,
        )
        batch_ledger = Ledger(storage, **ledger)
        batch = Batch(
            source or ShardJobs(jobs),
            Engine("stub", self.generator.identity, load, own=self.own, stages=stages),
            storage,
            batch_ledger,
            summary,
            events,
            stop=self.stop,
            scratch=self.folder / "scratch",
            progress=self.progress,
            sampler=MemorySampler(0.05),
            checkpoints=self.checkpoints(storage, batch_ledger),
        )
        code = batch.run()
        written = sorted(info.key for info in storage.list(f"{base}.events"))
        self.events = [json.loads(line) for key in written for line in storage.read_bytes(key).splitlines()]
        self.summary = json.loads(storage.read_bytes(f"{base}.summary.json"))
        jsonschema.validate(self.summary, schemas()["summary.v1.schema.json"])
        return code

    def checkpoints(self, storage: Storage, ledger: Ledger) -> Checkpoints | None:
        if self.kept is None:
            return Checkpoints(storage, ledger.leases.fence)
        return None if self.kept == "off" else Checkpoints(self.kept)

    def result(self, name: str) -> dict:
        data = json.loads(self.out.read_bytes(f"jobs/{name}/result.json"))
        jsonschema.validate(data, schemas()["result.v1.schema.json"])
        return data

    def files(self, name: str, *, parts: bool = True) -> set[str]:
        """`parts`: with the finished segments that are kept."""
        root = self.folder / "out/jobs" / name
        found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        return {name for name in found if parts or not name.startswith("parts/")}


FILES = {"output.mp4", "pose.mp4", "poster.jpg", "frames.sha256", "people.json", "result.json"}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch) -> Bench:
    monkeypatch.setattr("runner.batch.settlement.RETRY_DELAY_S", 0.01)
    monkeypatch.setattr("runner.batch.settlement.LOOK_AGAIN_S", 0.05)
    return Bench(tmp_path)
