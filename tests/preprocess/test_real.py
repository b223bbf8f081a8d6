"""A real man, real networks: the skeleton follows him in every frame."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from runner.preprocess.body.skeleton import THRESHOLD
from runner.preprocess.body.track import choose_subject, follow, whereabouts
from runner.preprocess.networks.backends import Backend
from runner.preprocess.networks.yolov10 import choose_person, people
from runner.preprocess.people_search import find_people
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from runner.video import Mp4Writer, VideoReader

REAL = Path(__file__).parents[3] / "shared" / "data" / "real"
MAN = REAL / "man_480x480_30fps_110f.mp4"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MAN.is_file(), reason="the shared folder of real models and clips is not here"),
]


@pytest.fixture(scope="module")
def real() -> Preprocessor:
    return Preprocessor.load(REAL / "person_detector.onnx", REAL / "wholebody_pose_full.onnx")


def test_the_skeleton_follows_the_man(real):
    reference = REAL / "reference_woman_fullbody.png"
    conditions = real.prepare(reference, MAN, JobOptions(fps=4, size="480x480"), face_size=128)
    assert conditions.frames == 15  # 110 frames at 30 fps are 3.67 s
    assert conditions.report["frames_without_person"] == 0
    assert conditions.report["face_seen"]
    with VideoReader(MAN) as reader:
        frames = reader.read(conditions.indices)
    window = conditions.window(0, conditions.frames)
    joints_seen = (conditions.track.points[:, :23, 2] >= THRESHOLD).sum(1)
    assert joints_seen.min() >= 14  # of 23; a fast arm blurs
    assert joints_seen.mean() > 20
    for i, frame in enumerate(frames):
        box = choose_person(real.detector.rows([frame])[0], (480, 480))
        body = conditions.track.points[i, :23]
        seen = body[body[:, 2] >= THRESHOLD, :2]
        margin = 0.1 * (box.y2 - box.y1)
        inside = (seen > (box.x1 - margin, box.y1 - margin)) & (seen < (box.x2 + margin, box.y2 + margin))
        assert inside.all(1).mean() > 0.95
        # the drawing spans the man: as high as from eyes to toes, and stands where he stands
        rows, columns = np.nonzero(window.pose[i].any(-1))
        assert rows[-1] - rows[0] > 0.75 * (box.y2 - box.y1)
        assert box.x1 - margin < columns.mean() < box.x2 + margin
        face = window.face[i]
        assert face.std() > 10  # a picture, not a flat colour
    wrists = conditions.track.points[:, [9, 10], 1]
    shoulders = conditions.track.points[:, [5, 6], 1]
    assert (wrists < shoulders - 40).any(0).all()  # jumping jacks: hands go above the shoulders
    assert (wrists > shoulders + 60).any(0).all()  # and down again
    assert np.ptp(wrists, 0).min() > 3 * np.ptp(conditions.track.points[:, [11, 12], 1], 0).max() / 2
    conditions.close()


def test_an_upper_body_reference_sets_the_size_and_keeps_its_pixels(real):
    path = REAL / "reference_astronaut_upper_body.png"
    conditions = real.prepare(path, MAN, JobOptions(max_frames=2), face_size=128)
    assert (conditions.width, conditions.height) == (624, 624)
    assert conditions.reference.size == (512, 512)
    assert conditions.window(0, 2).pose.any((1, 2, 3)).all()
    conditions.close()


def test_the_face_crop_holds_the_face(real):
    """His nose and mouth corners, found by the same network, fall into the middle of every crop's box."""
    conditions = real.prepare(REAL / "reference_woman_fullbody.png", MAN, JobOptions(fps=2), face_size=64)
    for i in range(conditions.frames):
        x1, x2, y1, y2 = conditions.faces.boxes[i]
        nose = conditions.track.points[conditions.faces.sources[i], 0, :2]
        assert 0.2 < (nose[0] - x1) / (x2 - x1) < 0.8
        assert 0.2 < (nose[1] - y1) / (y2 - y1) < 0.8
        assert 15 < x2 - x1 < 80
    conditions.close()


