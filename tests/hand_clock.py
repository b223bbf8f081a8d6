"""A clock that a test sets by hand."""

from __future__ import annotations

__all__ = ["HandClock"]


class HandClock:
    """`now` in seconds; it stands still until the test moves it."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds
