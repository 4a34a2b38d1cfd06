"""The classes of data sets: other names for them, those that a test set is scored against, names that say nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from clipft.data.objects import ObjectRows
from clipft.data.rows import class_names_of, class_targets, column_names, column_values
from clipft.data.splits import existing
from clipft.data.text_tables import check_line, read_lines, read_text_lines
from clipft.files import check_file, expanded

__all__ = [
    "checked_classes",
    "classes_of",
    "read_class_names",
    "renamed",
    "says_nothing",
    "share_of_classes",
]

_WORDLESS = (
    r"[\W\d_]*",  # no letter
    r"n\d{8}",  # of WordNet, as ImageNet's folders
    r"(?:\d{2,}[._-]|\d+\.|\d+ - )\s*\w.*",  # numbered: 001.Black_footed_Albatross
    r"(?:[A-Z][a-z]+){2,}",  # AnnualCrop
    r"(?i:class|cls|label|category|cat|type|c|id)[ _-]?\d+",
)
_SAYS_NOTHING = re.compile("|".join(_WORDLESS), re.DOTALL)


def says_nothing(name: str) -> bool:
    """Whether a caption made of a class's name would hold a number or a code in place of words."""
    return _SAYS_NOTHING.fullmatch(name) is not None


# ---- other names ----


def read_class_names(source: Any, encoding: str | None = None) -> dict[str, str]:
    """Words by class: of a file with a name, a tab and words a line, or of a mapping.

    Raises:
        ValueError: a line is none, or a class has two names.
    """
    if isinstance(source, Mapping):
        return {str(name): str(words) for name, words in source.items()}
    path, words_of = expanded(source), dict[str, str]()
    check_file(path)
    for number, line in enumerate(read_lines(path, encoding)):
        place = f"class_names: {path}, line {number + 1}"
        check_line(line, place, encoding)
        name, _, words = (part.strip() for part in line.partition("\t"))
        if not line.strip():
            continue
        if not name or not words:
            raise ValueError(f"{place}: expected a class, a tab and its name in words, got {line.strip()!r}")
        if words_of.setdefault(name, words) != words:
            raise ValueError(f"{place}: expected one name of {name}, got {words_of[name]!r} and {words!r}")
    return words_of


def renamed(dataset: Any, words_of: Mapping[str, str], where: str) -> Any:
    """A data set whose classes have the names that ``words_of`` gives them; the others keep theirs. Labels that are
    numbers become classes.

    Raises:
        ValueError: there are no classes, none has another name, or two have one.
    """
    if not words_of or "label" not in column_names(dataset):
        return dataset
    names, labels = class_names_of(dataset), column_values(dataset, "label")
    if names is None:  # numbers
        numbers = sorted(set(labels))
        names, labels = list(map(str, numbers)), [numbers.index(label) for label in labels]
        if missing := [name for name in names if name not in words_of]:
            raise ValueError(f"{where}: class_names: expected a name for each of its classes, none for {missing[:5]}")
    if set(names) <= set(words_of.values()):
        return dataset
    if not set(names) & words_of.keys():
        raise ValueError(f"{where}: class_names: expected names of its classes, {names[:5]}, got {list(words_of)[:5]}")
    words = [words_of.get(name, name) for name in names]
    if twice := sorted({name for name in words if words.count(name) > 1}):
        raise ValueError(f"{where}: class_names: expected each name once, got {', '.join(twice)} for several classes")
    if isinstance(dataset, ObjectRows):
        return dataset.labelled(labels, words)
    return dataset.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=words))


# ---- what pictures are told apart by ----


def checked_classes(given: Sequence[str] | None) -> list[str] | None:
    """Of the option ``classes``: one text is a file with a class a line, or names with commas between them; several
    are a name each.
    """
    if given is None:
        return None
    names = list(given)
    if len(names) == 1:
        path = existing(names[0])
        names = read_text_lines(path) if path is not None and path.is_file() else names[0].split(",")
    names = [name.strip() for name in names]
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"classes: expected two names or more, each once, got {', '.join(names)}")
    return names


def classes_of(test: Any, others: Sequence[Any], given: Sequence[str] | None) -> list[str] | None:
    """The names that a test set is scored against: those given, else its own and those of the other data sets, which
    come first; None where it has none.

    Raises:
        ValueError: it has a class that is not among those given.
    """
    own = class_names_of(test)
    if "label" not in column_names(test):
        return None
    if given is not None:
        if odd := sorted(set(own or ()) - set(given)):
            raise ValueError(f"classes: expected all classes of the test set, {', '.join(odd[:5])} are missing")
        return list(given)
    known = [name for other in others for name in class_names_of(other) or ()]
    return None if own is None else list(dict.fromkeys([*known, *own]))


def share_of_classes(test: Any, names: Sequence[str] | None) -> str:
    """For the name of a test set, where it lacks some of the classes that it is scored against."""
    present = 0 if names is None else len({int(label) for label in class_targets(test, "label", names)})
    return f", which has {present} of {len(names)} classes" if names and present < len(names) else ""
