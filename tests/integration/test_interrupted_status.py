"""Status, as a user sees it: a run is stopped in its middle, and `status` does not say that all is well."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import sys, time
from pathlib import Path
from tests.faults.stub_runs import run_command
from tests.stub_generator import StubGenerator


class HeldGenerator(StubGenerator):
    def generate(self, *given):
        while len(self.started_at) == 2 and Path(HOLD).exists():  # in the middle of a run, however slow the machine is
            time.sleep(0.01)
        yield from super().generate(*given)


HOLD = sys.argv.pop(1)
sys.exit(run_command(sys.argv[1:], lambda: HeldGenerator(generate_s=0.4), {"weights": "stub"}))
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "runner.cli", "status", *words]


def status(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def write_manifest(folder: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(folder / "ref.png")
    (folder / "video.mp4").write_bytes(b"not opened by the stub")
    place = {"reference": str(folder / "ref.png"), "video": str(folder / "video.mp4"), "prompt": "ok"}
    lines = [json.dumps({"id": f"job{index}", **place, "options": {"keep_audio": False}}) for index in range(7)]
    path = folder / "m.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@contextmanager
def begun(folder: Path, manifest: Path, run_id: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run with the stub under way, in a process of its own; it waits before its third job while `hold` is there."""
    (folder / "hold").touch()
    words = [str(manifest), "--out", str(folder / "out"), "--cache", str(folder / "cache"), "--run-id", run_id]
    log = (folder / f"{run_id}.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder / "hold"), *words], cwd=ROOT, stdout=log, stderr=log
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def wait_for_records(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("out/jobs/*/result.json"))) < count:
        assert time.monotonic() < deadline, next(iter(folder.glob("*.log"))).read_text()
        time.sleep(0.02)


def test_status_of_stopped_run_exits_3_until_rerun_is_done(tmp_path):
    manifest = write_manifest(tmp_path)
    out = str(tmp_path / "out")
    with begun(tmp_path, manifest, "night") as process:
        wait_for_records(tmp_path, 2)
        while_it_runs = status(out, "--json")
        process.send_signal(signal.SIGTERM)
        (tmp_path / "hold").unlink()
        assert process.wait(60) == 143
    under_way = json.loads(while_it_runs.stdout)
    assert under_way["counts"]["running"] >= 1, under_way
    assert under_way["rate_per_hour"] > 0 and under_way["eta_s"] > 0
    done = len(list(tmp_path.glob("out/jobs/*/result.json")))
    assert 2 <= done < 7
    found = status(out)
    assert (found.returncode, found.stderr) == (3, "")
    assert f"\n{done} of 7 done · 0 failed · {7 - done} pending\n" in found.stdout
    gave_up = status(out, "--wait", "--every", "0.2", "--timeout", "1s")
    assert gave_up.returncode == 3
    assert "gave_up_waiting" in gave_up.stderr
    other = status(out, "--run", "day")
    assert (other.returncode, "runs with a list: night" in other.stderr) == (2, True)

    watching = subprocess.Popen(command(out, "--watch", "--every", "0.2"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    looks = (line.rstrip() for line in watching.stdout if " of 7 done" in line)
    assert next(looks).startswith(f"{done} of 7 done")
    with begun(tmp_path, manifest, "morning") as process:
        assert any("jobs an hour" in look for look in looks)
        (tmp_path / "hold").unlink()
        assert process.wait(120) == 0
        *_, last = looks
    assert watching.wait(60) == 0
    assert last == "7 of 7 done · 0 failed"


def test_status_watch_redraws_terminal_and_exits_130_on_ctrl_c(tmp_path):
    out = tmp_path / "out"
    jobs = {"run_id": "r", "manifest": "m.yaml", "recipe": "", "force": False, "jobs": {"a": None, "b": None}}
    (out / "runs/r").mkdir(parents=True)
    (out / "runs/r/jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        command(str(out), "--watch", "--every", "0.1"),
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(slave)
    screen = ""
    deadline = time.monotonic() + 60
    while plain(screen).count("0 of 2 done") < 3 and time.monotonic() < deadline:
        if select.select([master], [], [], 1)[0]:
            screen += os.read(master, 65536).decode()
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # the terminal's other end is closed
        while more := os.read(master, 65536).decode():
            screen += more
    _, log = process.communicate(timeout=30)
    os.close(master)
    assert process.returncode == 130
    assert b"Traceback" not in log and b"waiting" in log, "the log stays where it is sent"
    assert plain(screen).count("0 of 2 done") >= 3
    assert "\x1b[1A" in screen, "the cursor goes up to where the last look began"
    assert screen.count("\x1b[?25l") == screen.count("\x1b[?25h") == 1, "the cursor is shown again"
    assert plain(screen).endswith("no job is running\n"), "the last look stays"


def plain(screen: str) -> str:
    """Without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", screen)
