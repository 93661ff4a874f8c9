"""Wrap the prose of the pages at 100 columns; --check says which pages are not wrapped, and fails.

Code, tables, headings and comments stay as they are, and so do pages and parts of pages that other tools write.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH = 100
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "vectors/README.md", "src/headway/lm/model/README.md")
WRITTEN_BY_TOOLS = {"api.md", "conformance.md"}

FLAGS = re.MULTILINE | re.DOTALL
VERBATIM = re.compile(r"\||#|<|!\[|    ")
ITEM = re.compile(r"(- |\d+\. )")
CODE = re.compile(r"`[^`]+`")  # is never broken
# What would begin a list, a quotation, a heading or a table if it began a line stays on the line of the word before.
BEGINS = re.compile(r" (?=(?:[-+*#>|=]+|\d+[.)])(?: |$))")


def wrapped(text: str) -> str:
    """Return a page whose prose is wrapped."""
    parts = re.split(r"(^```.*?^```\n|^<!-- measured: begin.*?measured: end -->\n|^<!--.*?-->\n)", text, flags=FLAGS)
    return "".join(part if part.startswith(("```", "<!--")) else "\n".join(lines(part)) for part in parts)


def lines(text: str) -> Iterator[str]:
    """Yield the lines of text without fences."""
    held: list[str] = []  # of one paragraph or item
    for line in [*text.split("\n"), None]:
        stays = line is None or not line or (VERBATIM.match(line) and not held) or line.startswith("|")
        if held and (stays or ITEM.match(line or "")):
            yield from filled(held)
            held = []
        if line is not None and stays:
            yield line
        elif line is not None:
            held.append(line)


def filled(held: list[str]) -> list[str]:
    """Return a paragraph, an item of a list or a quotation anew."""
    quoted = "> " if held[0].startswith("> ") else ""
    item = ITEM.match(held[0])
    bullet = item[0] if item else ""
    prose = " ".join(line.removeprefix(quoted).strip() for line in held).removeprefix(bullet)
    anew = textwrap.TextWrapper(
        WIDTH,
        initial_indent=quoted + bullet,
        subsequent_indent=quoted + " " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )
    whole = CODE.sub(lambda code: code[0].replace(" ", "\0"), BEGINS.sub("\0", prose))
    return [line.replace("\0", " ") for line in anew.wrap(whole)]


def main() -> None:
    """Wrap all pages, or check them."""
    pages = [ROOT / name for name in PAGES] + list((ROOT / "docs").rglob("*.md"))
    texts = {page: page.read_text() for page in pages if page.name not in WRITTEN_BY_TOOLS}
    stale = {page: wrapped(text) for page, text in texts.items() if wrapped(text) != text}
    if "--check" in sys.argv and stale:
        sys.exit("run `make format` to wrap " + ", ".join(str(page.relative_to(ROOT)) for page in stale))
    for page, text in stale.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
