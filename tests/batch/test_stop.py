from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from runner.batch.stop import Stop, leave


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
