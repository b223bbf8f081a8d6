"""The warning that frames are repeated, on clips of a known rate as they are sampled."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from runner.preprocess.rates import fps_warning
from runner.spec.options import JobOptions
from runner.video import VideoReader
from tests.video_files import make_clip

NTSC = Fraction(30000, 1001)
REPEATED = "of the driving video: frames are repeated. Set fps to"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[Fraction, Path]:
    folder = tmp_path_factory.mktemp("rates")
    return {rate: make_clip(folder / f"{rate.numerator}.mp4", 24, rate) for rate in (Fraction(16), Fraction(24), NTSC)}


def warning(clip: Path, **given) -> str | None:
    options = JobOptions.model_validate(given)
    with VideoReader(clip) as reader:
        return fps_warning(options, reader.info, reader.sample(options.fps, options.start_s, options.max_frames))


@pytest.mark.parametrize(
    ("rate", "given", "expected"),
    [
        (
            16,
            {"fps": 32},
            "16 at most, or take fps: 16 with output: {interpolate: 2}, which writes 32 frames a second.",
        ),
        (24, {"fps": 25}, "24 at most, or take fps: 12.5 with output: {interpolate: 2}, which writes 25 frames a"),
        (24, {"fps": 60}, "24 at most, or take fps: source with output: {interpolate: 2}, which writes 48 frames a"),
        (NTSC, {"fps": 60}, "29.97 at most, or take fps: source with output: {interpolate: 2}, which writes 59.94 "),
        (NTSC, {"fps": 50}, "29.97 at most, or take fps: 25 with output: {interpolate: 2}, which writes 50 frames a"),
        (16, {"fps": 32, "output": {"interpolate": 2}}, "16 at most, or to source; output.interpolate doubles it."),
    ],
)
def test_it_says_what_to_do(clips, rate, given, expected):
    text = warning(clips[Fraction(rate)], **given)
    assert text is not None
    begin, end = text.split(REPEATED)
    assert begin == f"fps {given['fps']} is above the {float(rate):.5g} "
    assert end.strip().startswith(expected)


@pytest.mark.parametrize(
    ("rate", "given"),
    [
        (16, {"fps": 16}),
        (16, {"fps": "source"}),
        (16, {}),
        (NTSC, {"fps": 30}),
        (24, {"fps": 12, "output": {"interpolate": 2}}),
        (24, {"fps": 25, "start_s": 0.3, "max_frames": 4}),  # above, and in so short a span no frame comes twice
    ],
)
def test_it_is_silent_where_no_frame_is_repeated(clips, rate, given):
    assert warning(clips[Fraction(rate)], **given) is None


def test_what_it_recommends_is_followed_by_no_warning(clips):
    """Each of the two ways out, taken."""
    for rate, fps in ((16, 32), (24, 60), (24, 25), (NTSC, 50)):
        clip = clips[Fraction(rate)]
        assert warning(clip, fps=fps)
        assert warning(clip, fps=float(f"{float(rate):.5g}")) is None
        half = fps / 2 if fps / 2 <= rate else "source"
        assert warning(clip, fps=half, output={"interpolate": 2}) is None
