"""Writer: frames become an MP4 or a folder of PNGs, segment by segment; the source's sound goes along.

In:   uint8 RGB frames in order; a rate; optionally a span of a source's sound. Out: a file or folder, whole or none.
Never: where the frames come from, jobs, remote storage.

H.264 4:2:0, limited range, converted to BT.709 and tagged so. The same frames give the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runner.errors import InputUnreadable, RunnerError, as_runner_error

__all__ = ["AudioSpan", "FrameHash", "Mp4Writer", "PngWriter", "write_jpeg"]

PRESET = "medium"  # encoding runs beside minutes of denoising: better pictures at the same CRF cost nothing there
THREADS = 4  # x264's bytes depend on its thread count, so that it must not follow the machine
BT709 = 1  # the number of BT.709 in H.273: primaries, transfer and matrix alike
LIMITED, FULL = 1, 2  # FFmpeg's colour ranges
AAC_RATES = {96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350}
AAC_BITS_PER_CHANNEL = 96_000
GAP_S = 0.05  # stamps in whole milliseconds jitter by less; a gap or overlap beyond this moves the sound


@dataclass(frozen=True)
class AudioSpan:
    """The sound of `path` from `start_s` (seconds after its first video frame) for `duration_s` seconds."""

    path: Path
    start_s: float
    duration_s: float


def _same_on_any_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Options of libx264 for this machine.

    Its AVX-512 code for macroblock trees (x264 165, in PyAV 18) reads memory that nobody wrote: the same frames gave
    seven files in eight runs. Without that code they give what other processors make of them.
    """
    try:
        has_avx512 = "avx512f" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {"x264-params": "asm=avx2"} if has_avx512 else {}


class FrameHash:
    """sha256 over frames: of each, its shape (three little-endian uint32), its bytes; however cut into calls."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, frames: np.ndarray) -> None:
        """Add uint8 [n, H, W, 3]."""
        _check_frames(frames)
        shape = np.array(frames.shape[1:], "<u4").tobytes()
        for frame in frames:
            self._hash.update(shape)
            self._hash.update(np.ascontiguousarray(frame).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class _Writer:
    """Verbs that every writer shares: an error inside `with` aborts, else leaving it closes."""

    def close(self) -> None:
        raise NotImplementedError

    def abort(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


class Mp4Writer(_Writer):
    """Write `path` through `path`.part; `close` makes it appear whole, `abort` or a failure leaves nothing.

    width, height: pixels, even (4:2:0 halves them). fps: exact. crf: 0..51. Each frame lasts exactly 1/fps.
    `audio_note` tells in words what became of the sound, or is None when none was asked for.
    Raises StorageFull and StorageDenied as the disk does, InputUnreadable when the sound cannot be decoded.
    """

    def __init__(
        self, path: Path, width: int, height: int, fps: Fraction, crf: int = 18, audio: AudioSpan | None = None
    ) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"width and height must be even and positive, not {width}x{height}")
        self.path, self.frames = Path(path), 0
        self.audio_note: str | None = None
        self._size, self._fps = (height, width), Fraction(fps)
        self._part = self.path.with_name(self.path.name + ".part")
        self._reformatter = VideoReformatter()
        self._sound: _Sound | None = None
        self._container: Any = None
        try:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(
                f"file:{self._part.absolute()}", "w", format="mp4", options={"movflags": "+faststart"}
            )
            options = {"crf": str(crf), "preset": PRESET} | _same_on_any_processor()
            self._stream = self._container.add_stream("libx264", rate=self._fps, options=options)
            context = self._stream.codec_context
            context.width, context.height, context.pix_fmt = width, height, "yuv420p"
            context.time_base, context.thread_count = 1 / self._fps, THREADS
            context.color_primaries = context.color_trc = context.colorspace = BT709
            context.color_range = LIMITED
            if audio is not None:
                self._sound, self.audio_note = _Sound.open(audio, self._container)
            self._container.start_encoding()  # else the first packet does, long after a closed folder or full disk
        except (av.error.FFmpegError, OSError) as error:
            raise self._failed(error) from error
        except RunnerError:
            self.abort()
            raise

    def write(self, frames: np.ndarray) -> None:
        """Add uint8 [n, H, W, 3] RGB of the writer's size."""
        import av

        self._check_open()
        _check_frames(frames, self._size)
        try:
            for image in frames:
                self._container.mux(self._stream.encode(self._yuv(np.ascontiguousarray(image))))
                self.frames += 1
                if self._sound is not None:  # in step with the pictures, or the muxer would queue them all
                    self._sound.write_until(self._container, self.frames / self._fps)
        except (av.error.FFmpegError, OSError) as error:
            raise self._failed(error) from error
        except RunnerError:
            self.abort()
            raise

    def close(self) -> None:
        """Finish the file and give it its name. Raises ValueError if it has no frame. A second call does nothing."""
        import av

        if self._container is None:
            return
        if not self.frames:
            self.abort()
            raise ValueError(f"{self.path}: no frame was written")
        try:
            self._container.mux(self._stream.encode(None))
            if self._sound is not None:
                self._sound.finish(self._container)
            self._container.close()
            self._container = None
            os.replace(self._part, self.path)
        except (av.error.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def abort(self) -> None:
        """Give up: remove what was written. Idempotent; after `close` it does nothing."""
        import av

        if self._sound is not None:
            self._sound.close()
        if self._container is not None:
            container, self._container = self._container, None
            with suppress(av.error.FFmpegError, OSError):  # a full disk refuses the tail as well; the file goes anyway
                container.close()
            self._part.unlink(missing_ok=True)

    def _yuv(self, image: np.ndarray) -> Any:
        import av
        from av.video.reformatter import Colorspace, Interpolation

        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(image, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=FULL,
            dst_color_range=LIMITED,
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
        )
        frame.pts, frame.time_base = self.frames, 1 / self._fps
        return frame

    def _check_open(self) -> None:
        if self._container is None:
            raise ValueError(f"{self.path}: the writer is closed")

    def _failed(self, error: Exception) -> RunnerError:
        self.abort()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)
        return as_runner_error(error, where=self.path)


