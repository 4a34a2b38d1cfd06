"""Image-caption pairs and labelled images from what people have: class folders, tables, tar shards, data sets by name.

Whatever the source, the result has the columns ``image`` and ``caption`` and / or ``label``. Rows of a table with the
same image path are one picture with several captions, as in Flickr30k and COCO: taken as separate pictures, they would
be each other's negatives.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
import pyarrow.compute

from clipft.shards import Address, samples, shard_of, shard_paths

__all__ = ["Reading", "load_pairs", "read_pairs"]

_logger = logging.getLogger(__name__)
_SHOWN = 5  # bad rows that a message names
_CHUNK = 256  # pictures in memory while they are looked at

IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "filepath", "file_path", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title")
LABEL_COLUMNS = ("label", "class")
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_IMAGE_EXTENSIONS = [suffix[1:] for suffix in sorted(_IMAGE_SUFFIXES)]
_PATHS, _BYTES = ("string", "large_string"), ("binary", "large_binary")
_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def load_pairs(
    path_or_name: str | Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    attribute_columns: Sequence[str] = (),
    on_bad_row: str = "error",
    allow_outside: bool = False,
) -> datasets.Dataset:
    """Load a data set for training or evaluation.

    Args:
        path_or_name: a folder with one sub-folder of pictures a class; a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``
            file with image paths relative to the file (which may not leave its folder) or image bytes, and a caption or
            a list of captions a row; WebDataset shards (a ``.tar`` file, a folder of them, ``shards/{000..127}.tar``,
            ``shards/*.tar``), which are read in place; a folder written by ``Dataset.save_to_disk``; any other folder
            or name that ``datasets.load_dataset`` takes.
        split: which split of a data set by name.
        image_column, caption_column, label_column: where they are not called by a usual name (``image``, ``file_name``,
            ``filepath``, ``path``; ``caption``, ``captions``, ``text``, ``title``; ``label``, ``class``); in shards, an
            extension or a member of the ``.json`` (usual: ``jpg`` and the like; ``txt``; ``cls``).
        attribute_columns: further columns of classes, for heads of their own; empty or null is a value not known.
        on_bad_row: ``"error"``: a row without caption or file is an error here, a picture that cannot be decoded when
            its turn comes. ``"skip"`` leaves such rows out and logs how many and which; it decodes every picture once.
        allow_outside: let the paths in a file leave its folder.

    Returns:
        A ``datasets.Dataset`` with ``image`` (decoded to PIL on access) and ``caption`` (a string or a list of strings)
        and / or ``label`` (a ``ClassLabel`` where the classes have names); the attributes as ``ClassLabel`` or None.

    Raises:
        FileNotFoundError: the file or folder, or an image that a table names, does not exist.
        ValueError: a column, caption or path is not as expected; the message names file and row.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row: expected 'error' or 'skip', got {on_bad_row!r}")
    named = (image_column, caption_column, label_column)
    reading = Reading(named, on_bad_row == "skip", allow_outside, checked_attributes(attribute_columns))
    return load_reading(path_or_name, reading, split)


def load_reading(path_or_name: str | Path, reading: Reading, split: str = "train") -> datasets.Dataset:
    """As :func:`load_pairs`; ``reading`` then says what was left out."""
    dataset = read_pairs(path_or_name, split, reading)
    if reading.skip:
        dataset = _drop_unreadable(dataset, str(path_or_name), reading)
    if reading.skipped:
        _logger.warning("%s", reading.summary(str(path_or_name), len(dataset)))
    return dataset


@dataclass
class Reading:
    """How a data set is read, and what was left out.

    Attributes:
        named: the columns of image, caption and label, where given.
        skip: leave bad rows out.
        allow_outside: let paths leave the file's folder.
        attributes: columns kept beside these.
        skipped: why each row was left out.
        places: where each row of the result comes from, if the source says.
    """

    named: Sequence[str | None] = (None, None, None)
    skip: bool = False
    allow_outside: bool = False
    attributes: Sequence[str] = ()
    skipped: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    @contextmanager
    def row(self) -> Iterator[None]:
        """Around the work on one row: what is wrong with it is raised or, with ``skip``, noted."""
        try:
            yield
        except (ValueError, OSError) as error:
            if not self.skip:
                raise
            self.skipped.append(str(error))

    def summary(self, source: str, kept: int) -> str:
        """One line for the user."""
        shown = "; ".join(self.skipped[:_SHOWN]) + ("; ..." if len(self.skipped) > _SHOWN else "")
        return f"{source}: left out {len(self.skipped)} of {kept + len(self.skipped)} rows: {shown}"


def read_pairs(path_or_name: str | Path, split: str, reading: Reading) -> datasets.Dataset:
    """As :func:`load_pairs`, without a look at the pictures themselves."""
    path = Path(path_or_name).expanduser()
    if path.suffix.lower() == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        shards = sorted(path.glob("*.tar")) if path.is_dir() else shard_paths(str(path_or_name))
        return _from_shards(shards, str(path_or_name), reading)
    if path.is_file():
        return _from_file(path, reading)
    if path.is_dir():
        return _from_folder(path, split, reading)
    if path.suffix.lower() in _TABLE_SUFFIXES or str(path_or_name).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"path_or_name: expected a file, a folder or a data set's name, there is no {str(path)!r}"
        )
    return _canonical(_by_name(str(path_or_name), split), str(path_or_name), None, reading)


def _drop_unreadable(dataset: datasets.Dataset, where: str, reading: Reading) -> datasets.Dataset:
    """Decode every picture, JPEGs at an eighth of their size, which reads the file to its end all the same."""
    from clipft.data import read_stored, stored_pictures
    from clipft.pixels import UNREADABLE, to_rgb
    from clipft.transforms import EncodedPicture

    stored = stored_pictures(dataset)
    assert stored is not None  # _decode_images has made it so

    def fault(number: int, image: dict[str, Any]) -> str | None:
        place = reading.places[number] if reading.places else f"{where}, row {number}"
        try:
            to_rgb(EncodedPicture(read_stored(image), place).decode(8))
        except UNREADABLE as error:
            message = str(error)
            return message if message.startswith(place) else f"{place}: the image cannot be read ({message})"
        return None

    faults: list[str | None] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(stored), _CHUNK):
            images = stored[start : start + _CHUNK]["image"]
            faults += pool.map(fault, range(start, start + len(images)), images)
    found = [message for message in faults if message]
    reading.skipped += found
    return _kept(dataset, [number for number, message in enumerate(faults) if not message], where) if found else dataset


def _kept(dataset: datasets.Dataset, rows: list[int], where: str) -> datasets.Dataset:
    if not rows:
        raise ValueError(f"{where}: expected at least one row that can be used, found none")
    return dataset.select(rows)


# ---- folders and names ----


def _from_folder(folder: Path, split: str, reading: Reading) -> datasets.Dataset:
    if (folder / "state.json").is_file():
        return _canonical(datasets.Dataset.load_from_disk(str(folder)), str(folder), folder, reading)
    if (
        any(entry.suffix.lower() in _TABLE_SUFFIXES for entry in folder.rglob("*"))
        or (folder / "dataset_dict.json").exists()
    ):
        return _canonical(_by_name(str(folder), split), str(folder), folder, reading)
    if reading.attributes:
        raise ValueError(f"attribute_columns: {folder} has class folders and no columns; give a table")
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


def _from_file(path: Path, reading: Reading) -> datasets.Dataset:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path, reading)
    if suffix in (".csv", ".tsv"):
        return _from_rows(_read_csv(path, "\t" if suffix == ".tsv" else ",", reading), path, reading)
    if suffix == ".jsonl":
        return _from_rows(_read_jsonl(path, reading), path, reading)
    known = ", ".join((*_TABLE_SUFFIXES, ".tar"))
    raise ValueError(f"{path}: expected a file ending in {known}, got {suffix or 'no ending'!r}")


def _from_parquet(path: Path, reading: Reading) -> datasets.Dataset:
    dataset = cast(datasets.Dataset, datasets.Dataset.from_parquet(str(path)))
    image = _find_columns(dataset.column_names, str(path), reading.named)[0]
    if getattr(dataset.features[cast(str, image)], "dtype", None) in _PATHS:
        return _from_rows(list(enumerate(cast(list[dict[str, Any]], dataset.to_list()))), path, reading)
    return _canonical(dataset, str(path), path.parent, reading)


def _read_csv(path: Path, delimiter: str, reading: Reading) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        for number, row in enumerate(reader):
            with reading.row():
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, row {number}: expected {len(reader.fieldnames or ())} fields, as in the header; a "
                        f"field that holds {delimiter!r} must be quoted"
                    )
                rows.append((number, row))
    return rows


def _read_jsonl(path: Path, reading: Reading) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        with reading.row():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number + 1}: expected one JSON object a line ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number + 1}: expected a JSON object, got {type(row).__name__}")
            rows.append((number, row))
    return rows


def _from_rows(rows: list[tuple[int, dict[str, Any]]], path: Path, reading: Reading) -> datasets.Dataset:
    """Numbered rows of a table whose image column holds paths."""
    if not rows:
        raise ValueError(f"{path}: expected at least one row, found none")
    keys = rows[0][1].keys()
    names = _find_columns(list(keys), str(path), reading.named)
    _check_attributes(list(keys), names, str(path), reading)
    pictures: dict[str, dict[str, Any]] = {}
    for number, row in rows:
        where = f"{path}, row {number}"
        with reading.row():
            if row.keys() != keys:
                raise ValueError(f"{where}: expected the keys of row {rows[0][0]}, {sorted(keys)}, got {sorted(row)}")
            image = _safe_path(row[cast(str, names[0])], path.parent, where, reading)
            _join(pictures, image, row, names[1:], where, reading.attributes)
    return _assemble(pictures, names[1:], str(path), reading)


def _join(
    pictures: dict[str, dict[str, Any]],
    image: str,
    row: dict[str, Any],
    names: Sequence[str | None],
    where: str,
    attributes: Sequence[str],
) -> None:
    """Add a row to the picture that it names."""
    caption, label = names
    captions = _captions(row[caption], where) if caption else []
    known = pictures.get(image, {})
    if label and known.get("label", row[label]) != row[label]:
        raise ValueError(
            f"{where}: expected the label of an earlier row with this image, {known['label']!r}, got {row[label]!r}"
        )
    values = {name: _attribute(row[name]) for name in attributes}
    for name, value in values.items():
        earlier = known.get("attributes", values)[name]
        if None not in (earlier, value) and earlier != value:
            raise ValueError(f"{where}: expected {name} of an earlier row with this image, {earlier!r}, got {value!r}")
        values[name] = earlier if value is None else value
    picture = pictures.setdefault(image, {"captions": [], "place": where, "label": row[label] if label else None})
    picture["captions"] += captions
    picture["attributes"] = values


def _assemble(
    pictures: dict[str, dict[str, Any]], names: Sequence[str | None], where: str, reading: Reading
) -> datasets.Dataset:
    """The data set of pictures by path or address."""
    if not pictures:
        raise ValueError(f"{where}: expected at least one row that can be used, found none")
    caption, label = names
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
    for name in reading.attributes:
        values = [picture["attributes"][name] for picture in pictures.values()]
        columns[name], features[name] = _encode_attribute(values, name, where)
    reading.places = [picture["place"] for picture in pictures.values()]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _safe_path(value: Any, folder: Path, where: str, reading: Reading) -> str:
    """The absolute path of an image named in a table, or its address in a shard; it must exist and lie in the table's
    folder.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected the path of an image, got {value!r}")
    shard = shard_of(value)
    path = (folder / (shard or value)).resolve()
    if not reading.allow_outside and not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{where}: expected an image inside {folder}, the file's folder, got {value!r}, which leaves it; if that "
            "is meant, allow_outside=True (--allow-outside-paths)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no image {value!r} in {folder}")
    return value if shard else str(path)


# ---- shards ----


def _from_shards(shards: Sequence[Path], where: str, reading: Reading) -> datasets.Dataset:
    image, caption, label = reading.named
    rows: list[tuple[str, dict[str, Any]]] = []
    for shard in shards:
        for key, fields in samples(shard):
            files = {name: value for name, value in fields.items() if isinstance(value, Address)}
            row = {
                "image": _first(files, [image] if image else _IMAGE_EXTENSIONS),
                "caption": _first(fields, [caption] if caption else ("txt", *CAPTION_COLUMNS)),
                "label": _first(fields, [label] if label else ("cls", *LABEL_COLUMNS)),
                **{name: fields.get(name) for name in reading.attributes},
            }
            rows.append((f"{shard}, {key}", row))
    present = [name if any(row[name] is not None for _, row in rows) else None for name in ("caption", "label")]
    if present == [None, None]:
        raise ValueError(
            f"{where}: expected captions (.txt, .caption, or {', '.join(CAPTION_COLUMNS)} in .json) or labels (.cls), "
            f"found none in {len(rows)} samples; name them with caption_column or label_column"
        )
    pictures: dict[str, dict[str, Any]] = {}
    for place, row in rows:
        with reading.row():
            if row["image"] is None:
                raise ValueError(f"{place}: expected a picture ({', '.join(_IMAGE_EXTENSIONS)}), found none")
            if present[1] and row["label"] is None:
                raise ValueError(f"{place}: expected a label, found none")
            _join(pictures, row["image"], row, present, place, reading.attributes)
    return _assemble(pictures, present, where, reading)


def _first(fields: dict[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


# ---- captions and labels ----


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


def _attribute(value: Any) -> str | None:
    """An attribute's value as text, None where it is not known."""
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()
    return None if missing else str(value).strip()


def _encode_attribute(values: list[str | None], name: str, where: str) -> tuple[list[int | None], Any]:
    """As named classes."""
    names = sorted({value for value in values if value is not None})
    if not names:
        raise ValueError(f"attribute_columns: {name!r}: expected values in this column of {where}, all are empty")
    number = {value: index for index, value in enumerate(names)}
    return [None if value is None else number[value] for value in values], datasets.ClassLabel(names=names)


# ---- columns ----


def checked_attributes(names: Sequence[str]) -> list[str]:
    """Names of columns, each once, other than those that have a place of their own."""
    taken = {"image", "caption", "label"}
    if isinstance(names, str) or len(set(names)) < len(names) or taken & set(names):
        raise ValueError(f"attribute_columns: expected a list of columns other than {sorted(taken)}, got {names!r}")
    return list(names)


def _check_attributes(columns: Sequence[str], used: Sequence[str | None], where: str, reading: Reading) -> None:
    rest = [column for column in columns if column not in used]
    wrong = [name for name in reading.attributes if name not in rest]
    if wrong:
        raise ValueError(f"attribute_columns: expected columns of {where} among {rest}, got {wrong}")


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


def _canonical(dataset: Any, where: str, folder: Path | None, reading: Reading) -> datasets.Dataset:
    """Rename the columns, drop the rest, and have images decoded."""
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"{where}: expected one split with a length, got {type(dataset).__name__}")
    columns = _find_columns(dataset.column_names, where, reading.named)
    names = {column: name for column, name in zip(columns, ("image", "caption", "label"), strict=True) if column}
    _check_attributes(dataset.column_names, columns, where, reading)
    dataset = dataset.select_columns([*names, *reading.attributes])
    dataset = dataset.rename_columns({column: name for column, name in names.items() if column != name})
    dataset, images = _checked(dataset, where, folder, reading)
    if "label" in dataset.column_names and isinstance(dataset.features["label"], datasets.Value):
        values, feature = _encode_labels(list(dataset["label"]))
        dataset = dataset.remove_columns("label").add_column("label", values, feature=feature)
    for name in reading.attributes:
        if not isinstance(dataset.features[name], datasets.ClassLabel):
            attributes, feature = _encode_attribute([_attribute(value) for value in dataset[name]], name, where)
            dataset = dataset.remove_columns(name).add_column(name, attributes, feature=feature)
    if images is None:
        return dataset.cast_column("image", datasets.Image())
    return dataset.remove_columns("image").add_column("image", images, feature=datasets.Image())


def _checked(
    dataset: datasets.Dataset, where: str, folder: Path | None, reading: Reading
) -> tuple[datasets.Dataset, list[Any] | None]:
    """The rows with captions and pictures, and the pictures where their paths had to be looked at."""
    feature = dataset.features["image"]
    kind = getattr(feature, "dtype", None)
    if not isinstance(feature, (datasets.Image, dict)) and kind not in _BYTES:
        raise ValueError(f"{where}: expected images or their bytes in the image column, found {feature}")
    stored = dataset.cast_column("image", datasets.Image(decode=False))
    in_files = bool(pyarrow.compute.struct_field(stored.data.column("image"), "bytes").null_count)
    images: list[Any] | None = [] if in_files and folder is not None else None
    captions = list(dataset["caption"]) if "caption" in dataset.column_names else None
    good = []
    for number in range(len(dataset)):
        with reading.row():
            place = f"{where}, row {number}"
            if captions is not None:
                _captions(captions[number], place)
            if images is not None and folder is not None:
                image = stored[number]["image"] or {"bytes": None, "path": None}
                if not image["bytes"]:
                    image = {"bytes": None, "path": _safe_path(image["path"], folder, place, reading)}
                images.append(image)
            good.append(number)
    if len(good) < len(dataset):
        dataset = _kept(dataset, good, where)
        reading.places = [f"{where}, row {number}" for number in good]
    return dataset, images
