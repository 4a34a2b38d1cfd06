"""The model that an adapter was trained on: recorded, kept, found again after a move, and recognised by its weights.

The record is in the manifest of the adapter's folder; peft's own files stay as peft writes them, but for the base's
name, which is made absolute, so that it holds in every working directory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from clipft.errors import short
from clipft.files import read_json, unchanged, write_json
from clipft.models.formats import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DEMO_MODEL,
    MERGED,
    MODEL_MANIFEST,
    folder_of,
)
from clipft.models.resize import SIZES, names_of_tables, sizes_of

__all__ = [
    "Base",
    "check_base_stays",
    "digest_of_base",
    "record_base",
    "record_sizes",
    "recorded_base",
    "recorded_sizes",
]

_KEY, _SIZES = "base", "resized"  # of the manifest


@dataclass(frozen=True)
class Base:
    """What an adapter's folder knows of its base.

    Attributes:
        weights: their digest, without those that the adapter's own file holds.
        trained: the names of these: biases, or modules that were trained whole.
        beside: the base's folder where it lies as it lay then, seen from the adapter's; None on the hub.
        sizes: what it was resized to (``clipft.resize``); the tables that this changes are no part of the digest.
    """

    weights: str
    trained: frozenset[str]
    beside: Path | None
    sizes: dict[str, int] = field(default_factory=dict)

    def is_of(self, model: Any) -> bool:
        """Whether the model has these weights."""
        return digest_of_base(model, self.trained | names_of_tables(model, self.sizes)) == self.weights

    def places(self, name: str) -> list[str]:
        """Where to look for it; ``name``: as the adapter's configuration has it."""
        near = [str(self.beside)] if self.beside is not None and self.beside.is_dir() else []
        return [*near, *([] if near and Path(near[0]).resolve() == folder_of(name).resolve() else [name])]


def record_base(model: Any, staging: Path, home: Path) -> None:
    """Beside an adapter that peft has written into ``staging``, for the folder ``home``."""
    config = read_json(staging / ADAPTER_CONFIG)
    folder, beside = folder_of(config["base_model_name_or_path"] or ""), None
    if folder.resolve() == DEMO_MODEL:
        config["base_model_name_or_path"] = "demo"  # on every machine
    elif config["base_model_name_or_path"] and folder.is_dir():
        config["base_model_name_or_path"] = str(folder.resolve())
        beside = os.path.relpath(folder.resolve(), home.resolve())
    write_json(staging / ADAPTER_CONFIG, config)
    without = _trained(staging) | names_of_tables(model, sizes_of(model))
    write_json(staging / MODEL_MANIFEST, {_KEY: {"weights": digest_of_base(model, without), "folder": beside}})
    record_sizes(model, staging)


def record_sizes(model: Any, staging: Path) -> None:
    """Beside an adapter: what its base was resized to, if it was."""
    if sizes := sizes_of(model):
        path = staging / MODEL_MANIFEST
        write_json(path, (read_json(path) if path.is_file() else {}) | {_SIZES: sizes})


def recorded_sizes(folder: Path) -> dict[str, int]:
    """As ``clipft.resize`` takes them.

    Raises:
        ValueError: they are none.
    """
    try:
        sizes = read_json(folder / MODEL_MANIFEST).get(_SIZES, {})
    except (OSError, ValueError):  # an adapter that plain peft saved, or clipft 0.1
        return {}
    if not isinstance(sizes, dict) or not sizes.keys() <= set(SIZES):
        raise ValueError(
            f"{folder / MODEL_MANIFEST}: expected {_SIZES} to hold {', '.join(SIZES)}, found {sizes!r:.80}"
        )
    return sizes


def recorded_base(folder: Path) -> Base | None:
    """None for an adapter that plain peft saved, or clipft 0.1: there is nothing to know its base by."""
    try:
        about = read_json(folder / MODEL_MANIFEST)[_KEY]
        weights, beside = str(about["weights"]), about["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not unchanged(folder, MODEL_MANIFEST, ADAPTER_WEIGHTS):
        return None
    return Base(weights, _trained(folder), _place_beside(folder, beside), recorded_sizes(folder))


def _place_beside(folder: Path, beside: Any) -> Path | None:
    if beside is None:
        return None
    try:
        place = (folder / beside).resolve()
        place.is_dir()
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # no name of a file
        raise ValueError(
            f"{folder / MODEL_MANIFEST}: expected folder under {_KEY} to be where the base lies, found {short(beside)}"
        ) from error
    return place


def _trained(folder: Path) -> frozenset[str]:
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        return frozenset(_plain(name) for name in file.keys())  # noqa: SIM118


def check_base_stays(base: str, folder: Path) -> None:
    """That an adapter does not take the place of the model that it needs.

    Raises:
        ValueError: it would.
    """
    needed = folder_of(base).resolve()
    if {folder.resolve(), (folder / MERGED).resolve()} & {needed, needed / MERGED}:
        raise ValueError(
            f"output: expected a folder other than that of the base model, which the adapter needs: {base}"
        )


def digest_of_base(model: Any, trained: Collection[str] = ()) -> str:
    """Of the weights of a model without its adapters and what else was ``trained``, by value: in float32, whatever they
    are stored as.
    """
    digest = hashlib.blake2b(digest_size=16)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = {_plain(name): tensor for name, tensor in plain.state_dict().items()}
    for name in sorted(named.keys() - set(trained)):
        if ".lora_" not in name and ".modules_to_save." not in name:
            tensor = named[name].detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name}/{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _plain(name: str) -> str:
    """Of a tensor, without what peft puts into its name."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