class _Sound:
    """A span of sound on its way from a source file into an open container, as AAC."""

    def __init__(self, pieces: Iterator[np.ndarray], source: Any, rate: int, layout: str, container: Any) -> None:
        self._pieces, self._source, self._rate, self._layout = pieces, source, rate, layout
        self._done = 0  # samples handed to the encoder
        self._out = container.add_stream("aac", rate=rate, layout=layout)
        self._out.codec_context.bit_rate = AAC_BITS_PER_CHANNEL * (1 if layout == "mono" else 2)

    @classmethod
    def open(cls, span: AudioSpan, container: Any) -> tuple[_Sound | None, str]:
        """The sound, or None where there is none; and what became of it, in words."""
        from runner.video.decode import open_container

        source = open_container(Path(span.path))
        try:
            stream = source.streams.best("audio")
            if stream is None or stream.codec_context is None:
                return None, "the source has no sound" if stream is None else "the source's sound has an unknown codec"
            own, channels = stream.codec_context.sample_rate, stream.codec_context.layout.nb_channels
            rate, layout = own if own in AAC_RATES else 48000, "mono" if channels == 1 else "stereo"
            pieces = _cut(source, stream, span, rate, layout)
            first = next(pieces, None)
            if first is None:
                return None, "the source's sound ends before the rendered span"
            sound = cls(chain([first], pieces), source, rate, layout, container)
            source = None  # the sound closes it from here on
            return sound, f"cut to the rendered span, encoded as AAC at {rate} Hz {layout}"
        finally:
            if source is not None:
                source.close()

    def write_until(self, container: Any, seconds: Fraction) -> None:
        """Encode up to `seconds` of the output, or as far as there is sound."""
        import av

        target = round(seconds * self._rate)
        while self._done < target:
            piece = next(self._pieces, None)
            if piece is None:
                return
            if self._done + piece.shape[1] > target:
                self._pieces = chain([piece[:, target - self._done :]], self._pieces)
                piece = np.ascontiguousarray(piece[:, : target - self._done])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._done, Fraction(1, self._rate)
            container.mux(self._out.encode(frame))
            self._done += piece.shape[1]

    def finish(self, container: Any) -> None:
        container.mux(self._out.encode(None))
        self.close()

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None


