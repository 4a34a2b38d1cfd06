"""Files of vectors, and searching them.

A file is Parquet (columns ``id`` and ``embedding``) or ``.npy`` with the ids in ``NAME.npy.json`` beside it; either way
with a description: which model, of what. ``embed_to_file`` works in shards in a folder beside the file, each of which
appears whole, so that it goes on after an interruption where it was; the file itself appears when all is done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipft.files import check_set, drop_link, empty, locked, replace_set, settle, write_json, writing
from clipft.inference.encode import Encoder, encode_pictures

__all__ = ["Description", "VectorFile", "embed_to_file", "search"]

Array = NDArray[np.float32]
SHARD = 256  # rows
_KEY = b"clipft"


@dataclass(frozen=True)
class Description:
    """What the vectors of a file are."""

    kind: str  # images or texts
    model: str
    identity: str  # of the model's weights and preprocessing
    source: str  # where the pictures are


@dataclass(frozen=True)
class VectorFile:
    """Ids, [N, D] float32 vectors, and what they are."""

    ids: list[str]
    vectors: Array
    description: Description

    @staticmethod
    def read(path: Path) -> VectorFile:
        """Raises FileNotFoundError, or ValueError where it is no such file or a damaged one."""
        settle(path.parent, path.name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file; clipft embed writes one")
        try:
            return _read_npy(path) if _suffix(path) == ".npy" else _read_parquet(path)
        except (pa.ArrowException, KeyError, TypeError, json.JSONDecodeError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: expected a file that clipft embed wrote ({error})") from error

    def write(self, path: Path) -> None:
        """The old file stays until the new one is whole; so with the two of ``.npy``."""
        if _suffix(path) == ".npy":
            beside = _sidecar(path).name
            with replace_set(path.parent, beside, tag=path.name) as staging:
                np.save(staging / path.name, self.vectors)
                write_json(staging / beside, {"ids": self.ids, **asdict(self.description)})
        else:
            with writing(path) as staged:
                pq.write_table(self._table(), staged)

    def _table(self) -> pa.Table:
        flat = pa.array(np.ascontiguousarray(self.vectors, np.float32).reshape(-1))
        columns = [pa.array(self.ids, pa.string()), pa.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1])]
        table = pa.table(columns, names=["id", "embedding"])
        return table.replace_schema_metadata({_KEY: json.dumps(asdict(self.description)).encode()})


def _read_parquet(path: Path) -> VectorFile:
    table = pq.read_table(path)
    vectors = table.column("embedding").combine_chunks()
    matrix = vectors.flatten().to_numpy().reshape(len(vectors), vectors.type.list_size)
    description = Description(**json.loads((table.schema.metadata or {})[_KEY]))
    return VectorFile(table.column("id").to_pylist(), matrix, description)


def _read_npy(path: Path) -> VectorFile:
    vectors = np.load(path, allow_pickle=False)
    beside = json.loads(_sidecar(path).read_text(encoding="utf-8"))
    ids = beside.pop("ids")
    if beside.pop("files", None) is not None:
        check_set(path.parent, _sidecar(path).name)
    if vectors.ndim != 2 or len(ids) != len(vectors):
        raise ValueError(f"{len(ids)} ids for an array of shape {list(vectors.shape)}")
    return VectorFile(ids, vectors, Description(**beside))


def _suffix(path: Path) -> str:
    if path.suffix not in (".parquet", ".npy"):
        raise ValueError(f"{path}: expected a name that ends in .parquet or .npy")
    return path.suffix


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


# ---- writing, with a way back in ----


def embed_to_file(
    encoder: Encoder,
    rows: Any,
    ids: Sequence[str],
    path: Path,
    description: Description,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    skip: bool = False,
    restart: bool = False,
    done: Callable[[int], object] = lambda count: None,
) -> list[int]:
    """Write the vectors of ``rows`` (a list of texts or of paths, or a data set with the column ``image``) to ``path``.

    Args:
        skip: leave pictures out that cannot be read, instead of an error.
        restart: forget what an earlier, interrupted run left.
        done: called with a number of rows whenever so many more are.

    Returns:
        The numbers of the rows left out.

    Raises:
        ValueError: an interrupted run of other rows or another model left its shards beside ``path``.
        BlockingIOError: another process is writing the same file.
    """
    _suffix(path)
    parts = path.with_name(f".{path.name}.parts")
    drop_link(parts)
    with locked(parts):
        if restart:
            empty(parts)
        _claim_shards(parts, {**asdict(description), "rows": len(ids), "ids": _digest_of(ids)})
        run = _Run(batch_size, num_workers, skip, done)
        vectors = _join_shards(list(_shards(encoder, rows, ids, parts, description.kind, run)))
        good: Any = ~np.isnan(vectors).all(axis=1)
        if not good.any():
            raise ValueError(f"{description.source}: expected at least one row that can be read, found none")
        kept = [name for name, own in zip(ids, good.tolist(), strict=True) if own]
        VectorFile(kept, vectors[good], description).write(path)
        shutil.rmtree(parts)
    return [row for row, own in enumerate(good.tolist()) if not own]


def _digest_of(ids: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(ids).encode(), digest_size=16).hexdigest()


def _claim_shards(parts: Path, work: dict[str, Any]) -> None:
    """Take the folder of shards, or find it to be of the same work."""
    file = parts / "work.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name, value in work.items() if before.get(name) != value]
        if other:
            raise ValueError(
                f"{parts}: an interrupted run is there, whose {' and '.join(other)} differ; --restart forgets it"
            )
        return
    empty(parts)  # of a run that was killed as it cleared up
    write_json(file, work)


@dataclass(frozen=True)
class _Run:
    """How pictures are gone through."""

    batch_size: int
    num_workers: int
    skip: bool
    done: Callable[[int], object]


def _shards(encoder: Encoder, rows: Any, ids: Sequence[str], parts: Path, kind: str, run: _Run) -> Iterator[Path]:
    """Those that an earlier run left, and those that are still to be written."""
    for number, start in enumerate(range(0, len(ids), SHARD)):
        shard, chosen = parts / f"{number:06d}.npy", slice(start, start + SHARD)
        if shard.exists():
            run.done(len(ids[chosen]))
        else:
            part = rows[chosen] if isinstance(rows, list) else rows.select(range(len(ids))[chosen])
            encoded = _encode(encoder, part, ids[chosen], kind, run)
            with writing(shard) as staged:
                np.save(staged, encoded)
        yield shard


def _encode(encoder: Encoder, rows: Any, names: Sequence[str], kind: str, run: _Run) -> Array:
    """[rows, D]; NaN for what was left out."""
    if kind == "texts":
        vectors = encoder.texts(rows)
        run.done(len(rows))
        return vectors
    found: list[Array] = []
    good: list[bool] = []
    for vectors, own in encode_pictures(encoder, rows, run.batch_size, run.num_workers, names=names, skip=run.skip):
        found += [vectors] if len(vectors) else []
        good += own
        run.done(len(own))
    result = np.full((len(names), found[0].shape[1] if found else 1), np.nan, np.float32)
    if found:
        result[np.array(good)] = np.concatenate(found)
    return result


def _join_shards(shards: Sequence[Path]) -> Array:
    found = []
    for shard in shards:
        try:
            found.append(np.load(shard, allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{shard}: damaged ({error}); --restart begins again") from error
    dim = max((part.shape[1] for part in found), default=1)
    return np.concatenate([part if part.shape[1] == dim else np.full((len(part), dim), np.nan) for part in found])


# ---- searching ----


def search(index: Any, queries: Any, k: int = 5) -> tuple[Tensor, Tensor]:
    """The nearest vectors by inner product, exactly, through faiss.

    Args:
        index: [N, D] vectors, as :func:`clipft.embed` gives them, or the path of a file that ``clipft embed`` wrote.
        queries: [Q, D] vectors of the same model.
        k: how many.

    Returns:
        Scores [Q, min(k, N)] float32, best first, and indices [Q, min(k, N)] int64.

    Raises:
        ImportError: faiss is not installed.
        ValueError: shapes that do not fit, no vectors, NaN or Inf, or ``k`` below 1.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("searching needs faiss: pip install 'clipft[search]'") from error

    vectors = VectorFile.read(Path(index)).vectors if isinstance(index, (str, Path)) else _matrix("index", index)
    wanted = _matrix("queries", queries)
    if not len(vectors):
        raise ValueError("index: expected at least one vector, got none")
    if wanted.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"queries: expected vectors of the index's {vectors.shape[1]} dimensions, got {wanted.shape[1]}: another "
            "model's"
        )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {k!r}")
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    scores, indices = flat.search(wanted, min(k, len(vectors)))
    return torch.from_numpy(scores), torch.from_numpy(indices)


def _matrix(name: str, value: Any) -> Array:
    array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
    if array.ndim != 2:
        raise ValueError(f"{name}: expected vectors [N, D], got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or Inf")
    return cast(Array, np.ascontiguousarray(array, np.float32))
