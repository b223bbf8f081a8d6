"""Robust retarget on figures of known limbs: forward kinematics here, proportions and floors checked against them."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runner.errors import NoPerson
from runner.preprocess.body.keypoints import LEFT_HAND, RIGHT_HAND, PoseTrack
from runner.preprocess.body.retarget import retarget_robust
from runner.preprocess.body.retarget_limbs import median_of_five

SIZE = (800, 1000)
# Lengths in pixels; shoulder and hip are half widths, head is the distance of an eye and half of that of an ear.
PLAIN = {"spine": 120.0, "neck": 45.0, "shoulder": 42.0, "upper_arm": 70.0, "forearm": 62.0, "hip": 26.0,
         "thigh": 105.0, "calf": 98.0, "foot": 30.0, "head": 14.0, "hand": 20.0}  # fmt: skip
TALL = PLAIN | {"spine": 140.0, "upper_arm": 105.0, "forearm": 80.0, "thigh": 170.0, "calf": 165.0, "foot": 44.0,
                "shoulder": 60.0, "hip": 30.0, "neck": 55.0, "head": 17.0, "hand": 27.0}  # fmt: skip
CHILD = PLAIN | {"spine": 80.0, "upper_arm": 42.0, "forearm": 40.0, "thigh": 60.0, "calf": 54.0, "head": 16.0,
                 "neck": 40.0, "foot": 18.0, "shoulder": 30.0, "hip": 17.0, "hand": 14.0}  # fmt: skip
REST = {"spine": (0.0, -1.0), "neck": (0.0, -1.0)}
ENDS = {
    "upper_arm": ((5, 7), (6, 8)), "forearm": ((7, 9), (8, 10)), "thigh": ((11, 13), (12, 14)),
    "calf": ((13, 15), (14, 16)), "shoulder": ((5, 6),), "hip": ((11, 12),),
}  # fmt: skip


def toward(degrees: float, side: int = 1) -> np.ndarray:
    """0 hangs down, 90 outwards, 180 up."""
    return np.array([side * np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))])


def figure(lengths, pelvis, angles=None, short=None) -> np.ndarray:
    """[133, 3]. angles: limb → (left, right) degrees; short: limb → factor by which perspective shortens it."""
    angles = {"upper_arm": (20, 20), "forearm": (10, 10), "thigh": (5, 5), "calf": (2, 2), "lean": 0} | (angles or {})
    size = {name: length * (short or {}).get(name, 1.0) for name, length in lengths.items()}
    points = np.ones((133, 3))
    up = -toward(angles["lean"])
    neck = np.array(pelvis) + size["spine"] * up
    nose = neck + size["neck"] * up
    points[0, :2] = nose
    for row, (x, y) in zip(range(1, 5), ((0.6, -0.8), (-0.6, -0.8), (2, 0), (-2, 0)), strict=True):
        points[row, :2] = nose + size["head"] * np.array([x, y])
    points[23:91, :2] = nose + size["head"] * np.stack([np.linspace(-2, 2, 68), np.linspace(-1, 3, 68)], 1)
    for side, (k, first) in {1: (0, 91), -1: (1, 112)}.items():
        shoulder = neck + np.array([side * size["shoulder"], 0])
        elbow = shoulder + size["upper_arm"] * toward(angles["upper_arm"][k], side)
        wrist = elbow + size["forearm"] * toward(angles["forearm"][k], side)
        hip = np.add(pelvis, (side * size["hip"], 0))
        knee = hip + size["thigh"] * toward(angles["thigh"][k], side)
        ankle = knee + size["calf"] * toward(angles["calf"][k], side)
        for row, at in ((5, shoulder), (7, elbow), (9, wrist), (11, hip), (13, knee), (15, ankle)):
            points[row + k, :2] = at
        for row, (x, y) in ((17, (0.7, 0.8)), (18, (0.9, 0.6)), (19, (-0.4, 0.5))):
            points[row + 3 * k, :2] = ankle + size["foot"] * np.array([side * x, y])
        fan = np.stack([np.linspace(-1, 1, 21), np.linspace(0.2, 2, 21)], 1)
        fan[0] = 0
        points[first : first + 21, :2] = wrist + (2, 1) + size["hand"] * fan * (side, 1)
    return points


def clip(frames, size=SIZE) -> PoseTrack:
    return PoseTrack(np.stack(frames).astype(np.float32), *size)


def dancing(lengths, n=60, shorten=False, pelvis=(400.0, 450.0)) -> PoseTrack:
    """Arms and legs swing, the pelvis travels; limbs turn out of the picture's plane and back where `shorten`."""
    frames = []
    for t in range(n):
        a = 2 * np.pi * t / 30
        short = {}
        if shorten:
            names = ("spine", "upper_arm", "forearm", "thigh", "calf", "shoulder", "hip")
            short = {name: np.cos(1.0 * np.sin(a / 2 + i)) for i, name in enumerate(names)}
        angles = {
            "upper_arm": (60 + 50 * np.sin(a), 60 - 40 * np.sin(a)), "forearm": (90 + 60 * np.cos(a), 40),
            "thigh": (12 + 10 * np.sin(a), 12 - 10 * np.sin(a)), "calf": (4, 6 + 6 * np.sin(a)), "lean": 6 * np.sin(a),
        }  # fmt: skip
        frames.append(figure(lengths, (pelvis[0] + 40 * np.sin(a / 2), pelvis[1]), angles, short))
    return clip(frames)


