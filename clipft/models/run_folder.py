"""What the folder of a run says beside its model: the classes that it was scored against, and their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from clipft.data.splits import existing
from clipft.errors import line_of
from clipft.files import read_json
from clipft.models.formats import folder_of

__all__ = ["classes_of_run", "read_yaml", "templates_of_run"]

_MOST_YAML = 1 << 20  # bytes; options take some hundreds


class _Loader(yaml.SafeLoader):
    """Plain values; of merged objects a few lines may hold millions."""

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("expected objects that are written out, found one that is merged of others (<<)")
        super().flatten_mapping(node)


def read_yaml(text: str) -> Any:
    """The value of a text, whoever wrote it.

    Raises:
        ValueError: it is no YAML, or far longer than options are.
    """
    if len(text) > _MOST_YAML:
        raise ValueError(f"expected YAML of at most {_MOST_YAML >> 20} MB")
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # its constructors raise IndexError, KeyError, AttributeError, RecursionError over words
        raise ValueError(line_of(error)) from error


def classes_of_run(folder: str | Path) -> list[str] | None:
    """By its ``report.json``; None where this is no such folder, or a run on captions."""
    path = existing(folder_of(folder) / "report.json")
    if path is None:
        return None
    try:
        rows = read_json(path)["after"]["zero_shot"]["per_class"]
        return [str(row["class"]) for row in rows]
    except (ValueError, KeyError, TypeError):  # of another program
        return None


def templates_of_run(folder: str | Path) -> list[str] | None:
    """By its ``config.yaml``; None where it says none."""
    path = existing(folder_of(folder) / "config.yaml")
    if path is None or not path.is_file():
        return None
    try:
        options = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    found = options.get("template") if isinstance(options, dict) else None
    return found if isinstance(found, list) and found and all(isinstance(one, str) for one in found) else None
