"""``--config FILE``: options of a command from YAML, and the file that a run leaves for it.

A key is an option's name, with dashes or underscores. The command line overrides the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipft.errors import line_of, short
from clipft.files import check_file
from clipft.models.safe_yaml import read_yaml
from clipft.recipes.options import nearest

__all__ = ["Config"]

_LEFT_OUT = ("config", "resume", "help")  # of the invocation, not of the run


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the command's defaults."""
    if path is None:
        return None
    try:
        check_file(path)
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: expected a YAML file with options ({line_of(error)})") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path}: expected 'option: value' lines, got {type(values).__name__}")
    options = {parameter.name: parameter for parameter in context.command.params if parameter.name not in _LEFT_OUT}
    given = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(given.keys() - options.keys())
    if unknown:
        known = sorted(map(str, options))
        near = [(name, nearest(name, known)) for name in unknown]
        named = ", ".join(f"{name} (did you mean {meant}?)" if meant else name for name, meant in near)
        there = "" if all(meant for _, meant in near) else f"; there are {', '.join(known)}"
        raise typer.BadParameter(f"{path}: no such option: {named}{there}")
    for name, value in given.items():
        several = getattr(options[name], "multiple", False)
        nested = any(isinstance(one, dict | list) for one in (value if isinstance(value, list) else [value]))
        if value is not None and (nested or several != isinstance(value, list)):
            found = "one that holds others" if nested else short(value)  # by aliases a few lines may hold millions
            raise typer.BadParameter(f"{path}: {name}: expected {'a list' if several else 'one value'}, got {found}")
    context.default_map = {name: value for name, value in given.items() if value is not None}
    return path


Config = Annotated[
    Path | None,
    typer.Option(callback=_read, is_eager=True, help="YAML file with these options; the command line overrides."),
]
