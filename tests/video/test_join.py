"""Joining: the joined file is read through PyAV alone and compared with its parts, frame by frame."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import InternalError, StorageFull
from runner.video import AudioSpan, Mp4Writer, SoundNote, join_parts
from tests.video_files import boxes, indexed_frames, make_clip, overwrite_middle, read_index, tone, truncate

RATES = [16, 30, Fraction(30000, 1001), Fraction(24000, 1001), Fraction(15, 2), 60]


def encode(folder: Path, lengths: list[int], fps: Fraction | int = 30, **settings: int) -> list[Path]:
    """A part of each length, the frames numbered through."""
    paths, begin = [], 0
    for number, length in enumerate(lengths):
        paths.append(folder / f"{number:03d}.mp4")
        with Mp4Writer(paths[-1], 96, 64, Fraction(fps), **settings) as writer:
            writer.write(indexed_frames(begin, begin + length))
        begin += length
    return paths


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


def check_stamps(path: Path, frames: int, fps: Fraction | int) -> None:
    """Exactly `frames` frames of exactly 1/fps; dts grows by one frame a packet and is never above pts."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.start_time) == (frames, fps, 0)
        assert stream.duration * stream.time_base * fps == frames
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        unit = stream.time_base * fps
        pts, dts = ([getattr(p, name) * unit for p in packets] for name in ("pts", "dts"))
        assert [p.duration * unit for p in packets] == [1] * frames
    assert sorted(pts) == list(range(frames))
    assert dts == list(range(-2, frames - 2))
    assert all(d <= p for d, p in zip(dts, pts, strict=True))
    with av.open(str(path)) as container:
        shown = list(container.decode(video=0))
    assert [f.pts * f.time_base * fps for f in shown] == list(range(frames))
    assert [read_index(f.to_ndarray(format="rgb24")) for f in shown] == list(range(frames))


@pytest.mark.parametrize("fps", RATES, ids=str)
@pytest.mark.parametrize("lengths", [[1], [2], [1, 1], [3, 1, 2, 40, 1]], ids=str)
def test_exactly_the_frames_of_the_parts_at_exactly_the_rate(
    tmp_path: Path, lengths: list[int], fps: Fraction | int
) -> None:
    parts, out = encode(tmp_path, lengths, fps), tmp_path / "out.mp4"
    assert join_parts(parts, out, fps=Fraction(fps)) is None
    check_stamps(out, sum(lengths), fps)
    apart = [frame for part in parts for frame in decoded(part)]
    assert all(np.array_equal(a, b) for a, b in zip(decoded(out), apart, strict=True))


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), rate=st.sampled_from(RATES), with_sound=st.booleans()
)
def test_any_lengths(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], rate: Fraction | int, with_sound: bool
) -> None:
    folder = tmp_path_factory.mktemp("join")
    source = make_clip(folder / "source.mp4", 3, audio=tone(1.0))
    audio = AudioSpan(source, 0.25, float(sum(lengths) / Fraction(rate))) if with_sound else None
    join_parts(encode(folder, lengths, rate), folder / "out.mp4", fps=Fraction(rate), audio=audio)
    check_stamps(folder / "out.mp4", sum(lengths), rate)


@pytest.mark.parametrize("length", [1, 2, 3, 30, 251])
def test_parts_of_any_length_have_the_same_parameter_sets(tmp_path: Path, length: int) -> None:
    found = set()
    for part in encode(tmp_path, [length, 40]):
        with av.open(str(part)) as container:
            found.add(container.streams.video[0].codec_context.extradata)
    assert len(found) == 1


