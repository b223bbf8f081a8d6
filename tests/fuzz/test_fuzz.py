"""Fuzzing of what reads files and texts from outside: a value or a RunnerError, soon, and with bounded memory.

`make test` replays the corpus and tries a few inputs a target, the same at every run. `make soak` tries new ones for
VIDEO_LAB_FUZZ_MINUTES of CPU (36), shared by the targets; what it finds is written into the corpus.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.mutation import PROGRAM
from tests.fuzz.target import CORPUS, DEADLINE_S, TARGETS, Target, bounded_memory, verdict

MINUTES = float(os.environ.get("VIDEO_LAB_FUZZ_MINUTES", "36"))
QUICK, ROUND = 60, 2000  # inputs


def attempt(target: Target, folder: Path, number: int, count: int, known: dict[str, bytes]) -> int:
    """Try up to `count` inputs; how many it were. Each way of breaking the rule goes into `known`, with the shortest
    input that does."""
    tried = 0

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),  # what Hypothesis would make shorter is slow where the reader is slow
        suppress_health_check=list(HealthCheck),
    )
    @given(PROGRAM)
    def hold(program) -> None:
        nonlocal tried
        tried += 1
        data = target.input(*program)
        why = verdict(target, folder, data)
        if why is not None:
            known[why] = min(known.get(why, data), data, key=len)

    hold()
    return tried


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid_and_nothing_found_comes_back(name, folder):
    target = TARGETS[name]
    target.warm_up(folder)
    with bounded_memory():
        for path in sorted((CORPUS / name).iterdir()):
            assert verdict(target, folder, path.read_bytes()) is None, path.name


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_inputs_of_each_kind(name, folder):
    known: dict[str, bytes] = {}
    TARGETS[name].warm_up(folder)
    with bounded_memory():
        assert attempt(TARGETS[name], folder, 1, QUICK, known) >= QUICK
    assert known == {}


def test_the_corpus_holds_targets_and_small_files_alone():
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert max(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= 128 << 10


def work_for(seconds: float) -> None:
    stop = time.thread_time() + seconds
    while time.thread_time() < stop:
        pass


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda folder, data: {}["key"], "KeyError"),
        (lambda folder, data: bytearray(1 << 33), "MemoryError"),
        (lambda folder, data: work_for(DEADLINE_S + 0.05), "took more than"),
    ],
)
def test_a_reader_that_breaks_the_rule_is_found(read, said, folder):
    target = Target("config", read, TARGETS["config"].split)
    with bounded_memory():
        why = verdict(target, folder, b"{}")
    assert why is not None
    assert said in why


@pytest.mark.soak
@pytest.mark.parametrize("name", TARGETS)
def test_new_inputs_for_a_long_time(name, folder, capsys):
    target, known, tried = TARGETS[name], {}, 0
    target.warm_up(folder)
    begin = time.process_time()
    stop = begin + MINUTES * 60 / len(TARGETS)
    number = time.time_ns()
    with bounded_memory():
        while time.process_time() < stop:
            number += 1
            tried += attempt(target, folder, number, ROUND, known)
    for data in known.values():
        (CORPUS / name / f"found-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
    minutes = (time.process_time() - begin) / 60
    with capsys.disabled():
        print(f"\nfuzz {name}: {tried} inputs in {minutes:.1f} CPU-minutes, {len(known)} failures")
        for why, data in known.items():
            print(f"  {why}: {data[:120]!r}")
    assert list(known) == []
