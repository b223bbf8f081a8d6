"""Sound: write a span of a source's sound as the AAC track of an open MP4, or as a WAV file.

In:   a file with sound, a span of it, an open container or a path. Out: packets in the container, or the file.
Never: pictures, and which job the sound belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import InputUnreadable
from runner.video.decode import open_container
from runner.video.unfinished import open_unfinished

__all__ = ["AudioSpan", "Sound", "SoundNote", "check_sound", "write_wav"]

AAC_RATES = {96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350}
AAC_BITS_PER_CHANNEL = 96_000
FLOAT, PCM = "fltp", "s16p"  # samples for AAC, for WAV; one plane a channel
USUAL = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # as FFmpeg assumes
ENDED = "the source's sound ends before the rendered span"
GAP_S = 0.05  # timestamps in whole milliseconds jitter by less; a larger gap or overlap moves the sound


@dataclass(frozen=True)
class AudioSpan:
    """The sound of `path` from `start_s` (seconds after its first video frame) for `duration_s` seconds."""

    path: Path
    start_s: float
    duration_s: float


@dataclass(frozen=True)
class SoundNote:
    """What was done with the sound, as text. missing: the source has no sound in the span."""

    text: str
    missing: bool


class Sound:
    """Copies a span of sound from a source file into an open container, as AAC."""

    def __init__(self, pieces: Iterator[np.ndarray], source: Any, rate: int, layout: str, container: Any) -> None:
        self._pieces, self._source, self._rate, self._layout = pieces, source, rate, layout
        self._rest: np.ndarray | None = None  # of the last piece, after the time that was written last
        self._done = 0  # samples handed to the encoder
        self._out = container.add_stream("aac", rate=rate, layout=layout)
        self._out.codec_context.bit_rate = AAC_BITS_PER_CHANNEL * (1 if layout == "mono" else 2)

    @classmethod
    def open(cls, span: AudioSpan, container: Any) -> tuple[Sound | None, SoundNote]:
        """Return the sound, or None where there is none, and a note on it. The caller calls `close` in the end.

        Raises InputUnreadable if its first samples cannot be decoded.
        """
        source = open_container(Path(span.path))
        try:
            found = _find_sound(source)
            if isinstance(found, str):
                return None, SoundNote(found, missing=True)
            track = _for_aac(found)
            pieces = _cut(source, track, span)
            first = next(pieces, None)
            if first is None:
                return None, SoundNote(ENDED, missing=True)
            sound = cls(chain([first], pieces), source, track.rate, track.layout, container)
            source = None  # the sound closes it from here on
            text = f"cut to the rendered span, encoded as AAC at {track.rate} Hz {track.layout}"
            return sound, SoundNote(text, missing=False)
        finally:
            if source is not None:
                source.close()

    def write_until(self, container: Any, seconds: Fraction) -> None:
        """Encode the sound up to `seconds` of the output, or up to its end."""
        import av

        target = round(seconds * self._rate)
        while self._done < target:
            piece = self._rest if self._rest is not None else next(self._pieces, None)
            if piece is None:
                return
            now, later = piece[:, : target - self._done], piece[:, target - self._done :]
            self._rest = later if later.shape[1] else None
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(now), format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._done, Fraction(1, self._rate)
            container.mux(self._out.encode(frame))
            self._done += now.shape[1]

    def finish(self, container: Any) -> None:
        """Write the packets that are left in the encoder, and close the source."""
        container.mux(self._out.encode(None))
        self.close()

    def close(self) -> None:
        """Close the source. Idempotent."""
        if self._source is not None:
            self._source.close()
            self._source = None


def check_sound(span: AudioSpan) -> None:
    """Decode the whole span, so that a job whose sound is damaged fails before it costs anything.

    A source without sound passes. Raises InputUnreadable and what opening the file raises.
    """
    source = open_container(Path(span.path))
    try:
        stream = _find_sound(source)
        if not isinstance(stream, str):
            for _ in _cut(source, _for_aac(stream), span):
                pass
    finally:
        source.close()


def write_wav(span: AudioSpan, dest: Path, seconds: Fraction) -> SoundNote:
    """Write at most the first `seconds` of the span to `dest`: 16-bit PCM at the source's own rate and channels.

    The file ends with the source's sound, or after round(`seconds` x rate) samples if that is earlier. Gaps become
    silence. The same source gives the same bytes. `dest` appears complete, or not at all: the note says whether there
    is sound. Raises InputUnreadable if it cannot be decoded, StorageFull and StorageDenied for errors of the disk.
    """
    import av

    dest = Path(dest)
    with closing(open_container(Path(span.path))) as source:
        stream = _find_sound(source)
        if isinstance(stream, str):
            return SoundNote(stream, missing=True)
        track = _for_pcm(stream)
        pieces = _cut(source, track, span, seconds)
        first = next(pieces, None)
        if first is None:
            return SoundNote(ENDED, missing=True)
        # RF64 for sound of more than 4 GiB, the limit of WAV. bitexact: without name and version of the library.
        with open_unfinished(dest, "wav", {"rf64": "auto", "fflags": "+bitexact"}) as container:
            out = container.add_stream("pcm_s16le", rate=track.rate, layout=track.layout)
            done = 0
            for piece in chain([first], pieces):
                packed = np.ascontiguousarray(piece.T).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=track.layout)
                frame.sample_rate, frame.pts, frame.time_base = track.rate, done, Fraction(1, track.rate)
                container.mux(out.encode(frame))
                done += piece.shape[1]
            container.mux(out.encode(None))
    text = f"cut to the rendered span, written to {dest.name} as 16-bit PCM at {track.rate} Hz {track.layout}"
    return SoundNote(text, missing=False)


@dataclass(frozen=True)
class _Track:
    """A stream of sound, and the rate, layout and sample format to decode it to."""

    stream: Any
    rate: int  # samples a second
    layout: str  # mono | stereo | 5.1 | …
    format: str  # FLOAT | PCM


def _find_sound(source: Any) -> Any:
    """Return the source's stream of sound, or a str that says why there is none."""
    stream = source.streams.best("audio")
    if stream is None or stream.codec_context is None:
        return "the source has no sound" if stream is None else "the source's sound has an unknown codec"
    return stream


