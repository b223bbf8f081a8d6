"""People of made videos, numbered and measured: discs of known places, sizes and sharpness."""

import cv2
import numpy as np
import pytest

from runner.preprocess.networks.backends import Backend
from runner.preprocess.networks.yolov10 import Box
from runner.preprocess.people_search import MEASURED, find_people, find_people_boxes, sharpness
from runner.storage.disk_cache import DiskCache
from runner.timing import StageTimer
from runner.video import VideoReader
from tests.preprocess.conftest import HEIGHT, WIDTH
from tests.preprocess.test_poses import LARGE, SMALL, EachDisc, film


@pytest.fixture(scope="module")
def backend(preprocessor) -> Backend:
    return Backend("vitpose", EachDisc(preprocessor.detector.network), preprocessor.pose)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """48 frames, 16 a second: a small disc all the time, a large one from second 1 on, one at the edge, half in it."""
    discs = [[(96, 30, SMALL), (2, 100, SMALL)] + ([(50 + i, 90, LARGE)] if i >= 16 else []) for i in range(48)]
    return film(tmp_path_factory.mktemp("three") / "three.mp4", discs)


def test_everybody_is_numbered_and_measured(backend, three):
    with VideoReader(three) as reader:
        found = find_people(reader, backend)
    assert found.size == (WIDTH, HEIGHT)
    assert len(found.looks) == 30  # ten a second
    assert found.look_s == pytest.approx(0.1)
    large, small, _half = found.people
    assert [person.number for person in found.people] == [1, 2, 3]
    assert (large.begin_s, large.end_s) == (1.0, 2.9)
    assert large.seconds == pytest.approx(2.0)
    for look, box in zip(large.looks, large.boxes, strict=True):
        assert box.centre == pytest.approx((50 + look, 90), abs=1.5)
    assert small.boxes[0].height == pytest.approx(2 * SMALL, abs=3)
    assert len(large.measured) == MEASURED
    assert set(large.measured) <= set(large.looks)
    assert large.measured[0] == large.looks[0] and large.measured[-1] == large.looks[-1]
    # The tiny network's face is 8 of the 48 columns of a crop, which is a quarter wider than the box.
    assert large.face_pixels == pytest.approx(8 / 48 * 1.25 * 2 * LARGE, rel=0.06)
    assert small.face_pixels == pytest.approx(large.face_pixels * SMALL / LARGE, rel=0.1)
    assert large.hands_inside == small.hands_inside == large.fingers_seen == 1
    assert large.feet_inside == 1


def test_hands_and_feet_beyond_the_edge_or_unsure_are_not_inside(backend, three):
    class Placed:
        """Whatever is shown: left hand and left foot as given, the others in the middle of the picture."""

        network = backend.pose.network

        def __init__(self, x, sure):
            self.x, self.sure = x, sure

        def points(self, frames, boxes, *, bgr=False):
            points = np.tile(np.array([WIDTH / 2, HEIGHT / 2, 0.9], np.float32), (len(frames), 133, 1))
            points[:, [9, *range(17, 20), *range(91, 112)]] = (self.x, HEIGHT / 2, self.sure)
            return points

    for x, sure, share in ((20, 0.9, 1), (-3, 0.9, 0), (WIDTH + 1, 0.9, 0), (20, 0.2, 0)):
        with VideoReader(three) as reader:
            found = find_people(reader, Backend("vitpose", backend.detector, Placed(x, sure)))
        assert {(p.hands_inside, p.fingers_seen, p.feet_inside) for p in found.people} == {(share, share, share)}
        assert {p.face_pixels for p in found.people} == {None}  # a point has no extent


def test_the_second_time_no_network_runs_and_nothing_differs(backend, three, tmp_path, monkeypatch):
    cache, timer = DiskCache(tmp_path), StageTimer()
    with VideoReader(three) as reader:
        first = find_people(reader, backend, cache=cache, timer=timer)
    for network in (backend.detector, backend.pose):
        for name in ("rows", "points"):
            monkeypatch.setattr(network, name, None, raising=False)
    with VideoReader(three) as reader:
        assert find_people(reader, backend, cache=cache, timer=timer) == first
        bare = find_people_boxes(reader, backend.detector, cache=cache, timer=timer)
    assert [p.boxes for p in bare.people] == [p.boxes for p in first.people]
    assert bare.people[0].sharpness is None
    assert timer.counters == {"people_cache_misses": 2, "people_cache_hits": 3}


def test_a_short_video_is_looked_at_frame_by_frame(backend, tmp_path):
    path = film(tmp_path / "short.mp4", [[(60 + 3 * i, 64, LARGE)] for i in range(6)])
    with VideoReader(path) as reader:
        found = find_people_boxes(reader, backend.detector)
    assert found.looks == (0, 1, 2, 3, 4, 5)
    assert len(found.people) == 1
    empty = film(tmp_path / "empty.mp4", [[]] * 20)
    with VideoReader(empty) as reader:
        assert find_people(reader, backend).people == ()


def test_sharpness_falls_with_blur_and_with_few_pixels():
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 256, (400, 300, 3), np.uint8), (0, 0), 1.5)
    box = Box(20, 20, 280, 380, 0.9)
    blurred = [sharpness(cv2.GaussianBlur(texture, (0, 0), sigma) if sigma else texture, box) for sigma in (0, 1, 2, 4)]
    assert blurred == sorted(blurred, reverse=True)
    assert blurred[0] > 4 * blurred[2] > 0
    small = cv2.resize(texture, (75, 100), interpolation=cv2.INTER_AREA)
    assert sharpness(small, Box(5, 5, 70, 95, 0.9)) < blurred[0]
    # Of the same picture: the grey levels' variance of the Laplacian, by hand.
    grey = cv2.resize(cv2.cvtColor(texture, cv2.COLOR_RGB2GRAY)[:256], (300, 256)).astype(float)
    laplacian = np.roll(grey, 1, 0) + np.roll(grey, -1, 0) + np.roll(grey, 1, 1) + np.roll(grey, -1, 1) - 4 * grey
    assert sharpness(texture, Box(0, 0, 300, 256, 0.9)) == pytest.approx(laplacian[1:-1, 1:-1].var(), rel=0.02)
    assert sharpness(texture, Box(300, 0, 310, 50, 0.9)) == 0
