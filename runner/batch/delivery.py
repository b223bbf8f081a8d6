"""Delivery: one job's frames on their way out: encoded as they come, then published, the record last.

In:   segments of one job, in order. Out: files under `jobs/<id>/` of the output storage and an `OutputRecord`.
Never: how frames are made, or which jobs there are. Holds one segment at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import numpy as np

from runner.batch.ledger import combined_identity
from runner.errors import InternalError
from runner.generation.protocol import ClipInfo, Segment
from runner.hashing import sha256_file
from runner.records.output_layout import OUTPUT, POSE, POSTER, PREVIEWS, frames_folder, job_key
from runner.records.record import OutputRecord
from runner.spec.options import JobOptions
from runner.storage import ObjectInfo, Storage
from runner.timing import StageTimer
from runner.video import AudioSpan, FrameHash, Mp4Writer, PngWriter, write_jpeg

__all__ = ["Delivery", "Published"]

UPLOADS_AT_ONCE = 8
PREVIEW_CRF = 28


@dataclass(frozen=True)
class Published:
    """What one job's publication left on the storage."""

    output: OutputRecord
    keys: frozenset[str]  # of all files
    notes: list[str]


class Delivery:
    """Takes the segments of one job, then publishes them as a whole, or leaves nothing."""

    def __init__(
        self,
        folder: Path,
        options: JobOptions,
        *,
        width: int,
        height: int,
        fps: Fraction,
        frames: int,
        pose_fps: Fraction,
        audio: AudioSpan | None,
        timer: StageTimer,
    ) -> None:
        self._folder, self._options, self._timer = folder, options, timer
        self._width, self._height, self._fps, self._expected = width, height, fps, frames
        self._pose_fps = pose_fps
        self._hash = FrameHash()
        self._count = 0
        self._poster: np.ndarray | None = None
        self._pose: Mp4Writer | None = None
        self._main: Mp4Writer | PngWriter
        if options.output.format == "png":
            self._main = PngWriter(folder / "frames", width=width, height=height)
        else:
            path = folder / OUTPUT
            self._main = Mp4Writer(path, width=width, height=height, fps=fps, crf=options.output.crf, audio=audio)

    @classmethod
    def of(
        cls,
        clip: ClipInfo,
        finished: ClipInfo,
        folder: Path,
        options: JobOptions,
        audio_from: Path | None,
        timer: StageTimer,
    ) -> Delivery:
        """For what was prepared, and what stages make of it; `audio_from`: the driving video, where it has sound."""
        audio = None
        if options.keep_audio and audio_from is not None:
            audio = AudioSpan(audio_from, clip.start_s, float(clip.frames / clip.fps))
        return cls(
            folder,
            options,
            width=finished.width,
            height=finished.height,
            fps=finished.fps,
            frames=finished.frames,
            pose_fps=clip.fps,
            audio=audio,
            timer=timer,
        )

    def write(self, segment: Segment) -> None:
        """Encode one segment; frames uint8 [n, H, W, 3] of the size and in the order promised."""
        frames = segment.frames
        if frames.shape[1:] != (self._height, self._width, 3) or frames.dtype != np.uint8:
            raise InternalError(f"segment {segment.index} is {frames.dtype} {frames.shape}")
        with self._timer.stage("encode_video"):
            middle = self._expected // 2 - self._count
            if 0 <= middle < len(frames):
                self._poster = frames[middle].copy()
            self._main.write(frames)
            self._hash.update(frames)
            self._count += len(frames)
            if segment.pose is not None:
                if self._pose is None:
                    height, width = segment.pose.shape[1:3]
                    path, fps = self._folder / POSE, self._pose_fps
                    self._pose = Mp4Writer(path, width=width, height=height, fps=fps, crf=PREVIEW_CRF)
                self._pose.write(segment.pose)

    def publish(self, storage: Storage, job_id: str, replacing: Callable[[str], None]) -> Published:
        """Close the files and store them, the output first. `replacing` is called with the key of a file that may
        replace an older output, right before it does.

        The identity in the record is that of the bytes that were uploaded. Frames go below a folder of their own, so
        that an older output stays whole until the record names the new one. Raises InternalError if the frames are not
        as many as promised; storage.* if they cannot be stored.
        """
        if self._count != self._expected:
            raise InternalError(f"{self._count} frames were generated, {self._expected} asked", where=job_id)
        notes = []
        with self._timer.stage("encode_video"):
            self._main.close()
            if self._pose is not None:
                self._pose.close()
            if self._poster is not None:
                write_jpeg(self._folder / POSTER, self._poster)
        if isinstance(self._main, Mp4Writer) and self._main.audio_note:
            notes.append(self._main.audio_note)
        with self._timer.stage("publish"):
            if self._options.output.format == "png":
                key, sha256 = frames_folder(job_id, uuid4().hex[:8]), None
                stored = _store_all(
                    storage, {key + png.name: png for png in sorted((self._folder / "frames").glob("*.png"))}
                )
                identity, nbytes, count = combined_identity(
                    {name: (storage.identify(info), info.bytes) for name, info in stored.items()}
                )
            else:
                key = job_key(job_id, OUTPUT)
                sha256 = sha256_file(self._folder / OUTPUT)
                replacing(key)
                info = storage.publish(self._folder / OUTPUT, key)
                stored, identity, nbytes, count = {key: info}, storage.identify(info), info.bytes, 1
            previews = {job_key(job_id, name): self._folder / name for name in PREVIEWS}
            stored |= _store_all(storage, {key: path for key, path in previews.items() if path.exists()})
        record = OutputRecord(
            uri=storage.uri(key.rstrip("/")),
            key=key,
            bytes=nbytes,
            files=count,
            identity=identity,
            sha256=sha256,
            frames=self._count,
            fps=str(self._fps),
            width=self._width,
            height=self._height,
            frames_sha256=self._hash.hexdigest(),
        )
        return Published(record, frozenset(stored), notes)

    def abort(self) -> None:
        """Leave nothing behind. Idempotent."""
        self._main.abort()
        if self._pose is not None:
            self._pose.abort()


def _store_all(storage: Storage, files: Mapping[str, Path]) -> dict[str, ObjectInfo]:
    """Key → what was uploaded under it."""
    with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
        return dict(zip(files, pool.map(lambda key: storage.publish(files[key], key), files), strict=True))
