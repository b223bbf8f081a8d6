"""Inputs of every kind that people have, through pass 1 and a window: the joints are where they should be."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from runner.preprocess.body.keypoints import FACE
from runner.preprocess.body.skeleton import COLOURS, THRESHOLD
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from tests.preprocess.conftest import DISC, disc_frame
from tests.video_files import make_clip as encode
from tests.video_files import make_vfr

N, WIDTH, HEIGHT = 20, 192, 128
PLACES = [(50 + 3 * i, 60 + i % 3) for i in range(N)]


def pictures(places=PLACES, size=(WIDTH, HEIGHT)):
    return [disc_frame(place, size) for place in places]


def prepared(preprocessor, reference, path, **given):
    return preprocessor.prepare(
        reference, path, JobOptions(**{"fps": "source", "size": "240x160", **given}), face_size=32
    )


def noses(conditions) -> np.ndarray:
    return conditions.track.points[:, 0, :2]


@pytest.mark.parametrize("gone", [range(8), range(6, 13), range(12, N)], ids=["start", "middle", "end"])
def test_absent_for_a_while(preprocessor, reference, tmp_path, gone):
    places = [None if i in gone else place for i, place in enumerate(PLACES)]
    path = encode(tmp_path / "gone.mp4", N, 10, size=(WIDTH, HEIGHT), pixels=pictures(places))
    conditions = prepared(preprocessor, reference, path)
    assert conditions.report["frames_without_person"] == len(gone)
    assert conditions.report["frames_face_held"] == len(gone)
    window = conditions.window(0, N)
    drawn = window.pose.any((1, 2, 3))
    assert drawn.tolist() == [i not in gone for i in range(N)]
    assert window.face.any((1, 2, 3)).all()  # held
    there = [i for i in range(N) if i not in gone]
    assert np.abs(noses(conditions)[there] - np.array(PLACES)[there]).max() < 3
    conditions.close()


def test_half_out_of_the_frame(preprocessor, reference, tmp_path):
    places = [(12 * i - 20, 64) for i in range(N)]  # comes in from the left and goes out on the right
    path = encode(tmp_path / "half.mp4", N, 16, size=(WIDTH, HEIGHT), pixels=pictures(places))
    conditions = prepared(preprocessor, reference, path)
    inside = [i for i, (x, _) in enumerate(places) if DISC <= x <= WIDTH - DISC]
    assert np.abs(noses(conditions)[inside] - np.array(places)[inside]).max() < 4
    partly = [i for i, (x, _) in enumerate(places) if -5 < x < DISC or WIDTH - DISC < x < WIDTH + 5]
    assert (conditions.track.points[partly, 0, 2] > THRESHOLD / 2).any()
    for i in range(N):  # never a crop of nothing, never one that wraps around the edge
        x1, x2, y1, y2 = conditions.faces.boxes[i]
        assert 0 <= x1 < x2 <= WIDTH
        assert 0 <= y1 < y2 <= HEIGHT
    assert conditions.window(0, N).face.shape == (N, 32, 32, 3)
    conditions.close()


BACK = (250, 200, 140)  # of a disc seen from behind
HEAD = {0: (0, -14), 1: (4, -18), 2: (-4, -18), 3: (9, -16), 4: (-9, -16)}  # nose, eyes, ears: pixels off its centre


class HasAFrontAndABack:
    """The tiny pose network with a head above the disc; of a head from behind it is unsure, as networks are."""

    def __init__(self, estimator) -> None:
        self._estimator, self.network, self.input_size = estimator, estimator.network, estimator.input_size
        self._behind: dict[int, bool] = {}  # id of a crop

    def cut(self, frame, box, *, out, bgr=False):
        crop = self._estimator.cut(frame, box, out=out, bgr=bgr)
        x, y = (round(at) for at in box.centre)
        self._behind[id(crop)] = frame[y, x, 2] < 190
        return crop

    def decode(self, output, crops) -> np.ndarray:
        found = self._estimator.decode(output, crops)
        for points, crop in zip(found, crops, strict=True):
            for joint, off in HEAD.items():
                points[joint, :2] = points[joint, :2] + off
            if self._behind.pop(id(crop)):
                points[list(HEAD), 2] *= 0.2
                points[FACE, 2] *= 0.2
        return found


@pytest.mark.parametrize(
    "away", [range(6), range(8, 14), range(14, N), range(N)], ids=["start", "middle", "end", "all"]
)
def test_turned_away(preprocessor, reference, tmp_path, away):
    """Who turns their back keeps their body; no face is drawn or cropped out of the back of a head."""
    shown = pictures()
    for i in away:
        cv2.circle(shown[i], PLACES[i], DISC, BACK, -1)
    path = encode(tmp_path / "turned.mp4", N, 10, size=(WIDTH, HEIGHT), pixels=shown)
    sees = Preprocessor(preprocessor.detector, HasAFrontAndABack(preprocessor.pose))
    conditions = prepared(sees, reference, path, size=f"{WIDTH}x{HEIGHT}")
    report, points = conditions.report, conditions.track.points
    assert report["frames_without_person"] == 0
    assert report["frames_face_held"] == len(away)
    assert report["face_seen"] == (len(away) < N)
    assert any("No face was seen" in text for text in report["warnings"]) == (len(away) == N)
    shoulders = points[:, 5:7]
    assert shoulders[..., 2].min() >= THRESHOLD
    assert np.abs(shoulders[..., :2].mean(1) - PLACES).max() < 3
    window = conditions.window(0, N)
    nose, right, left = ((window.pose == COLOURS[k]).all(-1).any((1, 2)) for k in (0, 2, 5))
    assert nose.tolist() == [i not in away for i in range(N)]
    assert (right & left).all()  # the shoulders
    if len(away) == N:
        assert not window.face.any()
    else:
        last = [max((k for k in range(i + 1) if k not in away), default=min(set(range(N)) - {*away})) for i in range(N)]
        assert conditions.faces.sources.tolist() == last
        assert (window.face == window.face[last]).all()
        assert window.face.any((1, 2, 3)).all()
    conditions.close()


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_phone_held_upright(preprocessor, reference, tmp_path, rotation):
    """Stored lying down, shown upright: boxes, joints and the output's shape are those of the picture as shown."""
    upright = (WIDTH, HEIGHT) if rotation == 180 else (HEIGHT, WIDTH)
    places = [(50 + i, 60 + 3 * i) if rotation != 180 else (50 + 3 * i, 60) for i in range(N)]
    shown = pictures(places, upright)
    turns = {90: 1, 180: 2, 270: 3}[rotation]
    for k in (turns, -turns):  # which way a tag turns is the container's affair; one of the two is the inverse
        stored = [np.ascontiguousarray(np.rot90(p, k)) for p in shown]
        path = encode(tmp_path / f"turned{k}.mp4", N, 16, size=(WIDTH, HEIGHT), pixels=stored, rotation=rotation)
        conditions = prepared(preprocessor, reference, path)
        assert (conditions.track.width, conditions.track.height) == upright
        right = np.abs(noses(conditions) - np.array(places)).max() < 3
        conditions.close()
        if right:
            return
    pytest.fail("in neither direction the joints are where the upright picture has them")


