"""Locks on folders, the kernel's, which go with their process."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["STAGING", "held_folder"]

STAGING = ".clipft-staging"  # begins the names of folders in which a file or a set of them is made
_logger = logging.getLogger(__name__)

_held: dict[int, tuple[tuple[int, int], int]] = {}  # by handle: which folder, and the thread
_without_locks: set[int] = set()  # devices


@contextmanager
def held_folder(folder: Path, *, wait: bool, make: bool = False) -> Iterator[None]:
    """The lock alone. A thread may take one that it has."""
    handle = None
    while handle is None:
        if make:
            _make(folder)
        try:
            handle = _lock(folder, wait)
        except FileNotFoundError:  # gone between two lines
            if not make:
                raise
    try:
        yield
    finally:
        if handle >= 0:
            del _held[handle]
            os.close(handle)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        found = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        raise NotADirectoryError(f"{folder}: expected a folder, {found} is none") from error


def _lock(folder: Path, wait: bool) -> int:
    """A handle to close, or -1 where this thread has the lock."""
    handle = os.open(folder, os.O_RDONLY)
    status = os.fstat(handle)
    own = (status.st_dev, status.st_ino), threading.get_ident()
    if own in _held.values():
        os.close(handle)
        return -1
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise BlockingIOError(
            f"{folder.parent if folder.name.startswith(STAGING) else folder}: another process is writing into this "
            "folder: wait until it has ended, or take another folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        if status.st_dev not in _without_locks:
            _without_locks.add(status.st_dev)
            _logger.warning("%s: cannot be locked (%s); see to it that nobody else writes there", folder, error)
    if not folder.exists() or folder.stat().st_ino != status.st_ino:
        os.close(handle)
        raise FileNotFoundError(folder)
    _held[handle] = own
    return handle


def _forget_locks() -> None:
    """In a process that was forked, as a loader's: it may outlive the one that holds them."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)
