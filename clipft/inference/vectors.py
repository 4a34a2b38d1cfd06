"""Files of vectors, and searching them.

A file is Parquet (columns ``id`` and ``embedding``) or ``.npy`` with the ids in ``NAME.npy.json`` beside it; either way
with a description: which model, of what. ``embed_to_file`` works in shards in a folder beside the file, each of which
appears whole, so that it goes on after an interruption where it was; the file itself appears when all is done. Folders
of ``img_emb_0.npy`` and the like, as clip-retrieval writes them, are read too.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipft.data.compact import Lazy
from clipft.data.parquet import read_table
from clipft.data.rows import stored_images
from clipft.errors import line_of
from clipft.files import check_set, read_json, replace_set, settle, write_json, writing
from clipft.inference.encode import Encoder, batches_of, encode_pictures, finite
from clipft.inference.npy import load_npy
from clipft.inference.shards import Shards, claimed, digest_of_texts, states

__all__ = ["Description", "VectorFile", "embed_to_file", "search"]

Array = NDArray[np.float32]
_KEY = b"clipft"
_GROUP = 8  # shards that are in memory together, and make a row group
_NAMES = ("id", "image_path", "key", "url", "caption")  # columns of others' metadata, the first that is there


@dataclass(frozen=True)
class Description:
    """What the vectors of a file are."""

    kind: str  # images or texts
    model: str
    identity: str  # of the model's weights and preprocessing
    source: str  # where the pictures are
    options: dict[str, str] | None = None  # how that was read: split, columns, encoding
    left_out: list[str] = field(default_factory=list)  # rows of it that are not in the file


@dataclass(frozen=True)
class VectorFile:
    """Ids, [N, D] float32 vectors, and what they are."""

    ids: list[str]
    vectors: Array
    description: Description

    @staticmethod
    def read(path: Path) -> VectorFile:
        """A file that clipft wrote, or a folder of clip-retrieval's, with the ids of its metadata, else FILE:ROW.

        Raises:
            FileNotFoundError: there is none. ValueError: it is something else, or damaged.
        """
        if path.is_dir():
            return _read_folder(path)
        settle(path.parent, path.name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file; clipft embed writes one")
        try:
            file = _read_npy(path) if _suffix(path) == ".npy" else _read_parquet(path)
            return replace(file, vectors=_matrix("vectors", file.vectors))
        except Exception as error:
            raise _named(path, "a file that clipft embed wrote", error) from error

    def write(self, path: Path) -> None:
        """The old file stays until the new one is whole; so with the two of ``.npy``."""
        _write(path, self.ids, [self.vectors], self.vectors.shape[1], self.description)


def _write(path: Path, ids: Sequence[str], parts: Iterable[Array], dim: int, description: Description) -> None:
    """As :meth:`VectorFile.write`, of vectors that come a few at a time."""
    if _suffix(path) == ".npy":
        beside = _sidecar(path).name
        with replace_set(path.parent, beside, tag=path.name) as staging:
            with (staging / path.name).open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), dim)}
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(np.ascontiguousarray(part, "<f4").data)
            write_json(staging / beside, {"ids": list(ids), **asdict(description)})
        return
    fields = [("id", pa.string()), ("embedding", pa.list_(pa.float32(), dim))]
    schema = pa.schema(fields, {_KEY: json.dumps(asdict(description)).encode()})
    start = 0
    with writing(path) as staged, pq.ParquetWriter(staged, schema) as file:
        for part in parts:
            flat = pa.array(np.ascontiguousarray(part, np.float32).reshape(-1))
            columns = [pa.array(list(ids[start : start + len(part)]), pa.string())]
            columns.append(pa.FixedSizeListArray.from_arrays(flat, dim))
            file.write_table(pa.table(columns, schema=schema))
            start += len(part)


def _read_parquet(path: Path) -> VectorFile:
    table = read_table(path)
    description = _description(json.loads((table.schema.metadata or {})[_KEY]))
    return VectorFile(_checked_ids(table.column("id").to_pylist()), _rows_of(table.column("embedding")), description)


def _named(path: Path, expected: str, error: Exception) -> Exception:
    """In a line, whatever numpy's, pyarrow's and JSON's parsers raise; but what the disk says is no damage."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return ValueError(f"{path}: expected {expected} ({line_of(error)})")


