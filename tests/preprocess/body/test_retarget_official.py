"""The official retarget, against one figure worked by hand; the arithmetic stands beside each number."""

import numpy as np
import pytest

from runner.preprocess.body.keypoints import LEFT_HAND, RIGHT_HAND, PoseTrack, body_of
from runner.preprocess.body.retarget_official import (
    forward,
    framing_of,
    global_scale,
    limb_factors,
    retarget_official,
    symmetrised,
)

VIDEO, PICTURE = (640, 600), (200, 300)
# nose, neck, R shoulder, elbow, wrist, L …, R hip, knee, ankle, L …, R eye, L eye, R ear, L ear, L toe, R toe
DRIVER = [
    (300, 100), (300, 150), (270, 150), (270, 220), (270, 280), (330, 150), (330, 220), (330, 290), (240, 230),
    (240, 350), (240, 500), (360, 230), (360, 350), (360, 500), (294, 92), (306, 92), (286, 98), (314, 98),
    (372, 516), (228, 516),
]  # fmt: skip
MODEL = [
    (100, 50), (102.5, 80), (80, 80), (80, 115), (80, 145), (125, 80), (125, 122), (125, 152), (87.5, 100),
    (87.5, 160), (87.5, 250), (120.5, 104), (120.5, 164), (120.5, 250), (97, 46), (106, 42), (94, 42), (109, 46),
    (126.5, 258), (78.5, 262),
]  # fmt: skip
# The neck lies between the shoulders; the reference's nose is not above it: sqrt(2.5² + 30²) = 30.104, scaled 60.208.
NECK_TO_NOSE = 2 * np.hypot(2.5, 30) / 50
TO_POINT = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, (17, 18), (20, 21)]


def track(body, size, seen=1.0) -> PoseTrack:
    """One frame; toes apart by 4 px around their mean, hands 3 px beyond the wrists, all else at the nose."""
    points = np.zeros((1, 133, 3))
    points[0, :, :2], points[0, :, 2] = body[0], seen
    for at, rows in zip(body, TO_POINT, strict=True):
        if isinstance(rows, tuple):
            points[0, list(rows), :2] = np.add(at, [[-2, 0], [2, 0]])
        elif rows is not None:
            points[0, rows, :2] = at
    points[0, RIGHT_HAND, :2] = points[0, 10, :2] + (1, 1)
    points[0, LEFT_HAND, :2] = points[0, 9, :2] + (1, 1)
    return PoseTrack(points.astype(np.float32), *size)


def body(joints, seen=1.0) -> np.ndarray:
    return np.concatenate([np.asarray(joints, float), np.full((20, 1), seen)], 1)


@pytest.fixture
def driver() -> PoseTrack:
    return track(DRIVER, VIDEO)


@pytest.fixture
def model() -> PoseTrack:
    return track(MODEL, PICTURE)


# ---- each step


def test_scale_from_nose_to_ankles():
    assert global_scale(body(DRIVER), body(MODEL), VIDEO, PICTURE) == (500 - 100) / (250 - 50)


def test_scale_from_hips_where_an_ankle_is_not_above_a_half():
    unsure = body(MODEL)
    unsure[13, 2] = 0.5
    # hips: 230 - 100 = 130; (100 + 104) / 2 - 50 = 52
    assert global_scale(body(DRIVER), unsure, VIDEO, PICTURE) == 130 / 52


def test_scale_from_areas_where_the_nose_is_unsure():
    unsure = body(DRIVER)
    unsure[0, 2] = 0.4
    assert global_scale(unsure, body(MODEL), VIDEO, PICTURE) == pytest.approx((640 * 600 / (200 * 300)) ** 0.5)


def test_a_height_of_zero_takes_the_next_way():
    lying = body(MODEL)
    lying[[0, 10, 13], 1] = 50
    assert global_scale(body(DRIVER), lying, VIDEO, PICTURE) == 130 / 52


@pytest.mark.parametrize(
    ("joint", "column", "value", "framing"),
    [(10, 2, 0.39, "three_quarter"), (13, 1, 601, "three_quarter"), (8, 2, 0.39, "half"), (11, 1, 601, "half"),
     (10, 2, 0.4, "full"), (13, 1, 600, "full"), (10, 0, -50, "full"), (0, 2, 0, "full")],
)  # fmt: skip
def test_framing_looks_at_hips_and_ankles_and_the_lower_edge(joint, column, value, framing):
    changed = body(DRIVER)
    changed[joint, column] = value
    assert framing_of(changed, 600) == framing


