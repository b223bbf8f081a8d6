"""Decord reader: what decord finds in a video file, and the frames that one `get_batch` call of it gives.

In:   a file whose timeline PyAV has read, and the numbers of all frames that will be read.
Out:  uint8 RGB frames, by number.
Never: sampling rules, jobs, more than a chunk of frames in memory.

The official preprocessing reads the driving video through decord, with one `VideoReader.get_batch` over all sampled
frames. A job with `preprocess.parity` gets the same frames, read in chunks. An open decord reader decodes ahead without
bound, also with one thread (1.5 GB for 1,000 frames of 1280x720 with a slow consumer; decord2 3.4.0, two CPU cores).
So a chunk is read in one go, and decord is closed after each chunk.

decord numbers frames by counting from the last seek, and `get_batch` seeks wherever sampling leaves out a keyframe. In
some files a seek does not land where decord expects it, and a frame depends on all frames that were read before it.
`DecordFrames` reads those again whenever it opens decord in the middle of such a file. Time then grows with the square
of the length: 2,000 frames of 1280x720 took 15 s, and 5 s where nothing was read again. Where the container has an
index, and decord and PyAV agree on all keyframes, a seek lands exactly, and decord starts at the nearest keyframe.

Comparison with PyAV (av 18.1, decord2 3.4.0; clips as in tests/video/test_decord_reader.py, and one real clip, H.264
480x480):
- Equal bit for bit: H.264, HEVC with 10 bits, VP9, AV1, MPEG-4, ProRes, FFV1, MJPEG, QuickTime RLE and PNG; 4:2:0,
  4:2:2, 4:4:4, grey, RGB and alpha; odd sizes; quarter turns; variable rates; late starts; MP4, Matroska, WebM, AVI.
- Other frames: MP4 files with an edit list that hides frames; transport streams; open groups of pictures where sampling
  leaves frames out.
- Refused: streams without timestamps (raw H.264); MPEG program streams where sampling leaves frames out, as decord has
  no usable timestamps there and its frames change from one read to the next.
- Another size: a turn that is no multiple of 90 degrees.
- decord paints over some damage that PyAV refuses, so `VideoReader` lets PyAV decode the sampled span first. decord may
  refuse damage behind the span, too, as it decodes ahead.

decord, PyAV and torch can be imported in any order (tried in four orders). Others report a crash when decord is
imported before sam2; this project does not import sam2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import ConfigInvalid, InputUnreadable, RunnerError
from runner.video.decode import REENCODE, Timeline, open_container

__all__ = ["DecordClip", "DecordFrames"]

CHUNK_BYTES = 256 << 20  # of frames read before decord is closed; smaller chunks decode more frames twice
TRIES = 3
RECENT = 8  # frames of the last chunk that are kept: segments overlap by 5


class DecordClip:
    """A clip as decord counts it. The file is closed again; one frame was decoded.

    Raises InputNotFound, InputUnreadable for a file that decord cannot read, StorageDenied; ConfigInvalid where decord
    is not installed.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.path = timeline.path
        _repeat_on_error(self.path, self._look)
        self.seeks_exactly = timeline.indexed and np.array_equal(self.keyframes, timeline.keyframes)

    def _look(self) -> None:
        reader = _open(self.path)
        self.frames = len(reader)
        self.fps = float(reader.get_avg_fps())
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError("it has no frame rate")
        times_s = reader.get_frame_timestamp(range(self.frames)).astype(np.float64)
        self.end_s = float(times_s[-1, 1])  # of the last frame, as the official script takes it: not from the first on
        self.starts_s = times_s[:, 0] - times_s[0, 0]
        self.keyframes = np.array(reader.get_key_indices(), np.int64)  # counted in the order of the file
        self.height, self.width = _next_frame(reader).shape[:2]


