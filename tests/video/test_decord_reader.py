"""The parity reader: every frame against one plain `get_batch` of decord, errors against PyAV's."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.errors import InputNotFound, InputTooLarge, InputUnreadable
from runner.video import VideoReader, decode, decord_reader, readers_differ, sample_indices
from tests.video.test_reader import B_FRAMES, SIZE, _bad_files
from tests.video_files import indexed_frame, make_clip, make_vfr, overwrite_middle, remux, tone

decord = pytest.importorskip("decord")
HERE = Path(__file__).parents[2]
# Rates at which decord gives other frames than PyAV, of those in RATES. `late` starts at 0.5 s, the others at 0.
DIFFERENT: dict[str, set[float | str]] = {
    "bframes": set(),
    "opengop": {10, 16},
    "ntsc": set(),
    "vfr": set(),
    "hevc10": {10},
    "av1": set(),
    "odd444": set(),
    "odd420": set(),
    "prores": set(),
    "alpha": set(),
    "mkv": set(),
    "avi": set(),
    "late": set(),
    "turned": set(),
    "askew": {"source", 30, 10, 16},
    "ts": {"source", 30, 10, 16},
    "trimmed": {"source", 30, 10, 16},
}
RATES: tuple[float | str, ...] = ("source", 30, 10, 16)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("片段 with space")
    clip = partial(make_clip, size=SIZE)
    bframes = clip(folder / "b.mp4", 60, options=B_FRAMES)
    sound = clip(folder / "sound.mp4", 60, options=B_FRAMES, audio=tone(2.0))
    opengop = {**B_FRAMES, "x264-params": "open-gop=1:keyint=12:min-keyint=12"}
    return {
        "bframes": bframes,
        "opengop": clip(folder / "a:b %d.mp4", 60, options=opengop),
        "ntsc": clip(folder / "ntsc.mp4", 31, Fraction(30000, 1001)),
        "vfr": make_vfr(folder / "vfr.mp4", [0, 33, 66, 200, 233, 500, 533, 566, 900, 933], size=SIZE),
        "hevc10": clip(folder / "hevc10.mp4", 20, codec="libx265", pix_fmt="yuv420p10le"),
        "av1": clip(folder / "av1.mp4", 20, codec="libsvtav1"),
        "odd444": clip(folder / "odd444.mp4", 20, size=(97, 65), pix_fmt="yuv444p"),
        "odd420": clip(folder / "odd420.webm", 20, size=(97, 65), codec="libvpx-vp9", container="webm"),
        "prores": clip(folder / "prores.mov", 20, codec="prores_ks", container="mov", pix_fmt="yuv422p10le"),
        "alpha": clip(folder / "alpha.mov", 20, codec="qtrle", container="mov", pix_fmt="argb"),
        "mkv": remux(bframes, folder / "b.mkv", "matroska"),
        "avi": clip(folder / "b.avi", 60, codec="mpeg4", container="avi", options={}),
        "late": remux(sound, folder / "late.mp4", video_shift_s=0.5),
        "turned": clip(folder / "turned.mp4", 20, rotation=90),
        "askew": clip(folder / "askew.mp4", 20, rotation=45),
        "ts": remux(bframes, folder / "b.ts", "mpegts"),
        "trimmed": remux(sound, folder / "trimmed.mp4", video_shift_s=-0.5),
        "mpeg2": clip(folder / "b.mpg", 60, codec="mpeg2video", container="mpeg", options={"bf": "2"}),
        "raw": remux(clip(folder / "plain.mp4", 30, options={**B_FRAMES, "bf": "0"}), folder / "raw.h264", "h264"),
    }


def plain(path: Path) -> Any:
    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)


def hold_frames(monkeypatch: pytest.MonkeyPatch, reader: VideoReader, frames: int) -> None:
    monkeypatch.setattr(decord_reader, "CHUNK_BYTES", frames * reader.info.width * reader.info.height * 3)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", DIFFERENT)
def test_parity_reader_gives_frames_of_one_get_batch(
    clips: dict[str, Path], name: str, rate: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = plain(clips[name])
    end_s = float(official.get_frame_timestamp(-1)[1])
    indices = sample_indices(len(official), official.get_avg_fps(), end_s, None if rate == "source" else float(rate))
    want = official.get_batch(indices.tolist()).asnumpy()
    with VideoReader(clips[name], parity=True) as reader:
        hold_frames(monkeypatch, reader, 5)
        sampled = reader.sample(rate)
        assert sampled.indices.tolist() == indices.tolist()
        assert np.array_equal(np.concatenate(list(reader.windows(sampled.indices, 7))), want)
        draw = random.Random(0)
        for _ in range(3):  # as pass 2 and the masks read: parts, and back again
            chosen = sorted(draw.sample(range(len(indices)), len(indices) // 2))
            assert np.array_equal(reader.read(indices[chosen]), want[chosen])


@pytest.mark.parametrize("name", ["trimmed", "ts", "opengop", "bframes"])
def test_parity_reader_opened_again_with_plan_gives_same_frames(clips: dict[str, Path], name: str) -> None:
    with VideoReader(clips[name], parity=True) as first:
        indices = first.sample(10).indices
        want = first.read(indices)
    with VideoReader(clips[name], parity=True, plan=indices) as second:
        assert np.array_equal(second.read(indices[4:]), want[4:])


@pytest.mark.parametrize("name", DIFFERENT)
def test_readers_differ_where_frames_differ(clips: dict[str, Path], name: str) -> None:
    assert {rate for rate in RATES if readers_differ(clips[name], rate)} == DIFFERENT[name]


def test_start_in_parity_is_frame_on_screen(clips: dict[str, Path]) -> None:
    with VideoReader(clips["bframes"], parity=True) as reader:
        sampled = reader.sample(30, start_s=1.0, max_frames=9)
        assert (sampled.indices.tolist(), sampled.start_s) == (list(range(30, 39)), 1.0)
        assert np.array_equal(reader.read(sampled.indices), plain(clips["bframes"]).get_batch(range(30, 39)).asnumpy())
    assert not readers_differ(clips["bframes"], 30, 1.0, 9)


def test_frames_without_usable_timestamps_are_read_only_in_full(clips: dict[str, Path]) -> None:
    """Where frames are left out decord's frames change from one read to the next."""
    with VideoReader(clips["mpeg2"], parity=True) as reader:
        sampled = reader.sample("source")
        assert np.array_equal(reader.read(sampled.indices), plain(clips["mpeg2"]).get_batch(range(60)).asnumpy())
        with pytest.raises(InputUnreadable, match="timestamps are not usable"):
            reader.read(reader.sample(10).indices)
    assert not readers_differ(clips["mpeg2"], "source")
    assert readers_differ(clips["mpeg2"], 10)