def standing(lengths, pelvis=(300.0, 400.0), size=SIZE) -> PoseTrack:
    return clip([figure(lengths, pelvis)], size)


def longest(points, pair) -> float:
    return float(np.linalg.norm(points[:, pair[0], :2] - points[:, pair[1], :2], axis=-1).max())


# ---- proportions


@pytest.mark.parametrize("model", [TALL, CHILD], ids=["tall", "child"])
@pytest.mark.parametrize("shorten", [False, True], ids=["in the plane", "foreshortened"])
def test_takes_the_references_proportions_within_a_hundredth(model, shorten):
    result = retarget_robust(dancing(PLAIN, 90, shorten), standing(model), canvas=SIZE)
    for name, pairs in ENDS.items():
        want = model[name] * (2 if name in ("shoulder", "hip") else 1)
        if name in ("thigh", "calf") and shorten:
            continue  # their measure is below: keeping feet on the floor bends foreshortened legs a little
        for pair in pairs:
            assert longest(result.track.points, pair) == pytest.approx(want, rel=0.01), (name, pair)
    for name, length in model.items():
        assert result.report["factors"][name] == pytest.approx(length / PLAIN[name], rel=0.01), name
    assert result.report["factors_bounded"] == {}
    assert result.warnings == []


def test_limbs_point_where_the_drivers_do():
    driver = dancing(PLAIN)
    result = retarget_robust(driver, standing(TALL), canvas=SIZE).track.points
    for pairs in (ENDS["upper_arm"], ENDS["forearm"], ENDS["shoulder"], ENDS["hip"]):
        for a, b in pairs:
            ours, theirs = (p[:, b, :2] - p[:, a, :2] for p in (result, driver.points))
            cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
            assert cosine.min() > 0.9999


def test_equal_proportions_change_nothing():
    driver = dancing(PLAIN)
    reference = PoseTrack(driver.points[:1], *SIZE)
    result = retarget_robust(driver, reference, canvas=SIZE)
    assert np.abs(result.track.points - driver.points).max() < 0.5
    assert result.report["scale"] == pytest.approx(1, abs=1e-3)


def test_one_frame_is_the_reference_itself():
    result = retarget_robust(standing(PLAIN, (500, 600)), standing(TALL), canvas=SIZE)
    assert np.abs(result.track.points[:, :23, :2] - standing(TALL).points[:, :23, :2]).max() < 0.5


def test_outliers_and_unsure_joints_change_no_factor():
    driver = dancing(PLAIN)
    clean = retarget_robust(driver, standing(TALL), canvas=SIZE).report["factors"]
    points = driver.points.copy()
    rng = np.random.default_rng(5)
    points[[0, 13, 29, 44, 59], :17, :2] = rng.uniform(0, 800, (5, 17, 2))  # confident nonsense
    unsure = (rng.uniform(size=points.shape[:2]) < 0.2) & (np.arange(60) % 2 == 1)[:, None]
    points[unsure] = (5, 5, 0.2)
    noisy = retarget_robust(PoseTrack(points, *SIZE), standing(TALL), canvas=SIZE).report["factors"]
    assert noisy == pytest.approx(clean, rel=0.005)


