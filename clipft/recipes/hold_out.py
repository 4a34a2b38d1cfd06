"""Which rows are held out of training: drawn by class, or those that earlier runs of the model held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from clipft.data.digests import DIGEST
from clipft.data.rows import class_names_of
from clipft.errors import line_of, listed
from clipft.files import writing
from clipft.models.formats import SEEN_ROWS

__all__ = ["Seen", "Split", "split_rows"]


# ---- what earlier runs did with which pictures ----


@dataclass(frozen=True)
class Seen:
    """Digests of the pictures that a model's runs so far trained on, chose by, and tested on."""

    train: frozenset[bytes] = frozenset()
    validation: frozenset[bytes] = frozenset()
    test: frozenset[bytes] = frozenset()

    @classmethod
    def of_model(cls, folder: Path) -> Seen:
        """By the model's folder, or a checkpoint's; of a model that clipft has not trained: none.

        Raises:
            ValueError: the file that says so is damaged.
        """
        places = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
        path = next((place / SEEN_ROWS for place in places if (place / SEEN_ROWS).is_file()), None)
        if path is None:
            return cls()
        try:
            tables = load_file(path)
            kinds = {name: (str(table.dtype), table.shape[1:]) for name, table in tables.items()}
            if odd := [name for name, kind in kinds.items() if kind != ("uint8", (DIGEST,))]:
                raise ValueError(f"expected digests of {DIGEST} bytes in {listed(odd)}")
            return cls(*(frozenset(row.tobytes() for row in tables[field.name]) for field in fields(cls)))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: says what the model was trained and tested on, and cannot be read ({line_of(error)}): remove "
                "it to hold rows out anew"
            ) from error

    def save(self, folder: Path) -> None:
        """For the next run: beside a model, or in a folder of checkpoints."""
        parts = {field.name: b"".join(sorted(getattr(self, field.name))) for field in fields(self)}
        tables = {name: np.frombuffer(part, np.uint8).reshape(-1, DIGEST) for name, part in parts.items()}
        with writing(folder / SEEN_ROWS) as staged:
            save_file(tables, staged)

    def then(self, train: Iterable[bytes], validation: Iterable[bytes], test: Iterable[bytes]) -> Seen:
        """After a run with these."""
        own = frozenset(train)
        return Seen(self.train | own, (self.validation - own) | set(validation), (self.test - own) | set(test))


# ---- a run's own rows ----


@dataclass(frozen=True)
class Split:
    """Row numbers, of ``validation`` and ``test`` maybe none.

    ``known``: how many of the test rows earlier runs held out; ``notes``: how else they came about, in words.
    """

    train: list[int]
    validation: list[int]
    test: list[int]
    known: int
    notes: list[str]


def split_rows(
    dataset: Any, pictures: Sequence[bytes], seen: Seen, *, test: float, validation: float | None, seed: int
) -> Split:
    """Divide a run's rows. What earlier runs of the model held out stays held out; of rows that none of them knew, data
    and seed alone decide.

    Args:
        pictures: digests, by row.
        seen: by earlier runs.
        test, validation: shares of the rows that may train; 0 where such rows are given; ``validation`` None: none
            are wanted.

    Raises:
        ValueError: there are too few rows.
    """
    draw = _Draw(dataset["label"] if class_names_of(dataset) else None, seed)
    held = Seen(seen.train, frozenset() if validation == 0.0 else seen.validation, seen.test if test else frozenset())
    known, chosen, old, new = _by_past(pictures, held)
    tested: list[int] = []
    if test:
        new, drawn = draw(new, test)
        if not known and not drawn and (old or chosen):
            draw.notes.append("the model was trained on all of these pictures before, so it knows those held out now")
            chosen, (old, drawn) = [], draw(old + chosen, test)
        tested = known + drawn
    validating: list[int] = []
    if validation:
        if not chosen:
            old, new = [], old + new
        new, drawn = draw(new, validation)
        validating = chosen + drawn
    elif chosen:
        draw.notes.append(f"{len(chosen)} pictures that chose the weights of an earlier run stay out of training")
    if (test and not tested) or (validation and not validating) or not old + new:
        raise ValueError(f"data: {len(dataset)} rows are too few to hold some out; give --eval-data")
    return Split(old + new, validating, tested, len(known), draw.notes)


def _by_past(pictures: Sequence[bytes], seen: Seen) -> tuple[list[int], list[int], list[int], list[int]]:
    """Rows that were tested on, that chose weights, that were trained on, and those never seen."""
    parts: tuple[list[int], ...] = ([], [], [], [])
    for row, digest in enumerate(pictures):
        past = (digest in seen.test, digest in seen.validation, digest in seen.train, True)
        parts[past.index(True)].append(row)
    return parts  # type: ignore[return-value]


class _Draw:
    """Draws rows, of each class its share where there are classes; ``notes`` say where that cannot be."""

    def __init__(self, labels: Sequence[int] | None, seed: int) -> None:
        self.labels, self.seed, self.notes = labels, seed, list[str]()

    def __call__(self, rows: list[int], share: float) -> tuple[list[int], list[int]]:
        """What is left, and what is drawn: nothing of a single row, nor of classes of one."""
        count = math.ceil(share * len(rows))
        if count >= len(rows):
            return rows, []
        if self.labels is None:
            return _split(rows, None, share, self.seed)
        labels = [self.labels[row] for row in rows]
        sizes = np.unique(labels, return_counts=True)[1]
        if sizes.min() > 1 and len(sizes) <= min(count, len(rows) - count):
            return _split(rows, labels, share, self.seed)
        drawn = {rows[place] for place in self._in_rounds(labels, sizes, count, share)}
        return [row for row in rows if row not in drawn], sorted(drawn)

    def _in_rounds(self, labels: list[int], sizes: Any, count: int, share: float) -> list[int]:
        """One row of each class before a second of any, up to its share; a class keeps at least one."""
        random = np.random.default_rng(self.seed)
        places_of = np.split(np.argsort(labels, kind="stable"), sizes.cumsum()[:-1])
        random.shuffle(places_of)
        most = [min(math.ceil(share * len(places)), len(places) - 1) for places in places_of]
        turns = [
            (turn, number, place)
            for number, (places, own) in enumerate(zip(places_of, most, strict=True))
            for turn, place in enumerate(random.permutation(places)[:own].tolist())
        ]
        drawn = [place for _, _, place in sorted(turns)[:count]]
        without = len(sizes) - len({labels[place] for place in drawn})
        self.notes.append(
            f"few pictures a class: {len(drawn)} are held out, one of each class before a second of any; {without} of "
            f"{len(sizes)} classes have none there, {most.count(0)} of them for want of a second picture"
        )
        return drawn


def _split(rows: list[int], labels: list[int] | None, share: float, seed: int) -> tuple[list[int], list[int]]:
    columns, features = {"row": rows}, datasets.Features({"row": datasets.Value("int64")})
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(num_classes=max(labels) + 1)
    table = datasets.Dataset.from_dict(columns, features=features)
    parts = table.train_test_split(test_size=share, seed=seed, stratify_by_column=None if labels is None else "label")
    return list(parts["train"]["row"]), list(parts["test"]["row"])
