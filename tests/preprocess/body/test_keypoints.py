"""133 points to 20 joints, by the table."""

import numpy as np
import pytest

from runner.preprocess.body.keypoints import Pose, PoseTrack, body_of, hold_lost_bodies

POINTS = np.stack([np.arange(133) * 10.0, np.arange(133) + 0.5, np.arange(133) / 133], 1).astype(np.float32)
COCO = {
    "nose": 0, "R shoulder": 6, "R elbow": 8, "R wrist": 10, "L shoulder": 5, "L elbow": 7, "L wrist": 9,
    "R hip": 12, "R knee": 14, "R ankle": 16, "L hip": 11, "L knee": 13, "L ankle": 15,
    "R eye": 2, "L eye": 1, "R ear": 4, "L ear": 3,
}  # fmt: skip
BODY = [
    "nose", "neck", "R shoulder", "R elbow", "R wrist", "L shoulder", "L elbow", "L wrist", "R hip", "R knee",
    "R ankle", "L hip", "L knee", "L ankle", "R eye", "L eye", "R ear", "L ear",
]  # fmt: skip


def test_every_joint_comes_from_its_point():
    body = body_of(POINTS)
    for i, name in enumerate(BODY):
        if name != "neck":
            assert body[i].tolist() == POINTS[COCO[name]].tolist(), name


def test_neck_and_toes_are_means_confidence_included():
    body = body_of(POINTS)
    assert body[1] == pytest.approx([55, 6, 5.5 / 133])
    assert body[18] == pytest.approx([175, 18, 17.5 / 133])
    assert body[19] == pytest.approx([205, 21, 20.5 / 133])


def test_hands_and_face():
    pose = Pose.from_points(POINTS)
    assert pose.face[:, 0].tolist() == [10.0 * k for k in range(23, 91)]
    assert pose.left_hand[:, 0].tolist() == [10.0 * k for k in range(91, 112)]
    assert pose.right_hand[:, 0].tolist() == [10.0 * k for k in range(112, 133)]
    with pytest.raises(ValueError, match="133 points"):
        Pose.from_points(POINTS[:17])


def test_moving_keeps_confidences():
    moved = Pose.from_points(POINTS).moved(lambda xy: xy * 2 + (1, 0))
    assert moved.body[0].tolist() == [1, 1, 0]
    assert moved.right_hand[-1].tolist() == pytest.approx([2641, 265, 132 / 133])


def test_a_track_costs_under_two_kilobytes_a_frame():
    track = PoseTrack(np.zeros((1000, 133, 3), np.float32), 64, 64)
    assert len(track) == 1000
    assert track.points.nbytes / len(track) < 2048


def test_a_body_wholly_outside_is_the_last_one_hands_and_face_are_not():
    track = np.stack([POINTS, POINTS, POINTS, POINTS])
    track[0, :, 0] = -5  # nothing before it: stays as it is
    track[2, :, 0] = -5
    track[3, :, 0] = -5
    track[3, 0, 0] = 5  # the nose is in the frame
    held = hold_lost_bodies(track)
    assert (held[0] == track[0]).all()
    assert (held[2, :23] == POINTS[:23]).all()
    assert (held[2, 23:] == track[2, 23:]).all()
    assert (held[3] == track[3]).all()