def test_joints_outside_of_the_picture_are_not_measured():
    reference = standing(TALL)
    reference.points[0, [9, 10], 1] = 3000  # confident, far below the picture
    factors = retarget_robust(dancing(PLAIN), reference, canvas=SIZE).report["factors"]
    assert factors["forearm"] == factors["upper_arm"] == pytest.approx(105 / 70, rel=0.01)


def test_a_limb_toward_the_camera_is_bounded_and_said():
    reference = clip([figure(TALL, (300, 400), short={"forearm": 0.05})])
    result = retarget_robust(dancing(PLAIN), reference, canvas=SIZE)
    upper = 105 / 70
    assert result.report["factors"]["forearm"] == pytest.approx(0.6 * upper, rel=0.01)
    assert "forearm" in result.report["factors_bounded"]
    assert any("forearm" in w and "camera" in w for w in result.warnings)


def test_a_reference_from_the_side_stays_broad():
    reference = clip([figure(PLAIN, (300, 400), short={"shoulder": 0.05, "hip": 0.0})])
    factors = retarget_robust(dancing(PLAIN), reference, canvas=SIZE).report["factors"]
    assert factors["shoulder"] == factors["hip"] == pytest.approx(0.7, rel=0.02)
    assert factors["thigh"] == pytest.approx(1, rel=0.01)


def test_legs_guessed_into_an_upper_body_are_not_believed():
    reference = clip([figure(TALL | {"thigh": 40.0, "calf": 45.0}, (300, 800))])
    for rows, confidence in (([13], 0.48), ([14], 0.6), ([15, 17, 18], 0.35), ([16, 20, 21], 0.52)):
        reference.points[0, rows, 2] = confidence
    result = retarget_robust(dancing(PLAIN), reference, canvas=SIZE)
    assert result.report["reference_shows"] == "three_quarter"
    assert "zoomed" in result.warnings[0]
    assert result.report["factors"]["thigh"] == result.report["scale"]  # the body's, not 40 / 105
    assert 140 / 120 < result.report["scale"] < 105 / 70  # between the spine's and the upper arm's
    certain = clip([figure(TALL, (300, 700))])
    certain.points[0, 15:23, 2] = 0.1  # cut below knees that are plain to see
    factors = retarget_robust(dancing(PLAIN), certain, canvas=SIZE).report["factors"]
    assert factors["thigh"] == factors["calf"] == pytest.approx(170 / 105, rel=0.01)
    hidden = standing(TALL)
    hidden.points[0, [16, 20, 21, 22], 2] = 0.2  # one ankle behind the other
    assert retarget_robust(dancing(PLAIN), hidden, canvas=SIZE).report["reference_shows"] == "full"


def test_no_factor_leaves_its_bounds():
    monster = {name: length * (9.0 if name in ("upper_arm", "forearm") else 0.9) for name, length in PLAIN.items()}
    result = retarget_robust(dancing(PLAIN), standing(monster, (400, 400), (3000, 1000)), canvas=(3000, 1000))
    scale = result.report["scale"]
    assert result.report["factors"]["upper_arm"] == pytest.approx(2 * scale, rel=1e-3)
    assert scale == pytest.approx(0.9, rel=0.02)


def test_who_walks_up_to_the_camera_starts_at_the_references_size():
    frames = [
        figure({k: v * (0.5 + 0.5 * max(0, t - 40) / 80) for k, v in PLAIN.items()}, (400, 450)) for t in range(120)
    ]
    result = retarget_robust(clip(frames), standing(PLAIN), canvas=SIZE)
    assert result.report["size_at_start"] < 0.6
    assert longest(result.track.points[:1], (5, 7)) == pytest.approx(PLAIN["upper_arm"], rel=0.02)
    assert longest(result.track.points, (5, 7)) == pytest.approx(2 * PLAIN["upper_arm"], rel=0.03)


# ---- feet


def bent(hip, ankle, thigh, calf, side) -> np.ndarray:
    """The knee between them, bent outwards."""
    way = ankle - hip
    distance = min(np.linalg.norm(way), thigh + calf)
    along = (thigh**2 - calf**2 + distance**2) / (2 * distance)
    across = np.sqrt(max(0.0, thigh**2 - along**2))
    unit = way / np.linalg.norm(way)
    normal = np.array([unit[1], -unit[0]])
    return hip + along * unit + (across if normal[0] * side > 0 else -across) * normal


