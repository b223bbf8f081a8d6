"""Official files: what is written reads back as it was, by our reader and by another; what does not fit is refused."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.errors import InputError, InputNotFound, InputTooShort, InputUnreadable
from runner.preprocess.conditions import ConditionFrames
from runner.preprocess.official_files import OfficialConditions, official_files, run_preprocess, write_official
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from tests.video_files import indexed_frame, make_clip, read_index

FRAMES = 10


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.fixture(scope="module")
def demo(demo_models) -> Preprocessor:
    checkpoint = demo_models / "process_checkpoint"
    return Preprocessor.load(
        checkpoint / "det" / "yolov10m.onnx", checkpoint / "pose2d" / "vitpose_h_wholebody.onnx", device="cpu"
    )


@pytest.fixture(scope="module")
def made(demo, demo_media, tmp_path_factory) -> Callable[[str], tuple[dict, ConditionFrames, Path, JobOptions]]:
    """made(mode): a demo dance through `run_preprocess`, and the window that it was made of; once a mode."""
    results = {}

    def make(mode: str) -> tuple[dict, ConditionFrames, Path, JobOptions]:
        if mode not in results:
            options = JobOptions(mode=mode, size="240x160", fps=12.5, start_s=0.5, max_frames=FRAMES)
            folder = tmp_path_factory.mktemp(mode)
            mask = demo_media / "masks" / "step.mp4" if mode == "replace" else None
            inputs = demo_media / "references" / "anna.png", demo_media / "dances" / "step.mp4"
            (folder / "src_mask.mp4").write_bytes(b"of an earlier run")
            summary = run_preprocess(*inputs, folder, options, demo, mask=mask)
            conditions = demo.prepare(*inputs, options, mask=mask)
            results[mode] = summary, conditions.window(0, FRAMES), folder, options
            conditions.close()
        return results[mode]

    return make


def test_official_files_of_animate_job_read_back(made, demo_media):
    summary, window, folder, _ = made("animate")
    assert sorted(p.name for p in folder.iterdir()) == ["src_face.mp4", "src_pose.mp4", "src_ref.png"]
    assert (summary["frames"], summary["fps"], summary["width"], summary["height"]) == (FRAMES, 12.5, 240, 160)
    read = OfficialConditions.open(folder, JobOptions())
    assert (read.frames, read.fps, read.width, read.height) == (FRAMES, Fraction(25, 2), 240, 160)
    again = read.window(0, FRAMES)
    assert again.background is None and again.mask is None
    assert again.pose.shape == window.pose.shape and again.face.shape == window.face.shape == (FRAMES, 512, 512, 3)
    # Thin coloured lines share their colour among 2x2 pixels: this is what 4:2:0 leaves of them at any quality.
    assert psnr(again.pose, window.pose) > 28
    assert psnr(again.face, window.face) > 35
    # Black stays black, and what was drawn is there.
    drawn = window.pose.max(-1) > 0
    assert again.pose[~drawn].mean() < 3 and again.pose[drawn].mean() > 0.6 * window.pose[drawn].mean()
    with Image.open(demo_media / "references" / "anna.png") as picture:
        np.testing.assert_array_equal(np.asarray(read.reference), np.asarray(picture.convert("RGB")))
    read.close()


def test_official_files_of_replace_job_read_back_with_exact_mask(made):
    _, window, folder, options = made("replace")
    assert window.mask is not None and window.background is not None
    read = OfficialConditions.open(folder, options.model_copy(update={"start_s": 0.0}))
    again = read.window(0, FRAMES)
    assert 0.005 < (window.mask > 0).mean() < 0.5
    np.testing.assert_array_equal(again.mask, window.mask)
    assert not again.background[again.mask > 0].any()
    assert psnr(again.background, window.background) > 32
    np.testing.assert_array_equal(read.window(6, 8).pose, again.pose[6:8])  # going back gives the same
    np.testing.assert_array_equal(read.window(1, 3).background, again.background[1:3])
    read.close()
    read.close()
    np.testing.assert_array_equal(read.window(0, 2).mask, again.mask[:2])  # opens again
    read.close()


def test_official_files_read_by_decord_have_same_frames(made):
    """decord, as the official generate() uses it: equal lengths, the pose's size, a mask of near zeros and ones."""
    decord = pytest.importorskip("decord")
    _, window, folder, _ = made("replace")
    frames = {}
    for name in ("pose", "face", "bg", "mask"):
        reader = decord.VideoReader(str(folder / f"src_{name}.mp4"))
        assert reader.get_avg_fps() == pytest.approx(12.5)
        frames[name] = reader.get_batch(range(len(reader))).asnumpy()
    assert {name: f.shape for name, f in frames.items()} == {
        "pose": (FRAMES, 160, 240, 3),
        "face": (FRAMES, 512, 512, 3),
        "bg": (FRAMES, 160, 240, 3),
        "mask": (FRAMES, 160, 240, 3),
    }
    share = frames["mask"][..., 0] / 255
    assert np.abs(share - (window.mask > 0)).max() < 0.15
    assert psnr(frames["pose"], window.pose) > 28


