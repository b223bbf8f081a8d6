"""Notices that the machine is taken back: local fakes of the metadata services of AWS and Google, and a file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from runner.batch import spot
from runner.batch.spot import SpotNotice, choose_notices, watch
from runner.batch.stop import Stop
from runner.errors import ConfigInvalid
from runner.records.events import EventLog

ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


@dataclass
class Service:
    """A metadata service: AWS's below /latest, Google's below /computeMetadata. Its clock is its own."""

    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)  # path → body; a path that is not here is 404
    token: str = "token-1"
    flavor: str | None = "Google"
    clock: datetime = datetime(2031, 5, 1, 12, 0, 0, tzinfo=UTC)
    slow: str = ""  # the path that is never answered
    redirect: str = ""  # where every GET is sent
    status: int = 0  # of every answer, where it is not 0
    failing: int = 0  # of the next requests, answered with 500
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def aws(self) -> dict[str, str]:
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint}

    @property
    def gcp(self) -> dict[str, str]:
        return {"GCE_METADATA_HOST": self.endpoint.removeprefix("http://")}

    def announce(self, seconds: float, action: str = "terminate") -> None:
        at = self.clock + timedelta(seconds=seconds)
        self.answers[ACTION] = json.dumps({"action": action, "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})

    def respond(self, handler: BaseHTTPRequestHandler) -> tuple[int, str, dict[str, str]]:
        path, headers = handler.path, handler.headers
        self.requests.append(f"{handler.command} {path}")
        if path == self.slow:
            self.released.wait(10)
        if self.failing:
            self.failing -= 1
            return 500, "", {}
        if self.status:
            return self.status, "", {}
        if self.redirect and handler.command == "GET":
            return 302, "", {"Location": self.redirect}
        if path == "/latest/api/token":
            good = handler.command == "PUT" and int(headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
            return (200, self.token, {}) if good else (400, "", {})
        if path.startswith("/latest/") and headers["X-aws-ec2-metadata-token"] != self.token:
            return 401, "", {}
        more = {}
        if path.startswith("/computeMetadata/"):
            if headers["Metadata-Flavor"] != "Google":
                return 403, "", {}
            more = {"Metadata-Flavor": self.flavor} if self.flavor else {}
        return (200, self.answers[path], more) if path in self.answers else (404, "<html>none</html>", more)


class Handler(BaseHTTPRequestHandler):
    service: Service

    def answer(self) -> None:
        status, text, headers = self.service.respond(self)
        self.send_response_only(status)
        self.send_header("Date", format_datetime(self.service.clock, usegmt=True))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answering", (Handler,), {"service": made}))
    server.daemon_threads = True
    made.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Events(EventLog):
    """Keeps what is emitted."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        super().__init__(lambda data: self.lines.extend(json.loads(line) for line in data.splitlines()), quiet=True)

    @property
    def names(self) -> list[str]:
        return [line["event"] for line in self.lines]