def squatting(lengths, n=60) -> tuple[PoseTrack, np.ndarray]:
    """Both feet stay where they are, apart, while the pelvis sways and sinks; then a jump of 20 frames."""
    frames, floor = [], 700.0
    on_floor = np.ones(n, bool)
    for t in range(n):
        a = 2 * np.pi * t / 30
        air = 90 * np.sin(np.pi * (t - 40) / 20) if 40 < t < 60 else 0.0
        on_floor[t] = t < 40
        pelvis = np.array([400 + 35 * np.sin(a), floor - 182 + 25 * (1 - np.cos(a)) - air])
        points = figure(lengths, pelvis)
        for k, side in ((0, 1), (1, -1)):
            hip, ankle = points[11 + k, :2], np.array([400 + side * 60, floor - air])
            foot = points[[17 + 3 * k, 18 + 3 * k, 19 + 3 * k], :2] - points[15 + k, :2]
            points[13 + k, :2] = bent(hip, ankle, lengths["thigh"], lengths["calf"], side)
            points[15 + k, :2] = ankle
            points[[17 + 3 * k, 18 + 3 * k, 19 + 3 * k], :2] = ankle + foot
        frames.append(points)
    return clip(frames), on_floor


@pytest.mark.parametrize(
    "legs", [(150, 60), (60, 130), (140, 140), (70, 65)], ids=["thighs", "calves", "long", "short"]
)
def test_planted_feet_stay_at_their_height(legs):
    driver, on_floor = squatting(PLAIN)
    model = PLAIN | {"thigh": float(legs[0]), "calf": float(legs[1])}
    reference = standing(model)
    result = retarget_robust(driver, reference, canvas=SIZE)
    made = result.track.points
    stature = model["neck"] + model["spine"] + sum(legs)
    toes = np.stack([made[:, [17, 18], 1].mean(1), made[:, [20, 21], 1].mean(1)], 1)
    for heights in (made[:, [15, 16], 1], toes):
        assert np.ptp(heights[on_floor], axis=0).max() < 0.02 * stature
    assert abs(toes[on_floor] - reference.points[0, [17, 18], 1].mean()).max() < 0.02 * stature  # on its floor
    report = result.report
    assert report["planted_height_change"] < 0.02
    assert 0 < report["frames_planted"] <= on_floor.sum() + 1
    across = np.ptp(made[on_floor][:, [15, 16], 0], axis=0).max()
    assert report["planted_slide"] == pytest.approx(across / stature, rel=0.2, abs=0.004)
    assert report["planted_slide_driving"] < 0.001
    assert made[50, 15, 1] < made[0, 15, 1] - 30  # the jump is still one
    # Raising and lowering comes in gently: no joint moves in one frame by more than the driver's ever does, and a bit.
    speed, own = (np.abs(np.diff(p[:, :17, 1], axis=0)).max() for p in (made, driver.points))
    assert speed < own * report["motion_scale"] * 1.5 + 2


def test_legs_of_one_factor_do_not_slide_at_all():
    driver, _ = squatting(PLAIN)
    model = {name: length * (1.4 if name in ("thigh", "calf", "hip", "foot") else 1) for name, length in PLAIN.items()}
    report = retarget_robust(driver, standing(model), canvas=SIZE).report
    assert report["planted_slide"] < 0.001
    assert report["leg_stretch"] < 0.001


def test_a_foot_that_slides_is_reported():
    frames = [figure(PLAIN, (300 + 1.5 * t, 450)) for t in range(40)]
    report = retarget_robust(clip(frames), standing(PLAIN), canvas=SIZE).report
    height = PLAIN["neck"] + PLAIN["spine"] + PLAIN["thigh"] + PLAIN["calf"]
    assert report["planted_slide"] == pytest.approx(39 * 1.5 / height, rel=0.01)
    assert report["planted_slide_driving"] == pytest.approx(39 * 1.5 / height, rel=0.01)


