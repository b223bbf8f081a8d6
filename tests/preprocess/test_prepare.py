"""Both passes on small clips whose every joint is known: windows, holding, bridging, replace, parity, errors."""

import gc
import threading
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from runner.errors import InputNotFound, InputTooShort, InputUnreadable, NoPerson, WeightsMissing
from runner.preprocess.body.skeleton import draw_skeleton
from runner.preprocess.geometry import frames_at_once
from runner.preprocess.networks.providers import CUDA
from runner.preprocess.networks.vitpose import crop_of
from runner.preprocess.pictures.sizing import padding_resize, resize_by_area
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from runner.timing import StageTimer
from runner.video import Mp4Writer, VideoReader
from tests.preprocess.conftest import DISC, HEIGHT, WIDTH, disc_frame
from tests.preprocess.tiny_networks import SHIFTS
from tests.video_files import remux

CENTRES = [(50 + 3 * i, 64 + (i % 5)) for i in range(30)]
GAPS = {0, 1, 7, 8, 9, 29}
WITH_GAPS = [None if i in GAPS else c for i, c in enumerate(CENTRES)]
SCALE = 1.25 * (2 * DISC + 1) * (256 / 192) / 64  # frame pixels a heatmap pixel


@pytest.fixture(scope="module")
def clip(tmp_path_factory, make_clip):
    return make_clip(tmp_path_factory.mktemp("clip") / "disc.mp4", CENTRES)


@pytest.fixture(scope="module")
def gappy(tmp_path_factory, make_clip):
    return make_clip(tmp_path_factory.mktemp("gappy") / "gaps.mp4", WITH_GAPS)


def options(**given) -> JobOptions:
    return JobOptions(**{"fps": "source", "size": "240x160", **given})


def same(a, b) -> bool:
    return (a.pose == b.pose).all() and (a.face == b.face).all()


@pytest.mark.parametrize("parity", [False, True])
def test_fps_above_rate_of_video_warns(preprocessor, reference, clip, parity):
    """The clip has 16 frames a second."""

    def warnings(fps) -> list[str]:
        conditions = preprocessor.prepare(reference, clip, options(fps=fps, preprocess={"parity": parity}))
        conditions.close()
        return [text for text in conditions.report["warnings"] if "fps" in text]

    (text,) = warnings(32)
    assert text.startswith("fps 32 is above the 16 of the driving video: frames are repeated. Set fps to 16 at most, ")
    assert "fps: 16 with output: {interpolate: 2}" in text
    assert len(warnings(17.5)) == 1
    assert warnings(16.01) == warnings(16) == warnings(8) == warnings("source") == []


def test_prepare_finds_all_joints_in_all_frames(preprocessor, reference, clip):
    timer = StageTimer()
    conditions = preprocessor.prepare(reference, clip, options(), timer=timer, face_size=64)
    assert (conditions.frames, conditions.fps) == (30, Fraction(16))
    assert (conditions.width, conditions.height, conditions.start_s) == (240, 160, 0)
    assert conditions.reference.size == (120, 208)
    expected = np.array(CENTRES)[:, None] + SHIFTS * SCALE
    assert np.abs(conditions.track.points[..., :2] - expected).max() < 2
    assert set(timer.seconds) == {"decode", "detect", "pose"}
    window = conditions.window(0, 30)
    assert "draw" in timer.seconds
    assert window.pose.shape == (30, 160, 240, 3)
    assert window.face.shape == (30, 64, 64, 3)
    assert window.background is None
    assert window.mask is None
    conditions.close()


@pytest.mark.gpu
def test_prepare_on_gpu_finds_all_joints(networks, reference, clip):
    import onnxruntime
    import torch

    if not (torch.cuda.is_available() and CUDA in onnxruntime.get_available_providers()):
        pytest.skip("no CUDA device, or an onnxruntime without CUDA")
    conditions = Preprocessor.load(*networks, device="cuda").prepare(reference, clip, options(), face_size=32)
    assert conditions.report["provider"] == CUDA
    assert conditions.report["frames_without_person"] == 0
    expected = np.array(CENTRES)[:, None] + SHIFTS * SCALE
    assert np.abs(conditions.track.points[..., :2] - expected).max() < 2
    conditions.close()


