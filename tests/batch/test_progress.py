"""Progress: the rows of the bars, the lines elsewhere, and which of the two is chosen."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from structlog.testing import capture_logs

from runner.batch.progress import BarProgress, LineProgress, SilentProgress, choose_progress
from runner.batch.run_pace import StepCount
from runner.records.record import JobLine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bar():
    """Bars on a terminal that is not there, and `rows()`: (job, place, done, total) of each visible row of a job."""
    progress = BarProgress(Console(file=io.StringIO(), force_terminal=True, width=80))

    def rows() -> list[tuple[str, str, float, float | None]]:
        tasks = [task for task in progress._bars.tasks[1:] if task.visible]
        return [(task.description, task.fields["place"], task.completed, task.total) for task in tasks]

    progress.started(5)
    yield progress, rows
    progress.close()


def end(progress: BarProgress | LineProgress, name: str) -> None:
    progress.finished(JobLine(id=name, status="succeeded", reason="test"))


def at(done: int) -> StepCount:
    return StepCount(1 + (done - 1) // 2, 2, 1 + (done - 1) % 2, 2, done, 4)


def test_one_process_has_one_row(bar):
    """A job is encoded while the next one denoises: its row goes to the next when it has been generated."""
    progress, rows = bar
    progress.phase("a", "loading the model")
    assert rows() == [("a", "loading the model", 0, 1)]
    progress.phase("a", "generating")
    for done in range(1, 5):
        progress.step("a", at(done))
    assert rows() == [("a", "segment 2/2 · step 2/2", 4, 4)]
    progress.phase("a", "publishing")
    progress.phase("b", "generating")
    progress.step("b", at(1))
    end(progress, "a")
    progress.step("b", at(2))
    assert rows() == [("b", "segment 1/2 · step 2/2", 2, 4)]
    assert progress._bars.tasks[0].completed == 1
    end(progress, "b")
    assert rows() == []
    assert len(progress._bars.tasks) == 2


def test_processes_have_a_row_each_and_a_job_keeps_its_row(bar):
    progress, rows = bar
    for name in "abc":
        progress.step(name, at(1))
    assert [row[0] for row in rows()] == ["a", "b", "c"]
    end(progress, "b")  # it failed half-way
    progress.step("d", at(3))
    progress.step("a", at(2))
    assert [(row[0], row[2]) for row in rows()] == [("a", 2), ("d", 3), ("c", 1)]


@pytest.mark.parametrize(("width", "name"), [(80, "a-job-of-a-name-that-is…"), (40, "a-job-o…")])
def test_the_bars_say_job_segment_step_and_eta(width, name):
    now = [0.0]
    drawn = io.StringIO()
    progress = BarProgress(Console(file=drawn, force_terminal=True, width=width, color_system=None), lambda: now[0])
    progress.started(3)
    progress.phase("a-job-of-a-name-that-is-much-too-long", "generating")
    now[0] = 2.0
    progress.step("a-job-of-a-name-that-is-much-too-long", at(1))
    now[0] = 6.0
    progress.step("a-job-of-a-name-that-is-much-too-long", at(3))
    progress._bars.refresh()
    progress.close()
    # 2 s an evaluation, the two other jobs 8 s each.
    assert re.search(r"jobs +[━╺╸ ]+ 0/3 done · ETA 00:18", drawn.getvalue())
    assert re.search(name + r" [━╺╸ ]+ segment 2/2 · step 1/2", drawn.getvalue())


# -- lines -------------------------------------------------------------------------------------------------------------


def lines_of(every_s: float = 0.01, *, as_numbers: bool = False, seconds: float = 0.0) -> list[dict]:
    """What is written while a job is generated: until the first line comes, or so many seconds."""
    with capture_logs() as logs:
        now = [0.0]
        progress = LineProgress(as_numbers=as_numbers, every_s=every_s, clock=lambda: now[0])
        progress.phase("a", "generating")
        now[0] = 8.0
        progress.step("a", at(1))
        progress.started(2)
        deadline = time.monotonic() + (seconds or 30)
        while (seconds or not logs) and time.monotonic() < deadline:
            time.sleep(0.005)
        progress.close()
        count = len(logs)
        time.sleep(0.05)
    assert len(logs) == count  # none after it was closed
    return logs


def test_a_line_says_where_the_run_is():
    assert lines_of()[0] == {"event": "job 1/2 · segment 1/2 · step 1/2 · ETA 00:56", "log_level": "info"}


def test_for_machines_a_line_has_numbers():
    found = {"jobs_done": 0, "jobs": 2, "job": 1, "running": 1, "phase": "generating", "eta_s": 56.0}
    found |= {"segment": 1, "segments": 2, "step": 1, "steps": 2}
    assert lines_of(as_numbers=True)[0] == {"event": "progress", "log_level": "info", **found}


def test_a_run_that_is_shorter_than_the_interval_has_no_line():
    begin = time.monotonic()
    assert lines_of(every_s=60, seconds=0.05) == []
    assert time.monotonic() - begin < 30
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_where_nothing_runs_there_is_no_line():
    """While a run waits for another runner's job."""
    with capture_logs() as logs:
        progress = LineProgress(every_s=0.005)
        progress.started(2)
        progress.phase("a", "preparing")
        end(progress, "a")
        time.sleep(0.02)
        logs.clear()
        time.sleep(0.05)
        assert logs == []
        progress.phase("b", "preparing")
        deadline = time.monotonic() + 30
        while not logs and time.monotonic() < deadline:
            time.sleep(0.005)
        progress.close()
    assert logs[0]["event"] == "job 2/2 · preparing"


