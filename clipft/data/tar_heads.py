"""The heads of a tar file, whoever wrote it: nothing in them is believed that the file's own size denies, and what
stands behind a damaged one is found again.

``tarfile`` ends without a word at a damaged head, recurses by chains of long names, and goes backwards by negative
sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["Damage", "Member", "members"]

_BLOCK = 512
_CHUNK = 1 << 20
_LARGEST_NAME = 1 << 20  # bytes of a long name or of a pax head
_LONGEST_PATH = 4096  # characters; no system has longer ones
_REGULAR, _LONG_NAME, _PAX = (b"0", b"\0", b"7"), b"L", b"x"
_ABOUT_OTHERS = (b"L", b"K", b"x", b"g", b"X")  # heads that hold no file of their own
_MAGIC, _MAGIC_AT = b"ustar", 257


@dataclass(frozen=True)
class Member:
    """A file, or another entry, of a tar file.

    Attributes:
        name: with its folders.
        offset, size: where its bytes lie.
        regular: whether it is a file; else a folder, a link, a device or sparse.
    """

    name: str
    offset: int
    size: int
    regular: bool


@dataclass(frozen=True)
class Damage:
    """Bytes that are no entry: where, and why."""

    offset: int
    why: str


def members(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """What a tar file of ``size`` bytes holds, also behind its end mark, where files were joined."""
    place, ended, given = 0, False, dict[str, str]()
    while place + _BLOCK <= size:
        head = _read(file, place, _BLOCK)
        if not any(head):
            ended, place = True, _after_zeros(file, place, size)
            continue
        ended = False
        try:
            kind, name, length = _parsed(head)
            start = place + _BLOCK
            if kind in _ABOUT_OTHERS:
                if not 0 <= length <= min(_LARGEST_NAME, size - start):
                    raise ValueError(f"a head of {length} bytes")
                given |= _about_next(kind, _read(file, start, length))
            else:
                name, length, given = given.get("path", name), int(given.get("size", length)), {}
                if len(name) > _LONGEST_PATH:
                    raise ValueError(f"a name of {len(name)} characters")
                if not 0 <= length <= size - start:
                    raise ValueError(f"{name}, of {length} bytes, is cut off or no file")
                yield Member(name, start, length, kind in _REGULAR and not name.endswith("/"))
            place = start + -(-length // _BLOCK) * _BLOCK
        except ValueError as error:
            yield Damage(place, str(error))
            given, place = {}, _next_head(file, place + _BLOCK, size)
            ended = place == size  # of what has no other head behind it this is enough
    if place < size and any(_read(file, place, _BLOCK)):
        yield Damage(place, "bytes that are no entry")
    elif not ended:
        yield Damage(size, "its end mark is missing: it is cut off")


def _read(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _after_zeros(file: BinaryIO, place: int, size: int) -> int:
    while place < size:
        chunk = _read(file, place, _CHUNK)
        rest = chunk.lstrip(b"\0")
        if rest or not chunk:
            return place + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        place += len(chunk)
    return size


def _next_head(file: BinaryIO, place: int, size: int) -> int:
    """Where the next head begins that can be read."""
    while place < size:
        chunk = _read(file, place, _CHUNK + _BLOCK)
        found = chunk.find(_MAGIC)
        while found != -1:
            start = found - _MAGIC_AT
            if start >= 0 and start % _BLOCK == 0 and _is_head(chunk[start : start + _BLOCK]):
                return place + start
            found = chunk.find(_MAGIC, found + 1)
        place += _CHUNK
    return size


def _is_head(block: bytes) -> bool:
    try:
        _parsed(block)
    except ValueError:
        return False
    return len(block) == _BLOCK


def _parsed(head: bytes) -> tuple[bytes, str, int]:
    """Kind, name and size.

    Raises:
        ValueError: it is no head.
    """
    try:
        check, rest = _number(head[148:156]), head[:148] + b" " * 8 + head[156:]
        length = _number(head[124:136])
    except ValueError as error:
        raise ValueError("no head of an entry") from error
    if check not in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest)):
        raise ValueError("no head of an entry, by its checksum")
    name, prefix = _text(head[:100]), _text(head[345:500])
    posix = head[_MAGIC_AT : _MAGIC_AT + 8] == b"ustar\x0000"
    return head[156:157], f"{prefix}/{name}" if posix and prefix else name, length


def _number(field: bytes) -> int:
    """In octal or, if its first bit is set, in binary."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return os.fsdecode(field.split(b"\0")[0])


def _about_next(kind: bytes, data: bytes) -> dict[str, str]:
    """What a head says of the next entry: its path, its size."""
    if kind == _LONG_NAME:
        return {"path": _text(data)}
    said: dict[str, str] = {}
    while kind == _PAX and data.strip(b"\0"):
        length, space, _ = data[:20].partition(b" ")
        record, data = data[: int(length)], data[int(length) :]
        key, equals, value = record[len(length) + 1 :].partition(b"=")
        if not (space and equals and record.endswith(b"\n")):
            raise ValueError("a pax head that cannot be read")
        if key in (b"path", b"size"):
            said[key.decode()] = os.fsdecode(value[:-1])
    return said
