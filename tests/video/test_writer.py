"""Writing: read back through PyAV alone, colours by BT.709's own formulas."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from runner.errors import StorageDenied, StorageFull
from runner.video import Mp4Writer, PngWriter, VideoReader, png_name, write_jpeg
from runner.video.writer import _same_on_any_processor
from tests.video_files import boxes, indexed_frame, indexed_frames, read_index


def write(path: Path, frames: int = 20, fps: Fraction | int = 30) -> Path:
    with Mp4Writer(path, 96, 64, Fraction(fps)) as writer:
        for begin in range(0, frames, 7):  # calls of unlike length
            writer.write(indexed_frames(begin, min(begin + 7, frames)))
    return path


def write_all(writer: Mp4Writer | PngWriter, segments: list[np.ndarray]) -> None:
    with writer:
        for segment in segments:
            writer.write(segment)


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


# --- pictures ---


@pytest.mark.parametrize("fps", [16, 30, Fraction(30000, 1001), Fraction(24000, 1001), Fraction(15, 2), 60], ids=str)
@pytest.mark.parametrize("frames", [1, 2, 81])
def test_exactly_the_frames_at_exactly_the_rate(tmp_path: Path, fps: Fraction | int, frames: int) -> None:
    path = tmp_path / "out.mp4"
    write(path, frames, fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (frames, fps)
        assert stream.duration * stream.time_base == Fraction(frames) / Fraction(fps)
        got = list(container.decode(stream))
    assert [f.pts * f.time_base for f in got] == [i / Fraction(fps) for i in range(frames)]
    assert [read_index(f.to_ndarray(format="rgb24")) for f in got] == list(range(frames))
    assert len(VideoReader(path).sample("source").indices) == frames if frames > 1 else True


def test_file_is_ready_to_stream_and_tagged(tmp_path: Path) -> None:
    path = tmp_path / "结果 one.mp4"
    write(path)
    order = boxes(path)
    assert order[0] == "ftyp"
    assert order.index("moov") < order.index("mdat")
    frame = decoded(path)[0]
    assert frame.format.name == "yuv420p"
    assert (frame.color_range, frame.colorspace, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["结果 one.mp4"]


PATCHES = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 30, 90)]


def test_colours_are_really_bt709(tmp_path: Path) -> None:
    image = np.zeros((64, 32 * len(PATCHES), 3), np.uint8)
    for i, colour in enumerate(PATCHES):
        image[:, 32 * i : 32 * (i + 1)] = colour
    path = tmp_path / "out.mp4"
    with Mp4Writer(path, image.shape[1], 64, Fraction(16), crf=10) as writer:
        writer.write(np.repeat(image[None], 3, axis=0))
    frame = decoded(path)[1]
    y, u, v = (np.frombuffer(p, np.uint8).reshape(p.height, p.line_size).astype(float) for p in frame.planes)
    for i, colour in enumerate(PATCHES):
        at = 32 * i + 16
        luma, blue, red = (y[32, at] - 16) / 219, (u[16, at // 2] - 128) / 224, (v[16, at // 2] - 128) / 224
        r, b = luma + 1.5748 * red, luma + 1.8556 * blue
        g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
        assert np.abs(np.array([r, g, b]) * 255 - colour).max() < 4, colour
    assert abs(y[32, 32 * 3 + 16] - 235) <= 1  # limited range: white is 235, black is 16
    assert abs(y[32, 32 * 4 + 16] - 16) <= 1
    assert np.abs(VideoReader(path).read(np.array([1]))[0][:, 16::32].astype(int) - image[:, 16::32]).max() < 4


def test_quality_follows_crf(tmp_path: Path) -> None:
    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8), (0, 0), 3)
    clip = np.stack([np.roll(noise, 2 * i, axis=1) for i in range(8)])
    psnr, size = {}, {}
    for crf in [10, 18, 30]:
        path = tmp_path / f"{crf}.mp4"
        with Mp4Writer(path, 192, 128, Fraction(16), crf=crf) as writer:
            writer.write(clip)
        got = VideoReader(path).read(np.arange(8)).astype(float)
        psnr[crf], size[crf] = 10 * np.log10(255**2 / ((got - clip) ** 2).mean()), path.stat().st_size
    assert psnr[10] > psnr[18] > psnr[30]
    assert psnr[18] > 36
    assert size[10] > size[18] > size[30]


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    for name in ["a.mp4", "b.mp4"]:
        write(tmp_path / name, 20)
    with Mp4Writer(tmp_path / "c.mp4", 96, 64, Fraction(30)) as writer:
        writer.write(indexed_frames(0, 20))  # in one call
    first = (tmp_path / "a.mp4").read_bytes()
    assert first == (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


def test_the_code_of_x264_that_reads_what_nobody_wrote_is_left_out(tmp_path: Path) -> None:
    """See tests/demo/test_build.py::test_media_are_the_same_bytes_each_time for what it would do."""
    for flags, options in (("avx2 avx512f", {"x264-params": "asm=avx2"}), ("avx2", {}), ("", {})):
        (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
        assert _same_on_any_processor(tmp_path / "cpuinfo") == options
    assert _same_on_any_processor(tmp_path / "none") == {}


def test_wrong_frames_and_sizes_are_refused(tmp_path: Path) -> None:
    for width, height in [(97, 64), (96, 65), (0, 64)]:
        with pytest.raises(ValueError, match="even"):
            Mp4Writer(tmp_path / "x.mp4", width, height, Fraction(30))
    with Mp4Writer(tmp_path / "x.mp4", 96, 64, Fraction(30)) as writer:
        with pytest.raises(ValueError, match="96x64"):
            writer.write(np.zeros((1, 32, 32, 3), np.uint8))
        with pytest.raises(ValueError, match="uint8"):
            writer.write(np.zeros((1, 64, 96, 3), np.float32))
        with pytest.raises(ValueError, match="uint8"):
            writer.write(np.zeros((64, 96, 3), np.uint8))
        writer.write(indexed_frames(0, 2))
    with pytest.raises(ValueError, match="closed"):
        writer.write(indexed_frames(0, 1))
    writer.close()
    writer.abort()
    assert (tmp_path / "x.mp4").exists()


# --- whole or not at all ---


def test_nothing_has_the_name_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.mp4"
    writer = Mp4Writer(path, 96, 64, Fraction(30))
    writer.write(indexed_frames(0, 3))
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4.part"]
    writer.close()
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4"]


def test_an_error_or_abort_leaves_nothing_new(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"an older output")
    with suppress(KeyError), Mp4Writer(path, 96, 64, Fraction(30)) as writer:
        writer.write(indexed_frames(0, 3))
        raise KeyError
    writer = Mp4Writer(path, 96, 64, Fraction(30))
    writer.abort()
    writer.abort()
    with pytest.raises(ValueError, match="no frame"), Mp4Writer(path, 96, 64, Fraction(30)):
        pass
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out.mp4", b"an older output")]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.with_name("out.mp4.part").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), np.uint8)
    with pytest.raises(StorageFull, match="no space"):
        write_all(Mp4Writer(path, 96, 64, Fraction(30), crf=1), [noise] * 4)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise av.error.PermissionError(13, "Permission denied", str(tmp_path / "out.mp4.part"))

    monkeypatch.setattr(av, "open", refuse)  # root may write anywhere, so that the refusal must be played
    with pytest.raises(StorageDenied, match="--user"):
        Mp4Writer(tmp_path / "out.mp4", 96, 64, Fraction(30))


# --- PNG, JPEG ---


def test_png_sequence_is_lossless_and_whole(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), np.uint8)
    folder = tmp_path / "帧 frames"
    with PngWriter(folder, 47, 33) as writer:
        writer.write(noise[:2])
        writer.write(noise[2:])
        assert not folder.exists()
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(5)]
    for i in range(5):
        data = np.frombuffer((folder / f"{i:06d}.png").read_bytes(), np.uint8)
        assert np.array_equal(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1], noise[i])
    with PngWriter(folder, 47, 33) as writer:  # a shorter rerun leaves no old frame behind
        writer.write(noise[:1])
    assert [p.name for p in folder.iterdir()] == ["000000.png"]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_png_sequence_may_begin_later(tmp_path: Path) -> None:
    with PngWriter(tmp_path / "frames", 96, 64, first=41) as writer:
        writer.write(indexed_frames(0, 1))
        writer.write(indexed_frames(1, 3))
    names = sorted(p.name for p in (tmp_path / "frames").iterdir())
    assert names == [png_name(41), png_name(42), png_name(43)] == ["000041.png", "000042.png", "000043.png"]


def test_png_sequence_is_removed_on_abort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(KeyError), PngWriter(tmp_path / "frames", 96, 64) as png:
        png.write(indexed_frames(0, 2))
        raise KeyError
    with pytest.raises(ValueError, match="no frame"), PngWriter(tmp_path / "frames", 96, 64):
        pass

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageFull):
        write_all(PngWriter(tmp_path / "frames", 96, 64), [indexed_frames(0, 2)])
    with pytest.raises(StorageFull):
        write_jpeg(tmp_path / "poster.jpg", indexed_frame(3))
    assert list(tmp_path.iterdir()) == []


def test_jpeg(tmp_path: Path) -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    write_jpeg(tmp_path / "poster.jpg", red)
    data = np.frombuffer((tmp_path / "poster.jpg").read_bytes(), np.uint8)
    assert np.abs(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(int) - red).max() < 4
    assert [p.name for p in tmp_path.iterdir()] == ["poster.jpg"]
