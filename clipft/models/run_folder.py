"""What the folder of a run says beside its model: the classes that it was scored against, and their captions."""

from __future__ import annotations

from pathlib import Path

from clipft.data.splits import existing
from clipft.files import read_json
from clipft.models.formats import folder_of
from clipft.models.safe_yaml import read_yaml

__all__ = ["classes_of_run", "templates_of_run"]


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
