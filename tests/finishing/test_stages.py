"""Stages: a row of a table changes the frames between decoder and encoder; the loop and the writer know none."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from runner.errors import InternalError
from runner.finishing import stages
from runner.finishing.stages import (
    StageSettings,
    StageState,
    add_states,
    finish_segments,
    finished_clip,
    open_stages,
    split_states,
)
from runner.generation.protocol import ClipInfo, ResumePoint, Segment
from runner.spec.options import JobOptions
from runner.timing import StageTimer
from tests.batch.loop_bench import bench  # noqa: F401
from tests.finishing.doubling import SEED, DoubleRate

ROW = "tests.finishing.doubling:open_double_rate"


def shades(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)


def test_no_row_changes_nothing():
    segments = [Segment(0, shades(1, 2), shades(9, 9)), Segment(1, shades(3))]
    found = list(finish_segments(segments, open_stages(JobOptions(), StageSettings()), StageTimer(), 2))
    assert [(s.index, s.frames[:, 0, 0, 0].tolist()) for s in found] == [(0, [1, 2]), (1, [3])]
    assert found[0].pose is segments[0].pose
    assert found[0].resume is None


def test_a_stage_keeps_frames_from_one_segment_to_the_next():
    stage, timer = DoubleRate(), StageTimer()
    segments = [Segment(0, shades(10, 20), shades(1, 1)), Segment(1, shades(40), shades(1))]
    found = list(finish_segments(segments, [stage], timer, 2))
    assert [s.frames[:, 0, 0, 0].tolist() for s in found] == [[10, 15], [20, 30, 40, 40]]
    assert [s.index for s in found] == [0, 1]
    assert [len(s.pose) for s in found] == [2, 1]
    assert stage.closed == [True] and timer.seconds["double_rate"] > 0


def test_a_segment_of_which_nothing_is_handed_on_stays_one():
    """Its frames come with a later one; its index and its size stay."""
    segments = [Segment(index, shades(10 * index), shades(1)) for index in range(3)]
    found = list(finish_segments(segments, [DoubleRate()], StageTimer(), 3))
    assert [s.frames[:, 0, 0, 0].tolist() for s in found] == [[], [0, 5], [10, 15, 20, 20]]
    assert [s.index for s in found] == [0, 1, 2]
    assert found[0].frames.shape == (0, 2, 2, 3) and found[0].pose is segments[0].pose


class KeepsAll(DoubleRate):
    """Hands on nothing before the end."""

    def __call__(self, segment):
        self.last = segment.frames if self.last is None else np.concatenate([self.last, segment.frames])
        return ()

    def flush(self):
        yield Segment(0, self.last[:1])
        yield Segment(0, self.last[1:])


def test_what_a_stage_kept_to_the_end_passes_the_stages_after_it():
    segments = [Segment(index, shades(10 * index, 10 * index + 5)) for index in range(2)]
    found = list(finish_segments(segments, [KeepsAll("all"), DoubleRate()], StageTimer(), 2))
    assert [s.frames[:, 0, 0, 0].tolist() for s in found] == [[], [0, 2, 5, 7, 10, 12, 15, 15]]
    assert found[0].frames.shape == (0, 2, 2, 3) and found[0].pose is None


def test_stages_run_in_order_and_lazily():
    taken = []

    def source():
        for index in range(3):
            taken.append(index)
            yield Segment(index, shades(10 * index, 10 * index + 5))

    first, second = DoubleRate("first"), DoubleRate("second")
    finished = finish_segments(source(), [first, second], StageTimer(), 3)
    next(finished)
    assert taken == [0]
    finished.close()
    assert first.closed and second.closed
    clip = ClipInfo(6, Fraction(8), 2, 2, 0.5)
    assert finished_clip(clip, [first, second]) == ClipInfo(24, Fraction(32), 2, 2, 0.5)


SEGMENTS = 6


def resumable(start: int = 0):
    """Segments of two or three frames, each with a resume point of the generator's own."""
    for index in range(start, SEGMENTS):
        own = ResumePoint(index + 1, {"previous": shades(index)}, {"drawn": index})
        count = 2 + index % 2
        yield Segment(index, shades(*range(20 * index, 20 * index + count)), shades(*[1] * count), own)


def new_stages() -> list[DoubleRate]:
    return [DoubleRate("first"), KeepsTwo("second"), DoubleRate("third")]


