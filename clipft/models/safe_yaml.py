"""YAML whoever wrote it: plain values, no objects, no words that make much of little. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

import yaml

from clipft.errors import line_of

__all__ = ["read_yaml"]

_MOST_YAML = 1 << 16  # characters, which take most of a second; options have some hundreds


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
        raise ValueError(f"expected YAML of at most {_MOST_YAML >> 10} thousand characters")
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # its constructors raise IndexError, KeyError, AttributeError, RecursionError over words
        raise ValueError(line_of(error)) from error
