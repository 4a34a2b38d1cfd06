"""Pictures without torch: files opened, turned upright, to RGB, and to ``pixel_values``, to the bit what torchvision
makes of them in training.

torchvision resizes 8-bit pictures in fixed point: weights of a cubic that widens with the reduction (antialias),
rounded to 16 bits, along the rows and then along the columns, each pass rounded to 8 bits. This is the same in numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

__all__ = [
    "PICTURE_ENDINGS",
    "UNREADABLE",
    "EncodedPicture",
    "check_preprocessing",
    "open_picture",
    "to_pixels",
    "to_rgb",
    "upright",
]

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for broken files
_ORIENTATION = 0x0112  # of EXIF
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_BICUBIC = 3  # PIL's number
_CUBIC_A = -0.5  # the cubic's parameter where it antialiases
_MAX_BITS = 22  # of a fixed-point weight


def check_preprocessing(config: Mapping[str, Any], where: str) -> None:
    """That the steps of a ``CLIPImageProcessor``'s configuration are among those that :func:`to_pixels` knows."""
    size = config.get("size", {})
    if config.get("do_resize", True) and (config.get("resample") != _BICUBIC or not _known_size(size)):
        raise ValueError(
            f"{where}: expected a bicubic resize (resample 3) to a shortest_edge or to height and width, got resample "
            f"{config.get('resample')} and size {size}"
        )
    if config.get("do_center_crop") and not {"height", "width"} <= config.get("crop_size", {}).keys():
        raise ValueError(f"{where}: expected a crop_size with height and width, got {config.get('crop_size')}")


def _known_size(size: Mapping[str, int]) -> bool:
    return set(size) in ({"shortest_edge"}, {"height", "width"})


def open_picture(image: Any) -> Image.Image:
    """A PIL picture, or one read from a path and turned upright."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, Path)):
        raise TypeError(f"images: expected PIL pictures or paths, got {type(image).__name__}")
    with Image.open(image) as picture:
        picture.load()
    return upright(picture)


def upright(picture: Image.Image) -> Image.Image:
    """Turned as the camera's EXIF tag says, as ``datasets`` does."""
    turned = picture.getexif().get(_ORIENTATION, 1) != 1
    return ImageOps.exif_transpose(picture) if turned else picture


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
        with self._open() as picture:
            width, height = picture.size
            turned = picture.getexif().get(_ORIENTATION) in _TURNED
        return (height, width) if turned else (width, height)

    def decode(self, reduction: int = 1) -> Image.Image:
        """The picture, upright; a JPEG by 1, 2, 4 or 8 smaller in width and height.

        Raises:
            ValueError: it cannot be read.
        """
        with self._open() as picture:
            if reduction > 1:  # of no effect on other formats
                picture.draft(None, (picture.width // reduction, picture.height // reduction))  # type: ignore[no-untyped-call]
            picture.load()
            return upright(picture)

    @contextmanager
    def _open(self) -> Iterator[Image.Image]:
        try:
            with Image.open(BytesIO(self.data)) as picture:
                yield picture
        except UNREADABLE as error:
            raise ValueError(f"{self.name}: the image cannot be read ({error})") from error


# ---- pixel values ----


def to_pixels(image: Image.Image, config: Mapping[str, Any]) -> NDArray[np.float32]:
    """[3, H, W] float32, by the steps of an image processor's configuration."""
    pixels = np.asarray(to_rgb(image))
    if config.get("do_resize", True):
        pixels = _resize(pixels, *_target(pixels.shape[0], pixels.shape[1], config["size"]))
    if config.get("do_center_crop", True):
        pixels = _center_crop(pixels, config["crop_size"]["height"], config["crop_size"]["width"])
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