def test_variable_frame_rate(preprocessor, reference, tmp_path):
    """The first half at 30 fps, then at 10: sampled at 10, every frame shows what was on screen then."""
    stamps = [33 * i for i in range(10)] + [330 + 100 * i for i in range(N - 10)]
    path = make_vfr(tmp_path / "vfr.mp4", stamps, size=(WIDTH, HEIGHT), pixels=pictures())
    conditions = prepared(preprocessor, reference, path, fps=10)
    on_screen = [max(k for k, stamp in enumerate(stamps) if stamp <= 100 * i + 1) for i in range(conditions.frames)]
    assert conditions.frames >= 12
    assert conditions.indices.tolist() == on_screen
    assert np.abs(noses(conditions) - np.array(PLACES)[on_screen]).max() < 3
    conditions.close()


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("libx265", "yuv420p10le"), ("libsvtav1", "yuv420p"), ("libx264", "gray")],
    ids=["hevc-10-bit", "av1", "grey"],
)
def test_codecs(preprocessor, reference, tmp_path, codec, pix_fmt):
    path = encode(tmp_path / "clip.mp4", N, 16, size=(WIDTH, HEIGHT), codec=codec, pix_fmt=pix_fmt, pixels=pictures())
    conditions = prepared(preprocessor, reference, path)
    assert np.abs(noses(conditions) - np.array(PLACES)).max() < 4
    assert conditions.report["frames_without_person"] == 0
    conditions.close()


# --- references ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clip") / "c.mp4", 4, 16, size=(WIDTH, HEIGHT), pixels=pictures(PLACES[:4]))


def character() -> np.ndarray:
    """A disc on dark ground, 160 wide and 240 high."""
    picture = np.full((240, 160, 3), 20, np.uint8)
    cv2.circle(picture, (60, 90), 40, (250, 250, 250), -1)
    return picture


def save(kind: str, path) -> None:
    image = Image.fromarray(character())
    if kind == "alpha":
        image.putalpha(Image.fromarray(np.where(character().max(-1) > 128, 255, 0).astype(np.uint8)))
        image.save(path)
    elif kind == "cmyk":
        image.convert("CMYK").save(path, "JPEG", quality=95)
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # stored turned by a quarter to the left; shown, it is turned back
        image.transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", quality=95, exif=exif)
    elif kind == "grey":
        image.convert("L").save(path)
    else:
        image.save(path, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


@pytest.mark.parametrize("kind", ["alpha", "cmyk", "exif", "grey", "icc"])
def test_references(preprocessor, clip, tmp_path, kind):
    path = tmp_path / ("r.jpg" if kind in {"cmyk", "exif"} else "r.png")
    save(kind, path)
    conditions = prepared(preprocessor, path, clip, size="auto")
    assert conditions.reference.size == (160, 240)
    assert conditions.reference.mode == "RGB"
    assert conditions.width < conditions.height
    pixels = np.asarray(conditions.reference).astype(int)
    assert pixels[90, 60].min() > 225
    ground = pixels[200, 130]
    assert ground.min() > 250 if kind == "alpha" else ground.max() < 50  # nothing is shown as white
    conditions.close()
    if kind != "alpha":  # there, the tiny detector takes the white ground for the person
        given = preprocessor._pose_of(conditions.reference, path, JobOptions(), preprocessor._backend("vitpose"))
        assert given.points[0, 0, :2] == pytest.approx([60, 90], abs=5)