@pytest.mark.parametrize("width", [32, 96, 160, 98])
def test_padded_rows_are_not_taken_for_channels(tmp_path: Path, width: int) -> None:
    clip = make_clip(tmp_path / "a.mp4", 8, size=(width, 64))
    with VideoReader(clip) as ours, VideoReader(clip, parity=True) as official:
        assert np.array_equal(official.read(np.arange(8)), ours.read(np.arange(8)))
    assert not readers_differ(clip, "source")


def test_file_that_decord_cannot_read_is_unreadable_with_remedy(
    clips: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with VideoReader(clips["raw"]) as reader:
        assert reader.info.frames == 30
    with pytest.raises(InputUnreadable, match=r"raw\.h264: decord, which preprocess\.parity") as caught:
        VideoReader(clips["raw"], parity=True)
    assert "ffmpeg -i" in (caught.value.todo or "")
    assert readers_differ(clips["raw"], "source")
    assert capfd.readouterr() == ("", "")


def test_damaged_file_raises_same_error_with_both_readers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = _bad_files(tmp_path)
    good = make_clip(tmp_path / "long.mp4", 200, options=B_FRAMES)
    for byte in (0x00, 0xA5):
        files[f"middle {byte}"] = overwrite_middle(good, tmp_path / f"{byte}.mp4", 0.7, 0.72, byte)
    files["missing"] = tmp_path / "missing.mp4"
    capfd.readouterr()

    def read(path: Path, parity: bool) -> None:
        with VideoReader(path, parity=parity) as reader:
            for _ in reader.windows(reader.sample("source", parity=True).indices):
                pass

    for name, path in files.items():
        with pytest.raises((InputUnreadable, InputNotFound)) as expected:
            read(path, parity=False)
        with pytest.raises(type(expected.value)) as caught:
            read(path, parity=True)
        assert caught.value.message == expected.value.message, name
        with pytest.raises((InputUnreadable, InputNotFound)):
            readers_differ(path, "source")
    assert capfd.readouterr() == ("", "")


def test_huge_frames_are_refused_before_decord_opens_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 96 * 64 - 1)
    monkeypatch.setattr(decord_reader, "_open", lambda path: pytest.fail("decord opened it"))
    with pytest.raises(InputTooLarge, match="96x64"):
        VideoReader(make_clip(tmp_path / "c.mp4", 2), parity=True)


