from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from runner.batch.stop import Stop, leave
from tests.hand_clock import HandClock


def test_the_first_signal_drains_and_the_second_abandons():
    now = [100.0]
    stop = Stop(drain_s=20, clock=lambda: now[0])
    assert not stop.draining
    assert not stop.abandon
    stop.request(signal.SIGTERM)
    assert stop.draining
    assert not stop.abandon
    stop.request(signal.SIGINT)
    assert stop.abandon
    assert (stop.exit_code, stop.name) == (143, "SIGTERM")


def test_the_running_job_has_its_drain_time():
    now = [0.0]
    stop = Stop(drain_s=20, clock=lambda: now[0])
    stop.request(signal.SIGINT)
    now[0] = 19.9
    assert not stop.abandon
    now[0] = 20.0
    assert stop.abandon
    assert stop.exit_code == 130


@pytest.fixture
def clock() -> HandClock:
    return HandClock(100.0)


def test_seconds_left_are_those_of_the_running_job(clock):
    stop = Stop(drain_s=20, clock=clock)
    assert stop.seconds_left() == math.inf
    stop.request(signal.SIGTERM)
    clock.now += 5
    assert stop.seconds_left() == 15
    clock.now += 50
    assert stop.seconds_left() == 0


def test_a_notice_drains_with_its_own_seconds(clock):
    stop = Stop(drain_s=20, clock=clock)
    stop.drain("the machine is taken back", 100)
    assert (stop.draining, stop.abandon, stop.seconds_left()) == (True, False, 100)
    assert (stop.exit_code, stop.name) == (143, "the machine is taken back")
    clock.now += 100
    assert stop.abandon


def test_a_notice_without_seconds_has_those_of_a_signal(clock):
    stop = Stop(drain_s=20, clock=clock)
    stop.drain("a file appeared")
    assert stop.seconds_left() == 20


def test_a_notice_of_a_time_that_is_over_abandons(clock):
    stop = Stop(drain_s=20, clock=clock)
    stop.drain("too late", -3)
    assert stop.abandon
    assert stop.seconds_left() == 0


@pytest.mark.parametrize(("notice_s", "left"), [(100, 20), (12, 2)])
def test_the_first_signal_after_a_notice_shortens_and_the_second_abandons(clock, notice_s, left):
    stop = Stop(drain_s=20, clock=clock)
    stop.drain("notice", notice_s)
    clock.now += 10
    stop.request(signal.SIGTERM)
    assert not stop.abandon
    assert stop.seconds_left() == left
    assert (stop.exit_code, stop.name) == (143, "notice")
    stop.request(signal.SIGINT)
    assert stop.abandon
    assert (stop.exit_code, stop.name) == (143, "notice")


@pytest.mark.parametrize(("notice_s", "left"), [(100, 15), (4, 4), (None, 15)])
def test_a_notice_after_a_signal_can_only_shorten(clock, notice_s, left):
    stop = Stop(drain_s=20, clock=clock)
    stop.request(signal.SIGINT)
    clock.now += 5
    stop.drain("notice", notice_s)
    assert stop.seconds_left() == left
    assert (stop.exit_code, stop.name) == (130, "SIGINT")


def test_of_two_notices_the_first_gives_the_reason_and_the_shorter_the_seconds(clock):
    stop = Stop(drain_s=20, clock=clock)
    stop.drain("maintenance", 45)
    stop.drain("preempted", 15)
    assert (stop.name, stop.seconds_left()) == ("maintenance", 15)
    stop.drain("maintenance", 45)
    assert stop.seconds_left() == 15


def test_a_signal_that_comes_while_a_notice_is_noted(monkeypatch):
    """The handler runs in the thread that it interrupts, which may hold the lock."""
    stop = Stop(drain_s=20)
    shorten = Stop._shorten

    def interrupted(self, seconds):
        monkeypatch.setattr(Stop, "_shorten", shorten)
        os.kill(os.getpid(), signal.SIGTERM)
        shorten(self, seconds)

    monkeypatch.setattr(Stop, "_shorten", interrupted)
    with stop.listening():
        stop.drain("notice", 5)
    assert (stop.name, stop.exit_code) == ("notice", 143)
    assert stop.seconds_left() <= 5


def test_signals_are_heard_inside_and_restored_after():
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    assert stop.signal == signal.SIGTERM


def test_a_sigterm_that_is_passed_on_as_well_counts_once(clock):
    """Slurm signals every process of a step, and Apptainer and tini pass theirs on: one signal, three times."""
    stop, wakes = Stop(drain_s=20, clock=clock), []
    with stop.listening(lambda: wakes.append(clock.now)):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            clock.now += 0.3
        assert (stop.draining, stop.abandon, stop.seconds_left()) == (True, False, pytest.approx(19.1))
        assert wakes == [100.0]
        clock.now += 0.2
        os.kill(os.getpid(), signal.SIGTERM)  # someone means it
        assert stop.abandon
        assert len(wakes) == 2


class InterruptedEvent(threading.Event):
    """A signal comes the moment its lock is taken, which is not reentrant."""

    def set(self) -> None:
        with self._cond:
            if not self._flag:
                os.kill(os.getpid(), signal.SIGINT)
            self._flag = True
            self._cond.notify_all()


@pytest.mark.timeout(20)
def test_a_signal_that_interrupts_the_handler_of_another(clock):
    """Both count, and neither waits for a lock that the other holds."""
    stop = Stop(drain_s=20, clock=clock)
    stop.requested = InterruptedEvent()
    wakes: list[int | None] = []
    with stop.listening(lambda: wakes.append(stop.signal)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.abandon
    assert wakes == [signal.SIGTERM] * 2
    assert stop.exit_code == 143


def test_a_sigterm_and_a_ctrl_c_are_two_signals(clock):
    stop = Stop(drain_s=20, clock=clock)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.abandon


def test_a_process_that_prepares_leaves_with_its_own_code():
    """In native code, as a detector is: without `leave` the interpreter's end aborts such a process (134)."""
    script = textwrap.dedent("""
        import threading
        import onnxruntime
        from runner.verbs.probes import IDENTITY_GRAPH
        from runner.batch.stop import PrefetchThread, leave

        session = onnxruntime.InferenceSession(IDENTITY_GRAPH, providers=["CPUExecutionProvider"])
        def prepare():
            begun.set()
            while True:
                session.run(None, {"x": [1.0]})
        begun = threading.Event()
        PrefetchThread(target=prepare, daemon=True).start()
        begun.wait()
        print("the table", end="")
        leave(143)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (143, "the table"), done.stderr


def test_others_leave_by_themselves():
    leave(7)
