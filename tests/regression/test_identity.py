"""Identity on real faces and known pictures: who is found to be another, and what is said to be not measurable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from runner.errors import WeightsCorrupt
from runner.records.people import People, make_people
from runner.regression import identity
from runner.regression.face_network import SAME_PERSON
from runner.regression.identity import (
    FACE_GATED,
    MOST_FRAMES,
    ImageEncoder,
    MetricNetworks,
    face_is_gated,
    frames_to_look_at,
    measure_identity,
)
from tests.preprocess.test_real import MAN, REAL
from tests.regression.real_faces import ASTRONAUT_BOX, astronaut, face_networks, other_people, resized  # noqa: F401
from tests.regression.test_lpips import random_weights

NONE = (np.nan,) * 4


@dataclass
class Video:
    """Frames in memory."""

    pictures: list[np.ndarray]
    fps: Fraction | None = Fraction(16)

    @property
    def frames(self) -> int:
        return len(self.pictures)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.pictures[0].shape[:2]
        return width, height

    def frame(self, i: int) -> np.ndarray:
        return self.pictures[i]


def people(video: Video, faces: list, persons: list | None = None) -> People:
    boxes = persons or faces
    return make_people(np.array(boxes, float), np.array(faces, float), *video.size, video.fps or Fraction(16))


def moved(picture: np.ndarray, box: Sequence[float], count: int) -> tuple[Video, People]:
    """A clip in which the picture wanders by two pixels a frame."""
    x1, y1, x2, y2 = box
    video = Video([np.roll(picture, (i, 2 * i), (0, 1)) for i in range(count)])
    return video, people(video, [(x1 + 2 * i, y1 + i, x2 + 2 * i, y2 + i) for i in range(count)])


@pytest.fixture(scope="module")
def faces(face_networks: Path) -> MetricNetworks:  # noqa: F811
    found = MetricNetworks.open(face_networks.parent)
    assert found.faces is not None
    assert found.lpips is None and found.encoder is None
    return found


def test_face_distance_finds_other_person(faces: MetricNetworks) -> None:
    baseline, where = moved(astronaut(), ASTRONAUT_BOX, 4)
    brighter = Video([np.clip(p.astype(int) + 20, 0, 255).astype(np.uint8) for p in baseline.pictures])
    same = measure_identity(brighter, baseline, where, where, networks=faces, at=range(4))
    assert same.face_distance < 0.2
    assert same.face_worst < 0.2
    assert (same.face_pixels, same.frames, face_is_gated(same)) == (98, 4, True)
    picture, box = other_people(1)[0]
    other, where_other = moved(picture, box, 4)
    found = measure_identity(other, baseline, where_other, where, networks=faces, at=range(4))
    assert found.face_distance > SAME_PERSON + 0.1
    assert face_is_gated(found)
    assert "face_distance" not in found.why and "face_gate" not in found.why
    assert set(found.why) == {"cosine", "lpips"}


def test_face_worst_names_worst_window(faces: MetricNetworks) -> None:
    """Two frames of eight show another person: the mean hides it, the window does not."""
    baseline, where = moved(astronaut(), ASTRONAUT_BOX, 8)
    picture, box = other_people(1)[0]
    changed = Video(list(baseline.pictures))
    boxes = [where.face(i) for i in range(8)]
    for i in (4, 5):
        changed.pictures[i], boxes[i] = picture, box
    found = measure_identity(changed, baseline, people(changed, boxes), where, networks=faces, at=range(8))
    assert found.face_frame in (4, 5)
    assert found.face_worst > 2 * found.face_distance
    single = measure_identity(changed, baseline, people(changed, boxes), where, networks=faces, at=[4])
    assert (single.face_frame, single.face_worst) == (4, single.face_distance)


@pytest.mark.parametrize(
    ("side", "measured", "gated"), [(31, False, False), (32, True, False), (63, True, False), (64, True, True)]
)
def test_face_distance_of_small_face_is_not_measured_or_not_gated(
    faces: MetricNetworks, side: int, measured: bool, gated: bool
) -> None:
    """The smaller face of the two videos decides."""
    large = Video([astronaut()])
    small = Video([astronaut()])
    x, y = ASTRONAUT_BOX[:2]
    where = people(small, [(x, y, x + side, y + side)])
    found = measure_identity(small, large, where, people(large, [ASTRONAUT_BOX]), networks=faces, at=[0])
    assert found.face_pixels == side
    assert (found.face_distance is not None) == measured
    assert face_is_gated(found) == gated
    assert ("below 32" in found.why.get("face_distance", "")) == (not measured)
    assert (f"below {FACE_GATED}" in found.why.get("face_gate", "")) == (measured and not gated)


def test_measure_identity_names_what_is_missing(faces: MetricNetworks, tmp_path: Path) -> None:
    none = MetricNetworks.open(None)
    assert (none.encoder, none.lpips, none.faces) == (None, None, None) and faces.faces is not None
    video = Video([astronaut()])
    where = people(video, [ASTRONAUT_BOX])
    found = measure_identity(video, video, where, where, networks=none, at=[0])
    assert set(found.why) == {"cosine", "lpips", "face_distance"}
    assert found.why["lpips"] == "no model store was given: --models"
    empty = MetricNetworks.open(tmp_path)
    assert "convert_lpips" in empty.why["lpips"] and "convert_faces" in empty.why["face_distance"]
    assert "no image encoder" in empty.why["cosine"]
    for new, baseline, words in ((None, None, "neither output has"), (where, None, "the baseline output does not")):
        found = measure_identity(video, video, new, baseline, networks=faces, at=[0])
        assert found.face_distance is None
        assert words in found.why["face_distance"] and "people.json" in found.why["face_distance"]
    no_face = people(video, [NONE], [(0, 0, 50, 50)])
    found = measure_identity(video, video, no_face, where, networks=faces, at=[0])
    assert "no examined frame shows a face with high confidence" in found.why["face_distance"]


def test_metric_networks_without_dlib_name_extra(face_networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "dlib", None)
    assert "[faces]" in MetricNetworks.open(face_networks.parent).why["face_distance"]


def test_metric_networks_with_damaged_lpips_file_raise_weights_corrupt(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/lpips-alex.safetensors").write_bytes(b"half")
    with pytest.raises(WeightsCorrupt):
        MetricNetworks.open(tmp_path)


def test_lpips_names_worst_of_examined_frames(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    save_file(random_weights(), tmp_path / "metrics/lpips-alex.safetensors")
    networks = MetricNetworks.open(tmp_path)
    picture = resized(astronaut(), 0.25)
    baseline = Video([picture] * 6)
    new = Video([cv2.GaussianBlur(picture, (0, 0), sigma) for sigma in (0.3, 2.0, 0.6, 4.0, 0.3)])
    found = measure_identity(new, baseline, None, None, networks=networks, at=[0, 1, 2, 5])
    assert (found.lpips_frame, found.frames) == (1, 3)  # frame 3 was not examined, and frame 5 is not in both
    assert found.lpips == pytest.approx(networks.lpips.distance(new.pictures[1], picture))
    assert "lpips" not in found.why
    other = measure_identity(Video([astronaut()]), baseline, None, None, networks=networks, at=[0])
    assert (other.lpips, other.why["lpips"]) == (None, "the sizes of the two outputs differ")
    small = Video([picture[:63]])
    assert "64 pixels" in measure_identity(small, small, None, None, networks=networks, at=[0]).why["lpips"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an image encoder of random weights, as small as the demo's, and nothing else."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(5)
    model = CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **sizes))
    model.save_pretrained(root / "any/image_encoder")
    square = {"height": 28, "width": 28}
    processor = CLIPImageProcessorPil(
        size=square, crop_size=square, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(root / "any/image_processor")
    return root


def test_image_encoder_with_random_weights_is_not_used(store: Path) -> None:
    why = MetricNetworks.open(store).why["cosine"]
    assert "not trained" in why and "parameters" in why


@pytest.fixture
def encoder(store: Path, monkeypatch: pytest.MonkeyPatch) -> ImageEncoder:
    """As if the random one were a trained one."""
    monkeypatch.setattr(identity, "LEAST_PARAMETERS", 0)
    found = MetricNetworks.open(store).encoder
    assert found is not None
    return found


def by_the_library(encoder: ImageEncoder, picture: np.ndarray) -> torch.Tensor:
    """The image processor of the store, and the model, as the library runs them."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    processor = CLIPImageProcessorPil.from_pretrained(encoder.folder.parent / "image_processor")
    pixels = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        return CLIPVisionModel.from_pretrained(encoder.folder)(pixel_values=pixels).pooler_output[0]


