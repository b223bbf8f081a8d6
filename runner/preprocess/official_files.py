"""Official files: write and read conditions as the official script's folder of videos.

In:   conditions, or such a folder. Out: such a folder, or conditions. Never: people, networks.

    src_pose.mp4   skeletons at the output's size            src_bg.mp4     the scene, black in the mask (replace)
    src_face.mp4   faces, 512x512                            src_mask.mp4   white where the character goes (replace)
    src_ref.png    the reference; the official script copies its bytes, so this file may be a JPEG

The folder's frames and rate are kept: its videos were sampled when they were made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import numpy as np

from runner.errors import InputNotFound, InputTooShort, InputUnreadable, as_runner_error
from runner.preprocess.conditions import ConditionFrames
from runner.preprocess.masks.given import HALF
from runner.preprocess.pictures.images import load_image
from runner.preprocess.pictures.sizing import GRID
from runner.preprocess.rates import RATE_TOLERANCE
from runner.spec.options import REFERENCE, JobOptions, official_names
from runner.timing import StageTimer
from runner.video import Mp4Writer, VideoInfo, VideoReader

if TYPE_CHECKING:
    from PIL import Image

    from runner.preprocess.prepare import Preprocessor

__all__ = [
    "FILES",
    "REFERENCE",
    "OfficialConditions",
    "official_files",
    "run_preprocess",
    "write_official",
]

FILES = {name: file for name, file in official_names("replace").items() if name != "reference"}
WINDOW_BYTES = 48 << 20  # of finished frames at once: 13 of 480x832 with their faces
CRF = {"pose": 10, "face": 10, "background": 10, "mask": 1}  # the official script has 23; a model would read artefacts
REMEDY = "Make the folder again, with `video-lab preprocess` or the official preprocess_data.py"
MIN_FRAMES = 2


class Source(Protocol):
    """Conditions that can be written: `PoseConditions` or `OfficialConditions`."""

    frames: int
    fps: Fraction
    width: int
    height: int
    reference: Image.Image

    def window(self, start: int, stop: int) -> ConditionFrames: ...


def write_official(source: Source, folder: Path) -> dict[str, Path]:
    """Write all of `source` into `folder`, a window of pixels at a time. Returns content → file.

    There are a background and a mask if the source has them (mode replace). Files of an earlier run are replaced.
    src_pose.mp4 comes last, so that a folder with this file is complete. Raises StorageFull, StorageDenied, and the
    errors of `source.window`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES.values():
            (folder / name).unlink(missing_ok=True)
    except OSError as err:
        raise as_runner_error(err, where=folder) from err
    reference = _write_png(source.reference, folder / REFERENCE)
    at_once = _frames_at_once(source.width, source.height)
    writers: dict[str, Mp4Writer] = {}
    with ExitStack() as open_files:  # closes in reverse order: the poses, opened first, appear last
        for start in range(0, source.frames, at_once):
            window = source.window(start, min(start + at_once, source.frames))
            for name, frames in _parts(window).items():
                if name not in writers:
                    height, width = frames.shape[1:3]
                    writer = Mp4Writer(folder / FILES[name], width, height, source.fps, crf=CRF[name])
                    writers[name] = open_files.enter_context(writer)
                writers[name].write(frames)
    return {"reference": reference} | {name: writer.path for name, writer in writers.items()}


def run_preprocess(
    reference: Path,
    video: Path,
    out_dir: Path,
    options: JobOptions,
    preprocessor: Preprocessor,
    *,
    mask: Path | None = None,
    timer: StageTimer | None = None,
) -> dict[str, Any]:
    """Preprocess one reference and one video into official files in `out_dir`. Returns a report, JSON-able.

    Raises the errors of `Preprocessor.prepare` and `write_official`.
    """
    timer = timer or StageTimer()
    conditions = preprocessor.prepare(reference, video, options, mask=mask, timer=timer)
    try:
        files = write_official(conditions, out_dir)
    finally:
        conditions.close()
    return {
        "files": {name: str(path) for name, path in files.items()},
        "frames": conditions.frames,
        "fps": float(conditions.fps),
        "width": conditions.width,
        "height": conditions.height,
        "report": dict(conditions.report),
        "timings_s": dict(timer.seconds),
        "caches": dict(timer.counters),
    }


