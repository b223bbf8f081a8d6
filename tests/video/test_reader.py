"""Reading: sampling against hand-worked cases and brute force, frames against the bits they carry and decord."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import InputNotFound, InputTooLarge, InputTooShort, InputUnreadable
from runner.video import VideoReader, decode, probe, sample_by_time, sample_indices
from tests.video_files import (
    indexed_frame,
    make_clip,
    make_vfr,
    movie_without_samples,
    overwrite_middle,
    read_index,
    remux,
    tone,
    truncate,
)

B_FRAMES = {"crf": "14", "preset": "veryfast", "bf": "3"}


# --- the official rule ---


def test_official_rule_at_equal_rates_loses_a_frame_at_known_lengths() -> None:
    def losing(rate: float, lengths: range) -> list[int]:
        return [n for n in lengths if len(sample_indices(n, rate, n / rate, rate)) == n - 1]

    assert losing(30.0, range(2, 248)) == [123, 245, 246, 247]
    assert losing(25.0, range(2, 114)) == [29, 57, 58, 113]


def test_official_rule_upsamples_by_repeating() -> None:
    assert sample_indices(24, 24.0, 1.0, 30.0)[:9].tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 6]


def test_official_rule_rounds_half_to_even() -> None:
    # 15 → 30: positions 0, .5, 1, 1.5, 2, 2.5, …
    assert sample_indices(4, 15.0, 4 / 15, 30.0).tolist() == [0, 0, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("frames", "duration_s", "length", "last"),
    [
        (100, 10.0, 300, 99),  # 300 expected, more than a tenth away: they count, but none can be shown beyond the last
        (300, 5.0, 150, 149),  # 150 expected, more than a tenth away
        (100, 3.6, 100, 99),  # 108 expected: within a tenth, the count stands
    ],
)
def test_official_rule_believes_the_duration_beyond_a_tenth(
    frames: int, duration_s: float, length: int, last: int
) -> None:
    indices = sample_indices(frames, 30.0, duration_s, None)
    assert (len(indices), indices[-1]) == (length, last)


@given(st.integers(1, 5000), st.floats(1, 240), st.floats(1, 120))
def test_official_rule_stays_inside_the_clip(frames: int, source: float, target: float) -> None:
    indices = sample_indices(frames, source, frames / source, target)
    assert indices.dtype == np.int64
    assert len(indices) == int(frames / source * target)
    assert (np.diff(indices) >= 0).all()
    assert not len(indices) or (indices[0] == 0 and indices[-1] <= frames - 1)


# --- by time ---

RATES = [Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(60)]


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("grid", [None, Fraction(1, 1000), Fraction(1, 600)], ids=["exact", "matroska", "quicktime"])
def test_equal_rates_give_every_frame_once(rate: Fraction, grid: Fraction | None) -> None:
    for frames in [2, 29, 57, 123, 245, 246, 247, 3000]:
        stamps = [i / rate if grid is None else round(i / rate / grid) * grid for i in range(frames + 1)]
        starts = np.array([float(s) for s in stamps])
        indices = sample_by_time(starts[:-1], starts[-1], rate)
        assert indices.tolist() == list(range(frames))


@settings(deadline=None)
@given(
    st.lists(st.integers(8, 900), min_size=1, max_size=40),
    st.sampled_from([Fraction(8), Fraction(16), Fraction(30000, 1001), Fraction(60)]),
    st.integers(0, 2000),
)
def test_by_time_shows_what_is_on_screen(lengths_ms: list[int], fps: Fraction, start_ms: int) -> None:
    ends = np.cumsum(lengths_ms)
    starts_ms, end_ms = [0, *ends[:-1].tolist()], int(ends[-1])
    indices = sample_by_time(np.array(starts_ms) / 1000, end_ms / 1000, fps, start_ms / 1000)
    periods = Fraction(end_ms - start_ms, 1000) * fps
    assert abs(len(indices) - max(periods, 0)) <= Fraction(1, 2) + Fraction(1, 10**9)
    for i, index in enumerate(indices.tolist()):
        at_ms = start_ms + 1000 * i / fps
        assert starts_ms[index] <= at_ms + 1 + Fraction(1, 10**6)  # it has appeared, or does within a millisecond
        following = starts_ms[index + 1] if index + 1 < len(starts_ms) else end_ms
        assert at_ms < following  # and is not gone


# --- reading ---

# decord takes a row for RGBA where the row's bytes, padded for the processor's vectors, are four times the width: with
# AVX-512 those of 96 pixels are. Those of 160 are so nowhere.
SIZE = (160, 64)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name → clip; the frames that are to be seen stand in SEEN."""
    folder = tmp_path_factory.mktemp("片段 with space")
    clip, vfr = partial(make_clip, size=SIZE), partial(make_vfr, size=SIZE)
    bframes = clip(folder / "b.mp4", 60, options=B_FRAMES)
    sound = clip(folder / "sound.mp4", 60, options=B_FRAMES, audio=tone(2.0))
    opengop = {**B_FRAMES, "x264-params": "open-gop=1:keyint=12:min-keyint=12"}
    return {
        "cfr": clip(folder / "舞蹈 one.mp4", 60),
        "bframes": bframes,
        "opengop": clip(folder / "opengop.mp4", 60, options=opengop),
        "ntsc": clip(folder / "ntsc.mp4", 31, Fraction(30000, 1001)),
        "vfr": vfr(folder / "vfr.mp4", [0, 33, 66, 200, 233, 500, 533, 566, 900, 933]),
        "hevc10": clip(folder / "hevc10.mp4", 20, codec="libx265", pix_fmt="yuv420p10le"),
        "av1": clip(folder / "av1.mp4", 20, codec="libsvtav1"),
        "odd444": clip(folder / "odd444.mp4", 20, size=(97, 65), pix_fmt="yuv444p"),
        "odd420": clip(folder / "odd420.webm", 20, size=(97, 65), codec="libvpx-vp9", container="webm"),
        "gray": clip(folder / "gray.mp4", 20, pix_fmt="gray"),
        "sound": sound,
        "mkv": remux(bframes, folder / "b.mkv", "matroska"),
        "ts": remux(bframes, folder / "b.ts", "mpegts"),
        "mpeg2": clip(folder / "b.mpg", 60, codec="mpeg2video", container="mpeg", options={"bf": "2"}),
        "avi": clip(folder / "b.avi", 60, codec="mpeg4", container="avi", options={}),
        "trimmed": remux(sound, folder / "trimmed.mp4", video_shift_s=-0.5),
        "late": remux(sound, folder / "late.mp4", video_shift_s=0.5),
        "colon": clip(folder / "a:b %d.mp4", 20),
    }