def test_cosine_is_of_box_of_person(encoder: ImageEncoder) -> None:
    networks = MetricNetworks(encoder=encoder)
    picture, box = astronaut(), (100, 20, 381, 441)
    changed = picture.copy()
    changed[:20] = 0  # outside of the box
    other = picture.copy()
    other[20:441, 100:381] = other[20:441, 100:381][::-1]
    baseline, new = Video([picture] * 3), Video([changed, other, changed])
    where = people(baseline, [NONE] * 3, [box] * 3)
    found = measure_identity(new, baseline, where, where, networks=networks, at=[0, 1, 2])
    assert found.cosine_frame == 1
    same = measure_identity(new, baseline, where, where, networks=networks, at=[0, 2])
    assert same.cosine == pytest.approx(1, abs=1e-5)
    cuts = [encoder.cut(p, box) for p in (other, picture)]
    assert cuts[0].shape == (28, 28, 3)
    assert (np.abs(cuts[0][:, 0].astype(int) - np.round(np.array(encoder.mean) * 255)) <= 1).all()  # 281 wide of 421
    expected = torch.nn.functional.cosine_similarity(*(by_the_library(encoder, cut) for cut in cuts), dim=0)
    assert found.cosine == pytest.approx(float(expected), abs=1e-4)
    nowhere = people(baseline, [NONE] * 3, [NONE] * 3)
    assert (
        "no examined frame" in measure_identity(new, baseline, where, nowhere, networks=networks, at=[0]).why["cosine"]
    )