def test_skeleton_is_drawn_at_output_size(preprocessor, reference, clip):
    """192x128 into 240x160: 1.25 times as large, no bars. Nose and neck fall together here; the dot of the neck
    (255, 85, 0) lies under later dots, so the ends of the arms are looked for: right wrist, colour 4 of the list."""
    conditions = preprocessor.prepare(reference, clip, options(max_frames=20))
    for i, image in enumerate(conditions.window(10, 20).pose, start=10):
        wrist = conditions.track.points[i, 10, :2] * 1.25
        rows, columns = np.nonzero((image == (170, 255, 0)).all(-1))
        assert np.abs([columns.mean() - wrist[0], rows.mean() - wrist[1]]).max() < 2
        expected = (np.array(CENTRES[i]) + SHIFTS[10] * SCALE) * 1.25
        assert np.abs(wrist - expected).max() < 2.5
    conditions.close()


def test_windows_in_any_order_or_of_second_prepare_are_same(preprocessor, reference, gappy):
    conditions = preprocessor.prepare(reference, gappy, options(), face_size=32)
    whole = conditions.window(0, 30)
    for start, stop in [(25, 30), (0, 3), (7, 10), (3, 12), (29, 30), (0, 30)]:
        part = conditions.window(start, stop)
        assert (part.pose == whole.pose[start:stop]).all()
        assert (part.face == whole.face[start:stop]).all()
    conditions.close()
    conditions.close()
    again = preprocessor.prepare(reference, gappy, options(), face_size=32)
    assert same(again.window(6, 11), conditions.window(6, 11))
    for wrong in [(-1, 2), (3, 3), (5, 31)]:
        with pytest.raises(ValueError, match="clip of 30"):
            conditions.window(*wrong)
    again.close()
    conditions.close()


def test_frames_without_person_are_counted_and_hold_last_face(preprocessor, reference, gappy):
    conditions = preprocessor.prepare(reference, gappy, options(), face_size=32)
    assert conditions.report["frames_without_person"] == len(GAPS)
    assert conditions.report["frames_face_held"] == len(GAPS)
    window = conditions.window(0, 30)
    assert not window.pose[sorted(GAPS)].any()  # nobody there: nothing drawn, no guess
    assert window.pose[2].any()
    for frame, shown in {0: 2, 1: 2, 7: 6, 8: 6, 9: 6, 29: 28}.items():
        assert (window.face[frame] == window.face[shown]).all()
    assert (window.face[6] != window.face[10]).any()
    assert (window.face[2] != window.face[28]).any()
    conditions.close()


def test_boxes_are_bridged_in_gaps_and_held_at_ends(preprocessor, reference, gappy, monkeypatch):
    """Parity looks at the whole frame instead."""
    seen = []
    monkeypatch.setattr(
        "runner.preprocess.networks.vitpose.crop_of", lambda box, size: seen.append(box) or crop_of(box, size)
    )
    conditions = preprocessor.prepare(reference, gappy, options())
    assert conditions.report["frames_bridged"] == 3
    conditions.close()
    ours, seen[:] = list(seen), []
    preprocessor.prepare(reference, gappy, options(preprocess={"parity": True})).close()
    assert ours[0] == ours[1] == ours[2] is not None
    assert ours[29] == ours[28]
    for i, share in {7: 0.25, 8: 0.5, 9: 0.75}.items():
        expected = (1 - share) * np.array(ours[6].centre) + share * np.array(ours[10].centre)
        assert ours[i].centre == pytest.approx(expected)
    assert [i for i, box in enumerate(seen) if box is None] == sorted(GAPS)