def _for_aac(stream: Any) -> _Track:
    """Return the track for AAC: at a rate that AAC has, with one channel or two."""
    own, channels = stream.codec_context.sample_rate, stream.codec_context.layout.nb_channels
    return _Track(stream, own if own in AAC_RATES else 48000, "mono" if channels == 1 else "stereo", FLOAT)


def _for_pcm(stream: Any) -> _Track:
    """Return the track for PCM: at the source's rate, with all its channels.

    Where the file gives only the number of channels, they get their usual positions.
    """
    layout = stream.codec_context.layout
    name = USUAL.get(layout.nb_channels, layout.name) if layout.name.endswith(" channels") else layout.name
    return _Track(stream, stream.codec_context.sample_rate, name, PCM)


def _cut(source: Any, track: _Track, span: AudioSpan, seconds: Fraction | None = None) -> Iterator[np.ndarray]:
    """Yield the span's samples in order, at most `seconds` of them. Gaps in the source become silence.

    [channels, n] at the track's rate: float32 in FLOAT, int16 in PCM.
    """
    import av

    stream, rate, layout = track.stream, track.rate, track.layout
    video = source.streams.best("video")
    origin_s = float((video.start_time or 0) * video.time_base) if video is not None else 0.0
    begin_s = origin_s + span.start_s
    total, channels = round(span.duration_s * rate), av.AudioLayout(layout).nb_channels
    if seconds is not None:
        total = min(total, round(seconds * rate))
    resampler = av.AudioResampler(format=track.format, layout=layout, rate=rate)
    kind = np.float32 if track.format == FLOAT else np.int16
    cursor, position = 0, None  # samples yielded; where the next block belongs
    try:
        if begin_s > 2:  # a second early: after a seek an AAC decoder needs a packet or two before its output is right
            source.seek(int((begin_s - 1) / stream.time_base), stream=stream, backward=True)
        for decoded in chain(source.decode(stream), [None]):  # None drains the resampler
            for block in resampler.resample(decoded):
                if block.pts is not None:
                    stamped = round((float(block.pts * block.time_base) - begin_s) * rate)
                    if position is None or abs(stamped - position) > GAP_S * rate:
                        position = stamped
                position = position or 0
                samples = block.to_ndarray()[:, max(0, cursor - position) :]
                position += block.samples
                while cursor < min(position - samples.shape[1], total):
                    silent = min(position - samples.shape[1] - cursor, total - cursor, rate)
                    yield np.zeros((channels, silent), kind)
                    cursor += silent
                samples = samples[:, : total - cursor]
                if samples.shape[1]:
                    yield np.ascontiguousarray(samples)
                    cursor += samples.shape[1]
            if cursor >= total:
                return
    except av.error.FFmpegError as error:
        raise InputUnreadable(
            f"its sound cannot be decoded ({error.strerror})", where=span.path, todo="Set keep_audio to false"
        ) from error
