"""Work on many pictures in shards beside the file that it is for: who is killed goes on where the last whole one ends.

The folder ``.NAME.parts`` holds ``work.json``, which says whose shards they are, and a file for each so many rows; it
goes when the file itself is there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipft.data.digests import digest_of
from clipft.data.slices import shard_of
from clipft.errors import line_of
from clipft.files import drop_link, empty, locked, read_json, write_json, writing
from clipft.inference.encode import Array

__all__ = ["SHARD", "Shards", "claimed", "digest_of_texts", "states"]

SHARD = 256  # rows
Encoded = Iterator[tuple[Array, list[str | None]]]  # vectors of the good rows of a batch, and what is wrong with each


def digest_of_texts(texts: Iterable[str]) -> str:
    """Of all of them in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def states(images: Iterable[Any]) -> Iterator[str]:
    """What tells that a picture is another by now: a digest of it, or the size and time of its file. ``images``: as a
    data set stores them, or paths.
    """
    for image in images:
        stored = image if isinstance(image, dict) else {"bytes": None, "path": image}
        if stored["bytes"] is not None:
            yield digest_of(stored["bytes"]).hex()
        elif isinstance(stored["path"], (str, Path)):
            file = Path(shard_of(str(stored["path"])) or stored["path"])
            state = file.stat() if file.is_file() else None
            yield f"{stored['path']} {state and (state.st_size, state.st_mtime_ns)}"


@contextmanager
def claimed(path: Path, work: dict[str, Any], *, restart: bool = False) -> Iterator[Path]:
    """Yields the folder of shards of the file ``path``, locked; it is gone when the block ends without an error.

    Args:
        work: what the shards are of, for JSON.
        restart: forget what an earlier, interrupted run left.

    Raises:
        ValueError: an interrupted run of other work left its shards there.
        BlockingIOError: another process is writing the same file.
    """
    parts = path.with_name(f".{path.name}.parts")
    drop_link(parts)
    with locked(parts):
        if restart:
            empty(parts)
        _claim(parts, work)
        yield parts
        shutil.rmtree(parts)


def _claim(parts: Path, work: dict[str, Any]) -> None:
    """Take the folder of shards, or find it to be of the same work."""
    file = parts / "work.json"
    if file.exists():
        try:
            before = read_json(file)
        except ValueError as error:
            raise ValueError(f"{file}: damaged ({line_of(error)}); --restart begins again") from error
        other = [name for name, value in work.items() if before.get(name) != value]
        if other:
            raise ValueError(
                f"{parts}: an interrupted run is there, whose {' and '.join(other)} differ; --restart forgets it"
            )
        return
    empty(parts)  # of a run that was killed as it cleared up
    write_json(file, work)


@dataclass(frozen=True)
class Shards:
    """The shards of so many rows.

    Attributes:
        folder: as :func:`claimed` gives it.
        rows: how many.
        ending: of a shard's name.
        encode: from the rows of the shards that are to be written to their vectors, batch by batch, none of which is of
            two shards.
        write: (file, rows, vectors [good, D], faults [rows]) writes a shard; a fault is why a row has no vector.
        done: called with a number of rows whenever so many more are.
    """

    folder: Path
    rows: int
    ending: str
    encode: Callable[[Sequence[range]], Encoded]
    write: Callable[[Path, range, Array, list[str | None]], None]
    done: Callable[[int], object]

    def __iter__(self) -> Iterator[Path]:
        """In their order those that an earlier run left, and those that are still to be written."""
        starts = range(0, self.rows, SHARD)
        rows = {self.folder / f"{n:06d}{self.ending}": range(self.rows)[s : s + SHARD] for n, s in enumerate(starts)}
        missing = {shard: chosen for shard, chosen in rows.items() if not shard.exists()}
        encoded = self.encode(list(missing.values()))
        for shard, chosen in rows.items():
            if shard in missing:
                vectors, faults = self._next(encoded, len(chosen))
                with writing(shard) as staged:
                    self.write(staged, chosen, vectors, faults)
            else:
                self.done(len(chosen))
            yield shard

    def _next(self, encoded: Encoded, rows: int) -> tuple[Array, list[str | None]]:
        found: list[Array] = []
        faults: list[str | None] = []
        while len(faults) < rows:
            vectors, own = next(encoded)
            found += [vectors] if len(vectors) else []
            faults += own
            self.done(len(own))
        return (np.concatenate(found) if found else np.empty((0, 1), np.float32)), faults
