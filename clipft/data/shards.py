"""WebDataset tar shards, read in place: an index of where each file lies, and addresses for those places.

A sample is the files of one key, the path up to the first dot of its name: ``0001.jpg``, ``0001.txt``, ``0001.json``.
The index takes one pass over the shards' heads. Nothing is extracted or copied: a picture is read at its place when its
turn comes. So rows have numbers, and shards are split, shuffled over the whole set and resumed exactly, which a stream
cannot be. Shards must be local and uncompressed.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

import fsspec

__all__ = ["PROTOCOL", "Address", "read_slice", "samples", "shard_of", "shard_paths"]

PROTOCOL = "tarslice"
_ADDRESS = re.compile(rf"{PROTOCOL}://(?P<shard>.*)@(?P<offset>\d+)\+(?P<size>\d+)/[^/]*")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TEXTS = ("txt", "text", "caption", "cls", "json")
_LARGEST_TEXT = 1 << 20  # bytes; what is larger is no caption


class Address(str):
    """Where a file lies: ``tarslice://SHARD@OFFSET+SIZE/NAME``, without the shard's first slash, which ``datasets``
    would drop. A string in a shard's JSON is never one."""


def shard_paths(pattern: str) -> list[Path]:
    """The files of ``shards/*.tar`` or ``shards/{000..127}.tar``, as WebDataset and open_clip write it.

    Raises:
        FileNotFoundError: a file is not there, or none matches.
    """
    braces = _BRACES.search(pattern)
    if braces:
        first, last = braces.groups()
        names = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        return [path for name in names for path in shard_paths(before + name + after)]
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    found = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else []
    if not found:
        raise FileNotFoundError(f"path_or_name: there is no shard {pattern!r}")
    return found


def samples(shard: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and fields of each sample: by extension the :class:`Address` of a file or, for ``.txt``, ``.caption`` and
    ``.cls``, its text; the members of its ``.json``.

    Raises:
        ValueError: no uncompressed tar file, or a damaged one.
    """
    key, fields = "", dict[str, Any]()
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                if not member.isreg() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                own, extension = _key_and_ending(member.name)
                if own != key and fields:
                    yield key, fields
                    fields = {}
                key = own
                fields |= _fields(tar, member, extension, shard)
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: expected an uncompressed tar file ({error})") from error
    if fields:
        yield key, fields


def _key_and_ending(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _fields(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, shard: Path) -> dict[str, Any]:
    if extension not in _TEXTS or member.size > _LARGEST_TEXT:
        name = quote(PurePosixPath(member.name).name)
        place = f"{quote(str(shard.resolve()))[1:]}@{member.offset_data}+{member.size}"
        return {extension: Address(f"{PROTOCOL}://{place}/{name}")}
    file = tar.extractfile(member)
    text = file.read().decode("utf-8", errors="replace") if file else ""
    if extension != "json":
        return {extension: text.strip()}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{shard}, {member.name}: expected JSON ({error})") from error
    return value if isinstance(value, dict) else {}


# ---- addresses ----


def shard_of(address: str) -> Path | None:
    """The tar file that an address of :func:`samples` lies in; None for anything else."""
    match = _ADDRESS.fullmatch(address)
    return Path("/" + unquote(match["shard"])) if match else None


def read_slice(address: str) -> bytes:
    """The file at an address of :func:`samples`.

    Raises:
        OSError: the shard is not there any more, or shorter.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"address: expected one of {PROTOCOL}://, got {address!r}")
    with Path("/" + unquote(match["shard"])).open("rb") as file:
        file.seek(int(match["offset"]))
        data = file.read(int(match["size"]))
    if len(data) < int(match["size"]):
        raise OSError(f"{shard_of(address)}: the shard is shorter than when it was indexed")
    return data


class _TarSlices(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """So that ``datasets`` opens such addresses as it opens any other."""

    protocol = PROTOCOL

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """The size, of one file."""
        match = _ADDRESS.fullmatch(path)
        if match is None:
            raise FileNotFoundError(path)
        return {"name": path, "size": int(match["size"]), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        return io.BytesIO(read_slice(path))


fsspec.register_implementation(PROTOCOL, _TarSlices, clobber=True)
