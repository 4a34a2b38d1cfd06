"""Test sets in MVTec AD's layout: what is read, what is counted, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipft.data.inspection import InspectionSet, normal_folder, read_inspection, read_mask
from clipft.data.reading import Reading

SIZE = (12, 8)


def put(path: Path, pixels: np.ndarray | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, SIZE[::-1], dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def marks(size: tuple[int, int] = SIZE) -> np.ndarray:
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[2:4, 3:6] = 255
    return pixels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two normal pictures to learn from, two to test on, two kinds of defects."""
    folder = tmp_path / "tiles"
    for name in ("train/good/000", "train/good/001", "test/good/000", "test/good/001"):
        put(folder / f"{name}.png")
    for kind, names in (("crack", ("000", "001")), ("spot", ("000",))):
        for name in names:
            put(folder / "test" / kind / f"{name}.png")
            put(folder / "ground_truth" / kind / f"{name}_mask.png", marks())
    return folder


def read(folder: Path, skip: bool = False) -> tuple[InspectionSet, Reading, Reading]:
    reading, masks = Reading(skip=skip), Reading(skip=skip)
    return read_inspection(folder, reading, masks), reading, masks


def test_pictures_kinds_and_masks(root: Path) -> None:
    found, reading, masks = read(root)
    assert found.dataset["id"] == ["crack/000.png", "crack/001.png", "good/000.png", "good/001.png", "spot/000.png"]
    assert found.kinds == ["crack", "crack", None, None, "spot"]
    assert [mask and mask.relative_to(root).as_posix() for mask in found.masks] == [
        "ground_truth/crack/000_mask.png",
        "ground_truth/crack/001_mask.png",
        None,
        None,
        "ground_truth/spot/000_mask.png",
    ]
    assert found.has_masks and found.dataset[0]["image"].size == SIZE
    assert (reading.line(), masks.line()) == ("read 5 of 5", "read 3 of 3")
    assert normal_folder(root) == root / "train/good"


def test_names_of_btad_and_visa(root: Path) -> None:
    """``ok`` and ``ko``, masks by the picture's own name and of another format, pictures a folder further down."""
    (root / "train/good").rename(root / "train/ok")
    (root / "test/good").rename(root / "test/ok")
    (root / "ground_truth/crack/000_mask.png").unlink()
    put(root / "ground_truth/crack/000.bmp", marks())
    put(root / "test/spot/left/7.jpg")
    put(root / "ground_truth/spot/left/7.png", marks())
    found, _, _ = read(root)
    assert found.kinds == ["crack", "crack", None, None, "spot", "spot"]
    assert [mask.name for mask in found.masks if mask] == ["000.bmp", "001_mask.png", "000_mask.png", "7.png"]
    assert normal_folder(root) == root / "train/ok"


