"""Columns of a data set: found by their usual names, captions and labels checked, labels and attributes encoded as
classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets

from clipft.data.reading import BadRowError, Reading
from clipft.errors import short

__all__ = [
    "CAPTION_COLUMNS",
    "LABEL_COLUMNS",
    "NO_CAPTION",
    "NO_ID",
    "NO_LABEL",
    "attribute_value",
    "check_attributes",
    "check_text",
    "checked_attributes",
    "checked_captions",
    "class_of",
    "encode_attribute",
    "encode_labels",
    "find_columns",
    "find_image",
    "label_value",
]

IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "filepath", "file_path", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title")
LABEL_COLUMNS = ("label", "class")
_NULL = "(?:nan|null|None)"
_LIST_AS_TEXT = re.compile(  # as Python, JSON or numpy print lists and sets: of texts, of numbers, empty ones
    rf"""\s*(?:[\[({{]\s*(?:{_NULL}\s*,\s*)*['"].*['"]\s*(?:,\s*(?:{_NULL}\s*)?)*[\])}}]|\[(?:[\s,\d.+-]|{_NULL})*\])\s*""",
    re.DOTALL,
)
_WHOLE_FLOAT = re.compile(r"^([+-]?\d+)\.0+$")
_MISSING = ("", "nan", "null", "<na>")  # as programs write what is not known
# kinds of bad rows
NO_CAPTION, NO_LABEL, NO_ID = "without a caption", "without a label", "without an id"


# ---- captions and labels ----


def checked_captions(value: Any, where: str) -> list[str]:
    """A row's caption or captions as a list of one or more."""
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise BadRowError(where, f"expected a caption or a list of captions, got {short(value)}", NO_CAPTION)
    for caption in captions:
        check_text(caption, where, NO_CAPTION)
        if _is_list(caption):
            hint = "a row for each of them, or a list in .jsonl or .parquet"
            raise BadRowError(
                where, f"expected a caption, got a list as text, {short(caption)}; give {hint}", NO_CAPTION
            )
    return captions


def _is_list(text: str) -> bool:
    return text.lstrip()[:1] in ("[", "(", "{") and _LIST_AS_TEXT.fullmatch(text) is not None


def label_value(value: Any, where: str) -> str:
    """A row's label as the name of its class: without blanks around it, and 1.0 is 1."""
    if isinstance(value, (list, tuple, dict, set, bytes)):
        why = f"expected one label, got a {type(value).__name__}, {short(value)}"
        raise BadRowError(where, f"{why}; for several classes a row, see attribute_columns", NO_LABEL)
    name = attribute_value(value)
    if name is None:
        raise BadRowError(where, f"expected a label, got {short(value)}", NO_LABEL)
    if _is_list(name):
        raise BadRowError(where, f"expected one label, got a list as text, {short(name)}", NO_LABEL)
    check_text(name, where, NO_LABEL)
    return name


def class_of(value: Any, classes: Sequence[str] | None, where: str) -> str:
    """The name of a row's class, of a label that numbers ``classes`` where there are any."""
    if classes is None or isinstance(value, str):
        return label_value(value, where)
    if value is None or not 0 <= value < len(classes):
        raise BadRowError(where, f"expected the number of one of {len(classes)} classes, got {value}", NO_LABEL)
    return classes[value]


def encode_labels(values: list[str], where: str) -> tuple[list[int], Any]:
    """Of :func:`label_value`. Whole numbers stay as they are, since they may index names kept elsewhere; other values
    become named classes.

    Raises:
        ValueError: one number in two ways, 1 and 01.
    """
    if all(value.isdecimal() for value in values):
        ways: dict[int, str] = {}
        for value in sorted(set(values)):
            if (other := ways.setdefault(int(value), value)) != value:
                raise ValueError(
                    f"{where}: expected each label written in one way, got {short(other)} and {short(value)}; write "
                    "the same where one class is meant, else give them names that are no numbers"
                )
        return [int(value) for value in values], datasets.Value("int64")
    names = sorted(set(values))
    number = {name: index for index, name in enumerate(names)}
    return [number[value] for value in values], datasets.ClassLabel(names=names)


def attribute_value(value: Any) -> str | None:
    """A class's name as text: None where it is not known, and 1.0 is 1."""
    name = "" if value is None else str(value).strip()
    return None if name.lower() in _MISSING else _WHOLE_FLOAT.sub(r"\1", name)


def check_text(text: str, where: str, kind: str) -> None:
    """That a text of JSON can be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(where, f"expected text, got half a character in {short(text)}", kind) from error


def encode_attribute(values: list[str | None], name: str, where: str) -> tuple[list[int | None], Any]:
    """As named classes."""
    names = sorted({value for value in values if value is not None})
    if not names:
        raise ValueError(f"attribute_columns: {name!r}: expected values in this column of {where}, all are empty")
    number = {value: index for index, value in enumerate(names)}
    return [None if value is None else number[value] for value in values], datasets.ClassLabel(names=names)


# ---- columns ----


def checked_attributes(names: Sequence[str]) -> list[str]:
    """Names of columns, each once, other than those that have a place of their own."""
    taken = {"image", "caption", "label"}
    if isinstance(names, str) or len(set(names)) < len(names) or taken & set(names):
        raise ValueError(f"attribute_columns: expected a list of columns other than {sorted(taken)}, got {names!r}")
    return list(names)


def check_attributes(columns: Sequence[str], used: Sequence[str | None], where: str, reading: Reading) -> None:
    """That the attributes that are asked for are columns, and none that serves another purpose; so with ids."""
    if reading.id_column is not None and reading.id_column not in columns:
        raise ValueError(
            f"{where}: id_column: expected one of its columns {short(list(columns), 1000)}, got {reading.id_column!r}"
        )
    rest = [column for column in columns if column not in used]
    wrong = [name for name in reading.attributes if name not in rest]
    if wrong:
        raise ValueError(f"attribute_columns: expected columns of {where} among {short(rest)}, got {wrong}")


def find_image(columns: Sequence[str], named: str | None) -> int | None:
    """Where the column of images is, if it is named or has a usual name."""
    column = _usual(columns, IMAGE_COLUMNS) if named is None else named
    return columns.index(column) if column in columns else None


def _usual(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of these names that any has."""
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), None)


def find_columns(
    columns: Sequence[str], where: str, named: Sequence[str | None], pictures_only: bool = False
) -> list[str | None]:
    """The columns of image, caption and label. The image is needed and, unless ``pictures_only``, one of the others."""
    there = short(list(columns), 1000)
    found: list[str | None] = []
    usual = (IMAGE_COLUMNS, CAPTION_COLUMNS, LABEL_COLUMNS)
    for argument, name, known in zip(("image_column", "caption_column", "label_column"), named, usual, strict=True):
        if name is not None and name not in columns:
            raise ValueError(f"{where}: {argument}: expected one of its columns {there}, got {name!r}")
        found.append(name or _usual(columns, known))
    image, caption, label = found
    if image is None:
        raise ValueError(
            f"{where}: expected a column with images ({', '.join(IMAGE_COLUMNS)}), found {there}; "
            "name it with image_column"
        )
    if pictures_only:
        return [image, None, None]
    if caption is None and label is None:
        raise ValueError(
            f"{where}: expected a column with captions ({', '.join(CAPTION_COLUMNS)}) or labels "
            f"({', '.join(LABEL_COLUMNS)}), found {there}; name it with caption_column or label_column"
        )
    return found
