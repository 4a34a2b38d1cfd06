"""The data sets of a recipe: read as its options say, each with its account said and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from clipft.data.classes import checked_classes, classes_of, read_class_names, renamed
from clipft.data.columns import checked_attributes
from clipft.data.kept import KeptRows, kept_rows, rows_of_objects
from clipft.data.objects import object_name
from clipft.data.pictures import limit_pixels
from clipft.data.reading import Reading
from clipft.data.sources import load_reading, read_pairs
from clipft.data.text_tables import checked_encoding
from clipft.recipes.options import DataOptions, ScoringOptions

__all__ = ["Sources", "kept_pictures", "name_of", "named_by", "reading_of"]


def reading_of(options: DataOptions, attributes: Sequence[str] = ()) -> Reading:
    """How the options say that data is read. The most pixels are those of the process from now on."""
    limit_pixels(options.max_pixels)
    return Reading(
        named=(options.image_column, options.caption_column, options.label_column),
        skip=options.on_bad_row == "skip",
        allow_outside=options.allow_outside,
        attributes=checked_attributes(attributes),
        encoding=checked_encoding(options.encoding),
    )


def name_of(data: Any) -> str:
    """For messages and the report: a source as it was given, else what it is."""
    return str(data) if isinstance(data, (str, Path)) else object_name(data)


@contextmanager
def named_by(option: str) -> Iterator[None]:
    """What is wrong with a source is said of the option that gave it."""
    try:
        yield
    except (ValueError, OSError) as error:
        before, name, rest = str(error).partition("path_or_name: ")
        if before or not name:
            raise
        raise type(error)(f"{option}: {rest}") from error


def kept_pictures(
    option: str, data: Any, options: DataOptions, console: Console, id_column: str | None = None
) -> KeptRows:
    """The pictures of what ``option`` gave, in its order; but for ``on_bad_row="skip"`` each bad one in its place.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(data, (str, Path)):
        rows = rows_of_objects(data)
        if not len(rows):
            raise ValueError(f"{option}: expected at least one picture, got an empty {type(data).__name__}")
        return rows
    reading = reading_of(options)
    reading.skip, reading.pictures_only = options.on_bad_row != "error", True
    reading.id_column = id_column
    with named_by(option):
        found = read_pairs(data, options.split if option == "data" else None, reading, "all")
    if options.on_bad_row == "skip":
        reading.faults.clear()
    console.print(Text(f"{name_of(data)}: {reading.line()}"))
    return kept_rows(found, reading)


@dataclass
class Sources:
    """Reads what :func:`clipft.load_pairs` takes.

    Attributes:
        options: how.
        console: where each account goes, as a line.
        attributes: columns of classes beside image, caption and label.
        accounts: by the name of the option that gave the source (``data``, ``eval_data``, ...), for report.json.
    """

    options: ScoringOptions
    console: Console
    attributes: Sequence[str] = ()
    accounts: dict[str, Reading] = field(default_factory=dict)

    def rows(self, option: str, source: Any, *, purpose: str = "train", attributes: bool = True) -> Any:
        """The rows of a source that ``option`` gave.

        Args:
            option: by which it came; ``split`` is that of ``data``.
            source: as given.
            purpose: which split is read where none is named, as :func:`clipft.data.splits.chosen_split` has it.
            attributes: whether the columns of attributes are needed.
        """
        reading = reading_of(self.options, self.attributes if attributes else ())
        with named_by(option):
            rows = load_reading(source, reading, self.options.split if option == "data" else None, purpose)
        if option != "control_data":
            rows = renamed(rows, self._words, reading.source)
        self.accounts[option] = reading
        self.console.print(Text(f"{reading.source}: {reading.line()}"))
        return rows

    @cached_property
    def _words(self) -> dict[str, str]:
        given = self.options.class_names
        return {} if given is None else read_class_names(given, self.options.encoding)

    def classes(self, test: Any, others: Sequence[Any]) -> list[str] | None:
        """The names that a test set is scored against, as :func:`clipft.data.classes.classes_of` has it."""
        given = checked_classes(self.options.classes)
        return classes_of(test, others, given and [self._words.get(name, name) for name in given])

    def skipped(self) -> dict[str, Any]:
        """With ``on_bad_row="skip"``, why rows of each source were left out: ``skipped`` in report.json."""
        if self.options.on_bad_row != "skip":
            return {}
        found = {option: reading for option, reading in self.accounts.items() if option != "control_data"}
        sources = [own.source for own in found.values()]
        return {
            own.source if sources.count(own.source) == 1 else f"{option}, {own.source}": {
                "count": len(own.skipped),
                "rows": own.skipped,
            }
            for option, own in found.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The accounts, under ``reading`` in report.json."""
        return {option: reading.to_json() for option, reading in self.accounts.items()}
