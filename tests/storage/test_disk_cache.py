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
def test_get_inverts_put(cache, arrays):
    name = key({"case": "round trip"})
    assert cache.put(name, arrays)
    found = cache.get(name)
    assert found is not None and same(found, arrays)
    assert all(array.flags.writeable for array in found.values())


def test_a_view_is_kept_as_it_looks(cache):
    """A transposed or strided array lies in memory in another order than it reads."""
    view = np.arange(24, dtype=np.int32).reshape(4, 6).T[::2]
    cache.put(key({}), {"view": view})
    found = cache.get(key({}))
    assert found is not None
    np.testing.assert_array_equal(found["view"], view)


def test_the_key_is_all_of_the_parts_and_not_their_order():
    parts = {"video": "ab", "detect_every": 4, "parity": False, "fps": "30000/1001"}
    assert key(parts) == key(dict(reversed(parts.items())))
    assert len({key(parts), *(key({**parts, name: "other"}) for name in parts), key({**parts, "more": 1})}) == 6
    with pytest.raises(ValueError, match="not JSON compliant"):
        key({"fps": float("nan")})


def test_a_key_is_the_same_in_every_release():
    """Else an update would pose every clip anew."""
    assert key({"video": "ab", "fps": 8}) == hashlib.sha256(b'{"format":1,"fps":8,"video":"ab"}').hexdigest()


@pytest.mark.parametrize("bad", [np.array(["text"]), np.array([object()]), np.array([1j])])
def test_only_plain_numbers(cache, bad):
    with pytest.raises(ValueError, match="cannot be cached"):
        cache.put(key({}), {"bad": bad})


def test_every_damaged_byte_is_a_miss_and_the_entry_goes(cache):
    """Any one byte changed, any end cut off: never other arrays, never an exception."""
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


def test_an_entry_under_another_name_is_a_miss(cache):
    cache.put(key({"clip": 1}), points(2))
    (path,) = cache.root.glob("*.safetensors")
    path.rename(path.with_name(f"{key({'clip': 2})}.safetensors"))
    assert cache.get(key({"clip": 2})) is None


def test_what_was_used_longest_ago_makes_room(cache):
    """Room for five of 200 KB: the sixth pushes out the second, as the first was used meanwhile."""
    keys = [key({"clip": i}) for i in range(6)]
    for name in keys[:5]:
        assert cache.put(name, points(125))
    assert cache.get(keys[0]) is not None
    assert cache.put(keys[5], points(125))
    assert [cache.get(name) is not None for name in keys] == [True, False, True, True, True, True]
    assert cache.bytes() <= cache.max_bytes


def test_putting_again_replaces_and_is_not_counted_twice(cache):
    """Three entries of 300 KB fit; one of them written anew needs no room beside its old self."""
    keys = [key({"clip": i}) for i in range(3)]
    for name in [*keys, keys[2]]:
        assert cache.put(name, points(190, seed=len(name)))
    assert all(cache.get(name) is not None for name in keys)


def test_more_than_the_cache_holds_is_not_kept_and_evicts_nothing(cache):
    cache.put(key({"clip": 1}), points(10))
    assert not cache.put(key({"clip": 2}), points(1000))
    assert cache.get(key({"clip": 1})) is not None
    nothing = DiskCache(cache.root, 0)
    assert not nothing.put(key({"clip": 3}), points(1))


def test_a_cache_holds_exactly_its_bytes(tmp_path):
    """Three entries where they fit to the byte; with one byte less the oldest goes, and one that large is refused."""
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


def test_a_cache_is_four_gibibytes_unless_said_otherwise(tmp_path):
    assert DiskCache(tmp_path).max_bytes == MAX_BYTES == 4 * 1024**3


def test_room_is_made_by_the_least_recently_used_alone(tmp_path):
    """One entry of three entries' size: the three oldest of four go, and no more; of the same size, one."""
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


def test_leftovers_of_a_killed_writer_go(cache):
    cache.put(key({"clip": 1}), points(1))
    left = cache.root / f".staged-{'0' * 32}.tmp"
    left.write_bytes(b"half")
    cache.put(key({"clip": 2}), points(1))
    assert not left.exists()


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        yield pool


def test_processes_share_a_cache_without_ever_seeing_a_wrong_entry(processes, tmp_path):
    answers = processes.starmap(work, [(tmp_path, seed, 40) for seed in range(3)])
    assert [wrong for wrong, _ in answers] == [0] * 3
    assert sum(right for _, right in answers) > 30
    assert 0 < DiskCache(tmp_path).bytes() <= LIMIT
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".staged")]


def test_processes_that_want_the_same_make_it_once(processes, tmp_path):
    """The others wait for the one that makes it."""
    made = tmp_path / "made.txt"
    results = processes.starmap(make_once, [(tmp_path / "poses", made)] * 6)
    assert made.read_text() == "made\n"
    assert sum(counters.get("pose_cache_misses", 0) for counters, _ in results) == 1
    assert sum(counters.get("pose_cache_hits", 0) for counters, _ in results) == 5
    assert len({total for _, total in results}) == 1


def test_what_fails_while_being_made_fails_as_itself_and_is_not_remembered(cache):
    timer = StageTimer()

    def nobody() -> dict[str, np.ndarray]:
        raise NoPerson("nobody was found")

    with pytest.raises(NoPerson):
        remembered(cache, key({}), nobody, timer)
    assert same(dict(remembered(cache, key({}), lambda: points(1), timer)), points(1))
    assert timer.counters == {"pose_cache_misses": 2}


def test_without_a_usable_folder_the_work_is_done_all_the_same(tmp_path):
    (tmp_path / "poses").write_text("a file where the folder should be")
    timer = StageTimer()
    for _ in range(2):
        assert same(dict(remembered(DiskCache(tmp_path / "poses"), key({}), lambda: points(1), timer)), points(1))
    assert timer.counters == {"pose_cache_misses": 2}
    assert same(dict(remembered(None, key({}), lambda: points(1), timer)), points(1))
    assert timer.counters == {"pose_cache_misses": 2}  # no cache, nothing looked up
