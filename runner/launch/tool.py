"""Tool: runs a batch platform's command line tool, such as kubectl, gcloud or sbatch, and maps its failures to errors.

In:   a command as a list of arguments, bytes for its standard input. Out: its output; undoing of a command that failed
halfway. Never: a shell; which command is run, and what its output means.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid, RunnerError

__all__ = ["run_tool", "taken_back"]

LAST_LINES = 3  # lines of a failed tool's output that go into the message; the cause is at the end
# Phrases of the tools' output, in lower case. _UNAVAILABLE is checked first: "connection refused" is not about rights.
_UNAVAILABLE = (
    "unable to connect to the server",  # kubectl
    "was refused - did you specify the right host or port",
    "connection refused",
    "connection reset",
    "connection timed out",
    "i/o timeout",
    "tls handshake timeout",
    "no such host",
    "request timed out",
    "deadline exceeded",
    "deadline_exceeded",
    "service unavailable",
    "serviceunavailable",
    "(internalerror)",
    "too many requests",
    "toomanyrequests",
    "unable to handle the request",
    "status=[503]",  # gcloud
    "unavailable:",
    "internal:",
    "resource_exhausted",
    "problem connecting",
    "unable to find the server",
    "max retries exceeded",
    "name resolution",
    "network is unreachable",
    "could not connect to the endpoint url",  # aws
    "unable to contact slurm controller",  # sbatch
    "slurm controller not responding",
    "could not establish a configuration source",
    "socket timed out",
    "zero bytes were transmitted or received",
    "munge encode failed",
)
_DENIED = (
    "forbidden",  # kubectl
    "unauthorized",
    "you must be logged in",
    "no configuration has been provided",
    "provide credentials",
    "permission denied",  # gcloud
    "permission_denied",
    "unauthenticated",
    "active account",
    "refreshing your current auth tokens",
    "reauthentication",
    "invalid authentication credentials",
    "does not have permission",
    "access denied",  # aws
    "accessdenied",
    "unable to locate credentials",
    "expiredtoken",
    "token has expired",
    "not authorized",
    "access/permission denied",  # sbatch
    "invalid account or account/partition",
    "not permitted to use this partition",
    "violates accounting/qos policy",
)


def run_tool(words: Sequence[str], *, stdin: bytes | None = None, timeout_s: float) -> str:
    """Run the command `words`, with `stdin` if given, for at most `timeout_s` seconds, and return its standard output.

    Raises ConfigInvalid if the tool is not installed or reports a wrong setting, ClusterDenied if the platform refuses
    the user, ClusterUnavailable if it does not answer. A tool that runs too long is killed with its child processes.
    """
    tool = words[0]
    if shutil.which(tool) is None:
        todo = f"Install {tool}, or write the job with --render-only and submit it where {tool} is"
        raise ConfigInvalid(f"{tool} is not installed, or not on the PATH", todo=todo)
    try:
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,  # so that no tool waits for an answer
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # gcloud is a script that starts a process: both are killed as a group
        )
    except OSError as err:
        raise ConfigInvalid(f"{tool} cannot be started ({err.strerror})", todo=f"Install {tool} again") from err
    try:
        output, errors = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired as err:
        _kill_group(process)
        what = f"did not end within {timeout_s:g} s"
        todo = "Check whether the job was accepted, then run the same command"
        raise ClusterUnavailable(what, where=tool, todo=todo) from err
    except BaseException:
        _kill_group(process)
        raise
    if process.returncode:
        raise _failure(tool, process.returncode, (errors or output).decode("utf-8", errors="replace"))
    return output.decode("utf-8", errors="replace")


@contextmanager
def taken_back(
    job: str,
    words: Sequence[str],
    *,
    timeout_s: float,
    after: type[BaseException] | tuple[type[BaseException], ...] = BaseException,
    gone: str | None = None,
) -> Iterator[None]:
    """If the block fails with an error of `after`, run the command `words`, which removes `job`, and raise the error.

    If this command fails too, the error's message names `job`, which still exists, and how to remove it. `gone`: a
    phrase of the tool's output for a job that does not exist.
    """
    try:
        yield
    except after as error:
        try:
            run_tool(words, timeout_s=timeout_s)
        except RunnerError as second:
            if gone is not None and gone in second.what:
                raise error from None
            first = error.message if isinstance(error, RunnerError) else type(error).__name__
            kind = type(error) if isinstance(error, RunnerError) else ClusterUnavailable
            what = f"{first.rstrip('.')}. The job that was accepted before could not be removed: {second.message}"
            raise kind(what, where=job, todo=f"Run: {shlex.join(words)}") from error
        raise


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _failure(tool: str, code: int, text: str) -> RunnerError:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = " / ".join(lines[-LAST_LINES:]).rstrip(".") or "it printed nothing"
    what = f"{reason} ({'killed by signal' if code < 0 else 'exit code'} {abs(code)})"
    low = text.lower()
    if any(phrase in low for phrase in _UNAVAILABLE):
        return ClusterUnavailable(
            what, where=tool, todo="Check the network and the platform; then run the same command"
        )
    if any(phrase in low for phrase in _DENIED):
        return ClusterDenied(what, where=tool, todo=f"Log in as {tool} asks, or ask for the right that is missing")
    return ConfigInvalid(what, where=tool, todo=f"Change the setting that {tool} names")
