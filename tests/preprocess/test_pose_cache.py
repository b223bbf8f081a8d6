"""Pose cache: the same poses as from the networks, which are asked again only when something that decides changed."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import runner
from runner.preprocess import pose_cache
from runner.preprocess.geometry import Geometry
from runner.preprocess.masks.packed import ClipMasks
from runner.preprocess.networks.vitpose import PoseEstimator
from runner.preprocess.networks.yolov10 import Detector
from runner.preprocess.pictures.sizing import place
from runner.preprocess.pose_cache import find_poses_once, masks_once, network_parts, segmenter_parts, video_parts
from runner.spec.options import JobOptions
from runner.storage.disk_cache import DiskCache, key
from runner.timing import StageTimer
from runner.video import VideoReader

CENTRES = [(60 + 4 * i, 60) for i in range(8)]


@pytest.fixture(scope="module")
def clip(make_clip, tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "disc.mp4", [None, *CENTRES[:-1]])


@pytest.fixture(scope="module")
def people(networks) -> tuple[Detector, PoseEstimator]:
    return Detector.load(networks[0]), PoseEstimator.load(networks[1])


@pytest.fixture
def find(people, tmp_path):
    """find(clip, **options) → (poses, counters), through one cache."""
    cache = DiskCache(tmp_path / "poses")

    def run(clip: Path, identity: str | None = None, cached: bool = True, **asked: object):
        options = JobOptions(fps=asked.pop("fps", 16), max_frames=asked.pop("max_frames", None), preprocess=asked)
        timer = StageTimer()
        with VideoReader(clip, parity=options.preprocess.parity) as reader:
            sampled = reader.sample(options.fps, 0, options.max_frames)
            size = reader.info.width, reader.info.height
            geometry = Geometry(64, 96, place(size, (64, 96)))
            parts = {
                "detector": network_parts(people[0].network, identity),
                "pose": network_parts(people[1].network),
            }
            found = find_poses_once(
                cache if cached else None, parts, reader, sampled, options.preprocess, geometry, *people, timer
            )
        return found, timer

    return run


def test_pose_cache_hit_runs_no_network_and_gives_same_poses(find, clip):
    fresh, _ = find(clip, cached=False)
    first, looked = find(clip)
    again, remembered = find(clip)
    assert looked.counters == {"pose_cache_misses": 1} and looked.seconds["pose"] > 0
    assert remembered.counters == {"pose_cache_hits": 1} and remembered.seconds == {}
    for found in (first, again):
        np.testing.assert_array_equal(found.track.points, fresh.track.points)
        assert found.track.points.dtype == fresh.track.points.dtype
        assert (found.track.width, found.track.height) == (fresh.track.width, fresh.track.height)
        assert found.faces.boxes == fresh.faces.boxes
        np.testing.assert_array_equal(found.faces.sources, fresh.faces.sources)
        np.testing.assert_array_equal(found.present, fresh.present)
        assert (found.report, found.warnings) == (fresh.report, fresh.warnings)
    assert fresh.report["frames_without_person"] >= 1  # there is something in the report that could be lost


def test_pose_cache_key_depends_on_inputs_of_poses_only(find, clip, make_clip, tmp_path):
    find(clip)

    def hit(clip: Path, **asked: object) -> bool:
        return "pose_cache_hits" in find(clip, **asked)[1].counters

    assert hit(shutil.copy(clip, tmp_path / "the same under another name.mp4"))
    for later in ({"retarget": "robust"}, {"mask": {"iterations": 1}}):  # what happens to poses and masks afterwards
        assert hit(clip, **later)
    other = make_clip(tmp_path / "other.mp4", CENTRES)
    for changed in ({"detect_every": 2}, {"smooth": True}, {"parity": True}, {"fps": 8}, {"max_frames": 6}):
        assert not hit(clip, **changed), changed
        assert hit(clip, **changed), changed
    assert not hit(other)
    assert not hit(clip, identity="another detector")
    assert hit(clip)


def test_pose_cache_key_in_parity_names_decord(clip):
    with VideoReader(clip) as ours, VideoReader(clip, parity=True) as official:
        parts = video_parts(official)
        assert parts.pop("reader").startswith("decord 3.")
        assert parts == video_parts(ours)


def test_masks_once_gives_cached_masks_bit_for_bit(tmp_path):
    cache, timer = DiskCache(tmp_path), StageTimer()
    shapes = np.zeros((3, 40, 30), bool)
    shapes[0, 5:20, 7:9] = shapes[2, ::3, 1] = True

    def never() -> ClipMasks:
        raise AssertionError("made again")

    masks_once(cache, {"clip": 1}, lambda: ClipMasks.of(shapes, 40, 30), timer)
    again = masks_once(cache, {"clip": 1}, never, timer)
    np.testing.assert_array_equal(np.stack(list(again.frames(0, 3))), shapes)
    assert timer.counters == {"mask_cache_misses": 1, "mask_cache_hits": 1}
    assert cache.get(key({"clip": 1})) is None  # poses of the same parts would lie elsewhere


def test_segmenter_parts_depend_on_weights_and_dtype(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = segmenter_parts({"dtype": "float32"}, tmp_path)
    assert segmenter_parts({"dtype": "float32"}, tmp_path) == before
    assert segmenter_parts({"dtype": "bfloat16"}, tmp_path) != before
    (tmp_path / "model.safetensors").write_bytes(b"others!")
    assert segmenter_parts({"dtype": "float32"}, tmp_path) != before


def test_pose_cache_key_changes_with_any_module_of_preprocess_or_video(tmp_path):
    """At any depth: a glob that is not recursive would serve poses that older code has found."""
    package = Path(runner.__file__).parent
    for folder in ("preprocess", "video"):
        shutil.copytree(package / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    digest = pose_cache._code_sha256.__wrapped__
    before = digest(tmp_path)
    assert before == pose_cache._code_sha256()  # where it lies changes nothing
    files = sorted(tmp_path.rglob("*.py"))
    assert {"body", "masks", "networks", "pictures", "preprocess", "video"} <= {file.parent.name for file in files}
    for file in files:
        code = file.read_bytes()
        file.write_bytes(code + b"#")
        assert digest(tmp_path) != before, file
        file.write_bytes(code)
    files[-1].rename(files[-1].with_name("renamed.py"))
    assert digest(tmp_path) != before
