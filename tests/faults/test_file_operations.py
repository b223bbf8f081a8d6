"""No change of the output folder goes round the harness, and a disturbed write has written half."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(source: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_change_that_python_reports_is_met(tmp_path):
    """A whole run with PNG frames over an older one; the interpreter's own audit events are the measure."""
    found = run_python(
        """
        import os, sys
        from collections import Counter
        from pathlib import Path
        from tests.faults.file_operations import FileOperations
        from tests.faults.shared_page import SharedPage
        from tests.faults.stub_runs import PageGenerator, import_all, run_command, write_manifest

        folder = Path(sys.argv[1])
        inputs = {"reference": str(folder / "a.png"), "video": str(folder / "b.mp4")}
        for path in inputs.values():
            Path(path).write_bytes(b"x")
        import_all()
        page, out = SharedPage(), folder / "out"

        def run(seeds):
            write_manifest(folder / "m.jsonl", format="png", seeds=seeds, jobs=2, **inputs)
            words = [str(folder / "m.jsonl"), "--out", str(out), "--cache", str(folder / "cache"), "--run-id", "r"]
            return run_command(words, lambda: PageGenerator(page), {})

        assert run(0) == 0
        audited, met = Counter(), Counter()
        names = {"os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir", "os.rmdir": "rmdir",
                 "os.link": "link", "os.truncate": "truncate"}

        def audit(event, arguments):
            if event in names:
                path = os.path.abspath(os.fsdecode(arguments[1 if event in ("os.rename", "os.link") else 0]))
                if path.startswith(str(out) + "/"):
                    audited[names[event]] += 1
            elif event == "open" and isinstance(arguments[0], (str, os.PathLike)) and arguments[2] & 3:
                if os.path.abspath(arguments[0]).startswith(str(out) + "/"):
                    audited["open"] += 1

        sys.addaudithook(audit)
        FileOperations([out], lambda name, path: met.update([name])).install()
        assert run(1) == 0
        assert audited["rename"] and audited["unlink"] and audited["open"], audited
        assert met["write"] and met["fsync"], met
        assert {name: met[name] for name in audited} == dict(audited), (met, audited)
        print("the same")
        """,
        str(tmp_path.resolve()),
    )
    assert found.splitlines()[-1] == "the same"


def test_a_disturbed_operation_is_not_done_and_a_write_is_half_done(tmp_path):
    run_python(
        """
        import os, sys
        from pathlib import Path
        from tests.faults.file_operations import CHANGES, READS, FileOperations

        folder, met, failing = Path(sys.argv[1]), [], set()
        (folder / "read").write_bytes(b"0123")

        def meet(name, path):
            met.append(name)
            if name in failing:
                raise OSError(5, "disturbed", path)

        def fails(name, work):
            failing.add(name)
            try:
                work()
            except OSError as error:
                assert error.strerror == "disturbed", error
            else:
                raise AssertionError(name)
            failing.clear()

        (folder / "old").write_bytes(b"old")
        FileOperations([folder], meet, CHANGES | READS).install()
        fails("write", lambda: (folder / "half").write_bytes(b"01234567"))
        assert (folder / "half").read_bytes() == b"0123"
        fails("open", lambda: (folder / "new").write_text("x"))
        fails("rename", lambda: os.replace(folder / "old", folder / "half"))
        fails("unlink", lambda: (folder / "old").unlink())
        fails("mkdir", lambda: (folder / "sub").mkdir())
        fails("read", lambda: (folder / "read").read_bytes())
        fails("stat", lambda: (folder / "read").stat())
        with (folder / "synced").open("wb") as file:
            fails("fsync", lambda: os.fsync(file.fileno()))
        with (folder / "text").open("a", encoding="utf-8") as file:
            file.write("ä")
        assert (folder / "text").read_text(encoding="utf-8") == "ä"
        assert (folder / "read").open("rb").readline() == b"0123"
        met.clear()
        (folder.parent / f"{folder.name}-outside").write_bytes(b"x")
        assert met == []
        assert sorted(os.listdir(folder)) == ["half", "old", "read", "synced", "text"], os.listdir(folder)
        assert (folder / "old").read_bytes() == b"old"
        """,
        str(tmp_path.resolve()),
    )