def test_ways_travelled_grow_with_the_legs():
    frames = [figure(PLAIN, (300 + 4 * t, 450)) for t in range(40)]
    model = PLAIN | {"thigh": 1.5 * PLAIN["thigh"], "calf": 1.5 * PLAIN["calf"]}
    points = retarget_robust(clip(frames), standing(model), canvas=SIZE).track.points
    pelvis = points[:, [11, 12], 0].mean(1)
    assert np.diff(pelvis) == pytest.approx(np.full(39, 6.0), abs=0.05)
    assert pelvis[0] == pytest.approx(300, abs=0.5)  # where the reference stands


def test_hips_that_get_lost_do_not_throw_the_figure_about():
    driver = dancing(PLAIN)
    clean = retarget_robust(driver, standing(TALL), canvas=SIZE).track.points
    points = driver.points.copy()
    points[20:30, [11, 12]] += (90, -120, -0.8)
    thrown = retarget_robust(PoseTrack(points, *SIZE), standing(TALL), canvas=SIZE).track.points
    arms = [0, *range(5, 11)]
    assert np.abs(thrown[:, arms, :2] - clean[:, arms, :2]).max() < 0.03 * 530


# ---- hands, face, confidences


def test_hands_hang_on_their_wrists_as_they_did():
    driver = dancing(PLAIN)
    points = retarget_robust(driver, standing(TALL), canvas=SIZE).track.points
    for wrist, hand in ((9, LEFT_HAND), (10, RIGHT_HAND)):
        ours, theirs = (p[:, hand, :2] - p[:, [wrist], :2] for p in (points, driver.points))
        assert ours == pytest.approx(theirs * 27 / 20, abs=0.05)


def test_face_and_feet_follow():
    driver = dancing(PLAIN)
    result = retarget_robust(driver, standing(TALL), canvas=SIZE)
    face, nose = (p[:, 23:91, :2] - p[:, :1, :2] for p in (result.track.points, driver.points))
    assert face == pytest.approx(nose * 17 / 14, abs=0.05)
    foot, own = (p[:, [17, 18, 19], :2] - p[:, [15], :2] for p in (result.track.points, driver.points))
    assert foot == pytest.approx(own * 44 / 30, abs=0.05)


def test_confidences_are_kept_and_the_report_is_plain():
    driver = dancing(PLAIN)
    driver.points[..., 2] = np.random.default_rng(1).uniform(0.3, 1, driver.points.shape[:2])
    before = driver.points.copy()
    result = retarget_robust(driver, standing(TALL), canvas=SIZE)
    assert (result.track.points[..., 2] == before[..., 2]).all()
    assert (driver.points == before).all()
    assert result.track.points.dtype == np.float32
    assert json.loads(json.dumps(result.report)) == result.report


# ---- what is not full-body


def test_a_reference_without_feet_stands_at_its_hips_and_zooms():
    reference = standing(TALL, (300, 800))
    reference.points[0, 13:23, 2] = 0.1
    driver = dancing({name: length / 2 for name, length in PLAIN.items()})
    result = retarget_robust(driver, reference, canvas=SIZE)
    assert result.report["reference_shows"] == "three_quarter"
    assert result.track.points[0, [11, 12], :2].mean(0) == pytest.approx([300, 800], abs=1)
    [warning] = result.warnings
    assert "hips" in warning
    assert f"zoomed to {result.report['scale']:.1f} times" in warning
    assert result.report["scale"] > 2
    assert result.report["joints_outside"] > 0.2


def test_a_reference_without_hips_stands_at_its_neck():
    reference = standing(TALL, (300, 400))
    reference.points[0, 11:23, 2] = 0.1
    result = retarget_robust(dancing(PLAIN), reference, canvas=SIZE)
    assert result.report["reference_shows"] == "half"
    assert result.track.points[0, [5, 6], :2].mean(0) == pytest.approx([300, 260], abs=1)
    assert "chest" in result.warnings[0]
    assert result.report["factors"]["upper_arm"] == pytest.approx(105 / 70, rel=0.01)


@pytest.mark.parametrize(("lost", "says"), [(slice(13, 23), "no feet"), (slice(11, 23), "no feet")])
def test_a_driver_without_feet_under_a_whole_reference(lost, says):
    driver = dancing(PLAIN)
    driver.points[:, lost, 2] = 0.1
    result = retarget_robust(driver, standing(TALL), canvas=SIZE)
    assert says in result.warnings[0]
    assert np.isfinite(result.track.points).all()
    assert "planted_slide" not in result.report
    joint = [11, 12] if lost.start == 13 else [5, 6]
    want = standing(TALL).points[0, joint, :2].mean(0)
    assert result.track.points[0, joint, :2].mean(0) == pytest.approx(want, abs=1)


