"""``clipft.anomaly``: what is not normal in pictures, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipft.console import bar, console_of_run, without_bars
from clipft.data.kept import KeptRows
from clipft.data.pictures import UNREADABLE, naming, open_picture, picture_endings
from clipft.data.rows import read_row
from clipft.errors import line_of, shown
from clipft.files import check_folder, check_output, check_places, writing
from clipft.inference.anomaly import PatchMemory
from clipft.inference.detector import Detector, States
from clipft.recipes.options import options_from
from clipft.recipes.options_anomaly import AnomalyOptions
from clipft.recipes.predictions import check_table, write_tables
from clipft.recipes.run import loaded, model_name
from clipft.recipes.sources import kept_pictures
from clipft.report.heat import overlay

__all__ = ["Anomalies", "PictureAnomaly", "anomaly", "check_options", "detector_of", "shaded"]

_SCHEMA = pa.schema([("image", pa.string()), ("score", pa.float64()), ("error", pa.string())])
_LISTED = 10
_DIGITS = 6  # of a score
_FAINT, _STRONG = 0.4, 0.7  # scores between which a map's colours are


@dataclass(frozen=True)
class PictureAnomaly:
    """A picture and what was found in it.

    Attributes:
        image: its path within ``data``, or SOURCE:ROW.
        score: in [0, 1], higher is less normal; None where the picture cannot be read.
        error: why it cannot.
        file: the ``.npy`` with the map, where ``maps`` names a folder.
    """

    image: str
    score: float | None
    error: str | None = None
    file: Path | None = None
    _map: Any = field(default=None, repr=False)

    @property
    def map(self) -> Any:
        """[H, W] float32 in [0, 1], a score for each of its pixels; None where it cannot be read."""
        return np.load(self.file, allow_pickle=False) if self._map is None and self.file is not None else self._map


class Anomalies(list[PictureAnomaly]):
    """One for each picture, in the order given."""

    def to_table(self) -> pa.Table:
        """The rows of ``output``, with ``image``, ``score`` and ``error``: ``.to_pandas()`` makes a frame of it."""
        return pa.Table.from_pylist([{name: getattr(row, name) for name in _SCHEMA.names} for row in self], _SCHEMA)


@without_bars()
def anomaly(
    model: Any,
    data: Any,
    output: str | Path | None = None,
    *,
    console: Console | None = None,
    **options: Any,
) -> Anomalies:
    """How far from normal pictures are, and where: the same as ``clipft anomaly``, with the same options.

    By normal pictures (``normal``, ``memory``): the distance of a picture's patches to those of normal ones (PatchCore,
    arXiv:2106.08265); by words (``normal_text`` and ``anomaly_text``): which it is nearer to (WinCLIP,
    arXiv:2303.14814). With both a score is the mean of the two. See :mod:`clipft.inference.anomaly`.

    Args:
        model: a folder, a hub name, ``"demo"``, ``(model, processor)`` or a :class:`clipft.recipes.run.Run`: a CLIP,
            MetaCLIP 2, Chinese-CLIP or SigLIP of a fixed size, in float or int8, with an adapter or without.
        data: pictures: a folder (its sub-folders too), a table or what else :func:`clipft.load_pairs` takes, or a list
            of PIL pictures or paths.
        output: ``.csv``, ``.jsonl`` or ``.parquet`` for a row of ``image``, ``score`` and ``error`` for each.
        console: where progress and the table go; default: standard output.
        options: fields of :class:`clipft.recipes.options_anomaly.AnomalyOptions`: ``normal`` (as ``data``), ``memory``,
            ``maps``, ``zoom``, ...

    Returns:
        A list with a :class:`PictureAnomaly` for each picture, in the order given: ``score`` in [0, 1], where 0.5 is as
        far from normal as the farthest of normal pictures, and ``map`` [H, W] of its pixels. Maps are in memory unless
        ``maps`` names a folder.

    Raises:
        TypeError: no such option. ValueError: neither normal pictures nor words, or words of one kind alone; too few
            normal pictures; a memory of another model; a model without patches; two pictures whose maps would have one
            name; the message names it. OSError: something cannot be written.
    """
    settings = options_from(AnomalyOptions, options)
    console = console or console_of_run()
    check_options(settings)
    check_table(output)
    rows = kept_pictures("data", data, settings, console)
    names = [rows.name(number) for number in range(len(rows))]
    files = None if settings.maps is None else _map_files(Path(settings.maps), names)
    clip, processor = loaded(model)
    detector = detector_of(clip, processor, settings, console, model_name(model))
    found = Anomalies()
    with bar(console) as progress:
        for number in progress.track(range(len(rows)), description="looking"):
            one = _look(detector, rows, number, None if files is None else files[number])
            if one.error is not None and settings.on_bad_row == "error":
                raise ValueError(one.error)
            if one.error is None or settings.on_bad_row == "keep":
                found.append(one)
    if output is not None:
        _write(Path(output), found)
    _show(found, len(rows), console)
    for place in (output, settings.maps):
        if place is not None:
            console.print(f"{'scores' if place is output else 'maps'} in {place}", highlight=False)
    return found


def detector_of(model: Any, processor: Any, settings: AnomalyOptions, console: Console, name: str = "") -> Detector:
    """What the options describe: a memory, which is fitted, read or extended and, if it has a file, written; words; or
    both.

    Raises:
        ValueError, OSError: see :func:`anomaly`.
    """
    memory, states = _memory_of(model, processor, settings, console, name), None
    if settings.normal_text and settings.anomaly_text:
        states = States(model, processor, settings.normal_text, settings.anomaly_text, zoom=settings.zoom)
    return Detector(model, processor, memory, states)


def check_options(settings: AnomalyOptions) -> None:
    """What can be told before the work.

    Raises:
        ValueError: the message names the option.
    """
    normal, words = settings.normal is not None, (settings.normal_text, settings.anomaly_text)
    for name, given, other in zip(("normal_text", "anomaly_text"), words, reversed(words), strict=True):
        if other and not given:
            raise ValueError(f"{name}: expected at least one text, as words say what is normal and what is not")
        if any(not isinstance(text, str) or not text.strip() for text in given or ()):
            raise ValueError(f"{name}: expected texts, got an empty one")
    if not (normal or settings.memory or words[0]):
        raise ValueError(
            "normal, memory, normal_text: expected normal pictures, a memory of them, or words for what is normal and "
            "what is not"
        )
    there = settings.memory is not None and Path(settings.memory).exists()
    if settings.memory is not None and not normal and not there:
        raise FileNotFoundError(f"memory: there is no {settings.memory}; with --normal it is written")
    if settings.extend and not (normal and there):
        raise ValueError("extend: expected a memory that is there and normal pictures to add to it")
    if there and normal and not settings.extend:
        raise ValueError(
            f"memory: {settings.memory} is there: leave normal away to use it, extend it (--extend), or remove it"
        )
    if settings.memory is not None and normal:
        check_output(Path(settings.memory))


def _memory_of(model: Any, processor: Any, settings: AnomalyOptions, console: Console, name: str) -> PatchMemory | None:
    if settings.normal is None and settings.memory is None:
        return None
    memory, path = None, None if settings.memory is None else Path(settings.memory)
    if path is not None and (settings.normal is None or settings.extend):
        memory = PatchMemory.load(path)
        memory.check(model, processor)
    if settings.normal is not None:
        normal = kept_pictures("normal", settings.normal, settings, console)
        with bar(console) as progress:
            every = _normal_pictures(normal, settings.on_bad_row == "skip", console)
            seen = progress.track(every, total=len(normal), description="normal pictures")
            if memory is None:
                how: dict[str, Any] = {"zoom": settings.zoom, "coreset": settings.coreset, "seed": settings.seed}
                memory = PatchMemory.fit(model, processor, seen, name=name, **how)
            else:
                memory = memory.extended(model, processor, seen)
        if path is not None:
            memory.save(path)
            console.print(f"{memory.line()}, in {path}", highlight=False)
    return memory


# ---- pictures ----


def _open(rows: KeptRows, number: int) -> Image.Image:
    """Raises:
    UnreadablePictureError: the message names the picture.
    """
    with naming(rows.name(number)):
        return open_picture(read_row(rows, number)["image"])


def _normal_pictures(rows: KeptRows, skip: bool, console: Console) -> Iterator[Image.Image]:
    """Every one, or the first one's error; with ``skip`` those that can be read."""
    bad = []
    for number in range(len(rows)):
        try:
            yield _open(rows, number)
        except UNREADABLE as error:
            if not skip:
                raise ValueError(f"normal: {line_of(error)}") from error
            bad.append(rows.name(number))
    if bad:
        console.print(Text(shown(f"{len(bad)} of {len(rows)} normal pictures cannot be read: {', '.join(bad[:5])}")))


