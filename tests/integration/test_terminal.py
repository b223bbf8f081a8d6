"""Terminals: closed streams, ASCII, a full disk behind the output, no home: no traceback, and the run's exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runner.cli import main

ROOT = Path(__file__).resolve().parents[2]
CLI = f"{sys.executable} -m runner.cli"


@pytest.fixture(scope="module")
def done(tmp_path_factory, demo_models, demo_media):
    """(manifest, flags) of a run that is done: one job, with names in Chinese. A rerun loads no model."""
    folder = tmp_path_factory.mktemp("terminal") / "舞蹈"
    folder.mkdir()
    shutil.copy(demo_media / "references/anna.png", folder / "贝拉.png")
    shutil.copy(demo_media / "dances/wave.mp4", folder / "波浪.mp4")
    manifest = folder / "清单.yaml"
    options = {"size": "64x96", "fps": 8, "max_frames": 5, "steps": 1}
    job = {"id": "bela", "reference": "贝拉.png", "video": "波浪.mp4", "options": options}
    text = {"version": 1, "recipe": "fp32", "jobs": [job]}
    manifest.write_text(yaml.safe_dump(text, allow_unicode=True), encoding="utf-8")
    flags = ["--out", str(folder / "成品"), "--models", str(demo_models), "--cache", str(folder / "cache")]
    assert main(["run", str(manifest), *flags]) == 0
    return manifest, flags


def run(command: str, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """`command` is for a shell; "$@" stands for `arguments` in it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        ["sh", "-c", command, "sh", *arguments],
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize("close", ["2>&-", ">&-", "<&- >&- 2>&-", ">/dev/full"])
def test_run_with_closed_or_full_streams_exits_0(done, close):
    manifest, flags = done
    ended = run(f'exec {CLI} run "$@" {close}', str(manifest), *flags)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ("bela" in ended.stdout) == close.startswith("2>")


@pytest.mark.parametrize("close", ["2>&-", "2>/dev/full"])
def test_validate_error_with_unwritable_stderr_exits_2(tmp_path, close):
    ended = run(f'exec {CLI} validate "$@" {close}', str(tmp_path / "none.yaml"))
    assert (ended.returncode, ended.stdout) == (2, "")


CALLS = """
import json, os, sys
from runner.cli import main

# As the interpreter makes arguments of a command line's bytes.
calls = [[os.fsdecode(argument.encode()) for argument in call] for call in CALLS]
with open(sys.argv[1], "w") as file:
    json.dump([main(call) for call in calls], file)
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "PYTHONIOENCODING": None},
    ],
    ids=["ascii streams", "posix"],
)
def test_output_on_ascii_terminal_is_escaped(done, tmp_path, environment):
    manifest, flags = done
    out = flags[1]
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\njobs: [{id: 贝拉, reference: r.png, video: v.mp4}]\n", encoding="utf-8")
    calls = [
        ["run", str(manifest), *flags, "--run-id", "ascii"],
        ["run", str(manifest), *flags, "--run-id", "json", "--log-format", "json"],
        ["validate", str(manifest)],
        ["plan", str(manifest), "--recipe", "fp32"],
        ["status", out],
        ["status", out, "--json"],
        ["validate", str(bad)],
    ]
    script = tmp_path / "calls.py"
    script.write_text(CALLS.replace("CALLS", repr(calls)), encoding="utf-8")
    ended = run(f'exec {sys.executable} "$@"', str(script), str(tmp_path / "codes"), **environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "codes").read_text()) == [0, 0, 0, 0, 0, 0, 2], ended.stderr
    for run_id in ("ascii", "json"):
        (summary,) = Path(out, "runs", run_id).glob("*.summary.json")
        assert json.loads(summary.read_text("utf-8"))["exit_code"] == 0
    assert "Traceback" not in ended.stderr
    assert "\\u6e05\\u5355.yaml" in ended.stdout or "\\udce6\\udcb8\\udc85" in ended.stdout  # 清单
    assert ended.stdout.isascii() and ended.stderr.isascii()
    row = next(line for line in ended.stdout.splitlines() if line.startswith("{"))
    assert json.loads(row)["jobs"][0]["id"] == "bela"
    assert "'\\u8d1d\\u62c9' may hold only" in ended.stderr


WITHOUT_PASSWD = """
import getpass, os, pwd, sys

def unknown(user):
    raise KeyError(user)

pwd.getpwuid = pwd.getpwnam = unknown
from runner.cli import main

code = main(sys.argv[1:])
print(getpass.getuser(), os.path.expanduser("~"))
sys.exit(code)
"""


def test_run_of_user_without_home_and_name_exits_0(done, tmp_path):
    """As in a container that was started with --user 12345."""
    manifest, flags = done
    nobody = {"HOME": None, "USER": None, "LOGNAME": None, "LNAME": None, "USERNAME": None, "VIDEO_LAB_CACHE": None}
    nobody |= {"TMPDIR": str(tmp_path)}
    command = f'exec {sys.executable} -c "$0" "$@"'.replace("$0", WITHOUT_PASSWD.replace('"', "'"))
    ended = run(command, "run", str(manifest), *flags[:4], **nobody)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"{os.getuid()} {tmp_path}/video-lab-{os.getuid()}"
    assert (tmp_path / f"video-lab-{os.getuid()}/.cache/video-lab").is_dir()
    for arguments in (["status", "~nobody-such/out"], ["validate", "~nobody-such/m.yaml"]):
        ended = run(command, *arguments, **nobody)
        assert ended.returncode == 2, ended.stderr
        assert "~, but there is no such home folder here. Write the path in full" in ended.stderr


def test_invisible_character_in_output_is_escaped(tmp_path, capsys):
    manifest = tmp_path / "m.yaml"
    manifest.write_text('version: 1\njobs: [{id: "a\\u202e\\e[31m\\u2066\\nb", reference: r, video: v, "k\\x01": 1}]\n')
    assert main(["validate", str(manifest)]) == 2
    text = capsys.readouterr().err
    assert "'a\\u202e\\x1b[31m\\u2066\\nb' may hold only" in text
    assert "k\\x01: unknown key" in text
    assert not set(text) & set("\u202e\x1b\u2066\x01")
    files = {"reference": "r\u202e.png", "video": "\u200fv.mp4"}
    manifest.write_text(json.dumps({"version": 1, "jobs": [{"id": "a", **files}]}), encoding="utf-8")
    assert main(["validate", str(manifest)]) == 1
    text = capsys.readouterr().out
    assert "r\\u202e.png" in text and "\\u200fv.mp4" in text
    assert not set(text) & set("\u202e\u200f")
