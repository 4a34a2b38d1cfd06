"""Rows known by what is in them: the same in another file, folder or order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from clipft.data.pictures import EncodedPicture
from clipft.data.rows import class_names_of, column_names, column_values, read_row, read_stored, stored_pictures
from clipft.environment import usable_cores

__all__ = ["DIGEST", "digest_of", "know_digests", "picture_digests", "rows_digest"]

DIGEST = 16  # bytes
_CHUNK = 256  # pictures in memory


def digest_of(*parts: bytes) -> bytes:
    """Of all parts, one after the other."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()


def picture_digests(dataset: Any) -> list[bytes]:
    """Of each row's picture: of its file's bytes, or of the decoded picture where there is no file."""
    if (known := _known.get(dataset)) is not None:
        return known
    stored = stored_pictures(dataset)
    if stored is None:
        return [_digest_of_row(dataset, index) for index in range(len(dataset))]
    found: list[bytes] = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(stored), _CHUNK):
            found += pool.map(lambda image: digest_of(read_stored(image)), stored[start : start + _CHUNK]["image"])
    return found


def know_digests(dataset: Any, pictures: list[bytes]) -> None:
    """What :func:`picture_digests` gives for these rows, which are not read again while they are in use."""
    _known[dataset] = pictures


_known: WeakKeyDictionary[Any, list[bytes]] = WeakKeyDictionary()


def _digest_of_row(dataset: Any, index: int) -> bytes:
    picture = read_row(dataset, index, encoded=True)["image"]
    if isinstance(picture, EncodedPicture):
        return digest_of(picture.data)
    pixels = np.asarray(picture)
    return digest_of(f"{pixels.dtype}/{pixels.shape}".encode(), np.ascontiguousarray(pixels).tobytes())


def rows_digest(dataset: Any, pictures: Sequence[bytes]) -> str:
    """Of rows in their order: the pictures, whose digests are given, and all other columns with their classes."""
    columns = sorted(set(column_names(dataset)) - {"image"})
    texts: Iterable[bytes] = (
        json.dumps([name, class_names_of(dataset, name), column_values(dataset, name)], default=str).encode()
        for name in columns
    )
    return digest_of(*pictures, *texts).hex()
