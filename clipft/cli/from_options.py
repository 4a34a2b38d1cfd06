"""Commands made from the dataclass of their verb's options (``clipft.recipes.options``)."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from clipft.recipes.options import DATA, GROUPS, MODEL, RUN

__all__ = ["Grouped", "takes_options"]


def takes_options(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of an options class as options, which it gets as ``**options`` in plain types."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        types = typing.get_type_hints(kind)
        fields = [_parameter(field, types[field.name]) for field in dataclasses.fields(kind)]

        def called(**values: Any) -> None:
            command(**{name: value.value if isinstance(value, Enum) else value for name, value in values.items()})

        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        called.__signature__ = own.replace(parameters=[*parameters, *fields])  # type: ignore[attr-defined]
        called.__name__, called.__doc__, called.options_class = command.__name__, command.__doc__, kind  # type: ignore[attr-defined]
        return called

    return decorate


def _parameter(field: dataclasses.Field[Any], of_field: Any) -> inspect.Parameter:
    metadata, name, default = field.metadata, field.name, field.default
    kind: Any = of_field
    if metadata.get("text"):  # data: in Python also rows
        kind = str | None
    elif "choices" in metadata:
        kind = Enum(name, {choice: choice for choice in metadata["choices"]}, type=str)  # type: ignore[misc,no-redef]
        default = kind(default)
    elif typing.get_origin(kind) is not None and Sequence in {typing.get_origin(k) for k in typing.get_args(kind)}:
        kind = list[str] | None
    limits = {key: metadata[ours] for key, ours in (("min", "least"), ("max", "most")) if ours in metadata}
    flag = "--" + name.replace("_", "-")
    flags = [metadata["flag"]] if "flag" in metadata else [flag] if kind is bool or kind == list[str] | None else []
    annotation = Annotated[kind, typer.Option(*flags, help=metadata["help"], **limits)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class Grouped(TyperCommand):
    """A command that shows its options under the headings of their fields, its own first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Plain text, which no width cuts."""
        groups: dict[str, list[Any]] = {group: [] for group in GROUPS}
        headings = {"model": MODEL, "data": DATA}
        kind = self.callback.options_class  # type: ignore[union-attr]
        headings |= {field.name: field.metadata["group"] for field in dataclasses.fields(kind)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(headings.get(str(param.name), RUN), []).append(record)
        for heading, records in groups.items():
            if not records:
                continue
            with formatter.section(heading):
                formatter.write_dl(records)
