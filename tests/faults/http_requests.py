"""HTTP requests: every request that botocore sends from this process, counted, with a point before and one after it.

`watch_requests(meet)` replaces botocore's sending until the process ends: for a forked child. `meet(phase, text)` is
called with `before` when nothing was sent, and with `after` when the server has done what was asked and its answer has
not been read; it may end the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["watch_requests"]


def watch_requests(meet: Callable[[str, str], None]) -> None:
    from botocore.httpsession import URLLib3Session

    original = URLLib3Session.send

    def send(session: Any, request: Any) -> Any:
        parts = urlsplit(request.url)
        text = f"{request.method} {unquote(parts.path)}" + (f"?{parts.query}" if parts.query else "")
        meet("before", text)
        answer = original(session, request)
        meet("after", text)
        return answer

    URLLib3Session.send = send
