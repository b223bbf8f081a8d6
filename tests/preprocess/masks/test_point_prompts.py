"""Point prompts: placed by hand-worked cases, never off the person or off the picture, whatever the joints."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.preprocess.masks.point_prompts import CONFIDENT, PROMPT_JOINTS, PromptPlan, key_frames, prompts_from_joints

SIZE = (200, 400)


def standing() -> np.ndarray:
    """[20, 3]: every joint sure, within x 80..120 and y 100..300."""
    joints = np.zeros((20, 3))
    joints[:, 0] = np.linspace(80, 120, 20)
    joints[:, 1] = np.linspace(100, 300, 20)
    joints[:, 2] = 0.9
    return joints


def test_positive_are_the_official_joints():
    body = standing()
    prompts = prompts_from_joints(body, None, SIZE)
    assert PROMPT_JOINTS == (0, 1, 2, 5, 8, 11, 10, 13)
    np.testing.assert_allclose(prompts.positive, body[list(PROMPT_JOINTS), :2], rtol=1e-6)


def test_negative_lie_a_margin_outside_of_box_and_joints():
    # Joints span 80..120 × 100..300, the box 70..110 × 90..290: together 70..120 × 90..300, 15 % of 210 is 31.5.
    prompts = prompts_from_joints(standing(), (70, 90, 110, 290), SIZE)
    corners = {(38.5, 58.5), (38.5, 331.5), (151.5, 58.5), (151.5, 331.5)}
    sides = {(38.5, 195.0), (151.5, 195.0)}
    assert {tuple(point) for point in prompts.negative.tolist()} == corners | sides


def test_background_outside_of_the_picture_is_no_prompt():
    prompts = prompts_from_joints(standing(), (0, 0, 199, 399), SIZE)
    assert len(prompts.positive) == 8 and len(prompts.negative) == 0


@pytest.mark.parametrize(
    ("row", "value"),
    [(2, CONFIDENT - 0.01), (0, -0.5), (0, 199.5), (1, -1), (1, 400), (0, np.nan), (1, np.inf), (2, np.nan)],
)
def test_a_joint_that_is_unsure_or_outside_is_no_prompt(row, value):
    body = standing()
    body[10, row] = value
    prompts = prompts_from_joints(body, None, SIZE)
    assert len(prompts.positive) == 7
    assert not (np.abs(prompts.positive - body[10, :2]) < 1e-3).all(1).any()


def test_three_sure_joints_are_enough_and_two_are_not():
    body = standing()
    body[[0, 1, 2, 5, 8], 2] = 0
    assert len(prompts_from_joints(body, None, SIZE).positive) == 3
    body[11, 2] = 0
    assert prompts_from_joints(body, None, SIZE) is None


def test_whole_body_points_give_the_same_joints():
    points = np.zeros((133, 3), np.float32)
    points[:, 2] = 1
    points[:23, 0], points[:23, 1] = np.arange(23) * 5, 50 + np.arange(23) * 10
    points[23:, :2] = points[0, :2]
    prompts = prompts_from_joints(points, None, SIZE)
    nose, neck, right_ankle = prompts.positive[0], prompts.positive[1], prompts.positive[6]
    assert nose.tolist() == [0, 50] and neck.tolist() == [27.5, 105] and right_ankle.tolist() == [80, 210]


def test_another_number_of_points_is_our_own_mistake():
    with pytest.raises(ValueError, match="133 points or 20 joints"):
        prompts_from_joints(np.zeros((17, 3)), None, SIZE)


@given(
    xy=st.lists(st.tuples(st.floats(-300, 500), st.floats(-300, 700)), min_size=20, max_size=20),
    confidence=st.lists(st.floats(0, 1.2), min_size=20, max_size=20),
)
def test_prompts_are_in_the_picture_and_background_is_off_the_person(xy, confidence):
    body = np.column_stack([np.array(xy), np.array(confidence)])
    prompts = prompts_from_joints(body, None, SIZE)
    if prompts is None:
        return
    assert (prompts.points >= 0).all() and (prompts.points <= np.array(SIZE) - 1).all()
    sure = body[body[:, 2] >= CONFIDENT, :2]
    low, high = sure.min(0), sure.max(0)
    if (high - low).max() > 1:
        assert not ((prompts.negative > low) & (prompts.negative < high)).all(1).any()


def test_key_frames_where_everything_is_seen():
    assert key_frames(np.ones(81, bool)).tolist() == [0, 20, 40, 60, 80]
    assert key_frames(np.ones(3, bool)).tolist() == [0, 1, 2]
    assert key_frames(np.ones(1000, bool)).tolist() == list(range(0, 1000, 100))


def test_key_frames_wait_for_the_person():
    usable = np.ones(40, bool)
    usable[:5] = usable[13:18] = False
    assert key_frames(usable).tolist() == [5, 18, 28, 38]  # 15 is due, 18 is the next that will do
    assert key_frames(np.zeros(40, bool)).tolist() == []


@given(st.lists(st.booleans(), max_size=300))
def test_key_frames_are_usable_and_never_far_apart(flags):
    usable = np.array(flags, bool)
    keys = key_frames(usable)
    assert usable[keys].all() and (np.diff(keys) > 0).all()
    assert len(keys) == 0 if not usable.any() else keys[0] == np.flatnonzero(usable)[0]
    step = max(1, min(len(usable) // 4, 100))
    for here, then in itertools.pairwise([*keys, len(usable)]):
        assert not usable[here + step : then].any()  # none that was due was passed over


def test_plan_agrees_with_its_frames():
    rng = np.random.default_rng(3)
    points = rng.uniform(-50, 450, (60, 133, 3)).astype(np.float32)
    points[..., 2] = rng.uniform(0, 1, (60, 133))
    plan = PromptPlan(points, SIZE)
    assert [plan.at(i) is not None for i in range(60)] == plan.usable.tolist()
    assert plan.keys == set(key_frames(plan.usable).tolist())
    assert 0 < plan.usable.sum() < 60
