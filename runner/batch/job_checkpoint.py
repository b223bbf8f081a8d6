"""Job checkpoint: keep the finished segments of a job until it is published, so that a killed job can be resumed.

In:   packed parts and the state after each segment. Out: the segments of an earlier attempt, or why they are unusable.
Never: how a segment is generated or encoded; leases.

    jobs/<id>/parts/<chain>/0001.tar     segment 1, encoded
    jobs/<id>/parts/<chain>/0003.state   the state from which segment 4 is generated (safetensors); only the newest

The name of a chain is a digest of everything that determines its bytes: fingerprint, device model, GEMM precision,
memory mode, versions. A runner that has lost the job may still write for a moment. It then writes the same bytes under
the same names, or other bytes under other names. A state is written after its part and contains the digests of all
parts before it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import InputError, InternalError, RunnerError
from runner.generation.protocol import ResumePoint
from runner.hashing import sha256_file
from runner.records.output_layout import (
    part_name,
    parts_folder,
    segments_of_state,
    split_job_key,
    state_name,
)
from runner.records.record import environment
from runner.storage import Fence, ObjectInfo, Storage

__all__ = ["Chain", "Checkpoints", "Found", "with_versions"]

FORMAT = "2"  # of parts and states; part of the chain's name
HEADER = "video_lab"  # key in a state file's metadata


@dataclass(frozen=True)
class Chain:
    """The finished segments of one job that were all made under the same conditions."""

    job_id: str
    fingerprint: str
    identity: Mapping[str, str]  # what must be equal besides the fingerprint, e.g. {"device": "NVIDIA H200"}
    segments: int  # of the whole job

    @classmethod
    def of(cls, job_id: str, fingerprint: str, generator: Mapping[str, str], segments: int) -> Chain:
        """Return the chain for a generator's `resume_identity`. Versions of packages and driver are added."""
        return cls(job_id, fingerprint, with_versions(generator), segments)

    def fits(self, generator: Mapping[str, str]) -> bool:
        """Return whether segments of a generator with this `resume_identity` belong to the chain."""
        return with_versions(generator) == self.identity

    @property
    def name(self) -> str:
        """16 hexadecimal digits."""
        described = json.dumps([FORMAT, self.fingerprint, sorted(self.identity.items()), self.segments])
        return hashlib.sha256(described.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """The kept segments of an earlier attempt. Without a `point` the job starts at segment 1; `why`: the reason."""

    point: ResumePoint | None = None
    parts: tuple[Path, ...] = ()  # one packed part per finished segment, in order
    digests: tuple[str, ...] = ()  # sha256 of each
    why: str = ""  # empty if no attempt has left anything


@dataclass
class Checkpoints:
    """The kept segments of one run's jobs on one storage. Safe from any thread for different jobs."""

    storage: Storage
    fence: Callable[[str], Fence | None] = lambda job_id: None  # the fence of a job's lease, if it is on this storage
    _digests: dict[str, list[str]] = field(default_factory=dict)  # job → sha256 of each kept part

    def find(self, chain: Chain, folder: Path) -> Found:
        """Return the segments that an earlier attempt has finished. Their parts are fetched below `folder`.

        Chains that cannot be continued are removed. Raises storage.*.
        """
        self._digests.pop(chain.job_id, None)
        names: dict[str, set[str]] = {}
        for info in self.storage.list(parts_folder(chain.job_id)):
            split = split_job_key(info.key)
            assert split is not None
            _, _, below = split[1].partition("/")
            owner, slash, name = below.partition("/")
            if slash:
                names.setdefault(owner, set()).add(name)
        found = Found()
        if chain.name in names:
            found = self._load(chain, names[chain.name], folder)
        elif names:
            found = Found(why=self._explain(chain, names, folder))
        keep = {chain.name} if found.point is not None else set()
        for owner in names.keys() - keep:
            self._remove(chain.job_id, owner, names[owner])
        if found.point is not None:
            self._digests[chain.job_id] = list(found.digests)
        return found

    def kept(self, chain: Chain) -> int:
        """Return how many segments of the job are kept, from the first."""
        return len(self._digests.get(chain.job_id, ()))

    def save_part(self, chain: Chain, packed: Path) -> None:
        """Keep the packed part of the next segment. Raises LeaseLost; storage.*."""
        digests = self._digests.setdefault(chain.job_id, [])
        key = parts_folder(chain.job_id, chain.name) + part_name(len(digests) + 1)
        info = self.storage.publish(packed, key, fence=self.fence(chain.job_id))
        digests.append(_sha256_of(info, packed))

    def save_state(self, chain: Chain, point: ResumePoint, scratch: Path) -> None:
        """Keep the state after the last kept part. `scratch`: a temporary file. Raises LeaseLost; storage.*."""
        import safetensors.numpy

        folder, count = parts_folder(chain.job_id, chain.name), point.segment
        digests = self._digests.get(chain.job_id, [])
        if len(digests) != count:
            raise InternalError(f"{len(digests)} parts are kept, the state is of segment {count}", where=chain.job_id)
        header = {
            "format": FORMAT,
            "fingerprint": chain.fingerprint,
            "identity": dict(chain.identity),
            "segment": count,
            "segments": chain.segments,
            "parts": digests,
            "values": dict(point.values),
            "crc32": {name: _crc32_of(array) for name, array in point.arrays.items()},
        }
        safetensors.numpy.save_file(dict(point.arrays), scratch, {HEADER: json.dumps(header)})
        self.storage.publish(scratch, folder + state_name(count), fence=self.fence(chain.job_id))
        if count > 1:
            with suppress(RunnerError):  # it only costs space, and is removed when the job is published
                self.storage.delete(folder + state_name(count - 1))

    def remove(self, job_id: str) -> None:
        """Remove all kept segments of a job. Raises LeaseLost; storage.*."""
        self._digests.pop(job_id, None)
        fence = self.fence(job_id)
        for info in list(self.storage.list(parts_folder(job_id))):
            self.storage.delete(info.key, fence=fence)

    def _load(self, chain: Chain, names: set[str], folder: Path) -> Found:
        """Load the newest state of the chain and its parts, if all parts are there and undamaged."""
        counts = sorted(count for name in names if (count := segments_of_state(name)) is not None)
        if not counts:
            return Found(why="the first segment was not finished")
        count = counts[-1]
        prefix = parts_folder(chain.job_id, chain.name)
        try:
            arrays, header = self._read_state(prefix + state_name(count), folder)
            digests = tuple(str(digest) for digest in header["parts"])
            point = ResumePoint(int(header["segment"]), arrays, dict(header["values"]))
        except (InputError, OSError, ValueError, KeyError, TypeError) as error:
            return Found(why=f"the state kept after segment {count} cannot be read ({_short(error)})")
        if point.segment != count or len(digests) != count or not 1 <= count <= chain.segments:
            return Found(why=f"the state kept after segment {count} belongs to another segment")
        parts = []
        for number, digest in enumerate(digests, 1):
            path = folder / part_name(number)
            try:
                info = self.storage.fetch(prefix + part_name(number), path)
            except InputError:
                return Found(why=f"the kept segment {number} is missing")
            if _sha256_of(info, path) != digest:
                return Found(why=f"the kept segment {number} is damaged")
            parts.append(path)
        return Found(point, tuple(parts), digests)

    def _explain(self, chain: Chain, names: Mapping[str, set[str]], folder: Path) -> str:
        """Return why the segments of other chains cannot be continued."""
        why = "the first segment was not finished"
        for owner, files in names.items():
            counts = [count for name in files if (count := segments_of_state(name)) is not None]
            if not counts:
                continue
            try:
                key = parts_folder(chain.job_id, owner) + state_name(max(counts))
                _, header = self._read_state(key, folder)
                if header["fingerprint"] != chain.fingerprint:
                    return "the kept segments were made with other inputs or options"
                before = {str(name): str(value) for name, value in header["identity"].items()}
            except (RunnerError, OSError, ValueError, KeyError, TypeError, AttributeError):
                why = "the kept segments cannot be read"
                continue
            return "; ".join(_changes(before, chain.identity)) or "the kept segments were made with another version"
        return why

    def _read_state(self, key: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (arrays, header) of a state. Raises InputError, OSError, ValueError, KeyError."""
        from safetensors import SafetensorError, safe_open

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "state"
        self.storage.fetch(key, path)
        try:
            with safe_open(path, "numpy") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                if not isinstance(header, dict):
                    raise ValueError("its header is not a JSON object")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if {name: _crc32_of(array) for name, array in arrays.items()} != header["crc32"]:
                raise ValueError("its checksum is wrong")
            return arrays, header
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        finally:
            path.unlink(missing_ok=True)

    def _remove(self, job_id: str, owner: str, names: set[str]) -> None:
        for name in names:
            with suppress(RunnerError):  # it only costs space
                self.storage.delete(parts_folder(job_id, owner) + name)


def _sha256_of(info: ObjectInfo, path: Path) -> str:
    """Return the sha256 (hex) of an object: from `info` if the storage computed it; if not, from `path`."""
    kind, _, digest = (info.identity or "").partition(":")
    return digest if kind == "sha256" else sha256_file(path)


def _crc32_of(array: Any) -> int:
    """Return the CRC-32 of the bytes of a numpy array in row-major order."""
    import numpy as np

    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def with_versions(generator: Mapping[str, str]) -> dict[str, str]:
    """Return a generator's `resume_identity` with the versions of packages and driver added."""
    found = environment()
    versions = {f"version of {name}": str(version) for name, version in found["packages"].items()}
    return dict(generator) | versions | {"driver": str(found["driver"])}


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the differences as texts: `memory: resident → stream`."""
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {before.get(name, 'none')} → {after.get(name, 'none')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
