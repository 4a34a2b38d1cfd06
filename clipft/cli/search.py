"""Commands over pictures as vectors: ``clipft embed`` and ``clipft search``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipft.cli.common import Workers, app, examples, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.files import check_output
from clipft.recipes.options import DataOptions, options_from

if TYPE_CHECKING:
    from clipft.data.reading import Reading

AnyModel = Annotated[
    str, typer.Option("--model", help="As for evaluate, or a folder that clipft export wrote, which ONNX Runtime runs.")
]
Int8 = Annotated[bool, typer.Option("--int8", help="Of an ONNX folder, take the int8 encoders.")]


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
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")] = False,
    **options: Any,
) -> None:
    """Turn pictures or texts to vectors in a file; goes on where an interrupted run was."""
    if (data is None) == (texts is None):
        raise ValueError("--data, --texts: expected one of the two")
    check_output(output)
    console = prepare()
    from clipft.console import bar
    from clipft.data.reading import UNREADABLE_KIND
    from clipft.inference.encode import load_encoder
    from clipft.inference.vectors import Description, embed_to_file
    from clipft.recipes.sources import reading_of

    settings = options_from(DataOptions, options)
    reading = reading_of(settings)
    reading.source = str(data)
    if texts is not None:
        rows, ids = _read_texts(texts, settings.encoding)
    else:
        rows, ids = _read_pictures(str(data), settings.split, reading)
    encoder = load_encoder(model, int8=int8, batch_size=batch_size)
    source = str(texts if texts is not None else data)
    source = str(Path(source).expanduser().resolve()) if Path(source).expanduser().exists() else source
    description = Description("texts" if texts is not None else "images", model, encoder.identity(), source)
    with bar(console) as progress:
        task = progress.add_task("embedding", total=len(ids))
        left_out = embed_to_file(
            encoder,
            rows,
            ids,
            output,
            description,
            batch_size=batch_size,
            num_workers=workers,
            skip=reading.skip,
            restart=restart,
            done=lambda count: progress.advance(task, count),
        )
    if left_out:
        console.print(f"{len(left_out)} of {len(ids)} pictures cannot be read and were left out")
    if data is not None:
        for row in left_out:
            reading.leave_out_row(row, UNREADABLE_KIND, ids[row])
        reading.keep(sorted(set(range(len(ids))) - set(left_out)))
        console.print(Text(f"{data}: {reading.line()}"))
    console.print(f"{len(ids) - len(left_out)} vectors in {output}", highlight=False)


def _read_texts(path: Path, encoding: str | None) -> tuple[list[str], list[str]]:
    from clipft.data.text_tables import read_text_lines

    texts = read_text_lines(path, encoding)
    if not texts:
        raise ValueError(f"{path}: expected a text a line, found none")
    return texts, texts


def _read_pictures(data: str, split: str | None, reading: Reading) -> tuple[Any, list[str]]:
    from clipft.data.pictures import picture_endings
    from clipft.data.splits import TABLE_ENDINGS

    folder = Path(data).expanduser()
    if (
        split is None
        and folder.is_dir()
        and not any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    ):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in picture_endings())
        if paths:
            ids = [str(path.relative_to(folder)) for path in paths]
            reading.places = [[name] for name in ids]
            return paths, ids
        if not any(path.suffix.lower() in (*TABLE_ENDINGS, ".tar") for path in folder.rglob("*")):
            raise ValueError(f"--data: expected pictures in {folder}, found none")
    from clipft.data.sources import read_pairs

    rows = read_pairs(data, split, reading, "all")
    return rows, [str(number) for number in range(len(rows))]


@app.command(epilog=examples('clipft search --index pictures.parquet --model run --text "a red apple" -k 10'))
@user_errors
def search(
    *,
    index: Annotated[Path, typer.Option(help="A file of pictures that clipft embed wrote.")],
    model: AnyModel,
    text: Annotated[list[str] | None, typer.Option(help="A query in words; repeat for several.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture as a query; repeat for several.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits of a query.")] = 5,
    output: Annotated[Path | None, typer.Option(help="PNG with the hits' pictures.")] = None,
    int8: Int8 = False,
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
    encoder = load_encoder(model, int8=int8)
    if encoder.identity() != file.description.identity:
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
        _write_sheet(output, [*(text or ()), *(image or ())], found, file.description.source)
        console.print(f"pictures in {output}", highlight=False)


def _print_hits(queries: list[str], found: list[list[tuple[str, float]]], console: Console) -> None:
    for query, hits in zip(queries, found, strict=True):
        table = Table("", "score", "id", title=query, title_justify="left")
        for place, (name, score) in enumerate(hits):
            table.add_row(str(place + 1), f"{score:.3f}", name)
        console.print(table)


def _write_sheet(path: Path, queries: list[Any], found: list[list[tuple[str, float]]], source: str) -> None:
    try:
        from clipft.report.sheet import Row, draw_sheet
    except ImportError as error:
        raise ImportError(f"the sheet needs {error.name}: pip install 'clipft[search]'") from error
    from clipft.data.pictures import open_picture

    picture = _pictures_of(source)
    rows = [
        Row(
            query if isinstance(query, str) else open_picture(query),
            [(name, score, picture(name)) for name, score in hits],
        )
        for query, hits in zip(queries, found, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(path, rows)


def _pictures_of(source: str) -> Callable[[str], Any]:
    """From an id to its picture, or None where that is not to be had any more."""
    from clipft.data.pictures import UNREADABLE, open_picture

    def from_folder(name: str) -> Any:
        try:
            return open_picture(Path(source) / name)
        except UNREADABLE:
            return None

    if Path(source).is_dir():
        return from_folder
    from clipft import load_pairs

    try:
        rows = load_pairs(source)
    except (OSError, ValueError):
        return lambda name: None
    return lambda name: rows[int(name)]["image"] if name.isdecimal() and int(name) < len(rows) else None
