"""Image-caption pairs and labelled images from what people have: class folders, tables, data sets by name.

Whatever the source, the result has the columns ``image`` and ``caption`` and / or ``label``. Rows of a table with the
same image path are one picture with several captions, as in Flickr30k and COCO: taken as separate pictures, they would
be each other's negatives.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
import pyarrow.compute

__all__ = ["load_pairs"]

IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "filepath", "file_path", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title")
LABEL_COLUMNS = ("label", "class")
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_PATHS, _BYTES = ("string", "large_string"), ("binary", "large_binary")
_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def load_pairs(
    path_or_name: str | Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
) -> datasets.Dataset:
    """Load a data set for training or evaluation.

    Args:
        path_or_name: a folder with one sub-folder of pictures a class; a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``
            file with image paths relative to the file (which may not leave its folder) or image bytes, and a caption or
            a list of captions a row; a folder written by ``Dataset.save_to_disk``; any other folder or name that
            ``datasets.load_dataset`` takes.
        split: which split of a data set by name.
        image_column, caption_column, label_column: where they are not called by a usual name (``image``, ``file_name``,
            ``filepath``, ``path``; ``caption``, ``captions``, ``text``, ``title``; ``label``, ``class``).

    Returns:
        A ``datasets.Dataset`` with ``image`` (decoded to PIL on access) and ``caption`` (a string or a list of strings)
        and / or ``label`` (a ``ClassLabel`` where the classes have names).

    Raises:
        FileNotFoundError: the file or folder, or an image that a table names, does not exist.
        ValueError: a column, caption or path is not as expected; the message names file and row.
    """
    named = (image_column, caption_column, label_column)
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return _from_file(path, named)
    if path.is_dir():
        return _from_folder(path, split, named)
    if path.suffix.lower() in _TABLE_SUFFIXES or str(path_or_name).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"path_or_name: expected a file, a folder or a data set's name, there is no {str(path)!r}"
        )
    return _canonical(_by_name(str(path_or_name), split), str(path_or_name), None, named)


# ---- folders and names ----


def _from_folder(folder: Path, split: str, named: Sequence[str | None]) -> datasets.Dataset:
    if (folder / "state.json").is_file():
        return _canonical(datasets.Dataset.load_from_disk(str(folder)), str(folder), folder, named)
    if (
        any(entry.suffix.lower() in _TABLE_SUFFIXES for entry in folder.rglob("*"))
        or (folder / "dataset_dict.json").exists()
    ):
        return _canonical(_by_name(str(folder), split), str(folder), folder, named)
    return _from_class_folders(folder)


def _from_class_folders(folder: Path) -> datasets.Dataset:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    pictures = {
        entry.name: sorted(p for p in entry.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES) for entry in classes
    }
    empty = [name for name, paths in pictures.items() if not paths]
    if empty or len(pictures) < 2:
        raise ValueError(
            f"{folder}: expected one sub-folder a class, two or more, with pictures in each; found "
            + (f"no pictures directly in {', '.join(empty[:5])}" if empty else f"{len(pictures)} sub-folders")
            + "; for captions give the .csv, .tsv, .jsonl or .parquet file itself"
        )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(pictures))})
    columns = {
        "image": [str(path) for paths in pictures.values() for path in paths],
        "label": [number for number, paths in enumerate(pictures.values()) for _ in paths],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _by_name(name: str, split: str) -> datasets.Dataset:
    loaded = datasets.load_dataset(name, split=split)
    return cast(datasets.Dataset, loaded)


# ---- tables ----


def _from_file(path: Path, named: Sequence[str | None]) -> datasets.Dataset:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path, named)
    if suffix in (".csv", ".tsv"):
        return _from_rows(_read_csv(path, "\t" if suffix == ".tsv" else ","), path, named)
    if suffix == ".jsonl":
        return _from_rows(_read_jsonl(path), path, named)
    raise ValueError(f"{path}: expected a file ending in {', '.join(_TABLE_SUFFIXES)}, got {suffix or 'no ending'!r}")


def _from_parquet(path: Path, named: Sequence[str | None]) -> datasets.Dataset:
    dataset = cast(datasets.Dataset, datasets.Dataset.from_parquet(str(path)))
    image = _find_columns(dataset.column_names, str(path), named)[0]
    if getattr(dataset.features[cast(str, image)], "dtype", None) in _PATHS:
        return _from_rows(cast(list[dict[str, Any]], dataset.to_list()), path, named)
    return _canonical(dataset, str(path), path.parent, named)


def _read_csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        rows = list(reader)
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, row {number}: expected {len(reader.fieldnames or ())} fields, as in the header; a field that "
                f"holds {delimiter!r} must be quoted"
            )
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number + 1}: expected one JSON object a line ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number + 1}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def _from_rows(rows: list[dict[str, Any]], path: Path, named: Sequence[str | None]) -> datasets.Dataset:
    if not rows:
        raise ValueError(f"{path}: expected at least one row, found none")
    image, caption, label = _find_columns(list(rows[0]), str(path), named)
    pictures: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise ValueError(f"{path}, row {number}: expected the keys of row 0, {sorted(rows[0])}, got {sorted(row)}")
        _join(pictures, row, (image, caption, label), f"{path}, row {number}", path.parent)
    columns: dict[str, list[Any]] = {"image": list(pictures)}
    features: dict[str, Any] = {"image": datasets.Image()}
    if caption:
        columns["caption"] = [picture["captions"] for picture in pictures.values()]
        features["caption"] = datasets.List(datasets.Value("string"))
        if all(len(captions) == 1 for captions in columns["caption"]):
            columns["caption"] = [captions[0] for captions in columns["caption"]]
            features["caption"] = datasets.Value("string")
    if label:
        columns["label"], features["label"] = _encode_labels([picture["label"] for picture in pictures.values()])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _join(
    pictures: dict[str, dict[str, Any]], row: dict[str, Any], names: Sequence[str | None], where: str, folder: Path
) -> None:
    """Add a row to the picture that it names."""
    image, caption, label = names
    picture = pictures.setdefault(_safe_path(row[cast(str, image)], folder, where), {"captions": []})
    if caption:
        picture["captions"] += _captions(row[caption], where)
    if label and picture.setdefault("label", row[label]) != row[label]:
        raise ValueError(
            f"{where}: expected the label of an earlier row with this image, {picture['label']!r}, got {row[label]!r}"
        )


def _safe_path(value: Any, folder: Path, where: str) -> str:
    """The absolute path of an image named in a table; it must exist and lie in the table's folder."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected the path of an image, got {value!r}")
    path = (folder / value).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{where}: expected an image inside {folder}, the file's folder, got {value!r}, which leaves it"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no image {value!r} in {folder}")
    return str(path)


