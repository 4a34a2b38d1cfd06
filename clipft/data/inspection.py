"""Test sets of defects in MVTec AD's layout (Bergmann et al. 2021), which VisA, BTAD and others are passed on in too.

``ROOT/train/good`` has normal pictures; ``ROOT/test`` has a folder of normal ones and a folder for each kind of defect;
``ROOT/ground_truth/<kind>`` a mask for each of their pictures, of the same size, black where nothing is wrong:
``NAME_mask.png`` or ``NAME.png``. The normal folder is called good, ok or normal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import ImageChops

from clipft.data.compact import Each
from clipft.data.folders import Tree, walk
from clipft.data.pictures import EncodedPicture, naming, read_file, to_rgb
from clipft.data.reading import BadRowError, Reading
from clipft.data.rows import Picture
from clipft.data.splits import visible

__all__ = ["InspectionSet", "normal_folder", "read_inspection", "read_mask"]

_TRAIN, _TEST, _MASKS = "train", "test", "ground_truth"
_NORMAL = ("good", "ok", "normal")
_MASK_ENDINGS = ("_mask", "")  # of a mask's name, before its suffix
_OTHER, _NO_KIND, _EMPTY = "of another kind", "in no folder of a kind", "without pictures"
_NO_MASK, _BAD_MASK = "without a mask", "with a mask that does not fit"
_NO_PICTURE, _LEFT_OUT = "without a picture", "of pictures that were left out"


@dataclass(frozen=True)
class InspectionSet:
    """Pictures to be told normal or not.

    Attributes:
        dataset: ``image``, and ``id``: its path in the folder of tests, as ``crack/007.png``.
        kinds: of each picture the kind of its defect; None for a normal one.
        masks: of each picture its file; None where it has none. All None without a folder of masks.
    """

    dataset: datasets.Dataset
    kinds: list[str | None]
    masks: list[Path | None]

    @property
    def has_masks(self) -> bool:
        """Whether all its defects have a mask: else none has."""
        return any(mask is not None for mask in self.masks)


# ---- the folders ----


def normal_folder(root: Path) -> Path:
    """Where a set in this layout has the normal pictures that it is learnt from.

    Raises:
        ValueError: there is none, or several.
    """
    found = [root / _TRAIN / name for name in _NORMAL if (root / _TRAIN / name).is_dir()]
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(root)) for path in found) or "none of these"
        raise ValueError(
            f"normal: expected normal pictures in {root / _TRAIN / _NORMAL[0]} (or {' or '.join(_NORMAL[1:])}), found "
            f"{names}: name them, or a memory of them"
        )
    return found[0]


def read_inspection(root: Path, reading: Reading, masks: Reading) -> InspectionSet:
    """The test set of a folder in this layout.

    Args:
        root: the folder that has ``test`` and, for numbers of pixels, ``ground_truth``.
        reading: counts its pictures; a defect without a mask, or with one of another size, without anything marked or
            in a JPEG, is a bad row.
        masks: counts the masks.

    Raises:
        ValueError: another layout, a set without normal pictures or without defects, or a bad row; the message names
            it.
    """
    folder = _test_folder(root)
    reading.source, masks.source = str(folder), str(root / _MASKS)
    tree = _pictures_below(folder, reading)
    for name in tree.folders:
        if not any(tree.part(picture) == name for picture in tree.pictures):
            reading.leave_out(_EMPTY, str(folder / name))
    known = _masks_in(root / _MASKS, masks) if (root / _MASKS).is_dir() else None
    found = _rows(tree, known, reading)
    _count_masks(known or {}, tree, found, masks)
    _check_sorts(found.kinds, folder)
    reading.places = Each([str(folder / name) for name in found.dataset["id"]])
    reading.finish(len(found.kinds))
    return found


def _pictures_below(folder: Path, reading: Reading) -> Tree:
    """A folder whose pictures alone are read; the rest is counted."""
    tree = walk(folder, reading)
    for file in (*tree.tables, *tree.shards, *tree.texts, *tree.others):
        reading.leave_out(_OTHER, str(file))
    for fault in tree.faults:
        with reading.row():
            raise fault.error
    return tree


def _test_folder(root: Path) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder in MVTec AD's layout, there is none")
    if (root / _TEST).is_dir():
        return root / _TEST
    sets = [entry.name for entry in visible(root) if (entry / _TEST).is_dir()]
    names = [entry.name for entry in visible(root) if entry.is_dir()]
    hint = f"give one of its sets, as {root / sets[0]}" if sets else f"found {', '.join(names[:5]) or 'no folders'}"
    raise ValueError(
        f"{root}: expected MVTec AD's layout: {_TRAIN}/good, {_TEST}/good, {_TEST}/KIND and {_MASKS}/KIND; {hint}"
    )


def _check_sorts(kinds: Sequence[str | None], folder: Path) -> None:
    if None not in kinds:
        raise ValueError(f"{folder}: expected normal pictures in {folder / _NORMAL[0]} (or {', '.join(_NORMAL[1:])})")
    if not any(kinds):
        raise ValueError(f"{folder}: expected pictures of defects, in a folder for each kind of them, found none")


def _rows(tree: Tree, known: dict[Path, Path] | None, reading: Reading) -> InspectionSet:
    files: list[Path] = []
    kinds: list[str | None] = []
    masks: list[Path | None] = []
    for picture in tree.pictures:
        name = tree.part(picture)
        if name is None:
            reading.leave_out(_NO_KIND, str(picture))
            continue
        kind = None if name in _NORMAL else name
        with reading.row():
            mask = None if known is None else _mask_of(picture, kind, tree.folder, known)
            if reading.skip:  # what cannot be decoded is left out now
                to_rgb(EncodedPicture(read_file(picture), str(picture)).decode(8))
            files.append(picture)
            kinds.append(kind)
            masks.append(mask)
    features = datasets.Features({"image": Picture(), "id": datasets.Value("string")})
    columns = {"image": list(map(str, files)), "id": [str(file.relative_to(tree.folder)) for file in files]}
    return InspectionSet(datasets.Dataset.from_dict(columns, features=features), kinds, masks)


# ---- masks ----


def read_mask(path: Path) -> NDArray[np.bool_]:
    """[H, W], true where a mask is not black.

    Raises:
        UnreadablePictureError: it cannot be read, or is a JPEG, which is not black where it should be.
    """
    file = EncodedPicture(read_file(path), str(path))
    with naming(str(path)):
        if file.opened(lambda picture: picture.format) in ("JPEG", "MPO"):
            raise ValueError("a JPEG has no sharp edges: save masks as .png")
    picture = file.decode()
    if picture.mode not in ("1", "L", "I", "F") and not picture.mode.startswith("I;16"):
        picture = reduce(ImageChops.lighter, picture.convert("RGB").split())
    return np.asarray(picture) != 0


def _masks_in(folder: Path, reading: Reading) -> dict[Path, Path]:
    """Masks by their path in the folder, without its suffix."""
    tree = _pictures_below(folder, reading)
    return {picture.relative_to(folder).with_suffix(""): picture for picture in tree.pictures}


def _candidates(picture: Path, folder: Path) -> list[Path]:
    own = picture.relative_to(folder).with_suffix("")
    return [own.with_name(own.name + ending) for ending in _MASK_ENDINGS]


def _mask_of(picture: Path, kind: str | None, folder: Path, known: dict[Path, Path]) -> Path | None:
    """The mask of a picture, once it is known to fit."""
    mask = next((known[name] for name in _candidates(picture, folder) if name in known), None)
    if mask is None:
        if kind is None:
            return None
        names = f"{kind}/{picture.stem}_mask.png or {kind}/{picture.stem}.png"
        raise BadRowError(str(picture), f"expected a mask in {_MASKS}, {names}, found none", _NO_MASK)
    size = EncodedPicture(read_file(picture), str(picture)).size()
    marked = read_mask(mask)
    if marked.shape[::-1] != size:
        sizes = f"{size[0]} x {size[1]} pixels as {picture} has, got {marked.shape[1]} x {marked.shape[0]}"
        raise BadRowError(str(picture), f"mask {mask}: expected {sizes}", _BAD_MASK)
    if marked.any() == (kind is None):
        why = "nothing marked, since the picture is normal" if kind is None else "the defect marked, found all black"
        raise BadRowError(str(picture), f"mask {mask}: expected {why}", _BAD_MASK)
    return mask


def _count_masks(known: dict[Path, Path], tree: Tree, found: InspectionSet, reading: Reading) -> None:
    used = dict.fromkeys(mask for mask in found.masks if mask is not None)
    wanted = {name for picture in tree.pictures for name in _candidates(picture, tree.folder)}
    for name, mask in known.items():
        if mask not in used:
            reading.leave_out(_LEFT_OUT if name in wanted else _NO_PICTURE, str(mask))
    reading.places = Each([str(mask) for mask in used])
    reading.finish(len(used))
