"""Makes fashion.parquet from the Debian package dataset-fashion-mnist: python notebooks/data/make_fashion.py

150 pictures a class of its training set, then 50 a class of its test set, black on white as a shop shows them. The
training pictures are the last ones of the set: the package's small model has seen the first.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
# class: what a shop's table would say of it; a value that nobody entered is empty
CLASSES = {
    "t-shirt": ("upper body", "short", None),
    "trousers": ("legs", None, None),
    "pullover": ("upper body", "long", None),
    "dress": ("whole body", None, None),
    "coat": ("upper body", "long", None),
    "sandal": ("feet", None, "low"),
    "shirt": ("upper body", None, None),  # some are short
    "sneaker": ("feet", None, "low"),
    "bag": ("hand", None, None),
    "ankle boot": ("feet", None, "high"),
}
ARTICLES = {"trousers": "", "ankle boot": "an "}
COLUMNS = ("worn_on", "sleeves", "shaft")


def last_of_each(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = (gzip.decompress((SOURCE / f"{kind}-{name}-ubyte.gz").read_bytes())
                      for name in ("images-idx3", "labels-idx1"))  # fmt: skip
    pictures = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
    classes = np.frombuffer(labels, np.uint8, offset=8)
    rows = np.sort(np.concatenate([np.flatnonzero(classes == c)[-count:] for c in range(len(CLASSES))]))
    return pictures[rows], classes[rows]


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(255 - picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    pictures, classes = (
        np.concatenate(both) for both in zip(last_of_each("train", 150), last_of_each("t10k", 50), strict=True)
    )
    names = list(CLASSES)
    rows = [names[number] for number in classes]
    columns = {
        "image": [{"bytes": png(picture), "path": None} for picture in pictures],
        "caption": [f"a photo of {ARTICLES.get(name, 'a ')}{name}" for name in rows],
        "label": classes.tolist(),
        **{column: [CLASSES[name][place] for name in rows] for place, column in enumerate(COLUMNS)},
    }
    features = {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "label": datasets.ClassLabel(names=names),
    }
    features |= {column: datasets.Value("string") for column in COLUMNS}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(Path(__file__).with_name("fashion.parquet"))


if __name__ == "__main__":
    main()
