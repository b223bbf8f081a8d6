"""Embeddings on disk: the bits that were made, for the very encoder that made them, whoever asks."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import NotFinite
from runner.generation.runtime.text_cache import PromptCache, from_arrays, to_arrays
from runner.timing import StageTimer

IDENTITY = {"encoder": "e" * 64, "device": "cpu"}


def embedding(used: int, tokens: int = 8, width: int = 4, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    made = torch.zeros(1, tokens, width)
    made[0, :used] = torch.randn(used, width, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype)


class Encoder:
    def __init__(self, made: torch.Tensor) -> None:
        self.made, self.calls = made, 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return self.made


@given(
    used=st.integers(0, 8),
    width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_arrays_keep_every_bit(used, width, dtype, seed):
    made = embedding(used, 8, width, dtype, seed)
    if used:
        made[0, 0, 0] = -0.0  # a sign, yet no difference in value
        made[0, used - 1] = torch.tensor(-0.0)
    arrays = to_arrays(made)
    assert arrays["bits"].shape == (used, width)
    back = from_arrays(arrays, 8, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(bits), made.view(bits))


def test_an_embedding_that_is_not_finite_is_not_kept(tmp_path):
    wrong = embedding(3)
    wrong[0, 1, 2] = float("nan")
    made = Encoder(wrong)
    with pytest.raises(NotFinite, match="encode_prompt"):
        PromptCache(tmp_path, IDENTITY).get("踊る", 8, torch.float32, made, StageTimer())
    made.made, timer = embedding(3), StageTimer()
    PromptCache(tmp_path, IDENTITY).get("踊る", 8, torch.float32, made, timer)
    assert timer.counters == {"prompt_disk_cache_misses": 1}


def test_a_second_process_finds_what_the_first_made(tmp_path):
    made, timer = Encoder(embedding(3, dtype=torch.bfloat16)), StageTimer()
    first = PromptCache(tmp_path, IDENTITY).get("踊る", 8, torch.bfloat16, made, timer)
    assert first is made.made
    never, later = Encoder(torch.zeros(())), StageTimer()
    second = PromptCache(tmp_path, IDENTITY).get("踊る", 8, torch.bfloat16, never, later)
    assert torch.equal(second, first)
    assert (made.calls, never.calls) == (1, 0)
    assert timer.counters == {"prompt_disk_cache_misses": 1}
    assert later.counters == {"prompt_disk_cache_hits": 1}


@pytest.mark.parametrize(
    "other",
    [
        {"text": "another"},
        {"tokens": 9},
        {"dtype": torch.bfloat16},
        {"identity": IDENTITY | {"encoder": "f" * 64}},
        {"identity": IDENTITY | {"device": "a GPU"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_all_that_decides_an_embedding_is_in_the_key(tmp_path, other):
    asked = {"text": "a dance", "tokens": 8, "dtype": torch.float32, "identity": IDENTITY}

    def get(asked, make):
        cache = PromptCache(tmp_path, asked["identity"])
        return cache.get(asked["text"], asked["tokens"], asked["dtype"], make, StageTimer())

    get(asked, Encoder(embedding(3)))
    made = Encoder(embedding(2, asked["tokens"], dtype=other.get("dtype", torch.float32)))
    get(asked | other, made)
    assert made.calls == 1


def test_who_asks_at_the_same_time_waits(tmp_path):
    begun, go = threading.Event(), threading.Event()
    made = embedding(3)

    def slow() -> torch.Tensor:
        begun.set()
        assert go.wait(30)
        return made

    results: list[torch.Tensor] = []
    never = Encoder(torch.zeros(()))

    def ask(make) -> None:
        results.append(PromptCache(tmp_path, IDENTITY).get("a dance", 8, torch.float32, make, StageTimer()))

    first = threading.Thread(target=ask, args=(slow,))
    first.start()
    assert begun.wait(30)
    second = threading.Thread(target=ask, args=(never,))
    second.start()
    go.set()
    first.join(30)
    second.join(30)
    assert len(results) == 2 and torch.equal(*results)
    assert never.calls == 0


def test_the_folder_stays_within_its_size(tmp_path):
    cache = PromptCache(tmp_path, IDENTITY, max_bytes=4096)
    for i in range(40):
        cache.get(f"prompt {i}", 8, torch.float32, Encoder(embedding(8, seed=i)), StageTimer())
    assert 0 < cache.files.bytes() <= 4096
    last = Encoder(torch.zeros(()))
    assert torch.equal(cache.get("prompt 39", 8, torch.float32, last, StageTimer()), embedding(8, seed=39))
    assert last.calls == 0


def test_a_folder_that_cannot_be_used_costs_time_alone(tmp_path):
    (tmp_path / "prompts").write_text("a file stands here")
    made = Encoder(embedding(3))
    cache = PromptCache(tmp_path / "prompts", IDENTITY)
    assert torch.equal(cache.get("a dance", 8, torch.float32, made, StageTimer()), made.made)


def test_the_identity_names_encoder_precision_device_and_versions(tmp_path):
    opened = PromptCache.open(tmp_path, "a" * 64, "bfloat16", torch.device("cpu"))
    assert opened.identity == opened.identity | {"encoder": "a" * 64, "encoder_dtype": "bfloat16", "device": "cpu"}
    assert {"torch", "transformers", "tokenizers"} < opened.identity.keys()