SEEN = {
    "cfr": range(60),
    "bframes": range(60),
    "opengop": range(60),
    "ntsc": range(31),
    "vfr": range(10),
    "hevc10": range(20),
    "av1": range(20),
    "odd444": range(20),
    "odd420": range(20),
    "gray": range(20),
    "sound": range(60),
    "mkv": range(60),
    "ts": range(60),
    "mpeg2": range(60),
    "avi": range(60),
    "trimmed": range(15, 60),
    "late": range(60),
    "colon": range(20),
}


@pytest.mark.parametrize("name", SEEN)
def test_every_frame_is_the_one_asked_for(clips: dict[str, Path], name: str) -> None:
    seen = list(SEEN[name])
    with VideoReader(clips[name]) as reader:
        assert reader.info.frames == len(seen)
        order = np.arange(len(seen))
        assert [read_index(f) for w in reader.windows(order, 7) for f in w] == seen
        assert [read_index(f) for f in reader.read(order[5::7])] == seen[5::7]
        back = [read_index(reader.read(np.array([i]))[0]) for i in reversed(order[::4])]
        assert back == seen[::4][::-1]


@pytest.mark.parametrize("name", ["opengop", "bframes", "ts", "mkv", "trimmed"])
def test_far_jumps_land_on_the_frame_asked_for(
    clips: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "FAR", 0)  # seek to every keyframe ahead
    seen = list(SEEN[name])
    with VideoReader(clips[name]) as reader:
        wanted = np.array([3, 20, 21, 40, 44])
        assert [read_index(f) for f in reader.read(wanted)] == [seen[i] for i in wanted]


