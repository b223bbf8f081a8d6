"""Windows drawn ahead: the source's own, one beforehand and never two at a time; close waits for the one at work."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.generation.protocol import SegmentPlan
from runner.generation.wan_animate.windows import DrawnAhead, padded_window, segment_spans

WAIT_S = 10.0


@dataclass
class Picture:
    """A window whose pixels are the frames' numbers."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        self.pose = self.face = np.arange(self.start, self.stop)[:, None]


@dataclass
class Source:
    """Counts who is in it; draws nothing of a span in `held` before it is let go."""

    frames: int = 100
    asked: list[tuple[int, int]] = field(default_factory=list)
    most_inside: int = 0
    bad: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.begun, self.let_go, self.inside = threading.Event(), threading.Event(), 0
        self.let_go.set()

    def window(self, start: int, stop: int) -> Picture:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.asked.append((start, stop))
        self.begun.set()
        assert self.let_go.wait(WAIT_S)
        self.inside -= 1
        if (start, stop) == self.bad:
            raise ValueError("a frame that cannot be read")
        return Picture(start, stop)


def plan_of(frames: int, segment: int, overlap: int) -> SegmentPlan:
    segments = max(1, -(-(frames - overlap) // (segment - overlap)))
    return SegmentPlan(frames, segment, overlap, segments, 96, 144, steps=4, evaluations=4, tflop=0.0)


@settings(deadline=None, max_examples=40)
@given(frames=st.integers(2, 90), segment=st.sampled_from([5, 9, 17]), overlap=st.sampled_from([1, 5]))
def test_segment_spans_equal_requests_of_pipeline(frames: int, segment: int, overlap: int) -> None:
    if overlap >= segment:
        return
    plan, plain, source = plan_of(frames, segment, overlap), Source(frames), Source(frames)
    ahead = DrawnAhead(source, segment_spans(plan))
    for index in range(plan.segments):
        start = index * (segment - overlap)
        ours = padded_window(ahead, frames, start, start + segment, "animate")
        theirs = padded_window(plain, frames, start, start + segment, "animate")
        assert np.array_equal(ours.pose, theirs.pose)
    ahead.close()
    assert source.asked == plain.asked  # each once, in order
    assert source.most_inside == 1


def test_drawn_ahead_draws_next_window_while_one_is_used() -> None:
    source = Source()
    ahead = DrawnAhead(source, [(0, 10), (9, 19), (18, 28)])
    for expected in ([(0, 10)], [(0, 10), (9, 19)], [(0, 10), (9, 19), (18, 28)]):
        end = time.monotonic() + WAIT_S
        while len(source.asked) < len(expected) and time.monotonic() < end:
            time.sleep(0.001)
        assert source.asked == expected  # before anybody asked for the last of them
        assert ahead.window(*expected[-1]).start == expected[-1][0]
    ahead.close()


def test_drawn_ahead_draws_unexpected_span_on_request() -> None:
    source = Source()
    ahead = DrawnAhead(source, [(0, 10)])
    assert ahead.window(3, 4).start == 3
    assert ahead.window(0, 10).start == 0
    ahead.close()
    assert ahead.window(5, 6).start == 5
    assert source.most_inside == 1


def test_skip_to_resumed_segment_leaves_out_earlier_windows() -> None:
    """Only the window that is being drawn is finished; the windows from the resumed segment on are drawn ahead."""
    source, spans = Source(), [(9 * index, 9 * index + 10) for index in range(6)]
    source.let_go.clear()
    ahead = DrawnAhead(source, spans)
    assert source.begun.wait(WAIT_S)
    ahead.skip_to(3)
    source.let_go.set()
    end = time.monotonic() + WAIT_S
    while len(source.asked) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    assert source.asked == [spans[0], spans[3]]
    assert [ahead.window(*span).start for span in spans[3:]] == [27, 36, 45]
    ahead.close()
    assert source.asked == [spans[0], *spans[3:]]
    assert source.most_inside == 1


def test_skip_to_does_not_draw_skipped_or_waiting_spans_twice() -> None:
    source, spans = Source(), [(9 * index, 9 * index + 10) for index in range(6)]
    source.let_go.clear()
    ahead = DrawnAhead(source, spans)
    assert source.begun.wait(WAIT_S)
    ahead.skip_to(0)
    ahead.skip_to(2)
    ahead.skip_to(1)  # a later one waits already
    ahead.skip_to(4)
    source.let_go.set()
    assert ahead.window(*spans[4]).start == 36
    ahead.skip_to(len(spans))
    ahead.close()
    ahead.skip_to(0)
    assert source.asked[:2] == [spans[0], spans[4]]
    assert set(source.asked) <= {spans[0], spans[4], spans[5]}


def test_drawn_ahead_with_unreadable_window_raises_in_that_window() -> None:
    source = Source(bad=(9, 19))
    ahead = DrawnAhead(source, [(0, 10), (9, 19)])
    assert ahead.window(0, 10).start == 0
    with pytest.raises(ValueError, match="cannot be read"):
        ahead.window(9, 19)
    ahead.close()


def test_close_waits_for_window_being_drawn() -> None:
    """The files are closed after `close`, so that no thread may still read them."""
    source = Source()
    source.let_go.clear()
    ahead = DrawnAhead(source, [(0, 10)])
    assert source.begun.wait(WAIT_S)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    source.let_go.set()
    closing.join(WAIT_S)
    assert not closing.is_alive() and source.inside == 0
    ahead.close()
