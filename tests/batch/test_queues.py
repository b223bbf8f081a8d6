from __future__ import annotations

import threading

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
