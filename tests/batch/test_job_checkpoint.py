from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from runner.batch.job_checkpoint import Chain, Checkpoints
from runner.errors import StorageUnavailable
from runner.generation.protocol import ResumePoint
from runner.storage import open_storage


def chain(fingerprint: str = "f" * 64, segments: int = 6, **identity: str) -> Chain:
    return Chain.of("a", fingerprint, {"device": "stub", "memory": "resident"} | identity, segments)


def point(segment: int) -> ResumePoint:
    """A state that names its segment, with arrays of several types."""
    random = np.random.default_rng(segment)
    arrays = {
        "previous": random.random((1, 3, 2, 4), np.float32),
        "random": random.integers(0, 255, 5056, np.uint8),
        "empty": np.zeros((0, 3), np.int64),
    }
    return ResumePoint(segment, arrays, {"n": segment, "strides": [1, 2]})


@pytest.fixture
def store(tmp_path: Path):
    return open_storage(tmp_path / "out")


def keep(store, tmp_path: Path, count: int, made: Chain | None = None) -> Checkpoints:
    """`count` segments of a job, kept by an attempt that ends then."""
    made = made or chain()
    checkpoints = Checkpoints(store)
    checkpoints.find(made, tmp_path / "nothing")
    for number in range(1, count + 1):
        packed = tmp_path / "packed"
        packed.write_bytes(f"part {number}".encode() * 100)
        checkpoints.save_part(made, packed)
        checkpoints.save_state(made, point(number), tmp_path / "scratch")
    return checkpoints


def keys(store) -> list[str]:
    return sorted(info.key for info in store.list("jobs/"))


def test_find_without_kept_segments_has_no_reason(store, tmp_path):
    found = Checkpoints(store).find(chain(), tmp_path / "kept")
    assert (found.point, found.parts, found.why) == (None, (), "")


@pytest.mark.parametrize("count", [1, 2, 6])
def test_find_returns_state_and_parts_of_earlier_attempt(store, tmp_path, count):
    keep(store, tmp_path, count)
    found = Checkpoints(store).find(chain(), tmp_path / "kept")
    assert found.point is not None
    assert found.point.segment == count
    wanted = point(count)
    assert found.point.values == wanted.values
    assert found.point.arrays.keys() == wanted.arrays.keys()
    for name, array in wanted.arrays.items():
        got = found.point.arrays[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert [path.read_bytes() for path in found.parts] == [f"part {n}".encode() * 100 for n in range(1, count + 1)]


def test_save_state_keeps_only_newest_state(store, tmp_path):
    keep(store, tmp_path, 3)
    assert [key.rpartition("/")[2] for key in keys(store)] == ["0001.tar", "0002.tar", "0003.state", "0003.tar"]


def test_state_file_is_readable_as_safetensors(store, tmp_path):
    keep(store, tmp_path, 1)
    (state,) = (tmp_path / "out").rglob("*.state")
    with safe_open(state, "numpy") as file:
        assert set(file.keys()) == {"previous", "random", "empty"}
        header = json.loads(file.metadata()["video_lab"])
    assert (header["segment"], header["segments"], header["identity"]["device"]) == (1, 6, "stub")
    assert header["identity"]["version of torch"]


def test_new_attempt_continues_after_last_kept_segment(store, tmp_path):
    keep(store, tmp_path, 2)
    again = Checkpoints(store)
    again.find(chain(), tmp_path / "kept")
    assert again.kept(chain()) == 2
    (tmp_path / "packed").write_bytes(b"part 3")
    again.save_part(chain(), tmp_path / "packed")
    again.save_state(chain(), point(3), tmp_path / "scratch")
    found = Checkpoints(store).find(chain(), tmp_path / "more")
    assert (found.point and found.point.segment, len(found.parts)) == (3, 3)


def test_part_without_state_is_not_used(store, tmp_path):
    """The process was killed after it saved the part and before it saved the state."""
    checkpoints = keep(store, tmp_path, 2)
    (tmp_path / "packed").write_bytes(b"part 3")
    checkpoints.save_part(chain(), tmp_path / "packed")
    found = Checkpoints(store).find(chain(), tmp_path / "kept")
    assert (found.point and found.point.segment, len(found.parts)) == (2, 2)


def test_old_state_beside_newer_one_is_ignored(store, tmp_path):
    """The process was killed after it saved the new state and before it removed the old one."""
    keep(store, tmp_path, 1)
    (state,) = (tmp_path / "out").rglob("0001.state")
    first = state.read_bytes()
    checkpoints = Checkpoints(store)
    checkpoints.find(chain(), tmp_path / "kept")
    (tmp_path / "packed").write_bytes(b"part 2")
    checkpoints.save_part(chain(), tmp_path / "packed")
    checkpoints.save_state(chain(), point(2), tmp_path / "scratch")
    assert not state.exists()
    state.write_bytes(first)
    found = Checkpoints(store).find(chain(), tmp_path / "more")
    assert found.point is not None
    assert found.point.segment == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"memory": "stream"}, "memory: resident → stream"),
        ({"device": "another GPU"}, "device: stub → another GPU"),
        ({"compute": "fp8"}, "compute: none → fp8"),
        ({"fingerprint": "0" * 64}, "the kept segments were made with other inputs or options"),
    ],
)
def test_segments_made_with_other_settings_are_removed_with_reason(store, tmp_path, change, why):
    keep(store, tmp_path, 2)
    found = Checkpoints(store).find(chain(**change), tmp_path / "kept")
    assert (found.point, found.why) == (None, why)
    assert keys(store) == []


