"""What a user can do wrong, by short names: a page each, ``NAME.md`` beside this file.

``clipft help NAME`` prints it, the line of an error ends with its name, and the site is drawn from the same files. A
page begins, between two lines ``---``, with what leads to it:

- ``says:`` words of messages, where ``…`` stands for any;
- ``raised:`` a class of exceptions, for those messages that hold no page's words.

Names of arguments do not belong into ``says:``, which the command line replaces by those of its options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Page", "page_of", "page_of_message", "pages"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """A kind of error: what it means and what to do about it.

    Attributes:
        name: what ``clipft help`` takes.
        title: in a line.
        text: Markdown, without the title.
        says: words of its messages.
        raised: names of classes of exceptions.
    """

    name: str
    title: str
    text: str
    says: tuple[str, ...]
    raised: tuple[str, ...]

    def place_in(self, message: str) -> int:
        """Where its words begin in a message, the last of them; -1 where there are none."""
        return max((found.start() for own in _patterns(self) if (found := own.search(message))), default=-1)


@cache
def pages() -> Mapping[str, Page]:
    """All of them, by name."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.md"))}


def page_of(error: BaseException) -> Page | None:
    """Of an exception: by what it says, else by its class; None of a class that no user causes."""
    by_class = {name: page for page in pages().values() for name in page.raised}
    classes = (by_class[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in by_class)
    return page_of_message(str(error)) or next(classes, None)


def page_of_message(message: str) -> Page | None:
    """Of a message the page whose words stand last in it: what was the cause stands behind what came of it."""
    places = {page.place_in(message): page for page in pages().values()}
    last = max(places)
    return places[last] if last >= 0 else None


def _read(path: Path) -> Page:
    _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
    entries = [line.partition(": ")[::2] for line in head.splitlines()]
    of = {key: tuple(value for name, value in entries if name == key) for key in ("says", "raised")}
    title, _, text = body.partition("\n")
    return Page(path.stem, title.removeprefix("# "), text.strip(), **of)


@cache
def _patterns(page: Page) -> list[re.Pattern[str]]:
    return [re.compile(".*?".join(map(re.escape, words.split("…"))), re.DOTALL) for words in page.says]
