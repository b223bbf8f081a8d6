"""Sound: read back through PyAV alone, and placed by when its tone begins."""

from __future__ import annotations

import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from runner.errors import InputNotFound, InputUnreadable, StorageFull
from runner.video import AudioSpan, Mp4Writer, check_sound, join_parts, write_wav
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


# -- WAV --------------------------------------------------------------------------------------------------------------


def wav_of(path: Path) -> tuple[np.ndarray, int]:
    """int16 [n, channels] and the rate, by Python's own reader."""
    with wave.open(str(path)) as file:
        assert (file.getsampwidth(), file.getcomptype()) == (2, "NONE")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, file.getnchannels()), file.getframerate()


def decoded(path: Path) -> np.ndarray:
    """All samples of a file's sound as FFmpeg decodes them: [n, channels], in the codec's own type."""
    with av.open(str(path)) as container:
        blocks = [block.to_ndarray() for block in container.decode(audio=0)]
        stream = container.streams.audio[0]
        if not stream.codec_context.format.is_planar:
            return np.concatenate([b.reshape(-1, stream.codec_context.channels) for b in blocks])
        return np.concatenate([b.T for b in blocks])


def noise_clip(path: Path, seconds: float, rate: int, layout: str, gap_s: float = 0.0) -> tuple[Path, np.ndarray]:
    """A Matroska with 16-bit noise, no two samples alike in their neighbourhood; after 1 s nothing for `gap_s`.

    Also the noise, int16 [n, channels].
    """
    channels = av.AudioLayout(layout).nb_channels
    noise = np.random.default_rng(rate).integers(-(2**15), 2**15, (round(seconds * rate), channels), dtype=np.int16)
    with av.open(str(path), "w", format="matroska") as out:
        video = out.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        sound = out.add_stream("pcm_s16le", rate=rate, layout=layout)
        for index in range(round(seconds * 10)):
            picture = av.VideoFrame.from_ndarray(indexed_frames(index, index + 1)[0], format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, 10)
            out.mux(video.encode(picture))
        out.mux(video.encode(None))
        for begin in range(0, len(noise), 1000):
            piece = noise[begin : begin + 1000]
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece).reshape(1, -1), format="s16", layout=layout)
            late = round(gap_s * rate) if begin >= rate else 0
            block.sample_rate, block.pts, block.time_base = rate, begin + late, Fraction(1, rate)
            out.mux(sound.encode(block))
        out.mux(sound.encode(None))
    return path, noise


@pytest.mark.parametrize(
    ("rate", "layout"), [(44100, "stereo"), (48000, "5.1"), (37800, "mono"), (8000, "mono"), (96000, "stereo")]
)
def test_a_wav_has_the_sources_own_samples_rate_and_channels(tmp_path: Path, rate: int, layout: str) -> None:
    """Cut to the sample: 7 frames of 30000/1001 a second from 0.75 s on."""
    source, noise = noise_clip(tmp_path / "source.mkv", 1.5, rate, layout)
    path, seconds = tmp_path / "audio.wav", Fraction(7) / Fraction(30000, 1001)
    note = write_wav(AudioSpan(source, 0.75, float(seconds)), path, seconds)
    assert (note.missing, note.text) == (
        False,
        f"cut to the rendered span, written to audio.wav as 16-bit PCM at {rate} Hz {layout}",
    )
    begin, count = round(0.75 * rate), round(seconds * rate)
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        own = stream.codec_context
        assert (own.name, own.layout.nb_channels) == ("pcm_s16le", noise.shape[1])
        assert own.layout.name in (layout, f"{noise.shape[1]} channels")  # a plain header names no places
        assert (stream.codec_context.sample_rate, stream.duration) == (rate, count)
    assert np.array_equal(decoded(path), noise[begin : begin + count])
    assert layout != "5.1" or own.layout.name == "5.1"
    if layout != "5.1" and rate <= 48000:  # beyond, the header is of a kind that Python 3.11 does not read
        samples, own = wav_of(path)
        assert own == rate
        assert np.array_equal(samples, noise[begin : begin + count])
    first = path.read_bytes()
    write_wav(AudioSpan(source, 0.75, float(seconds)), path, seconds)
    assert path.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audio.wav", "source.mkv"]


def test_a_wav_of_compressed_sound_is_what_the_decoder_gives(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "source.mp4", 60, audio=tone(2.0, 44100, 0.5), audio_rate=44100)
    write_wav(AudioSpan(source, 0.0, 2.0), tmp_path / "audio.wav", Fraction(2))
    samples, rate = wav_of(tmp_path / "audio.wav")
    assert (samples.shape, rate) == ((88200, 2), 44100)
    wanted = decoded(source)[:88200].astype(np.float64) * 2**15
    assert np.abs(samples[: len(wanted)] - wanted).max() <= 0.51  # rounded once
    assert abs(np.argmax(np.abs(samples[:, 0]) > 3277) / rate - 0.5) < 1024 / 44100


def test_a_wav_is_silent_in_a_gap_and_ends_with_the_sound_or_the_pictures(tmp_path: Path) -> None:
    rate = 16000
    source, noise = noise_clip(tmp_path / "source.mkv", 2.0, rate, "mono", gap_s=0.25)
    for seconds, span_s in [(Fraction(3), 3.0), (Fraction(3, 2), 3.0), (Fraction(3), 1.5)]:
        write_wav(AudioSpan(source, 0.5, span_s), tmp_path / "audio.wav", seconds)
        samples, _ = wav_of(tmp_path / "audio.wav")
        whole = np.concatenate([noise[:rate], np.zeros((rate // 4, 1), np.int16), noise[rate:]])[rate // 2 :]
        most = round(min(float(seconds), span_s) * rate)
        assert np.array_equal(samples, whole[:most])
        assert len(samples) == (1.75 * rate if most == 3 * rate else 1.5 * rate)


def test_without_sound_there_is_no_wav_and_a_note(tmp_path: Path) -> None:
    silent = make_clip(tmp_path / "silent.mp4", 30)
    brief = make_clip(tmp_path / "brief.mp4", 90, audio=tone(1.0))
    for source, start_s, text in [(silent, 0.0, "no sound"), (brief, 2.0, "ends before")]:
        note = write_wav(AudioSpan(source, start_s, 1 / 3), tmp_path / "audio.wav", Fraction(1, 3))
        assert note.missing
        assert text in note.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["brief.mp4", "silent.mp4"]


def test_a_wav_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_clip(tmp_path / "source.mp4", 2, audio=tone(2.0), options={"crf": "40"})
    bad = overwrite_middle(source, tmp_path / "bad.mp4", 0.4, 0.95, 0xFF)
    with pytest.raises(InputUnreadable, match="keep_audio"):
        write_wav(AudioSpan(bad, 0.0, 2.0), tmp_path / "audio.wav", Fraction(2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runner.video.unfinished.os.replace", full)
    with pytest.raises(StorageFull):
        write_wav(AudioSpan(source, 0.0, 2.0), tmp_path / "audio.wav", Fraction(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.mp4", "source.mp4"]
