from __future__ import annotations

import errno
import io
import json
import sys
import threading

import pytest

from runner.records.events import EventLog, configure_logging


def test_events_are_one_json_object_a_line(tmp_path):
    log = EventLog(tmp_path / "run" / "events.jsonl", quiet=True)
    threads = [threading.Thread(target=lambda: [log.emit("job_started", job="贝拉", n=n) for n in range(50)])] * 1
    threads += [threading.Thread(target=lambda: [log.emit("step", level="debug") for _ in range(50)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 100
    assert {line["event"] for line in lines} == {"job_started", "step"}
    assert "贝拉" in (tmp_path / "run" / "events.jsonl").read_text("utf-8")


def test_json_logs_are_for_machines(capsys):
    configure_logging("json")
    EventLog().emit("job_succeeded", job="a", seconds=1.5)
    line = json.loads(capsys.readouterr().err)
    assert line == line | {"event": "job_succeeded", "job": "a", "seconds": 1.5, "level": "info"}


def test_console_logs_leave_out_debug_and_colours_off_a_terminal(capsys):
    configure_logging("auto")
    log = EventLog()
    log.emit("quiet", level="debug")
    log.emit("job_started", job="a")
    text = capsys.readouterr().err
    assert "job_started" in text
    assert "quiet" not in text
    assert "\x1b[" not in text


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC], ids=["nobody reads", "full disk"])
def test_a_line_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, number):
    """`video-lab run … 2>&1 | head` undid a finished job: the event of its success could not be said."""

    class Refusing(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, "refused")

        def flush(self) -> None:
            raise OSError(number, "refused")

    configure_logging("console")
    monkeypatch.setattr(sys, "stderr", Refusing())
    log = EventLog(tmp_path / "run" / "events.jsonl")
    log.emit("job_succeeded", job="a")
    assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == 1
    (tmp_path / "run" / "events.jsonl").unlink()
    (tmp_path / "run").rmdir()
    log.emit("job_succeeded", job="b")
