"""Delivery: encode one job's frames segment by segment, join them and publish the files.

In:   segments of one job, in order; or parts that an earlier attempt packed. Out: files under `jobs/<id>/` of the
      output storage and an `OutputRecord`.
Never: how frames are made, which jobs there are, where packed parts are kept. One segment at a time is in memory.

A segment becomes a part: a folder in scratch with its pictures, previews and digests. The output depends only on the
parts and the sound. So a part that is written now and a part restored from an earlier attempt give the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import numpy as np

from runner.batch.part_archive import PNGS, pack_files, unpack_files
from runner.errors import InternalError, as_runner_error
from runner.generation.protocol import ClipInfo, Segment
from runner.hashing import sha256_file
from runner.records.output_layout import AUDIO, FRAME_DIGESTS, OUTPUT, PEOPLE, POSE, POSTER, frames_folder, job_key
from runner.records.people import People
from runner.records.record import OutputRecord
from runner.spec.options import JobOptions
from runner.storage import ObjectInfo, Storage, combined_identity
from runner.timing import StageTimer
from runner.video import (
    FRAMES_HASH,
    AudioSpan,
    Mp4Writer,
    PngWriter,
    SoundNote,
    check_sound,
    combined_digest,
    digest_frames,
    format_digests,
    join_parts,
    parse_digests,
    png_name,
    write_jpeg,
    write_wav,
)

__all__ = ["Delivery", "Published"]

UPLOADS_AT_ONCE = 8
PREVIEW_CRF = 28
_REMOVE_PART = "Remove the file. The job then starts before this segment"

Put = Callable[[Path, str], ObjectInfo]  # (local file, key) → the stored object


@dataclass(frozen=True)
class Published:
    """The files that one job's publication stored."""

    output: OutputRecord
    keys: frozenset[str]  # of all files
    sound: SoundNote | None  # None: the job has no sound


