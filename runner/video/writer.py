"""Writer: write frames as an MP4 or as a folder of PNGs.

In:   uint8 RGB frames in order; a rate. Out: a complete file or folder, or none.
Never: sound (see join.py), where the frames come from, jobs, remote storage.

H.264 4:2:0, limited range, converted to BT.709 and tagged so. The same frames give the same bytes on any machine.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runner.errors import RunnerError, as_runner_error

__all__ = ["Mp4Writer", "PngWriter", "png_name", "write_jpeg"]

PRESET = "medium"  # better pictures at the same CRF; its time does not matter beside minutes of denoising
THREADS = 4  # fixed on every machine, because x264's bytes depend on its thread count
BT709 = 1  # the number of BT.709 in H.273: primaries, transfer and matrix alike
LIMITED, FULL = 1, 2  # FFmpeg's colour ranges


def _same_on_any_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return the options with which libx264 gives the same bytes on this machine as on others.

    Its AVX-512 code for macroblock trees (x264 165, in PyAV 18) reads uninitialised memory: the same frames gave seven
    different files in eight runs. Without that code the bytes are those of other processors.
    """
    try:
        has_avx512 = "avx512f" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {"x264-params": "asm=avx2"} if has_avx512 else {}


class _Writer(ABC):
    """Common part of the writers: leaving a `with` block closes the writer, or aborts it after an error."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def abort(self) -> None: ...

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
    """Writes `path` as `path`.part, which `close` renames; `abort` or a failure removes it.

    width, height: pixels, even (4:2:0 halves them). fps: exact. crf: 0..51. Each frame lasts exactly 1/fps.
    The file begins with a key frame and can be decoded on its own, so join.py can put several together.
    Raises StorageFull and StorageDenied for errors of the disk.
    """

    def __init__(self, path: Path, width: int, height: int, fps: Fraction, crf: int = 18) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"width and height must be even and positive, not {width}x{height}")
        self.path, self.frames = Path(path), 0
        self._size, self._fps = (height, width), Fraction(fps)
        self._part = self.path.with_name(self.path.name + ".part")
        self._reformatter = VideoReformatter()
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
            # Otherwise the first packet does, long after a read-only folder or a full disk could be found.
            self._container.start_encoding()
        except (av.error.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def write(self, frames: np.ndarray) -> None:
        """Add uint8 [n, H, W, 3] RGB of the writer's size."""
        import av

        self._check_open()
        _check_frames(frames, self._size)
        try:
            for image in frames:
                self._container.mux(self._stream.encode(self._yuv(np.ascontiguousarray(image))))
                self.frames += 1
        except (av.error.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Finish the file and rename it. Raises ValueError if it has no frame. A second call does nothing."""
        import av

        if self._container is None:
            return
        if not self.frames:
            self.abort()
            raise ValueError(f"{self.path}: no frame was written")
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._container = None
            os.replace(self._part, self.path)
        except (av.error.FFmpegError, OSError) as error:
            raise self._failed(error) from error

    def abort(self) -> None:
        """Remove the unfinished file. Idempotent; after `close` it does nothing."""
        import av

        if self._container is not None:
            container, self._container = self._container, None
            with suppress(
                av.error.FFmpegError, OSError
            ):  # on a full disk closing fails as well; the file is removed anyway
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


class PngWriter(_Writer):
    """Writes `folder`/000000.png, 000001.png, … into `folder`.part; `close` replaces `folder` by it.

    width, height: pixels. first: the number of the first frame. Lossless, 8-bit RGB. Raises StorageFull and
    StorageDenied for errors of the disk.
    """

    def __init__(self, folder: Path, width: int, height: int, first: int = 0) -> None:
        self.path, self.frames, self._first = Path(folder), 0, first
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
                (self._part / png_name(self._first + self.frames)).write_bytes(_encode(".png", image))
                self.frames += 1
        except OSError as error:
            self.abort()
            raise as_runner_error(error, where=self.path) from error

    def close(self) -> None:
        """Rename the folder; an older one of that name is replaced. Raises ValueError if it has no frame."""
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
        """Remove the unfinished folder. Idempotent; after `close` it does nothing."""
        if self._open:
            self._open = False
            shutil.rmtree(self._part, ignore_errors=True)


def png_name(index: int) -> str:
    """Return the file name of frame `index`."""
    return f"{index:06d}.png"


def write_jpeg(path: Path, frame: np.ndarray, quality: int = 90) -> None:
    """Write uint8 [H, W, 3] RGB as a JPEG, complete or not at all. Raises StorageFull, StorageDenied."""
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

    # PNG level 3: level 9 makes rendered frames hardly smaller and takes several times as long.
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
