"""Sources of many rows take little memory: what a row costs, as it is read and afterwards."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from clipft.data.compact import Lazy, Paths, RowNames, Texts, texts_of
from clipft.data.kept import kept_rows
from clipft.data.reading import Reading
from clipft.data.sources import read_pairs
from clipft.inference.encode import Encoder
from clipft.inference.vectors import Description, VectorFile, embed_to_file

ROWS, MOST = 8_000, 200  # bytes a row, the letters of its path and of its id among them
AT_ONCE = 2 << 20  # bytes of rows that are looked at together


class Memory:
    """Bytes that are held more than at the beginning, of Python and of Arrow, and the most that Python held."""

    def __init__(self) -> None:
        gc.collect()
        self._arrow = pa.total_allocated_bytes()
        tracemalloc.start()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        gc.collect()
        now, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        arrow = pa.total_allocated_bytes() - self._arrow
        self.held, self.most = now + arrow, most + arrow


def source_of(kind: str, folder: Path) -> Path:
    Image.new("RGB", (4, 4)).save(folder / "0.png")
    if kind == "folder":
        (folder / "many").mkdir()
        for number in range(ROWS):
            (folder / "many" / f"{number:06d}.png").touch()
        return folder / "many"
    ids = [f"picture {number}" for number in range(ROWS)]
    if kind == "parquet":
        pa.parquet.write_table(pa.table({"image": ["0.png"] * ROWS, "id": ids, "other": ids}), folder / "t.parquet")
        return folder / "t.parquet"
    (folder / "t.csv").write_text("\n".join(["image,id,other", *(f"0.png,{name},something else" for name in ids)]))
    return folder / "t.csv"


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_a_row_takes_few_bytes(tmp_path: Path, kind: str) -> None:
    source = source_of(kind, tmp_path)
    read_pairs(source, None, Reading(pictures_only=True), "all")  # what is imported and made once
    reading = Reading(pictures_only=True, skip=True, id_column=None if kind == "folder" else "id")
    with Memory() as memory:
        rows = kept_rows(read_pairs(source, None, reading, "all"), reading)
        account = reading.line()
    assert (len(rows), account) == (ROWS, f"read {ROWS} of {ROWS}")
    assert rows.name(7) == ("000007.png" if kind == "folder" else "picture 7")
    assert memory.held < MOST * ROWS
    assert memory.most < MOST * ROWS + AT_ONCE


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_vectors_are_not_all_held_as_they_are_joined(tmp_path: Path, ending: str) -> None:
    rows, dim = 16_000, 64
    texts = [f"{row}" for row in range(rows)]

    def vectors(some: Any) -> Any:
        return np.repeat(np.array(some, np.float32)[:, None], dim, axis=1)

    encoder = Encoder(lambda _: None, vectors, vectors, lambda: "0")
    path, what = tmp_path / f"v{ending}", Description("texts", "m", "0", "s")
    with Memory() as memory:
        embed_to_file(encoder, texts, texts, path, what, batch_size=256)
    assert memory.most < rows * dim * 4  # bytes of all vectors
    found = VectorFile.read(path)
    assert found.ids == texts
    np.testing.assert_array_equal(found.vectors, vectors(texts))


def grown(kind: Any) -> Iterator[tuple[Any, list[str]]]:
    for count in (0, 1, 1024, 3000):
        texts = [f"é {number}" for number in range(count)]
        found = kind()
        for text in texts:
            found.append(Path(text) if kind is Paths else text)
        yield found, texts


@pytest.mark.parametrize("kind", [Texts, Paths])
def test_compact_texts_are_lists_of_them(kind: Any) -> None:
    for found, texts in grown(kind):
        wanted = [Path(text) for text in texts] if kind is Paths else texts
        assert (list(found), len(found), found[-3:]) == (wanted, len(wanted), wanted[-3:])
        assert [found[row] for row in range(0, len(wanted), 997)] == wanted[::997]
        with pytest.raises(IndexError):
            found[len(wanted)]


def test_compact_texts_are_a_column_and_hold_names_that_are_no_text() -> None:
    odd = Texts(["a", "caf\udce9"])
    assert list(odd) == ["a", "caf\udce9"] and odd[1] == "caf\udce9"
    for found, texts in grown(Texts):
        assert found.arrow().to_pylist() == texts
        dataset = datasets.Dataset.from_dict({"id": texts}, datasets.Features({"id": datasets.Value("string")}))
        assert list(texts_of(dataset, "id")) == texts
        if len(texts) > 4:
            few = texts_of(dataset.select([4, 2]), "id")
            assert [few[0], few[1]] == [texts[4], texts[2]]


def test_names_of_rows_and_what_is_made_of_numbers() -> None:
    names = RowNames()
    for file, number in (("a.csv", 0), ("a.csv", 2), ("b.csv", 0)):
        names.append(file, number)
    assert list(names) == ["a.csv, row 0", "a.csv, row 2", "b.csv, row 0"] and names[1:] == list(names)[1:]
    lazy = Lazy(names.__getitem__, [2, 0])
    assert list(lazy) == ["b.csv, row 0", "a.csv, row 0"] and list(lazy[1:]) == ["a.csv, row 0"]