def jumps(points: np.ndarray) -> np.ndarray:
    """Steps of the sure body joints between neighbouring frames, in body heights: eye to ankle is 0.9 of one."""
    body = points[:, :23]
    height = 1 / 0.9 * float(np.median(body[:, [15, 16], 1].mean(1) - body[:, [1, 2], 1].mean(1)))
    sure = (body[1:, :, 2] >= THRESHOLD) & (body[:-1, :, 2] >= THRESHOLD)
    return np.where(sure, np.linalg.norm(np.diff(body[..., :2], axis=0), axis=-1), 0) / height


def test_at_the_native_rate_no_joint_jumps_and_good_ones_keep_their_place(real, monkeypatch):
    """The network exchanges his sides in single frames, at full confidence, and misplaces arms in others."""
    raw = []
    decode = real.pose.decode
    monkeypatch.setattr(real.pose, "decode", lambda *a: raw.append(decode(*a)) or raw[-1])
    conditions = real.prepare(REAL / "reference_woman_fullbody.png", MAN, JobOptions(fps="source", size="480x480"))
    before, after, report = np.concatenate(raw), conditions.track.points, conditions.report
    assert conditions.frames == 110
    assert report["frames_without_person"] == 0
    assert (after[:, :23, 2] >= THRESHOLD).sum(1).min() >= 14  # joints drawn in each of the 110
    assert jumps(before).max() > 0.5
    assert jumps(after).max() <= 0.15
    moved = np.linalg.norm((after - before)[:, :23, :2], axis=-1)
    touched = moved > 0.5
    assert (moved[~touched] == 0).all()
    assert touched.any(1).sum() <= 15  # frames in which anything at all was put right
    assert 3 <= report["frames_repaired"] <= 10
    assert 0 < report["joints_repaired"] < 0.1 * 110 * 65  # nearly all are fingers: his hands are few pixels wide
    boxes = np.array(conditions.faces.boxes, float)
    sides = boxes[:, [1, 3]] - boxes[:, [0, 2]]
    assert np.abs(np.diff(sides, axis=0)).max() <= 4  # pixels: the crop does not pump
    conditions.close()


def test_the_detector_finds_him_in_every_frame(real):
    with VideoReader(MAN) as reader:
        frames = [frame for window in reader.windows(np.arange(110), 8) for frame in window]
    assert all(people(real.detector.rows([frame])[0], (480, 480)) for frame in frames)


@pytest.fixture(scope="module")
def crossing(real, tmp_path_factory) -> tuple[Path, list, np.ndarray, np.ndarray]:
    """The woman, cut out of her picture, walks by before the man, hiding him: (clip at 15 fps, boxes, his x, hers)."""
    woman = cv2.cvtColor(cv2.imread(str(REAL / "reference_woman_fullbody.png")), cv2.COLOR_BGR2RGB)[21:474, 90:376]
    high, wide = woman.shape[:2]
    alpha = np.zeros((high, wide, 1), np.float32)
    alpha[10:-10, 14:-14] = 1
    alpha = cv2.GaussianBlur(alpha, (0, 0), 5)[..., None]
    with VideoReader(MAN) as reader:
        frames = reader.read(np.arange(0, 110, 2))
    n, width, side = len(frames), 832, (832 - 480) // 2
    shown, seen, his, hers = [], [], [], []
    for i, frame in enumerate(frames):
        alone = choose_person(real.detector.rows([frame])[0], (480, 480))
        his.append(side + alone.centre[0])
        canvas = np.full((480, width, 3), np.median(frame, (0, 1)), np.uint8)
        canvas[:, side : side + 480] = frame
        x = round((width - wide) * i / (n - 1))
        place = canvas[8 : 8 + high, x : x + wide]
        place[:] = (1 - alpha) * place + alpha * woman
        hers.append(x + wide / 2)
        shown.append(canvas)
        seen.append(people(real.detector.rows([canvas])[0], (width, 480)))
    path = tmp_path_factory.mktemp("crossing") / "crossing.mp4"
    with Mp4Writer(path, width, 480, Fraction(15)) as writer:
        writer.write(np.stack(shown))
    return path, seen, np.array(his), np.array(hers)


