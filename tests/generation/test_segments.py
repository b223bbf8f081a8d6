from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from diffusers import WanAnimatePipeline
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import ConfigInvalid, InputTooShort
from runner.forecast.bytes import vae_traffic
from runner.forecast.flops import PRODUCTION
from runner.forecast.seconds import VAE_SHARE, EngineBuild, find_device, forecast_seconds
from runner.generation.segments import (
    fit_segments,
    longest_window,
    output_span,
    plan_job,
    reflect_indices,
    shortest_window,
)
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe

overlaps = st.sampled_from([1, 5])
counts = st.integers(2, 2000)
windows = st.integers(13, 241).map(lambda n: n - (n - 1) % 4).filter(lambda n: n >= 13)


@pytest.mark.parametrize(
    ("frames", "fitted"),
    [(49, (49, 1)), (81, (81, 1)), (97, (49, 2)), (121, (61, 2)), (161, (81, 2)), (241, (81, 3)), (2, (5, 1))],
)
def test_table(frames, fitted):
    assert fit_segments(frames, 1, 81) == fitted


@given(frames=counts, overlap=overlaps, longest=windows, most=st.none() | counts)
def test_no_window_is_longer_than_the_options_tell(frames, overlap, longest, most):
    """Whatever the video has, and no less: a video of all that may be rendered has such a window."""
    options = JobOptions(overlap_frames=overlap, max_segment_frames=longest, max_frames=most)
    bound = longest_window(options)
    assert fit_segments(frames if most is None else min(frames, most), overlap, longest)[0] <= bound
    assert max(fit_segments(n, overlap, longest)[0] for n in range(2, (most or longest) + 1)) == bound


def test_161_frames_pad_at_most_two_percent():
    segment, segments = fit_segments(161, 1, 81)
    assert segment * segments - 1 * (segments - 1) - 161 <= 0.02 * 161


def test_shortest_windows():
    assert (shortest_window(1), shortest_window(5)) == (5, 13)


def covers(segment: int, segments: int, overlap: int) -> int:
    return overlap + segments * (segment - overlap)


@given(counts, overlaps, windows)
def test_fewest_windows_then_the_shortest(frames, overlap, longest):
    segment, segments = fit_segments(frames, overlap, longest)
    assert segment % 4 == 1
    assert shortest_window(overlap) <= segment <= longest
    assert covers(segment, segments, overlap) >= frames
    assert segments == 1 or covers(longest, segments - 1, overlap) < frames  # one window fewer would not do
    assert segment == shortest_window(overlap) or covers(segment - 4, segments, overlap) < frames  # nor shorter ones


@given(counts, overlaps, windows)
def test_upstream_cuts_the_same_windows(frames, overlap, longest):
    """Given our window length, the library's own arithmetic arrives at our count, for every job it can render."""
    segment, segments = fit_segments(frames, overlap, longest)
    if frames <= overlap:
        return  # upstream runs no segment at all
    step = segment - overlap
    rest = (frames - overlap) % step
    assert (frames + (step - rest if rest else 0)) // step == segments


@given(counts, overlaps, windows)
def test_output_spans_tile_the_job(frames, overlap, longest):
    segment, segments = fit_segments(frames, overlap, longest)
    spans = [output_span(i, segment, overlap, frames) for i in range(segments)]
    assert spans[0][0] == 0
    assert spans[-1][1] == frames
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert all(first < last for first, last in spans)


@given(st.integers(2, 60), st.integers(0, 200), st.integers(1, 120))
def test_reflection_is_upstreams(frames, start, length):
    padded = WanAnimatePipeline.pad_video_frames(None, list(range(frames)), start + length)
    assert np.array_equal(reflect_indices(start, start + length, frames), padded[start:])


def test_reflection_by_hand():
    assert reflect_indices(0, 10, 5).tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1]
    assert reflect_indices(0, 5, 2).tolist() == [0, 1, 0, 1, 0]


def test_one_frame_is_too_short():
    with pytest.raises(InputTooShort, match="1 frame to render"):
        fit_segments(1, 1, 81)
    with pytest.raises(InputTooShort):
        reflect_indices(0, 5, 1)


def test_windows_too_short_for_the_overlap():
    with pytest.raises(ConfigInvalid, match="at least 13"):
        fit_segments(40, 5, 9)


@pytest.mark.parametrize("overlap", [1, 5])
def test_in_mode_animate_the_blank_frames_of_later_windows_cost_less(overlap):
    """Three windows: of the second and the third the scene is blank behind the overlap. In mode replace it is not."""
    gpu = find_device("RTX 5090")

    def planned(mode, frames):
        options = JobOptions(mode=mode, overlap_frames=overlap)
        return plan_job(frames, (832, 480), options, get_recipe("fp4-distill"), device=gpu)

    window = (832, 480, planned("animate", 229).segment_frames)
    full, blank = (PRODUCTION.vae.encode_flop(*window, start) for start in (None, overlap))
    through_memory, _ = vae_traffic(PRODUCTION.vae, *window, dtype="float32")
    saved = 2 * (full - blank) / 1e12 / gpu.matmul["bf16"] / VAE_SHARE["float32"]
    saved += 2 * through_memory * (1 - blank / full) / gpu.copy_gb_s / 1e9
    assert planned("replace", 229).seconds - planned("animate", 229).seconds == pytest.approx(saved, rel=1e-9)
    assert planned("animate", 229).segments == 3 and saved > 3.5
    assert planned("replace", 81) == planned("animate", 81)


def test_seconds_are_those_of_every_word_of_the_recipe():
    gpu = find_device("RTX 5090")
    assert gpu is not None

    def seconds(name: str) -> float | None:
        return plan_job(81, (832, 480), JobOptions(), get_recipe(name), device=gpu).seconds

    window = {"size": (832, 480), "segment_frames": 81, "segments": 1, "evaluations": 6}
    build = EngineBuild("int8", attention_8bit=True, vae="bfloat16")
    wanted = forecast_seconds(PRODUCTION, gpu, build, **window).total_s
    assert seconds("fp4-distill+int8+int8-attention+bf16-vae") == wanted
    assert wanted < min(seconds("fp4-distill+int8+bf16-vae"), seconds("fp4-distill+int8+int8-attention"))
