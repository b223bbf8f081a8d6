"""A model hub for tests, on free loopback ports: the hub's listing and file routes, and a line that fails on request.

Large files answer with a redirect to a second port, as the real hub's do to its storage: no token may follow there.
Load as a plugin, or import `hub_server`; nothing is set in the environment.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

import pytest

LARGE = 4096  # bytes from which on a file is kept in large-file storage
BLOCK = 64 * 1024


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str
    licence: str | None = "apache-2.0"
    gated: bool = False  # files need TOKEN; the listing does not
    private: bool = False  # both do
    listed: dict[str, str] = field(default_factory=dict)  # path → a sha256 that the listing gives instead of the true


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorized: bool
    storage: bool  # at the second port


@dataclass
class Fault:
    kind: (
        str  # "503"; "drop": no answer; "cut": half of the body; "stall": half, then silence; "flip": one bit is wrong
    )
    path: str
    times: int


@dataclass
class HubServer:
    endpoint: str = ""
    storage: str = ""
    token: str = "hf_of_the_test"
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ranges: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, files: dict[str, bytes], **other: object) -> Repo:
        commit = hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = Repo(files, commit, **other)  # type: ignore[arg-type]
        return self.repos[name]

    def fail(self, kind: str, path: str, times: int = 1) -> None:
        self.faults.append(Fault(kind, path, times))

    def bodies(self, text: str = "") -> list[Request]:
        """The requests that were for the bytes of a file."""
        return [r for r in self.requests if r.method == "GET" and "/api/" not in r.path and text in r.path]

    def fault(self, path: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.path in path:
                    fault.times -= 1
                    return fault.kind
        return None


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    servers = [_serve(hub, storage) for storage in (False, True)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    yield hub
    hub.released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def _serve(hub: HubServer, storage: bool) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "storage": storage})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    storage: bool

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        given = self.headers.get("Authorization")
        with self.hub.lock:
            seen = Request(self.command, path, self.headers.get("Range"), given is not None, self.storage)
            self.hub.requests.append(seen)
        self.allowed = given == f"Bearer {self.hub.token}"
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not self.storage and listing:
            self._list(listing[1], listing[2] or "main", path)
        elif not self.storage and tree:
            self._tree(tree[1], tree[2])
        elif file:
            self._file(file[1], file[2], file[3], path)
        else:
            self._json(404, {"error": "Not Found"})

    def _repo(self, name: str, revision: str, *, for_file: bool) -> Repo | None:
        """The repository, or None after the hub's refusal has been sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.allowed):
            self._json(404 if self.allowed else 401, {"error": "Repository not found"}, "RepoNotFound")
            return None
        if for_file and repo.gated and not self.allowed:
            self._json(401, {"error": f"Access to model {name} is restricted"}, "GatedRepo")
            return None
        if revision not in ("main", repo.commit):
            self._json(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
            return None
        return repo

    def _list(self, name: str, revision: str, path: str) -> None:
        kind = self.hub.fault(path)
        if kind == "503":
            return self._json(503, {"error": "busy"})
        if kind == "drop":
            return self._hang_up()
        repo = self._repo(name, revision, for_file=False)
        if repo is None:
            return None
        siblings = []
        for file, body in repo.files.items():
            entry: dict[str, object] = {"rfilename": file, "size": len(body), "blobId": _blob(body)}
            if len(body) >= LARGE:
                sha256 = repo.listed.get(file) or hashlib.sha256(body).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(body), "pointerSize": 134}
            siblings.append(entry)
        card = {"license": repo.licence} if repo.licence else {}
        return self._json(
            200, {"id": name, "modelId": name, "sha": repo.commit, "private": repo.private, "gated": repo.gated,
                  "tags": [], "cardData": card, "siblings": siblings}
        )  # fmt: skip

    def _tree(self, name: str, revision: str) -> None:
        repo = self._repo(name, revision, for_file=False)
        if repo is None:
            return
        entries = []
        for file, body in repo.files.items():
            entry: dict[str, object] = {"type": "file", "path": file, "size": len(body), "oid": _blob(body)}
            if len(body) >= LARGE:
                entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
            entries.append(entry)
        self._json(200, entries)

    def _file(self, name: str, revision: str, file: str, path: str) -> None:
        if self.storage:
            repo: Repo | None = self.hub.repos[name]
        else:
            repo = self._repo(name, revision, for_file=True)
        if repo is None:
            return None
        body = repo.files.get(file)
        if body is None:
            return self._json(404, {"error": "Entry not found"}, "EntryNotFound")
        large = len(body) >= LARGE
        headers = {"X-Repo-Commit": repo.commit}
        if large and not self.storage:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": str(len(body))}
            headers |= {"Location": f"{self.hub.storage}{quote(path)}", "Content-Length": "0"}
            return self._head(302, headers)
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest() if large else _blob(body)}"'
        kind = self.hub.fault(path) if self.command == "GET" else None
        if kind == "503":
            return self._json(503, {"error": "busy"})
        if kind == "drop":
            return self._hang_up()
        if kind == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        return self._body(body, headers, kind)

    def _body(self, body: bytes, headers: dict[str, str], kind: str | None) -> None:
        status, start = 200, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and self.hub.ranges:
            start = int(asked[1])
            if start >= len(body):
                return self._head(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        part = body[start:]
        self._head(status, headers | {"Content-Length": str(len(part)), "Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return None
        if kind in ("cut", "stall"):
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            if kind == "stall":
                self.hub.released.wait()
            return self._hang_up()
        try:
            for at in range(0, len(part), BLOCK):
                self.wfile.write(part[at : at + BLOCK])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed
        return None

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _json(self, status: int, value: object, code: str | None = None) -> None:
        body = json.dumps(value).encode()
        error = {"X-Error-Code": code, "X-Error-Message": "refused by the test"} if code else {}
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))} | error)
        if self.command == "GET":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Every request is in `hub.requests`."""


def _blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
