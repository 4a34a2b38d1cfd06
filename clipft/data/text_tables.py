"""Rows of text files: .csv and .tsv, .jsonl, and plain lines.

Lines end at \\n and \\r\\n alone, so U+2028 and its like are text. A byte-order mark says the encoding and is no part
of the text. What cannot be read is a row with a number, whatever stands in the rows after it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from clipft.data.columns import find_image
from clipft.data.compact import row_name
from clipft.data.reading import BadRowError, Reading
from clipft.errors import line_of, short

__all__ = [
    "BROKEN",
    "check_line",
    "checked_encoding",
    "decoded",
    "read_csv",
    "read_jsonl",
    "read_lines",
    "read_text_lines",
]

Row = tuple[int, dict[str, Any]]

_MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LONGEST_MARK = max(len(mark) for mark, _ in _MARKS)
_LONGEST_FIELD = 131072  # characters; the csv module's limit
_FILE_NAME = re.compile(r"\S\.\w{2,5}")
BROKEN, _OTHER_ENCODING = "broken", "in another encoding"  # kinds of bad rows


# ---- lines ----


def checked_encoding(name: str | None) -> str | None:
    """A name of a text encoding that Python knows, or None for UTF-8."""
    try:
        "".encode(name or "utf-8")
    except LookupError as error:
        raise ValueError(
            f"encoding: expected a text encoding such as latin-1, cp1252 or utf-16, got {name!r}"
        ) from error
    return name


def read_lines(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The lines of a text file without their ends, but for the \\r of one that ends in \\r\\n. Bytes that are not of
    the encoding (default: UTF-8) become lone surrogates, which :func:`check_line` names with their line.
    """
    with path.open("rb") as file:
        mark, own = _encoding_of(file.read(_LONGEST_MARK), encoding)
        file.seek(len(mark))
        with _in_encoding(str(path), own):
            for line in io.TextIOWrapper(file, own, "surrogateescape", newline="\n"):
                yield line.removesuffix("\n")


def decoded(data: bytes, where: str, encoding: str | None) -> str:
    """The text of a file, as :func:`read_lines` has it."""
    mark, own = _encoding_of(data, encoding)
    with _in_encoding(where, own):
        return data[len(mark) :].decode(own, "surrogateescape")


def _encoding_of(data: bytes, encoding: str | None) -> tuple[bytes, str]:
    """The mark that data begins with, and what its encoding is."""
    return next(((mark, own) for mark, own in _MARKS if data.startswith(mark)), (b"", encoding or "utf-8"))


