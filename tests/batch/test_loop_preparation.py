"""Preparation beside the denoising: real networks' sessions in the prefetch thread, a stub that denoises meanwhile."""

import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from runner.batch.loop import Batch
from runner.generation.protocol import Request
from runner.preprocess.networks.sessions import open_network
from runner.preprocess.networks.vitpose import PoseEstimator
from runner.preprocess.networks.yolov10 import Detector
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from runner.timing import StageTimer
from runner.video import Mp4Writer
from tests.batch.loop_bench import Bench
from tests.preprocess.conftest import HEIGHT, WIDTH, disc_frame
from tests.preprocess.tiny_networks import build_detector, build_pose
from tests.stub_generator import StubConditions, StubGenerator

WAIT_S = 30.0
AT_ITS_LIMIT = "Available memory of 2451456 is smaller than requested bytes of 25165824"


class Watched:
    """A network's session that notes who runs it, and does `beside` first."""

    def __init__(self, session, beside):
        self._session, self._beside, self.threads = session, beside, set()

    def run(self, names, feeds):
        self.threads.add(threading.current_thread().name)
        self._beside()
        return self._session.run(names, feeds)


class PreparingStub(StubGenerator):
    """Prepares with the real preprocessor; while a job denoises, `denoising` is set."""

    def __init__(self, preprocessor, **how):
        super().__init__(**how)
        self.preprocessor = preprocessor
        self.denoising, self.go_on = threading.Event(), threading.Event()

    def prepare(self, request: Request, timer: StageTimer) -> StubConditions:
        made = super().prepare(request, timer)
        found = self.preprocessor.prepare(request.reference, request.video, JobOptions(fps="source"), timer=timer)
        made.report = found.report
        found.close()
        return made

    def generate(self, conditions, plan, timer, on_step=None, start=None):
        self.denoising.set()
        assert self.go_on.wait(WAIT_S), "no network ran while the job denoised"
        yield from super().generate(conditions, plan, timer, on_step, start)


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path / "bench")
    with Mp4Writer(bench.video, WIDTH, HEIGHT, Fraction(16)) as writer:
        writer.write(np.stack([disc_frame((90, 64))] * 20))
    return bench


@pytest.fixture
def networks(tmp_path):
    return build_detector(tmp_path / "d.onnx"), build_pose(tmp_path / "p.onnx")


def watched(networks, beside, device="cpu"):
    """(a preprocessor on `device`, its two sessions): both networks do `beside` before each run."""
    detector, pose = (open_network(path) for path in networks)
    sessions = [Watched(network.session, beside) for network in (detector, pose)]
    pair = [replace(network, session=session) for network, session in zip((detector, pose), sessions, strict=True)]
    return Preprocessor(Detector(pair[0]), PoseEstimator(pair[1]), device), sessions


def test_the_networks_run_in_the_prefetch_thread_while_the_job_before_denoises(bench, networks):
    """The second job's networks begin only once the first job denoises, which ends only once they have run."""
    first = threading.Event()
    generator: PreparingStub

    def beside():
        if first.is_set():  # the second job's
            assert generator.denoising.wait(WAIT_S)
            generator.go_on.set()

    preprocessor, sessions = watched(networks, beside)
    generator = bench.generator = PreparingStub(preprocessor)
    prepare = preprocessor.prepare

    def prepared(*arguments, **how):
        found = prepare(*arguments, **how)
        first.set()
        return found

    preprocessor.prepare = prepared
    assert bench.run(bench.job("a"), bench.job("b", seed=1)) == 0
    assert {name for session in sessions for name in session.threads} == {"prefetch"}
    for name in ("a", "b"):
        assert bench.result(name)["status"] == "succeeded"
        assert bench.result(name)["preprocess"]["frames_without_person"] == 0


def test_memory_that_runs_out_in_a_preparation_harms_neither_the_job_that_denoises_nor_its_own(
    bench, networks, monkeypatch
):
    """The second job is prepared on the CPU, which its record and its kept segments say; the third on the device."""
    jobs = []
    generator: PreparingStub

    def beside():
        if len(jobs) == 2:
            assert generator.denoising.wait(WAIT_S)
            raise RuntimeError(AT_ITS_LIMIT)

    preprocessor, _ = watched(networks, beside, "cuda:0")
    generator = bench.generator = PreparingStub(preprocessor)
    prepare, identity, identities = preprocessor.prepare, Batch._identity, {}

    def prepared(*arguments, **how):
        jobs.append(len(jobs))
        try:
            return prepare(*arguments, **how)
        finally:
            if len(jobs) == 2:
                generator.go_on.set()

    def noted(loop, task):
        found = identities[task.job.id] = identity(loop, task)
        return found

    preprocessor.prepare = prepared
    monkeypatch.setattr(Batch, "_identity", noted)
    assert bench.run(*[bench.job(name, seed=seed) for seed, name in enumerate("abc")]) == 0
    for name, where in {"a": None, "b": "cpu", "c": None}.items():
        record = bench.result(name)
        assert (record["status"], record["attempt"]) == ("succeeded", 1)
        assert record["preprocess"].get("prepared_on") == where
        assert any("prepared on the CPU" in text for text in record["warnings"]) == (where is not None)
        assert identities[name] == {"device": "stub"} | ({} if where is None else {"preprocess": where})