# Folders as the official script leaves them: moviepy's defaults, a JPEG under a PNG's name.


def official_folder(folder: Path, frames: int = 12, size: tuple[int, int] = (96, 64), **other: object) -> Path:
    """Every picture carries its number; `other`: keyword arguments of make_clip for one file, by the file's stem."""
    folder.mkdir(exist_ok=True)
    for name in ("pose", "face", "bg", "mask"):
        asked = {"frames": frames, "fps": 30, "size": (64, 64) if name == "face" else size, "options": {}}
        asked |= other.get(name, {})
        make_clip(folder / f"src_{name}.mp4", asked.pop("frames"), **asked)
    (folder / "src_ref.png").write_bytes(jpeg((50, 80)))
    return folder


def jpeg(size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(data, format="JPEG")
    return data.getvalue()


def numbers(frames: np.ndarray) -> list[int]:
    return [read_index(frame) for frame in frames]


def test_official_conditions_read_files_of_official_script(tmp_path):
    folder = official_folder(tmp_path / "made")
    read = OfficialConditions.open(folder, JobOptions(mode="replace"), face_size=48)
    assert (read.frames, read.fps, read.width, read.height, read.start_s) == (12, 30, 96, 64, 0.0)
    assert read.reference.size == (50, 80) and read.reference.mode == "RGB"
    window = read.window(3, 7)
    assert numbers(window.pose) == [3, 4, 5, 6]
    assert window.face.shape == (4, 48, 48, 3)
    # The lossy grey gradient beside the blocks is parted at 128; no grey is left, and the scene is black there.
    assert set(np.unique(window.mask)) == {0, 255}
    truth = np.stack([indexed_frame(i)[..., 0] for i in range(3, 7)])
    sure = np.abs(truth.astype(int) - 128) > 40
    assert (((window.mask > 0) == (truth >= 128)) | ~sure).mean() > 0.999
    assert not window.background[window.mask > 0].any() and window.background.any()
    read.close()


def test_official_conditions_of_span_keep_frame_rate(tmp_path):
    folder = official_folder(tmp_path / "made", frames=30)
    read = OfficialConditions.open(folder, JobOptions(start_s=0.2, max_frames=5))
    assert (read.frames, read.fps, read.start_s) == (5, 30, pytest.approx(0.2))
    assert numbers(read.window(0, 5).pose) == [6, 7, 8, 9, 10]
    assert read.report["sampled_frames"] == 5 and read.report["source_frames"] == 30
    read.close()
    with pytest.raises(InputTooShort, match=r"1 of its 30 frames remain from second 0\.97"):
        OfficialConditions.open(folder, JobOptions(start_s=0.97))
    with pytest.raises(InputTooShort, match="0 of its 30 frames"):
        OfficialConditions.open(folder, JobOptions(start_s=7))


def test_official_conditions_with_other_fps_or_size_warn(tmp_path):
    folder = official_folder(tmp_path / "made")

    def warnings(**asked: object) -> list[str]:
        read = OfficialConditions.open(folder, JobOptions(**asked))
        read.close()
        return list(read.report["warnings"])

    assert warnings() == []  # 16 frames a second is only the default
    assert warnings(fps=30, size="96x64") == []
    assert warnings(fps="source", size="auto") == []
    fps, size = warnings(fps=16, size="480x832")
    assert "fps: 16" in fps and "have 30" in fps
    assert "480x832" in size and "96x64" in size


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"face": {"frames": 11}}, r"lengths: src_pose.mp4 12 frames, src_face.mp4 11 frames"),
        ({"mask": {"size": (96, 80)}}, r"sizes: src_pose.mp4 96x64, src_bg.mp4 96x64, src_mask.mp4 96x80"),
        ({"bg": {"fps": 25}}, r"rates: src_pose.mp4 30 fps, .*src_bg.mp4 25 fps"),
        ({"face": {"size": (64, 48)}}, r"src_face.mp4: faces of 64x48 pixels, but they must be square"),
    ],
)
def test_official_conditions_of_unequal_files_are_refused(tmp_path, other, says):
    folder = official_folder(tmp_path / "made", **other)
    with pytest.raises(InputUnreadable, match=says):
        OfficialConditions.open(folder, JobOptions(mode="replace"))