def official_files(folder: Path, mode: str) -> dict[str, Path]:
    """Return content → file, for the files of `folder` that `mode` needs. Raises InputNotFound with all missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputNotFound("no such folder", where=folder, todo="Check preprocess.from, which must name a folder")
    names = official_names(mode)
    missing = [file for file in names.values() if not (folder / file).is_file()]
    if missing:
        for_mode = ", which mode: replace needs" if set(missing) <= {FILES["background"], FILES["mask"]} else ""
        raise InputNotFound(f"{', '.join(missing)} {_is(missing)} missing{for_mode}", where=folder, todo=REMEDY)
    return {name: folder / file for name, file in names.items()}


@dataclass(eq=False)
class OfficialConditions:
    """Conditions from a folder of official files. Implements `generation.protocol.Conditions`, as `PoseConditions`."""

    frames: int
    fps: Fraction
    width: int
    height: int
    start_s: float
    report: Mapping[str, Any]
    reference: Image.Image  # RGB, upright, at its own size
    face_size: int
    timer: StageTimer
    _first: int  # number of the first frame in the videos
    _readers: dict[str, VideoReader] = field(repr=False)

    @classmethod
    def open(
        cls,
        folder: Path,
        options: JobOptions,
        *,
        face_size: int = 512,
        timer: StageTimer | None = None,
    ) -> OfficialConditions:
        """Check the folder's files against each other, and choose the frames of `options`.

        `start_s` and `max_frames` choose a part of the files' frames. Rate and size are those of the files: another
        `fps` or `size` in the options is ignored, with a warning in the report. Raises InputNotFound (a file is
        missing), InputUnreadable (a file is damaged, or they do not belong together), InputTooShort.
        """
        paths = official_files(folder, options.mode)
        reference = load_image(paths.pop("reference"), backdrop=None if options.preprocess.parity else (255, 255, 255))
        readers: dict[str, VideoReader] = {}
        with ExitStack() as opened:
            for name, path in paths.items():
                readers[name] = opened.enter_context(VideoReader(path))
            info = {name: reader.info for name, reader in readers.items()}
            _check_together(info, Path(folder))
            pose = info["pose"]
            first, frames = _span(pose, options)
            opened.pop_all()
        return cls(
            frames=frames,
            fps=pose.fps,
            width=pose.width,
            height=pose.height,
            start_s=float(first / pose.fps),
            report={
                "from": str(folder),
                "source_frames": pose.frames,
                "sampled_frames": frames,
                "warnings": _ignored(options, pose),
            },
            reference=reference,
            face_size=face_size,
            timer=timer or StageTimer(),
            _first=first,
            _readers=readers,
        )

    def window(self, start: int, stop: int) -> ConditionFrames:
        """Return frames [start, stop), 0 ≤ start < stop ≤ frames. They do not depend on earlier calls."""
        if not 0 <= start < stop <= self.frames:
            raise ValueError(f"frames {start}…{stop} are outside a clip of {self.frames}")
        with self.timer.stage("draw"):
            indices = np.arange(self._first + start, self._first + stop)
            pose, face = self._readers["pose"].read(indices), self._readers["face"].read(indices)
            if face.shape[1] != self.face_size:
                face = _resized(face, self.face_size)
            if "mask" not in self._readers:
                return ConditionFrames(pose, face)
            # Lossy coding leaves grey at the mask's edge, which the official reader uses as a partial mask, and blurs
            # the scene into the black. Both are undone here.
            white = self._readers["mask"].read(indices)[..., 0] >= HALF
            background = self._readers["background"].read(indices)
            background[white] = 0
            return ConditionFrames(pose, face, background, white.astype(np.uint8) * np.uint8(255))

    @property
    def people(self) -> None:
        """None: the files show skeletons, but have no boxes."""
        return None

    def close(self) -> None:
        """Close the files. Idempotent; a later `window` opens them again."""
        for reader in self._readers.values():
            reader.close()


def _parts(window: ConditionFrames) -> dict[str, np.ndarray]:
    """Return content → frames uint8 [n, H, W, 3], one entry per file, poses first."""
    parts = {"pose": window.pose, "face": window.face}
    if window.background is not None and window.mask is not None:
        parts |= {"background": window.background, "mask": np.repeat(window.mask[..., None], 3, axis=3)}
    return parts


def _frames_at_once(width: int, height: int) -> int:
    """Return how many frames (skeleton, face, scene and mask together) fit into WINDOW_BYTES; at least one."""
    return max(1, WINDOW_BYTES // (3 * (3 * width * height + 512 * 512)))


def _write_png(image: Image.Image, path: Path) -> Path:
    """Write a real PNG. It is written under another name and renamed when it is complete."""
    part = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        image.save(part, format="PNG")
        os.replace(part, path)
    except OSError as err:
        part.unlink(missing_ok=True)
        raise as_runner_error(err, where=path) from err
    return path


def _check_together(info: Mapping[str, VideoInfo], folder: Path) -> None:
    """Raise InputUnreadable unless lengths, rates and sizes agree. The message names the files with their numbers."""
    pose = info["pose"]
    pictures = {name: one for name, one in info.items() if name != "face"}
    checks = [
        ("lengths", {name: f"{one.frames} frames" for name, one in info.items()}),
        ("rates", {name: f"{float(one.fps):g} fps" for name, one in info.items()}),
        ("sizes", {name: f"{one.width}x{one.height}" for name, one in pictures.items()}),
    ]
    for what, found in checks:
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{FILES[name]} {value}" for name, value in found.items())
            raise InputUnreadable(f"the videos differ in their {what}: {listed}", where=folder, todo=REMEDY)
    if pose.width % GRID or pose.height % GRID:
        raise InputUnreadable(
            f"frames of {pose.width}x{pose.height} pixels, but the model takes multiples of {GRID} only",
            where=pose.path,
            todo=REMEDY,
        )
    face = info["face"]
    if face.width != face.height:
        raise InputUnreadable(
            f"faces of {face.width}x{face.height} pixels, but they must be square", where=face.path, todo=REMEDY
        )


def _span(pose: VideoInfo, options: JobOptions) -> tuple[int, int]:
    """Return (first, count) of the chosen frames of the files."""
    first = round(options.start_s * pose.fps)
    count = min(pose.frames - first, options.max_frames or pose.frames)
    if count < MIN_FRAMES:
        raise InputTooShort(
            f"{max(count, 0)} of its {pose.frames} frames remain from second {options.start_s:g} on, "
            f"at least {MIN_FRAMES} are needed",
            where=pose.path,
            todo="Choose an earlier start_s; it counts from the beginning of the files",
        )
    return first, count


def _ignored(options: JobOptions, pose: VideoInfo) -> list[str]:
    """Return warnings about options that the job sets but that have no effect on files."""
    warnings = []
    given = options.model_fields_set
    if "fps" in given and options.fps != "source" and abs(options.fps / float(pose.fps) - 1) > 1e-3:
        above = options.fps > pose.fps * RATE_TOLERANCE and options.output.interpolate == 1
        more = f" output: {{interpolate: 2}} writes {float(2 * pose.fps):g}." if above else ""
        warnings.append(
            f"fps: {options.fps:g} has no effect with preprocess.from: its files have {float(pose.fps):g}.{more}"
        )
    if "size" in given and options.size_pixels not in (None, (pose.width, pose.height)):
        warnings.append(
            f"size: {options.size} has no effect with preprocess.from: its files are {pose.width}x{pose.height}."
        )
    return warnings


def _resized(faces: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 [n, F, F, 3] to [n, side, side, 3]."""
    import cv2

    how = cv2.INTER_AREA if side < faces.shape[1] else cv2.INTER_LINEAR
    return np.stack([cv2.resize(face, (side, side), interpolation=how) for face in faces])


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
