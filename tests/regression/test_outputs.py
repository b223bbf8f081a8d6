"""Outputs: MP4s and PNG frames read alike; damage is named."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from runner.errors import InputNotFound, InputUnreadable
from runner.regression.outputs import RenderedFrames
from runner.video.writer import png_name
from tests.moving_scene import write_mp4, write_pngs
from tests.video_files import indexed_frame, read_index, truncate

COUNT, NTSC = 21, Fraction(30000, 1001)


@pytest.fixture
def frames() -> np.ndarray:
    return np.stack([indexed_frame(i) for i in range(COUNT)])


@pytest.mark.parametrize("n", [1, 8, COUNT, 50])
def test_windows_of_pngs_are_the_frames(tmp_path, frames, n):
    with RenderedFrames(write_pngs(tmp_path / "frames", frames)) as opened:
        assert (opened.frames, opened.size, opened.fps) == (COUNT, (frames.shape[2], frames.shape[1]), None)
        windows = list(opened.windows(n))
    assert [len(window) for window in windows] == [min(n, COUNT - begin) for begin in range(0, COUNT, n)]
    assert np.array_equal(np.concatenate(windows), frames)


def test_an_mp4_gives_each_frame_in_order_and_by_index(tmp_path, frames):
    with RenderedFrames(write_mp4(tmp_path / "output.mp4", frames, fps=NTSC)) as opened:
        assert (opened.frames, opened.fps) == (COUNT, NTSC)
        assert opened.size == (frames.shape[2], frames.shape[1])
        assert [read_index(frame) for window in opened.windows(8) for frame in window] == list(range(COUNT))
        assert [read_index(opened.frame(i)) for i in (20, 3, 4, 0)] == [20, 3, 4, 0]


def test_two_iterators_and_a_frame_between_do_not_disturb_each_other(tmp_path, frames):
    opened = RenderedFrames(write_mp4(tmp_path / "output.mp4", frames))
    one, other = opened.windows(4), opened.windows(5)
    seen = [read_index(next(one)[0]), read_index(next(other)[0]), read_index(opened.frame(17))]
    seen += [read_index(next(one)[0]), read_index(next(other)[0])]
    assert seen == [0, 0, 17, 4, 5]
    opened.close()
    opened.close()
    assert read_index(opened.frame(2)) == 2


def test_pngs_by_index(tmp_path, frames):
    opened = RenderedFrames(write_pngs(tmp_path / "frames", frames))
    assert np.array_equal(opened.frame(COUNT - 1), frames[COUNT - 1])
    for wrong in (-1, COUNT):
        with pytest.raises(IndexError, match=f"frame {wrong} of {COUNT}"):
            opened.frame(wrong)
    with pytest.raises(ValueError, match="at least 1"):
        next(opened.windows(0))


def test_damage_is_unreadable_input(tmp_path, frames):
    video = write_mp4(tmp_path / "output.mp4", frames)
    with pytest.raises(InputUnreadable):
        RenderedFrames(truncate(video, tmp_path / "half.mp4", 0.6))
    pictures = write_pngs(tmp_path / "frames", frames)
    whole = pictures[7].read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text", whole[:60] + b"\0\0\0\0" + whole[64:]):
        pictures[7].write_bytes(damaged)
        with pytest.raises(InputUnreadable, match=png_name(7)):
            list(RenderedFrames(pictures).windows(4))
        with pytest.raises(InputUnreadable, match=png_name(7)):
            RenderedFrames(pictures).frame(7)


def test_frames_that_do_not_belong_together_are_refused(tmp_path, frames):
    pictures = write_pngs(tmp_path / "frames", frames)
    Image.fromarray(frames[0, :-2]).save(pictures[3])
    with pytest.raises(InputUnreadable, match="frame 3 has"):
        list(RenderedFrames(pictures).windows(8))
    Image.fromarray(frames[0, :, :, 0]).save(pictures[3])
    with pytest.raises(InputUnreadable, match="8-bit RGB"):
        RenderedFrames(pictures).frame(3)


def test_what_is_not_there(tmp_path):
    with pytest.raises(InputUnreadable, match="no frames"):
        RenderedFrames([])
    with pytest.raises(InputNotFound):
        RenderedFrames([tmp_path / "000000.png"])
    with pytest.raises(InputNotFound):
        RenderedFrames(tmp_path / "output.mp4")
