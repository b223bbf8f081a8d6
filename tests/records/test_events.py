from __future__ import annotations

import errno
import io
import json
import logging
import sys
import threading

import pytest
import structlog

from runner.errors import StorageUnavailable
from runner.records.events import EventLog, configure_logging, default_logging


def test_events_are_one_json_object_a_line():
    lines: list[bytes] = []
    log = EventLog(lines.append, quiet=True)
    threads = [threading.Thread(target=lambda: [log.emit("job_started", job="贝拉", n=n) for n in range(50)])] * 1
    threads += [threading.Thread(target=lambda: [log.emit("step", level="debug") for _ in range(50)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(line) for line in b"".join(lines).splitlines()]
    assert len(found) == len(lines) == 100
    assert {line["event"] for line in found} == {"job_started", "step"}
    assert "贝拉" in b"".join(lines).decode()


def test_events_wait_for_flush_and_for_a_store_that_is_away():
    written: list[bytes] = []
    away = True

    def write(data: bytes) -> None:
        if away:
            raise StorageUnavailable("away")
        written.append(data)

    log = EventLog(write, at_once=False, quiet=True)
    log.emit("job_started", job="a")
    with pytest.raises(StorageUnavailable):
        log.flush()
    log.emit("job_succeeded", job="a")
    away = False
    log.flush()
    log.flush()
    assert [json.loads(line)["event"] for line in written[0].splitlines()] == ["job_started", "job_succeeded"]
    assert len(written) == 1


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
def test_a_line_that_cannot_be_written_stops_nothing(monkeypatch, number):
    """`video-lab run … 2>&1 | head` undid a finished job: the event of its success could not be said."""

    class Refusing(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, "refused")

        def flush(self) -> None:
            raise OSError(number, "refused")

    configure_logging("console")
    monkeypatch.setattr(sys, "stderr", Refusing())
    written, full = [], True

    def write(data: bytes) -> None:
        if full:
            raise OSError(number, "refused")
        written.append(data)

    log = EventLog(write)
    log.emit("job_succeeded", job="a")
    full = False
    log.emit("job_succeeded", job="b")
    assert [json.loads(line)["job"] for line in written[0].splitlines()] == ["a", "b"]


@pytest.mark.parametrize("style", ["json", "console"])
def test_no_line_of_the_log_holds_a_secret(capsys, style):
    configure_logging(style)
    log = structlog.get_logger()
    log.info("a?sig=hush", uri="https://u:hush@h/a", paths=["b?token=hush"], error=ValueError("s3://k:hush@b"))
    try:
        raise ValueError("https://u:hush@h")
    except ValueError:
        log.exception("broken")
    logging.getLogger("urllib3").error("GET %s", "/a?X-Amz-Signature=hush")  # what a library says
    text = capsys.readouterr().err
    assert "hush" not in text
    assert text.count("***") == 7  # the source line in the traceback, too
    assert "GET /a?X-Amz-Signature=***" in text


def test_a_value_changes_no_terminal(capsys):
    configure_logging("console")
    structlog.get_logger().info("a", uri="\x1b[31m\u202e")
    text = capsys.readouterr().err
    assert "\\x1b[31m\\u202e" in text
    assert not set(text) & set("\x1b\u202e")


@pytest.fixture
def unconfigured():
    """structlog as a program has it that never configured it."""
    before = structlog.get_config() if structlog.is_configured() else None
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()
    if before is not None:
        structlog.configure(**before)


@pytest.mark.usefixtures("unconfigured")
def test_without_a_configuration_events_go_to_python_s_logging_and_it_stays_unconfigured(caplog, capsys):
    with caplog.at_level(logging.INFO), default_logging():
        log = structlog.get_logger()
        with default_logging():  # another thread's run that ends first
            pass
        log.info("fetched", uri="https://u:hush@host/x?sig=hush", job="贝拉")
        EventLog().emit("job_failed", level="error", job="a")
    assert not structlog.is_configured()
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]
    assert "event='fetched'" in caplog.text and "贝拉" in caplog.text and "hush" not in caplog.text
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("unconfigured")
def test_a_program_s_own_configuration_stays(capsys):
    configure_logging("json")
    before = structlog.get_config()
    with default_logging():
        structlog.get_logger().info("fetched")
    assert structlog.get_config() == before
    assert json.loads(capsys.readouterr().err)["event"] == "fetched"
    structlog.reset_defaults()
    with default_logging():
        configure_logging("json")  # the program's, while a run lasts
    assert structlog.is_configured()