def test_only_faces_are_measured_by_their_heads():
    driver, reference = dancing(PLAIN), standing(TALL)
    driver.points[:, 5:23, 2] = 0.1
    result = retarget_robust(driver, reference, canvas=SIZE)
    assert result.report["scale"] == pytest.approx(17 / 14, rel=0.01)
    assert result.track.points[0, 0, :2] == pytest.approx(reference.points[0, 0, :2], abs=1)


def test_nobody_in_the_reference():
    reference = standing(TALL)
    reference.points[..., 2] = 0.1
    with pytest.raises(NoPerson, match="no limb is seen"):
        retarget_robust(dancing(PLAIN), reference, canvas=SIZE)


def test_refuses_what_is_no_clip_and_no_picture():
    with pytest.raises(ValueError, match="without frames"):
        retarget_robust(PoseTrack(np.zeros((0, 133, 3), np.float32), *SIZE), standing(TALL), canvas=SIZE)
    with pytest.raises(ValueError, match="one picture"):
        retarget_robust(dancing(PLAIN), dancing(TALL), canvas=SIZE)


def test_a_reference_of_another_shape_is_letterboxed_onto_the_canvas():
    driver = dancing(PLAIN)
    direct = retarget_robust(driver, standing(TALL, (300, 400), (800, 1000)), canvas=(800, 1000)).track.points
    boxed = retarget_robust(driver, standing(TALL, (300, 400), (800, 1000)), canvas=(600, 500)).track
    assert (boxed.width, boxed.height) == (600, 500)
    assert boxed.points[..., :2] == pytest.approx(direct[..., :2] / 2 + (100, 0), abs=0.01)


# ---- invariances

REFERENCE = standing(TALL)
DANCE = dancing(PLAIN, 30, pelvis=(1500.0, 1500.0)).points
WIDE = (3000, 3000)
ACROSS = np.arange(133)  # left ↔ right; the face's rows have no simple order and are left out
for a, b in [(1, 2), (3, 4), *((i, i + 1) for i in range(5, 17, 2)), *((i, i + 3) for i in (17, 18, 19))]:
    ACROSS[[a, b]] = b, a
ACROSS[91:112], ACROSS[112:133] = np.arange(112, 133), np.arange(91, 112)


def plain_result() -> np.ndarray:
    return retarget_robust(PoseTrack(DANCE, *WIDE), REFERENCE, canvas=SIZE).track.points[..., :2]


@settings(max_examples=25, deadline=None)
@given(st.floats(-1000, 1000), st.floats(-1000, 1000), st.floats(0.3, 1.9))
def test_where_and_how_large_the_driver_is_does_not_matter(x, y, size):
    moved = DANCE.copy()
    moved[..., :2] = (moved[..., :2] - 1500) * size + 1500 + (x, y)
    assume((moved[..., :2] > 0).all() and (moved[..., :2] < 3000).all())
    result = retarget_robust(PoseTrack(moved, *WIDE), REFERENCE, canvas=SIZE).track.points[..., :2]
    assert np.abs(result - plain_result()).max() < 0.05


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(PLAIN)), st.floats(0.75, 1.3)))
def test_mirrored_in_mirrored_out(changes):
    model = standing({name: length * changes.get(name, 1) for name, length in TALL.items()}).points

    def mirrored(points, width):
        flipped = points[:, ACROSS].copy()
        flipped[..., 0] = width - flipped[..., 0]
        return flipped

    def made(clip_points, picture):
        return retarget_robust(PoseTrack(clip_points, *WIDE), PoseTrack(picture, *SIZE), canvas=SIZE).track.points

    one = mirrored(made(DANCE, model), SIZE[0])
    two = made(mirrored(DANCE, WIDE[0]), mirrored(model, SIZE[0]))
    rows = np.r_[0:23, 91:133]
    assert np.abs(one - two)[:, rows].max() < 0.02


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12))
def test_median_of_five_takes_out_single_outliers(values):
    steady = np.full(len(values), 7.0)
    assert median_of_five(np.array(values)).shape == (len(values),)
    if len(values) >= 5:
        steady[len(values) // 2] = values[0]
        assert (median_of_five(steady) == 7).all()
