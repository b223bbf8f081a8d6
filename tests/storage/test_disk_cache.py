"""The cache: what was put comes back or nothing does, within its size, among processes, whatever a file suffers."""

import hashlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.pool import Pool

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runner.errors import NoPerson
from runner.storage.disk_cache import MAX_BYTES, DiskCache, key, remembered
from runner.timing import StageTimer
from tests.storage.cache_worker import LIMIT, make_once, points, same, work

KINDS = [np.dtype(t) for t in ("bool", "uint8", "int32", "int64", "float32", "float64")]
ARRAYS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.sampled_from(KINDS).flatmap(lambda t: hnp.arrays(t, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))),
    max_size=4,
)


def ticking() -> Iterator[int]:
    now = 10**18
    while True:
        now += 10**9
        yield now


@pytest.fixture
def cache(tmp_path) -> DiskCache:
    clock = ticking()
    return DiskCache(tmp_path / "poses", 1 << 20, clock_ns=lambda: next(clock))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays=ARRAYS)
def test_get_returns_arrays_of_put(cache, arrays):
    name = key({"case": "round trip"})
    assert cache.put(name, arrays)
    found = cache.get(name)
    assert found is not None and same(found, arrays)
    assert all(array.flags.writeable for array in found.values())


def test_array_view_is_cached_in_logical_order(cache):
    """The memory order of a transposed or strided array differs from its logical order."""
    view = np.arange(24, dtype=np.int32).reshape(4, 6).T[::2]
    cache.put(key({}), {"view": view})
    found = cache.get(key({}))
    assert found is not None
    np.testing.assert_array_equal(found["view"], view)


def test_key_depends_on_all_parts_and_not_on_their_order():
    parts = {"video": "ab", "detect_every": 4, "parity": False, "fps": "30000/1001"}
    assert key(parts) == key(dict(reversed(parts.items())))
    assert len({key(parts), *(key({**parts, name: "other"}) for name in parts), key({**parts, "more": 1})}) == 6
    with pytest.raises(ValueError, match="not JSON compliant"):
        key({"fps": float("nan")})


def test_key_is_same_in_every_release():
    """Otherwise an update would compute the poses of every clip again."""
    assert key({"video": "ab", "fps": 8}) == hashlib.sha256(b'{"format":1,"fps":8,"video":"ab"}').hexdigest()


@pytest.mark.parametrize("bad", [np.array(["text"]), np.array([object()]), np.array([1j])])
def test_put_of_non_numeric_array_is_refused(cache, bad):
    with pytest.raises(ValueError, match="cannot be cached"):
        cache.put(key({}), {"bad": bad})


def test_damaged_entry_is_miss_and_removed(cache):
    """A changed byte or a cut-off end never gives other arrays and never raises an exception."""
    name, arrays = key({"clip": 1}), {"a": np.arange(6, dtype=np.float32), "b": np.array([True, False])}
    cache.put(name, arrays)
    (path,) = cache.root.glob("*.safetensors")
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        found = cache.get(name)
        assert found is None or same(found, arrays), at  # a changed space in the header's padding changes nothing
        assert path.exists() == (found is not None)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert cache.get(name) is None
        assert not path.exists()
    path.write_bytes(whole)
    assert cache.get(name) is not None


def test_renamed_entry_is_miss(cache):
    cache.put(key({"clip": 1}), points(2))
    (path,) = cache.root.glob("*.safetensors")
    path.rename(path.with_name(f"{key({'clip': 2})}.safetensors"))
    assert cache.get(key({"clip": 2})) is None


def test_least_recently_used_entry_is_evicted(cache):
    """There is room for five entries of 200 KB. The sixth evicts the second, because the first was used meanwhile."""
    keys = [key({"clip": i}) for i in range(6)]
    for name in keys[:5]:
        assert cache.put(name, points(125))
    assert cache.get(keys[0]) is not None
    assert cache.put(keys[5], points(125))
    assert [cache.get(name) is not None for name in keys] == [True, False, True, True, True, True]
    assert cache.bytes() <= cache.max_bytes


def test_put_of_existing_key_replaces_entry_and_counts_once(cache):
    """Three entries of 300 KB fit. Writing one of them again needs no additional room."""
    keys = [key({"clip": i}) for i in range(3)]
    for name in [*keys, keys[2]]:
        assert cache.put(name, points(190, seed=len(name)))
    assert all(cache.get(name) is not None for name in keys)