def test_when_two_cross_neither_is_taken_for_the_other(crossing):
    _, seen, his, hers = crossing
    n = len(seen)
    times, apart = np.arange(n) / 15, np.abs(his - hers) > 150
    assert apart[:8].all() and apart[-8:].all() and not apart.all()
    everybody = follow(seen, times)
    for subject, true, least in [("largest", hers, 0.9), (tuple(float(v) for v in _around(his[0])), his, 0.3)]:
        person = choose_subject(everybody, subject, (832, 480), times)
        found = whereabouts(person, seen, np.arange(n), times)
        centres = np.array([box.centre[0] for box in found.boxes])
        assert np.abs(centres - true)[apart].max() < 60
        assert len(person.looks) >= least * n
        assert person.looks[-1] >= n - 3  # he is found again when she has passed
        placed = [
            abs(b.centre[0] - t) < abs(b.centre[0] - o) for b, t, o in _sightings(person, true, his + hers - true)
        ]
        assert all(placed)


def test_when_two_cross_the_skeleton_stays_his(real, crossing):
    """From film to joints: while he is hidden nothing is drawn, and never on her."""
    path, _, his, hers = crossing
    asked = JobOptions(fps="source", size="832x480", preprocess={"subject": [float(v) for v in _around(his[0])]})
    conditions = real.prepare(REAL / "reference_woman_fullbody.png", path, asked)
    shoulders = conditions.track.points[:, 5:7]
    drawn, x = (shoulders[..., 2] >= THRESHOLD).all(1), shoulders[..., 0].mean(1)
    assert drawn[:8].all() and drawn[-8:].all() and not drawn.all()
    apart = np.abs(his - hers) > 40
    assert (np.abs(x - his) < np.abs(x - hers))[drawn & apart].all()
    conditions.close()


def test_of_two_who_cross_each_has_a_number(real, crossing):
    """She is larger and has 1; he is seen before and after she hides him, and 2 is his also late in the video."""
    path, _, his, hers = crossing
    with VideoReader(path) as reader:
        found = find_people(reader, Backend("vitpose", real.detector, real.pose))
    assert len(found.people) == 2
    for person, true, other in zip(found.people, (hers, his), (his, hers), strict=True):
        for look, box in zip(person.looks, person.boxes, strict=True):
            assert abs(true[look] - other[look]) < 100 or abs(box.centre[0] - true[look]) < 60
        assert 25 < person.face_pixels < 60
        assert person.feet_inside >= 0.5
    assert found.people[1].end_s > 3
    assert found.people[0].sharpness > 100
    asked = JobOptions(fps="source", start_s=2.9, size="832x480", preprocess={"subject": 2})
    conditions = real.prepare(REAL / "reference_woman_fullbody.png", path, asked)
    shoulders = conditions.track.points[:, 5:7]
    drawn, x = (shoulders[..., 2] >= THRESHOLD).all(1), shoulders[..., 0].mean(1)
    assert drawn[-3:].all()
    late = conditions.indices[drawn]
    assert (np.abs(x[drawn] - his[late]) < np.abs(x[drawn] - hers[late])).all()
    conditions.close()


def _around(x: float) -> tuple[float, float, float, float]:
    return x - 65, 60, x + 65, 430


def _sightings(person, true, other):
    """Of the looks at which the two are well apart."""
    return [
        (box, true[look], other[look])
        for look, box in zip(person.looks, person.boxes, strict=True)
        if abs(true[look] - other[look]) > 100
    ]


def test_his_motion_on_her_body(real):
    conditions = real.prepare(
        REAL / "reference_woman_fullbody.png", MAN, JobOptions(fps=8, size="480x480", preprocess={"retarget": True})
    )
    assert conditions.report["retarget"]["method"] == "robust"
    drawn = conditions.window(0, conditions.frames).pose
    assert drawn.any((1, 2, 3)).all()
    plain = conditions.geometry.skeleton(conditions.track, 0)
    assert (plain != drawn[0]).any()
    conditions.close()
