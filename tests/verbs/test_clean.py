from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.batch.ledger import Decision, Ledger
from runner.cli import main
from runner.records.record import AttemptMark, ErrorRecord, ResultRecord
from runner.storage import open_storage
from runner.verbs.clean import age_text
from runner.verbs.flag_values import parse_age
from tests.s3_servers import S3Server

STAGED = f".staged-{'0' * 32}.tmp"
WRITER = """
import sys
from pathlib import Path
from runner.storage.disk import staged
with staged(Path(sys.argv[1])) as out:
    out.write(b"half of it")
    out.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


def leave(path: Path, data: bytes = b"left", *, hours: float = 2) -> Path:
    """A file of a process that was killed some hours ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (time.time() - hours * 3600,) * 2)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with good files, as old as the leftovers."""
    for key in ("jobs/a/output.mp4", "jobs/a/result.json", "runs/r/0-of-1.summary.json"):
        leave(tmp_path / "out" / key)
    return tmp_path / "out"


def good(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


GOOD = {"jobs/a/output.mp4", "jobs/a/result.json", "runs/r/0-of-1.summary.json"}


def test_clean_without_yes_removes_nothing_and_prints_command(out, capsys):
    leave(out / "jobs" / "a" / STAGED, b"x" * 300_000)
    leave(out / ".video-lab-probe-1", b"x" * 200_000)
    assert main(["clean", str(out)]) == 0
    text = capsys.readouterr().out
    assert good(out) == GOOD | {f"jobs/a/{STAGED}", ".video-lab-probe-1"}
    assert "would remove 2 (0.50 MB)" in text
    assert str(out / "jobs" / "a" / STAGED) in text
    command = text.partition("to remove them, run: ")[2].strip()
    assert main(shlex.split(command)[1:]) == 0
    assert "removed 2 (0.50 MB)" in capsys.readouterr().out
    assert good(out) == GOOD
    assert main(["clean", str(out), "--yes"]) == 0
    assert "no leftovers" in capsys.readouterr().out


def test_clean_keeps_leftovers_younger_than_limit(out, capsys):
    leave(out / "jobs" / "b" / STAGED, hours=0.9)
    leave(out / ".video-lab-probe-1", hours=0)
    assert main(["clean", str(out), "--yes"]) == 0
    assert "kept 2" in capsys.readouterr().out
    assert main(["clean", str(out), "--yes", "--older-than", "50m"]) == 0
    assert good(out) == GOOD | {".video-lab-probe-1"}
    assert main(["clean", str(out), "--yes", "--older-than", "0s"]) == 0
    assert good(out) == GOOD


@pytest.mark.parametrize("marked", [False, True])
def test_clean_keeps_file_that_process_is_writing(out, capsys, marked):
    """The age of the file does not count; once the process is dead, the mark of its job no longer keeps the file."""
    if marked:
        leave(out / "jobs" / "b" / "attempt.json")
    command = [sys.executable, "-c", WRITER, out / "jobs" / "b" / "output.mp4"]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        (path,) = (out / "jobs" / "b").glob(".staged-*")
        assert main(["clean", str(out), "--yes", "--older-than", "0s"]) == 0
        assert path.exists()
    finally:
        writer.kill()
        writer.communicate()
    assert main(["clean", str(out), "--yes", "--older-than", "0s"]) == 0
    assert not path.exists()


def test_clean_without_locks_keeps_files_of_job_with_mark(out, monkeypatch, capsys):
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leave(out / "jobs" / "a" / STAGED)
    leave(out / "jobs" / "b" / STAGED)
    leave(out / "jobs" / "b" / "attempt.json")
    assert main(["clean", str(out), "--yes"]) == 0
    assert good(out) == GOOD | {f"jobs/b/{STAGED}", "jobs/b/attempt.json"}
    assert "jobs/b/attempt.json exists" in capsys.readouterr().out


def keep_segments(out: Path, job: str) -> list[Path]:
    return [leave(out / "jobs" / job / "parts" / "0123456789abcdef" / name) for name in ("0001.tar", "0001.state")]


def test_clean_removes_finished_segments_of_done_job(out):
    """The segments of unfinished jobs stay, because a rerun continues from them."""
    kept, left = keep_segments(out, "b"), keep_segments(out, "a")
    leave(out / "jobs/a/result.json", done_record())
    assert main(["clean", str(out), "--yes"]) == 0
    assert [path.exists() for path in (*kept, *left)] == [True, True, False, False]


def test_clean_with_checkpoints_removes_finished_segments(out, capsys):
    kept = keep_segments(out, "b")
    assert main(["clean", str(out), "--checkpoints"]) == 0
    printed = capsys.readouterr().out
    assert "--checkpoints --yes" in printed
    command = next(line for line in printed.splitlines() if line.startswith("to remove them"))
    assert main(shlex.split(command.partition(": ")[2])[1:]) == 0
    assert [path.exists() for path in kept] == [False, False]
    assert good(out) == GOOD


def test_clean_keeps_finished_segments_of_running_job(out):
    kept = keep_segments(out, "b")
    Ledger(open_storage(out)).begin("b", Decision("run", ""), "f", "r")
    assert main(["clean", str(out), "--checkpoints", "--yes"]) == 0
    assert [path.exists() for path in kept] == [True, True]


def done_record() -> bytes:
    return ResultRecord(
        job_id="a",
        status="succeeded",
        attempt=1,
        run_id="r",
        reason="",
        started_at="t",
        finished_at="t",
        fingerprint="f",
        fingerprint_parts={},
    ).to_json()


def test_clean_of_folder_with_only_leftovers_empties_folder(tmp_path, capsys):
    leave(tmp_path / "out" / STAGED)
    assert main(["clean", str(tmp_path / "out"), "--yes"]) == 0
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_clean_of_empty_or_missing_folder_exits_2(tmp_path, capsys, exists):
    if exists:
        (tmp_path / "out").mkdir()
    assert main(["clean", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "is empty" in told.err
    assert told.out == ""


def test_clean_json_is_one_object_per_line(out, capsys):
    path = leave(out / "jobs" / "a" / STAGED, b"12345")
    leave(out / "jobs" / "a" / STAGED.replace("0", "1"), hours=0)
    assert main(["clean", str(out), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["action"] for line in lines] == ["would remove", "kept"]
    first = lines[0]
    assert first.pop("modified") == pytest.approx(time.time() - 7200, abs=60)
    assert first == {
        "uri": str(path),
        "key": f"jobs/a/{STAGED}",
        "bytes": 5,
        "kind": "staged file",
        "action": "would remove",
        "reason": "",
    }
    assert main(["clean", str(out), "--json", "--yes"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["action"] == "removed"
    path.with_name(STAGED.replace("0", "1")).unlink()
    assert main(["clean", str(out), "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_clean_with_undeletable_file_reports_failure_and_removes_rest(out, monkeypatch, capsys):
    bad, fine = leave(out / "jobs" / "a" / STAGED), leave(out / "jobs" / "b" / STAGED)
    real = Path.unlink

    def refuse(path: Path, *more: bool) -> None:
        if path == bad:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *more)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["clean", str(out), "--yes"]) == 2
    told = capsys.readouterr()
    assert "failed 1" in told.out
    assert "storage.denied" in told.err
    assert bad.exists()
    assert not fine.exists()


def test_clean_ignores_mark_of_failed_attempt(moto_s3: S3Server, aws_env, capsys) -> None:
    """The mark lies beside an older output that was kept."""
    uri = f"s3://{aws_env(moto_s3).make_bucket()}/lab"
    store = open_storage(uri)
    error = ErrorRecord(code="internal", message="m", stage="generate", retryable=False)
    mark = AttemptMark(job_id="a", attempt=1, fingerprint="f", run_id="r", host="h", started_at="t", error=error)
    store.write_bytes("jobs/a/attempt.json", mark.to_json())
    moto_s3.client.create_multipart_upload(Bucket=store.bucket, Key="lab/jobs/a/output.mp4")  # type: ignore[attr-defined]
    assert main(["clean", uri, "--older-than", "0s", "--yes"]) == 0
    assert "removed 1" in capsys.readouterr().out


def test_clean_on_s3_removes_unfinished_uploads_without_mark(
    moto_s3: S3Server, aws_env: Callable[..., S3Server], capsys
) -> None:
    """S3 has no locks: an upload stays while the mark of its job exists."""
    uri = f"s3://{aws_env(moto_s3).make_bucket()}/lab"
    store = open_storage(uri)
    store.write_bytes("jobs/a/result.json", b"{}")
    store.write_bytes("jobs/b/attempt.json", b"{}")
    for key in ("jobs/a/output.mp4", "jobs/b/output.mp4"):
        moto_s3.client.create_multipart_upload(Bucket=store.bucket, Key=f"lab/{key}")  # type: ignore[attr-defined]
    assert main(["clean", uri, "--older-than", "0s", "--yes"]) == 0
    text = capsys.readouterr().out
    assert "removed 1" in text
    assert "jobs/b/attempt.json exists" in text
    assert [left.key for left in store.leftovers()] == ["jobs/b/output.mp4"]
    store.delete("jobs/b/attempt.json")
    assert main(["clean", uri, "--older-than", "0s", "--yes"]) == 0
    assert list(store.leftovers()) == []
    assert [info.key for info in store.list()] == ["jobs/a/result.json"]


def test_clean_of_missing_bucket_exits_2(moto_s3: S3Server, aws_env: Callable[..., S3Server], capsys) -> None:
    aws_env(moto_s3)
    assert main(["clean", "s3://no-such-bucket/lab"]) == 2
    assert "bucket" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(1800, "30m"), (3600, "1h"), (172800, "2d"), (0, "0s"), (5400, "90m")])
def test_age_text_is_parsed_back_by_parse_age(seconds, text):
    assert age_text(seconds) == text
    assert parse_age(text) == seconds
