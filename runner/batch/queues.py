"""Queues: how work passes between the loop's threads, bounded so that memory does not grow with the backlog.

`WorkList` hands out jobs and takes some back for another try; `ByteQueue` passes items on and blocks by their bytes.
Never: what a job is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["ByteQueue", "Closed", "WorkList"]

T = TypeVar("T")


class Closed(Exception):
    """The other side will take no more."""


class ByteQueue(Generic[T]):
    """A FIFO that holds at most `max_items` items and `max_bytes` bytes; one item over the limit passes when alone."""

    def __init__(self, max_bytes: int, max_items: int | None = None) -> None:
        self._max_bytes, self._max_items = max_bytes, max_items
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T, nbytes: int = 0) -> None:
        """Append, waiting for room. Raises Closed once the reader is gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(nbytes))
            if self._closed:
                raise Closed
            self._items.append((item, nbytes))
            self._bytes += nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """No more items will come, or be taken. What is queued can still be read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Items in order, until the queue is closed and empty. An item's room is given back when the next is asked."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if not self._items:
                    return
                item, nbytes = self._items.popleft()
                self._changed.notify_all()
            try:
                yield item
            finally:
                with self._changed:
                    self._bytes -= nbytes
                    self._changed.notify_all()
                del item

    def _has_room(self, nbytes: int) -> bool:
        if self._max_items is not None and len(self._items) >= self._max_items:
            return False
        return self._bytes == 0 or self._bytes + nbytes <= self._max_bytes


class WorkList(Generic[T]):
    """Items to do, in order. Each one taken must be settled, or put back to be tried again after a while.

    `ended`: no items but these will come; else `add` brings more, until `end`.
    """

    def __init__(
        self, items: Iterable[T] = (), clock: Callable[[], float] = time.monotonic, *, ended: bool = True
    ) -> None:
        self._ready: deque[T] = deque(items)
        self._later: list[tuple[int, float, T]] = []  # rank, when due, item
        self._taken = 0
        self._ended = ended
        self._closed = False
        self._clock = clock
        self._changed = threading.Condition()

    def add(self, item: T) -> bool:
        """Append an item. False if the list is closed: it keeps nothing then. Raises ValueError after `end`."""
        with self._changed:
            if self._ended:
                raise ValueError("no more items were to come")
            if not self._closed:
                self._ready.append(item)
                self._changed.notify_all()
            return not self._closed

    def end(self) -> None:
        """No more items will be added; those put back still come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self) -> T | None:
        """The next item; None when no more will come and all are settled, or the list is closed.

        Waits for items that may be added or put back. One that waits for its delay holds no other up.
        """
        with self._changed:
            while not self._closed:
                if not self._ready:
                    self._wake_later()
                if self._ready:
                    self._taken += 1
                    return self._ready.popleft()
                if self._ended and not self._taken and not self._later:
                    return None
                soonest = min((due for _, due, _ in self._later), default=None)
                self._changed.wait(None if soonest is None else max(0.0, soonest - self._clock()))
            return None

    def settle(self) -> None:
        """One taken item is done with."""
        with self._changed:
            self._taken -= 1
            self._changed.notify_all()

    def put_back(self, item: T, delay_s: float = 0.0, rank: int = 0) -> bool:
        """One taken item shall be tried again, after the others, not before `delay_s`, lower ranks first.

        False if the list is closed: it keeps nothing then, and the caller deals with the item as with those that
        `close` returned. Either way the item is no longer taken.
        """
        with self._changed:
            self._taken -= 1
            if not self._closed:
                self._later.append((rank, self._clock() + delay_s, item))
            self._changed.notify_all()
            return not self._closed

    def wait_taken(self, at_most: int) -> None:
        """Wait until no more than `at_most` items are taken and not settled, or the list is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._taken <= at_most)

    def close(self) -> list[T]:
        """Hand out nothing more; what was still waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left = [*self._ready, *(item for _, _, item in self._later)]
            self._ready.clear()
            self._later.clear()
            return left

    def _wake_later(self) -> None:
        due = sorted((entry for entry in self._later if entry[1] <= self._clock()), key=lambda entry: entry[:2])
        self._later = [entry for entry in self._later if entry not in due]
        self._ready.extend(item for _, _, item in due)