def test_segments_of_other_package_version_are_not_used(store, tmp_path, monkeypatch):
    from runner.batch import job_checkpoint

    keep(store, tmp_path, 2)
    now = dict(job_checkpoint.environment())
    other = now | {"packages": now["packages"] | {"torch": "9.9"}}
    monkeypatch.setattr(job_checkpoint, "environment", lambda: other)
    found = Checkpoints(store).find(chain(), tmp_path / "kept")
    assert (found.point, found.why) == (None, f"version of torch: {now['packages']['torch']} → 9.9")


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("0001.tar", b"part 1 of another", "the kept segment 1 is damaged"),
        ("0002.tar", None, "the kept segment 2 is missing"),
        ("0002.state", b"torn", "the state kept after segment 2 cannot be read"),
        ("0002.state", b"", "the state kept after segment 2 cannot be read"),
    ],
)
def test_damaged_part_or_state_is_not_used(store, tmp_path, name, damage, why):
    keep(store, tmp_path, 2)
    (path,) = (tmp_path / "out").rglob(name)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    found = Checkpoints(store).find(chain(), tmp_path / "kept")
    assert found.point is None
    assert found.why.startswith(why)
    assert keys(store) == [], "the next attempt keeps its own"


@pytest.mark.parametrize("change", [{"segment": 3}, {"parts": []}, {"parts": None}, {"segment": "x"}])
def test_state_with_contradicting_header_is_not_used(store, tmp_path, change):
    import safetensors.numpy

    keep(store, tmp_path, 2)
    (state,) = (tmp_path / "out").rglob("*.state")
    with safe_open(state, "numpy") as file:
        header = json.loads(file.metadata()["video_lab"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.numpy.save_file(arrays, state, {"video_lab": json.dumps(header | change)})
    found = Checkpoints(store).find(chain(), tmp_path / "kept")
    assert (found.point, bool(found.why)) == (None, True)


def test_find_with_unavailable_storage_raises_and_keeps_segments(store, tmp_path, monkeypatch):
    keep(store, tmp_path, 2)

    def away(*_, **__):
        raise StorageUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "fetch", away)
        with pytest.raises(StorageUnavailable):
            Checkpoints(store).find(chain(), tmp_path / "kept")
    assert Checkpoints(store).find(chain(), tmp_path / "kept").point is not None


def test_remove_deletes_all_checkpoints_of_job(store, tmp_path):
    checkpoints = keep(store, tmp_path, 3)
    store.write_bytes("jobs/b/parts/0/0001.tar", b"x")
    checkpoints.remove("a")
    assert keys(store) == ["jobs/b/parts/0/0001.tar"]


@pytest.mark.parametrize("name", ["previous", "random"])
def test_state_with_flipped_bit_is_not_used(store, tmp_path, name):
    """Frames that are slightly wrong would not be noticed later."""
    keep(store, tmp_path, 2)
    (state,) = (tmp_path / "out").rglob("*.state")
    data, content = state.read_bytes(), point(2).arrays[name].tobytes()
    at = data.index(content) + len(content) // 2
    state.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    found = Checkpoints(store).find(chain(), tmp_path / "kept")
    assert (found.point, found.parts) == (None, ())
    assert "the state kept after segment 2 cannot be read" in found.why and "checksum" in found.why


def test_part_is_not_hashed_again_where_storage_gives_digest(store, tmp_path, monkeypatch):
    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is read once more")

    monkeypatch.setattr("runner.batch.job_checkpoint.sha256_file", refuse)
    keep(store, tmp_path, 2)
    found = Checkpoints(store).find(chain(), tmp_path / "kept")
    assert len(found.parts) == 2
