"""Stages: a row of a table changes the frames between decoder and encoder; the loop and the writer know none."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from runner.finishing import stages
from runner.finishing.stages import StageSettings, finish_segments, finished_clip, open_stages
from runner.generation.protocol import ClipInfo, Segment
from runner.spec.options import JobOptions
from runner.timing import StageTimer
from tests.batch.test_loop import bench  # noqa: F401
from tests.finishing.doubling import SEED, DoubleRate

ROW = "tests.finishing.doubling:open_double_rate"


def shades(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)


def test_no_row_changes_nothing():
    segments = [Segment(0, shades(1, 2), shades(9, 9)), Segment(1, shades(3))]
    found = list(finish_segments(segments, open_stages(JobOptions(), StageSettings()), StageTimer()))
    assert [(s.index, s.frames[:, 0, 0, 0].tolist()) for s in found] == [(0, [1, 2]), (1, [3])]
    assert found[0].pose is segments[0].pose


def test_a_stage_keeps_frames_from_one_segment_to_the_next():
    stage, timer = DoubleRate(), StageTimer()
    segments = [Segment(0, shades(10, 20), shades(1, 1)), Segment(1, shades(40), shades(1))]
    found = list(finish_segments(segments, [stage], timer))
    assert np.concatenate([s.frames for s in found])[:, 0, 0, 0].tolist() == [10, 15, 20, 30, 40, 40]
    assert [s.index for s in found] == [0, 1, 2]
    assert sum(len(s.pose) for s in found if s.pose is not None) == 3
    assert stage.closed == [True] and timer.seconds["double_rate"] > 0


def test_stages_run_in_order_and_lazily():
    taken = []

    def source():
        for index in range(3):
            taken.append(index)
            yield Segment(index, shades(10 * index, 10 * index + 5))

    first, second = DoubleRate("first"), DoubleRate("second")
    finished = finish_segments(source(), [first, second], StageTimer())
    next(finished)
    assert taken == [0]
    finished.close()
    assert first.closed and second.closed
    clip = ClipInfo(6, Fraction(8), 2, 2, 0.5)
    assert finished_clip(clip, [first, second]) == ClipInfo(24, Fraction(32), 2, 2, 0.5)


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
