"""The classifiers of an exported model, in its folder: class vectors in one array, and what they are of in the
description. Neither torch nor pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipft.errors import line_of, short, shown
from clipft.inference.classifier import Calibration, Classifier
from clipft.inference.npy import load_npy
from clipft.models.formats import ONNX_CLASSES

__all__ = ["read_classifiers", "write_classifiers"]


def write_classifiers(found: Mapping[str, Classifier], folder: Path) -> list[dict[str, Any]]:
    """Write the vectors of all, one below the other; returns what the description holds of them."""
    if found:
        np.save(folder / ONNX_CLASSES, np.concatenate([own.weights for own in found.values()]))
    return [
        {
            "name": name,
            "classes": list(own.names),
            "scale": own.scale,
            **({"templates": list(own.templates)} if own.templates else {}),
        }
        for name, own in found.items()
    ]


def read_classifiers(
    stored: Any, folder: Path, dim: int, calibrations: Mapping[str, Calibration], where: str
) -> dict[str, Classifier]:
    """The classifiers by name.

    Args:
        stored: what :func:`write_classifiers` gave; None: there are none.
        dim: of the model's embeddings.
        where: the description, for errors.

    Raises:
        ValueError: the file or the description is damaged, or they do not belong together. FileNotFoundError: no file.
    """
    if not stored:
        return {}
    path = folder / ONNX_CLASSES
    entries = _checked(stored, where)
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: {ONNX_CLASSES} is missing, whose classes {where} names: export it again")
    try:
        vectors = load_npy(path)
        rows = sum(len(entry["classes"]) for entry in entries)
        if vectors.shape != (rows, dim) or not np.isfinite(vectors).all():
            raise ValueError(f"expected {rows} finite vectors of {dim} numbers, as {where} says, got {vectors.shape}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected an array of class vectors ({line_of(error)}): export it again") from error
    found, start = {}, 0
    for entry in entries:
        name, classes, templates = entry["name"], entry["classes"], entry.get("templates", ())
        try:
            own = Classifier(classes, vectors[start : start + len(classes)], entry["scale"], templates=templates)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{where} and {path}: {shown(name)}: {error}: export it again") from error
        found[name] = own.calibrated(calibrations.get(name))
        start += len(classes)
    return found


def _checked(stored: Any, where: str) -> list[dict[str, Any]]:
    entries: list[Any] = stored if isinstance(stored, list) else [None]
    for entry in entries:
        name, classes, scale = (
            entry.get(key) if isinstance(entry, dict) else None for key in ("name", "classes", "scale")
        )
        named = isinstance(name, str) and _are_texts(classes) and _are_texts(entry.get("templates", []))
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < math.inf
        if not (named and number and classes and len(set(classes)) == len(classes)):
            raise ValueError(
                f"{where}: expected a list of classifiers, each with name, classes and scale, found {short(entry)}: "
                "export it again"
            )
    return entries


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
