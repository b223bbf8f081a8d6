"""The memos: what was made comes back, within the budgets, wherever it lay. Values of 4 bytes an element."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.generation.runtime.memos import Memos
from runner.timing import StageTimer


class Shop:
    """Memos whose `make` is counted. `device`: values count as the device's until they were moved to the host."""

    def __init__(self, host: int, device: int = 0, *, on_device: bool = False, share=None) -> None:
        self.made: list[str] = []
        self.moves: list[str] = []
        self.timer = StageTimer()
        self._lowered: set[int] = set()
        self.memos = Memos(
            host,
            device,
            share=share,
            is_host=lambda value: not on_device,
            to_host=lambda value: self.moved("down", value),
            to_device=lambda value, _: self.moved("up", value),
        )

    def moved(self, way: str, value: torch.Tensor) -> torch.Tensor:
        self.moves.append(way)
        return value.clone()

    def get(self, key: str, name: str = "x", elements: int = 1) -> torch.Tensor:
        def make() -> torch.Tensor:
            self.made.append(key)
            return torch.full((elements,), float(ord(key)))

        value = self.memos.get(name, key, make, self.timer)
        assert value.tolist() == [float(ord(key))] * elements
        return value


def test_the_least_recently_used_goes_and_lookups_are_counted():
    shop = Shop(host=8)
    for key in "abacab":
        shop.get(key)
    assert shop.made == list("abcb")
    assert shop.timer.counters == {"x_cache_misses": 4, "x_cache_hits": 2}
    assert shop.timer.gauges == {"x_cache_bytes": 8}
    assert vars(shop.memos.use["x"]) == {"hits": 2, "misses": 4, "entries": 2, "bytes": 8}


def test_one_budget_is_shared_by_all_memos():
    shop = Shop(host=40)
    shop.get("p", "prompt", elements=2)
    shop.get("c", "clip", elements=3)
    shop.get("r", "reference", elements=6)  # 44 bytes: the prompt, unused for longest, makes room
    assert shop.memos.host_bytes == 36
    assert {name: use.bytes for name, use in shop.memos.use.items()} == {"prompt": 0, "clip": 12, "reference": 24}
    shop.get("c", "clip", elements=3)
    assert shop.made == list("pcr")
    assert shop.get("c", "prompt") is not shop.get("c", "clip", elements=3)  # a key belongs to its memo


def test_a_long_clip_pushes_out_no_prompt():
    shop = Shop(host=40, share={"pose": 0.5})
    shop.get("p", "prompt", elements=4)
    for key in "abcdefgh":
        shop.get(key, "pose", elements=2)
    shop.get("p", "prompt", elements=4)
    assert shop.made.count("p") == 1
    assert (
        shop.memos.use["pose"].entries == 3
    )  # 24 bytes fit beside the prompt: a share is no limit while there is room


def test_what_is_larger_than_the_budget_is_handed_out_and_not_kept():
    shop = Shop(host=8)
    shop.get("s")
    shop.get("l", elements=3)
    shop.get("l", elements=3)
    shop.get("s")
    assert shop.made == list("sll")  # and nothing had to go for it
    assert shop.memos.host_bytes == 4


def test_nothing_is_kept_without_a_budget():
    shop = Shop(host=0)
    shop.get("a")
    shop.get("a")
    assert shop.made == ["a", "a"]


def test_the_device_keeps_what_it_may_and_the_host_the_rest():
    shop = Shop(host=12, device=8, on_device=True)
    for key in "abcd":
        shop.get(key)
    assert (shop.memos.device_bytes, shop.memos.host_bytes) == (8, 8)
    assert shop.moves == ["down", "down"]
    shop.get("a")  # on the host: comes back, and stays
    assert shop.moves == ["down", "down", "up", "down"]
    shop.get("a")
    assert len(shop.moves) == 4
    for key in "efg":
        shop.get(key)
    assert (shop.memos.device_bytes, shop.memos.host_bytes) == (8, 12)
    assert shop.made == list("abcdefg")
    shop.get("b")  # the first to leave the host
    assert shop.made == list("abcdefgb")


def test_without_a_budget_on_the_device_all_rests_on_the_host():
    shop = Shop(host=100, device=0, on_device=True)
    shop.get("a")
    shop.get("a")
    assert shop.moves == ["down", "up"]
    assert shop.made == ["a"]
    assert (shop.memos.device_bytes, shop.memos.host_bytes) == (0, 4)


def test_budgets_may_change_and_all_may_be_forgotten():
    shop = Shop(host=100, device=16, on_device=True)
    for key in "abcd":
        shop.get(key)
    shop.memos.resize(8, 4)
    assert (shop.memos.device_bytes, shop.memos.host_bytes) == (4, 8)
    shop.memos.clear()
    assert (shop.memos.device_bytes, shop.memos.host_bytes) == (0, 0)
    shop.get("d")
    assert shop.made == list("abcdd")
    with pytest.raises(ValueError, match="negative"):
        Memos(-1, 0)


def test_failures_are_not_remembered():
    memos, timer = Memos(100, 0), StageTimer()
    with pytest.raises(ZeroDivisionError):
        memos.get("x", "a", lambda: torch.tensor(1 // 0), timer)
    assert int(memos.get("x", "a", lambda: torch.tensor(5), timer)) == 5


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 6)), max_size=40),
    st.integers(0, 60),
    st.integers(0, 40),
)
def test_budgets_hold_and_one_level_is_a_list_in_order_of_use(asked, host, device):
    """Of two levels: never more than the budgets. Of one: a hit is exactly what a plain list says."""
    shop = Shop(host, device, on_device=True)
    sizes: dict[str, int] = {}
    for key, size in asked:
        shop.get(key, elements=sizes.setdefault(key, size))
        assert shop.memos.device_bytes <= device
        assert shop.memos.host_bytes <= host
        held = {k: v for level in (shop.memos._device, shop.memos._host) for (_, k), v in level.held.items()}
        assert sum(v.nbytes for v in held.values()) == shop.memos.device_bytes + shop.memos.host_bytes
    single = Shop(host)
    plain: OrderedDict[str, int] = OrderedDict()
    for key, _ in asked:
        size, hit = 4 * sizes[key], key in plain
        before = len(single.made)
        single.get(key, elements=sizes[key])
        assert (len(single.made) == before) is hit
        if size > host:
            continue
        plain[key] = size
        plain.move_to_end(key)
        while sum(plain.values()) > host:
            plain.popitem(last=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_come_back_from_pinned_memory_as_they_were():
    memos, timer = Memos(1 << 20, 0), StageTimer()
    made = torch.randn(3, 5, 7, device="cuda").to(torch.bfloat16).permute(2, 0, 1)
    memos.get("x", "a", lambda: made, timer)
    (held,) = memos._host.held.values()
    assert held.is_pinned()
    back = memos.get("x", "a", lambda: torch.zeros(()), timer)
    assert back.device == made.device
    assert back.stride() == made.stride()
    assert torch.equal(back, made)
