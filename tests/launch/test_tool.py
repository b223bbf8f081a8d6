"""Tool: real programs that print what the platforms' tools print, hang, and start processes of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid
from runner.launch.tool import run_tool


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def write_program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def test_run_tool_passes_arguments_and_stdin_and_returns_stdout(bin_folder):
    write_program(bin_folder, "tool-of-a-platform", 'printf "%s|" "$@"; cat; echo said aside >&2')
    assert run_tool(["tool-of-a-platform", "a b", "$HOME", "ü"], stdin=b"in;put", timeout_s=30) == "a b|$HOME|ü|in;put"


def test_run_tool_without_stdin_gives_tool_empty_input(bin_folder):
    write_program(bin_folder, "asking", 'read answer || echo "none"')
    assert run_tool(["asking"], timeout_s=30) == "none\n"


# Texts as the tools print them.
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('Error from server (Forbidden): jobs.batch is forbidden: User "ann" cannot create resource', ClusterDenied),
        ("error: You must be logged in to the server (Unauthorized)", ClusterDenied),
        ("The connection to the server localhost:8080 was refused - did you specify the right host or port?",
         ClusterUnavailable),
        ("Unable to connect to the server: dial tcp: lookup cluster.example: no such host", ClusterUnavailable),
        ("Unable to connect to the server: net/http: TLS handshake timeout", ClusterUnavailable),
        ("Error from server (ServiceUnavailable): the server is currently unable to handle the request",
         ClusterUnavailable),
        ('error: context "night" does not exist', ConfigInvalid),
        ('Error from server (NotFound): namespaces "night" not found', ConfigInvalid),
        ('The Job "night" is invalid: spec.completions: Invalid value: 0', ConfigInvalid),
        ("ERROR: (gcloud.batch.jobs.submit) PERMISSION_DENIED: Permission 'batch.jobs.create' denied", ClusterDenied),
        ("ERROR: (gcloud.batch.jobs.list) You do not currently have an active account selected.", ClusterDenied),
        ("ERROR: (gcloud.batch.jobs.submit) INVALID_ARGUMENT: Job field accelerators.type is invalid", ConfigInvalid),
        ("ERROR: (gcloud.batch.jobs.submit) UNAVAILABLE: The service is currently unavailable.", ClusterUnavailable),
        ("ERROR: gcloud crashed (ConnectionError): HTTPSConnectionPool: Max retries exceeded", ClusterUnavailable),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
         ClusterUnavailable),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
         ClusterDenied),
        ("sbatch: error: invalid partition specified: night", ConfigInvalid),
        ("fatal error: An error occurred (AccessDenied) when calling the PutObject operation", ClusterDenied),
    ],
)  # fmt: skip
def test_tool_error_message_becomes_error_of_its_cause(bin_folder, tmp_path, text, error):
    (tmp_path / "said").write_text(text, encoding="utf-8")
    write_program(bin_folder, "failing", f'cat "{tmp_path}/said" >&2; exit 7')
    with pytest.raises(error) as caught:
        run_tool(["failing", "now"], timeout_s=30)
    assert type(caught.value) is error
    assert text.rstrip(".") in caught.value.what
    assert "exit code 7" in caught.value.what
    assert caught.value.where == "failing"
    assert caught.value.todo


def test_long_tool_error_message_is_cut_to_its_end(bin_folder):
    write_program(bin_folder, "wordy", "for n in 1 2 3 4 5 6; do echo line $n >&2; echo >&2; done; exit 1")
    with pytest.raises(ConfigInvalid) as caught:
        run_tool(["wordy"], timeout_s=30)
    assert caught.value.what == "line 4 / line 5 / line 6 (exit code 1)"


@pytest.mark.parametrize(
    ("body", "what"),
    [("exit 3", "it printed nothing (exit code 3)"), ("echo out; exit 3", "out (exit code 3)"),
     ("kill -TERM $$", "it printed nothing (killed by signal 15)")],
)  # fmt: skip
def test_tool_failure_without_stderr_reports_stdout_and_exit(bin_folder, body, what):
    write_program(bin_folder, "silent", body)
    with pytest.raises(ConfigInvalid) as caught:
        run_tool(["silent"], timeout_s=30)
    assert caught.value.what == what


def test_missing_tool_error_says_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigInvalid, match="kubectl is not installed") as caught:
        run_tool(["kubectl", "version"], timeout_s=30)
    assert "--render-only" in str(caught.value.todo)


def test_tool_that_cannot_be_started_is_refused(bin_folder):
    path = bin_folder / "broken"
    path.write_text("#!/no/such/interpreter\n", encoding="utf-8")
    path.chmod(0o755)
    with pytest.raises(ConfigInvalid, match="cannot be started"):
        run_tool(["broken"], timeout_s=30)


def test_tool_over_timeout_is_killed_with_its_children(bin_folder, tmp_path):
    """As gcloud: a script whose child holds the output open."""
    write_program(bin_folder, "hanging", f'sleep 600 & echo $! > "{tmp_path}/child"; wait')
    started = time.monotonic()
    with pytest.raises(ClusterUnavailable, match="did not end within 1 s"):
        run_tool(["hanging"], timeout_s=1)
    assert time.monotonic() - started < 300
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # dead, and not yet reaped by its new parent


def test_interrupted_run_tool_kills_tool(bin_folder, tmp_path, monkeypatch):
    write_program(bin_folder, "interrupted", f'echo $$ > "{tmp_path}/pid"; sleep 600')

    def interrupt(process, *_, **__):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            time.sleep(0.01)
        monkeypatch.undo()
        monkeypatch.setattr(os, "killpg", lambda pid, number: killed.append((pid, number)) or real(pid, number))
        raise KeyboardInterrupt

    killed, real = [], os.killpg
    monkeypatch.setattr("subprocess.Popen.communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_tool([str(bin_folder / "interrupted")], timeout_s=60)
    assert killed == [(int((tmp_path / "pid").read_text()), signal.SIGKILL)]
