"""Shared page: what a forked process tells its parent in memory that outlives a SIGKILL.

A page is made before the fork. The child writes numbers and one text; the parent reads them after the child's end.
"""

from __future__ import annotations

import mmap
import struct
import threading

__all__ = ["JOBS", "SharedPage"]

JOBS = 8  # jobs of a run, at most
NUMBERS = ("points", "struck", "generating", "prepared", "generated", "ended", "ended_ns", "loads")
TEXT_AT, TEXT_BYTES = 1024, 2048


class SharedPage:
    """Numbers by name, a count of generations a job, and the text of the last point met.

    `points`: operations or requests met. `struck`: 1 once the kill or fault has been carried out. `generating`: index
    of the job in `generate`, plus one; 0 if none. `prepared`, `generated`: bit i for job i. `ended`, `ended_ns`: index
    plus one of the job generated last, and when (monotonic clock). `loads`: of the generator.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, TEXT_AT + TEXT_BYTES)
        self._lock = threading.Lock()

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def get(self, name: str) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * NUMBERS.index(name))[0])

    def set(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * NUMBERS.index(name), value)

    def add(self, name: str, by: int = 1) -> int:
        """The new value."""
        with self._lock:
            value = self.get(name) + by
            self.set(name, value)
            return value

    def add_bit(self, name: str, bit: int) -> None:
        with self._lock:
            self.set(name, self.get(name) | 1 << bit)

    def generations(self) -> list[int]:
        """How often each job was begun to be generated."""
        return list(struct.unpack_from(f"{JOBS}q", self._memory, 512))

    def count_generation(self, job: int) -> None:
        with self._lock:
            struct.pack_into("q", self._memory, 512 + 8 * job, self.generations()[job] + 1)

    @property
    def text(self) -> str:
        return bytes(self._memory[TEXT_AT:]).rstrip(b"\0").decode(errors="replace")

    @text.setter
    def text(self, value: str) -> None:
        self._memory[TEXT_AT:] = value.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