def test_detect_every_4_looks_at_every_4th_frame(preprocessor, reference, clip, monkeypatch):
    looked = []
    rows = preprocessor.detector.rows
    monkeypatch.setattr(preprocessor.detector, "rows", lambda frames: looked.append(len(frames)) or rows(frames))
    conditions = preprocessor.prepare(reference, clip, options(preprocess={"detect_every": 4}))
    assert sum(looked) == 8  # frames 0, 4, … 28
    expected = np.array(CENTRES)[:, None] + SHIFTS[:11] * SCALE
    assert np.abs(conditions.track.points[:, :11, :2] - expected).max() < 4  # the box lags, the joints do not
    conditions.close()


def test_prepare_of_clip_without_person_is_no_person(preprocessor, reference, tmp_path, make_clip):
    empty = make_clip(tmp_path / "empty.mp4", [None] * 5)
    before = threading.active_count()
    for parity in (False, True):
        with pytest.raises(NoPerson, match=r"any of the 5 searched frames.*one person"):
            preprocessor.prepare(reference, empty, options(preprocess={"parity": parity}))
    assert threading.active_count() <= before


def test_prepare_with_bad_input_raises_its_input_error(preprocessor, reference, clip, tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(InputUnreadable):
        preprocessor.prepare(reference, tmp_path / "text.mp4", options())
    with pytest.raises(InputNotFound):
        preprocessor.prepare(tmp_path / "none.png", clip, options())
    with pytest.raises(InputTooShort):
        preprocessor.prepare(reference, clip, options(start_s=60))


def test_repeated_frame_is_posed_once(preprocessor, reference, clip, monkeypatch):
    posed = []
    decode = preprocessor.pose.decode
    monkeypatch.setattr(preprocessor.pose, "decode", lambda out, crops: posed.append(len(crops)) or decode(out, crops))
    conditions = preprocessor.prepare(reference, clip, options(fps=48), face_size=32)
    assert sum(posed) == 30
    assert conditions.frames == 90
    window = conditions.window(0, 90)
    assert (window.pose[0::3] == window.pose[1::3]).all()
    assert (window.face[0::3] == window.face[2::3]).all()
    conditions.close()


def test_window_decodes_only_its_frames(preprocessor, reference, clip, gappy, monkeypatch):
    read = []
    original = VideoReader.read
    monkeypatch.setattr(VideoReader, "read", lambda self, i: read.extend(np.asarray(i).tolist()) or original(self, i))
    conditions = preprocessor.prepare(reference, clip, options(), face_size=32)
    read.clear()
    conditions.window(5, 9)
    assert read == [5, 6, 7, 8]
    conditions.close()
    conditions = preprocessor.prepare(reference, gappy, options(), face_size=32)
    read.clear()
    conditions.window(0, 7)
    assert read == [2, 3, 4, 5, 6]
    read.clear()
    conditions.window(7, 10)  # the face of frame 6, kept from the window before
    assert read == []
    conditions.close()
    conditions.window(7, 10)
    assert read == [6]


def test_window_does_not_read_timeline_again(preprocessor, reference, clip, monkeypatch):
    conditions = preprocessor.prepare(reference, clip, options(), face_size=32)
    first = conditions.window(0, 4)
    conditions.close()  # from here on it stands alone
    again = conditions.window(0, 4)
    conditions.close()
    assert (first.face == again.face).all()
    conditions = preprocessor.prepare(reference, clip, options(), face_size=32)
    monkeypatch.setattr("runner.video.reader.read_timeline", lambda path: pytest.fail("it was known"))
    assert (conditions.window(0, 4).face == first.face).all()
    conditions.close()


def test_prepare_with_default_size_and_span_samples_and_letterboxes(preprocessor, reference, clip):
    conditions = preprocessor.prepare(reference, clip, JobOptions(fps=8, start_s=0.5, max_frames=5), face_size=32)
    assert (conditions.width, conditions.height) == (480, 832)
    assert conditions.frames == 5
    assert conditions.start_s == 0.5
    assert conditions.indices.tolist() == [8, 10, 12, 14, 16]
    window = conditions.window(0, 5)
    # letterboxed: 480 wide, 320 high, 256 above; the clip's middle row lies in the middle
    rows = np.nonzero(window.pose[0].any((1, 2)))[0]
    assert 256 <= rows[0] < rows[-1] < 576
    conditions.close()


def test_parity_draws_at_native_size_and_resamples(preprocessor, reference, clip):
    conditions = preprocessor.prepare(
        reference, clip, options(size="480x832", max_frames=5, preprocess={"parity": True})
    )
    assert (conditions.width, conditions.height) == (464, 832)  # as asked, but for a floor
    native = draw_skeleton(conditions.track.pose(4), WIDTH, HEIGHT)
    assert (conditions.window(4, 5).pose[0] == padding_resize(native, 464, 832)).all()
    conditions.close()


# --- replace ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """A mask video: white follows the disc; at the clip's rate, at half of it, and cut short or drawn out."""
    folder = tmp_path_factory.mktemp("masks")

    def write(name, centres, fps):
        frames = np.zeros((len(centres), HEIGHT, WIDTH, 3), np.uint8)
        for frame, (x, y) in zip(frames, centres, strict=True):
            frame[y - 24 : y + 24, x - 24 : x + 24] = 255
        with Mp4Writer(folder / name, WIDTH, HEIGHT, Fraction(fps), crf=10) as writer:
            writer.write(frames)
        return folder / name

    return {
        "same": write("same.mp4", CENTRES, 16),
        "half": write("half.mp4", CENTRES[::2], 8),
        "short": write("short.mp4", CENTRES[:20], 16),
        "long": write("long.mp4", CENTRES + CENTRES, 16),
    }


def replace(**given) -> JobOptions:
    return options(mode="replace", **given)


@pytest.mark.parametrize("name", ["same", "half"])
def test_replace_window_follows_mask(preprocessor, reference, clip, masks, name):
    conditions = preprocessor.prepare(reference, clip, replace(), mask=masks[name], face_size=32)
    window = conditions.window(4, 12)
    assert window.mask.shape == (8, 160, 240)
    assert set(np.unique(window.mask)) == {0, 255}
    assert not window.background[window.mask > 0].any()
    for i in range(8):
        x, y = CENTRES[(i + 4) // 2 * 2 if name == "half" else i + 4]
        rows, columns = np.nonzero(window.mask[i])
        assert (columns.mean(), rows.mean()) == pytest.approx((1.25 * x, 1.25 * y), abs=2)
        assert len(rows) == pytest.approx(60 * 60, rel=0.1)
        outside = window.background[i][window.mask[i] == 0]
        assert np.median(outside) == pytest.approx(20, abs=4)  # the clip's ground
    assert (conditions.window(6, 7).background[0] == window.background[2]).all()
    conditions.close()


def test_replace_with_auto_size_and_still_mask_takes_size_of_video(preprocessor, reference, clip, tmp_path):
    mask = np.zeros((HEIGHT * 2, WIDTH * 2), np.uint8)
    mask[:, WIDTH:] = 200
    mask[:, :20] = 100  # grey below one half is black
    Image.fromarray(mask).save(tmp_path / "m.png")
    conditions = preprocessor.prepare(reference, clip, replace(size="auto"), mask=tmp_path / "m.png", face_size=32)
    assert (conditions.width, conditions.height) == (768, 512)  # 3:2: 774 and 516
    window = conditions.window(0, 2)
    assert (window.mask[:, :, 384:] == 255).all()
    assert not window.mask[:, :, :384].any()
    conditions.close()


def test_parity_replace_resizes_frames_before_poses(preprocessor, reference, clip, masks):
    chosen = replace(size="240x160", preprocess={"parity": True})
    conditions = preprocessor.prepare(reference, clip, chosen, mask=masks["same"], face_size=32)
    assert (conditions.width, conditions.height) == (240, 160)
    assert (conditions.track.width, conditions.track.height) == (240, 160)
    with VideoReader(clip) as reader:
        reader.sample("source", parity=True)
        expected = resize_by_area(reader.read(np.array([3]))[0], 240 * 160)
    window = conditions.window(3, 4)
    assert (np.where(window.mask[0, :, :, None] > 0, 0, expected) == window.background[0]).all()
    assert (window.pose[0] == draw_skeleton(conditions.track.pose(3), 240, 160)).all()
    conditions.close()


def test_parity_of_trimmed_video_has_frames_of_decord(preprocessor, reference, clip, tmp_path):
    """decord shows frames that the edit list hides, so it counts more of them than PyAV."""
    decord = pytest.importorskip("decord")
    trimmed = remux(clip, tmp_path / "trimmed.mp4", video_shift_s=-0.3)
    Image.fromarray(np.repeat(np.uint8([0] * 60 + [255] * 180)[None], 160, 0)).save(tmp_path / "mask.png")
    chosen = replace(size="240x160", fps="source", preprocess={"parity": True})
    conditions = preprocessor.prepare(reference, trimmed, chosen, mask=tmp_path / "mask.png", face_size=32)
    frames = decord.VideoReader(str(trimmed), num_threads=1)
    with VideoReader(trimmed) as ours:
        assert ours.info.frames < len(frames)
    assert conditions.report["source_frames"] == len(frames) == 30
    assert conditions.frames == 25  # by the official rule: the last frame ends at 1.575 s
    expected = frames.get_batch(range(25)).asnumpy()
    for _ in range(2):
        window = conditions.window(2, 25)
        for background, mask, frame in zip(window.background, window.mask, expected[2:], strict=True):
            resized = resize_by_area(frame, 240 * 160)
            assert (np.where(mask[..., None] > 0, 0, resized) == background).all()
        conditions.close()  # the second time, the video is opened again


def test_replace_with_missing_or_unfit_mask_is_refused(preprocessor, reference, clip, masks, tmp_path):
    with pytest.raises(WeightsMissing, match="mask:"):  # this preprocessor has no segmenter to make one
        preprocessor.prepare(reference, clip, replace())
    with pytest.raises(InputTooShort, match=r"1\.25 s \(20 frames\).*1\.88 s \(30 frames\)"):
        preprocessor.prepare(reference, clip, replace(), mask=masks["short"])
    with pytest.raises(InputUnreadable, match=r"3\.75 s \(60 frames\)"):
        preprocessor.prepare(reference, clip, replace(), mask=masks["long"])
    Image.new("L", (WIDTH, HEIGHT), 100).save(tmp_path / "black.png")
    with pytest.raises(InputUnreadable, match="empty"):
        preprocessor.prepare(reference, clip, replace(), mask=tmp_path / "black.png")
    Image.new("L", (WIDTH, WIDTH), 255).save(tmp_path / "square.png")
    with pytest.raises(InputUnreadable, match=r"192x192.*192x128"):
        preprocessor.prepare(reference, clip, replace(), mask=tmp_path / "square.png")
    with pytest.raises(InputNotFound):
        preprocessor.prepare(reference, clip, replace(), mask=tmp_path / "none.mp4")


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_prepare_memory_does_not_grow_with_clip_length(preprocessor, reference, tmp_path):
    """No array that outlives `prepare` has a frame's worth of bytes a frame."""
    path = tmp_path / "long.mp4"
    with Mp4Writer(path, WIDTH, HEIGHT, Fraction(16), crf=30) as writer:
        for i in range(0, 120, 20):
            writer.write(np.stack([disc_frame((40 + (i + k) % 100, 60)) for k in range(20)]))
    tracemalloc.start()
    try:
        conditions = preprocessor.prepare(reference, path, options(preprocess={"detect_every": 8}))
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()  # what it needs on the way: test_long_clip
    finally:
        tracemalloc.stop()
    assert held < 120 * 4096 + 1_000_000  # the reference and some small things besides the poses
    assert conditions.track.points.nbytes == 120 * 133 * 3 * 4
    conditions.close()


def test_frames_at_once_is_smaller_for_large_frames():
    assert frames_at_once(192, 128) == 16
    assert frames_at_once(1920, 1080) == 4
    assert frames_at_once(8192, 4320) == 1