def test_entry_larger_than_cache_is_not_kept_and_evicts_nothing(cache):
    cache.put(key({"clip": 1}), points(10))
    assert not cache.put(key({"clip": 2}), points(1000))
    assert cache.get(key({"clip": 1})) is not None
    nothing = DiskCache(cache.root, 0)
    assert not nothing.put(key({"clip": 3}), points(1))


def test_cache_limit_is_exact_to_byte(tmp_path):
    """Three entries fit exactly. With one byte less, the oldest is evicted. A larger entry is refused."""
    clock, keys = ticking(), [key({"clip": i}) for i in range(3)]
    large = DiskCache(tmp_path / "large")
    for name in keys:
        assert large.put(name, points(3))
    size = large.bytes() // 3
    assert sorted(path.stat().st_size for path in large.root.glob("*.safetensors")) == [size] * 3
    for limit, kept in ((3 * size, [True] * 3), (3 * size - 1, [False, True, True]), (size, [False, False, True])):
        cache = DiskCache(tmp_path / str(limit), limit, clock_ns=lambda: next(clock))
        assert all(cache.put(name, points(3)) for name in keys)
        assert [cache.get(name) is not None for name in keys] == kept
        assert cache.bytes() == size * sum(kept) <= limit
    assert not DiskCache(tmp_path / "small", size - 1).put(keys[0], points(3))
    assert not DiskCache(tmp_path / "none", 0).put(keys[0], {})
    with pytest.raises(ValueError, match="-1"):
        DiskCache(tmp_path / "negative", -1)


def test_cache_limit_is_4_gib_by_default(tmp_path):
    assert DiskCache(tmp_path).max_bytes == MAX_BYTES == 4 * 1024**3


def test_eviction_removes_only_oldest_entries_that_are_needed(tmp_path):
    """An entry of the size of three evicts the three oldest of four. An entry of the same size evicts one."""
    clock, keys = ticking(), [key({"clip": i}) for i in range(5)]
    probe = DiskCache(tmp_path / "probe")
    probe.put(keys[0], points(100))
    probe.put(keys[4], points(300))
    small, large = (len((probe.root / f"{keys[i]}.safetensors").read_bytes()) for i in (0, 4))
    cache = DiskCache(tmp_path / "cache", 4 * small, clock_ns=lambda: next(clock))
    for name in keys[:4]:
        cache.put(name, points(100))
    assert 2 * small < large <= 3 * small
    cache.put(keys[4], points(300))
    assert [cache.get(name) is not None for name in keys] == [False, False, False, True, True]


def test_put_removes_staged_file_of_killed_writer(cache):
    cache.put(key({"clip": 1}), points(1))
    left = cache.root / f".staged-{'0' * 32}.tmp"
    left.write_bytes(b"half")
    cache.put(key({"clip": 2}), points(1))
    assert not left.exists()


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        yield pool


def test_cache_shared_by_processes_gives_no_wrong_entry(processes, tmp_path):
    answers = processes.starmap(work, [(tmp_path, seed, 40) for seed in range(3)])
    assert [wrong for wrong, _ in answers] == [0] * 3
    assert sum(right for _, right in answers) > 30
    assert 0 < DiskCache(tmp_path).bytes() <= LIMIT
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".staged")]


def test_entry_requested_by_many_processes_is_computed_once(processes, tmp_path):
    """The other processes wait for the one that computes the entry."""
    made = tmp_path / "made.txt"
    results = processes.starmap(make_once, [(tmp_path / "poses", made)] * 6)
    assert made.read_text() == "made\n"
    assert sum(counters.get("pose_cache_misses", 0) for counters, _ in results) == 1
    assert sum(counters.get("pose_cache_hits", 0) for counters, _ in results) == 5
    assert len({total for _, total in results}) == 1


def test_remembered_error_is_raised_and_not_cached(cache):
    timer = StageTimer()

    def nobody() -> dict[str, np.ndarray]:
        raise NoPerson("nobody was found")

    with pytest.raises(NoPerson):
        remembered(cache, key({}), nobody, timer)
    assert same(dict(remembered(cache, key({}), lambda: points(1), timer)), points(1))
    assert timer.counters == {"pose_cache_misses": 2}


def test_remembered_without_usable_folder_computes_every_time(tmp_path):
    (tmp_path / "poses").write_text("a file where the folder should be")
    timer = StageTimer()
    for _ in range(2):
        assert same(dict(remembered(DiskCache(tmp_path / "poses"), key({}), lambda: points(1), timer)), points(1))
    assert timer.counters == {"pose_cache_misses": 2}
    assert same(dict(remembered(None, key({}), lambda: points(1), timer)), points(1))
    assert timer.counters == {"pose_cache_misses": 2}  # no cache, nothing looked up
