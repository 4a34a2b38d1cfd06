"""What the files of a model's weights hold, read from their headers, and whether it is what the model asks for.

Nothing is allocated for a file that lies: names, shapes and types are compared before a number is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipft.errors import line_of, listed, short
from clipft.files import check_file, is_own_name, read_json
from clipft.models.formats import FLOAT_WEIGHTS
from clipft.models.pickles import read_pickle

__all__ = [
    "Stored",
    "Weights",
    "check_floats_stored",
    "check_shapes",
    "check_whole",
    "shards_of",
    "stored_in",
    "stored_weights",
    "tensors_of",
]

_FLOATS = ("F", "BF")  # beginnings of safetensors' words: F32, F8_E5M2, BF16
_HARMLESS = ("position_ids", "logit_bias")  # ends of names that older versions and other libraries save


@dataclass(frozen=True)
class Stored:
    """A tensor as the file ``path`` describes it; ``dtype`` in its words: F32, BF16, I8, or FLOAT32 of a pickle's."""

    shape: tuple[int, ...]
    dtype: str
    path: Path


# ---- files ----


class Weights(NamedTuple):
    """Of a float model.

    Attributes:
        where: the file that has them, or says which do; the folder where there is neither.
        stored: what they are; None where there are none.
        tensors: themselves, where they are pickled; transformers reads safetensors.
    """

    where: Path
    stored: dict[str, Stored] | None
    tensors: dict[str, Tensor] | None = None


def stored_weights(folder: Path) -> Weights:
    """What a float model's files hold.

    Raises:
        FileNotFoundError, ValueError: an index that lies, or a file that is damaged.
    """
    where = next((folder / name for name in FLOAT_WEIGHTS if (folder / name).exists()), folder)
    if where == folder:
        return Weights(folder, None)
    names = shards_of(where) if where.suffix == ".json" else [where.name]
    files = [folder / name for name in names]
    for path in files:
        if not path.exists():
            raise FileNotFoundError(f"{where}: names {path.name}, which is missing in {folder}")
    tensors: dict[str, Tensor] | None = None
    if files[0].suffix == ".safetensors":
        found = tensors_of(files)
    else:
        tensors, found = {}, {}
        for path in files:
            tensors |= (own := read_pickle(path))
            found |= _described(own, path)
    for name, file in read_json(where)["weight_map"].items() if where.suffix == ".json" else ():
        if name not in found or found[name].path.name != file:
            raise ValueError(
                f"{folder / file}: expected {name:.80} in it, as {where.name} says: one or the other is damaged"
            )
    return Weights(where, found, tensors)


def shards_of(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        ValueError: others than of its own folder and kind.
    """
    kind = FLOAT_WEIGHTS[FLOAT_WEIGHTS.index(index.name) - 1].rpartition(".")[2]
    described = read_json(index)
    names, metadata = described.get("weight_map"), described.get("metadata")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: expected a weight_map, from the names of tensors to those of files")
    for name in names.values():
        if not is_own_name(name) or not name.endswith(f".{kind}"):
            raise ValueError(f"{index}: expected names of .{kind} files in its own folder, found {short(name)}")
    if not isinstance(metadata, dict):
        raise ValueError(f"{index}: expected metadata to be an object, found a {type(metadata).__name__}")
    return sorted(set(names.values()))


def stored_in(path: Path) -> dict[str, Stored]:
    """What one file holds, safetensors or a pickle.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged, or holds something else.
    """
    return tensors_of([path]) if path.suffix == ".safetensors" else _described(read_pickle(path), path)


def _described(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Stored]:
    kinds = {name: str(tensor.dtype).removeprefix("torch.").upper() for name, tensor in tensors.items()}
    return {name: Stored(tuple(tensor.shape), kinds[name], path) for name, tensor in tensors.items()}


def tensors_of(files: Iterable[Path]) -> dict[str, Stored]:
    """All that stands in the headers.

    Raises:
        FileNotFoundError: no such file. ValueError: a file is damaged, or holds nothing.
    """
    found: dict[str, Stored] = {}
    for path in files:
        check_file(path)
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found |= {name: Stored(tuple(own.get_shape()), own.get_dtype(), path) for name, own in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path}: expected weights as safetensors; the file is damaged or was cut ({line_of(error)}): copy or "
                "download it again"
            ) from error
        if not found:
            raise ValueError(f"{path}: expected weights as safetensors, found a file without any")
    return found


# ---- held against a model ----


def check_shapes(where: Path, expected: Mapping[str, Any], found: Mapping[str, Stored]) -> None:
    """Before a model is allocated: that the weights fill it, and that what has the same name has the same shape.

    Names alone may differ still: transformers renames those of older versions.

    Args:
        where: the file that has the weights, or says which do.
        expected: the model's tensors by name, on the device "meta".
        found: what its files hold.

    Raises:
        ValueError: they do not fit.
    """
    odd = {
        name: f"{name} {list(found[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tuple(tensor.shape)
    }
    if odd:
        place, said = _file_of(odd, found, where), listed(odd.values())
        raise ValueError(f"{place}: expected weights of the shapes that config.json asks for, found {said}")
    asked = sum(tensor.numel() for tensor in expected.values())
    held = sum(math.prod(stored.shape) for stored in found.values())
    if asked > held:
        check_whole(where, [name for name in expected if name not in found], ())
        raise ValueError(f"{where}: config.json asks for {asked:,} numbers, the weights hold {held:,}")
    floats = {name for name, tensor in expected.items() if tensor.is_floating_point()}  # a BatchNorm counts in integers
    check_floats_stored(where, {name: stored for name, stored in found.items() if name in floats})


def check_floats_stored(where: Path, found: Mapping[str, Stored]) -> None:
    """That tensors are of floats.

    Raises:
        ValueError: others are among them.
    """
    odd = {name: f"{name} {own.dtype}" for name, own in found.items() if not own.dtype.startswith(_FLOATS)}
    if odd:
        place = _file_of(odd, found, where)
        raise ValueError(f"{place}: expected weights of a float type, found {listed(odd.values())}")


def check_whole(
    where: Path, missing: Collection[str], unexpected: Collection[str], found: Mapping[str, Stored] | None = None
) -> None:
    """That a model got all its weights, and weights are left over only where older versions saved more.

    Raises:
        ValueError: with their names; those of strange ones' files where ``found`` has them.
    """
    if missing:
        raise ValueError(
            f"{where}: weights that config.json asks for are missing: {listed(missing)}. They would be random numbers: "
            "save the model again with save_pretrained, or download it again"
        )
    over = [name for name in unexpected if name.rpartition(".")[2] not in _HARMLESS]
    if over:
        raise ValueError(
            f"{_file_of(over, found or {}, where)}: expected only the weights that config.json asks for, found others "
            f"too: {listed(over)}. They belong to another model, or to a config.json with more layers or heads"
        )


def _file_of(names: Iterable[str], found: Mapping[str, Stored], where: Path) -> Path:
    """The file that these tensors are in, if it is one."""
    files = {found[name].path if name in found else where for name in names}
    return files.pop() if len(files) == 1 else where
