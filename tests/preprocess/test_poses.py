"""Pass 1 with two bright discs for two people: whom it follows, what it counts, what it refuses, how it retargets."""

from contextlib import closing
from fractions import Fraction

import cv2
import numpy as np
import pytest

from runner.errors import NoPerson
from runner.preprocess.body.retarget import Retargeted
from runner.preprocess.body.skeleton import draw_skeleton
from runner.preprocess.networks.backends import Backend
from runner.preprocess.poses import Posed
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from runner.storage.disk_cache import DiskCache
from runner.timing import StageTimer
from runner.video import Mp4Writer, VideoReader
from tests.preprocess.conftest import HEIGHT, WIDTH

SMALL, LARGE = 14, 20  # radii


class EachDisc:
    """A detector that gives every disc of a frame its own box."""

    def __init__(self, network) -> None:
        self.network = network

    def rows(self, frames) -> np.ndarray:
        out = np.zeros((len(frames), 300, 6), np.float32)
        for rows, frame in zip(out, frames, strict=True):
            _, _, stats, _ = cv2.connectedComponentsWithStats((frame.min(-1) > 128).astype(np.uint8))
            for row, (x, y, w, h, _) in zip(rows, stats[1:], strict=False):
                row[:5] = [x, y, x + w, y + h, 0.9]
                row[:4] *= np.array([640 / WIDTH, 640 / HEIGHT] * 2)
        return out


@pytest.fixture(scope="module")
def each(preprocessor) -> Preprocessor:
    return Preprocessor(EachDisc(preprocessor.detector.network), preprocessor.pose)


def film(path, discs, fps=16):
    """discs: a frame's list of (x, y, radius), those in front last."""
    frames = np.full((len(discs), HEIGHT, WIDTH, 3), 20, np.uint8)
    for frame, shown in zip(frames, discs, strict=True):
        for x, y, radius in shown:
            cv2.circle(frame, (round(x), round(y)), radius, (250, 250, 250), -1)
    with Mp4Writer(path, WIDTH, HEIGHT, Fraction(fps), crf=6) as writer:
        writer.write(frames)
    return path


def options(**preprocess) -> JobOptions:
    return JobOptions(fps="source", size="240x160", preprocess=preprocess)


