from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.verbs.tables import print_json

TABLE = "from runner.records.record import JobLine; from runner.verbs.tables import print_run; "
TABLE += "lines = [JobLine(id=str(n), status='failed', "
TABLE += "reason='') for n in range(5000)]; print_run(lines, {'total': 5000}, ['here'])"
ROWS = "from runner.verbs.status import RunStatus, StatusRow; from runner.verbs.tables import print_status; "
ROWS += "rows = [StatusRow(id=str(n), status='failed', detail='') for n in range(5000)]; "
ROWS += "print_status(RunStatus('out', None, None, tuple(rows), {}), as_json=True)"


@pytest.mark.parametrize("script", [TABLE, ROWS], ids=["run", "status --json"])
def test_who_stops_reading_changes_no_exit_code(script):
    """`video-lab run … | head`: a scheduler asks for the code of the run, not of its table."""
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


def test_json_stays_json_whatever_is_masked_or_escaped(capsys):
    value = {"a": 'Authorization: Bearer hush" more', "b": "\x1b\x85\x7f\u202e贝\n", "https://u:hush@h": [1]}
    print_json(value)
    text = capsys.readouterr().out
    assert "hush" not in text and "贝" in text
    assert not set(text) & set("\x1b\x85\x7f\u202e")
    read = json.loads(text)
    assert (read["b"], read["https://u:***@h"]) == (value["b"], [1])
