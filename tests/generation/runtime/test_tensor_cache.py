"""The tensor cache: what was made comes back, within the budget. Values of 4 bytes an element."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.generation.runtime.tensor_cache import TensorCache
from runner.timing import StageTimer


class Shop:
    """A tensor cache whose `make` is counted."""

    def __init__(self, most: int, share=None) -> None:
        self.made: list[str] = []
        self.timer = StageTimer()
        self.cache = TensorCache(most, share=share)

    def get(self, key: str, name: str = "x", elements: int = 1) -> torch.Tensor:
        def make() -> torch.Tensor:
            self.made.append(key)
            return torch.full((elements,), float(ord(key)))

        value = self.cache.get(name, key, make, self.timer)
        assert value.tolist() == [float(ord(key))] * elements
        return value


def test_full_cache_evicts_least_recently_used_and_counts_lookups():
    shop = Shop(8)
    for key in "abacab":
        shop.get(key)
    assert shop.made == list("abcb")
    assert shop.timer.counters == {"x_cache_misses": 4, "x_cache_hits": 2}
    assert shop.timer.gauges == {"x_cache_bytes": 8}
    assert vars(shop.cache.use["x"]) == {"hits": 2, "misses": 4, "entries": 2, "bytes": 8}


def test_cache_budget_is_shared_by_all_names():
    shop = Shop(40)
    shop.get("p", "prompt", elements=2)
    shop.get("c", "clip", elements=3)
    shop.get("r", "reference", elements=6)  # 44 bytes: the prompt, unused for longest, makes room
    assert shop.cache.host_bytes == 36
    assert {name: use.bytes for name, use in shop.cache.use.items()} == {"prompt": 0, "clip": 12, "reference": 24}
    shop.get("c", "clip", elements=3)
    assert shop.made == list("pcr")
    assert shop.get("c", "prompt") is not shop.get("c", "clip", elements=3)  # a key belongs to its name


def test_cache_with_share_of_pose_keeps_prompt_during_long_clip():
    shop = Shop(40, share={"pose": 0.5})
    shop.get("p", "prompt", elements=4)
    for key in "abcdefgh":
        shop.get(key, "pose", elements=2)
    shop.get("p", "prompt", elements=4)
    assert shop.made.count("p") == 1
    assert (
        shop.cache.use["pose"].entries == 3
    )  # 24 bytes fit beside the prompt: a share is no limit while there is room


def test_value_larger_than_budget_is_returned_and_not_kept():
    shop = Shop(8)
    shop.get("s")
    shop.get("l", elements=3)
    shop.get("l", elements=3)
    shop.get("s")
    assert shop.made == list("sll")  # and nothing had to go for it
    assert shop.cache.host_bytes == 4


def test_cache_without_budget_keeps_nothing():
    shop = Shop(0)
    shop.get("a")
    shop.get("a")
    assert shop.made == ["a", "a"]


def test_cache_clear_removes_all_values():
    shop = Shop(100)
    for key in "abcda":
        shop.get(key)
    shop.cache.clear()
    assert shop.cache.host_bytes == 0
    assert vars(shop.cache.use["x"]) == {"hits": 1, "misses": 4, "entries": 0, "bytes": 0}
    shop.get("d")
    assert shop.made == list("abcdd")
    with pytest.raises(ValueError, match="negative"):
        TensorCache(-1)


def test_value_above_share_of_its_name_evicts_only_that_name():
    shop = Shop(40, share={"pose": 0.5})
    shop.get("p", "prompt", elements=4)
    shop.get("a", "pose", elements=2)  # 24 bytes of 40
    shop.get("b", "pose", elements=5)  # 20 more: its name would hold 28 of its 20
    assert {name: use.bytes for name, use in shop.cache.use.items()} == {"prompt": 16, "pose": 20}
    shop.get("c", "pose", elements=8)  # not even alone beside the prompt
    assert {name: use.bytes for name, use in shop.cache.use.items()} == {"prompt": 16, "pose": 0}
    shop.get("p", "prompt", elements=4)
    assert shop.made == list("pabc")


def test_cache_get_of_one_key_by_two_threads_keeps_one_value():
    cache, timer, both = TensorCache(100), StageTimer(), threading.Barrier(2)

    def make() -> torch.Tensor:
        both.wait(timeout=10)  # each has missed before either has made
        return torch.ones(2)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: cache.get("x", "a", make, timer), range(2)))
    assert all(torch.equal(value, torch.ones(2)) for value in found)
    assert vars(cache.use["x"]) == {"hits": 0, "misses": 2, "entries": 1, "bytes": 8}
    assert cache.host_bytes == 8


def test_cache_hit_on_host_returns_same_storage():
    cache, value = TensorCache(100), torch.randn(2, 3).T
    cache.get("x", "a", lambda: value, StageTimer())
    back = cache.get("x", "a", lambda: torch.zeros(()), StageTimer())
    assert back.data_ptr() == value.data_ptr() and back.stride() == value.stride()


def test_cache_get_after_failed_make_makes_value_again():
    cache, timer = TensorCache(100), StageTimer()
    with pytest.raises(ZeroDivisionError):
        cache.get("x", "a", lambda: torch.tensor(1 // 0), timer)
    assert int(cache.get("x", "a", lambda: torch.tensor(5), timer)) == 5


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 6)), max_size=40),
    st.integers(0, 60),
)
def test_cache_hits_equal_plain_list_in_order_of_use_within_budget(asked, most):
    """The cache never exceeds the budget, and its hits are those of a plain list, to the byte."""
    shop = Shop(most)
    sizes: dict[str, int] = {}
    plain: OrderedDict[str, int] = OrderedDict()
    for key, elements in asked:
        size, hit = 4 * sizes.setdefault(key, elements), key in plain
        before = len(shop.made)
        shop.get(key, elements=sizes[key])
        assert (len(shop.made) == before) is hit
        if size <= most:
            plain[key] = size
            plain.move_to_end(key)
            while sum(plain.values()) > most:
                plain.popitem(last=False)
        assert shop.cache.host_bytes == shop.cache.use["x"].bytes == sum(plain.values()) <= most
        assert shop.cache.use["x"].entries == len(plain)


@given(
    st.lists(st.tuples(st.sampled_from(["pose", "scene", "prompt"]), st.sampled_from("abcd"), st.integers(1, 6))),
    st.integers(0, 60),
)
def test_cache_with_shares_stays_within_budget(asked, most):
    shop = Shop(most, share={"pose": 0.6, "scene": 0.2})
    sizes: dict[tuple[str, str], int] = {}
    for name, key, elements in asked:
        shop.get(key, name, elements=sizes.setdefault((name, key), elements))
        assert shop.cache.host_bytes == sum(use.bytes for use in shop.cache.use.values()) <= most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cache_hit_on_gpu_returns_same_values_and_strides():
    cache, timer = TensorCache(1 << 20), StageTimer()
    made = torch.randn(3, 5, 7, device="cuda").to(torch.bfloat16).permute(2, 0, 1)
    cache.get("x", "a", lambda: made, timer)
    assert cache.host_bytes == made.nbytes
    back = cache.get("x", "a", lambda: torch.zeros(()), timer)
    assert back.device == made.device and back.data_ptr() != made.data_ptr()
    assert back.stride() == made.stride()
    assert torch.equal(back, made)
