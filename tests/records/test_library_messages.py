"""Messages of libraries: into the events of the run, and on the terminal where they are errors or were asked for."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import textwrap
import threading
import uuid
import warnings
from pathlib import Path

import pytest
import structlog

from runner.records.events import EventLog, configure_logging
from runner.records.library_messages import library_messages_in

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def library() -> str:
    """The name of a library that was not imported yet."""
    return f"library{uuid.uuid4().hex}"


def import_library(name: str) -> logging.Logger:
    """What transformers, diffusers and huggingface_hub do when they are first imported; a logger of a module of it."""
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    return logging.getLogger(f"{name}.models")


def messages(written: list[bytes]) -> list[tuple[str, str, str]]:
    lines = [json.loads(line) for line in b"".join(written).splitlines()]
    return [(line["level"], line["logger"], line["message"]) for line in lines if line["event"] == "library_message"]


@pytest.mark.parametrize("before", [True, False], ids=["imported before", "imported later"])
def test_what_a_library_says_is_an_event_and_errors_alone_are_shown(capsys, library, before):
    if before:
        logger = import_library(library)
    configure_logging("console")
    if not before:
        logger = import_library(library)
    written: list[bytes] = []
    with library_messages_in(EventLog(written.append).note):
        logger.info("below its level")
        logger.warning("%s is not installed", "torchvision")
        logger.error("broken\x1b[31m")
    logger.warning("after the run")
    name = f"{library}.models"
    assert messages(written) == [
        ("warning", name, "torchvision is not installed"),
        ("error", name, "broken\x1b[31m"),
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert "library_message" in line and name in line and "broken\\x1b[31m" in line


def test_verbose_shows_them(capsys, library):
    configure_logging("console", verbose=True)
    import_library(library).warning("old file format")
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning" in line and "old file format" in line


def test_for_machines_they_are_json(capsys, library):
    configure_logging("json", verbose=True)
    logger = import_library(library)
    logger.warning("old file format?sig=hush")
    logger.error("broken")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    found = [(line["event"], line["level"], line["logger"], line["message"]) for line in lines]
    name = f"{library}.models"
    assert found == [
        ("library_message", "warning", name, "old file format?sig=***"),
        ("library_message", "error", name, "broken"),
    ]


def test_warnings_and_tracebacks_are_messages_too(capsys, library):
    logging.captureWarnings(False)
    configure_logging("console")
    captured = warnings.showwarning
    written: list[bytes] = []
    with library_messages_in(EventLog(written.append).note), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = captured  # pytest has its own around each test
        warnings.warn("soon removed", UserWarning, stacklevel=1)
        try:
            raise OSError("the disk is gone")
        except OSError:
            logging.getLogger(library).exception("not saved")
        mistaken = {"name": library, "levelno": logging.WARNING, "msg": "%d of %d", "args": (1,)}
        logging.getLogger().handlers[-1].handle(logging.makeLogRecord(mistaken))
    warned, failed, odd = messages(written)
    assert warned[:2] == ("warning", "py.warnings") and "UserWarning: soon removed" in warned[2]
    assert failed[0] == "error" and failed[2].startswith("not saved\nTraceback")
    assert failed[2].endswith("OSError: the disk is gone")
    assert odd == ("warning", library, "%d of %d (1,)")
    assert "Logging error" not in capsys.readouterr().err


@pytest.mark.parametrize("by", ["event", "message"])
def test_a_message_that_comes_while_events_are_written_waits_for_the_next_line(library, by):
    """urllib3 warns while the events are uploaded, in this thread and in one that the upload waits for."""
    configure_logging("console")
    logger, written = import_library(library), []

    def write(data: bytes) -> None:
        written.append(data)
        if len(written) == 1:  # of what the other thread says nothing is written before this returns
            logger.warning("in this thread")
            other = threading.Thread(target=logger.warning, args=("in another",))
            other.start()
            other.join(30)
            assert not other.is_alive()

    events = EventLog(write)
    first = events.emit if by == "event" else logger.warning
    run = threading.Thread(target=first, args=("first",), daemon=True)
    with library_messages_in(events.note):
        run.start()
        run.join(60)
        assert not run.is_alive()
        assert len(written) == 1
        events.emit("job_succeeded")
    told = [json.loads(line) for line in b"".join(written).splitlines()]
    assert [line.get("message", line["event"]) for line in told] == [
        "first", "in this thread", "in another", "job_succeeded",
    ]  # fmt: skip


def test_a_log_that_itself_logs_ends(library, capsys):
    """A program's structlog that writes to `logging`: each message once, and no circle."""
    configure_logging("console")
    structlog.configure(
        processors=[structlog.processors.KeyValueRenderer()],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    written: list[bytes] = []
    with library_messages_in(EventLog(written.append, quiet=True).note):
        logging.getLogger(library).error("once")
        structlog.get_logger("runner.verbs.run").error("ours")
    assert messages(written) == [("error", library, "once")]


def test_a_file_that_a_library_logs_to_gets_its_records(tmp_path, library):
    configure_logging("console")
    logger = logging.getLogger(library)
    handler = logging.FileHandler(tmp_path / "library.log")
    logger.addHandler(handler)
    logger.warning("kept")
    handler.close()
    assert (tmp_path / "library.log").read_text() == "kept\n"


def test_without_the_command_line_a_run_changes_nothing(library, monkeypatch):
    """A program's own logging: handlers, classes and levels stay, and its messages are none of the run's."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    logger = import_library(library)
    written: list[bytes] = []
    with library_messages_in(EventLog(written.append).note):
        logger.warning("the program's own")
    assert written == []
    assert shown.getvalue() == "the program's own\n"


def test_transformers_says_nothing_on_standard_error():
    """The real library, imported after the log was configured, as a run does when it loads the model."""
    script = """
        import sys
        from runner.records.events import EventLog, configure_logging
        from runner.records.library_messages import library_messages_in

        configure_logging("console")
        assert "transformers" not in sys.modules
        written = []
        with library_messages_in(EventLog(written.append).note):
            from transformers.utils import logging
            logging.get_logger("transformers.models.clip").warning("`CLIPImageProcessor` requires torchvision")
            from huggingface_hub.utils import logging
            logging.get_logger("huggingface_hub.file_download").warning("the hub is slow")
        print(b"".join(written).decode())
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert messages([done.stdout.strip().encode()]) == [
        ("warning", "transformers.models.clip", "`CLIPImageProcessor` requires torchvision"),
        ("warning", "huggingface_hub.file_download", "the hub is slow"),
    ]
