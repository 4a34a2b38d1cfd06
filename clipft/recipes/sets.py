"""The rows that a training run has: to train on, to choose the epoch or the weights by, and to test on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from rich.text import Text

from clipft.data.classes import share_of_classes
from clipft.data.digests import know_digests, picture_digests, rows_digest
from clipft.data.splits import TEST, TRAIN, names_of_splits, split_of_name, test_splits
from clipft.recipes.hold_out import Seen, split_rows
from clipft.recipes.sources import Sources, name_of

__all__ = ["HELD_OUT", "Sets", "sets_of_run"]

HELD_OUT = 0.2  # share of the data tested on where no test data is given
VALIDATION = 0.1  # share of the training data that early stopping looks at


@dataclass(frozen=True)
class Sets:
    """The rows of a run. ``validation`` chooses the epoch, if early stopping is on, and is no part of ``test``.

    ``classes``: those that pictures of the test set are told apart by; ``seen``: which pictures the model will have
    seen; ``identity``: number and digest of the rows, by part.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset
    test_name: str
    classes: Sequence[str] | None
    sources: Sources
    seen: Seen
    identity: dict[str, Any]


def sets_of_run(sources: Sources, data: Any, eval_data: Any, seen: Seen, *, chooses: bool, seed: int) -> Sets:
    """Read what the options name, and hold out what they do not.

    Args:
        sources: with the run's options.
        data, eval_data: as given, the latter maybe None.
        seen: by earlier runs of the model.
        chooses: whether rows choose the epoch or the weights.
        seed: of what is held out.

    Raises:
        ValueError: there are too few rows.
    """
    rows, name = sources.rows("data", data), name_of(data)
    test, validation, test_name = _given(sources, data, eval_data, chooses)
    pictures = picture_digests(rows)
    share = (0.0 if validation is not None else VALIDATION) if chooses else None
    split = split_rows(rows, pictures, seen, test=HELD_OUT if test is None else 0.0, validation=share, seed=seed)
    parts = {part: [pictures[row] for row in getattr(split, part)] for part in ("train", "validation", "test")}
    if test is None:
        test, test_name = rows.select(split.test), f"{name}, held out of {_how(split, seed)}"
    else:
        parts["test"] = picture_digests(test)
    if validation is not None:
        parts["validation"] = picture_digests(validation)
    elif chooses:
        validation = rows.select(split.validation)
    train = rows.select(split.train)
    for part, own in (("train", train), ("validation", validation)):
        if own is not None:  # features of frozen towers are found by them
            know_digests(own, parts[part])
    classes = sources.classes(test, [train])
    test_name = f"{len(test)} pictures of {test_name}{share_of_classes(test, classes)}"
    say = sources.console.print
    say(Text(f"training on {len(train)} pictures of {name}; testing on {test_name}"))
    if validation is not None:
        say(f"{len(validation)} more pictures, held out of training, choose the epoch or the weights")
    for note in split.notes:
        say(note)
    identity = {"train": _identity(train, parts["train"]), "validation": _identity(validation, parts["validation"])}
    return Sets(train, validation, test, test_name, classes, sources, seen.then(**parts), identity)


def _how(split: Any, seed: int) -> str:
    new = len(split.test) - split.known
    if not split.known:
        return f"training (seed {seed})"
    return "training by an earlier run of the model too" + (f", {new} of them new (seed {seed})" if new else "")


def _identity(rows: Any, pictures: list[bytes]) -> dict[str, Any] | None:
    return None if rows is None else {"count": len(rows), "digest": rows_digest(rows, pictures)}


def _given(sources: Sources, data: Any, named: Any, chooses: bool) -> tuple[Any, Any, str]:
    """Rows to test on, rows to choose by, None where there are none, and the name of the former: as named, or splits of
    ``data``.
    """
    source, splits = _further_splits(sources, data)
    if named is None:
        named = _part(source, splits.pop(0)) if splits else None
    else:
        splits = [split for split in splits if split != TEST]
    test = None if named is None else sources.rows("eval_data", named, purpose="test")
    if splits and not chooses:
        sources.console.print(
            Text(f"{name_of(source)}:{splits[0]} is not read: it is for --early-stopping-patience and --wise-ft")
        )
    chosen = _part(source, splits[0]) if splits and chooses else None
    validation = None if chosen is None else sources.rows("validation", chosen, purpose="test")
    return test, validation, name_of(named)


def _part(source: Any, split: str) -> Any:
    return source[split] if isinstance(source, datasets.DatasetDict) else f"{source}:{split}"


def _further_splits(sources: Sources, data: Any) -> tuple[Any, list[str]]:
    """The source without a split in its name, and the splits that it has to test on and to choose by."""
    if not isinstance(data, (str, Path, datasets.DatasetDict)):
        return data, []
    source, split = (data, None) if isinstance(data, datasets.DatasetDict) else split_of_name(data)
    if (sources.options.split or split or TRAIN) != TRAIN:
        return source, []
    names = list(source) if isinstance(source, datasets.DatasetDict) else names_of_splits(source)
    return source, test_splits(names) if TRAIN in names else []