def noses(conditions) -> np.ndarray:
    return conditions.track.points[:, 0, 0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The small one in the middle all the time; the large one left, gone for the last quarter."""
    discs = [[(96, 64, SMALL)] + ([(30, 64, LARGE)] if i < 18 else []) for i in range(24)]
    return film(tmp_path_factory.mktemp("two") / "two.mp4", discs)


def test_subject_is_followed_in_all_frames(each, reference, two):
    for subject, x in {"largest": 30, "centre": 96, (78, 46, 114, 82): 96, (5, 40, 55, 90): 30}.items():
        conditions = each.prepare(reference, two, options(subject=subject))
        assert conditions.report["people_at_once"] == 2
        sure = conditions.track.points[:, 0, 2] > 0.3
        assert noses(conditions)[sure] == pytest.approx(x, abs=4)
        assert sure.sum() == (24 if x == 96 else 18)  # the one in the middle is not taken for the one who left
        assert conditions.report["frames_without_person"] == (0 if x == 96 else 6)
        conditions.close()


def test_subject_box_without_person_is_no_person(each, reference, two):
    with pytest.raises(NoPerson, match=r"\[150, 0, 190, 30\].*they are at \[\d+, .*192x128") as raised:
        each.prepare(reference, two, options(subject=[150, 0, 190, 30]))
    assert raised.value.where == str(two)


# --- people by number -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guests(tmp_path_factory):
    """32 frames, 8 a second. 1: large, left; 2: from second 1 to 2 and from 3 on, right; 3: small, from 2.5 on."""
    discs = [
        [(30, 64, LARGE)]
        + ([(160, 40, 17)] if 8 <= i < 16 or i >= 24 else [])
        + ([(100, 110, SMALL)] if i >= 20 else [])
        for i in range(32)
    ]
    return film(tmp_path_factory.mktemp("guests") / "guests.mp4", discs, fps=8)


@pytest.mark.parametrize("span", [{}, {"start_s": 3, "max_frames": 5}, {"fps": 12, "start_s": 1.2}])
def test_subject_number_means_same_person_in_every_span(each, reference, guests, span):
    for number, x in {1: 30, 2: 160, 3: 100}.items():
        asked = JobOptions(**{"fps": "source", "size": "240x160", "preprocess": {"subject": number}} | span)
        conditions = each.prepare(reference, guests, asked)
        sure = conditions.track.points[:, 0, 2] > 0.3
        assert sure.any()
        assert noses(conditions)[sure] == pytest.approx(x, abs=4)
        conditions.close()


def test_subject_number_that_is_unknown_or_off_screen_is_no_person(each, reference, guests):
    with pytest.raises(NoPerson, match="subject is 4, but the video has 3 people: 1 to 3") as raised:
        each.prepare(reference, guests, options(subject=4))
    assert "video-lab inspect" in raised.value.todo
    with pytest.raises(NoPerson, match=r"person 3 is not on screen .* but from second 2\.5 to 3\.9"):
        each.prepare(reference, guests, JobOptions(max_frames=30, preprocess={"subject": 3}))


def test_subject_numbers_come_from_default_detector_and_are_cached(each, preprocessor, reference, guests, tmp_path):
    """The job's own detector finds only the large person: number 2 is then absent, and not another person."""
    cached = Preprocessor(each.detector, each.pose, cache=DiskCache(tmp_path))
    cached._backends["dwpose"] = Backend("dwpose", OnlyLarge(preprocessor.detector.network), each.pose)
    first, again = StageTimer(), StageTimer()
    cached.prepare(reference, guests, options(subject=2), timer=first).close()
    assert (first.counters["people_cache_misses"], first.counters["pose_cache_misses"]) == (1, 1)
    cached.prepare(reference, guests, options(subject=2), timer=again).close()
    assert again.counters == {"people_cache_hits": 1, "pose_cache_hits": 1}
    cached.prepare(reference, guests, options(subject=1, pose="dwpose")).close()
    with pytest.raises(NoPerson, match="person 2 is not on screen"):
        cached.prepare(reference, guests, options(subject=2, pose="dwpose"))


class OnlyLarge(EachDisc):
    def rows(self, frames) -> np.ndarray:
        rows = super().rows(frames)
        rows[rows[..., 2] - rows[..., 0] < 1.9 * LARGE * 640 / WIDTH] = 0
        return rows


def test_prepare_with_several_people_and_no_subject_warns(each, reference, guests, two, tmp_path):
    def warnings(path, **asked):
        with closing(each.prepare(reference, path, JobOptions(**{"fps": "source", "size": "240x160"} | asked))) as made:
            return made.report["people"], [text for text in made.report["warnings"] if "people are on screen" in text]

    count, (text,) = warnings(guests)
    assert count == 3
    assert text.startswith("3 people are on screen and preprocess.subject is not given: the largest is followed.")
    assert "video-lab inspect" in text and "subject: 2" in text
    assert warnings(guests, max_frames=8) == (1, [])
    assert warnings(two)[0] == 2
    for subject in ("largest", 2):
        assert warnings(two, preprocess={"subject": subject}) == (2, [])
    # A child far away, and one who is seen for three quarters of a second.
    few = [
        [(40, 64, LARGE)] + ([(150, 40, 5)] if i % 2 else []) + ([(150, 90, LARGE)] if i < 6 else []) for i in range(32)
    ]
    assert warnings(film(tmp_path / "few.mp4", few, fps=8)) == (1, [])


def test_prepare_with_person_in_few_frames_is_no_person(each, reference, tmp_path):
    empty = film(tmp_path / "few.mp4", [[(90, 64, LARGE)] if 40 <= i < 45 else [] for i in range(60)])
    with pytest.raises(NoPerson, match=r"only 5 of the 60 searched frames \(8\.3 %\)"):
        each.prepare(reference, empty, options())
    short = film(tmp_path / "short.mp4", [[(90, 64, LARGE)] if i < 2 else [] for i in range(6)])
    conditions = each.prepare(reference, short, options())
    assert "only 2 of the 6 frames" in conditions.report["warnings"][0]
    conditions.close()


def test_other_person_in_place_of_subject_is_not_drawn(each, reference, tmp_path):
    """The subject leaves; 0.4 s later another person, of another size, comes to the same place."""
    discs = [([(60, 64, LARGE)] if i < 16 else []) + [(150 - min(90, 9 * max(0, i - 14)), 64, 8)] for i in range(32)]
    conditions = each.prepare(reference, film(tmp_path / "left.mp4", discs), options())
    drawn = conditions.window(0, 32).pose.any((1, 2, 3))
    assert drawn[:16].all()
    assert not drawn[24:].any()
    conditions.close()


def test_subject_who_crosses_other_person_is_not_exchanged(each, reference, tmp_path):
    """At 40 pixels a second each, in rows that overlap: the small one hides a part of the large one on the way."""
    places = [(30 + 2.5 * i, 150 - 2.5 * i) for i in range(48)]
    discs = [[(a, 56, LARGE), (b, 84, SMALL)] for a, b in places]
    path = film(tmp_path / "cross.mp4", discs)
    for subject, column in {(10, 36, 50, 76): 0, (136, 70, 164, 98): 1}.items():
        conditions = each.prepare(reference, path, options(subject=subject))
        expected = np.array(places)[:, column]
        away = np.abs(np.subtract(*np.array(places).T)) > 40
        assert noses(conditions)[away] == pytest.approx(expected[away], abs=5)
        conditions.close()


def test_smooth_is_off_by_default_and_moves_points_little(each, reference, two):
    plain = each.prepare(reference, two, options())
    smooth = each.prepare(reference, two, options(smooth=True))
    moved = np.abs(plain.track.points - smooth.track.points)[:18, :23]
    assert 0 < moved.max() < 2
    plain.close()
    smooth.close()


def test_parity_with_subject_and_smooth_warns_of_no_effect(each, reference, two):
    conditions = each.prepare(reference, two, options(parity=True, smooth=True))
    assert conditions.report["warnings"] == [
        "preprocess.subject and preprocess.smooth have no effect with preprocess.parity."
    ]
    assert "joints_repaired" not in conditions.report
    conditions.close()


# --- one decode, and when there is a second ---------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Frames read of any video, in order."""
    numbers, original = [], VideoReader.read
    monkeypatch.setattr(
        VideoReader, "read", lambda self, i: numbers.extend(np.asarray(i).tolist()) or original(self, i)
    )
    return numbers


@pytest.fixture
def looked(each, monkeypatch) -> list[int]:
    """How many frames the detector was given, at each call."""
    counts, detector = [], each.detector
    rows = detector.rows
    monkeypatch.setattr(detector, "rows", lambda frames: counts.append(len(frames)) or rows(frames))
    return counts


def points(preprocessor, reference, path, **preprocess) -> np.ndarray:
    conditions = preprocessor.prepare(reference, path, options(**preprocess))
    conditions.close()
    return conditions.track.points


MOVING = [(40 + 2 * i, 60 + i % 3, LARGE) for i in range(50)]
CLIPS = {
    "alone": [[place] for place in MOVING],
    "leaves": [[place] if not 20 <= i < 31 else [] for i, place in enumerate(MOVING)],
    "two": [[place, (170 - i, 110, SMALL)] for i, place in enumerate(MOVING)],
    "one, then two": [[place, (170, 20, SMALL)] if i > 33 else [place] for i, place in enumerate(MOVING)],
}


@pytest.mark.parametrize("shown", CLIPS)
@pytest.mark.parametrize("given", [{}, {"detect_every": 1}, {"detect_every": 5}, {"parity": True}], ids=str)
def test_look_and_pose_in_one_decode_gives_points_of_two_passes(each, reference, tmp_path, shown, given, monkeypatch):
    path = film(tmp_path / "c.mp4", CLIPS[shown])
    once = points(each, reference, path, **given)
    # Without any guess on the way, every picture is posed after all was decided.
    monkeypatch.setattr("runner.preprocess.poses.ClipPictures.look_and_pose", two_passes)
    twice = points(each, reference, path, **given)
    assert np.abs(once - twice).max() < 1e-4
    assert (twice[:, 0, 2] > 0.3).any()


def two_passes(self, detector, _estimator, looks, read, _guess, *, bgr):
    return self.look(detector, looks, read), Posed.nothing(len(self))


def test_clip_with_one_person_is_decoded_once_and_with_two_again(each, reference, tmp_path, read):
    points(each, reference, film(tmp_path / "a.mp4", CLIPS["alone"]))
    assert read == list(range(50))
    read.clear()
    points(each, reference, film(tmp_path / "b.mp4", CLIPS["one, then two"]))
    assert read[:50] == list(range(50))
    assert read[50:52] == [33, 35]  # beside the look at which the other came
    assert read[52:] == list(range(32, 50))  # posed from the window on (of 16 frames) in which there were two


def test_detector_looks_10_times_per_second_and_more_near_misses(each, reference, tmp_path, looked):
    points(each, reference, film(tmp_path / "a.mp4", CLIPS["alone"]))
    assert sum(looked) == 26  # at 16 fps every second one, and the last
    looked.clear()
    conditions = each.prepare(reference, film(tmp_path / "b.mp4", CLIPS["leaves"]), options())
    assert sum(looked) == 26 + 7  # 19, 21, … 31: beside the looks at 20, 22, … 30 that missed
    assert conditions.report["frames_without_person"] == 11
    conditions.close()
    looked.clear()
    points(each, reference, tmp_path / "b.mp4", detect_every=5)
    assert sum(looked) == 10  # as told


# --- retarget --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disc_reference(tmp_path_factory):
    """400 x 300, a disc of radius 60 in it."""
    picture = np.full((300, 400, 3), 20, np.uint8)
    cv2.circle(picture, (140, 120), 60, (250, 250, 250), -1)
    path = tmp_path_factory.mktemp("reference") / "disc.png"
    cv2.imwrite(str(path), picture)
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return film(tmp_path_factory.mktemp("one") / "one.mp4", [[(60 + 2 * i, 64, LARGE)] for i in range(6)])


@pytest.mark.parametrize("how", ["robust", "official"])
def test_retarget_gets_both_poses_and_its_result_is_drawn(preprocessor, disc_reference, one, how, monkeypatch):
    """The retargeter is replaced: this checks its arguments and what becomes of its result."""
    given = {}

    def stand_in(track, reference, *, canvas):
        given.update(track=track, reference=reference, canvas=canvas)
        moved = track.points.copy()
        moved[..., :2] = moved[..., :2] * 1.25 + (7, -5)
        return Retargeted(type(track)(moved, *canvas), {"method": how}, ["the reference is odd"])

    monkeypatch.setattr(f"runner.preprocess.prepare.retarget_{how}", stand_in)
    conditions = preprocessor.prepare(disc_reference, one, options(retarget=how))
    assert given["track"] is conditions.track
    assert given["canvas"] == (240, 160)
    assert (given["reference"].width, given["reference"].height) == (400, 300)
    assert given["reference"].points[0, 0, :2] == pytest.approx([140, 120], abs=6)
    assert conditions.report["retarget"] == {"method": how}
    assert "the reference is odd" in conditions.report["warnings"]
    expected = draw_skeleton(conditions.retargeted.pose(3), 240, 160)
    assert expected.any()
    assert (conditions.window(3, 4).pose[0] == expected).all()
    conditions.close()


def test_retarget_in_parity_gets_reference_at_output_size(preprocessor, disc_reference, one, monkeypatch):
    """As in the official preprocessing, the reference is letterboxed by area first. Its pose is found there, in BGR."""
    given, fed = {}, []
    points = preprocessor.pose.points
    monkeypatch.setattr(preprocessor.pose, "points", lambda *a, **how: fed.append(how) or points(*a, **how))

    def stand_in(track, reference, *, canvas):
        given.update(track=track, reference=reference, canvas=canvas)
        return Retargeted(type(track)(track.points, *canvas), {}, [])

    monkeypatch.setattr("runner.preprocess.prepare.retarget_official", stand_in)
    conditions = preprocessor.prepare(disc_reference, one, options(parity=True, retarget="official"))
    assert given["canvas"] == (conditions.width, conditions.height) == (224, 160)  # of the area, in 4:3, floored
    assert (given["reference"].width, given["reference"].height) == (224, 160)
    scale = 160 / 300  # 213 columns, 5 to the left
    assert given["reference"].points[0, 0, :2] == pytest.approx([5 + 140 * scale, 120 * scale], abs=4)
    assert (given["track"].width, given["track"].height) == (WIDTH, HEIGHT)
    assert fed and all(how == {"bgr": True} for how in fed)
    conditions.close()


def test_retarget_with_reference_without_person_names_file(preprocessor, reference, two):
    with pytest.raises(NoPerson, match="no person was found in the reference") as raised:
        preprocessor.prepare(reference, two, options(retarget=True))
    assert raised.value.where == str(reference)


def test_retarget_in_replace_mode_has_no_effect_and_warns(preprocessor, reference, two, tmp_path):
    cv2.imwrite(str(tmp_path / "mask.png"), np.full((HEIGHT, WIDTH), 255, np.uint8))
    asked = JobOptions(mode="replace", fps="source", size="240x160", preprocess={"retarget": True})
    conditions = preprocessor.prepare(reference, two, asked, mask=tmp_path / "mask.png")
    assert conditions.retargeted is None
    assert any("retarget has no effect" in warning for warning in conditions.report["warnings"])
    conditions.close()
