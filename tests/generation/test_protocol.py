"""The contract of `generate(start=…)`, on the stub that the batch's tests use: a resumed job has the same frames."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runner.errors import InternalError, StorageUnavailable
from runner.generation.protocol import Generator, Request, ResumePoint
from runner.spec.options import JobOptions
from runner.timing import StageTimer
from tests.stub_generator import StubGenerator

SEGMENTS = 6


def generated(stub: StubGenerator, prompt: str = "ok", start: ResumePoint | None = None, on_step=None) -> list:
    request = Request(Path("a.png"), Path("b.mp4"), prompt, JobOptions(seed=3))
    conditions = stub.prepare(request, StageTimer())
    plan = stub.plan(conditions.clip.frames, conditions.clip.size, request.options)
    return list(stub.generate(conditions, plan, StageTimer(), on_step, start))


def through_json(point: ResumePoint) -> ResumePoint:
    """As a checkpoint keeps it: values as JSON."""
    return replace(point, values=json.loads(json.dumps(point.values)))


@pytest.mark.parametrize("cut", range(1, SEGMENTS + 1))
def test_a_stub_resumed_after_any_segment_gives_the_same_frames(cut):
    whole = generated(StubGenerator(frames=11, segments=SEGMENTS))
    told: list[tuple[int, int]] = []
    point = through_json(whole[cut - 1].resume)
    assert point.segment == cut
    stub = StubGenerator(frames=11, segments=SEGMENTS)
    rest = generated(stub, start=point, on_step=lambda *step: told.append(step))
    assert [segment.index for segment in rest] == list(range(cut, SEGMENTS))
    for found, expected in zip(rest, whole[cut:], strict=True):
        assert np.array_equal(found.frames, expected.frames)
        assert np.array_equal(found.pose, expected.pose)
        assert found.resume.values == expected.resume.values
    assert told == [(done, 2 * SEGMENTS) for done in range(2 * cut + 1, 2 * SEGMENTS + 1)]
    assert stub.started_at == [cut]


def test_a_stub_that_fails_in_the_middle_goes_on_from_the_segment_before():
    stub, kept = StubGenerator(frames=12, segments=SEGMENTS), []
    request = Request(Path("a.png"), Path("b.mp4"), "flaky-at-3", JobOptions(seed=3))
    conditions = stub.prepare(request, StageTimer())
    plan = stub.plan(12, (64, 48), request.options)

    def keep_all() -> None:
        for segment in stub.generate(conditions, plan, StageTimer()):
            kept.append(segment)

    with pytest.raises(StorageUnavailable):
        keep_all()
    assert len(kept) == 3
    rest = list(stub.generate(conditions, plan, StageTimer(), start=kept[-1].resume))
    frames = np.concatenate([segment.frames for segment in [*kept, *rest]])
    assert np.array_equal(frames, np.concatenate([s.frames for s in generated(StubGenerator(12, SEGMENTS))]))


def test_a_resume_point_without_its_arrays_is_refused():
    with pytest.raises(InternalError, match="random state"):
        generated(StubGenerator(), start=ResumePoint(1, {}, {"left": 3}))


def test_a_generator_that_cannot_resume_has_no_identity_and_no_resume_points():
    stub = StubGenerator(resumable=False)
    assert stub.resume_identity == {}
    assert [segment.resume for segment in generated(stub)] == [None, None]

    class Plain(StubGenerator):
        resume_identity = Generator.resume_identity  # the protocol's own answer

    assert Plain().resume_identity == {}


def test_the_contract_is_read_without_torch():
    code = "import sys, runner.generation.protocol; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
