"""A fake S3 server without a network: answers botocore's requests in this process, each after a pause, and counts them.

Everything above the connection is botocore's code, with its cost: signing, checksums, parsing. Each request waits for
its own pause; requests of several threads wait in parallel, as with a distant store. Supported: objects with conditions
and ranges, copies, deletes, listings. Not supported: multipart uploads, signatures.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

ENDPOINT = "http://127.0.0.1:9"  # an address, so that the bucket stands in the path; nothing is sent there
ENVIRONMENT = {
    "AWS_ENDPOINT_URL_S3": ENDPOINT,
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
PAGE = 1000
KEPT_HEADERS = re.compile(r"x-amz-meta-.*|x-amz-checksum-.*|content-type")


@dataclass(frozen=True)
class Stored:
    data: bytes
    headers: dict[str, str]
    etag: str
    modified: datetime

    @classmethod
    def of(cls, data: bytes, headers: dict[str, str] | None = None) -> Stored:
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return cls(data, headers or {}, f'"{etag}"', datetime.now(UTC).replace(microsecond=0))


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class FakeS3:
    """`objects`: by bucket/key. `latency_s`: of each request. `requests`: counted by kind. `written`: bytes of PUTs."""

    def __init__(self) -> None:
        self.objects: dict[str, Stored] = {}
        self.latency_s = 0.0
        self.requests: Counter[str] = Counter()
        self.written = 0
        self.at_once = self.most_at_once = 0
        self._sorted: list[str] | None = None  # keys, for listings
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes) -> None:
        """Store an object without a request."""
        self.objects[key] = Stored.of(data)
        self._sorted = None

    def reset(self, latency_s: float) -> None:
        self.latency_s = latency_s
        self.requests.clear()
        self.written = self.most_at_once = 0

    def install(self) -> None:
        """Redirect this process's S3 requests to this server. `ENVIRONMENT` must be in the environment."""
        from botocore.awsrequest import AWSResponse
        from botocore.httpsession import URLLib3Session
        from urllib3 import HTTPResponse

        def send(session: Any, request: Any) -> AWSResponse:
            with self._lock:
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
            time.sleep(self.latency_s)
            answer = self.answer(request.method, request.url, _text_headers(request.headers), _body(request))
            with self._lock:
                self.at_once -= 1
            length = {"Content-Length": str(len(answer.body))}
            raw = HTTPResponse(
                body=io.BytesIO(b"" if request.method == "HEAD" else answer.body),
                headers=length | answer.headers,
                status=answer.status,
                preload_content=False,
                request_method=request.method,
            )
            response = AWSResponse(request.url, answer.status, raw.headers, raw)
            if not request.stream_output:
                response.content  # noqa: B018  # botocore's own session reads it here too
            return response

        URLLib3Session.send = send

    def answer(self, method: str, url: str, headers: dict[str, str], body: bytes) -> Answer:
        parts = urlsplit(url)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        kind = f"{method} bucket" if not key else method
        if not key and method == "GET":
            kind = "LIST"
        with self._lock:
            self.requests[kind] += 1
            if kind == "LIST":
                return self._list(bucket, query)
            if kind == "POST bucket" and "delete" in query:
                for name in re.findall(rb"<Key>(.*?)</Key>", body):
                    self._remove(f"{bucket}/{name.decode()}")
                return Answer(200, b"<DeleteResult></DeleteResult>")
            if not key:
                return Answer(200)
            if method in ("GET", "HEAD"):
                return self._get(f"{bucket}/{key}", headers)
            if method == "PUT":
                return self._put(f"{bucket}/{key}", headers, body)
            if method == "DELETE":
                self._remove(f"{bucket}/{key}")
                return Answer(204)
        return _refusal(501, "NotImplemented")

    def _remove(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            self._sorted = None

    def _get(self, key: str, headers: dict[str, str]) -> Answer:
        found = self.objects.get(key)
        if found is None:
            return _refusal(404, "NoSuchKey")
        if headers.get("if-match", found.etag) != found.etag:
            return _refusal(412, "PreconditionFailed")
        said = {"ETag": found.etag, "Last-Modified": format_datetime(found.modified, usegmt=True)}
        # A checksum is of the whole object.
        checked = headers.get("x-amz-checksum-mode", "").upper() == "ENABLED" and "range" not in headers
        said |= {n: v for n, v in found.headers.items() if checked or not n.startswith("x-amz-checksum-")}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
            first, last = int(span[1]), int(span[2] or len(found.data) - 1)
            said["Content-Range"] = f"bytes {first}-{last}/{len(found.data)}"
            return Answer(206, found.data[first : last + 1], said)
        return Answer(200, found.data, said)

    def _put(self, key: str, headers: dict[str, str], body: bytes) -> Answer:
        before = self.objects.get(key)
        if (headers.get("if-none-match") == "*" and before is not None) or (
            "if-match" in headers and (before is None or headers["if-match"] != before.etag)
        ):
            return _refusal(412, "PreconditionFailed")
        kept = {name: value for name, value in headers.items() if KEPT_HEADERS.fullmatch(name)}
        if source := headers.get("x-amz-copy-source"):
            original = self.objects.get(unquote(source).lstrip("/"))
            if original is None:
                return _refusal(404, "NoSuchKey")
            body, kept = original.data, original.headers | kept
        else:
            self.written += len(body)
        stored = self.objects[key] = Stored.of(body, kept)
        if before is None:
            self._sorted = None
        if source:
            return Answer(200, f"<CopyObjectResult><ETag>{escape(stored.etag)}</ETag></CopyObjectResult>".encode())
        return Answer(200, headers={"ETag": stored.etag})

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        if self._sorted is None:
            self._sorted = sorted(self.objects)
        prefix, start = query.get("prefix", ""), query.get("continuation-token") or query.get("start-after", "")
        most = min(PAGE, int(query.get("max-keys", PAGE)))
        top = f"{bucket}/"
        first = max(bisect_left(self._sorted, top + prefix), bisect_right(self._sorted, top + start) if start else 0)
        keys = [key for key in self._sorted[first : first + most + 1] if key.startswith(top + prefix)]
        page, more = [key.removeprefix(top) for key in keys[:most]], len(keys) > most
        spelled = quote if query.get("encoding-type") == "url" else escape
        entries = []
        for key in page:
            found = self.objects[f"{bucket}/{key}"]
            entries.append(
                f"<Contents><Key>{spelled(key)}</Key><LastModified>{found.modified:%Y-%m-%dT%H:%M:%S}.000Z</LastModified>"
                f"<ETag>{escape(found.etag)}</ETag><Size>{len(found.data)}</Size></Contents>"
            )
        next_page = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        encoding = "<EncodingType>url</EncodingType>" if spelled is quote else ""
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{bucket}</Name>'
            f"<Prefix>{spelled(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount><MaxKeys>{most}</MaxKeys>{encoding}"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{next_page}{''.join(entries)}</ListBucketResult>"
        )
        return Answer(200, body.encode(), {"Content-Type": "application/xml"})


def _refusal(status: int, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())


def _text_headers(headers: Any) -> dict[str, str]:
    return {name.lower(): v.decode() if isinstance(v, bytes) else str(v) for name, v in headers.items()}


def _body(request: Any) -> bytes:
    body = request.body
    data = body.read() if hasattr(body, "read") else body or b""
    data = data.encode() if isinstance(data, str) else bytes(data)
    if "aws-chunked" not in str(request.headers.get("Content-Encoding", "")):
        return data
    found, rest = b"", data  # length in hex, the bytes, and so on; a length of 0 ends it
    while rest:
        line, _, rest = rest.partition(b"\r\n")
        length = int(line.split(b";")[0], 16)
        if not length:
            break
        found, rest = found + rest[:length], rest[length + 2 :]
    return found
