from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from runner.batch.shards import Shard
from runner.records.record import ErrorRecord, JobLine
from runner.verbs.dry_run import Action
from runner.verbs.fitted_table import UNLIMITED
from runner.verbs.outcome import RunOutcome, counts_of_lines
from runner.verbs.tables import print_json, print_run

TABLE = "from runner.batch.shards import Shard; "
TABLE += "from runner.records.record import JobLine; from runner.verbs.outcome import RunOutcome; "
TABLE += "from runner.verbs.tables import print_run; lines = [JobLine(id=str(n), status='failed', reason='') "
TABLE += "for n in range(5000)]; print_run(RunOutcome(1, 'r', Shard(0, 1), '', {'total': 5000}, lines, 'o', 's', None))"
ROWS = "from runner.verbs.status import RunStatus, StatusRow; from runner.verbs.status_table import print_status; "
ROWS += "rows = [StatusRow(id=str(n), status='failed') for n in range(5000)]; "
ROWS += "print_status(RunStatus('out', None, None, tuple(rows), {}), as_json=True)"


@pytest.mark.parametrize("script", [TABLE, ROWS], ids=["run", "status --json"])
def test_closed_stdout_does_not_change_exit_code(script):
    """With `video-lab run … | head`, a scheduler needs the exit code of the run, not of its table."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; {script}; print('more'); sys.exit(3)"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 3, process.stderr.read()
    assert process.stderr.read() == b""
    process.stderr.close()


def test_print_json_with_secrets_and_control_characters_is_valid_json(capsys):
    value = {"a": 'Authorization: Bearer hush" more', "b": "\x1b\x85\x7f\u202e贝\n", "https://u:hush@h": [1]}
    print_json(value)
    text = capsys.readouterr().out
    assert "hush" not in text and "贝" in text
    assert not set(text) & set("\x1b\x85\x7f\u202e")
    read = json.loads(text)
    assert (read["b"], read["https://u:***@h"]) == (value["b"], [1])


OUTPUTS = "out/night/jobs/"
GONE = "/data/night/dances/none.mp4: no such file. Check the path; relative paths are relative to the manifest"
CHANGED = "options.seed: 41 → 42; options.steps: 4 → 6; prompt: a person is dancing → a person is jumping"
LINES = (
    JobLine(id="anna", status="succeeded", reason="no record yet", output=f"{OUTPUTS}anna/output.mp4", seconds=12.34),
    JobLine(id="bela", status="succeeded", reason=CHANGED, output=f"{OUTPUTS}bela/output.mp4", seconds=3.0),
    JobLine(id="cleo", status="skipped", reason="done"),
    JobLine(
        id="dora",
        status="failed",
        reason="no record yet",
        error=ErrorRecord(code="input.not_found", message=GONE, stage="prepare", retryable=False),
    ),
)


def outcome(*lines: JobLine, actions: dict[str, Action] | None = None) -> RunOutcome:
    lines = lines or LINES
    where = (OUTPUTS, "out/night/runs/r1/", None)
    return RunOutcome(1, "r1", Shard(0, 1), "", counts_of_lines(lines), lines, *where, actions=actions)


def printed(found: RunOutcome, width: int) -> list[str]:
    """The lines of a terminal of this width; 0: off a terminal."""
    file = io.StringIO()
    print_run(found, Console(file=file, width=width or UNLIMITED, force_terminal=width > 0, color_system=None))
    return file.getvalue().splitlines()


def rows(lines: list[str]) -> dict[str, str]:
    """Job → its row of the table."""
    return {line.split()[0]: line for line in lines[:5]}


@pytest.mark.parametrize("width", [0, 200, 120, 80, 40])
def test_run_table_row_is_one_line_with_long_texts_below_table(width):
    lines = printed(outcome(), width)
    table = rows(lines)
    assert list(table) == ["job", "anna", "bela", "cleo", "dora"]
    assert width == 0 or max(map(len, lines[:5])) <= width
    assert "succeeded" in table["anna"] and "12.3" in table["anna"] and "output.mp4" in table["anna"]
    assert f"dora: input.not_found: {GONE}" in lines[5:]
    assert (CHANGED in table["bela"]) == (width in (0, 200))
    assert (f"bela: {CHANGED}" in lines[5:]) == (width not in (0, 200))
    assert any(line.startswith("4 total · 2 succeeded · 1 skipped · 1 failed") for line in lines)
    assert lines[-2:] == [f"outputs: {OUTPUTS}", "summary: out/night/runs/r1/"]


def test_run_table_in_narrow_terminal_shortens_output_paths():
    assert f"{OUTPUTS}anna/output.mp4" in rows(printed(outcome(), 120))["anna"]
    assert rows(printed(outcome(), 66))["anna"].split()[-1] == "anna/output.mp4"
    assert rows(printed(outcome(), 40))["anna"].split()[-1] == "output.mp4"


def test_run_table_outside_terminal_is_not_cut_wrapped_or_padded():
    long = LINES[1].model_copy(update={"reason": "x" * 3000, "output": "y" * 3000})
    lines = printed(outcome(LINES[0], long), 0)
    assert "x" * 3000 in lines[2] and lines[2].endswith("y" * 3000)
    assert all(line == line.rstrip() for line in lines)


def test_run_table_folds_long_id_only_in_narrow_terminal():
    name = "a-very-long-name-of-a-job-that-nobody-would-type-but-a-matrix-makes"
    long = LINES[0].model_copy(update={"id": name, "output": f"{OUTPUTS}{name}/output.mp4"})
    assert name in rows(printed(outcome(long), 120))
    narrow = printed(outcome(long, *LINES[1:]), 60)
    assert "".join(line.split(" ")[0] for line in narrow[1:4]).startswith(name[:40])
    assert max(len(line) for line in narrow[:5]) <= 60


def test_shared_warning_of_many_jobs_is_one_line():
    lines = [JobLine(id=i, status="succeeded", reason="", warnings=["eager", f"own {i}"]) for i in ("anna", "bela")]
    found = printed(outcome(*lines), 0)
    assert [line for line in found if "! " in line] == ["2 jobs: ! eager", "anna: ! own anna", "bela: ! own bela"]
    assert any("2 with warnings" in line for line in found)


def test_run_table_counts_warnings_in_row_and_shows_them_below():
    noted = LINES[0].model_copy(update={"warnings": ["the first [bold]", "the second"]})
    lines = printed(outcome(noted, *LINES[1:]), 80)
    assert "succeeded !2" in rows(lines)["anna"] and "!" not in rows(lines)["bela"]
    assert "anna: ! the first [bold]" in lines and "anna: ! the second" in lines
    assert any(line.endswith("1 with warnings") for line in lines)
    assert not any("with warnings" in line for line in printed(outcome(), 80))


@pytest.mark.parametrize("width", [0, 80, 40])
def test_run_table_of_dry_run_shows_what_would_run_and_why(width):
    actions: dict[str, Action] = {"anna": "run", "bela": "leased", "cleo": "skip", "dora": "fail"}
    lines = printed(outcome(actions=actions), width)
    table = rows(lines)
    assert [
        next(word for word in ("would run", "leased by another runner", "skipped", "would fail") if word in row)
        for row in list(table.values())[1:]
    ] == ["would run", "leased by another runner", "skipped", "would fail"]
    assert f"dora: input.not_found: {GONE}" in lines and CHANGED in "\n".join(lines)
    assert "4 total · 1 would run · 1 skipped · 1 leased by another runner · 1 would fail" in lines
    assert not any("summary" in line for line in lines) and "nothing was rendered or written" in lines[-1]