@contextmanager
def _in_encoding(where: str, encoding: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadRowError(
            where,
            f"expected text in {encoding} ({error.reason}); name its encoding with encoding (--encoding)",
            _OTHER_ENCODING,
        ) from error


def read_text_lines(path: Path, encoding: str | None = None) -> list[str]:
    """The lines of a list, a text each: without blanks around them, and without empty ones.

    Raises:
        ValueError: a line is no text of the encoding.
    """
    lines = list(read_lines(path, encoding))
    for number, line in enumerate(lines):
        check_line(line, f"{path}, line {number + 1}", encoding)
    return [line.strip() for line in lines if line.strip()]


def check_line(line: str, place: str, encoding: str | None) -> None:
    """That a line of :func:`read_lines` was of the encoding, and holds no NUL."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        raise BadRowError(
            place,
            f"expected text in {encoding or 'UTF-8'}, got the byte 0x{byte:02x}; name the file's encoding with "
            "encoding (--encoding)",
            _OTHER_ENCODING,
        ) from error
    if "\0" in line:
        raise BadRowError(place, "expected text, got a NUL byte; for UTF-16, encoding (--encoding utf-16)", BROKEN)


# ---- .csv and .tsv ----


def read_csv(path: Path, delimiter: str, reading: Reading) -> Iterator[Row]:
    """The rows with their numbers, from 0 and without empty lines, but for those left out."""
    lines = _Lines(read_lines(path, reading.encoding))
    lines.skip_empty()
    if (first := lines.ahead()) is None:
        return
    check_line(first, f"{path}, header", reading.encoding)
    fields, count = _record(lines, delimiter)
    header = _checked_header(fields, path)
    lines.skip(count)
    image = find_image(header, reading.named[0])

    def is_row(line: str) -> bool:
        fields = line.removesuffix("\r").split(delimiter)
        value = fields[image] if image is not None and len(fields) == len(header) else ""
        return bool(_FILE_NAME.search(value)) and not value.endswith(('"', "."))

    for number, (line, fields) in enumerate(_records(lines, delimiter, is_row)):
        row: dict[str, Any] | None = None
        with reading.row():
            place = row_name(str(path), number)
            check_line(line if isinstance(fields, str) else "\n".join(fields), place, reading.encoding)
            if isinstance(fields, str):
                raise BadRowError(place, fields, BROKEN)
            if len(fields) != len(header):
                why = (
                    f"expected {len(header)} fields, as in the header; a field that holds {delimiter!r} must be quoted"
                )
                raise BadRowError(place, why, BROKEN)
            row = dict(zip(header, fields, strict=True))
        if row is not None:
            yield number, row


def _checked_header(fields: list[str] | str, path: Path) -> list[str]:
    if isinstance(fields, str):
        raise ValueError(f"{path}, header: {fields}")
    if twice := sorted({name for name in fields if fields.count(name) > 1}):
        raise ValueError(f"{path}: expected each column once, got {', '.join(map(short, twice[:5]))} more than once")
    return fields


class _Lines:
    """Goes through lines, and looks ahead."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._held: list[str] = []

    def ahead(self, number: int = 0) -> str | None:
        """The line that is so many further, from the next one on; None after the last."""
        while len(self._held) <= number:
            line = next(self._lines, None)
            if line is None:
                return None
            self._held.append(line)
        return self._held[number]

    def __iter__(self) -> Iterator[str]:
        """From the next line on; they all stay ahead."""
        number = 0
        while (line := self.ahead(number)) is not None:
            yield line
            number += 1

    def skip(self, count: int) -> None:
        """Go so many lines on, which were looked at."""
        del self._held[:count]

    def skip_empty(self) -> None:
        """Go on to a line that is not empty."""
        while (line := self.ahead()) is not None and not line.removesuffix("\r"):
            self.skip(1)


def _records(lines: _Lines, delimiter: str, is_row: Callable[[str], bool]) -> Iterator[tuple[str, list[str] | str]]:
    """Each record's first line, and its fields or what is wrong with it: then the next record begins in the next line,
    so that a quote swallows no row.
    """
    lines.skip_empty()
    while (first := lines.ahead()) is not None:
        fields, count = _record(lines, delimiter)
        if any(map(is_row, islice(lines, 1, count))):
            fields, count = "a quote that begins here and swallows rows after this one; close it, or double it", 1
        lines.skip(count)
        yield first, fields
        lines.skip_empty()


def _record(lines: _Lines, delimiter: str) -> tuple[list[str] | str, int]:
    """The fields of the record that begins in the next line, or what is wrong with it, and how many lines it has."""
    first = str(lines.ahead())
    if '"' not in first:
        fields = first.removesuffix("\r").split(delimiter)
        if max(map(len, fields)) > _LONGEST_FIELD:
            return f"a field of more than {_LONGEST_FIELD} characters", 1
        return fields, 1
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        return next(reader), reader.line_num
    except csv.Error as error:
        if "field limit" in str(error):
            return f"a field of more than {_LONGEST_FIELD} characters, or a quote that does not close", 1
        return f"a quote that does not close, or text after one ({error}); a field's quotes must be doubled", 1


# ---- .jsonl ----


def read_jsonl(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows with their numbers, which count empty lines, but for those left out."""
    for number, line in enumerate(read_lines(path, reading.encoding)):
        row: dict[str, Any] | None = None
        if not line.strip():
            continue
        with reading.row():
            place = f"{path}, line {number + 1}"
            check_line(line, place, reading.encoding)
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadRowError(place, f"expected one JSON object a line ({line_of(error)})", BROKEN) from error
            if not isinstance(found, dict):
                raise BadRowError(place, f"expected a JSON object, got {type(found).__name__}", BROKEN)
            row = found
        if row is not None:
            yield number, row
