"""Commands over pictures as vectors: ``clipft embed`` and ``clipft search``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipft.cli.common import AnyModel, Workers, app, examples, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.files import check_output, expanded
from clipft.recipes.options import DataOptions, options_from

if TYPE_CHECKING:
    from clipft.data.reading import Reading

Int8 = Annotated[bool, typer.Option("--int8", help="Of an ONNX folder, take the int8 encoders.")]
Threads = Annotated[int | None, typer.Option(min=1, help="That run the model; default: one a core that is free to us.")]


@app.command(epilog=examples("clipft embed --model run --data pictures/ --output pictures.parquet"))
@user_errors
@takes_options(DataOptions)
def embed(
    *,
    model: AnyModel,
    output: Annotated[Path, typer.Option(help="File to write: .parquet, or .npy with .npy.json beside it.")],
    data: Annotated[
        str | None, typer.Option(help="Folder of pictures (its sub-folders too), table, or data set's name.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="File with a text a line, in place of --data.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or texts at a time.")] = 64,
    workers: Workers = 0,
    int8: Int8 = False,
    threads: Threads = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of the ids; default: the pictures' paths, else SOURCE:ROW.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")] = False,
    **options: Any,
) -> None:
    """Turn pictures or texts to vectors in a file, one for each row; goes on where an interrupted run was."""
    if (data is None) == (texts is None):
        raise ValueError("--data, --texts: expected one of the two")
    check_output(output)
    settings = options_from(DataOptions, options)
    if texts is not None:
        _check_options_of_texts(settings, id_column)
    console = prepare()
    from clipft.console import bar
    from clipft.data.compact import Lazy, texts_of
    from clipft.inference.encode import load_encoder
    from clipft.inference.vectors import Description, embed_to_file

    reading, names = None, None
    ids: Sequence[str]
    source: tuple[str, dict[str, str] | None]
    if texts is not None:
        rows, ids = _read_texts(texts, settings.encoding)
        kind, source = "texts", (str(expanded(texts).resolve()), None)
    else:
        rows, reading = _read_pictures(str(data), settings, id_column)
        ids, names = texts_of(rows, "id"), Lazy(reading.place, range(len(rows)))
        kind, source = "images", _source_of(reading, settings)
    encoder = load_encoder(model, int8=int8, batch_size=batch_size, threads=threads)
    left_out = [] if reading is None else list(reading.skipped)
    description = Description(kind, model, encoder.identity(), *source, left_out)
    with bar(console, rate="texts/s" if reading is None else "pictures/s") as progress:
        task = progress.add_task("embedding", total=len(ids))
        unreadable = embed_to_file(
            encoder,
            rows,
            ids,
            output,
            description,
            batch_size=batch_size,
            num_workers=workers,
            names=names,
            skip=settings.on_bad_row == "skip",
            restart=restart,
            done=lambda count: progress.advance(task, count),
        )
    _say_what_was_left_out(console, data, reading, unreadable, len(ids))
    console.print(f"{len(ids) - len(unreadable)} vectors in {output}", highlight=False)


def _check_options_of_texts(settings: DataOptions, id_column: str | None) -> None:
    """That nothing was asked of a file of texts that only pictures have."""
    own = {field.name: field.default for field in fields(DataOptions) if field.name != "encoding"}
    given = [name for name, default in own.items() if getattr(settings, name) != default]
    given += [] if id_column is None else ["id_column"]
    if given:
        raise ValueError(f"{given[0]}: is about --data; --texts takes --encoding alone")


def _say_what_was_left_out(
    console: Console, data: str | None, reading: Reading | None, unreadable: list[int], rows: int
) -> None:
    import numpy as np

    from clipft.data.reading import UNREADABLE_KIND

    if unreadable:
        console.print(f"{len(unreadable)} of {rows} pictures cannot be read and were left out")
    if reading is not None:
        for row in unreadable:
            reading.leave_out_row(row, UNREADABLE_KIND, reading.place(row))
        if unreadable:
            reading.keep(np.delete(np.arange(rows), unreadable).tolist())
        console.print(Text(f"{data}: {reading.line()}"))


def _read_texts(path: Path, encoding: str | None) -> tuple[list[str], list[str]]:
    from clipft.data.text_tables import read_text_lines

    texts = read_text_lines(path, encoding)
    if not texts:
        raise ValueError(f"{path}: expected a text a line, found none")
    return texts, texts


def _read_pictures(data: str, settings: DataOptions, id_column: str | None) -> tuple[Any, Reading]:
    """A row for each that the source has, of ``image`` and ``id``."""
    from clipft.data.sources import read_pairs
    from clipft.recipes.sources import reading_of

    reading = reading_of(settings)
    reading.pictures_only, reading.id_column = True, id_column
    return read_pairs(data, settings.split, reading, "all"), reading


def _source_of(reading: Reading, settings: DataOptions) -> tuple[str, dict[str, str] | None]:
    """Of a description: where the rows are, and how they were read."""
    path = expanded(reading.source)
    how = {
        "split": reading.split or settings.split,
        "image_column": settings.image_column,
        "encoding": settings.encoding,
        "id_column": reading.id_column,
    }
    options = {name: value for name, value in how.items() if value is not None}
    return str(path.resolve()) if path.exists() else reading.source, options


@app.command(epilog=examples('clipft search --index pictures.parquet --model run --text "a red apple" -k 10'))
@user_errors
def search(
    *,
    index: Annotated[Path, typer.Option(help="A file that clipft embed wrote, or a folder of clip-retrieval's.")],
    model: AnyModel,
    text: Annotated[list[str] | None, typer.Option(help="A query in words; repeat for several.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture as a query; repeat for several.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits of a query.")] = 5,
    output: Annotated[Path | None, typer.Option(help="PNG with the hits' pictures.")] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside-paths", help="Open pictures outside of the folder that was embedded.")
    ] = False,
    int8: Int8 = False,
    threads: Threads = None,
) -> None:
    """Find the pictures (or texts) of a file that are nearest to words or pictures."""
    if not text and not image:
        raise ValueError("--text, --image: expected at least one query")
    if output is not None:
        check_output(output)
    console = prepare()
    import numpy as np

    from clipft.inference.encode import encode_pictures, load_encoder
    from clipft.inference.vectors import VectorFile
    from clipft.inference.vectors import search as search_vectors

    file = VectorFile.read(index)
    encoder = load_encoder(model, int8=int8, threads=threads)
    if not file.description.identity:
        console.print(f"{index} does not say which model its vectors are of: taken for those of {model}")
    elif encoder.identity() != file.description.identity:
        raise ValueError(
            f"--model: {index} was embedded with {file.description.model}, whose weights or preprocessing differ from "
            f"those of {model}; of an ONNX folder, --int8 chooses the encoders"
        )
    names = [str(path) for path in image or ()]
    vectors = [encoder.texts(list(text))] if text else []
    vectors += [rows for rows, _ in encode_pictures(encoder, list(image or ()), 64, names=names)]
    scores, indices = search_vectors(file.vectors, np.concatenate(vectors), k)
    queries = [*(text or ()), *names]
    found = [
        [(file.ids[number], score) for number, score in zip(row, own, strict=True)]
        for row, own in zip(indices.tolist(), scores.tolist(), strict=True)
    ]
    _print_hits(queries, found, console)
    if output is not None:
        pictures = _pictures_of(file.description.source, file.description.options, allow_outside)
        _write_sheet(output, [*(text or ()), *(image or ())], found, pictures)
        console.print(f"pictures in {output}", highlight=False)


def _print_hits(queries: list[str], found: list[list[tuple[str, float]]], console: Console) -> None:
    for query, hits in zip(queries, found, strict=True):
        table = Table("", "score", "id", title=query, title_justify="left")
        for place, (name, score) in enumerate(hits):
            table.add_row(str(place + 1), f"{score:.3f}", name)
        console.print(table)


def _write_sheet(
    path: Path, queries: list[Any], found: list[list[tuple[str, float]]], picture: Callable[[str], Any]
) -> None:
    try:
        from clipft.report.sheet import Row, draw_sheet
    except ImportError as error:
        raise ImportError(f"the sheet needs {error.name}: pip install 'clipft[search]'") from error
    from clipft.data.pictures import open_picture

    rows = [
        Row(
            query if isinstance(query, str) else open_picture(query),
            [(name, score, picture(name)) for name, score in hits],
        )
        for query, hits in zip(queries, found, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(path, rows)


def _pictures_of(
    source: str, options: dict[str, str] | None = None, allow_outside: bool = False
) -> Callable[[str], Any]:
    """From an id to its picture, or None where that is not to be had: a file in the folder of the source, or a row that
    reading the source again (``options``: how) gives that id. Nothing else is opened.
    """
    from clipft.data.pictures import UNREADABLE, open_picture
    from clipft.data.splits import existing

    root = existing(source)
    folder = None if root is None else (root if root.is_dir() else root.parent).resolve()
    rows: dict[str, Any] = {}

    def picture(name: str) -> Any:
        path = existing(folder / name) if folder is not None else None
        try:
            if path is not None and path.is_file():
                inside = allow_outside or (folder is not None and path.resolve().is_relative_to(folder))
                return open_picture(path) if inside else None
            if root is not None and not rows:
                rows.update(_rows_by_id(source, options, allow_outside))
            dataset, number = rows.get(name, (None, 0))
            return None if dataset is None else dataset[number]["image"]
        except UNREADABLE:
            return None

    return picture


def _rows_by_id(source: str, options: dict[str, str] | None, allow_outside: bool) -> dict[str, Any]:
    """Data set and row by id; a file of version 0.1 has numbers of rows for ids."""
    from clipft.data.sources import load_pairs

    how: dict[str, Any] = {"allow_outside": allow_outside, "on_bad_row": "skip"}
    try:
        if options is None:
            dataset: Any = load_pairs(source)
            return {str(row): (dataset, row) for row in range(len(dataset))}
        read = {name: value for name, value in options.items() if name in ("split", "image_column", "encoding")}
        dataset, _ = _read_pictures(source, options_from(DataOptions, how | read), options.get("id_column"))
        return {name: (dataset, row) for row, name in reversed(list(enumerate(dataset["id"])))}
    except (OSError, ValueError):
        return {}