def _captions(value: Any, where: str) -> list[str]:
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise ValueError(f"{where}: expected a caption or a list of captions, got {value!r}")
    return captions


def _encode_labels(values: list[Any]) -> tuple[list[int], Any]:
    """Whole numbers stay as they are, since they may index names kept elsewhere; other values become named classes."""
    if all(str(value).strip().isdecimal() for value in values):
        return [int(value) for value in values], datasets.Value("int64")
    names = sorted(set(map(str, values)))
    number = {name: index for index, name in enumerate(names)}
    return [number[str(value)] for value in values], datasets.ClassLabel(names=names)


# ---- columns ----


def _find_columns(columns: Sequence[str], where: str, named: Sequence[str | None]) -> list[str | None]:
    """The columns of image, caption and label. The image is needed, and one of the others."""
    found: list[str | None] = []
    usual = (IMAGE_COLUMNS, CAPTION_COLUMNS, LABEL_COLUMNS)
    for argument, name, known in zip(("image_column", "caption_column", "label_column"), named, usual, strict=True):
        if name is not None and name not in columns:
            raise ValueError(f"{where}: {argument}: expected one of its columns {list(columns)}, got {name!r}")
        lower = {column.lower(): column for column in reversed(columns)}
        found.append(name or next((lower[usual_name] for usual_name in known if usual_name in lower), None))
    image, caption, label = found
    if image is None:
        raise ValueError(
            f"{where}: expected a column with images ({', '.join(IMAGE_COLUMNS)}), found {list(columns)}; "
            "name it with image_column"
        )
    if caption is None and label is None:
        raise ValueError(
            f"{where}: expected a column with captions ({', '.join(CAPTION_COLUMNS)}) or labels "
            f"({', '.join(LABEL_COLUMNS)}), found {list(columns)}; name it with caption_column or label_column"
        )
    return found


def _canonical(dataset: Any, where: str, folder: Path | None, named: Sequence[str | None]) -> datasets.Dataset:
    """Rename the columns, drop the rest, and have images decoded."""
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"{where}: expected one split with a length, got {type(dataset).__name__}")
    columns = _find_columns(dataset.column_names, where, named)
    names = {column: name for column, name in zip(columns, ("image", "caption", "label"), strict=True) if column}
    dataset = dataset.select_columns(list(names))
    dataset = dataset.rename_columns({column: name for column, name in names.items() if column != name})
    if "caption" in dataset.column_names:
        for number, value in enumerate(dataset["caption"]):
            _captions(value, f"{where}, row {number}")
    if "label" in dataset.column_names and isinstance(dataset.features["label"], datasets.Value):
        values, feature = _encode_labels(list(dataset["label"]))
        dataset = dataset.remove_columns("label").add_column("label", values, feature=feature)
    return _decode_images(dataset, where, folder)


def _decode_images(dataset: datasets.Dataset, where: str, folder: Path | None) -> datasets.Dataset:
    feature = dataset.features["image"]
    kind = getattr(feature, "dtype", None)
    if not isinstance(feature, (datasets.Image, dict)) and kind not in _BYTES:
        raise ValueError(f"{where}: expected images or their bytes in the image column, found {feature}")
    stored = dataset.cast_column("image", datasets.Image(decode=False))
    missing = pyarrow.compute.struct_field(stored.data.column("image"), "bytes").null_count
    if not missing or folder is None:
        return stored.cast_column("image", datasets.Image())
    images = [
        image
        if image["bytes"]
        else {"bytes": None, "path": _safe_path(image["path"], folder, f"{where}, row {number}")}
        for number, image in enumerate(stored["image"])
    ]
    return dataset.remove_columns("image").add_column("image", images, feature=datasets.Image())