def test_file_is_ready_to_stream_and_tagged(tmp_path: Path) -> None:
    folder = tmp_path / "结果 one"
    join_parts(encode(tmp_path, [5, 4]), folder / "out.mp4", fps=Fraction(30))
    order = boxes(folder / "out.mp4")
    assert order[0] == "ftyp"
    assert order.index("moov") < order.index("mdat")
    with av.open(str(folder / "out.mp4")) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name == "yuv420p"
    assert (frame.color_range, frame.colorspace, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    assert [p.name for p in folder.iterdir()] == ["out.mp4"]


def test_a_part_can_be_sought_at_its_first_frame(tmp_path: Path) -> None:
    join_parts(encode(tmp_path, [9, 1, 7]), tmp_path / "out.mp4", fps=Fraction(30))
    for first in (9, 10):
        with av.open(str(tmp_path / "out.mp4")) as container:
            stream = container.streams.video[0]
            container.seek(round(Fraction(first, 30) / stream.time_base), stream=stream, backward=True)
            assert read_index(next(container.decode(stream)).to_ndarray(format="rgb24")) == first


@pytest.mark.parametrize("lengths", [[30, 30], [1, 59], [7] * 8 + [4]], ids=str)
def test_sound_lies_beside_its_pictures(tmp_path: Path, lengths: list[int]) -> None:
    """The tone begins at 1.25 s of the source, so at 0.75 s of the output; in the file it lies beside the frames."""
    source = make_clip(tmp_path / "source.mp4", 75, audio=tone(2.5, 44100, 1.25))
    out = tmp_path / "out.mp4"
    note = join_parts(encode(tmp_path, lengths), out, fps=Fraction(30), audio=AudioSpan(source, 0.5, 2.0))
    assert note == SoundNote("cut to the rendered span, encoded as AAC at 44100 Hz stereo", missing=False)
    check_stamps(out, 60, 30)
    with av.open(str(out)) as container:
        blocks = list(container.decode(audio=0))
        assert blocks[0].pts == 0
        wave = np.concatenate([b.to_ndarray()[0] for b in blocks])
    assert abs(np.argmax(np.abs(wave) > 0.1) / 44100 - 0.75) < 1024 / 44100
    assert abs(len(wave) / 44100 - 2.0) < 1024 / 44100
    with av.open(str(out)) as container:
        placed = [(p.pos, float(p.dts * p.time_base)) for p in container.demux() if p.dts is not None]
    stamps = [seconds for _, seconds in sorted(placed)]
    assert max(before - after for before, after in pairwise(stamps)) < 1.1  # interleaved


def test_same_parts_same_bytes(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "source.mp4", 30, audio=tone(1.0))
    parts, audio = encode(tmp_path, [5, 1, 14]), AudioSpan(source, 0.1, 20 / 30)
    for name in ("a.mp4", "b.mp4"):
        join_parts(parts, tmp_path / name, fps=Fraction(30), audio=audio)
    code = (
        "import sys; from fractions import Fraction; from pathlib import Path\n"
        "from runner.video import AudioSpan, join_parts\n"
        "source, dest, *parts = map(Path, sys.argv[1:])\n"
        "join_parts(parts, dest, fps=Fraction(30), audio=AudioSpan(source, 0.1, 20 / 30))\n"
    )
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "c.mp4", *parts], check=True)
    first = (tmp_path / "a.mp4").read_bytes()
    assert first == (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


# --- whole or not at all ---


def test_parts_of_other_parameters_are_refused(tmp_path: Path) -> None:
    [first] = encode(tmp_path, [4])
    with Mp4Writer(tmp_path / "wide.mp4", 128, 64, Fraction(30)) as writer:
        writer.write(np.zeros((2, 64, 128, 3), np.uint8))
    for name, other in {
        "wide": tmp_path / "wide.mp4",
        "another encoder's": make_clip(tmp_path / "other.mp4", 4),
        "another quality": encode(tmp_path / "coarse", [4], crf=30)[0],
    }.items():
        with pytest.raises(InternalError, match="parameters"):
            join_parts([first, other], tmp_path / "out.mp4", fps=Fraction(30))
        assert not (tmp_path / "out.mp4").exists(), name
        assert not (tmp_path / "out.mp4.part").exists(), name


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    first, second = encode(tmp_path, [4, 4])
    for wrong in (truncate(second, tmp_path / "cut.mp4", 0.3), overwrite_middle(second, tmp_path / "head.mp4", 0, 0.3)):
        with pytest.raises(InternalError, match=re.escape(wrong.name)):
            join_parts([first, wrong], tmp_path / "out.mp4", fps=Fraction(30))
    for rate in (15, 29, 31, 60):  # they are of 30
        with pytest.raises(InternalError, match=r"000\.mp4"):
            join_parts([first, second], tmp_path / "out.mp4", fps=Fraction(rate))
    with pytest.raises(ValueError, match="no part"):
        join_parts([], tmp_path / "out.mp4", fps=Fraction(30))
    assert not list(tmp_path.glob("out.mp4*"))


def copy_packets(source: Path, path: Path, kept: Callable[[int], bool]) -> Path:
    """A copy of the packets that are `kept`, by their index in decoding order, shown from time 0 on."""
    with av.open(str(source)) as src, av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream_from_template(src.streams.video[0])
        packets = [packet for packet in src.demux(src.streams.video[0]) if packet.pts is not None]
        chosen = [packet for index, packet in enumerate(packets) if kept(index)]
        shift = -min(packet.pts for packet in chosen)
        for packet in chosen:
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
            out.mux(packet)
    return path


def test_parts_that_are_no_whole_run_of_frames_are_refused(tmp_path: Path) -> None:
    first, second = encode(tmp_path, [4, 6])
    for kept, problem in [(lambda i: i != 3, "whole run"), (lambda i: i > 0, "key frame"), (lambda i: True, None)]:
        other = copy_packets(second, tmp_path / "other.mp4", kept)
        if problem is None:  # what is refused is the gap, not the copy
            join_parts([first, other], tmp_path / "out.mp4", fps=Fraction(30))
        else:
            with pytest.raises(InternalError, match=problem):
                join_parts([first, other], tmp_path / "out.mp4", fps=Fraction(30))
            assert not list(tmp_path.glob("out.mp4*"))


def test_the_bit_rate_is_that_of_the_whole(tmp_path: Path) -> None:
    """Not that of the first part, which takes far more bits a second than the second."""
    still = np.repeat(indexed_frames(1, 2), 200, axis=0)
    parts = encode(tmp_path, [1])
    with Mp4Writer(tmp_path / "still.mp4", 96, 64, Fraction(30)) as writer:
        writer.write(still)
    join_parts([*parts, tmp_path / "still.mp4"], tmp_path / "out.mp4", fps=Fraction(30))
    data = (tmp_path / "out.mp4").read_bytes()
    _, most, average = struct.unpack_from(">3I", data, data.index(b"btrt") + 4)
    assert most == average < 20_000


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out, parts = tmp_path / "out.mp4", encode(tmp_path, [3])
    out.write_bytes(b"an older output")
    with suppress(InternalError):
        join_parts([*parts, truncate(parts[0], tmp_path / "cut.mp4", 0.5)], out, fps=Fraction(30))
    assert out.read_bytes() == b"an older output"
    join_parts(parts, out, fps=Fraction(30))
    check_stamps(out, 3, 30)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    parts = encode(tmp_path / "parts", [30])
    out = tmp_path / "out" / "out.mp4"
    out.parent.mkdir()
    out.with_name("out.mp4.part").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    with pytest.raises(StorageFull, match="no space"):
        join_parts(parts, out, fps=Fraction(30))
    assert list(out.parent.iterdir()) == []
