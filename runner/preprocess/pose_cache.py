"""Pose cache: run pass 1 once for each clip, pair of networks and set of options, and keep the result on disk.

In:   the arguments of `find_poses`, and a cache. Out: its `FoundPoses`, found now or from the cache; masks likewise.
Never: finding poses, the cache's storage.

A dance with many characters is searched for poses once: the key has neither the reference nor later steps (retarget,
size of the output). It has all code of runner/preprocess and runner/video, so that poses of older code are not reused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache as once
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from runner.preprocess.body.face import FacePlan
from runner.preprocess.body.keypoints import PoseTrack
from runner.preprocess.body.people_found import PeopleFound
from runner.preprocess.geometry import Geometry
from runner.preprocess.masks.packed import ClipMasks
from runner.preprocess.networks.backends import Backend, PersonDetector, PointFinder
from runner.preprocess.networks.int8 import model_files
from runner.preprocess.networks.sessions import Network, model_file
from runner.preprocess.poses import FoundPoses, find_poses
from runner.spec.options import PreprocessOptions
from runner.storage.disk_cache import DiskCache, key, remembered
from runner.storage.file_hashes import content_sha256
from runner.timing import StageTimer
from runner.video import Sampled, VideoReader

__all__ = [
    "POSES_FOLDER",
    "backend_parts",
    "cached_notes",
    "clip_parts",
    "find_poses_once",
    "masks_once",
    "network_parts",
    "pack_poses",
    "segmenter_parts",
    "unpack_poses",
    "video_parts",
]

POSES_FOLDER = "poses"  # in the cache folder of a run
# Options that change neither poses nor masks of pass 1. A new option is part of the key until it is named here.
AFTERWARDS = {"mask", "official", "retarget"}
CODE_FOLDERS = ("preprocess", "video")  # of the package; if their code changes, poses are found again


def network_parts(network: Network, identity: str | None = None) -> dict[str, Any]:
    """Return a network's part of a key: the sha256 of its files (`identity` if known) and the provider's settings."""
    runs = {name: value for name, value in network.description.items() if name != "why"}
    return {**runs, "sha256": identity or _files_sha256(network.path)}


def backend_parts(backend: Backend) -> dict[str, dict[str, Any]]:
    """Return the parts of a key for both networks of a backend."""
    return {"detector": network_parts(backend.detector.network), "pose": network_parts(backend.pose.network)}


def segmenter_parts(description: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a segmenter's part of a key: the sha256 of its folder's files, device, dtype and library versions."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {**description, **versions, "sha256": _files_sha256(folder)}


def video_parts(reader: VideoReader) -> dict[str, Any]:
    """Return a video's part of a key: its content, its reader, and the code and library versions that read it."""
    parts = {"code": _code_sha256(), "libraries": _versions(), "video": content_sha256(reader.info.path)}
    if reader.parity:
        import decord

        parts["reader"] = f"decord {decord.__version__}"
    return parts


