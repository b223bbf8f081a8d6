from __future__ import annotations

import os
import signal

from runner.stop import Stop


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


def test_signals_are_heard_inside_and_restored_after():
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    assert stop.signal == signal.SIGTERM