def _rows_of(column: pa.ChunkedArray) -> Array:
    """[N, D] of a column of lists of one length."""
    lists = column.combine_chunks()
    if not pa.types.is_fixed_size_list(lists.type) or not pa.types.is_floating(lists.type.value_type):
        raise ValueError(f"expected vectors in column 'embedding', got {lists.type}")
    if lists.null_count or lists.flatten().null_count:
        raise ValueError("expected vectors in column 'embedding', some are missing")
    return cast(Array, lists.flatten().to_numpy().reshape(len(lists), lists.type.list_size))


def _read_npy(path: Path) -> VectorFile:
    if not _sidecar(path).is_file():
        raise ValueError(f"there is no {_sidecar(path).name} beside it; of vectors that others wrote, give the folder")
    vectors, beside = load_npy(path), read_json(_sidecar(path))
    if beside.pop("files", None) is not None:
        check_set(path.parent, _sidecar(path).name)
    try:
        ids, description = _checked_ids(beside.pop("ids")), _description(beside)
    except Exception as error:
        raise ValueError(f"in {_sidecar(path).name}: {line_of(error)}") from error
    if len(ids) != len(vectors):
        raise ValueError(f"{len(ids)} ids in {_sidecar(path).name} for an array of shape {list(vectors.shape)}")
    return VectorFile(ids, vectors, description)


def _checked_ids(ids: Any) -> list[str]:
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ValueError("expected ids that are texts")
    return ids


def _description(values: Any) -> Description:
    found = Description(**values)
    texts = [found.kind, found.model, found.identity, found.source, *found.left_out]
    options = {} if found.options is None else found.options
    if not isinstance(options, dict) or not all(
        isinstance(text, str) for text in [*texts, *options, *options.values()]
    ):
        raise ValueError("expected a description of texts")
    return found


def _read_folder(folder: Path) -> VectorFile:
    """clip-retrieval's: ``img_emb/img_emb_0.npy`` (or ``text_emb``), ``metadata/metadata_0.parquet`` beside."""
    own = next((folder / name for name in ("img_emb", "text_emb") if (folder / name).is_dir()), folder)
    files = sorted(own.glob("*.npy"), key=lambda path: (_number_of(path), path.name))
    if not files:
        raise ValueError(f"{folder}: expected .npy files in it or in its img_emb, found none")
    ids: list[str] = []
    parts = []
    for file in files:
        try:
            parts.append(_matrix("vectors", load_npy(file)))
            ids += _ids_beside(file, len(parts[-1]))
            if parts[-1].shape[1] != parts[0].shape[1]:
                raise ValueError(
                    f"expected {parts[0].shape[1]} dimensions, as {files[0].name} has, got {parts[-1].shape[1]}"
                )
        except Exception as error:
            raise _named(file, "an array of vectors", error) from error
    vectors = np.concatenate(parts)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    kind = "texts" if own.name == "text_emb" else "images"
    return VectorFile(ids, vectors, Description(kind, "", "", str(folder.resolve())))


def _number_of(path: Path) -> int:
    found = re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else -1


