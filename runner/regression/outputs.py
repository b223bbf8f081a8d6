"""Outputs: reads the frames of a job's output, from an MP4 or from numbered PNGs.

In:   local files. Out: uint8 RGB windows in order, one frame by its index, the size and the rate.
Never: more than a window of frames in memory, metrics, storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from runner.errors import InputNotFound, InputUnreadable, as_runner_error
from runner.video.decode import MAX_PIXELS, Frames, Timeline, read_timeline

__all__ = ["RenderedFrames"]


class RenderedFrames:
    """One output: `paths` is an MP4, or the PNG frames of a folder in order.

    frames: number of frames. size: (width, height) in pixels. fps: exact, None for PNGs. Not thread-safe. Each
    iterator of `windows` has a separate decoder, so that several may be open.
    Raises InputNotFound, InputUnreadable (not a video, truncated, not an 8-bit RGB PNG, no frame), InputTooLarge.
    """

    frames: int
    size: tuple[int, int]
    fps: Fraction | None
    path: Path | None  # of the MP4; None for PNGs

    def __init__(self, paths: Path | Sequence[Path]) -> None:
        self._timeline: Timeline | None = None
        self._pictures: list[Path] = []
        self._single: Frames | None = None
        self.path = paths if isinstance(paths, Path) else None
        if isinstance(paths, Path):
            self._timeline = read_timeline(paths)
            self.frames, self.fps = self._timeline.frames, self._timeline.fps.limit_denominator(1001)
            self.size = self._timeline.width, self._timeline.height
        else:
            self._pictures = list(paths)
            if not self._pictures:
                raise InputUnreadable("the output has no frames", todo="Render the job again with --force")
            self.frames, self.fps = len(self._pictures), None
            height, width = _read_png(self._pictures[0]).shape[:2]
            self.size = width, height

    def windows(self, n: int) -> Iterator[np.ndarray]:
        """Yield uint8 [k, H, W, 3] RGB from the first frame to the last; k is `n`, or less in the last window.

        Raises InputUnreadable if the file is damaged or its frames change size.
        """
        if n < 1:
            raise ValueError(f"a window has at least 1 frame, not {n}")
        spans = (range(begin, min(begin + n, self.frames)) for begin in range(0, self.frames, n))
        if self._timeline is None:
            for span in spans:
                yield np.stack([self._picture(index) for index in span])
            return
        decoder = Frames(self._timeline)
        try:
            for span in spans:
                yield decoder.read(np.array(span, np.int64))
        finally:
            decoder.close()

    def frame(self, index: int) -> np.ndarray:
        """Return uint8 [H, W, 3] RGB of frame `index`, from 0. Raises IndexError and the errors of `windows`."""
        if not 0 <= index < self.frames:
            raise IndexError(f"frame {index} of {self.frames}")
        if self._timeline is None:
            return self._picture(index)
        if self._single is None:
            self._single = Frames(self._timeline)
        return self._single.read(np.array([index], np.int64))[0]

    def close(self) -> None:
        """Close the file. Idempotent; the next read opens it again."""
        if self._single is not None:
            self._single.close()
            self._single = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _picture(self, index: int) -> np.ndarray:
        path = self._pictures[index]
        picture = _read_png(path)
        height, width = picture.shape[:2]
        if (width, height) != self.size:
            raise InputUnreadable(
                f"frame {index} has {width}x{height} pixels, the first {self.size[0]}x{self.size[1]}",
                where=path,
                todo="Render the job again with --force",
            )
        return picture


def _read_png(path: Path) -> np.ndarray:
    """Return uint8 [H, W, 3] RGB. Uses Pillow: OpenCV returns the upper part of a truncated file without an error."""
    from PIL import Image, UnidentifiedImageError

    todo = "Copy or download it again, or render the job again with --force"
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode != "RGB" or image.width * image.height > MAX_PIXELS:
                raise InputUnreadable(
                    f"a frame is an 8-bit RGB PNG of at most {MAX_PIXELS} pixels; this is {image.mode}, "
                    f"{image.width}x{image.height}",
                    where=path,
                    todo=todo,
                )
            return np.array(image)
    except FileNotFoundError as error:
        raise InputNotFound("no such file", where=path, todo="Check that the output is complete") from error
    except UnidentifiedImageError as error:
        raise InputUnreadable("is not a PNG file", where=path, todo=todo) from error
    except (SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputUnreadable(f"the PNG file is damaged ({error})", where=path, todo=todo) from error
    except OSError as error:
        if error.errno is not None:  # an error of the disk; Pillow's errors have no number
            raise as_runner_error(error, where=path) from error
        raise InputUnreadable(f"the PNG file is damaged ({error})", where=path, todo=todo) from error
