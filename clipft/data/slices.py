"""Addresses of files inside tar shards, which are read at their places."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec

from clipft.data.pictures import check_size
from clipft.files import check_file

__all__ = ["PROTOCOL", "Address", "address_of", "read_slice", "shard_of"]

PROTOCOL = "tarslice"
_ADDRESS = re.compile(rf"{PROTOCOL}://(?P<shard>.*)@(?P<offset>\d{{1,18}})\+(?P<size>\d{{1,18}})/[^/]*")


class Address(str):
    """Where a file lies: its path, or ``tarslice://SHARD@OFFSET+SIZE/NAME``, without the shard's first slash, which
    ``datasets`` would drop. A string in a sample's JSON is never one."""


def address_of(shard: Path, offset: int, size: int, name: str) -> Address:
    """Of a file that lies in a shard at an offset."""
    place = quote(os.fsencode(shard.resolve()))[1:]
    return Address(f"{PROTOCOL}://{place}@{offset}+{size}/{quote(os.fsencode(name))}")


def shard_of(address: str) -> Path | None:
    """The tar file that an address of :func:`address_of` lies in; None for anything else."""
    match = _ADDRESS.fullmatch(address)
    return Path("/" + unquote(match["shard"], errors="surrogateescape")) if match else None


def read_slice(address: str) -> bytes:
    """The file at an address of :func:`address_of`.

    Raises:
        OSError: the shard is not there any more, or shorter. ValueError: no address, or of more than a picture is.
    """
    match, shard = _ADDRESS.fullmatch(address), shard_of(address)
    if match is None or shard is None:
        raise ValueError(f"address: expected one of {PROTOCOL}://, got {address!r}")
    offset, size = int(match["offset"]), int(match["size"])
    check_file(shard)
    check_size(size)
    with shard.open("rb") as file:
        if os.fstat(file.fileno()).st_size < offset + size:
            raise OSError(f"{shard}: the shard is shorter than when it was indexed")
        file.seek(offset)
        return file.read(size)


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