class Delivery:
    """Collects the segments of one job, then publishes them as a whole. A failed delivery leaves nothing.

    The constructor raises InputUnreadable if the sound cannot be decoded.
    """

    def __init__(
        self,
        folder: Path,
        options: JobOptions,
        *,
        width: int,
        height: int,
        fps: Fraction,
        frames: int,
        pose_fps: Fraction,  # of the frames that were generated
        audio: AudioSpan | None,
        timer: StageTimer,
        people: People | None = None,
    ) -> None:
        self._folder, self._options, self._timer = folder, options, timer
        self._width, self._height, self._fps, self._expected = width, height, fps, frames
        self._pose_fps = pose_fps
        self._people = people
        self._is_png = options.output.format == "png"
        self._audio = audio
        self._parts: list[Path] = []  # their folders
        self._digests: list[str] = []  # of all frames so far
        try:
            shutil.rmtree(self._parts_folder, ignore_errors=True)
            self._parts_folder.mkdir(parents=True)
        except OSError as error:
            raise as_runner_error(error, where=folder) from error
        if self._audio is not None:
            check_sound(self._audio)

    @classmethod
    def of(
        cls,
        clip: ClipInfo,
        finished: ClipInfo,
        folder: Path,
        options: JobOptions,
        audio_from: Path | None,
        timer: StageTimer,
        people: People | None = None,
    ) -> Delivery:
        """Return the delivery for a prepared clip. `finished`: the clip after the finishing stages.

        `audio_from`: the driving video, if it has sound. `people`: boxes in `clip`; they are published at the size of
        `finished`.
        """
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
            people=None if people is None else people.resized(finished.width, finished.height),
        )

    @property
    def parts(self) -> int:
        """The number of segments that were written or restored, which is the index of the next one."""
        return len(self._parts)

    def write(self, segment: Segment) -> None:
        """Encode one segment as a part. Frames: uint8 [n, H, W, 3] of the announced size, in order; n may be 0.

        Raises InternalError for other frames, or if the segment is not the next one. A part that fails is removed.
        """
        frames = segment.frames
        if frames.shape[1:] != (self._height, self._width, 3) or frames.dtype != np.uint8:
            size = f"({self._height}, {self._width}, 3)"
            raise InternalError(
                f"the frames of segment {segment.index} are {frames.dtype} {frames.shape}, not uint8 with {size}"
            )
        self._check_next(segment.index)
        folder = self._part_folder(segment.index)
        with self._timer.stage("encode_video"), _removed_on_failure(folder):
            folder.mkdir()
            digests = digest_frames(frames)
            (folder / FRAME_DIGESTS).write_bytes(format_digests(digests))
            if len(frames):
                self._encode(folder, frames)
            if segment.pose is not None and len(segment.pose):
                height, width = segment.pose.shape[1:3]
                with Mp4Writer(folder / POSE, width, height, self._pose_fps, PREVIEW_CRF) as pose:
                    pose.write(segment.pose)
            middle = self._poster_at(len(frames))
            if middle is not None:
                write_jpeg(folder / POSTER, frames[middle])
        self._add(folder, digests)

    def pack_part(self, index: int, dest: Path) -> None:
        """Write all files of part `index` into the file `dest`, which appears whole. The bytes are always the same.

        Raises IndexError if there is no such part; StorageFull and StorageDenied for errors of the disk.
        """
        folder = self._parts[index]
        pack_files({str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}, dest)

    def restore(self, index: int, packed: Path) -> None:
        """Restore part `index` from the file that `pack_part` wrote in an earlier attempt of the job.

        Raises InternalError if the file is damaged or is not this part of this job. `write` is then still possible.
        """
        self._check_next(index)
        folder = self._part_folder(index)
        with self._timer.stage("encode_video"), _removed_on_failure(folder):
            names = unpack_files(packed, folder)
            try:
                digests = parse_digests((folder / FRAME_DIGESTS).read_bytes())
            except (FileNotFoundError, ValueError) as error:
                raise InternalError(
                    "the packed part has no list of its frames", where=packed, todo=_REMOVE_PART
                ) from error
            if names - {POSE} != self._names(len(digests)):
                raise InternalError(
                    f"the packed part is not segment {index} of this job",
                    where=packed,
                    todo=_REMOVE_PART,
                )
        self._add(folder, digests)

    def publish(self, storage: Storage, job_id: str, put: Put) -> Published:
        """Join the parts and store the files, the output first. `put` stores a file under a key that an earlier output
        may use too.

        The identity in the record is that of the uploaded bytes. PNG frames and their sound go into a new folder, so
        that an older output stays complete until the record names the new one. Raises InternalError if the number of
        frames is not the announced one; storage.* if they cannot be stored; LeaseLost.
        """
        if len(self._digests) != self._expected:
            raise InternalError(
                f"{len(self._digests)} frames were generated, but the job has {self._expected}", where=job_id
            )
        with self._timer.stage("encode_video"):
            sound = self._join()
        with self._timer.stage("publish"):
            if self._is_png:
                key, sha256 = frames_folder(job_id, uuid4().hex[:8]), None
                files = self._files(f"{PNGS}/*")
                if sound is not None and not sound.missing:
                    files.append(self._folder / AUDIO)
                stored = _store_all(storage.publish, {key + file.name: file for file in files})
                identity, nbytes, count = combined_identity(
                    {name: (storage.identify(info), info.bytes) for name, info in stored.items()}
                )
            else:
                key = job_key(job_id, OUTPUT)
                sha256 = sha256_file(self._folder / OUTPUT)
                info = put(self._folder / OUTPUT, key)
                stored, identity, nbytes, count = {key: info}, storage.identify(info), info.bytes, 1
            beside = {name: self._folder / name for name in (POSE, POSTER, FRAME_DIGESTS, PEOPLE)}
            stored |= _store_all(put, {job_key(job_id, n): path for n, path in beside.items() if path.exists()})
        record = OutputRecord(
            uri=storage.uri(key.rstrip("/")),
            key=key,
            bytes=nbytes,
            files=count,
            identity=identity,
            sha256=sha256,
            frames=len(self._digests),
            fps=str(self._fps),
            generated_fps=str(self._pose_fps),
            width=self._width,
            height=self._height,
            frames_sha256=combined_digest(self._digests),
            frames_hash=FRAMES_HASH,
        )
        return Published(record, frozenset(stored), sound)

    def abort(self) -> None:
        """Remove all files of this delivery from scratch. Idempotent."""
        shutil.rmtree(self._parts_folder, ignore_errors=True)
        for name in (OUTPUT, AUDIO, POSE, POSTER, FRAME_DIGESTS, PEOPLE):
            (self._folder / name).unlink(missing_ok=True)

    @property
    def _parts_folder(self) -> Path:
        return self._folder / "parts"

    def _part_folder(self, index: int) -> Path:
        return self._parts_folder / f"{index:05d}"

    def _check_next(self, index: int) -> None:
        if index != self.parts:
            raise InternalError(f"segment {index} was delivered, but segment {self.parts} is the next one")

    def _add(self, folder: Path, digests: list[str]) -> None:
        self._parts.append(folder)
        self._digests += digests

    def _encode(self, folder: Path, frames: np.ndarray) -> None:
        writer: Mp4Writer | PngWriter
        if self._is_png:
            writer = PngWriter(folder / PNGS, self._width, self._height, first=len(self._digests))
        else:
            writer = Mp4Writer(folder / OUTPUT, self._width, self._height, self._fps, self._options.output.crf)
        with writer:
            writer.write(frames)

    def _poster_at(self, frames: int) -> int | None:
        """Return the index of the job's middle frame in the next part, if that part (`frames` frames) contains it."""
        middle = self._expected // 2 - len(self._digests)
        return middle if 0 <= middle < frames else None

    def _names(self, frames: int) -> set[str]:
        """Return the file names of the next part with `frames` frames, without the optional preview of the poses."""
        names, begin = {FRAME_DIGESTS}, len(self._digests)
        if self._is_png:
            names |= {f"{PNGS}/{png_name(index)}" for index in range(begin, begin + frames)}
        elif frames:
            names.add(OUTPUT)
        return names if self._poster_at(frames) is None else names | {POSTER}

    def _join(self) -> SoundNote | None:
        """Make the published files from the files of the parts. Return the note on the sound."""
        sound = None
        if not self._is_png:
            sound = join_parts(self._files(OUTPUT), self._folder / OUTPUT, fps=self._fps, audio=self._audio)
        elif self._audio is not None:
            sound = write_wav(self._audio, self._folder / AUDIO, len(self._digests) / self._fps)
        if poses := self._files(POSE):
            join_parts(poses, self._folder / POSE, fps=self._pose_fps)
        try:
            for poster in self._files(POSTER):
                shutil.copyfile(poster, self._folder / POSTER)
            (self._folder / FRAME_DIGESTS).write_bytes(format_digests(self._digests))
            if self._people is not None:
                (self._folder / PEOPLE).write_bytes(self._people.to_json())
        except OSError as error:
            raise as_runner_error(error, where=self._folder) from error
        return sound

    def _files(self, pattern: str) -> list[Path]:
        """Return the files of all parts that match `pattern`, in order."""
        return [path for part in self._parts for path in sorted(part.glob(pattern))]


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove `folder` if the block fails. Errors of the disk become RunnerErrors."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise as_runner_error(error, where=folder) from error
        raise


def _store_all(put: Put, files: Mapping[str, Path]) -> dict[str, ObjectInfo]:
    """Upload `files` (key → local file) in parallel. Return key → uploaded object."""
    with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
        return dict(zip(files, pool.map(lambda key: put(files[key], key), files), strict=True))
