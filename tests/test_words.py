"""Words of docstrings, comments, messages and pages: no personification, and one word for one thing."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(path for room in ("runner", "tools", "bench") for path in (ROOT / room).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# Word → what to write instead.
AVOIDED = {
    r"nobody": "no person, no process, none",
    r"somebody|someone": "a person, a process, another runner",
    r"whoever": "the process that …, the user who …",
    r"wakes?|woken|awake": "loads, starts",
    r"at home": "on its offload device",
    r"the seed's|the seed project|seed scripts?": "the original scripts: a seed is a random seed",
}
WORDS = re.compile("|".join(rf"\b(?:{words})\b" for words in AVOIDED), re.IGNORECASE)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each string and comment of a Python file; each line of a page."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(content.splitlines(), 1)
        return
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type in kinds:
            yield from enumerate(token.string.splitlines(), token.start[0])


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_text_avoids_words_that_must_be_read_twice(path):
    found = [f"{path.name}:{line}: {text.strip()}" for line, text in texts(path) if WORDS.search(text)]
    assert not found, "\n".join([*found, "", *(f"{words}: write {instead}" for words, instead in AVOIDED.items())])


def test_a_riddle_is_found(tmp_path):
    """The check itself: in a comment, in a docstring and in a formatted message; not in a name."""
    file = tmp_path / "riddle.py"
    file.write_text('"""Nobody\nknows."""\n# whoever lives\nnobody = 1\nx = f"{nobody} wakes"\n', encoding="utf-8")
    assert [line for line, text in texts(file) if WORDS.search(text)] == [1, 3, 5]