# -- the choice --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "log_format", "term", "kind"),
    [
        (True, "auto", "xterm", BarProgress),
        (True, "json", "xterm", LineProgress),
        (True, "auto", "dumb", LineProgress),
        (False, "auto", "xterm", LineProgress),
    ],
)
def test_bars_are_for_people_at_terminals(monkeypatch, terminal, log_format, term, kind):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes a file for a terminal
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    chosen = choose_progress(log_format)
    assert type(chosen) is kind


def test_silence_is_a_progress_too():
    silent = SilentProgress()
    silent.started(1)
    silent.phase("a", "preparing")
    silent.step("a", at(1))
    silent.finished(JobLine(id="a", status="succeeded", reason="test"))
    silent.close()


# -- the command line --------------------------------------------------------------------------------------------------

RUN = """
import logging
import sys
from functools import partial
import runner.batch.progress as progress
import runner.verbs.run as verb
from runner.batch.loop import Engine
from runner.cli import main
from tests.stub_generator import StubGenerator

progress.choose_progress = partial(progress.choose_progress, every_s=0.1)

def load():
    library = logging.getLogger("library")  # as transformers does when it is first imported
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    library.warning("torchvision is not installed")
    return StubGenerator(generate_s=1.2)

verb.build_engine = lambda *_: Engine("stub", {}, load)
sys.exit(main(["run", *sys.argv[1:]]))
"""


@pytest.fixture
def command(demo_media, tmp_path) -> list[str]:
    """`video-lab run` of two jobs of the stub's, with a line every 0.1 s."""
    place = f"reference: {demo_media / 'references/anna.png'}, video: {demo_media / 'dances/wave.mp4'}, prompt: ok"
    manifest = tmp_path / "m.yaml"
    jobs = "\n".join(f"  - {{id: job-{name}, {place}}}" for name in "ab")
    manifest.write_text(f"version: 1\njobs:\n{jobs}\n", encoding="utf-8")
    words = [str(manifest), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    return [sys.executable, "-c", textwrap.dedent(RUN), *words]


def test_off_a_terminal_a_long_run_has_lines_of_progress(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"job (\d)/2 · segment (\d)/2 · step (\d)/2", done.stderr)
    assert {job for job, _, _ in found} == {"1", "2"}
    assert found == sorted(found)
    assert re.search(r"job 1/2 · segment \d/2 · step \d/2 · ETA \d\d:\d\d", done.stderr)


def test_the_log_says_what_a_user_can_act_on_and_the_file_of_events_has_the_rest(command, tmp_path):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    shown = re.findall(r"^\d\d:\d\d:\d\d \[info +\] (\w+) ", done.stderr, re.M)
    assert [event for event in shown if event != "job"] == [
        "run", "job_started", "engine_loading", "engine_loaded", "job_started", "job_succeeded", "job_succeeded",
        "run_finished",
    ]  # fmt: skip
    (path,) = (tmp_path / "out/runs").glob("*/*.events.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"job_prepared", "job_generated"} <= {event["event"] for event in events if event["level"] == "debug"}
    said = [event["message"] for event in events if event["event"] == "library_message"]
    assert said == ["torchvision is not installed"] and said[0] not in done.stderr
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert re.findall(r"\] (\w+) ", again.stderr) == ["run", "run_finished"]


def test_at_a_terminal_bars_leave_the_lines_of_the_log_whole(command):
    """Nothing of the bars goes to standard output, which is a pipe."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, env=environment) as run:
        os.close(theirs)
        drawn = b""
        while select.select([ours], [], [], 120)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            drawn += data
        table = run.stdout.read().decode() if run.stdout else ""
    os.close(ours)
    assert run.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn.decode())
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", plain)  # whatever moves the cursor begins a line
    assert re.search(r"^jobs .* [01]/2 done · ETA \d\d:\d\d$", text, re.M)  # how long, the machine's load decides
    assert re.search(r"^jobs .* 2/2 done$", text, re.M)
    for name in ("job-a", "job-b"):
        assert re.search(rf"^{name} .* segment \d/2 · step \d/2$", text, re.M)
    assert len(re.findall(r"^\d\d:\d\d:\d\d .*job_succeeded +job=job-[ab] seconds=[0-9.]+ *$", text, re.M)) == 2
    assert "━" not in table
