"""Queues: pass work between the loop's threads, with limits so that memory does not grow with the backlog.

`WorkList` hands out jobs and takes some back for another try. `ByteQueue` passes items on, and `put` waits while it is
full. Never: the content of a job.
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
    """The reader takes no more items."""


class ByteQueue(Generic[T]):
    """A FIFO of at most `max_items` items and `max_bytes` bytes.

    An item larger than `max_bytes` is accepted only when the queue is empty.
    """

    def __init__(self, max_bytes: int, max_items: int | None = None) -> None:
        self._max_bytes, self._max_items = max_bytes, max_items
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T, nbytes: int = 0) -> None:
        """Append an item; wait while there is no room. Raises Closed when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(nbytes))
            if self._closed:
                raise Closed
            self._items.append((item, nbytes))
            self._bytes += nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Accept no more items. Queued items can still be read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Yield the items until the queue is closed and empty. An item uses its room until the next is taken."""
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
    """Items to do, in order. Each item that is taken must be settled, or put back to come again later.

    `ended`: no further items are added. Else `add` adds items until `end` is called.
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
        """Append an item. False if the list is closed and does not keep it. Raises ValueError after `end`."""
        with self._changed:
            if self._ended:
                raise ValueError("the list has ended: no items can be added")
            if not self._closed:
                self._ready.append(item)
                self._changed.notify_all()
            return not self._closed

    def end(self) -> None:
        """Note that no more items will be added. Items that are put back still come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self) -> T | None:
        """Return the next item; None if all items are settled and no more will come, or if the list is closed.

        Waits for items that may be added or put back. An item that waits for its delay does not block others.
        """
        with self._changed:
            while not self._closed:
                if not self._ready:
                    self._move_due_items()
                if self._ready:
                    self._taken += 1
                    return self._ready.popleft()
                if self._ended and not self._taken and not self._later:
                    return None
                soonest = min((due for _, due, _ in self._later), default=None)
                self._changed.wait(None if soonest is None else max(0.0, soonest - self._clock()))
            return None

    def settle(self) -> None:
        """Note that one taken item is done."""
        with self._changed:
            self._taken -= 1
            self._changed.notify_all()

    def put_back(self, item: T, delay_s: float = 0.0, rank: int = 0) -> bool:
        """Put back a taken item. It comes again after the others, after `delay_s` at least, lower ranks first.

        False if the list is closed and does not keep the item; the caller then treats it like the items that `close`
        returned. In both cases the item no longer counts as taken.
        """
        with self._changed:
            self._taken -= 1
            if not self._closed:
                self._later.append((rank, self._clock() + delay_s, item))
            self._changed.notify_all()
            return not self._closed

    def wait_taken(self, at_most: int) -> None:
        """Wait until at most `at_most` items are taken and not settled, or until the list is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._taken <= at_most)

    def close(self) -> list[T]:
        """Hand out no more items. Return those that were still waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            left = [*self._ready, *(item for _, _, item in self._later)]
            self._ready.clear()
            self._later.clear()
            return left

    def _move_due_items(self) -> None:
        """Make the items ready whose delay is over, in order of rank and time."""
        due = sorted((entry for entry in self._later if entry[1] <= self._clock()), key=lambda entry: entry[:2])
        self._later = [entry for entry in self._later if entry not in due]
        self._ready.extend(item for _, _, item in due)
