"""Person boxes hold what is drawn, the head above it and a margin; face boxes only faces that are sure."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.preprocess.body.face import FacePlan
from runner.preprocess.body.keypoints import FACE, PoseTrack
from runner.preprocess.body.person_boxes import face_boxes, person_boxes
from runner.preprocess.body.skeleton import body_width
from runner.preprocess.conditions import PoseConditions
from runner.preprocess.geometry import Geometry
from runner.preprocess.pictures.sizing import official_placement, padding_resize, place

VIDEO, OUTPUT = (300, 200), (240, 320)
GEOMETRIES = {
    "ours": Geometry(*OUTPUT, place(VIDEO, OUTPUT)),
    "filled": Geometry(*OUTPUT, place(VIDEO, OUTPUT, crop_up_to=400)),
    "parity": Geometry(*OUTPUT, place(VIDEO, OUTPUT), parity=True),
    "parity replace": Geometry(*OUTPUT, place(VIDEO, OUTPUT), parity=True, resize_first=OUTPUT[0] * OUTPUT[1]),
    "retargeted": Geometry(*OUTPUT, place(VIDEO, OUTPUT)),
}


def conditions(name: str, points: np.ndarray) -> PoseConditions:
    """Of a clip with these points: in pixels of what is drawn on."""
    own = OUTPUT if name in ("parity replace", "retargeted") else VIDEO
    track = PoseTrack(points, *own)
    return PoseConditions(
        frames=len(points),
        fps=Fraction(16),
        width=OUTPUT[0],
        height=OUTPUT[1],
        start_s=0.0,
        report={},
        reference=SimpleNamespace(),  # type: ignore[arg-type]
        video=Path("none"),
        indices=np.arange(len(points)),
        track=PoseTrack(np.zeros_like(points), *VIDEO) if name == "retargeted" else track,
        faces=FacePlan([(0, 0, 0, 0)] * len(points), np.full(len(points), -1, np.int64)),
        face_size=16,
        geometry=GEOMETRIES[name],
        retargeted=track if name == "retargeted" else None,
    )


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sure=st.floats(0.0, 1.0))
def test_a_box_holds_all_that_is_drawn_and_little_more(name: str, seed: int, sure: float) -> None:
    random = np.random.default_rng(seed)
    low = random.uniform(20, 90, 2)
    points = np.zeros((2, 133, 3), np.float32)
    points[..., :2] = random.uniform(low, low + random.uniform(20, 100, 2), (2, 133, 2))
    points[..., 2] = random.random((2, 133)) < sure
    points[:, 0, 2] = points[:, FACE, 2] = 0  # without a head: a nose and no crown
    points[:, [5, 6], 2] = 1
    made = conditions(name, points)
    drawn, people = made.window(0, 2).pose.any(-1), made.people
    assert (people.width, people.height, people.fps, people.frames) == (*OUTPUT, "16", 2)
    slack = 3 * body_width(*VIDEO) + 2
    # Drawing rounds to a pixel. With parity it is one of the video, 1.2 of the output, and resizing spreads it.
    rounding = 2 if name == "parity" else 1
    for i in range(2):
        rows, columns = np.nonzero(drawn[i])
        if not len(rows):
            continue
        x1, y1, x2, y2 = people.person(i)
        got = np.array([x1, y1, OUTPUT[0] - x2, OUTPUT[1] - y2])
        tight = np.array([columns.min(), rows.min(), OUTPUT[0] - 1 - columns.max(), OUTPUT[1] - 1 - rows.max()])
        assert (got <= tight + rounding).all()
        if name != "filled":  # there the margin is of a person who is partly outside
            margin = 0.06 * max(np.ptp(rows), np.ptp(columns)) + slack
            assert (got >= np.maximum(tight - margin, 0) - 1).all()


def standing(confidence: float = 1.0) -> np.ndarray:
    """A person 200 high: neck at (100, 50), nose at (100, 30), a face of 20x24 around the nose."""
    points = np.zeros((1, 133, 3))
    points[:, :23, :2] = 100, 50
    points[0, 0, :2] = 100, 30
    points[0, [15, 16], :2] = 100, 230
    points[0, 9, :2], points[0, 10, :2] = (60, 130), (140, 130)
    points[0, FACE, 0], points[0, FACE, 1] = np.linspace(90, 110, 68), np.linspace(24, 48, 68)
    points[..., :23, 2] = points[..., FACE, 2] = confidence
    return points


def test_the_head_above_the_joints_is_inside() -> None:
    x1, y1, x2, y2 = person_boxes(standing())[0]
    margin = 0.06 * (230 - 12)
    assert np.allclose([x1, y1, x2, y2], [60 - margin, 30 - 0.9 * 20 - margin, 140 + margin, 230 + margin])
    upside_down = standing()
    upside_down[..., 1] = 240 - upside_down[..., 1]
    assert np.allclose(person_boxes(upside_down)[0], [60 - margin, 10 - margin, 140 + margin, 228 + margin])


def test_what_is_not_drawn_is_in_no_box() -> None:
    points = standing(0.49)
    points[..., FACE, 2] = 1
    assert np.isnan(person_boxes(points)).all()
    points[0, [5, 6], 2] = 1  # a neck; shoulders at the same place: then the face counts too
    margin = 0.06 * 26
    assert np.allclose(person_boxes(points)[0], [90 - margin, 24 - margin, 110 + margin, 50 + margin])
    points[0, FACE, 2] = 0.29
    assert np.allclose(person_boxes(points)[0], [100, 50, 100, 50])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda face: None, [90, 24, 110, 48]),
        (lambda face: face[:34, 2].fill(0.29), [110 - 20 * 33 / 67, 48 - 24 * 33 / 67, 110, 48]),
        (lambda face: face[:35, 2].fill(0.29), None),
        (lambda face: np.multiply(face[:, :2], 0.1, out=face[:, :2]), None),  # 2 pixels wide
        (lambda face: np.subtract(face[:, 0], 106, out=face[:, 0]), None),  # a fifth of it is in the picture
        (lambda face: np.subtract(face[:, 0], 104, out=face[:, 0]), [-14, 24, 6, 48]),
    ],
)
def test_a_face_is_sure_large_and_inside(change, expected) -> None:
    points = standing()
    change(points[0, FACE])
    box = face_boxes(points, 200, 300)[0]
    assert np.isnan(box).all() if expected is None else np.allclose(box, expected)


@pytest.mark.parametrize("video", [(300, 211), (100, 161), (640, 357)])
def test_parity_letterboxes_points_as_it_letterboxes_the_drawing(video: tuple[int, int]) -> None:
    """Where our own placement rounds to another size."""
    geometry = Geometry(*OUTPUT, place(video, OUTPUT), parity=True)
    points = np.zeros((1, 133, 3), np.float32)
    points[0, 0, :2] = video
    white = padding_resize(np.full((video[1], video[0]), 255, np.uint8), *OUTPUT)
    rows, columns = np.nonzero(white)
    found = geometry.drawn_points(PoseTrack(points, *video))[0, :2, :2]
    assert np.allclose(found, [(columns.max() + 1, rows.max() + 1), (columns.min(), rows.min())])
    assert geometry.placement.target != official_placement(video, OUTPUT).target
