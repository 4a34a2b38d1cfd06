"""Pictures opened: which formats, how large, with what metadata, and what becomes of a decoder's errors."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tiny_clip import SIZE, class_folders, picture
from transformers import CLIPImageProcessor

import clipft
from clipft.data.pictures import (
    EncodedPicture,
    UnreadablePictureError,
    has_picture_content,
    limit_pixels,
    open_picture,
    picture_endings,
    picture_formats,
    to_pixels,
)
from clipft.data.sources import load_reading
from clipft.data.transforms import build_transform
from clipft.recipes.options import DataOptions, options_from
from clipft.recipes.sources import reading_of

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def unlimited() -> Iterator[None]:
    """Puts the limit of pixels back."""
    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before
    os.environ.pop("CLIPFT_MAX_PIXELS", None)


def file_of(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """The head of a PNG of that size, and a few bytes of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


# ---- which files ----


def test_no_outside_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, tool = tmp_path / "started", tmp_path / "bin" / "gs"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(EPS)
    picture(0)[0].save(tmp_path / "b.png")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\nb.png,two\n")
    assert clipft.load_pairs(tmp_path / "t.csv", on_bad_row="skip")["caption"][:] == ["two"]
    with pytest.raises(ValueError, match=r"a\.jpg: the image cannot be read \(cannot identify"):
        clipft.load_pairs(tmp_path / "t.csv")[0]["image"]
    with pytest.raises(ValueError, match=r"a\.jpg: the image cannot be read"):
        open_picture(tmp_path / "a.jpg")
    assert not mark.exists()
    assert not {"EPS", "WMF", "IPTC"} & set(picture_formats())


@pytest.mark.parametrize("name", ["0.jfif", "0.pgm", "0.JPE", "0.avif", "0.webp", "0.tga", "0.jp2", "0.qoi", "0.ico"])
def test_endings_that_pillow_opens(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    kind = {".pgm": "PPM", ".jfif": "JPEG", ".JPE": "JPEG"}.get(path.suffix)
    picture(0)[0].save(path, format=kind)
    assert path.suffix.lower() in picture_endings()
    assert open_picture(path).width in (50, 48, 32)


def test_what_has_no_ending_is_judged_by_content(tmp_path: Path) -> None:
    for name, data in {
        "picture": file_of(picture(0)[0], format="PNG"),
        "text": b"Py: a text that begins like a portable pixmap",
        "empty": b"",
        "eps": EPS,
    }.items():
        (tmp_path / name).write_bytes(data)
        assert has_picture_content(tmp_path / name) == (name == "picture"), name
    os.mkfifo(tmp_path / "fifo")
    assert not has_picture_content(tmp_path / "fifo")


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, why in {
        "fifo": "found a pipe or a device",
        "folder": "found a folder",
        "loop": "symbolic",
        "gone": "No such",
    }.items():
        with pytest.raises(UnreadablePictureError, match=rf"{name}\.png: the image cannot be read \(.*{why}"):
            open_picture(tmp_path / f"{name}.png")


# ---- how large ----


@pytest.mark.parametrize("mode", ["1", "RGB"])
def test_a_large_picture_of_next_to_nothing_is_refused_unless_it_is_meant(unlimited: None, mode: str) -> None:
    packed = io.BytesIO()
    Image.new(mode, (8000, 6000)).save(packed, "PNG")
    blank = EncodedPicture(packed.getvalue(), "x")
    with pytest.raises(UnreadablePictureError, match=r"x: .*\(8000 x 6000 pixels in \d+ bytes: it shows next"):
        blank.decode()
    limit_pixels(8000 * 6000)
    assert blank.size() == (8000, 6000)


def test_a_large_picture_of_something_is_read() -> None:
    packed, lines = io.BytesIO(), np.zeros((6000, 8000), np.uint8)
    lines[::64] = np.random.default_rng(0).integers(0, 256, 8000)
    Image.fromarray(lines).save(packed, "PNG")
    assert EncodedPicture(packed.getvalue(), "x").decode().size == (8000, 6000)


def test_many_pixels_are_refused_by_the_head(unlimited: None, tmp_path: Path) -> None:
    large = png_of_size(13000, 13000)
    with pytest.raises(UnreadablePictureError, match=r"x: .*\(13000 x 13000 pixels, more than max_pixels"):
        EncodedPicture(large, "x").decode()
    with pytest.raises(UnreadablePictureError, match="more pixels than max_pixels"):
        EncodedPicture(png_of_size(99000, 13000), "x").decode()
    limit_pixels(13000**2)
    assert EncodedPicture(large, "x").size() == (13000, 13000)
    code = "from clipft.data import pictures; from PIL import Image; print(Image.MAX_IMAGE_PIXELS)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(13000**2)  # a process started later knows
    class_folders(tmp_path / "classes", 8)
    Image.new("RGB", (60, 60)).save(tmp_path / "classes" / "red" / "x.png")
    assert len(clipft.load_pairs(tmp_path / "classes", on_bad_row="skip", max_pixels=50 * 40)) == 8
    options = options_from(DataOptions, {"max_pixels": 60 * 60, "on_bad_row": "skip"})
    assert len(load_reading(tmp_path / "classes", reading_of(options))) == 9
    limit_pixels(13000**2)
    sparse = tmp_path / "sparse.png"
    with sparse.open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(UnreadablePictureError, match="bytes, too many"):
        open_picture(sparse)


def test_a_format_decoded_in_python_may_not_claim_pixels_without_bytes() -> None:
    data = bytearray(file_of(Image.new("RGB", (8, 8)), format="DDS"))
    data[12:20] = struct.pack("<II", 9000, 9000)
    with pytest.raises(UnreadablePictureError, match="9000 x 9000 pixels in"):
        EncodedPicture(bytes(data), "x").decode()


@pytest.mark.parametrize("size", [(2, 4000), (4000, 2), (3, 100), (1, 1)])
def test_long_thin_pictures_are_cropped_before_they_are_scaled(size: tuple[int, int]) -> None:
    options = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    processor = CLIPImageProcessor(**options)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    scaled: list[tuple[int, ...]] = []
    plain = processor.resize

    def resize(pixels, *args, **kwargs):
        scaled.append(plain(pixels, *args, **kwargs).shape[-2:])
        return plain(pixels, *args, **kwargs)

    processor.resize = resize
    pixels = build_transform(processor)(image)
    assert max(scaled[0]) <= 17 * SIZE
    exact = CLIPImageProcessor(**options)(image, return_tensors="pt")["pixel_values"][0]
    assert (pixels - exact).abs().max() < 0.02  # one level of 256
    steps = processor.to_dict() | options | {"resample": 3}
    assert np.array_equal(to_pixels(image, steps), pixels.numpy())


def test_a_thin_jpeg_is_decoded_at_reduced_scale() -> None:
    thin = EncodedPicture(file_of(Image.new("RGB", (24, 1)), format="JPEG"), "x")
    assert thin.decode(8).size == (24, 1)


# ---- metadata ----


def test_malformed_exif_costs_no_sound_picture() -> None:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x0132] = 6, "Maker", "2020:01:01 00:00:00"
    tags.get_ifd(0x8769)[0x9003] = "2020:01:01"
    good = tags.tobytes()
    assert EncodedPicture(file_of(Image.new("RGB", (48, 32)), format="JPEG", exif=good), "x").decode().size == (32, 48)
    sizes = set()
    for seed in range(200):
        chance, changed = random.Random(seed), bytearray(good)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(6, len(changed))] = chance.randrange(256)
        for kind in ("JPEG", "PNG", "WEBP") if seed < 20 else ("JPEG",):
            odd = EncodedPicture(file_of(Image.new("RGB", (48, 32)), format=kind, exif=bytes(changed)), "x")
            assert odd.decode().size == odd.size()
            sizes.add(odd.size())
    assert sizes == {(48, 32), (32, 48)}