def test_factors_are_lengths_of_one_frame():
    scaled = body(MODEL)
    scaled[:, :2] *= 2
    assert limb_factors(scaled, body(DRIVER)) == pytest.approx(
        [
            # scaled shoulders 45 from the neck over 30; elbows 70 and 84 over 70; forearms 60 over 60 and 70
            *[45 / 30, 45 / 30, 70 / 70, 60 / 60, 84 / 70, 60 / 70],
            # neck to right hip 2·hypot(15, 20) = 50 over hypot(60, 80) = 100; thigh 120 over 120; calf 180 over 150
            *[50 / 100, 120 / 120, 180 / 150],
            # to the left hip 2·hypot(18, 24) = 60; thigh 120; calf 172 over 150
            *[60 / 100, 120 / 120, 172 / 150],
            NECK_TO_NOSE,
            # right eye 2·hypot(3, 4) over hypot(6, 8); right ear over hypot(8, 6); left eye 2·hypot(6, 8); left ear
            *[10 / 10, 10 / 10, 20 / 10, 10 / 10],
            # left toe 2·hypot(6, 8) over hypot(12, 16); right toe 2·hypot(9, 12)
            *[20 / 20, 30 / 20],
        ]
    )


def test_a_limb_of_no_length_has_factor_one_and_stays_a_point():
    folded = body(DRIVER)
    folded[4, :2] = folded[3, :2]
    assert limb_factors(body(MODEL), folded)[3] == 1
    made = forward(folded[None, :, :2], np.full(19, 2.0))[0]
    assert (made[4] == made[3]).all()
    assert np.isfinite(made).all()


def test_left_and_right_become_the_larger_eyes_and_ears_the_mean():
    factors = symmetrised(np.arange(19.0))
    assert factors.tolist() == [1, 1, 4, 5, 4, 5, 9, 10, 11, 9, 10, 11, 12, 14, 15, 14, 15, 18, 18]


def test_feet_are_capped_at_half_of_their_new_calf():
    factors = np.ones(19)
    factors[[17, 18]] = 10  # feet of 200
    factors[8] = 0.5  # right calf 75: foot at most 37.5; left calf 150: foot at most 75
    joints = body(DRIVER)[None, :, :2]
    for cap, right, left in ((True, 37.5, 75), (False, 200, 200)):
        made = forward(joints, factors, cap_feet=cap)[0]
        assert np.linalg.norm(made[19] - made[10]) == pytest.approx(right)
        assert np.linalg.norm(made[18] - made[13]) == pytest.approx(left)


# ---- the whole

# Factors after the symmetry: shoulders 1.5, upper arms 1.2, forearms 1, hips 0.6, thighs 1, calves 1.2, eyes 1.5,
# ears 1, feet 1.5. From the neck (300, 150) outwards:
FORWARD = {
    2: (255, 150), 3: (255, 234), 4: (255, 294), 5: (345, 150), 6: (345, 234), 7: (345, 304), 8: (264, 198),
    9: (264, 318), 10: (264, 498), 11: (336, 198), 12: (336, 318), 13: (336, 498), 19: (246, 522), 18: (354, 522),
    1: (300, 150), 0: (300, 150 - 50 * NECK_TO_NOSE), 14: (291, 138 - 50 * NECK_TO_NOSE),
    16: (283, 144 - 50 * NECK_TO_NOSE), 15: (309, 138 - 50 * NECK_TO_NOSE), 17: (317, 144 - 50 * NECK_TO_NOSE),
}  # fmt: skip
# Ground of the scaled reference: right (500 + 524) / 2 = 512, left (500 + 516) / 2 = 508. Hips (175 + 241) / 2 = 208.
DX, DY = 300 - 208, 498 - 512


def test_full_body_to_a_thousandth_of_a_pixel(driver, model):
    result = retarget_official(driver, model, canvas=PICTURE)
    made = body_of(result.track.points)[0]
    for joint, (x, y) in FORWARD.items():
        assert made[joint, :2] == pytest.approx([(x - DX) / 2, (y - DY) / 2], abs=1e-3), joint
    assert (result.track.width, result.track.height) == PICTURE
    assert (result.track.points[:, :91, 2] == driver.points[:, :91, 2]).all()
    assert result.report["framing"] == "full"
    assert result.warnings == []


def test_later_frames_keep_the_first_ones_offset(driver, model):
    moved = driver.points.copy()
    moved[..., :2] += (40, -30)
    clip = PoseTrack(np.concatenate([driver.points, moved]), *VIDEO)
    made = body_of(retarget_official(clip, model, canvas=PICTURE).track.points)[..., :2]
    assert made[1] - made[0] == pytest.approx(np.tile([20, -15], (20, 1)), abs=1e-3)  # over k = 2


def test_without_ankles_neck_comes_on_neck(driver, model):
    model.points[0, 15:17, 2] = 0.3
    result = retarget_official(driver, model, canvas=PICTURE)
    assert body_of(result.track.points)[0, 1, :2] == pytest.approx([102.5, 80], abs=0.5)  # 2.5 × 200 and 300: whole
    assert result.report["framing"] == "three_quarter"
    assert "zoomed" in result.warnings[0]
    assert "full-body" in result.warnings[0]