def wait_for(true: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- AWS ---------------------------------------------------------------------------------------------------------------


def test_aws_without_notice_returns_none(service):
    ask = choose_notices("aws", service.aws)
    assert ask() is None
    assert ask() is None
    assert service.requests == ["PUT /latest/api/token", f"GET {ACTION}", f"GET {ACTION}"]


@pytest.mark.parametrize("action", ["terminate", "stop"])
def test_aws_notice_has_time_left_by_clock_of_service(service, action):
    """The clock of this host differs from that of the service by years."""
    service.announce(120, action)
    notice = choose_notices("aws", service.aws)()
    assert notice == SpotNotice(f"spot notice of AWS: {action} at 2031-05-01T12:02:00Z", 105)


def test_aws_notice_whose_time_is_over_has_zero_seconds(service):
    service.announce(3)
    notice = choose_notices("aws", service.aws)()
    assert notice is not None and notice.seconds == 0


@pytest.mark.parametrize("text", ["", "terminate", "[]", '{"action": "stop"}', '{"action": "stop", "time": "soon"}'])
def test_aws_notice_that_cannot_be_parsed_counts_as_notice(service, text):
    service.answers[ACTION] = text
    assert choose_notices("aws", service.aws)() == SpotNotice("spot notice of AWS", None)


def test_aws_with_expired_token_requests_new_token(service):
    ask = choose_notices("aws", service.aws)
    assert ask() is None
    service.token = "token-2"
    service.announce(120)
    assert ask() is not None
    assert service.requests[2:] == [f"GET {ACTION}", "PUT /latest/api/token", f"GET {ACTION}"]


def test_aws_token_timeout_names_hop_limit(service, monkeypatch):
    monkeypatch.setattr(spot, "ANSWER_S", 0.05)
    service.slow = "/latest/api/token"
    with pytest.raises(
        TimeoutError, match=r"did not answer within 0.05 s to a request for a token .* hop limit .* to 2"
    ):
        choose_notices("aws", service.aws)()


@pytest.mark.parametrize("ending", ["/", "/prefix/"])
def test_aws_endpoint_with_path_keeps_path(service, ending):
    refused = pytest.raises(ValueError, match="gave no token: it answered 404")
    with refused if "prefix" in ending else nullcontext():
        choose_notices("aws", {"AWS_EC2_METADATA_SERVICE_ENDPOINT": service.endpoint + ending})()
    assert service.requests[0] == f"PUT {ending.rstrip('/')}/latest/api/token"


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({}, "http://169.254.169.254"),
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}, "http://[fd00:ec2::254]"),
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://here:1"}, "http://here:1"),
    ],
)
def test_aws_endpoint_is_that_of_botocore(environ, address, monkeypatch):
    asked = []

    def ask(endpoint: str, *_: Any) -> None:
        asked.append(endpoint)
        raise ConnectionError

    monkeypatch.setattr(spot, "_ask", ask)
    with pytest.raises(ConnectionError):
        choose_notices("aws", environ)()
    assert asked == [address]


# -- Google ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preempted", "maintenance", "notice"),
    [
        ("FALSE", "NONE", None),
        ("FALSE", None, None),
        ("FALSE", "MIGRATE_ON_HOST_MAINTENANCE", None),
        ("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", SpotNotice("spot notice of GCP: maintenance of the host", 45)),
        ("TRUE", "NONE", SpotNotice("spot notice of GCP: preempted", 15)),
        ("TRUE\n", None, SpotNotice("spot notice of GCP: preempted", 15)),
    ],
)
def test_gcp_preemption_or_maintenance_gives_notice(service, preempted, maintenance, notice):
    service.answers[PREEMPTED] = preempted
    if maintenance is not None:
        service.answers[MAINTENANCE] = maintenance
    assert choose_notices("gcp", service.gcp)() == notice


@pytest.mark.parametrize("flavor", [None, "Other"])
def test_gcp_answer_of_other_server_is_refused(service, flavor):
    service.answers[PREEMPTED] = "TRUE"
    service.flavor = flavor
    with pytest.raises(ValueError, match="is not Google's metadata server"):
        choose_notices("gcp", service.gcp)()


def test_gcp_service_without_preempted_key_is_refused(service):
    with pytest.raises(ValueError, match="does not know preempted"):
        choose_notices("gcp", service.gcp)()


def test_gcp_endpoint_is_metadata_google_internal(monkeypatch):
    monkeypatch.setattr(spot, "_ask", lambda endpoint, *_: pytest.fail(endpoint))
    with pytest.raises(pytest.fail.Exception, match=r"^http://metadata\.google\.internal$"):
        choose_notices("gcp", {})()


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["aws", "gcp"])
def test_metadata_request_uses_no_proxy_and_follows_no_redirect(service, kind, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    service.answers[PREEMPTED] = "FALSE"
    ask = choose_notices(kind, service.aws | service.gcp)
    assert ask() is None
    before = len(service.requests)
    service.redirect = f"{service.endpoint}/elsewhere"
    with pytest.raises(ValueError, match="the metadata service answered 302"):
        ask()
    assert not any("elsewhere" in request for request in service.requests[before:])


@pytest.mark.parametrize("kind", ["aws", "gcp"])
@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_metadata_service_with_error_status_raises(service, kind, status):
    service.status = status
    with pytest.raises(ValueError, match=f"answered {status}"):
        choose_notices(kind, service.aws | service.gcp)()


@pytest.mark.parametrize("kind", ["azure", "", "aws:1", "file", "file:", "AWS"])
def test_unknown_notice_kind_is_refused(kind):
    with pytest.raises(ConfigInvalid, match="must be aws, gcp or file:PATH"):
        choose_notices(kind, {})


# -- the thread --------------------------------------------------------------------------------------------------------


def spot_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "spot"]