def _cut(source: Any, stream: Any, span: AudioSpan, rate: int, layout: str) -> Iterator[np.ndarray]:
    """Yield the span's samples in order, float32 [channels, n] at `rate`; a gap in the source becomes silence."""
    import av

    video = source.streams.best("video")
    origin_s = float((video.start_time or 0) * video.time_base) if video is not None else 0.0
    begin_s = origin_s + span.start_s
    total, channels = round(span.duration_s * rate), 1 if layout == "mono" else 2
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    cursor, position = 0, None  # samples yielded; where the next block belongs
    try:
        if begin_s > 2:  # a second early: an AAC decoder needs a packet or two to settle after a seek
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
                    yield np.zeros((channels, silent), np.float32)
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


class PngWriter(_Writer):
    """Write `folder`/000000.png, 000001.png, … through a folder beside it; `close` puts it in place of `folder`.

    width, height: pixels. Lossless, 8-bit RGB. Raises StorageFull and StorageDenied as the disk does.
    """

    def __init__(self, folder: Path, width: int, height: int) -> None:
        self.path, self.frames = Path(folder), 0
        self._size = (height, width)
        self._part = self.path.with_name(self.path.name + ".part")
        self._open = True
        try:
            if self._part.is_dir():  # left by a process that was killed
                shutil.rmtree(self._part)
            self._part.mkdir(parents=True)
        except OSError as error:
            raise as_runner_error(error, where=self._part) from error

    def write(self, frames: np.ndarray) -> None:
        """Add uint8 [n, H, W, 3] RGB of the writer's size."""
        if not self._open:
            raise ValueError(f"{self.path}: the writer is closed")
        _check_frames(frames, self._size)
        try:
            for image in frames:
                (self._part / f"{self.frames:06d}.png").write_bytes(_encode(".png", image))
                self.frames += 1
        except OSError as error:
            self.abort()
            raise as_runner_error(error, where=self.path) from error

    def close(self) -> None:
        """Give the folder its name; one of that name is replaced. Raises ValueError if it has no frame."""
        if not self._open:
            return
        if not self.frames:
            self.abort()
            raise ValueError(f"{self.path}: no frame was written")
        self._open = False
        try:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            os.replace(self._part, self.path)
        except OSError as error:
            shutil.rmtree(self._part, ignore_errors=True)
            raise as_runner_error(error, where=self.path) from error

    def abort(self) -> None:
        """Give up: remove what was written. Idempotent; after `close` it does nothing."""
        if self._open:
            self._open = False
            shutil.rmtree(self._part, ignore_errors=True)


def write_jpeg(path: Path, frame: np.ndarray, quality: int = 90) -> None:
    """Write uint8 [H, W, 3] RGB as a JPEG that appears whole. Raises StorageFull and StorageDenied as the disk does."""
    _check_frames(frame[None])
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(_encode(".jpg", frame, quality))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise as_runner_error(error, where=path) from error


def _encode(suffix: str, image: np.ndarray, quality: int = 90) -> bytes:
    import cv2

    # PNG level 3: x264-grade frames shrink hardly more at 9, and take several times as long.
    settings = [cv2.IMWRITE_PNG_COMPRESSION, 3] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    assert done, f"OpenCV cannot encode {suffix}"
    return data.tobytes()


def _check_frames(frames: np.ndarray, size: tuple[int, int] | None = None) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [n, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if size is not None and frames.shape[1:3] != size:
        raise ValueError(
            f"frames are {frames.shape[2]}x{frames.shape[1]} pixels, the writer expects {size[1]}x{size[0]}"
        )