def _look(detector: Detector, rows: KeptRows, number: int, files: Path | None) -> PictureAnomaly:
    name = rows.name(number)
    try:
        picture = _open(rows, number)
    except UNREADABLE as error:
        return PictureAnomaly(name, None, shown(line_of(error)))
    found = detector(picture)
    score = round(found.score, _DIGITS)
    if files is None:
        return PictureAnomaly(name, score, None, None, found.map)
    npy = files.with_name(f"{files.name}.npy")
    npy.parent.mkdir(parents=True, exist_ok=True)
    with writing(npy) as staged, staged.open("wb") as file:
        np.save(file, found.map)
    with writing(files.with_name(f"{files.name}.png")) as staged:
        shaded(picture, found.map, max(picture.size)).save(staged, format="png")
    return PictureAnomaly(name, score, None, npy)


# ---- what is written ----


def _write(path: Path, found: Anomalies) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_tables(path, _SCHEMA) as write:
        write(found.to_table())


def shaded(picture: Image.Image, found: NDArray[np.float32], longest: int) -> Image.Image:
    """A picture, at most ``longest`` pixels a side, under its map, in colours that mean the same for all pictures: none
    where it is as normal as most places of normal pictures, the strongest at twice the farthest of these.
    """
    return overlay(picture, (found - _FAINT) / (_STRONG - _FAINT), longest)


