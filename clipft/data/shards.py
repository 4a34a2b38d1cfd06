"""WebDataset tar shards, read in place: an index of where each file lies, and addresses for those places.

A sample is the files of one key, the path up to the first dot of its name: ``0001.jpg``, ``0001.txt``, ``0001.json``,
wherever in the shard they stand. The index takes one pass over the shards' heads. Nothing is extracted or copied: a
picture is read at its place when its turn comes. So rows have numbers, and shards are split, shuffled over the whole
set and resumed exactly, which a stream cannot be. Shards must be local and uncompressed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from clipft.data.reading import HIDDEN, NO_REGULAR_FILE, BadRowError, Reading
from clipft.data.samples import TEXT_ENDINGS, Sample, check_text_size
from clipft.data.slices import address_of
from clipft.data.splits import hidden
from clipft.data.tar_heads import Damage, Member, members
from clipft.files import check_file, expanded

__all__ = ["read_samples", "samples", "shard_paths"]

_BRACES = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_MOST_SHARDS = 100_000
_DAMAGED, _MISSING = "damaged in a shard", "missing shard"


def shard_paths(pattern: str) -> list[Path]:
    """The files of ``shards/*.tar`` or ``shards/{000..127}.tar``, as WebDataset and open_clip write it; those of a
    range whether they are there or not.

    Raises:
        FileNotFoundError: no file matches. ValueError: a range of too many, or of none.
    """
    patterns = [pattern]
    while braces := _BRACES.search(patterns[0]):
        first, last = braces.groups()
        count = int(last) - int(first) + 1
        if not 1 <= count <= _MOST_SHARDS // len(patterns):
            raise ValueError(f"path_or_name: expected 1 to {_MOST_SHARDS} shards, got {pattern!r}")
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        patterns = [_BRACES.sub(number, one, count=1) for one in patterns for number in numbers]
    if len(patterns) > 1:
        return [expanded(one) for one in patterns]
    path = expanded(patterns[0])
    if path.is_file():
        return [path]
    found = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
    if not found:
        raise FileNotFoundError(f"path_or_name: there is no shard {pattern!r}")
    return found


def read_samples(shards: Iterable[Path], reading: Reading) -> Iterator[Sample]:
    """The samples of shards, in the order of their first files.

    Raises:
        FileNotFoundError, ValueError: a shard is not there, or is damaged; with ``skip`` it is named, and its sound
            samples are read.
    """
    for shard in shards:
        if not shard.exists():
            message = f"path_or_name: there is no shard {str(shard)!r}"
            if not reading.skip:
                raise FileNotFoundError(message)
            reading.leave_out(_MISSING, str(shard), message)
            continue
        found: dict[str, Sample] = {}
        damages: list[BadRowError] = []
        with reading.row():
            check_file(shard)
            damages = _samples_of(shard, found, reading)
        yield from found.values()
        for damage in damages:
            with reading.row():
                raise damage


def samples(shard: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and fields of each sample of one shard: by ending the :class:`clipft.data.slices.Address` of a file or, of a
    text, what it says; the members of its ``.json``.

    Raises:
        ValueError: no uncompressed tar file, or a damaged one.
    """
    for sample in read_samples([shard], Reading()):
        if sample.fault is not None:
            raise sample.fault
        files = {ending: file for ending, file in sample.files.items() if ending not in sample.objects}
        yield sample.place.removeprefix(f"{shard}, "), {**sample.said, **files}


def _samples_of(shard: Path, found: dict[str, Sample], reading: Reading) -> list[BadRowError]:
    """Put the samples of a shard where they are found; what of it is damaged comes back, with ``skip``."""
    damages = []
    with shard.open("rb") as file:
        for member in members(file, os.fstat(file.fileno()).st_size):
            if isinstance(member, Damage):
                why = f"expected an uncompressed tar file ({member.why}, at byte {member.offset})"
                damages.append(BadRowError(str(shard), why, _DAMAGED))
                if not reading.skip:
                    raise damages[-1]
                continue
            name = PurePosixPath(member.name)
            if any(map(hidden, name.parts)):
                reading.leave_out(HIDDEN, f"{shard}, {member.name}")
            elif member.regular:
                key, ending = _key_and_ending(member.name)
                sample = found.setdefault(key, Sample(f"{shard}, {key}"))
                _add(sample, file, member, ending, shard, reading)
            elif name.suffix:
                reading.leave_out(NO_REGULAR_FILE, f"{shard}, {member.name}")
    return damages


def _key_and_ending(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _add(sample: Sample, file: BinaryIO, member: Member, ending: str, shard: Path, reading: Reading) -> None:
    """A member to its sample."""
    place = f"{shard}, {member.name}"
    try:
        if ending in sample.files:
            raise BadRowError(place, "expected a name once in a shard, this is the second")
        last = ending.rpartition(".")[2]
        if last not in TEXT_ENDINGS and ending not in reading.named[1:]:
            sample.files[ending] = address_of(shard, member.offset, member.size, PurePosixPath(member.name).name)
        elif reading.pictures_only and reading.id_column is None:
            sample.files[ending] = ""  # whatever it says, nobody asks
        else:
            check_text_size(member.size, place)
            file.seek(member.offset)
            sample.add_text(ending, file.read(member.size), place, reading.encoding)
    except BadRowError as error:
        sample.fault = sample.fault or error