def test_official_conditions_with_size_not_multiple_of_16_are_refused(tmp_path):
    folder = official_folder(tmp_path / "made", size=(96, 72))
    with pytest.raises(InputUnreadable, match=r"src_pose.mp4: frames of 96x72 pixels.* multiples of 16"):
        OfficialConditions.open(folder, JobOptions())


def test_official_files_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(InputNotFound, match=r"nowhere: no such folder"):
        official_files(tmp_path / "nowhere", "animate")
    folder = official_folder(tmp_path / "made")
    (folder / "src_bg.mp4").unlink()
    assert set(official_files(folder, "animate")) == {"reference", "pose", "face"}
    with pytest.raises(InputNotFound, match=r"src_bg.mp4 is missing, which mode: replace needs"):
        official_files(folder, "replace")
    (folder / "src_ref.png").unlink()
    with pytest.raises(InputNotFound, match=r"src_ref.png, src_bg.mp4 are missing"):
        official_files(folder, "replace")
    (folder / "src_ref.png").write_bytes(jpeg((20, 20))[:100])
    with pytest.raises(InputUnreadable, match=r"src_ref.png"):
        OfficialConditions.open(folder, JobOptions())
    (folder / "src_ref.png").write_bytes(jpeg((20, 20)))
    (folder / "src_face.mp4").write_bytes((folder / "src_pose.mp4").read_bytes()[:700])
    with pytest.raises(InputError, match=r"src_face.mp4"):
        OfficialConditions.open(folder, JobOptions())


@dataclass
class Numbered:
    """A source of pictures that carry their numbers; fails at frame `breaks`."""

    frames: int
    breaks: int = 10**9
    fps: Fraction = Fraction(30000, 1001)
    width: int = 832
    height: int = 480
    reference: Image.Image = field(default_factory=lambda: Image.new("RGB", (8, 8)))
    asked: list[tuple[int, int]] = field(default_factory=list)

    def window(self, start: int, stop: int) -> ConditionFrames:
        self.asked.append((start, stop))
        if stop > self.breaks:
            raise InputUnreadable("the video is damaged here")
        pose = np.stack([indexed_frame(i, self.width, self.height) for i in range(start, stop)])
        return ConditionFrames(pose, np.zeros((stop - start, 64, 64, 3), np.uint8))


def test_write_official_writes_all_frames_in_bounded_spans(tmp_path):
    source = Numbered(30)
    write_official(source, tmp_path)
    spans = source.asked
    assert spans[0][0] == 0 and spans[-1][1] == 30
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert max(stop - start for start, stop in spans) * 3 * (3 * 832 * 480 + 512 * 512) <= 48 << 20
    read = OfficialConditions.open(tmp_path, JobOptions())
    assert read.fps == Fraction(30000, 1001)
    assert numbers(read.window(0, 30).pose[::7]) == [0, 7, 14, 21, 28]
    read.close()


def test_write_official_that_fails_midway_leaves_no_videos(tmp_path):
    write_official(Numbered(14), tmp_path)
    with pytest.raises(InputUnreadable, match="damaged here"):
        write_official(Numbered(30, breaks=20), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["src_ref.png"]
    with pytest.raises(InputNotFound, match=r"src_pose.mp4, src_face.mp4 are missing"):
        official_files(tmp_path, "animate")
