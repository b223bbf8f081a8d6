"""Pictures and previews of one job."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import pytest
from PIL import Image

from runner.errors import InputUnreadable
from runner.regression.evidence import AMPLIFIED, HEIGHT, PICTURES, make_pictures, write_preview
from tests.regression.report_samples import ArrayFrames


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)


def plain(value: int, frames: int = 3, height: int = 64, width: int = 48) -> np.ndarray:
    return np.full((frames, height, width, 3), value, np.uint8)


def test_the_pictures_are_of_the_frame_that_was_asked_for(tmp_path):
    baseline, new = plain(100), plain(100)
    baseline[2], new[2] = 60, 90
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "reference.png")
    made = make_pictures(
        ArrayFrames(new),
        ArrayFrames(baseline),
        2,
        reference=tmp_path / "reference.png",
        driver=lambda index: np.full((32, 32, 3), 10 * index, np.uint8),
    )
    assert tuple(made) == PICTURES
    means = {name: picture(data).mean(axis=(0, 1)).round().astype(int).tolist() for name, data in made.items()}
    assert means["baseline"] == [60] * 3
    assert means["new"] == [90] * 3
    assert means["driver"] == [20] * 3
    assert means["difference"] == [30 * AMPLIFIED] * 3
    assert means["reference"] == pytest.approx([200, 10, 10], abs=3)
    assert {picture(data).shape[0] for data in made.values()} == {64}  # one height
    assert picture(made["reference"]).shape[1] == 96


def test_the_difference_counts_darker_and_brighter_alike_and_is_clipped():
    baseline, new = plain(100), plain(100)
    new[0, :, :24], new[0, :, 24:] = 90, 250
    made = make_pictures(ArrayFrames(new), ArrayFrames(baseline), 0)
    left, right = picture(made["difference"])[:, 4], picture(made["difference"])[:, -4]
    assert left.mean() == pytest.approx(10 * AMPLIFIED, abs=2)
    assert right.mean() == pytest.approx(255, abs=1)


def test_a_single_pixel_is_still_seen_where_a_large_picture_is_shrunk():
    baseline = plain(100, 1, height=3 * HEIGHT, width=600)
    new = baseline.copy()
    new[0, 701, 333] = 140
    shrunk = picture(make_pictures(ArrayFrames(new), ArrayFrames(baseline), 0)["difference"])
    assert shrunk.shape[:2] == (HEIGHT, 200)
    assert shrunk.max() > 150
    row, column = np.unravel_index(shrunk[..., 0].argmax(), shrunk.shape[:2])
    assert max(abs(row - 701 / 3), abs(column - 333 / 3)) < 2


@pytest.mark.parametrize("name", ["reference", "driver", "baseline", "new"])
def test_a_picture_that_cannot_be_had_is_left_out_and_named(tmp_path, name):
    def damaged(index: int) -> np.ndarray:
        raise InputUnreadable("the file is damaged", where="clip.mp4", todo="Copy it again")

    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    short = ArrayFrames(plain(1, frames=2))
    left_out: dict[str, str] = {}
    made = make_pictures(
        short if name == "new" else ArrayFrames(plain(1)),
        short if name == "baseline" else ArrayFrames(plain(1)),
        2,
        reference=tmp_path / ("gone.png" if name == "reference" else "there.png"),
        driver=damaged if name == "driver" else lambda index: plain(0)[0],
        left_out=left_out,
    )
    reason = {"reference": "no such file", "driver": "damaged"}.get(name, "no frame 2: the video has 2 frames")
    assert reason in left_out[name]
    without = {name, "difference"} if name in ("baseline", "new") else {name}
    assert set(made) == set(PICTURES) - without


def test_videos_of_different_sizes_have_no_difference():
    left_out: dict[str, str] = {}
    made = make_pictures(ArrayFrames(plain(1)), ArrayFrames(plain(1, height=32)), 0, left_out=left_out)
    assert set(made) == {"baseline", "new"}
    assert left_out == {"difference": "the videos have different sizes"}


def test_nothing_of_a_job_that_has_one_video_is_said_to_be_missing():
    left_out: dict[str, str] = {}
    assert set(make_pictures(ArrayFrames(plain(1)), None, 0, left_out=left_out)) == {"new"}
    assert left_out == {}


@pytest.mark.parametrize(("width", "height"), [(48, 64), (49, 65)])
def test_a_preview_is_an_mp4_of_all_frames_with_even_sides(tmp_path, width, height):
    frames = np.stack([np.full((height, width, 3), 40 + index * 4, np.uint8) for index in range(40)])
    link = write_preview(ArrayFrames(frames), tmp_path / "preview.mp4", Fraction(24))
    assert (link.size, link.frames, link.fps) == ((48, 64), 40, Fraction(24))
    assert link.file == tmp_path / "preview.mp4"
    with av.open(str(link.file)) as container:
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read.shape == (40, 64, 48, 3)
    assert np.abs(read.mean(axis=(1, 2, 3)) - (40 + 4 * np.arange(40))).max() < 3