def test_what_is_no_picture_or_has_none_is_counted_and_named(root: Path) -> None:
    put(root / "test/9.png")
    (root / "test/good/notes.txt").write_text("as delivered")
    (root / "test/empty").mkdir()
    put(root / "ground_truth/spot/404_mask.png", marks())
    (root / "ground_truth/licence.txt").write_text("free")
    _, reading, masks = read(root)
    assert reading.left_out == {
        "of another kind": ["good/notes.txt"],
        "in no folder of a kind": ["9.png"],
        "without pictures": ["empty"],
    }
    assert masks.left_out == {"of another kind": ["licence.txt"], "without a picture": ["spot/404_mask.png"]}
    assert reading.given == 8 and masks.given == 5


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no mask": (lambda root: (root / "ground_truth/crack/001_mask.png").unlink(), "expected a mask in ground_truth"),
    "another size": (
        lambda root: put(root / "ground_truth/crack/001_mask.png", marks((8, 12))),
        "001_mask.png: expected 12 x 8 pixels as .*crack/001.png has, got 8 x 12",
    ),
    "all black": (
        lambda root: put(root / "ground_truth/crack/001_mask.png", np.zeros((8, 12), np.uint8)),
        "expected the defect marked, found all black",
    ),
    "a JPEG": (
        lambda root: (
            (root / "ground_truth/crack/001_mask.png").unlink() or put(root / "ground_truth/crack/001.jpg", marks())
        ),
        "a JPEG has no sharp edges",
    ),
    "no mask at all": (
        lambda root: (root / "ground_truth/crack/001_mask.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken"),
        "001_mask.png: the image cannot be read",
    ),
    "no picture": (lambda root: (root / "test/crack/001.png").write_bytes(b"none"), "001.png: the image cannot be"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mask_that_does_not_fit_is_named_or_left_out(root: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(root)
    with pytest.raises(ValueError, match=message):
        read(root)
    found, reading, masks = read(root, skip=True)
    assert found.kinds == ["crack", None, None, "spot"] and len(found.dataset) == len(found.masks) == 4
    assert len(reading.skipped) == 1 and "001" in reading.skipped[0] and reading.given == 5
    left = masks.left_out.get("of pictures that were left out", [])
    assert (
        len(left) == (case != "no mask") and all("crack/001" in name for name in left) and masks.given == 2 + len(left)
    )


def test_a_normal_picture_that_cannot_be_read_is_left_out(root: Path) -> None:
    (root / "test/good/000.png").write_bytes(b"none")
    found, reading, _ = read(root, skip=True)
    assert found.kinds == ["crack", "crack", None, "spot"] and "good/000.png" in reading.skipped[0]


def test_marks_on_a_normal_picture_are_refused_and_a_black_mask_is_not(root: Path) -> None:
    put(root / "ground_truth/good/000_mask.png", np.zeros((8, 12), np.uint8))
    assert read(root)[0].kinds == ["crack", "crack", None, None, "spot"]
    put(root / "ground_truth/good/000_mask.png", marks())
    with pytest.raises(ValueError, match=r"good/000.png: mask .* expected nothing marked, since the picture is normal"):
        read(root)


def test_without_masks_there_are_pictures_all_the_same(root: Path) -> None:
    (root / "ground_truth").rename(root / "elsewhere")
    found, _, masks = read(root)
    assert not found.has_masks and found.masks == [None] * 5 and masks.given == 0


def test_other_layouts_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"expected MVTec AD's layout: .*; give one of its sets, as .*tiles"):
        read(root.parent)
    with pytest.raises(ValueError, match="found crack, good, spot"):
        read(root / "test")
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected a folder in .*, there is none"):
        read(root / "nowhere")
    with pytest.raises(
        ValueError, match=r"normal: expected normal pictures in .*test/train/good .*found none of these"
    ):
        normal_folder(root / "test")
    (root / "train/ok").mkdir()
    with pytest.raises(ValueError, match="found train/good, train/ok"):
        normal_folder(root)
    (root / "test/good").rename(root / "good")
    with pytest.raises(ValueError, match=r"expected normal pictures in .*test/good"):
        read(root)
    (root / "good").rename(root / "test/good")
    for kind in ("crack", "spot"):
        (root / "test" / kind).rename(root / kind)
    with pytest.raises(ValueError, match="expected pictures of defects"):
        read(root)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_black_is_normal_in_every_mode(tmp_path: Path, mode: str) -> None:
    pixels = marks()
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture = Image.fromarray((pixels > 0).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 200, 0, 0])
    elif mode == "I;16":
        picture = Image.fromarray((pixels > 0).astype(np.uint16))  # 1 of 65535
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png") == (pixels > 0)).all()


def test_a_large_mask_shows_next_to_nothing(tmp_path: Path) -> None:
    """And is read, as large as cameras are."""
    mask = np.zeros((5000, 6000), np.uint8)
    mask[17, 11] = 255
    Image.fromarray(mask).convert("1").save(tmp_path / "x.png")
    assert np.argwhere(read_mask(tmp_path / "x.png")).tolist() == [[17, 11]]