@pytest.mark.parametrize("kind", ["aws", "gcp"])
def test_run_drains_when_notice_comes(service, kind):
    stop, events = Stop(drain_s=20), Events()
    service.answers[PREEMPTED] = "FALSE"
    with watch(kind, stop, events, environ=service.aws | service.gcp, poll_s=0.005):
        wait_for(lambda: len(service.requests) > 6)
        assert not stop.draining
        service.announce(120)
        service.answers[PREEMPTED] = "TRUE"
        assert stop.requested.wait(10)
        wait_for(lambda: not spot_threads())
    expected = 105 if kind == "aws" else 15
    assert expected - 5 < stop.seconds_left() <= expected
    assert stop.exit_code == 143 and stop.name is not None and stop.name.startswith("spot notice of")
    (line,) = events.lines
    assert (line["event"], line["level"], line["reason"]) == ("spot_notice", "warning", stop.name)
    assert line["seconds_left"] == pytest.approx(expected, abs=5)


def test_run_drains_when_file_appears(tmp_path):
    stop, events = Stop(drain_s=20), Events()
    with watch(f"file:{tmp_path / 'a:notice'}", stop, events, poll_s=0.005):
        assert not stop.requested.wait(0.05)
        (tmp_path / "a:notice").touch()
        assert stop.requested.wait(10)
    assert stop.name == f"spot notice: the file {tmp_path / 'a:notice'} appeared"
    assert 15 < stop.seconds_left() <= 20
    assert events.names == ["spot_notice"]


def test_service_without_answer_is_reported_once_and_asked_again(service):
    stop, events = Stop(), Events()
    service.answers[PREEMPTED] = "FALSE"
    service.status = 503
    with watch("gcp", stop, events, environ=service.gcp, poll_s=0.002):
        wait_for(lambda: len(service.requests) > 10)
        assert events.names == ["spot_service_silent"]
        assert events.lines[0]["level"] == "warning"
        assert "gcp: " in events.lines[0]["message"]
        service.status = 0
        wait_for(lambda: "spot_service_answers" in events.names)
        assert not stop.draining
        service.answers[PREEMPTED] = "TRUE"
        assert stop.requested.wait(10)
    assert events.names == ["spot_service_silent", "spot_service_answers", "spot_notice"]


def test_service_that_fails_sometimes_is_not_reported(service):
    """Three times, four requests in a row have no answer. Then a fifth one has no answer either."""
    events = Events()
    with watch("aws", Stop(), events, environ=service.aws, poll_s=0.002):
        for _ in range(3):
            seen = len(service.requests)
            wait_for(lambda seen=seen: len(service.requests) > seen + 3)
            service.failing = 4
            wait_for(lambda: not service.failing)
        seen = len(service.requests)
        wait_for(lambda seen=seen: len(service.requests) > seen + 3)
        assert events.names == []
        service.status = 500
        seen = len(service.requests)
        wait_for(lambda: len(service.requests) > seen + 15)
    assert events.names == ["spot_service_silent"]


@pytest.mark.parametrize("kind", ["aws", "gcp"])
def test_run_without_metadata_service_goes_on(kind):
    stop, events = Stop(), Events()
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1", "GCE_METADATA_HOST": "127.0.0.1:1"}
    with watch(kind, stop, events, environ=environ, poll_s=0.005):
        wait_for(lambda: events.names)
    assert "cannot be reached ([Errno 111] Connection refused)" in events.lines[0]["message"]
    assert not stop.draining


@pytest.mark.parametrize("address", ["here", "ftp://here", "http://", "http://here:port"])
def test_invalid_service_address_is_reported(address):
    events = Events()
    with watch("aws", Stop(), events, environ={"AWS_EC2_METADATA_SERVICE_ENDPOINT": address}, poll_s=0.005):
        wait_for(lambda: events.names)
    assert events.names == ["spot_service_silent"]


def test_spot_thread_ends_with_run(service):
    with watch("aws", Stop(), Events(), environ=service.aws, poll_s=60):
        wait_for(lambda: len(service.requests) == 2)
        assert len(spot_threads()) == 1
    assert spot_threads() == []


def test_run_without_spot_flag_starts_no_thread():
    with watch(None, Stop(), Events()):
        assert spot_threads() == []
