"""Page cache: the pages of the files that fit lie in memory afterwards, as the system itself says."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from runner.weights.page_cache import BLOCK_BYTES, read_into_page_cache

PAGE = mmap.PAGESIZE


def resident(path: Path) -> float:
    """The part of a file's pages that lie in memory, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // PAGE)
        found = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0, ctypes.get_errno()
        return sum(one & 1 for one in found) / pages


@pytest.fixture
def cold(tmp_path):
    """cold(name, bytes): a file on the disk whose pages the system has dropped."""

    def make(name: str, nbytes: int) -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            file.write(os.urandom(nbytes))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return path

    return make


def test_files_are_read_whole_and_once(cold):
    first, second = cold("a", 2 * BLOCK_BYTES + 5), cold("b", 3 * PAGE)
    with capture_logs() as events:
        read = read_into_page_cache([first, second, first], 10 * BLOCK_BYTES)
    assert read == first.stat().st_size + second.stat().st_size
    assert (resident(first), resident(second)) == (1.0, 1.0)
    (event,) = events
    assert (event["event"], event["files"]) == ("model_files_read", 2)
    assert "left_out" not in event


def test_what_does_not_fit_is_left_out(cold):
    """The largest, which would fit alone, between two that fit together."""
    files = [cold("a", 4 * PAGE), cold("b", 6 * PAGE), cold("c", 4 * PAGE)]
    before = resident(files[1])
    with capture_logs() as events:
        assert read_into_page_cache(files, 8 * PAGE) == 8 * PAGE
    assert (resident(files[0]), resident(files[2])) == (1.0, 1.0)
    assert resident(files[1]) == before
    assert events[0]["left_out"] == ["b"]


def test_a_file_that_is_gone_is_left_to_the_loader(cold, tmp_path):
    with capture_logs() as events:
        assert read_into_page_cache([tmp_path / "gone", cold("a", PAGE)], 2 * PAGE) == PAGE
    assert events[0]["left_out"] == ["gone"]


def test_a_signal_ends_the_reading(cold):
    calls = iter([True, False, False])
    files = [cold("a", 3 * BLOCK_BYTES), cold("b", PAGE)]
    assert read_into_page_cache(files, 10 * BLOCK_BYTES, lambda: next(calls)) == BLOCK_BYTES
