"""Decode: read which frames a video file holds, when each is on screen, and their pixels by index.

In:   a local file. Out: a `Timeline` (no pixels), or uint8 RGB frames, upright, by index in presentation order.
Never: sampling rules, output files, jobs.

A frame is identified by its timestamp: packets give the timeline, and decoded frames are matched to it. So seeks are
checked, edit lists are obeyed, and damage that a decoder would hide is refused.

PyAV is the default reader. decord (decord2 3.4) is not, although both give the same pixels for most files: decord
decodes ahead without bound (1 GB for 200 frames of 1080p with a slow consumer), misnumbers frames of trimmed files,
transport streams and open groups of pictures, and does not report damage. Jobs with `preprocess.parity` read through it
all the same, as the official script does: see decord_reader.py. This module reads the timeline for them, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import InputNotFound, InputTooLarge, InputUnreadable, as_runner_error

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE",
    "Frames",
    "Timeline",
    "open_container",
    "read_timeline",
]

MAX_SIDE = 8192  # pixels
MAX_PIXELS = 64_000_000  # one RGB frame of this size is 192 MB
MAX_ASPECT = 20  # long side to short side, as for images
THREADS = min(4, os.cpu_count() or 1)  # with more threads a decoder mainly holds more frames in memory
RECENT, RECENT_BYTES = 8, 64 << 20  # limits of the frames that are kept for the next call: segments overlap by 5
FAR = 150  # frames; skipping fewer is about as cheap to decode through as to seek over
REENCODE = "Convert it, for example: ffmpeg -i INPUT -c:v libx264 -pix_fmt yuv420p OUTPUT.mp4"
# FFmpeg takes some text files for playlists. Without this it would fetch the addresses in them.
OPEN_OPTIONS = {"protocol_whitelist": "file"}


@dataclass(frozen=True)
class Timeline:
    """The frames of a video stream in presentation order, from its packets. Only the first frame was decoded."""

    path: Path
    pts: np.ndarray = field(repr=False)  # int64 [n], increasing, units of time_base
    keyframes: np.ndarray = field(repr=False)  # int64 [k], indices of frames that decode on their own
    end: int  # when the last frame leaves the screen, units of time_base
    time_base: Fraction  # seconds
    fps: Fraction  # average
    width: int  # upright, pixels
    height: int
    has_audio: bool
    counted: bool  # the file has no usable timestamps: frame i is the i-th that the decoder gives
    rotation: int  # degrees counter-clockwise by which the container turns its frames upright: 0, 90, 180 or 270
    indexed: bool = False  # the container lists its keyframes (MP4, Matroska), so that a seek lands exactly

    @property
    def frames(self) -> int:
        return len(self.pts)

    @property
    def starts_s(self) -> np.ndarray:
        """float64 [n]: when each frame appears, seconds after the first one does."""
        return (self.pts - self.pts[0]).astype(np.float64) * float(self.time_base)

    @property
    def duration_s(self) -> float:
        return float((self.end - int(self.pts[0])) * self.time_base)


def read_timeline(path: Path) -> Timeline:
    """Scan a file's packets, and decode its first frame.

    Raises InputNotFound, InputUnreadable (not a video, empty, truncated, no frames, unknown codec), InputTooLarge.
    """
    import av

    with open_container(path) as container:
        stream = _video_stream(container, path)
        _check_size(stream.codec_context.width, stream.codec_context.height, path)
        packets: list[tuple[int | None, int, bool]] = []  # pts, duration, keyframe; of frames that are shown
        indexed, found, last_s = len(stream.index_entries), 0, 0.0
        first_key: int | None = None
        try:
            for packet in container.demux():
                if not packet.size:
                    continue
                if packet.pts is not None and packet.time_base:
                    last_s = max(last_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != stream.index:
                    continue
                found += 1
                if first_key is None and packet.is_keyframe:
                    first_key = packet.pts
                if packet.is_corrupt and "mp4" in container.format.name:  # elsewhere it may be one lost packet
                    raise _truncated(path)
                if not packet.is_discard:  # an edit list hides it
                    packets.append((packet.pts, packet.duration or 0, packet.is_keyframe))
        except av.error.FFmpegError as error:
            raise _unreadable("is damaged", path, error) from error
        held_s = None if container.duration is None else container.duration / av.time_base
        # MP4 lists its samples in a header, Matroska states its length in one: fewer of them means a cut file.
        if "mp4" in container.format.name and found < indexed:
            raise _truncated(path)
        if "matroska" in container.format.name and held_s is not None and last_s < 0.95 * held_s - 1:
            raise _truncated(path)
        if not packets:
            raise InputUnreadable(
                "holds no video frames", where=path, todo="Check how it was made, or use another file"
            )
        has_audio = bool(container.streams.audio)
        listed = any(name in container.format.name for name in ("mp4", "matroska"))
        header_fps, time_base = stream.average_rate or stream.guessed_rate, stream.time_base or Fraction(1, 90000)
    first, rotation = _first_frame(path)
    pts, keyframes, last_duration, counted = _order(packets, first_key)
    if counted:
        time_base = 1 / header_fps if header_fps else Fraction(1, 25)
        pts, last_duration = np.arange(len(packets)), 1
    if not last_duration:
        last_duration = int(np.median(np.diff(pts))) if len(pts) > 1 else round(1 / ((header_fps or 25) * time_base))
    end = int(pts[-1]) + max(last_duration, 1)
    fps = _average_fps(header_fps, len(pts), (end - int(pts[0])) * time_base)
    height, width = first.shape[:2]
    indexed = listed and not counted
    return Timeline(path, pts, keyframes, end, time_base, fps, width, height, has_audio, counted, rotation, indexed)


class Frames:
    """Reads pixels by index: forward by decoding on, backward or far ahead by a seek. One thread at a time.

    It holds a few frames, see RECENT, and those in the decoder.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        # Two calls may need the same frames: an index that repeats, or the frames by which two segments overlap.
        self._recent: dict[int, np.ndarray] = {}
        self._keep = max(1, min(RECENT, RECENT_BYTES // (timeline.height * timeline.width * 3)))
        self._container: Any = None
        self._decoder: Any = None
        self._start(0)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return uint8 [n, H, W, 3] RGB for int64 [n] non-decreasing indices. Raises InputUnreadable for damage."""
        size = (self._timeline.height, self._timeline.width, 3)
        out = np.empty((len(indices), *size), np.uint8)
        for slot, index in enumerate(int(i) for i in indices):
            if index not in self._recent:
                image = _upright_rgb(self._frame(index))
                if image.shape != size:
                    raise InputUnreadable("its frames change size midway", where=self._timeline.path, todo=REENCODE)
                self._recent[index] = image
                if len(self._recent) > self._keep:
                    del self._recent[next(iter(self._recent))]
            out[slot] = self._recent[index]
        return out

    def check_span(self, first: int, last: int) -> None:
        """Decode frames `first` to `last` and drop them. Raises InputUnreadable for damage, as `read` does."""
        self._start(self._keyframe_before(first))
        self._frame(first)
        if last > first and self._forward_to(last) is None:
            raise self._missing(last)

    def close(self) -> None:
        """Release the file. Idempotent; reading again opens it again."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        if self._container is not None:
            self._container.close()
            self._container = None

    def _start(self, keyframe: int) -> None:
        """Seek to `keyframe`, or open the file at its beginning for 0. `_frame` checks where the seek landed."""
        import av

        self.close()
        self._container = open_container(self._timeline.path)
        stream = _video_stream(self._container, self._timeline.path)
        stream.thread_type, stream.codec_context.thread_count = "AUTO", THREADS
        self._trusted_from = self._next = keyframe
        if keyframe:
            try:
                self._container.seek(int(self._timeline.pts[keyframe]), stream=stream, backward=True)
            except av.error.FFmpegError:  # a container that cannot seek: decoding begins at frame 0
                self._next = 0
        self._decoder = self._container.decode(stream)

    def _keyframe_before(self, index: int) -> int:
        """The last keyframe at or before frame `index`."""
        if self._timeline.counted:
            return 0
        before = int(np.searchsorted(self._timeline.keyframes, index, side="right"))
        return int(self._timeline.keyframes[max(0, before - 1)])

    def _frame(self, index: int) -> Any:
        """PyAV's frame `index`. Raises InputUnreadable."""
        keyframe, back = self._keyframe_before(index), index < self._next
        if self._container is None or back or keyframe > self._next + FAR:
            self._start(keyframe)
        found = self._forward_to(index)
        if found is None and self._trusted_from:  # the seek landed too late, as in streams without an index
            self._start(0)
            found = self._forward_to(index)
        if found is None:
            raise self._missing(index)
        return found

    def _missing(self, index: int) -> InputUnreadable:
        return InputUnreadable(
            f"frame {index} of {self._timeline.frames} cannot be decoded: the file is truncated or damaged",
            where=self._timeline.path,
            todo="Copy or download it again, or end the job earlier with max_frames",
        )

    def _forward_to(self, index: int) -> Any:
        """Decode up to frame `index`; None when the decoder passes it by or ends."""
        import av

        timeline = self._timeline
        try:
            for frame in self._decoder:
                at = self._next if timeline.counted else self._index_of(frame.pts)
                if at is None:
                    continue
                self._next = at + 1
                # After a seek, frames before the keyframe refer to pictures that were not decoded: no damage.
                if frame.is_corrupt and at >= self._trusted_from:
                    raise InputUnreadable(
                        f"frame {at} of {timeline.frames} is damaged",
                        where=timeline.path,
                        todo="Copy or download it again, or choose a span without it (start_s, max_frames)",
                    )
                if at > index:
                    return None
                if at == index:
                    return frame
        except av.error.FFmpegError as error:
            raise _unreadable(
                f"cannot be decoded after frame {max(self._next - 1, 0)}", timeline.path, error
            ) from error
        return None

    def _index_of(self, pts: int | None) -> int | None:
        if pts is None:
            return None
        at = int(np.searchsorted(self._timeline.pts, pts))
        return at if at < self._timeline.frames and self._timeline.pts[at] == pts else None


def open_container(path: Path) -> Any:
    """Open a local file with PyAV. Raises InputNotFound, InputUnreadable, StorageDenied."""
    import av

    if not path.exists():
        raise InputNotFound("no such file", where=path, todo="Check the path in the manifest")
    if path.is_file() and not path.stat().st_size:
        raise InputUnreadable("the file is empty", where=path, todo="Copy or download it again")
    try:
        # `file:` and an absolute path: otherwise a name such as "a:b.mp4" would be taken for a protocol.
        return av.open(f"file:{path.absolute()}", options=OPEN_OPTIONS, metadata_errors="replace")
    except PermissionError as error:
        raise as_runner_error(error, where=path) from error
    except av.error.FFmpegError as error:
        raise _unreadable("is not a video that can be read, or is cut off", path, error) from error


def _video_stream(container: Any, path: Path) -> Any:
    import av

    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise InputUnreadable("holds no video stream", where=path, todo="Give a file that holds a video")
    stream = container.streams.best("video")
    stream = stream if stream in streams else streams[0]
    if stream.codec_context is None:
        raise InputUnreadable("its video codec is not supported", where=path, todo=REENCODE)
    return stream


def _check_size(width: int, height: int, path: Path) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputTooLarge(
            f"its frames have {width}x{height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS // 10**6} megapixels "
            "are allowed",
            where=path,
            todo="Scale it down first: the model uses far fewer pixels",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputUnreadable(
            f"its frames are strips of {width}x{height} pixels; one side may be at most {MAX_ASPECT} times the other",
            where=path,
            todo="Crop it to the person",
        )


def _first_frame(path: Path) -> tuple[np.ndarray, int]:
    """Return the first frame, upright, and the degrees by which it was turned."""
    import av

    with open_container(path) as container:
        stream = _video_stream(container, path)
        try:
            frame = next(iter(container.decode(stream)), None)
        except av.error.FFmpegError as error:
            raise _unreadable("its first frame cannot be decoded", path, error) from error
        if frame is None:
            raise InputUnreadable("no frame can be decoded", where=path, todo=REENCODE)
        _check_size(frame.width, frame.height, path)
        return _upright_rgb(frame), 0 if frame.rotation % 90 else frame.rotation % 360


def _upright_rgb(frame: Any) -> np.ndarray:
    """Return uint8 [H, W, 3] RGB, converted by the stream's colour tags and turned by its rotation tag."""
    image = frame.to_ndarray(format="rgb24")
    if frame.rotation % 90 == 0 and frame.rotation % 360:
        image = np.rot90(image, frame.rotation // 90)
    return image


def _order(
    packets: list[tuple[int | None, int, bool]], first_key: int | None
) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Return (pts in presentation order, keyframe indices, last frame's duration, counted) of packets in file order."""
    stamps = [pts for pts, _, _ in packets if pts is not None]
    if len(set(stamps)) != len(packets):
        return np.arange(len(packets)), np.zeros(1, np.int64), 0, True
    # A recording cut out of a broadcast starts between keyframes: frames before the first one cannot be decoded.
    stamped = ((pts, duration, key) for pts, duration, key in packets if pts is not None)
    shown = sorted(entry for entry in stamped if first_key is None or entry[0] >= first_key)
    keyframes = np.array([i for i, (_, _, key) in enumerate(shown) if key] or [0], np.int64)
    return np.array([pts for pts, _, _ in shown], np.int64), keyframes, shown[-1][1], False


def _average_fps(header: Fraction | None, frames: int, duration_s: Fraction) -> Fraction:
    """Return the header's rate if the measured one is within 2 % of it, else the measured one."""
    measured = frames / duration_s
    if header and abs(header / measured - 1) < Fraction(2, 100):
        measured = Fraction(header)
    return measured


def _truncated(path: Path) -> InputUnreadable:
    return InputUnreadable("the file is truncated", where=path, todo="Copy or download it again")


def _unreadable(what: str, path: Path, error: Exception) -> InputUnreadable:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = getattr(error, "strerror", None) or lines[0].strip()
    return InputUnreadable(f"{what} ({reason})", where=path, todo=f"Copy or download it again. {REENCODE}")
