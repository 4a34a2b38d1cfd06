"""Pictures without torch: files opened, turned upright, to RGB, and to ``pixel_values``, to the bit what torchvision
makes of them in training.

Files may come from strangers: they are opened as one of the formats of :func:`picture_formats` or not at all, refused
by their size before anything is allocated, and whatever a decoder raises is an :class:`UnreadablePictureError` with a
name.

torchvision resizes 8-bit pictures in fixed point: weights of a cubic that widens with the reduction (antialias),
rounded to 16 bits, along the rows and then along the columns, each pass rounded to 8 bits. This is the same in numpy.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from clipft.errors import line_of, shown
from clipft.files import check_file

__all__ = [
    "UNOPENED_ENDINGS",
    "UNREADABLE",
    "EncodedPicture",
    "UnreadablePictureError",
    "check_preprocessing",
    "check_size",
    "has_picture_content",
    "in_order",
    "limit_pixels",
    "naming",
    "open_picture",
    "picture_endings",
    "picture_formats",
    "read_file",
    "shown_part",
    "to_pixels",
    "to_rgb",
    "upright",
]

Found = TypeVar("Found")

UNREADABLE = (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)
# EPS starts Ghostscript, IPTC opens what it holds as any format; the rest are recognised, but have no decoder.
_NEVER_OPENED = {"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None}  # by module, what registers it if not its import
_HEIF, _JXL, _CONVERT = "install pillow-heif", "install pillow-jxl-plugin", "convert to .png or .jpg"
UNOPENED_ENDINGS = {  # of pictures that Pillow alone does not open, and what to do about it
    **dict.fromkeys((".heic", ".heif", ".hif"), _HEIF),
    ".jxl": _JXL,
    **dict.fromkeys((".svg", ".eps", ".ps", ".wmf", ".emf", ".exr", ".hdr", ".dcm"), _CONVERT),
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), _CONVERT),
}
_CONTENTS = {b"ftyphei": _HEIF, b"ftypmif1": _HEIF, b"\0\0JXL ": _JXL}  # at byte 4, and a JXL's at 2
_PIXELS_VARIABLE = "CLIPFT_MAX_PIXELS"  # so that processes started later know the limit too
_BYTES_OF_A_PIXEL = 16  # at the most, in a file
_ORIENTATION = 0x0112  # of EXIF
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HOLDS_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_SLOW_CODECS = ("dds_rgb", "fits_gzip")  # written in Python, a loop over the pixels that the head claims
_MOST_OF_A_BYTE = 64  # pixels that such a codec may claim a byte of the file
_LARGE, _SWELLS = 40_000_000, 1024  # pixels; times its file that a picture of more takes, unless a limit is given
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # of a decoded pixel; of other modes 4
_PNG, _PNG_METADATA = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_LONGEST = 16  # times its crop that a picture's long side may have
_BICUBIC = 3  # PIL's number
_CUBIC_A = -0.5  # the cubic's parameter where it antialiases
_MAX_BITS = 22  # of a fixed-point weight
_CHANNELS, _MOST_SIDE, _MOST_NUMBER = 3, 8192, 1e9  # of what a model takes


def check_preprocessing(config: Any, where: str) -> None:
    """That the steps of a ``CLIPImageProcessor``'s configuration are among those that :func:`to_pixels` knows.

    Raises:
        ValueError: others, or sizes and numbers that are none; ``where`` is what the message begins with.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}: expected an image processor's settings, got {config!r:.80}")
    size, crop = config.get("size"), config.get("crop_size")
    if config.get("do_resize", True) and (
        config.get("resample") != _BICUBIC or not (_sizes(size, "shortest_edge") or _sizes(size, "height", "width"))
    ):
        raise ValueError(
            f"{where}: expected a bicubic resize (resample 3) to a shortest_edge or to height and width, got resample "
            f"{config.get('resample')!r:.80} and size {size!r:.80}"
        )
    if _crops(config) and not _sizes(crop, "height", "width"):
        raise ValueError(f"{where}: expected a crop_size with height and width, got {crop!r:.80}")
    scale, mean, std = (config.get(name, 1) for name in ("rescale_factor", "image_mean", "image_std"))
    if config.get("do_rescale", True) and not _above_zero(scale):
        raise ValueError(f"{where}: expected a rescale_factor above 0, got {scale!r:.80}")
    if config.get("do_normalize", True):
        for name, value, fits in (("image_mean", mean, _finite), ("image_std", std, _above_zero)):
            if not isinstance(value, list | tuple) or len(value) != _CHANNELS or not all(map(fits, value)):
                raise ValueError(f"{where}: expected {name} to be {_CHANNELS} numbers of a picture, got {value!r:.80}")


