"""Spot: ask the cloud every few seconds whether it takes this machine back, and then drain the run.

In:   the source of notices: `aws`, `gcp` or `file:PATH`. Out: `Stop.drain`, and events. Never: how a run drains.

Requests to a metadata service ignore proxies. A service that does not answer is reported once and asked again; the run
goes on.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runner.batch.stop import Stop
from runner.errors import ConfigInvalid
from runner.records.events import EventLog

__all__ = ["SpotNotice", "choose_notices", "watch"]

POLL_S = 2.0  # AWS advises 5; GCP gives only 30 seconds in all
ANSWER_S = 1.0  # assumed: the service is on the same host or its hypervisor, and answers within milliseconds
RESERVE_S = 15.0  # assumed: for encoding and publishing after the running segment
SILENT_AFTER = 5  # unanswered requests in a row until a service that has answered before is reported
TOKEN_TTL_S = 6 * 3600  # the longest time that AWS allows
PREEMPTION_S = 30.0  # from the notice to the end of the machine, as GCP promises
MAINTENANCE_S = 60.0  # GCP's shortest time between the notice and the maintenance
LONGEST_ANSWER = 64 * 1024  # bytes


@dataclass(frozen=True)
class SpotNotice:
    """The machine is taken back. `seconds`: time left for the running job; None if the notice names no time."""

    reason: str
    seconds: float | None = None


Notices = Callable[[], SpotNotice | None]  # asks once; raises OSError or ValueError without a usable answer


def choose_notices(kind: str, environ: Mapping[str, str] = os.environ) -> Notices:
    """Return the source of notices that `kind` names. It sends no request yet. Raises ConfigInvalid."""
    name, colon, rest = kind.partition(":")
    if name == "file" and rest:
        return FileNotices(Path(rest))
    if colon or name not in KINDS:
        raise ConfigInvalid(f"must be aws, gcp or file:PATH, not {kind!r}", todo="Write for example --spot aws")
    return KINDS[name](environ)


@contextmanager
def watch(
    kind: str | None,
    stop: Stop,
    events: EventLog,
    *,
    environ: Mapping[str, str] = os.environ,
    poll_s: float = POLL_S,
) -> Iterator[None]:
    """Ask for notices of `kind` in a thread while the block runs, and drain `stop` at the first. None: do nothing.

    Raises ConfigInvalid for an unknown kind.
    """
    if kind is None:
        yield
        return
    ended = threading.Event()
    notices = choose_notices(kind, environ)
    thread = threading.Thread(target=_poll, args=(kind, notices, stop, events, ended, poll_s), name="spot", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=ANSWER_S)


def _poll(kind: str, notices: Notices, stop: Stop, events: EventLog, ended: threading.Event, poll_s: float) -> None:
    answered = reported = False
    silent = 0  # unanswered requests in a row
    while not ended.is_set():
        try:
            notice = notices()
        except Exception as error:  # no answer of a service may end the run
            silent += 1
            if not reported and (silent == SILENT_AFTER or not answered):
                reported = True
                problem = f"{kind}: {error or type(error).__name__}"
                message = (
                    f"{problem}. The run continues and asks again. Until there is an answer, no notice is received"
                )
                events.emit("spot_service_silent", level="warning", message=message)
        else:
            if reported and not answered:
                events.emit("spot_service_answers", kind=kind)
            answered, silent = True, 0
            if notice is not None:
                stop.drain(notice.reason, notice.seconds)
                left = round(stop.seconds_left(), 1)
                events.emit("spot_notice", level="warning", reason=notice.reason, seconds_left=left)
                return
        ended.wait(poll_s)


# -- where notices come from -------------------------------------------------------------------------------------------


class FileNotices:
    """A file that appears is the notice, e.g. written by a hook of the scheduler. Its content is not read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> SpotNotice | None:
        return SpotNotice(f"spot notice: the file {self._path} appeared") if self._path.exists() else None


