"""A process that is killed, within the test's own: from a moment on, every change to files is refused, also to whoever
would clear up.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Killed(BaseException):
    pass


class _Watch:
    """Counts changes to files below a folder; from the given one on, none is let through."""

    folder: str | None = None
    count = before = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or not self._changes(event, arguments):
            return
        self.count += 1
        if self.count >= self.before:
            raise Killed

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event not in ("open", *_CHANGES) or isinstance(arguments[0], int):
            return False
        path = Path(os.fsdecode(arguments[0]))
        if path.is_absolute() and not path.is_relative_to(str(self.folder)):
            return False
        if event == "open":
            return isinstance(arguments[2], int) and bool(arguments[2] & os.O_ACCMODE)
        return event != "os.mkdir" or not path.is_dir()


_watch = _Watch()


def killed_before(number: int, folder: Path, act: Callable[[], object]) -> bool:
    """Whether ``act`` came to its so-manieth change below ``folder``, and died there."""
    if _watch not in _hooked:
        sys.addaudithook(_watch)
        _hooked.append(_watch)
    _watch.folder, _watch.count, _watch.before = str(folder), 0, number
    try:
        act()
    except Killed:
        return True
    finally:
        _watch.folder = None
    return False


_hooked: list[_Watch] = []


def visible(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, but for what is being written."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}