@pytest.mark.parametrize("name", ["cfr", "bframes", "ntsc", "vfr", "av1", "odd444", "odd420", "gray", "mkv", "late"])
def test_pixels_rate_and_times_equal_decord(clips: dict[str, Path], name: str) -> None:
    """decord is what the official preprocessing reads through; on plain 8-bit files it is right."""
    decord = pytest.importorskip("decord")
    oracle = decord.VideoReader(str(clips[name]), num_threads=1)
    with VideoReader(clips[name]) as reader:
        assert len(oracle) == reader.info.frames
        assert float(reader.info.fps) == pytest.approx(oracle.get_avg_fps(), rel=1e-6)
        last = oracle.get_frame_timestamp(range(len(oracle)))[-1]
        assert reader.info.duration_s == pytest.approx(last[1], abs=2e-3)
        everything = np.arange(len(oracle))
        assert np.array_equal(reader.read(everything), oracle.get_batch(everything).asnumpy())


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_rotation_is_applied(tmp_path: Path, degrees: int, turns: int) -> None:
    decord = pytest.importorskip("decord")
    size = (160, 128)
    plain = VideoReader(make_clip(tmp_path / "plain.mp4", 3, size=size)).read(np.arange(3))
    path = make_clip(tmp_path / "turned.mp4", 3, size=size, rotation=degrees)
    info = probe(path)
    assert (info.width, info.height) == (size[::-1] if turns % 2 else size)
    frames = VideoReader(path).read(np.arange(3))
    assert np.array_equal(frames, np.rot90(plain, turns, axes=(1, 2)))
    assert np.array_equal(frames, decord.VideoReader(str(path)).get_batch([0, 1, 2]).asnumpy())


def test_clips_leave_the_scheduling_of_this_process_alone(clips: dict[str, Path]) -> None:
    """Else the tests after these starve each other: every process that they start is real-time as well."""
    assert clips["av1"].exists()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_probe(clips: dict[str, Path]) -> None:
    info = probe(str(clips["ntsc"]))
    assert (info.frames, info.fps, info.width, info.height, info.has_audio) == (
        31,
        Fraction(30000, 1001),
        *SIZE,
        False,
    )
    assert info.duration_s == pytest.approx(31 * 1001 / 30000)
    assert probe(clips["sound"]).has_audio
    assert probe(clips["odd420"]).width == 97
    trimmed = probe(clips["trimmed"])
    assert (trimmed.fps, trimmed.duration_s) == (30, pytest.approx(1.5))


def test_source_rate_keeps_every_frame(clips: dict[str, Path]) -> None:
    for name in set(SEEN) - {"vfr"}:
        sampled = VideoReader(clips[name]).sample("source")
        assert sampled.indices.tolist() == list(range(len(SEEN[name]))), name
        assert sampled.fps == (Fraction(30000, 1001) if name == "ntsc" else 30), name


def test_variable_rate_is_sampled_by_the_clock(clips: dict[str, Path]) -> None:
    # At 10 fps: what had appeared by 0, 100, … 900 ms; the frame stamped 200 ms is there at 200 ms.
    assert VideoReader(clips["vfr"]).sample(10).indices.tolist() == [0, 2, 3, 4, 4, 5, 7, 7, 7, 8]


def test_start_and_length(clips: dict[str, Path]) -> None:
    reader = VideoReader(clips["cfr"])
    sampled = reader.sample(15, start_s=0.5, max_frames=5)
    assert sampled.indices.tolist() == [15, 17, 19, 21, 23]
    assert (sampled.fps, sampled.start_s) == (15, 0.5)
    assert len(reader.sample(30, start_s=0.5).indices) == 45
    assert reader.sample(60).indices[:5].tolist() == [0, 0, 1, 1, 2]
    assert reader.sample(29.97).fps == Fraction(2997, 100)


def test_parity_follows_the_official_rule(tmp_path: Path, clips: dict[str, Path]) -> None:
    clip = make_clip(tmp_path / "c.mp4", 123)
    assert len(VideoReader(clip).sample(30, parity=True).indices) == 122
    assert len(VideoReader(clip).sample(30).indices) == 123
    later = VideoReader(clips["cfr"]).sample(30, start_s=1.0, parity=True)
    assert (later.indices.tolist(), later.start_s) == (list(range(30, 60)), 1.0)
    sixteen = VideoReader(clips["cfr"]).sample(16, parity=True).indices
    assert sixteen.tolist() == sample_indices(60, 30.0, 2.0, 16.0).tolist()