class AwsNotices:
    """EC2's instance metadata service, version 2. Each request carries a token that was requested before.

    The endpoint is the same as botocore's: $AWS_EC2_METADATA_SERVICE_ENDPOINT, else the link-local address (IPv6 if
    $AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE is ipv6).
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        ipv6 = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
        usual = "http://[fd00:ec2::254]" if ipv6 else "http://169.254.169.254"
        self._endpoint = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or usual
        self._token = ""

    def __call__(self) -> SpotNotice | None:
        answer = self._action() if self._token else None
        if answer is None or answer.status == 401:  # the token has expired, or its machine was stopped and started
            self._token = self._new_token()
            answer = self._action()
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise ValueError(f"the metadata service answered {answer.status} for spot/instance-action")
        try:
            notice = json.loads(answer.text)
            action, at = str(notice["action"]), _parse_time(notice["time"])
        except (ValueError, KeyError, TypeError):  # an unreadable notice is still a notice
            return SpotNotice("spot notice of AWS")
        seconds = (at - answer.date).total_seconds() - RESERVE_S
        return SpotNotice(f"spot notice of AWS: {action} at {at:%Y-%m-%dT%H:%M:%SZ}", max(0.0, seconds))

    def _action(self) -> _Answer:
        headers = {"X-aws-ec2-metadata-token": self._token}
        return _ask(self._endpoint, "GET", "/latest/meta-data/spot/instance-action", headers)

    def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
        try:
            answer = _ask(self._endpoint, "PUT", "/latest/api/token", headers)
        except (
            TimeoutError
        ) as error:  # the packet with the token may be limited to one hop, and a container is the second
            raise TimeoutError(
                f"{error} to a request for a token (in a container, set the hop limit of the metadata service to 2)"
            ) from error
        if answer.status != 200 or not answer.text:
            raise ValueError(f"the metadata service gave no token: it answered {answer.status}")
        return answer.text.strip()


class GcpNotices:
    """GCE's metadata server: it shows preemption, and termination for maintenance of the host.

    The server is at $GCE_METADATA_HOST (HOST or HOST:PORT), else at metadata.google.internal.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._endpoint = f"http://{environ.get('GCE_METADATA_HOST') or 'metadata.google.internal'}"

    def __call__(self) -> SpotNotice | None:
        if self._value("preempted") == "TRUE":
            return SpotNotice("spot notice of GCP: preempted", PREEMPTION_S - RESERVE_S)
        if self._value("maintenance-event", absent="NONE") == "TERMINATE_ON_HOST_MAINTENANCE":
            return SpotNotice("spot notice of GCP: maintenance of the host", MAINTENANCE_S - RESERVE_S)
        return None

    def _value(self, name: str, absent: str | None = None) -> str:
        path = f"/computeMetadata/v1/instance/{name}"
        answer = _ask(self._endpoint, "GET", path, {"Metadata-Flavor": "Google"})
        if answer.status not in (200, 404):
            raise ValueError(f"the metadata service answered {answer.status} for {name}")
        if answer.flavor != "Google":
            raise ValueError(f"the server at {self._endpoint} is not Google's metadata server")
        if answer.status == 404 and absent is None:
            raise ValueError(f"the metadata service does not know {name}")
        if answer.status == 404:
            return str(absent)
        return answer.text.strip()


KINDS: Mapping[str, Callable[[Mapping[str, str]], Notices]] = {"aws": AwsNotices, "gcp": GcpNotices}


# -- asking ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    status: int
    text: str
    flavor: str | None
    date: datetime  # by the service's clock if it sends one, else this host's


def _ask(endpoint: str, method: str, path: str, headers: Mapping[str, str]) -> _Answer:
    """Send one request, without proxy and without following redirects. Raises OSError, ValueError."""
    place = urlsplit(endpoint)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise ValueError(f"the metadata service's address {endpoint!r} is not a URL: write http://HOST:PORT")
    made: type[Any] = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = made(place.hostname, place.port, timeout=ANSWER_S)
    try:
        connection.request(method, place.path.rstrip("/") + path, headers=dict(headers))
        answer = connection.getresponse()
        text = answer.read(LONGEST_ANSWER).decode("utf-8", errors="replace")
    except TimeoutError as error:
        raise TimeoutError(f"the metadata service at {endpoint} did not answer within {ANSWER_S:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"the metadata service at {endpoint} cannot be reached ({error})") from error
    finally:
        connection.close()
    return _Answer(answer.status, text, answer.getheader("Metadata-Flavor"), _clock_of(answer.getheader("Date")))


def _clock_of(date: str | None) -> datetime:
    try:
        found = parsedate_to_datetime(date or "")
    except (ValueError, TypeError):
        return datetime.now(UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _parse_time(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