def _crops(config: Mapping[str, Any]) -> bool:
    """A SigLIP's settings say nothing of a crop."""
    return bool(config.get("do_center_crop", config.get("crop_size") is not None))


def _sizes(value: Any, *names: str) -> bool:
    """Of these, and no others."""
    known = isinstance(value, Mapping) and value.keys() == set(names)
    return known and all(_finite(side) and side == int(side) and 1 <= side <= _MOST_SIDE for side in value.values())


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST_NUMBER


def _above_zero(value: Any) -> bool:
    return _finite(value) and value > 1 / _MOST_NUMBER


# ---- which files ----


def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened, those of installed plugins too."""
    _load_plugins()
    return tuple(name for name in Image.ID if name in Image.OPEN and name not in _NEVER_OPENED)


def picture_endings() -> frozenset[str]:
    """The endings of such files, in lower case, with their dot."""
    formats = {*picture_formats(), "MPO"}  # which JPEG opens
    return frozenset(ending for ending, name in Image.EXTENSION.items() if name in formats)


def has_picture_content(path: str | Path) -> bool:
    """Whether a file without an ending begins as a picture does, by formats that have a mark of their own."""
    marked = [name for name in picture_formats() if Image.OPEN[name][1] is not None]
    try:
        check_file(Path(path))
        with Image.open(path, formats=marked):
            return True
    except Exception:  # whatever a decoder makes of another kind of file
        return False


@cache
def _load_plugins() -> None:
    Image.preinit()  # the usual formats are tried first
    Image.init()
    for module, register in _PLUGINS.items():
        with suppress(ImportError):
            plugin = importlib.import_module(module)
            if register:
                getattr(plugin, register)()


def limit_pixels(most: int | None) -> None:
    """Refuse pictures of more pixels, in this process and those that it starts from now on; None leaves the limit as
    it is: ``PIL.Image.MAX_IMAGE_PIXELS``, 89 million."""
    if most is not None:
        Image.MAX_IMAGE_PIXELS = most
        os.environ[_PIXELS_VARIABLE] = str(most)


if os.environ.get(_PIXELS_VARIABLE, "").isdecimal():
    limit_pixels(int(os.environ[_PIXELS_VARIABLE]))


def _check_pixels(width: int, height: int) -> None:
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(f"{width} x {height} pixels, more than max_pixels (--max-pixels) {most}")


def read_file(path: str | Path) -> bytes:
    """The bytes of a picture's file.

    Raises:
        OSError: there is no such file. ValueError: no regular file, or larger than any picture that is read.
    """
    check_size(check_file(Path(path)))
    return Path(path).read_bytes()


def check_size(size: int) -> None:
    """That a picture's file may be of so many bytes."""
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and size > _BYTES_OF_A_PIXEL * most:
        raise ValueError(f"{size} bytes, too many for a picture of max_pixels (--max-pixels) {most}")


# ---- reading ----


class UnreadablePictureError(ValueError):
    """The message names the picture; ``why`` is the rest of it."""

    why = ""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Around the reading of a picture: whatever a decoder raises says which picture it was. Of two names the outer,
    which knows the row, is kept."""
    try:
        yield
    except Exception as error:  # decoders raise RuntimeError, struct.error, ZeroDivisionError, ...
        why = error.why if isinstance(error, UnreadablePictureError) else _why(error)
        said = f"{name}: the image cannot be read ({why.removeprefix(f'{name}: ')})"
        named = UnreadablePictureError(shown(said))
        named.why = why
        raise named from error


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify it as a picture"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than max_pixels (--max-pixels) {Image.MAX_IMAGE_PIXELS}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return line_of(error)


def in_order(values: Any) -> Any:
    """Values by their place; those of a pandas Series, which goes by its index, as a list."""
    return list(values) if hasattr(values, "iloc") else values


def open_picture(image: Any) -> Image.Image:
    """A PIL picture, or one read from a path and turned upright.

    Raises:
        UnreadablePictureError: it cannot be read; the message names the path. TypeError: neither.
    """
    if isinstance(image, Image.Image):
        with naming(str(getattr(image, "filename", "")) or "images"):
            image.load()
        return image
    if not isinstance(image, (str, Path)):
        raise TypeError(f"images: expected PIL pictures or paths, got {type(image).__name__}")
    with naming(str(image)):
        return EncodedPicture(read_file(image), str(image)).decode()


def upright(picture: Image.Image) -> Image.Image:
    """Turned as the camera's EXIF tag says; one that cannot be read says nothing."""
    turn = _TURNS.get(_orientation(picture))
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    for key in _HOLDS_ORIENTATION:
        turned.info.pop(key, None)
    return turned


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # malformed EXIF: struct.error, TypeError, ...
        return 1


def to_rgb(picture: Image.Image) -> Image.Image:
    """Three channels of 8 bits, as transformers makes them: CMYK, palettes and grey by PIL, transparency on white. 16
    bits keep their upper 8, where PIL would clip all but the darkest 256 levels to white.

    Raises:
        ValueError: 32 bits or floating point, which have no known range.
    """
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"image: expected 8 or 16 bits a channel, got PIL's mode {picture.mode!r}, whose range is not known: scale "
            "it to 8 bits"
        )
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which copies


@dataclass(frozen=True)
class EncodedPicture:
    """The bytes of a picture file, for a random crop to decode at the scale that it needs.

    Attributes:
        data: the file.
        name: says in errors which picture this is.
    """

    data: bytes
    name: str

    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture, from the file's head."""

        def look(picture: Image.Image) -> tuple[int, int]:
            width, height = picture.size
            return (height, width) if _orientation(picture) in _TURNED else (width, height)

        return self.opened(look)

    def decode(self, reduction: int = 1) -> Image.Image:
        """The picture, upright; a JPEG by 1, 2, 4 or 8 smaller in width and height.

        Raises:
            UnreadablePictureError: it cannot be read.
        """

        def load(picture: Image.Image) -> Image.Image:
            if reduction > 1:  # of no effect on other formats
                wanted = max(picture.width // reduction, 1), max(picture.height // reduction, 1)
                picture.draft(None, wanted)  # type: ignore[no-untyped-call]
            picture.load()
            return upright(picture)

        return self.opened(load)

    def opened(self, look: Callable[[Image.Image], Found]) -> Found:
        """What ``look`` finds in the picture, opened and not yet decoded.

        Raises:
            UnreadablePictureError: it cannot be read.
        """
        with naming(self.name):
            try:
                return _look(self.data, look)
            except Exception as error:
                hint = next((hint for mark, hint in _CONTENTS.items() if mark in self.data[2:12]), None)
                if hint and isinstance(error, UnidentifiedImageError):
                    raise ValueError(f"cannot identify it as a picture: {hint}") from error
                rest = _without_metadata(self.data)
                if rest is None:
                    raise
                return _look(rest, look)


def _look(data: bytes, look: Callable[[Image.Image], Found]) -> Found:
    with Image.open(BytesIO(data), formats=picture_formats()) as picture:
        _check_pixels(*picture.size)
        _check_claim(picture, len(data))
        return look(picture)


def _check_claim(picture: Image.Image, size: int) -> None:
    """That a file of so many bytes can show the pixels that its head claims: what a decoder fills may be all memory."""
    pixels, said = picture.width * picture.height, f"{picture.width} x {picture.height} pixels in {size} bytes"
    if pixels > _MOST_OF_A_BYTE * size and {tile[0] for tile in getattr(picture, "tile", ())} & set(_SLOW_CODECS):
        raise ValueError(said)
    swells = pixels > _LARGE and pixels * _BYTES.get(picture.mode, 4) > _SWELLS * size
    if swells and not os.environ.get(_PIXELS_VARIABLE, "").isdecimal():
        raise ValueError(f"{said}: it shows next to nothing; give max_pixels (--max-pixels) if it is meant")


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG without its texts and profile, whose size Pillow limits; None for what has none."""
    if not data.startswith(_PNG):
        return None
    parts, place = [_PNG], len(_PNG)
    while place + 8 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in _PNG_METADATA:
            parts.append(data[place:end])
        place = end
    rest = b"".join(parts)
    return rest if len(rest) < len(data) else None


# ---- pixel values ----


def shown_part(
    height: int, width: int, size: Mapping[str, Any], crop: Mapping[str, Any] | None
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a picture's middle that is resized: all of it but for one so long and thin that
    it would be over 16 times its crop. Without that, 2 x 4000 pixels become 224 x 448000 for a crop of 224 x 224.

    Args:
        height, width: of the picture.
        size: an image processor's, with ``shortest_edge`` or ``height`` and ``width``.
        crop: its ``crop_size``, or None.
    """
    edge = size.get("shortest_edge")
    if not edge:
        return 0, 0, height, width
    of_crop = [int((crop or {}).get(side) or edge) for side in ("height", "width")]
    short = min(height, width)
    most = [max(-(-_LONGEST * side * short // int(edge)), short) for side in of_crop]
    shown_height, shown_width = min(height, most[0]), min(width, most[1])
    return (height - shown_height) // 2, (width - shown_width) // 2, shown_height, shown_width


def to_pixels(image: Image.Image, config: Mapping[str, Any]) -> NDArray[np.float32]:
    """[3, H, W] float32, by the steps of an image processor's configuration."""
    crop = config["crop_size"] if _crops(config) else None
    pixels = np.asarray(to_rgb(image))
    if config.get("do_resize", True):
        top, left, height, width = shown_part(pixels.shape[0], pixels.shape[1], config["size"], crop)
        pixels = pixels[top : top + height, left : left + width]
        pixels = _resize(pixels, *_target(height, width, config["size"]))
    if crop is not None:
        pixels = _center_crop(pixels, crop["height"], crop["width"])
    return _normalize(pixels.transpose(2, 0, 1).astype(np.float32), config)


def _normalize(pixels: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if not config.get("do_normalize", True):
        return pixels * np.float32(factor)
    mean, std = (np.array(config[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
    inverse = np.float32(1.0 / factor)
    return np.ascontiguousarray((pixels - mean * inverse) / (std * inverse))


def _target(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    edge, short, long = size["shortest_edge"], min(height, width), max(height, width)
    other = int(edge * long / short)
    return (edge, other) if height <= width else (other, edge)


def _center_crop(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    rows, cols = max(height - pixels.shape[0], 0), max(width - pixels.shape[1], 0)
    if rows or cols:
        pixels = np.pad(pixels, ((rows // 2, (rows + 1) // 2), (cols // 2, (cols + 1) // 2), (0, 0)))
    top, left = int((pixels.shape[0] - height) / 2.0), int((pixels.shape[1] - width) / 2.0)
    return pixels[top : top + height, left : left + width]


# ---- torchvision's resize ----


def _resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """[H, W, 3] -> [height, width, 3]."""
    if width != pixels.shape[1]:
        pixels = _resize_rows(pixels.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return _resize_rows(pixels, height) if height != pixels.shape[0] else pixels


def _resize_rows(pixels: NDArray[np.uint8], out: int) -> NDArray[np.uint8]:
    """[in, W, 3] -> [out, W, 3]: each row a weighted sum of the nearest, exact in float64, for which there is BLAS."""
    rows = pixels.reshape(len(pixels), -1).astype(np.float64)
    taps = [_weights(i, out, len(pixels)) for i in range(out)]
    bits = _precision(max(float(weights.max()) for _, weights in taps))
    sums = np.empty((out, rows.shape[1]))
    for i, (first, weights) in enumerate(taps):
        scaled = weights * (1 << bits)
        fixed = np.trunc(scaled + np.copysign(0.5, scaled))
        sums[i] = fixed @ rows[first : first + len(fixed)]
    rounded = np.floor(sums / (1 << bits) + 0.5)
    return np.clip(rounded, 0, 255).astype(np.uint8).reshape(out, *pixels.shape[1:])


def _weights(i: int, out: int, size: int) -> tuple[int, NDArray[np.float64]]:
    """The first row that output row i looks at, and the weights of it and those after."""
    scale = size / out
    reach = 2.0 * max(scale, 1.0)
    center = scale * (i + 0.5)
    first = max(int(center - reach + 0.5), 0)
    last = min(int(center + reach + 0.5), size)
    weights = _cubic((np.arange(first, last) - center + 0.5) / max(scale, 1.0))
    return first, weights / weights.sum()


def _cubic(x: NDArray[Any]) -> NDArray[Any]:
    x, a = np.abs(x), _CUBIC_A
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _precision(largest: float) -> int:
    """Bits behind the point with which the largest weight fits 16."""
    bits = 0
    while bits < _MAX_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return bits