@pytest.mark.parametrize("size", [(48, 32)])
def test_a_turned_picture_is_turned_once(size: tuple[int, int]) -> None:
    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = orientation
        data = file_of(picture(0)[0].resize(size), format="PNG", exif=tags)
        turned = EncodedPicture(data, "x").decode()
        assert turned.size == (size if orientation < 5 else size[::-1])
        assert open_picture(turned).getexif().get(0x0112, 1) == 1


def test_large_texts_cost_no_sound_png() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * (3 << 20), zip=True)
    texts.add_itxt("more", "y" * (2 << 20), zip=True)
    data = file_of(picture(0)[0], format="PNG", pnginfo=texts)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data)).load()
    read = EncodedPicture(data, "x")
    assert np.array_equal(np.asarray(read.decode()), np.asarray(picture(0)[0]))
    assert read.size() == (50, 40)


# ---- errors ----


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, struct.error, ZeroDivisionError, MemoryError])
def test_whatever_a_decoder_raises_is_a_bad_row(error, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self) -> None:
        raise error("odd")

    picture(0)[0].save(tmp_path / "a.png")
    picture(1)[0].save(tmp_path / "b.webp", lossless=True)
    (tmp_path / "t.csv").write_text("image,caption\na.png,one\nb.webp,two\n")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert clipft.load_pairs(tmp_path / "t.csv", on_bad_row="skip")["caption"][:] == ["two"]
    with pytest.raises(ValueError, match=r"a\.png: the image cannot be read \(odd\)"):
        open_picture(tmp_path / "a.png")
    lazy = Image.open(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: the image cannot be read \(odd\)"):
        open_picture(lazy)


def test_an_error_names_the_outermost_place_once() -> None:
    with pytest.raises(UnreadablePictureError) as error:
        clipft.data.rows.read_row([{"image": {"bytes": b"junk", "path": "x.png"}}], 0)
    assert str(error.value) == "row 0 (x.png): the image cannot be read (cannot identify it as a picture)"


# ---- the column ----


def test_the_column_of_pictures_behaves_as_datasets_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for index in range(2):
            picture(index)[0].save(tmp_path / "classes" / name / f"{index}.png")
    rows = clipft.load_pairs(tmp_path / "classes")
    assert rows.features["image"] == datasets.Image()
    rows.save_to_disk(tmp_path / "saved")
    plain = datasets.load_from_disk(str(tmp_path / "saved"))
    assert type(plain.features["image"]) is datasets.Image
    both = datasets.concatenate_datasets([plain, rows.shuffle(seed=0).select([0, 1])])
    assert both[5]["image"].size == (50, 40)
    parts = rows.train_test_split(0.5, seed=0)
    assert type(parts["test"].features["image"]) is type(rows.features["image"])
