"""Alignment: what was done to a sequence of frames is told, from digests and from thumbnails of coded video."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.regression.alignment import align_digests, align_thumbnails, make_thumbnail
from runner.regression.outputs import RenderedFrames
from tests.moving_scene import apply_gain, make_scene, write_mp4

COUNT = 60


def by_digests(new, baseline) -> list[tuple[str, int, int]]:
    return [(found.kind, found.frame, found.frames) for found in align_digests(new, baseline)]


def named(count: int, prefix: str = "frame") -> list[str]:
    return [f"{prefix} {index}" for index in range(count)]


BASE = named(COUNT)
EDITS = [
    ("dropped", BASE[:20] + BASE[21:], [("dropped", 20, 1)]),
    ("dropped, the length kept", BASE[:20] + BASE[21:] + ["x"], [("dropped", 20, 1), ("inserted", 59, 1)]),
    ("many dropped", BASE[:20] + BASE[32:], [("dropped", 20, 12)]),
    ("two places", BASE[:9] + BASE[10:40] + BASE[41:], [("dropped", 9, 1), ("dropped", 40, 1)]),
    ("first", BASE[1:], [("dropped", 0, 1)]),
    ("last", BASE[:-1], [("dropped", 59, 1)]),
    ("ends early", BASE[:50], [("dropped", 50, 10)]),
    ("repeated", [*BASE[:20], BASE[19], *BASE[20:]], [("repeated", 20, 1)]),
    ("repeated thrice", BASE[:20] + [BASE[19]] * 3 + BASE[20:], [("repeated", 20, 3)]),
    ("repeated in place of the next", [*BASE[:20], BASE[19], *BASE[21:]], [("repeated", 20, 1)]),
    ("the last repeated", [*BASE, BASE[-1]], [("repeated", 60, 1)]),
    ("inserted", [*BASE[:20], "x", "y", *BASE[20:]], [("inserted", 20, 2)]),
    ("neighbours changed places", [*BASE[:20], BASE[21], BASE[20], *BASE[22:]], [("moved", 20, 1)]),
    ("a run moved", BASE[:10] + BASE[13:30] + BASE[10:13] + BASE[30:], [("moved", 10, 3)]),
    ("changed", [*BASE[:20], "x", "y", *BASE[22:]], []),
    ("every frame changed", named(COUNT, "other"), []),
    ("every frame changed, and fewer", named(COUNT - 5, "other"), [("dropped", 55, 5)]),
    ("far longer", named(COUNT * 4), [("inserted", 60, 180)]),
    ("nothing", [], [("dropped", 0, 60)]),
    ("equal", BASE, []),
]


@pytest.mark.parametrize(("new", "told"), [edit[1:] for edit in EDITS], ids=[edit[0] for edit in EDITS])
def test_edits_are_told_by_digests(new, told):
    assert by_digests(new, BASE) == told


def test_a_still_passage_is_not_repeated():
    still = BASE[:20] + [BASE[20]] * 20 + BASE[21:41]
    assert by_digests(still, still) == []
    assert by_digests(still[:25] + still[26:], still) == [("dropped", 20, 1)]
    assert by_digests(still[:45] + still[46:], still) == [("dropped", 45, 1)]
    assert by_digests(["x"] * 30, ["x"] * 30) == []
    assert [(kind, frames) for kind, _, frames in by_digests(["x"] * 31, ["x"] * 30)] == [("repeated", 1)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_single_cut_or_repeat_is_found(data):
    base = named(data.draw(st.integers(20, 80)))
    at = data.draw(st.integers(1, len(base) - 1))
    most = data.draw(st.integers(1, 6))
    cut = min(most, len(base) - at)
    assert by_digests(base[:at] + base[at + cut :], base) == [("dropped", at, cut)]
    assert by_digests(base[:at] + [base[at - 1]] * most + base[at:], base) == [("repeated", at, most)]
    assert by_digests(base[:at] + named(most, "x") + base[at:], base) == [("inserted", at, most)]


@settings(max_examples=100, deadline=None)
@given(
    new=st.lists(st.sampled_from("abcdef"), max_size=25),
    baseline=st.lists(st.sampled_from("abcdef"), max_size=25),
)
def test_counts_add_up_whatever_is_compared(new, baseline):
    found = align_digests(new, baseline)
    extra = sum(entry.frames for entry in found if entry.kind == "inserted")
    missing = sum(entry.frames for entry in found if entry.kind == "dropped")
    repeated = sum(entry.frames for entry in found if entry.kind == "repeated")
    assert extra - missing <= len(new) - len(baseline) <= extra + repeated - missing
    if new == baseline:
        assert found == []


def test_ten_thousand_frames_take_a_second():
    base = named(10_000)
    begin = time.process_time()
    assert by_digests(base[:7000] + base[7001:], base) == [("dropped", 7000, 1)]
    assert time.process_time() - begin < 5


# --- thumbnails ---


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return make_scene(COUNT, 192, 288)


@pytest.fixture(scope="module")
def compare(scene, tmp_path_factory):
    """Code frames, and align their thumbnails with those of the scene at crf 16 (or of another baseline)."""
    folder = tmp_path_factory.mktemp("videos")

    def thumbnails(frames: np.ndarray, crf: int) -> list[np.ndarray]:
        path = write_mp4(folder / "video.mp4", frames, crf)
        return [make_thumbnail(frame) for window in RenderedFrames(path).windows(8) for frame in window]

    base = thumbnails(scene, 16)

    def run(frames: np.ndarray, crf: int = 18, baseline: np.ndarray | None = None) -> list[tuple[str, int, int]]:
        other = base if baseline is None else thumbnails(baseline, 16)
        found = align_thumbnails(thumbnails(frames, crf), other)
        return [(entry.kind, entry.frame, entry.frames) for entry in found]

    return run


def test_a_thumbnail_is_small():
    for width, height in ((480, 832), (1920, 1080), (40, 30)):
        thumbnail = make_thumbnail(np.zeros((height, width, 3), np.uint8))
        assert thumbnail.nbytes <= 2048
        assert thumbnail.dtype == np.uint8


@pytest.mark.parametrize("crf", [10, 18, 28])
def test_coding_noise_is_no_misalignment(scene, compare, crf):
    assert compare(scene, crf) == []


def test_edits_are_told_by_thumbnails(scene, compare):
    f = scene
    assert compare(np.concatenate([f[:20], f[21:]])) == [("dropped", 20, 1)]
    assert compare(np.concatenate([f[:20], f[26:]])) == [("dropped", 20, 6)]
    assert compare(np.concatenate([f[:20], f[19:]])) == [("repeated", 20, 1)]
    assert compare(np.concatenate([f[:20], f[19:20], f[21:]])) == [("repeated", 20, 1)]
    assert compare(np.concatenate([f[:20], f[21:22], f[20:21], f[22:]]))[0] in [("moved", 20, 1), ("moved", 21, 1)]
    assert compare(np.concatenate([f[:20], 255 - f[:1], f[20:]])) == [("inserted", 20, 1)]
    assert compare(f[:-4]) == [("dropped", 56, 4)]


def test_other_changes_are_no_misalignment(scene, compare):
    shifted, drifted = scene.copy(), scene.copy()
    shifted[20] = np.roll(shifted[20], 1, axis=1)
    drifted[20:] = apply_gain(drifted[20:], 1.02)
    assert compare(shifted) == []
    assert compare(drifted) == []
    assert compare(scene[::-1]) == []
    other = make_scene(COUNT, 192, 288, dancer=((30, 160, 60), (220, 210, 60)))
    assert compare(other) == []
    assert compare(other[:-2]) == [("dropped", 58, 2)]


def test_a_still_passage_of_a_video_is_not_repeated(scene, compare):
    still = np.concatenate([scene[:20], np.repeat(scene[20:21], 20, axis=0), scene[21:]])
    assert compare(still, baseline=still) == []
    found = compare(np.concatenate([still[:30], still[31:]]), baseline=still)
    assert [(kind, frames) for kind, _, frames in found] == [("dropped", 1)]
    assert 20 <= found[0][1] < 40


def test_a_video_that_stands_still_for_some_frames(scene, compare):
    stuck = scene.copy()
    stuck[20:25] = stuck[19]
    assert compare(stuck) == [("repeated", 20, 5)]


def test_nothing_against_something():
    picture = np.zeros((4, 4), np.uint8)
    assert align_thumbnails([], []) == []
    assert [entry.frames for entry in align_thumbnails([], [picture] * 3)] == [3]
    assert align_thumbnails([picture], [picture]) == []
