"""Recorded tools: programs by the names of platforms' tools that write down how they were called, and do as planned.

In:   a folder for the programs and one for the record. Out: the calls, in order. Never: a network.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Call", "RecordedTools", "complaints"]

PROGRAM = """\
#!/bin/sh
n=$(ls {calls} | wc -l)
mkdir {calls}/$n
printf '%s\\0' "${{0##*/}}" "$@" >{calls}/$n/words
cat >{calls}/$n/stdin
if [ -f {plans}/$n ]; then . {plans}/$n; fi
"""


@dataclass(frozen=True)
class Call:
    """The words of one call, the tool's name first, and its standard input."""

    words: tuple[str, ...]
    stdin: bytes


class RecordedTools:
    """Programs in `folder`/bin; `plan` says what a call prints and how it ends, else it prints nothing and succeeds."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.bin, self._calls, self._plans = folder / "bin", folder / "calls", folder / "plans"
        for made in (self.bin, self._calls, self._plans):
            made.mkdir()
        places = {"calls": shlex.quote(str(self._calls)), "plans": shlex.quote(str(self._plans))}
        for name in names:
            program = self.bin / name
            program.write_text(PROGRAM.format(**places), encoding="utf-8")
            program.chmod(0o755)

    @property
    def path(self) -> str:
        """A PATH on which these programs come first."""
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def plan(self, call: int, *, prints: str = "", says: str = "", code: int = 0) -> None:
        """Call number `call`, from 0 and of all tools together, prints, says to its error output, and ends so."""
        printed = f"printf '%s\\n' {shlex.quote(prints)}\n" if prints else ""
        self.plan_script(call, f"{printed}printf '%s\\n' {shlex.quote(says)} >&2\nexit {code}\n")

    def plan_script(self, call: int, body: str) -> None:
        """What call number `call` does, as lines of sh."""
        (self._plans / str(call)).write_text(body, encoding="utf-8")

    def forget(self) -> None:
        """Forget all calls and plans; the next call is number 0."""
        for folder in (self._calls, self._plans):
            shutil.rmtree(folder)
            folder.mkdir()

    def calls(self) -> list[Call]:
        folders = sorted(self._calls.iterdir(), key=lambda folder: int(folder.name))
        return [
            Call(tuple((folder / "words").read_text().split("\0")[:-1]), (folder / "stdin").read_bytes())
            for folder in folders
        ]

    def run_script(self, folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Write `files` and a manifest into `folder`, and run its submit.sh from elsewhere."""
        folder.mkdir(exist_ok=True)
        for name, text in {"manifest.jsonl": "{}\n", **files}.items():
            (folder / name).write_text(text, encoding="utf-8")
        return subprocess.run(
            ["bash", str(folder / "submit.sh")],
            cwd="/",
            env={**os.environ, "PATH": self.path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def complaints(script: str) -> str:
    """What shellcheck says of a script; it stands beside the interpreter of the tests."""
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([program, "-"], input=script, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr
