from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.batch.queues import ByteQueue, Closed, WorkList


def test_items_come_out_in_order_and_the_loop_ends_when_closed():
    queue: ByteQueue[int] = ByteQueue(100)
    for n in range(3):
        queue.put(n, 10)
    queue.close()
    assert list(queue) == [0, 1, 2]
    with pytest.raises(Closed):
        queue.put(3)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30))
def test_bytes_in_flight_stay_under_the_limit_unless_one_item_is_larger(sizes):
    queue: ByteQueue[int] = ByteQueue(50)
    held, worst = 0, 0
    lock = threading.Lock()

    def produce() -> None:
        nonlocal held, worst
        for size in sizes:
            queue.put(size, size)
            with lock:
                held += size
                worst = max(worst, held)
        queue.close()

    thread = threading.Thread(target=produce)
    thread.start()
    seen = []
    last = 0
    for size in queue:
        with lock:
            held -= last  # room is given back when the next is asked for
            last = size
        seen.append(size)
    thread.join()
    assert seen == sizes
    # `held` is read a moment after the queue's own count: one item of slack on each side
    assert worst <= max(50, *sizes) + 2 * max(sizes)


def test_put_waits_for_room():
    queue: ByteQueue[str] = ByteQueue(10, max_items=1)
    queue.put("a", 1)
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (queue.put("b", 1), passed.set()))
    thread.start()
    assert not passed.wait(0.05)
    reader = iter(queue)
    assert next(reader) == "a"
    assert passed.wait(5)
    thread.join()


def waits(queue: ByteQueue, nbytes: int) -> bool:
    """Whether an item of so many bytes has to wait; what does is let in by closing the queue to it."""
    passed = threading.Event()

    def put() -> None:
        with suppress(Closed):
            queue.put("another", nbytes)
            passed.set()

    thread = threading.Thread(target=put)
    thread.start()
    thread.join(0.1)
    waited = thread.is_alive()
    queue.close()
    thread.join()
    assert waited is not passed.is_set()
    return waited


@pytest.mark.parametrize(
    ("held", "nbytes", "must_wait"),
    [
        ([60], 40, False),
        ([60], 41, True),
        ([30, 30], 40, False),
        ([30, 30], 41, True),
        ([], 101, False),
        ([200], 0, True),
    ],
)
def test_a_hundred_bytes_are_let_in_and_not_one_more(held, nbytes, must_wait):
    """But for one item alone, however large."""
    queue: ByteQueue[str] = ByteQueue(100)
    for size in held:
        queue.put("held", size)
    assert waits(queue, nbytes) == must_wait


@pytest.mark.parametrize(("held", "must_wait"), [(1, False), (2, True)])
def test_two_items_are_let_in_and_not_one_more(held, must_wait):
    queue: ByteQueue[str] = ByteQueue(100, max_items=2)
    for _ in range(held):
        queue.put("held", 1)
    assert waits(queue, 1) == must_wait


def test_an_items_bytes_are_free_when_the_next_is_asked_for():
    """Not while it is in use, and neither more nor less than its own."""
    queue: ByteQueue[str] = ByteQueue(100)
    for size in (70, 30):
        queue.put("held", size)
    reader = iter(queue)
    next(reader)
    passed = [threading.Event(), threading.Event()]
    threads = [
        threading.Thread(target=lambda: (queue.put("70", 70), passed[0].set())),
        threading.Thread(target=lambda: (queue.put("1", 1), passed[1].set())),
    ]
    threads[0].start()
    assert not passed[0].wait(0.1)  # the first item is still in use
    next(reader)
    assert passed[0].wait(5)
    threads[1].start()
    assert not passed[1].wait(0.1)  # 30 in use and 70 waiting
    next(reader)
    assert passed[1].wait(5)
    for thread in threads:
        thread.join()


def test_items_without_bytes_wait_for_none():
    queue: ByteQueue[int] = ByteQueue(1)
    thread = threading.Thread(target=lambda: [queue.put(n) for n in range(3)], daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    queue.close()
    assert list(queue) == [0, 1, 2]


def test_close_wakes_a_waiting_put():
    queue: ByteQueue[str] = ByteQueue(10, max_items=1)
    queue.put("a")
    raised = threading.Event()

    def put() -> None:
        with pytest.raises(Closed):
            queue.put("b")
        raised.set()

    thread = threading.Thread(target=put)
    thread.start()
    queue.close()
    assert raised.wait(5)
    thread.join()


def test_worklist_waits_for_what_may_come_back():
    work = WorkList(["a", "b"])
    assert [work.take(), work.take()] == ["a", "b"]
    work.settle()
    work.put_back("b", 0.01)
    assert work.take() == "b"
    work.settle()
    assert work.take() is None


def test_put_back_items_wait_their_delay_behind_the_others():
    now = [0.0]
    work = WorkList(["a", "b"], clock=lambda: now[0])
    work.put_back(str(work.take()), 5.0)
    assert work.take() == "b"
    now[0] = 5.0
    assert work.take() == "a"


def test_closing_a_worklist_returns_what_was_left_and_ends_it():
    work = WorkList([1, 2, 3])
    assert work.take() == 1
    assert work.close() == [2, 3]
    assert work.take() is None


def test_put_back_items_come_after_all_others_by_rank():
    work = WorkList(["a", "b", "c"])
    work.put_back(str(work.take()), rank=3)
    work.put_back(str(work.take()), rank=2)
    assert [work.take(), work.take(), work.take()] == ["c", "b", "a"]


def test_put_back_on_a_closed_worklist_keeps_nothing_and_says_so():
    work = WorkList([1, 2])
    assert work.take() == 1
    assert work.close() == [2]
    assert not work.put_back(1)
    work.wait_taken(0)  # returns at once
    assert work.close() == []
