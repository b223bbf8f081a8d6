"""Evidence: pictures and videos of the changes in one job, for the HTML report.

In:   both videos' frames, the reference, the driving frames. Out: `JobEvidence`, JPEG pictures, a small MP4 of PNG
frames. Never: which jobs differ, page layout, remote storage.

Frames are uint8 [H, W, 3] RGB. All pictures of one frame have one height, so that they fit into one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runner.errors import RunnerError
from runner.regression.findings import JobFinding
from runner.video.writer import Mp4Writer

if TYPE_CHECKING:
    import numpy as np

__all__ = ["AMPLIFIED", "PICTURES", "JobEvidence", "VideoFrames", "VideoLink", "make_pictures", "write_preview"]

PICTURES = ("reference", "driver", "baseline", "new", "difference")  # in the order of the report
AMPLIFIED = 8  # factor of the difference: one 8-bit level is invisible on black, eight levels are visible
HEIGHT = 480  # pixels, maximum: five pictures fill a wide screen, and a JPEG of 480x832 has about 50 KB
QUALITY = 90
WINDOW = 16  # frames in memory while a preview is written
PREVIEW_CRF = 18  # as in the runner's MP4s by default


class VideoFrames(Protocol):
    """The frames of one rendered video, read on demand."""

    @property
    def frames(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        ...

    @property
    def fps(self) -> Fraction | None: ...

    def windows(self, n: int) -> Iterable[np.ndarray]:
        """Yield uint8 [k, H, W, 3] in order, k at most `n`."""
        ...

    def frame(self, i: int) -> np.ndarray:
        """Return uint8 [H, W, 3] of frame `i`."""
        ...


@dataclass(frozen=True)
class VideoLink:
    """One MP4 of the report.

    The file is embedded if it exists and is within the report's limit. Otherwise the page links to `url`: http, https,
    or relative to the report. size: width and height in pixels.
    """

    fps: Fraction
    frames: int
    size: tuple[int, int]
    file: Path | None = None
    url: str = ""


@dataclass(frozen=True)
class JobEvidence:
    """The pictures and videos of one job in the report.

    pictures: JPEG or PNG files by name, of `PICTURES`. picture_frame: the frame that they show, from 0.
    left_out: name of a picture or video -> why it is missing. videos: "baseline" and "new".
    """

    finding: JobFinding
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    picture_frame: int | None = None
    videos: Mapping[str, VideoLink] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def make_pictures(
    new: VideoFrames | None,
    baseline: VideoFrames | None,
    frame: int,
    *,
    reference: Path | None = None,
    driver: Callable[[int], np.ndarray] | None = None,
    left_out: dict[str, str] | None = None,
) -> dict[str, bytes]:
    """Return JPEG files by name, of frame `frame` (from 0) of both videos, in the order of `PICTURES`.

    The difference is computed per channel, times `AMPLIFIED`, at most 255. Shrinking it keeps single pixels visible.
    A picture that cannot be made is left out without an error; `left_out` gets its name and the reason.
    """
    left_out = {} if left_out is None else left_out
    sources: dict[str, Callable[[], np.ndarray] | None] = {
        "reference": (lambda: _read_picture(reference)) if reference is not None else None,
        "driver": (lambda: driver(frame)) if driver is not None else None,
        "baseline": (lambda: _read_frame(baseline, frame)) if baseline is not None else None,
        "new": (lambda: _read_frame(new, frame)) if new is not None else None,
    }
    images: dict[str, np.ndarray] = {}
    for name, read in sources.items():
        if read is None:
            continue
        try:
            images[name] = read()
        except (RunnerError, OSError, ValueError, IndexError) as error:
            left_out[name] = str(error)
    height = min(HEIGHT, max((images[name].shape[0] for name in ("baseline", "new") if name in images), default=HEIGHT))
    pictures = {name: _jpeg(_at_height(image, height)) for name, image in images.items()}
    if "baseline" in images and "new" in images:
        if images["baseline"].shape == images["new"].shape:
            pictures["difference"] = _jpeg(_shrink_difference(_difference(images["new"], images["baseline"]), height))
        else:
            left_out["difference"] = "the videos have different sizes"
    return pictures


def write_preview(video: VideoFrames, dest: Path, fps: Fraction) -> VideoLink:
    """Write PNG frames as an MP4 that a browser can play. Odd sizes lose their last row or column.

    Bounded memory. Raises StorageFull, StorageDenied, and InputUnreadable for a damaged frame.
    """
    width, height = (side - side % 2 for side in video.size)
    with Mp4Writer(dest, width, height, fps, crf=PREVIEW_CRF) as writer:
        for window in video.windows(WINDOW):
            writer.write(window[:, :height, :width])
    return VideoLink(fps=fps, frames=writer.frames, size=(width, height), file=dest)


def _read_frame(video: VideoFrames, frame: int) -> np.ndarray:
    if frame >= video.frames:
        raise ValueError(f"there is no frame {frame}: the video has {video.frames} frames")
    return video.frame(frame)


def _read_picture(path: Path) -> np.ndarray:
    import numpy as np

    from runner.preprocess.pictures.images import load_image

    return np.asarray(load_image(path))


def _difference(new: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    import numpy as np

    difference = np.abs(new.astype(np.int16) - baseline.astype(np.int16))
    return np.minimum(difference * AMPLIFIED, 255).astype(np.uint8)


def _at_height(image: np.ndarray, height: int) -> np.ndarray:
    import cv2

    if image.shape[0] == height:
        return image
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    how = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=how)


def _shrink_difference(image: np.ndarray, height: int) -> np.ndarray:
    """Shrink a difference by taking the brightest of the merged pixels: the mean would hide a single pixel."""
    import cv2
    import numpy as np

    if image.shape[0] <= height:
        return image
    side = -(-image.shape[0] // height)
    spread = cv2.dilate(image, np.ones((side, side), np.uint8))
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    return cv2.resize(spread, (width, height), interpolation=cv2.INTER_NEAREST)


def _jpeg(image: np.ndarray) -> bytes:
    import cv2

    settings = [
        cv2.IMWRITE_JPEG_QUALITY,
        QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    if not done:
        raise ValueError("OpenCV cannot encode the picture as JPEG")
    return data.tobytes()