class KeepsTwo(DoubleRate):
    """Hands on every frame two frames late; counts them in its values."""

    seen = 0

    def __call__(self, segment):
        frames = segment.frames if self.last is None else np.concatenate([self.last, segment.frames])
        self.seen += len(segment.frames)
        self.last = frames[-2:]
        yield replace(segment, frames=frames[:-2] + np.uint8(self.seen % 7))

    def flush(self):
        yield Segment(0, self.last)

    def state(self):
        return StageState({} if self.last is None else {"last": self.last}, {"seen": self.seen})

    def restore(self, state):
        super().restore(state)
        self.seen = state.values["seen"]


@pytest.mark.parametrize("cut", range(1, SEGMENTS + 1))
def test_stages_that_are_resumed_give_the_same_frames(cut):
    whole = list(finish_segments(resumable(), new_stages(), StageTimer(), SEGMENTS))
    assert [s.index for s in whole] == list(range(SEGMENTS))
    kept = whole[cut - 1].resume
    kept = replace(kept, values=json.loads(json.dumps(kept.values)))
    own, states = split_states(kept)
    assert (own.segment, list(own.arrays), dict(own.values)) == (cut, ["previous"], {"drawn": cut - 1})
    assert list(states) == ["first", "second", "third"]
    rest = list(finish_segments(resumable(cut), new_stages(), StageTimer(), SEGMENTS, states))
    assert [s.index for s in rest] == list(range(cut, SEGMENTS))
    for found, expected in zip(rest, whole[cut:], strict=True):
        assert np.array_equal(found.frames, expected.frames)
        assert np.array_equal(found.pose, expected.pose)
        assert found.resume.values == expected.resume.values
        assert found.resume.arrays.keys() == expected.resume.arrays.keys()
        for name, array in expected.resume.arrays.items():
            assert np.array_equal(found.resume.arrays[name], array)


def test_states_stand_beside_the_generators_own():
    point = ResumePoint(3, {"previous": shades(1)}, {"drawn": 2})
    states = {"rife": StageState({"last": shades(7), "a.b": shades(8)}, {"n": 1}), "empty": StageState({}, {})}
    both = add_states(point, states)
    assert sorted(both.arrays) == ["previous", "stage.rife.a.b", "stage.rife.last"]
    assert both.values == {"drawn": 2, "stage.rife": {"n": 1}, "stage.empty": {}}
    assert split_states(both) == (point, states)
    assert split_states(point) == (point, {})


@pytest.mark.parametrize("states", [{}, {"first": StageState({}, {})}, {"other": StageState({}, {})}])
def test_states_of_other_stages_are_refused(states):
    stages = [DoubleRate("first"), DoubleRate("second")]
    with pytest.raises(InternalError, match="this job has the stages"):
        next(finish_segments(resumable(1), stages, StageTimer(), SEGMENTS, states))
    assert stages[0].closed and stages[1].closed


@pytest.mark.parametrize("names", [("same", "same"), ("with.dot", "other")])
def test_stages_whose_states_could_not_be_told_apart_are_refused(names):
    with pytest.raises(ValueError, match="different names without dots"):
        next(finish_segments(resumable(), [DoubleRate(name) for name in names], StageTimer(), SEGMENTS))


def test_stages_are_those_that_the_job_asks_for(monkeypatch):
    monkeypatch.setitem(stages.STAGES, "double", ROW)
    assert open_stages(JobOptions(seed=1), StageSettings()) == ()
    assert [stage.name for stage in open_stages(JobOptions(seed=SEED), StageSettings())] == ["double_rate"]


def test_every_row_names_a_function():
    for row in stages.STAGES.values():
        assert row.count(":") == 1


def rate_and_frames(path) -> tuple[Fraction, int]:
    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate, sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("seed", [1, SEED])
def test_a_stage_doubles_the_rate_of_a_job_in_the_loop(bench, monkeypatch, seed):  # noqa: F811
    """The record and the file have the new rate; the preview of the skeletons keeps its own."""
    monkeypatch.setitem(stages.STAGES, "double", ROW)
    assert bench.run(bench.job("a", seed=seed)) == 0
    record, times = bench.result("a"), 2 if seed == SEED else 1
    folder = bench.folder / "out/jobs/a"
    assert (Fraction(record["output"]["fps"]), record["output"]["frames"]) == (8 * times, 6 * times)
    assert rate_and_frames(folder / "output.mp4") == (8 * times, 6 * times)
    assert rate_and_frames(folder / "pose.mp4") == (8, 6)
    assert ("double_rate" in record["timings_s"]) == (seed == SEED)
