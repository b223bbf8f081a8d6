"""Line process: moto behind the faulty line of `tests/s3_servers.py`, in a process of its own.

The process that forks trials must have no threads, and a server has. It counts requests and fails one of them, or all
from it on; its orders come over HTTP, below a path that no bucket can have.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.s3_servers import FaultyServer, S3Server, faulty_app, quiet_handler

__all__ = ["LineServer", "line_server"]

ORDERS = "/_line"
ALL_LATER = 10**6


@dataclass
class LineServer(S3Server):
    """What the forking process knows of the server."""

    def order(self, kind: str | None = None, at: int = 0, times: int = 1) -> None:
        """Count anew; fail the requests `at`, `at`+1, … (1 is the next), `times` of them, with `kind`."""
        self._ask({"kind": kind, "at": at, "times": times})

    def requests(self) -> list[str]:
        """Those since the last order, as `GET /bucket/key?query`."""
        return list(self._ask(None))

    def _ask(self, order: dict[str, Any] | None) -> Any:
        body = None if order is None else json.dumps(order).encode()
        with urllib.request.urlopen(self.endpoint + ORDERS, data=body, timeout=30) as answer:
            return json.loads(answer.read())


@dataclass
class _Counting(FaultyServer):
    kind: str | None = None
    at: int = 0
    times: int = 1
    texts: list[str] = field(default_factory=list)

    def note(self, method: str, path: str, query: str) -> str | None:
        with self.lock:
            self.texts.append(f"{method} {path}" + (f"?{query}" if query else ""))
            struck = self.kind is not None and self.at <= len(self.texts) < self.at + self.times
            return self.kind if struck else None

    def answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        with self.lock:
            found = list(self.texts)
            if length:
                order = json.loads(environ["wsgi.input"].read(length))
                self.kind, self.at, self.times = order["kind"], order["at"], order["times"]
                self.texts.clear()
        body = json.dumps(found).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


@contextmanager
def line_server() -> Iterator[LineServer]:
    """Start it by a fork, so call it while this process has one thread; it ends with the block or with this process."""
    listening = socket.create_server(("127.0.0.1", 0))
    alive, held = os.pipe()  # `held` is open in this process and its children: the server reads its end as theirs
    pid = os.fork()
    if pid == 0:
        os.close(held)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # werkzeug tells of each connection that was dropped on purpose
        try:
            _serve(listening, alive)
        finally:
            os._exit(1)
    os.close(alive)
    server = LineServer(f"http://127.0.0.1:{listening.getsockname()[1]}")
    listening.close()
    try:
        yield server
    finally:
        os.close(held)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(listening: socket.socket, alive: int) -> None:
    from werkzeug.serving import make_server

    line = _Counting("")
    faulty = faulty_app(line)
    one_at_a_time = threading.Lock()  # between moto's look at a condition and its writing another write could come

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["PATH_INFO"] == ORDERS:
            return line.answer(environ, start_response)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if length else b""
        if len(body) < length:  # its sender was killed: a store keeps no half object, moto would
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        environ["wsgi.input"] = io.BytesIO(body)
        with one_at_a_time:
            return faulty(environ, start_response)

    def wait_for_the_end() -> None:
        os.read(alive, 1)
        os._exit(0)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    host, port = listening.getsockname()
    http = make_server(host, port, app, threaded=True, request_handler=quiet_handler(), fd=listening.fileno())
    http.serve_forever()