def _ids_beside(file: Path, rows: int) -> list[str]:
    """What the metadata calls the rows of a file of vectors."""
    found = re.search(r"\d+$", file.stem)
    metadata = file.parent.parent / "metadata" / f"metadata_{found[0] if found else ''}.parquet"
    if not metadata.is_file():
        return [f"{file.name}:{row}" for row in range(rows)]
    table = read_table(metadata)
    column = next((name for name in _NAMES if name in table.column_names), None)
    if len(table) != rows or column is None:
        raise ValueError(f"{metadata.name} has {len(table)} rows for {rows} vectors, of {table.column_names}")
    return [str(name) for name in table.column(column).to_pylist()]


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
    names: Sequence[str] | None = None,
    skip: bool = False,
    restart: bool = False,
    done: Callable[[int], object] = lambda count: None,
) -> list[int]:
    """Write the vectors of ``rows`` (a list of texts or of paths, or a data set with the column ``image``) to ``path``.

    Args:
        ids: of the rows; several may have the same.
        names: what errors call the rows; default: their ids.
        skip: leave pictures out that cannot be read, instead of an error.
        restart: forget what an earlier, interrupted run left.
        done: called with a number of rows whenever so many more are.

    Returns:
        The numbers of the rows left out.

    Raises:
        ValueError: an interrupted run of other rows, pictures or another model left its shards beside ``path``, or the
            model gives NaN.
        BlockingIOError: another process is writing the same file.
    """
    _suffix(path)
    images = () if description.kind == "texts" else stored_images(rows)
    work = {"rows": len(ids), "ids": digest_of_texts(ids), "pictures": digest_of_texts(states(images))}
    names = ids if names is None else names
    encode = partial(_encode, encoder, rows, names, description.kind, (batch_size, num_workers, skip))
    with claimed(path, {**asdict(description), **work}, restart=restart) as parts:
        shards = list(Shards(parts, len(ids), ".npy", encode, _write_shard, done))
        looked = [(_good(vectors), vectors.shape[1]) for vectors in map(_read_shard, shards)]
        good, dim = np.concatenate([own for own, _ in looked]), max(own for _, own in looked)
        if not good.any():
            raise ValueError(f"{description.source}: expected at least one row that can be read, found none")
        kept = Lazy(ids.__getitem__, array("q", np.flatnonzero(good)))
        left_out = np.flatnonzero(~good).tolist()
        described = replace(description, left_out=[*description.left_out, *(names[row] for row in left_out)])
        _write(path, kept, _joined(shards), dim, described)
    return left_out


def _encode(
    encoder: Encoder,
    rows: Any,
    names: Sequence[str],
    kind: str,
    how: tuple[int, int, bool],
    parts: Sequence[range],
) -> Iterator[tuple[Array, list[str | None]]]:
    """Vectors, and what is wrong with the rest, batch by batch; no batch is of two parts."""
    if kind == "texts":
        for part in parts:
            texts = rows[part.start : part.stop]
            yield finite(encoder.texts(texts), texts), [None] * len(texts)
        return
    size, workers, skip = how
    batches = batches_of(parts, size)
    yield from encode_pictures(encoder, rows, size, workers, names=names, skip=skip, batches=batches)


def _write_shard(file: Path, rows: range, vectors: Array, faults: list[str | None]) -> None:
    """[rows, D]; NaN for what was left out."""
    result = np.full((len(rows), vectors.shape[1]), np.nan, np.float32)
    result[np.array([fault is None for fault in faults])] = vectors
    np.save(file, result)


def _read_shard(shard: Path) -> Array:
    try:
        return load_npy(shard)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{shard}: damaged ({error}); --restart begins again") from error


def _good(vectors: Array) -> NDArray[np.bool_]:
    """[rows], of what :func:`_write_shard` wrote."""
    return cast(NDArray[np.bool_], ~np.isnan(vectors).all(axis=1))


def _joined(shards: Sequence[Path]) -> Iterator[Array]:
    """The vectors that are good, many shards at a time."""
    for start in range(0, len(shards), _GROUP):
        found = [vectors[_good(vectors)] for vectors in map(_read_shard, shards[start : start + _GROUP])]
        found = [vectors for vectors in found if len(vectors)]  # one without any knows no dimension
        if found:
            yield np.concatenate(found)


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
