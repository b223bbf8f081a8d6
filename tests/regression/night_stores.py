"""Night stores for tests: output folders with renders whose records are true, and storages with hooks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runner.hashing import sha256_file
from runner.records.output_layout import AUDIO, FRAME_DIGESTS, OUTPUT, POSTER, RESULT, frames_folder, job_key
from runner.records.record import OutputRecord, ResultRecord
from runner.storage import Storage, combined_identity
from runner.video import FRAMES_HASH, combined_digest, digest_frames, format_digests
from tests.moving_scene import write_mp4

__all__ = ["HookedStorage", "Killed", "make_record", "write_render", "write_video"]


def make_record(job_id: str = "a", **more: Any) -> ResultRecord:
    """A record of a job that succeeded on a CPU; without an output, unless `more` has one."""
    values = {
        "job_id": job_id,
        "status": "succeeded",
        "attempt": 1,
        "run_id": "20260101T000000Z",
        "reason": "no record yet",
        "started_at": "2026-01-01T00:00:00.000+00:00",
        "finished_at": "2026-01-01T00:01:00.000+00:00",
        "fingerprint": hashlib.sha256(job_id.encode()).hexdigest(),
        "fingerprint_parts": {"options.seed": 42},
        "recipe": "fp4-distill",
        "engine": {"device": "cpu"},
    }
    return ResultRecord.model_validate(values | more)


def write_render(
    out: Storage,
    scratch: Path,
    job_id: str = "a",
    *,
    content: str = "first",
    png: bool = False,
    sound: bytes | None = None,
    **more: Any,
) -> ResultRecord:
    """Write a job as a run leaves it: output, digests, poster, and the record last; `content` decides the frames.

    `sound`: what lies beside PNG frames as audio.wav.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    frames = [f"{content} {index}".encode() for index in range(3)]
    digests = [hashlib.sha256(frame).hexdigest() for frame in frames]

    def put(name: str, data: bytes) -> tuple[str, tuple[str, int]]:
        path = scratch / "file"
        path.write_bytes(data)
        key = name if name.startswith("jobs/") else job_key(job_id, name)
        info = out.publish(path, key)
        return key, (out.identify(info), info.bytes)

    if png:
        key = frames_folder(job_id, hashlib.sha256(content.encode()).hexdigest()[:8])
        stored = dict(put(f"{key}{index:06d}.png", frame) for index, frame in enumerate(frames))
        if sound is not None:
            stored |= [put(f"{key}{AUDIO}", sound)]
        (identity, nbytes, files), sha256 = combined_identity(stored), None
    else:
        video = b"".join(frames)
        key, (identity, nbytes) = put(OUTPUT, video)
        files, sha256 = 1, hashlib.sha256(video).hexdigest()
    put(FRAME_DIGESTS, format_digests(digests))
    put(POSTER, f"poster of {content}".encode())
    output = OutputRecord(
        uri=out.uri(key.rstrip("/")),
        key=key,
        bytes=nbytes,
        files=files,
        identity=identity,
        sha256=sha256,
        frames=3,
        fps="16",
        width=96,
        height=144,
        frames_sha256=combined_digest(digests),
        frames_hash=FRAMES_HASH,
    )
    record = make_record(job_id, output=output, **more)
    out.write_bytes(job_key(job_id, RESULT), record.to_json())
    return ResultRecord.model_validate_json(record.to_json())


class Killed(BaseException):
    """The process ended here: no clean-up runs that an error would have."""


class HookedStorage:
    """A storage that calls `before(name, arguments)` and `after(name, arguments)` around each call of a method."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.before: Callable[[str, Sequence[Any]], None] = lambda name, arguments: None
        self.after: Callable[[str, Sequence[Any]], None] = lambda name, arguments: None
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **more: Any) -> Any:
            self.calls.append((name, arguments))
            self.before(name, arguments)
            result = found(*arguments, **more)
            if name in ("list", "leftovers"):
                result = list(result)
            self.after(name, arguments)
            return result

        return call


def write_video(out: Storage, scratch: Path, job_id: str, frames: np.ndarray, **more: Any) -> ResultRecord:
    """The same with frames that can be seen: uint8 [n, H, W, 3], coded as the runner codes them."""
    path = write_mp4(scratch / f"{job_id}.mp4", frames)
    digests = digest_frames(frames)
    info = out.publish(path, job_key(job_id, OUTPUT))
    out.write_bytes(job_key(job_id, FRAME_DIGESTS), format_digests(digests))
    output = OutputRecord(
        uri=out.uri(info.key),
        key=job_key(job_id, OUTPUT),
        bytes=info.bytes,
        files=1,
        identity=out.identify(info),
        sha256=sha256_file(path),
        frames=len(frames),
        fps="16",
        width=frames.shape[2],
        height=frames.shape[1],
        frames_sha256=combined_digest(digests),
        frames_hash=FRAMES_HASH,
    )
    record = make_record(job_id, output=output, **more)
    out.write_bytes(job_key(job_id, RESULT), record.to_json())
    return record