@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_clip_that_changes_while_read_is_input_error(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip(tmp_path / "a.mp4", 120)
    with VideoReader(path, parity=True) as reader:
        hold_frames(monkeypatch, reader, 4)
        reader.read(np.arange(3))
        if harm == "cut":
            os.truncate(path, path.stat().st_size // 3)
        else:
            path.unlink()
        with pytest.raises(InputNotFound if harm == "removed" else InputUnreadable):
            reader.read(np.array([50]))


def test_read_that_fails_once_is_repeated(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    want, next_frame, failures = plain(clips["bframes"]).get_batch(range(60)).asnumpy(), decord_reader._next_frame, [7]

    def failing(reader: Any) -> np.ndarray:
        failures[0] -= 1
        if failures[0] == 0:
            raise decord.DECORDError("Check failed: (-11 vs. 0) Thread worker: Error sending packet.")
        return next_frame(reader)

    with VideoReader(clips["bframes"], parity=True) as reader:
        monkeypatch.setattr(decord_reader, "_next_frame", failing)
        assert np.array_equal(reader.read(np.arange(60)), want)
        failures[0] = 0  # counts down from here: never again
    monkeypatch.setattr(decord_reader, "_next_frame", lambda reader: 1 / 0)
    with pytest.raises(InputUnreadable, match="division by zero"):
        VideoReader(clips["bframes"], parity=True)


def test_decord_decodes_with_one_thread(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, original = [], decord.VideoReader

    def spying(*given: Any, **options: Any) -> Any:
        opened.append(options["num_threads"])
        return original(*given, **options)

    monkeypatch.setattr(decord, "VideoReader", spying)
    with VideoReader(clips["bframes"], parity=True) as reader:
        before = len(os.listdir("/proc/self/task"))
        reader.read(np.arange(60))
        assert len(os.listdir("/proc/self/task")) <= before + 1
    assert opened == [1, 1]


def test_decord_is_imported_by_parity_readers_only(clips: dict[str, Path]) -> None:
    script = (
        "import sys; from runner.video import VideoReader\n"
        "VideoReader(sys.argv[1]).read([0]); assert 'decord' not in sys.modules\n"
        "VideoReader(sys.argv[1], parity=True); assert 'decord' in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "-c", script, str(clips["bframes"])], cwd=HERE, env=environment, check=True)


def test_parity_reader_memory_does_not_grow_with_clip_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 frames of 640x352 are 1,289 MiB, which decord alone holds with a slow consumer."""
    script = textwrap.dedent("""
        import sys, time
        import numpy as np, psutil
        from runner.video import VideoReader, decord_reader
        decord_reader.CHUNK_BYTES = 64 << 20
        reader, me, rss = VideoReader(sys.argv[1], parity=True), psutil.Process(), 0
        for frames in reader.windows(np.arange(reader.info.frames), 16):
            time.sleep(0.01)
            rss = max(rss, me.memory_info().rss)
        print(rss >> 20)
    """)
    stills = [indexed_frame(i, 640, 352) for i in range(4)]

    def peak_mib(frames: int) -> int:
        pixels = (stills[i % 4] for i in range(frames))
        clip = make_clip(tmp_path / f"{frames}.mp4", frames, size=(640, 352), pixels=pixels, gop=250)
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        run = [sys.executable, "-c", script, str(clip)]
        done = subprocess.run(run, cwd=HERE, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    short, long = peak_mib(200), peak_mib(2000)
    assert long - short < 200, f"{short} MiB for 200 frames, {long} MiB for 2,000"
