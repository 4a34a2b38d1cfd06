"""Samples, files that belong together by their names: a picture, its texts, and what a ``.json`` says of it. A shard
holds them one after the other, a folder side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import datasets

from clipft.data.columns import CAPTION_COLUMNS, LABEL_COLUMNS, NO_LABEL
from clipft.data.compact import Texts
from clipft.data.pictures import picture_endings
from clipft.data.reading import NO_FILE, BadRowError, Reading
from clipft.data.slices import Address, shard_of
from clipft.data.tables import Pictures, add_row, dataset_of_pictures
from clipft.data.text_tables import BROKEN, check_line, decoded
from clipft.errors import line_of

__all__ = ["TEXT_ENDINGS", "Sample", "check_text_size", "from_samples"]

TEXT_ENDINGS = ("txt", "text", "caption", "cls", "json")
_CAPTIONS, _LABELS = ("txt", *CAPTION_COLUMNS), ("cls", *LABEL_COLUMNS)
_LARGEST_TEXT = 1 << 20  # bytes; what is larger is no caption


@dataclass(slots=True)
class Sample:
    """Files of one name.

    Attributes:
        place: names it in errors.
        files: by ending, where a file lies or, of a text, what it says.
        objects: by ending, what a ``.json`` holds.
        fault: why it cannot be used.
    """

    place: str
    files: dict[str, str] = field(default_factory=dict)
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    fault: BadRowError | None = None

    @property
    def said(self) -> dict[str, Any]:
        """The members of its ``.json``."""
        return {name: value for own in self.objects.values() for name, value in own.items()}

    def add_text(self, ending: str, data: bytes, place: str, encoding: str | None) -> None:
        """What a text says.

        Raises:
            BadRowError: it is no text, or no JSON.
        """
        text = decoded(data, place, encoding)
        check_line(text, place, encoding)
        self.files[ending] = text.strip()
        if ending.rpartition(".")[2] == "json":
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadRowError(place, f"expected JSON ({line_of(error)})", BROKEN) from error
            self.objects[ending] = value if isinstance(value, dict) else {}


def check_text_size(size: int, place: str) -> None:
    """That a file may be a caption."""
    if size > _LARGEST_TEXT:
        raise BadRowError(place, f"expected a text of at most {_LARGEST_TEXT >> 20} MB, found {size} bytes", BROKEN)


def from_samples(samples: Iterable[Sample], where: str, reading: Reading) -> datasets.Dataset:
    """The data set of samples that have a picture and a caption or a label each."""
    if reading.pictures_only:
        return _pictures_of(samples, where, reading)
    rows: list[tuple[str, dict[str, Any]]] = []
    for sample in samples:
        with reading.row(sample.place):
            rows += [(part.place, _row(part, reading)) for part in _parts(sample, reading)]
    present = [name if any(row[name] is not None for _, row in rows) else None for name in ("caption", "label")]
    if rows and present == [None, None]:
        raise ValueError(
            f"{where}: expected captions (.txt, .caption, or {', '.join(CAPTION_COLUMNS)} in .json) or labels (.cls), "
            f"found none in {len(rows)} samples; name them with caption_column or label_column"
        )
    pictures: dict[str, dict[str, Any]] = {}
    for place, row in rows:
        with reading.row(place):
            image = _checked_picture(row, place)
            if present[1] and row["label"] is None:
                raise BadRowError(place, "expected a label, found none", NO_LABEL)
            add_row(pictures, image, row, present, place, reading.attributes)
    return dataset_of_pictures(pictures, present, where, reading)


def _pictures_of(samples: Iterable[Sample], where: str, reading: Reading) -> datasets.Dataset:
    """Of each sample the picture, in their order."""
    found, places = Pictures(reading), Texts()
    for sample in samples:
        with reading.row(sample.place):
            for part in _parts(sample, reading):
                with reading.row(part.place):
                    row = _row(part, reading)
                    found.add(_checked_picture(row, part.place), row["id"], part.place)
                    places.append(part.place)
    return found.dataset(places, where)


def _checked_picture(row: dict[str, Any], place: str) -> str:
    if row["image"] is None:
        found = ", ".join(row["files"]) or "none"
        raise BadRowError(place, f"expected a picture (.jpg, .png, .webp, ...), found {found}", NO_FILE)
    return str(row["image"])


def _parts(sample: Sample, reading: Reading) -> list[Sample]:
    """The sample itself or, where names have dots (``v1.0.jpg``, ``v1.0.txt``, ``v1.1.jpg``, ...), the several that it
    is: one for each picture, with a text of the same name.

    Raises:
        BadRowError: its own, or pictures of which one is to be named.
    """
    if sample.fault is not None:
        raise sample.fault
    endings = _picture_endings()
    pictures = [
        ending
        for ending, file in sample.files.items()
        if isinstance(file, Address) and ending.rpartition(".")[2] in endings
    ]
    if reading.named[0] or len(pictures) < 2 or any("." not in ending for ending in pictures):
        return [sample]
    parts: dict[str, Sample] = {}
    for ending, file in sample.files.items():
        stem, _, last = ending.rpartition(".")
        part = parts.setdefault(stem, Sample(f"{sample.place}.{stem}"))
        part.files[last] = file
        if ending in sample.objects:
            part.objects[last] = sample.objects[ending]
    if not reading.pictures_only and any(len(part.files) < 2 for part in parts.values()):
        raise BadRowError(
            sample.place, f"expected one picture, found {', '.join(pictures)}; name one with image_column", NO_FILE
        )
    return list(parts.values())


def _row(sample: Sample, reading: Reading) -> dict[str, Any]:
    image, caption, label = reading.named
    addresses = {ending: file for ending, file in sample.files.items() if isinstance(file, Address)}
    texts = {ending: file for ending, file in sample.files.items() if ending not in addresses}
    values = {**sample.said, **texts}
    picture = _found(addresses, [image] if image else _picture_endings())
    return {
        "image": picture,
        "id": values.get(reading.id_column) if reading.id_column else picture and _path_of(picture, sample.place),
        "caption": _found(values, [caption] if caption else _CAPTIONS),
        "label": _found(values, [label] if label else _LABELS),
        "files": list(sample.files),
        **{name: values.get(name) for name in reading.attributes},
    }


def _path_of(picture: Address, place: str) -> str:
    """A picture's path; of one in a shard the shard's name and its own there."""
    shard = shard_of(picture)
    if shard is None:
        return str(picture)
    key = place.rpartition(", ")[2]
    return str(PurePosixPath(shard.name, key).parent / unquote(picture.rpartition("/")[2]))


def _found(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these names, else of the only one that ends in one of them (``input.jpg``)."""
    for name in names:
        if values.get(name) is not None:
            return values[name]
    dotted = [value for name, value in values.items() if "." in name and name.rpartition(".")[2] in names]
    return dotted[0] if len(dotted) == 1 else None


@cache
def _picture_endings() -> list[str]:
    return [*(ending[1:] for ending in sorted(picture_endings())), ""]  # a file without one is judged by its content
