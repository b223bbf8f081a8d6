"""Sound: read back through PyAV alone, and placed by when its tone begins."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from runner.errors import InputNotFound, InputUnreadable
from runner.video import AudioSpan, Mp4Writer, check_sound, join_parts
from runner.video.sound import Sound
from tests.video_files import indexed_frames, make_clip, overwrite_middle, remux, tone


def write(path: Path, frames: int, fps: int, audio: AudioSpan) -> str:
    """Pictures in parts of at most 7 frames, with the sound of `audio`; what became of it."""
    folder = path.parent / "parts"
    parts = []
    for begin in range(0, frames, 7):
        parts.append(folder / f"{begin}.mp4")
        with Mp4Writer(parts[-1], 96, 64, Fraction(fps)) as writer:
            writer.write(indexed_frames(begin, min(begin + 7, frames)))
    note = join_parts(parts, path, fps=Fraction(fps), audio=audio)
    assert note is not None
    with av.open(str(path)) as container:
        assert note.missing == (not container.streams.audio)
    return note.text


def sound_of(path: Path) -> tuple[np.ndarray, int]:
    """float32 [n] of the first channel, from time 0 on, and its rate."""
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].codec_context.sample_rate
        blocks = [(b.pts * b.time_base, b.to_ndarray()[0]) for b in container.decode(audio=0)]
    assert blocks[0][0] == 0
    return np.concatenate([b for _, b in blocks]), rate


def onset_s(path: Path) -> float:
    wave, rate = sound_of(path)
    return float(np.argmax(np.abs(wave) > 0.1)) / rate


@pytest.mark.parametrize(("start_s", "rate"), [(0.0, 44100), (1.0, 44100), (0.7, 48000), (3.5, 22050), (3.5, 11025)])
def test_sound_starts_with_the_span(tmp_path: Path, start_s: float, rate: int) -> None:
    """The tone begins at 4.25 s of the source, so at 4.25 - start_s of the output, within one AAC frame."""
    source = make_clip(tmp_path / "source.mp4", 150, options={"bf": "2"}, audio=tone(5.0, rate, 4.25), audio_rate=rate)
    path = tmp_path / "out.mp4"
    assert "AAC" in write(path, 40, 8, AudioSpan(source, start_s, 5.0))
    assert abs(onset_s(path) - (4.25 - start_s)) < 1024 / rate
    wave, own = sound_of(path)
    assert own == rate
    assert abs(len(wave) / rate - (5.0 - start_s)) < 2048 / rate  # the source's sound ends at 5 s


def test_sound_is_cut_where_the_pictures_end(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "source.mp4", 90, audio=tone(3.0))
    for name, span in [("span", AudioSpan(source, 0.5, 1.0)), ("pictures", AudioSpan(source, 0.5, 2.5))]:
        write(tmp_path / f"{name}.mp4", 30, 30, span)
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            stream = container.streams.audio[0]
            assert abs(float(stream.duration * stream.time_base) - 1.0) < 1024 / 44100
        wave, rate = sound_of(tmp_path / f"{name}.mp4")
        steady = wave[rate // 10 : rate // 2]
        assert np.sqrt((steady**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
        crossings = np.count_nonzero(np.diff(np.signbit(steady)))
        assert crossings / 2 / (len(steady) / rate) == pytest.approx(440, rel=0.02)


def test_sound_follows_shifted_pictures(tmp_path: Path) -> None:
    plain = make_clip(tmp_path / "plain.mp4", 90, options={"bf": "2"}, audio=tone(3.0, start_silence_s=1.25))
    for shift in [-0.5, 0.5]:  # trimmed by an edit list; pictures that begin after the sound
        source = remux(plain, tmp_path / "shifted.mp4", video_shift_s=shift)
        path = tmp_path / "out.mp4"
        write(path, 20, 10, AudioSpan(source, 0.0, 2.0))
        assert abs(onset_s(path) - (1.25 - max(shift, 0))) < 1024 / 44100


@pytest.mark.parametrize(("codec", "container"), [("libmp3lame", "matroska"), ("opus", "matroska"), ("ac3", "mpegts")])
def test_sound_of_other_codecs(tmp_path: Path, codec: str, container: str) -> None:
    rate = 48000
    sound, path = tone(2.0, rate, 1.0), tmp_path / "source.any"
    source = make_clip(path, 60, audio=sound, audio_codec=codec, audio_rate=rate, container=container)
    write(tmp_path / "out.mp4", 60, 30, AudioSpan(source, 0.25, 1.75))
    assert abs(onset_s(tmp_path / "out.mp4") - 0.75) < 2 * 1024 / rate  # their own frames are longer, and mp3 smears


def test_one_channel_stays_one(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "source.mp4", 30, audio=tone(1.0, 16000, 0.5)[:1], audio_rate=16000)
    assert "16000 Hz mono" in write(tmp_path / "out.mp4", 30, 30, AudioSpan(source, 0.0, 1.0))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.layout.nb_channels == 1
    assert abs(onset_s(tmp_path / "out.mp4") - 0.5) < 1024 / 16000


def test_no_sound_is_no_stream_and_a_note(tmp_path: Path) -> None:
    silent = make_clip(tmp_path / "silent.mp4", 30)
    brief = make_clip(tmp_path / "brief.mp4", 90, audio=tone(1.0))
    for source, start_s, note in [(silent, 0.0, "no sound"), (brief, 2.0, "ends before")]:
        check_sound(AudioSpan(source, start_s, 1 / 3))
        assert note in write(tmp_path / "out.mp4", 10, 30, AudioSpan(source, start_s, 1 / 3))
        with av.open(str(tmp_path / "out.mp4")) as container:
            assert not container.streams.audio
            assert container.streams.video[0].frames == 10


def test_a_long_video_takes_no_more_memory(tmp_path: Path) -> None:
    """What is held does not grow with the number of frames that the sound is cut at."""
    source = make_clip(tmp_path / "source.mp4", 2, audio=tone(20.0, 8000)[:1], audio_rate=8000)
    held = []
    with av.open(str(tmp_path / "out.mp4"), "w") as out:
        sound, _ = Sound.open(AudioSpan(source, 0.0, 20.0), out)
        assert sound is not None
        tracemalloc.start()
        try:
            for step in range(1, 8001):
                sound.write_until(out, Fraction(step, 400))
                if step in (1000, 7000):
                    held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        sound.finish(out)
    assert held[1] - held[0] < 100_000  # bytes
    with av.open(str(tmp_path / "out.mp4")) as container:
        blocks = [block.to_ndarray()[0] for block in container.decode(audio=0)]
    assert abs(len(np.concatenate(blocks)) / 8000 - 20.0) < 2048 / 8000


@pytest.mark.parametrize("start_s", [0.0, 0.3])
def test_damaged_sound_fails_in_words(tmp_path: Path, start_s: float) -> None:
    source = make_clip(tmp_path / "source.mp4", 2, audio=tone(2.0), options={"crf": "40"})
    bad = AudioSpan(overwrite_middle(source, tmp_path / "bad.mp4", 0.4, 0.95, 0xFF), start_s, 2.0 - start_s)
    with pytest.raises(InputUnreadable, match="keep_audio"):
        check_sound(bad)  # before anything was rendered
    with pytest.raises(InputUnreadable, match="keep_audio"):
        write(tmp_path / "out.mp4", 60, 30, bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.mp4", "parts", "source.mp4"]


def test_the_check_reads_the_span_and_no_more(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "source.mp4", 2, audio=tone(8.0), options={"crf": "40"})
    late = overwrite_middle(source, tmp_path / "late.mp4", 0.7, 0.95, 0xFF)
    check_sound(AudioSpan(late, 0.0, 2.0))
    with pytest.raises(InputUnreadable, match=r"late\.mp4"):
        check_sound(AudioSpan(late, 0.0, 8.0))
    with pytest.raises(InputNotFound):
        check_sound(AudioSpan(tmp_path / "none.mp4", 0.0, 1.0))