def test_too_short(tmp_path: Path, clips: dict[str, Path]) -> None:
    with pytest.raises(InputTooShort, match=r"ends after 2\.000 s"):
        VideoReader(clips["cfr"]).sample(30, start_s=2.0)
    with pytest.raises(InputTooShort, match="1 frame at 30 fps"):
        VideoReader(clips["cfr"]).sample(30, start_s=1.97)
    for parity in [False, True]:
        with pytest.raises(InputTooShort, match="at least 2"):
            VideoReader(make_clip(tmp_path / "one.mp4", 1)).sample("source", parity=parity)


def test_repeats_and_overlaps_decode_nothing_twice(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    index_of = decode.Frames._index_of

    def counting(self: decode.Frames, pts: int | None) -> int | None:
        decoded.append(pts)
        return index_of(self, pts)

    monkeypatch.setattr(decode.Frames, "_index_of", counting)
    with VideoReader(clips["bframes"]) as reader:
        doubled = np.repeat(np.arange(60), 3)
        assert [read_index(f) for w in reader.windows(doubled, 8) for f in w] == doubled.tolist()
        assert len(decoded) == 60
        decoded.clear()
        for begin in range(0, 50, 8):  # segments that share five frames
            window = np.arange(begin, begin + 13).clip(max=59)
            assert [read_index(f) for f in reader.read(window)] == window.tolist()
        assert len(decoded) <= 61 + 12  # going back to 0 is a seek; from there on, once each


def test_reader_refuses_wrong_indices(clips: dict[str, Path]) -> None:
    reader = VideoReader(clips["cfr"])
    for wrong in [[0, 60], [-1, 3], [4, 3]]:
        with pytest.raises(ValueError, match=r"0\.\.59"):
            reader.read(np.array(wrong))
    assert reader.read(np.array([], np.int64)).shape == (0, *SIZE[::-1], 3)


# --- bad files ---


def _bad_files(folder: Path) -> dict[str, Path]:
    good = make_clip(folder / "good.mp4", 60, options=B_FRAMES)
    mkv = remux(good, folder / "good.mkv", "matroska")
    files = {name: folder / f"{name}.mp4" for name in ["empty", "text", "playlist", "zero", "tail", "folder", "sound"]}
    files["empty"].write_bytes(b"")
    files["text"].write_text("not a video\n" * 40)
    files["playlist"].write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/{good.name}\n")
    movie_without_samples(files["zero"])
    truncate(good, files["tail"], 0.8)  # the header in front is whole and promises more than there is
    files["folder"].mkdir()
    make_clip(folder / "with.mp4", 10, audio=tone(0.4))
    import av

    with av.open(str(folder / "with.mp4")) as src, av.open(str(files["sound"]), "w") as out:
        stream = out.add_stream_from_template(src.streams.audio[0])
        for packet in src.demux(src.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    files["cut_mkv"] = truncate(mkv, folder / "cut.mkv", 0.4)
    files["cut_head"] = truncate(good, folder / "cut_head.mp4", 0.02)
    return files


def test_bad_files_are_refused_in_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = _bad_files(tmp_path)
    capfd.readouterr()
    for name, path in files.items():
        with pytest.raises(InputUnreadable) as caught:
            probe(path)
        assert str(path) in caught.value.message, name
        assert caught.value.todo, name
    with pytest.raises(InputUnreadable, match="truncated"):
        probe(files["tail"])
    with pytest.raises(InputUnreadable, match="truncated"):
        probe(files["cut_mkv"])
    with pytest.raises(InputUnreadable, match="empty"):
        probe(files["empty"])
    with pytest.raises(InputUnreadable, match="no video"):
        probe(files["sound"])
    with pytest.raises(InputNotFound, match="Check the path"):
        probe(tmp_path / "missing.mp4")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # the libraries' own words would drown the run's log


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    good = make_clip(tmp_path / "good.mp4", 200, options=B_FRAMES)
    for byte in [0x00, 0xA5]:
        bad = overwrite_middle(good, tmp_path / "bad.mp4", 0.7, 0.72, byte)
        with VideoReader(bad) as reader:
            with pytest.raises(InputUnreadable, match=r"frame \d+"):
                list(reader.windows(reader.sample("source").indices))


def test_flipped_bits_never_pass_for_the_picture(tmp_path: Path) -> None:
    """Decoders paint over small damage and say nothing unless asked.

    About one flip in fifty leaves a valid stream of another picture, which no decoder could notice: none of these does.
    """
    good = make_clip(tmp_path / "good.mp4", 40, size=(160, 96), options={"crf": "14", "preset": "veryfast", "bf": "2"})
    want = VideoReader(good).read(np.arange(40))
    data = good.read_bytes()
    begin, draw, refused = data.find(b"mdat") + 900, random.Random(0), 0
    for _ in range(12):
        bad = bytearray(data)
        bad[draw.randrange(begin, len(bad))] ^= 1 << draw.randrange(8)
        (tmp_path / "bad.mp4").write_bytes(bad)
        try:
            got = VideoReader(tmp_path / "bad.mp4").read(np.arange(40))
        except InputUnreadable:
            refused += 1
        else:
            assert np.array_equal(got, want)
    assert refused >= 8


def test_huge_frames_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = make_clip(tmp_path / "wide.mp4", 2, size=(8208, 16), pixels=[np.zeros((16, 8208, 3), np.uint8)] * 2)
    monkeypatch.setattr(decode, "_first_frame", lambda path: pytest.fail("it was decoded"))
    with pytest.raises(InputTooLarge, match="8208x16"):
        probe(wide)
    monkeypatch.setattr(decode, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(InputTooLarge, match="96x64"):
        probe(make_clip(tmp_path / "c.mp4", 2))


def test_a_stream_without_timestamps_is_counted(tmp_path: Path) -> None:
    """A raw H.264 stream has no container, hence no times: frame i is the i-th decoded."""
    good = make_clip(tmp_path / "good.mp4", 30, options={**B_FRAMES, "bf": "0"})
    raw = remux(good, tmp_path / "raw.h264", "h264")
    with VideoReader(raw) as reader:
        assert reader.info.frames == 30
        assert [read_index(f) for f in reader.read(np.arange(30))] == list(range(30))
        assert [read_index(f) for f in reader.read(np.array([3, 9]))] == [3, 9]


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """600 frames of 640x360 are 415 MB; a slow consumer that reads 16 at a time must not see them pile up."""
    still = indexed_frame(0, 640, 352)
    clip = make_clip(tmp_path / "long.mp4", 600, size=(640, 352), pixels=(still for _ in range(600)), gop=250)
    script = textwrap.dedent("""
        import sys, time
        import numpy as np, psutil
        from runner.video.reader import VideoReader
        reader, me, rss = VideoReader(sys.argv[1]), psutil.Process(), []
        for frames in reader.windows(np.arange(600), 16):
            time.sleep(0.01)
            rss.append(me.memory_info().rss)
        print((max(rss) - rss[0]) >> 20)
    """)
    here = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(clip)], cwd=here, env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60, f"grew by {done.stdout.strip()} MB after the first window"


@pytest.mark.parametrize("harm", ["cut", "removed", "a folder", "other bytes"])
def test_a_clip_that_changes_while_it_is_read_is_an_input_that_failed(tmp_path: Path, harm: str) -> None:
    path = make_clip(tmp_path / "a.mp4", 120)
    nbytes = path.stat().st_size
    with VideoReader(path) as reader:
        reader.read(np.arange(3))
        reader.read(np.array([119]))
        if harm == "cut":
            os.truncate(path, nbytes // 3)
        elif harm == "other bytes":
            path.write_bytes(bytes(nbytes))
        else:
            path.unlink()
        if harm == "a folder":
            path.mkdir()
        with pytest.raises(InputNotFound if harm == "removed" else InputUnreadable):
            reader.read(np.array([50]))  # the file is opened again


@pytest.mark.parametrize("size", [(2000, 48), (48, 2000)])
def test_strips_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(InputUnreadable, match="strips of"):
        VideoReader(make_clip(tmp_path / "a.mp4", 3, size=size))


def test_a_clip_of_stills_hours_apart_has_a_rate(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", 3, pts=[0, 4000, 8000], time_base=Fraction(1))
    with VideoReader(clip) as reader:
        assert reader.info.fps == Fraction(1, 1001)
        assert len(reader.sample(1).indices) > 2
        assert len(reader.sample("source").indices) > 2
