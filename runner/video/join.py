"""Join: put encoded parts of a video into one MP4 without encoding them again, with sound if wanted.

In:   MP4 parts of Mp4Writer in order, their rate, optionally a span of a source's sound. Out: a complete MP4, or none.
Never: frames in pixels, where the parts come from, jobs.

The same parts and sound give the same bytes on any machine.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

from runner.errors import InternalError
from runner.video.sound import AudioSpan, Sound, SoundNote
from runner.video.unfinished import open_unfinished

__all__ = ["join_parts"]

# By how many frames a packet is decoded before it is shown, at most: two, as x264's preset `medium` lets B-frames refer
# to B-frames. The number is fixed for the whole file because x264 uses a smaller one in a part of one or two frames.
REORDER_FRAMES = 2
TRACK_TIMESCALE = 10_000  # ticks a second at least, as FFmpeg's muxer gives a video track


def join_parts(parts: Sequence[Path], dest: Path, *, fps: Fraction, audio: AudioSpan | None = None) -> SoundNote | None:
    """Write the pictures of `parts` one after the other to `dest`, with the sound of `audio`.

    Each frame lasts exactly 1/fps; dts grows by one frame a packet and is never above pts. `dest` appears complete, or
    not at all. Returns a note on the sound, None without `audio`. Raises InternalError if the parts were encoded with
    different parameters or are damaged, InputUnreadable if the sound cannot be decoded, StorageFull and StorageDenied
    for errors of the disk.
    """
    if not parts:
        raise ValueError(f"{dest}: no part was given")
    dest, fps = Path(dest), Fraction(fps)
    sound: Sound | None = None
    note = None
    options = {"movflags": "+faststart", "movie_timescale": str(_movie_timescale(fps))}
    try:
        with open_unfinished(dest, "mp4", options) as container:
            with _open_part(parts[0]) as first:
                template = first.streams.video[0]
                parameters = _parameters(template)
                stream = container.add_stream_from_template(template)
            stream.codec_context.bit_rate = 0  # the first part's; the muxer measures that of the whole
            if audio is not None:
                sound, note = Sound.open(audio, container)
            container.start_encoding()
            done = 0
            with closing(_renumbered(parts, parameters, fps)) as packets:
                for packet in packets:
                    packet.stream = stream
                    container.mux(packet)
                    done += 1
                    if sound is not None:  # alternating with the pictures, or the muxer would queue all of them
                        sound.write_until(container, done / fps)
            if sound is not None:
                sound.finish(container)
    finally:
        if sound is not None:
            sound.close()
    return note


def _renumbered(parts: Sequence[Path], parameters: tuple[Any, ...], fps: Fraction) -> Generator[Any, None, None]:
    """Yield the packets of all parts in decoding order, their stamps counted in frames from the first part's start."""
    decoded = begin = 0  # packets of all parts so far; frames of the parts before
    for path in parts:
        with _open_part(path) as part:
            video = part.streams.video[0]
            if _parameters(video) != parameters:
                raise InternalError("this part was encoded with other parameters than the first", where=path)
            shown: set[Fraction] = set()
            for packet in part.demux(video):
                if packet.pts is None:  # the end of the file
                    continue
                if not shown and not packet.is_keyframe:
                    raise InternalError("this part does not begin with a key frame", where=path)
                index = packet.pts * packet.time_base * fps
                shown.add(index)
                packet.time_base = 1 / fps
                packet.pts, packet.dts, packet.duration = begin + int(index), decoded - REORDER_FRAMES, 1
                if packet.dts > packet.pts:
                    raise InternalError("this part decodes its frames in another order than expected", where=path)
                decoded += 1
                yield packet
        if decoded == begin or shown != set(range(decoded - begin)):
            raise InternalError("this part is no whole run of frames at the video's rate", where=path)
        begin = decoded


def _open_part(path: Path) -> Any:
    import av

    try:
        part = av.open(f"file:{Path(path).absolute()}")
        if part.streams.video:
            return part
        part.close()
    except av.error.InvalidDataError:
        pass
    raise InternalError("this part of a video is damaged", where=path)


def _parameters(video: Any) -> tuple[Any, ...]:
    """Return the parameters that must be equal in all parts, so that one decoder reads them: SPS, PPS, size, colour."""
    context = video.codec_context
    colours = context.color_range, context.colorspace, context.color_primaries, context.color_trc
    return context.name, context.extradata, context.width, context.height, context.pix_fmt, *colours


def _movie_timescale(fps: Fraction) -> int:
    """Return the ticks a second of the movie's clock: those of its video track.

    FFmpeg's default of 1000 would round the movie's length.
    """
    timescale = fps.numerator
    while timescale < TRACK_TIMESCALE:
        timescale *= 2
    return timescale