def _map_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """For each picture where its map goes, without the ending.

    Raises:
        ValueError: two have one place. OSError: the folder cannot be written into.
    """
    endings = picture_endings()
    stems = []
    for number, name in enumerate(names):
        path = PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..", ".")))
        path = path if path.name else PurePosixPath(f"row {number}")
        stems.append(path.with_suffix("") if path.suffix.lower() in endings else path)
    twice = [stem for stem, count in Counter(map(str, stems)).items() if count > 1]
    if twice:
        same = [name for name, stem in zip(names, stems, strict=True) if str(stem) == twice[0]]
        raise ValueError(
            f"maps: expected pictures with names of their own, {same[0]} and {same[1]} would both be {twice[0]}.npy: "
            "rename one"
        )
    check_folder(folder)
    check_places(folder, [f"{stem}{end}" for stem in stems for end in (".npy", ".png")])
    return [folder / stem for stem in stems]


def _show(found: Anomalies, rows: int, console: Console) -> None:
    """The pictures that are farthest from normal."""
    read = [row for row in found if row.score is not None]
    table = Table("score", "picture", title=f"least normal of {len(read)} pictures", title_justify="left")
    for row in sorted(read, key=lambda row: -(row.score or 0))[:_LISTED]:
        table.add_row(f"{row.score:.3f}", Text(shown(row.image)))
    console.print(table)
    if len(read) < rows:
        bad = next((f": {row.error}" for row in found if row.score is None), "")
        console.print(Text(f"{rows - len(read)} of {rows} pictures cannot be read{bad}"))