class DecordFrames:
    """The frames of one `get_batch(numbers)`, read in any order. Holds a chunk of them. One thread at a time."""

    def __init__(self, clip: DecordClip, numbers: np.ndarray) -> None:
        """`numbers`: int64 [n], increasing: all frames that will be read. They decide where decord seeks.

        Raises InputUnreadable where frames are left out and decord has no usable timestamps to seek by.
        """
        self._clip, self._numbers = clip, numbers
        self._per_chunk = max(1, CHUNK_BYTES // (clip.height * clip.width * 3))
        self._held: dict[int, np.ndarray] = {}
        if numbers[-1] >= len(numbers) and not (np.diff(clip.starts_s) > 0).all():
            raise _unreadable(clip.path, "its timestamps are not usable, so no frame can be left out")

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB for int64 [n] indices among `numbers`. Raises InputUnreadable, InputNotFound."""
        if not np.isin(indices, self._numbers).all():
            raise ValueError("a frame that was not sampled cannot be read with preprocess.parity")
        out = np.empty((len(indices), self._clip.height, self._clip.width, 3), np.uint8)
        for slot, index in enumerate(int(i) for i in indices):
            if index not in self._held:
                _repeat_on_error(self._clip.path, partial(self._load_chunk, index))
            out[slot] = self._held[index]
        return out

    def close(self) -> None:
        """Release the frames. Idempotent."""
        self._held.clear()

    def _load_chunk(self, index: int) -> None:
        """Read the frame `index` and those that follow it in `numbers`."""
        at = int(np.searchsorted(self._numbers, index))
        self._held = {number: self._held[number] for number in list(self._held)[-RECENT:]}
        reader = _open(self._clip.path)
        for number in [] if self._clip.seeks_exactly else self._numbers[:at].tolist():
            reader.seek_accurate(number)
            reader.next()  # not copied: decord must not get ahead
        for number in self._numbers[at : at + self._per_chunk].tolist():
            reader.seek_accurate(number)
            frame = _next_frame(reader)
            if frame.shape != (self._clip.height, self._clip.width, 3):
                raise ValueError("its frames change size midway")
            self._held[number] = frame


def _open(path: Path) -> Any:
    """decord's reader of a file, with one decoding thread. Raises as `open_container`, which looks at it first."""
    try:
        import decord
    except ImportError as error:
        raise ConfigInvalid(
            f"decord cannot be imported ({error}); preprocess.parity reads the driving video with it",
            todo="Install decord2 (pip install 'decord2>=3.4,<4'), or remove preprocess.parity",
        ) from error
    open_container(path).close()  # for its errors, and because decord would follow a playlist
    decord.logging.set_level(decord.logging.QUIET)  # FFmpeg's messages, which decord prints
    return decord.VideoReader(str(path.absolute()), ctx=decord.cpu(0), num_threads=1)


def _next_frame(reader: Any) -> np.ndarray:
    """The next frame, uint8 [H, W, 3].

    FFmpeg pads rows for the processor's vector instructions. Where the padded row is a whole multiple of the width,
    decord takes the padding for channels: with AVX-512, 96 pixels have 4 of them, and `get_batch` fails.
    """
    try:
        frame = reader.next().asnumpy()
    except StopIteration:
        raise ValueError("it ends early") from None
    height, width = frame.shape[:2]
    if frame.shape[2] > 3:
        frame = frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
    return frame


def _repeat_on_error(path: Path, read: Callable[[], None]) -> None:
    """Call `read` until it succeeds, TRIES times at most. Raises InputUnreadable for what decord raises.

    Under load decord's thread sometimes gives the decoder a packet too early, and fails (EAGAIN): 2 of 10,000 reads of
    intact clips, measured with four processes on two cores.
    """
    for _ in range(TRIES):
        try:
            return read()
        except (RunnerError, MemoryError):
            raise
        except Exception as error:  # decord's errors have no common type
            lines = str(error).strip().splitlines() or [type(error).__name__]
            failure = _unreadable(path, lines[0].rsplit("Check failed:", 1)[-1].strip())
            failure.__cause__ = error
    raise failure


def _unreadable(path: Path, reason: str) -> InputUnreadable:
    return InputUnreadable(
        f"decord, which preprocess.parity reads the driving video with, cannot read it ({reason})",
        where=path,
        todo=f"{REENCODE}. Or remove preprocess.parity",
    )