def clip_parts(
    reader: VideoReader,
    sampled: Sampled,
    options: PreprocessOptions,
    geometry: Geometry,
    networks: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return all that decides the poses of a clip, for `disk_cache.key`. networks: name → `network_parts`."""
    indices = np.ascontiguousarray(sampled.indices, np.int64)
    return {
        **video_parts(reader),
        "frames": [len(indices), hashlib.sha256(indices.tobytes()).hexdigest(), str(sampled.fps)],
        "options": options.model_dump(mode="json", exclude=AFTERWARDS),
        "resize_first": geometry.resize_first,
        "networks": {name: dict(parts) for name, parts in networks.items()},
    }


def find_poses_once(
    cache: DiskCache | None,
    networks: Mapping[str, Mapping[str, Any]],
    reader: VideoReader,
    sampled: Sampled,
    options: PreprocessOptions,
    geometry: Geometry,
    detector: PersonDetector,
    pose: PointFinder,
    timer: StageTimer,
    everybody: PeopleFound | None = None,
) -> FoundPoses:
    """Return the result of `find_poses`, from the cache if it is there. Raises the same errors.

    Counts pose_cache_hits and pose_cache_misses.
    """

    def find() -> FoundPoses:
        return find_poses(reader, sampled, options, geometry, detector, pose, timer, everybody)

    if cache is None:
        return find()
    name = key(clip_parts(reader, sampled, options, geometry, networks))
    found = unpack_poses(remembered(cache, name, lambda: pack_poses(find()), timer))
    notes = {"notes": _packed_notes(found)}
    remembered(cache, _notes_key(reader, sampled, options, geometry), lambda: notes, StageTimer())
    return found


def cached_notes(
    cache: DiskCache, reader: VideoReader, sampled: Sampled, options: PreprocessOptions, geometry: Geometry
) -> tuple[dict[str, Any], list[str]] | None:
    """Return (report, warnings) of poses that were found before, with any networks; None if there are none.

    No network is loaded for this. Raises StorageDenied and the like if the cache cannot be read.
    """
    arrays = cache.get(_notes_key(reader, sampled, options, geometry))
    if arrays is None:
        return None
    notes = json.loads(arrays["notes"].tobytes())
    return notes["report"], notes["warnings"]


def _notes_key(reader: VideoReader, sampled: Sampled, options: PreprocessOptions, geometry: Geometry) -> str:
    return key({"what": "notes on poses", **clip_parts(reader, sampled, options, geometry, {})})


def masks_once(
    cache: DiskCache | None, parts: Mapping[str, Any], make: Callable[[], ClipMasks], timer: StageTimer
) -> ClipMasks:
    """Return the masks of `make`, from the cache if they are there. parts: those of the clip and of the segmenter.

    Counts mask_cache_hits and mask_cache_misses.
    """
    if cache is None:
        return make()
    arrays = remembered(cache, key({"what": "masks", **parts}), lambda: make().arrays(), timer, "mask_cache")
    return ClipMasks.from_arrays(dict(arrays))


def pack_poses(found: FoundPoses) -> dict[str, np.ndarray]:
    """Pack poses as arrays: points float32 [n, 133, 3], boxes int32 [n, 4], sources int64 [n], present bool [n], notes
    as JSON."""
    return {
        "points": found.track.points,
        "boxes": np.array(found.faces.boxes, np.int32).reshape(-1, 4),
        "sources": found.faces.sources,
        "present": found.present,
        "notes": _packed_notes(found),
    }


def _packed_notes(found: FoundPoses) -> np.ndarray:
    notes = {"size": [found.track.width, found.track.height], "report": found.report, "warnings": found.warnings}
    return np.frombuffer(json.dumps(notes).encode(), np.uint8)


def unpack_poses(arrays: Mapping[str, np.ndarray]) -> FoundPoses:
    """Inverse of `pack_poses`."""
    notes = json.loads(arrays["notes"].tobytes())
    boxes = [(x1, x2, y1, y2) for x1, x2, y1, y2 in arrays["boxes"].tolist()]
    track = PoseTrack(arrays["points"], *notes["size"])
    return FoundPoses(track, FacePlan(boxes, arrays["sources"]), notes["report"], notes["warnings"], arrays["present"])


def _files_sha256(path: Path) -> str:
    """Return the sha256 of a model file and the weights beside it, or of all files of a folder, with their names."""
    if path.is_dir():
        folder, files = path, sorted(file for file in path.rglob("*") if file.is_file())
    else:
        folder, files = path.parent, model_files(model_file(path))
    listing = "".join(f"{content_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


@once
def _code_sha256(package: Path = Path(__file__).parents[1]) -> str:
    """Return the sha256 of all modules in CODE_FOLDERS, at any depth, with their paths."""
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        files = sorted((package / folder).rglob("*.py"))
        assert files, f"{package / folder} has no module"
        for file in files:
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@once
def _versions() -> dict[str, str]:
    import av
    import cv2
    import onnxruntime

    return {module.__name__: module.__version__ for module in (av, cv2, np, onnxruntime)}