def test_image_encoder_with_missing_tensor_is_refused(encoder: ImageEncoder, tmp_path: Path) -> None:
    shutil.copytree(encoder.folder, tmp_path / "image_encoder")
    file = tmp_path / "image_encoder/model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.endswith("fc1.weight")))
    save_file(tensors, file, metadata={"format": "pt"})
    broken = ImageEncoder.open(tmp_path / "image_encoder")
    with pytest.raises(WeightsCorrupt, match="1 missing tensors"):
        broken.embed([np.zeros((28, 28, 3), np.uint8)])
    (tmp_path / "image_encoder/config.json").write_text(json.dumps({"hidden_size": "wide"}), encoding="utf-8")
    with pytest.raises(WeightsCorrupt):
        ImageEncoder.open(tmp_path / "image_encoder")


def test_boxes_are_matched_by_time_and_scaled_to_video_size(faces: MetricNetworks) -> None:
    """The output has twice the rate and twice the size of its boxes; as PNG frames, it does not know its rate."""
    small, where = moved(resized(astronaut(), 0.5), [end / 2 for end in ASTRONAUT_BOX], 3)
    twice = [p for p in (cv2.resize(f, None, fx=2, fy=2) for f in small.pictures) for _ in range(2)][:-1]
    new = Video(twice, None)
    found = measure_identity(new, new, where, where, networks=faces, at=[4], fps=(Fraction(32), Fraction(32)))
    assert found.face_pixels == pytest.approx(98, abs=4)
    assert found.face_distance == 0
    other = measure_identity(new, new, where, where, networks=faces, at=[2], fps=(Fraction(32), None))
    assert 0 < other.face_distance < 0.2  # entry 1 in one video, entry 2 in the other, whose rate is not known


@given(
    frames=st.integers(0, 5000),
    joints=st.lists(st.integers(-5, 6000), max_size=100),
    worst=st.lists(st.integers(-5, 6000), max_size=20),
)
def test_frames_to_look_at_are_few_and_in_order(frames: int, joints: list[int], worst: list[int]) -> None:
    found = frames_to_look_at(frames, joints, worst)
    assert found == sorted(set(found))
    assert all(0 <= i < frames for i in found)
    assert len(found) == min(frames, MOST_FRAMES)
    valid = [i for i in worst if 0 <= i < frames]
    assert valid[:1] == [i for i in valid[:1] if i in found]
    if any(0 < joint < frames for joint in joints):
        assert any({joint - 1, joint} <= set(found) for joint in joints)
    if frames > 100:
        assert len([i for i in found if i < frames / 2]) >= 2 and len([i for i in found if i >= frames / 2]) >= 2


def test_frames_to_look_at_of_short_clip_are_all_frames() -> None:
    assert frames_to_look_at(7, [3], [6]) == list(range(7))
    assert frames_to_look_at(1000, [500], [3], most=6) == [3, 83, 166, 499, 500, 833]
    many = frames_to_look_at(1000, range(100, 1000, 100), [7])
    assert {7, 299, 300, 699, 700} < set(many)
    assert not {199, 200, 899, 900} & set(many)


@pytest.mark.real
@pytest.mark.skipif(not MAN.is_file(), reason="the shared folder of real models and clips is not here")
def test_face_distance_tells_real_people_apart(faces: MetricNetworks, face_networks: Path) -> None:  # noqa: F811
    """A man's face at three sizes matches itself where it can be measured, and never a woman's."""
    from runner.preprocess.prepare import Preprocessor
    from runner.spec.options import JobOptions
    from runner.video import VideoReader

    real = Preprocessor.load(REAL / "person_detector.onnx", REAL / "wholebody_pose_full.onnx")
    conditions = real.prepare(
        REAL / "reference_woman_fullbody.png", MAN, JobOptions(fps=4, size="480x480"), face_size=64
    )
    with VideoReader(MAN) as reader:
        pictures = list(reader.read(conditions.indices))
    conditions.close()
    boxes = conditions.people
    first, second = Video(pictures[:4]), Video(pictures[7:11])
    one = people(first, [boxes.face(i) for i in range(4)])
    two = people(second, [boxes.face(i) for i in range(7, 11)])
    found = {}
    for factor in (0.9, 1.25, 2.25):
        videos = [Video([cv2.resize(p, None, fx=factor, fy=factor) for p in v.pictures]) for v in (first, second)]
        where = [p.resized(*v.size) for p, v in zip((one, two), videos, strict=True)]
        found[factor] = measure_identity(*videos, *where, networks=faces, at=range(4))
    assert found[0.9].face_distance is None
    assert "below 32" in found[0.9].why["face_distance"]
    assert "face_gate" in found[1.25].why and not face_is_gated(found[1.25])
    assert face_is_gated(found[2.25])
    assert max(found[1.25].face_distance, found[2.25].face_distance) < SAME_PERSON
    woman, at = moved(astronaut(), ASTRONAUT_BOX, 4)
    other = measure_identity(woman, videos[0], at, where[0], networks=faces, at=range(4))
    assert face_is_gated(other)
    assert other.face_distance > max(SAME_PERSON, found[2.25].face_distance + 0.2)
