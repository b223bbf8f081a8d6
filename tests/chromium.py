"""The system's Chromium for tests of pages: it starts it, notes requests and complaints, measures contrast."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.system_tests import ASKED_FOR, NOT_ASKED_FOR

__all__ = [
    "NARROW",
    "WIDE",
    "Seen",
    "contrast",
    "find_chromium",
    "focused_names",
    "lay_out_all",
    "luminances",
    "nameless_items",
    "open_chromium",
    "wait_until",
    "why_not",
]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


def find_chromium() -> str | None:
    """The system's Chromium."""
    return next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)


def why_not() -> str:
    """Why no browser is started here; empty if one is."""
    if not ASKED_FOR:
        return NOT_ASKED_FOR
    return "" if find_chromium() else "no chromium is installed"


@dataclass
class Seen:
    """What a page asked for and complained about."""

    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def watch(self, page: Any) -> Any:
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("requestfailed", lambda request: self.messages.append(f"failed: {request.url[:200]}"))
        return page

    def outside(self, page: Path) -> list[str]:
        """Requests for anything but the file `page` and what stands in it."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:")) and url != page.as_uri()]


@contextmanager
def open_chromium(profile: Path) -> Iterator[Any]:
    """A browser's context, WIDE, with its profile in the folder `profile`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=find_chromium(), args=ARGUMENTS, viewport=WIDE
        )
        context.set_default_timeout(15_000)
        yield context
        context.close()


def wait_until(page: Any, condition: str) -> None:
    """Until a JavaScript expression is true. (The page's policy forbids what playwright's own waiting does: eval.)"""
    deadline = time.monotonic() + 15
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def focused_names(page: Any, count: int) -> list[str]:
    """The first words of the names of the element that has the focus, and of those that Tab then reaches, `count` in
    all; each shows that it has the focus."""
    focused, names = "document.activeElement", list[str]()
    for _ in range(count):
        names.append(page.evaluate(f"{focused}.getAttribute('aria-label') || {focused}.textContent"))
        assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid", names
        page.keyboard.press("Tab")
    return [name.split()[0] for name in names]


def lay_out_all(page: Any) -> None:
    """Also what is far from the window, which `content-visibility: auto` leaves out: it has neither size nor innerText,
    from a moment on that depends on when the browser last drew a frame."""
    page.evaluate(
        """[...document.querySelectorAll("*")]
            .filter(item => getComputedStyle(item).contentVisibility === "auto")
            .forEach(item => { item.style.contentVisibility = "visible"; })"""
    )


def nameless_items(page: Any, *, inside: str) -> list[str]:
    """HTML of controls and pictures that a screen reader has no name for. `inside`: what names all that it holds."""
    lay_out_all(page)
    return page.evaluate(
        """(inside) => [...document.querySelectorAll("button, input, select, a, img, video, svg[role=img]")]
            .filter(item => !(item.getAttribute("aria-label") || item.innerText || item.alt || item.closest(inside)))
            .map(item => item.outerHTML.slice(0, 80))""",
        inside,
    )


def luminances(page: Any, selector: str) -> tuple[float, float]:
    """Relative luminance, 0 to 1, of the text of the first such element and of the nearest background behind it."""
    text, behind = page.evaluate(
        """(selector) => {
            const numbers = (text) => text.match(/[0-9.]+/g).map(Number);
            const element = document.querySelector(selector);
            let behind = element;
            while (behind.parentElement && numbers(getComputedStyle(behind).backgroundColor)[3] === 0)
                behind = behind.parentElement;
            const back = getComputedStyle(behind).backgroundColor;
            return [numbers(getComputedStyle(element).color).slice(0, 3), numbers(back).slice(0, 3)];
        }""",
        selector,
    )
    return _luminance(text), _luminance(behind)


def _luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(page: Any, selector: str) -> float:
    """Of a text and what is behind it, 1 to 21; 4.5 is legible."""
    high, low = sorted(luminances(page, selector), reverse=True)
    return (high + 0.05) / (low + 0.05)