def test_sides_of_the_scaled_reference_are_truncated(driver, model):
    model.points[0, 11:17, 2] = 0.3  # no hips, no ankles: k = sqrt(384000 / 60000) = 2.5298
    result = retarget_official(driver, model, canvas=PICTURE)
    k = (384000 / 60000) ** 0.5
    # 200 k = 505.96 → 505 and 300 k = 758.9 → 758; the neck lies at 102.5 / 200 and 80 / 300 of them
    want = [102.5 / 200 * 505 / k, 80 / 300 * 758 / k]
    assert result.report["framing"] == "half"
    assert body_of(result.track.points)[0, 1, :2] == pytest.approx(want, abs=1e-3)


def test_half_of_the_driver_anchors_at_the_neck_without_a_warning(driver, model):
    driver.points[0, 15:17, 2] = 0.45  # shown (0.4), yet no height (0.5)
    assert retarget_official(driver, model, canvas=PICTURE).report["framing"] == "full"
    driver.points[0, 15:17, 2] = 0.3
    result = retarget_official(driver, model, canvas=PICTURE)
    assert result.report["framing"] == "three_quarter"
    assert result.warnings == []


# ---- hands: factor 1.5 / 2; right wrist comes to ((255 - 92) / 2, (294 + 14) / 2), left to ((345 - 92) / 2, 318 / 2)

RIGHT_OUT, LEFT_OUT = np.array([81.5, 154.0]), np.array([126.5, 159.0])


def hands(driver, model):
    """(right, left) of the result: the official rows hold them the other way round."""
    points = retarget_official(driver, model, canvas=PICTURE).track.points[0]
    return points[LEFT_HAND], points[RIGHT_HAND]


def test_a_hand_snaps_onto_its_wrist_and_is_truncated(driver, model):
    driver.points[0, 112, :2] = 271, 281
    driver.points[0, 113, :2] = 283, 287
    driver.points[0, 114] = 500, 500, 0.39
    right, left = hands(driver, model)
    assert right[0].tolist() == [81, 154, 1]
    assert right[1].tolist() == [81.5 + 9 - 0.5, 154 + 4, 1]  # 0.75 · (12, 6) = (9, 4.5), then whole
    assert right[2].tolist() == [0, 0, 0]
    assert left[0].tolist() == [126, 159, 1]


def test_without_its_root_a_hand_is_carried_along(driver, model):
    driver.points[0, 91] = 335, 295, 0.3
    driver.points[0, 92, :2] = 343, 303
    _, left = hands(driver, model)
    # (335, 295) + 0.75 · (8, 8) + (126.5 - 330, 159 - 290) = (137.5, 170)
    assert left[1].tolist() == [137, 170, 1]
    assert left[0].tolist() == [0, 0, 0]


def test_a_right_hand_at_the_left_wrist_exchanges_them_and_keeps_the_shifts(driver, model):
    driver.points[0, RIGHT_HAND, :2] = 329, 289
    driver.points[0, LEFT_HAND, :2] = 272, 282
    right, left = hands(driver, model)
    # The left hand, shifted as the right one would be: (272, 282) + (81.5, 154) - (329, 289) = (24.5, 147)
    assert right[0].tolist() == [24, 147, 1]
    # (329, 289) + (126.5, 159) - (272, 282) = (183.5, 166)
    assert left[0].tolist() == [183, 166, 1]
    assert retarget_official(driver, model, canvas=PICTURE).report["frames_hands_exchanged"] == 1


def test_a_missing_right_root_is_far_up_left_and_exchanges_when_seen_from_behind(driver, model):
    driver.points[0, 112, 2] = 0.3
    driver.points[0, 113, :2] = 280, 290
    right, _ = hands(driver, model)
    assert right[0].tolist() == [0, 0, 0]  # seen from the front the right wrist is the nearer: no exchange
    assert right[1, 2] == 1
    turned = driver.points.copy()
    for a, b in ((5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)):
        turned[0, [a, b]] = turned[0, [b, a]]
    turned[0, LEFT_HAND, :2], turned[0, RIGHT_HAND, :2] = (271, 281), (331, 291)
    result = retarget_official(PoseTrack(turned, *VIDEO), model, canvas=PICTURE)
    assert result.report["frames_hands_exchanged"] == 1


@pytest.mark.parametrize("frames", [0, 2])
def test_refuses_what_is_no_clip_and_no_picture(driver, model, frames):
    if frames == 0:
        with pytest.raises(ValueError, match="without frames"):
            retarget_official(PoseTrack(driver.points[:0], *VIDEO), model, canvas=PICTURE)
    else:
        with pytest.raises(ValueError, match="one picture"):
            retarget_official(driver, PoseTrack(np.repeat(model.points, 2, 0), *PICTURE), canvas=PICTURE)
