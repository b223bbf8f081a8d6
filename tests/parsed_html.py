"""Pages as tests read them: elements, texts, scripts, the policy."""

from __future__ import annotations

import re
from html.parser import HTMLParser

__all__ = ["ParsedPage", "policy"]

VOID = {"meta", "link", "img", "input", "br"}


class ParsedPage(HTMLParser):
    """Elements with their attributes, texts, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.blocks: list[tuple[dict[str, str | None], str]] = []  # scripts and styles
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            self.blocks.append((dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            attributes, text = self.blocks[-1]
            self.blocks[-1] = attributes, text + data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def of(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and all(wanted[key] in (attributes.get(key.strip("_")) or "").split() for key in wanted)
        ]


def policy(page: ParsedPage) -> dict[str, list[str]]:
    (found,) = [meta for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    return {words[0]: words[1:] for part in str(found["content"]).split(";") if (words := part.split())}
