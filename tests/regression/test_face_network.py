"""The face network on real faces: one person is near, another is far; the box may tremble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runner.errors import WeightsCorrupt
from runner.regression.face_network import FACE_FILES, SAME_PERSON, FaceNetwork, cut_square
from tests.regression.real_faces import ASTRONAUT_BOX, astronaut, face_networks, other_people, resized  # noqa: F401


@pytest.fixture(scope="module")
def network(face_networks: Path) -> FaceNetwork:  # noqa: F811
    return FaceNetwork.open(face_networks)


def test_one_person_is_near_and_others_are_far(network: FaceNetwork) -> None:
    picture, box = astronaut(), ASTRONAUT_BOX
    own = network.embed(picture, box)
    assert own.shape == (128,) and np.linalg.norm(own) == pytest.approx(1.4, abs=0.1)
    small = resized(picture, 0.75)
    brighter = np.clip(picture.astype(int) + 25, 0, 255).astype(np.uint8)
    same = (
        network.embed(small, tuple(end * 0.75 for end in box)),
        network.embed(picture, (box[0] + 4, box[1] - 4, box[2] + 4, box[3] - 4)),
        network.embed(brighter, box),
    )
    assert max(np.linalg.norm(own - one) for one in same) < 0.2
    others = [network.embed(*other) for other in other_people(4)]
    assert min(np.linalg.norm(own - one) for one in others) > SAME_PERSON + 0.1


def test_a_face_at_the_edge_of_the_picture_is_embedded(network: FaceNetwork) -> None:
    x1, y1, x2, y2 = ASTRONAUT_BOX
    cut = np.ascontiguousarray(astronaut()[y1:, x1:])
    whole = network.embed(astronaut(), ASTRONAUT_BOX)
    assert np.linalg.norm(network.embed(cut, (0, 0, x2 - x1, y2 - y1)) - whole) < SAME_PERSON


def test_the_face_fills_the_square_and_the_edge_is_repeated() -> None:
    """A box of 20x10 at the left edge: 1.6 times 20 are 32 pixels around (10, 50), from -6 to 26; red up to 6."""
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[:, :6, 0] = 255
    square = cut_square(picture, (0, 45, 20, 55))
    assert square.shape == (256, 256, 3)
    assert (square[:, :88] == (255, 0, 0)).all()
    assert (square[:, 104:] == 0).all()
    assert 92 <= (square[:, :, 0] > 127).sum(1).mean() <= 100


def test_files_that_are_no_networks_are_refused(tmp_path: Path) -> None:
    for name in FACE_FILES:
        (tmp_path / name).write_bytes(b"\x00" * 100)
    with pytest.raises(WeightsCorrupt, match="convert_faces"):
        FaceNetwork.open(tmp_path)
