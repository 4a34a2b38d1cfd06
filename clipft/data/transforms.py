"""A picture to ``pixel_values``: the checkpoint's own preprocessing, and random changes for training.

Without changes the result is the Hugging Face image processor's bit for bit, and faster: its own
resize and normalisation, on pixels that stay channels-last, where torchvision's resize has its fast path. Random
changes draw from torch's global generator, which the collator seeds by (seed, epoch, index).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from transformers.image_utils import pil_torch_interpolation_mapping

from clipft.data.pictures import EncodedPicture, shown_part, to_rgb
from clipft.families import naflex

__all__ = [
    "AUGMENTATIONS",
    "AUGMENTATION_OPTIONS",
    "Augmentation",
    "augmentation_set",
    "build_transform",
    "pixels_of",
    "stack_pictures",
    "whole_transform",
]

_REDUCING_GAP = 2.0  # a crop is decoded at no less than this many times the model's size, as PIL's thumbnail
_LARGEST_REDUCTION = 8  # of JPEG's 8 x 8 blocks


# ---- augmentation ----


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training picture; all off by default. Each is drawn anew for every picture and epoch.

    Attributes:
        random_resized_crop: smallest share of the area that a crop may keep, in (0, 1], or None for the checkpoint's
            own resize and centre crop. The area is what the model sees of a picture, its centre square for most, so
            that things have the size and shape that they have in use. Small shares harm where the caption tells of
            something that a crop may miss, and where size carries meaning.
        horizontal_flip: probability. Harms where left and right mean something: text in pictures, radiographs, signs.
        color_jitter: strength of random brightness, contrast and saturation (hue: a quarter of it), at most 0.5. Harms
            where colour is in the captions, or carries a measurement.
        rotation: largest angle in degrees, to either side; the corners take the mean colour. Harms where upright means
            something beyond a few degrees.
        noise: largest standard deviation of Gaussian noise, as a share of the brightness range. Harms where the finding
            is as faint as the noise.
        blur: largest standard deviation of a Gaussian blur, in pixels of the model's input. Harms where fine texture
            or hairlines are what matters.
    """

    random_resized_crop: float | None = None
    horizontal_flip: float = 0.0
    color_jitter: float = 0.0
    rotation: float = 0.0
    noise: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        scale = self.random_resized_crop
        if scale is not None and not 0.0 < scale <= 1.0:
            raise ValueError(f"random_resized_crop: expected a share of the area in (0, 1] or None, got {scale}")
        for name, largest, unit in (
            ("horizontal_flip", 1.0, "a probability"),
            ("color_jitter", 0.5, "a strength"),
            ("rotation", 180.0, "degrees"),
            ("noise", 0.5, "a share of the brightness range"),
            ("blur", 10.0, "pixels"),
        ):
            if not 0.0 <= getattr(self, name) <= largest:
                raise ValueError(f"{name}: expected {unit} in [0, {largest:g}], got {getattr(self, name)}")


AUGMENTATIONS = {
    "none": Augmentation(),
    # What a trainer's "auto" takes in long runs. The one change that supposes nothing of what pictures are about: text,
    # radiographs, signs, colours and brightness all stay what they are.
    "crop": Augmentation(random_resized_crop=0.8),
    # Any captioned photographs. open_clip's own crop; harms nothing but captions of what stands at the very edge.
    "light": Augmentation(random_resized_crop=0.9, color_jitter=0.1),
    # Few pictures of objects, many epochs. Harms where captions name colours, sides or small things, and short runs.
    "strong": Augmentation(random_resized_crop=0.4, horizontal_flip=0.5, color_jitter=0.4, rotation=10.0, blur=1.0),
    # Parts before a camera that is never quite straight or sharp. Harms where the defect is a hairline or a
    # discolouration as faint as the noise, and where the position in the picture decides.
    "industrial": Augmentation(random_resized_crop=0.8, horizontal_flip=0.5, rotation=15.0, noise=0.03, blur=0.8),
    # Radiographs and the like: no flips (the heart is on the left), no colour, hardly any crop, for a finding may lie
    # at the edge. Harms where the angle or absolute size is measured.
    "medical": Augmentation(random_resized_crop=0.85, rotation=7.0, noise=0.01),
}
AUGMENTATION_OPTIONS = tuple(field.name for field in fields(Augmentation))


def augmentation_set(name: str, **overrides: float | None) -> Augmentation:
    """The set of that name; options that are not None take the place of its own, ``random_resized_crop=0`` turns the
    crop off.

    Raises:
        ValueError: an unknown name, or an option outside its range.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(f"augmentation: expected one of {', '.join(AUGMENTATIONS)}, got {name!r}")
    given: dict[str, Any] = {option: value for option, value in overrides.items() if value is not None}
    if given.get("random_resized_crop") == 0:
        given["random_resized_crop"] = None
    return replace(AUGMENTATIONS[name], **given)


# ---- transforms ----


def build_transform(image_processor: Any, augmentation: Augmentation | None = None) -> Callable[[Any], Tensor]:
    """Picture (PIL, array, tensor or :class:`EncodedPicture`) to [3, H, W] float32; :func:`stack_pictures` makes a
    batch of them.

    The steps are the image processor's own methods, hence its result bit for bit; a random crop stands in for its
    resize and centre crop, with its size and interpolation, and random changes come before its normalisation. A crop
    decodes an ``EncodedPicture`` at reduced scale where that leaves twice the model's resolution.
    """
    backend = getattr(image_processor, "backend", None)
    if backend != "torchvision":
        raise ValueError(
            f"processor: expected the torchvision image processor, got {type(image_processor).__name__} with backend "
            f"{backend!r}: load it with clipft.load, or with backend='torchvision'"
        )
    augmentation = augmentation or Augmentation()
    steps = [
        *_geometry(image_processor, augmentation),
        *_changes(image_processor, augmentation),
        _normalisation(image_processor),
    ]
    return v2.Compose(steps)


def whole_transform(image_processor: Any, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """Pixels [3, h, w] uint8, as :func:`pixels_of` gives them, to [3, height, width] float32: all of them, whatever
    their proportions, by the image processor's own resize and normalisation.
    """
    size = type(image_processor.size)(height=height, width=width)
    resize = partial(image_processor.resize, size=size, resample=image_processor.resample)
    return v2.Compose([resize, _normalisation(image_processor)])


def pixels_of(image: Any, image_processor: Any) -> Tensor:
    """A picture as the processor sees it before it changes its size: [3, H, W] uint8."""
    return _to_tensor(image, image_processor)


def stack_pictures(image_processor: Any, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the image tower takes of N pictures that :func:`build_transform` made: ``pixel_values`` [N, 3, H, W], or
    patches (see ``clipft.families.naflex``)."""
    if naflex.is_naflex(image_processor):
        return naflex.patchify(pictures, image_processor)
    return {"pixel_values": torch.stack(list(pictures))}


def _to_tensor(image: Any, processor: Any) -> Tensor:
    """[3, H, W] uint8 of a picture, channels-last in memory."""
    if isinstance(image, EncodedPicture):
        image = image.decode()
    if not isinstance(image, Image.Image) or not processor.do_convert_rgb:
        return processor.process_image(image, do_convert_rgb=processor.do_convert_rgb)
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def _shown(pixels: Tensor, size: dict[str, Any], crop: dict[str, Any] | None) -> Tensor:
    """Without the ends of a long, thin picture, which a centre crop would drop anyway."""
    top, left, height, width = shown_part(pixels.shape[-2], pixels.shape[-1], size, crop)
    return pixels[..., top : top + height, left : left + width]


def _geometry(processor: Any, augmentation: Augmentation) -> list[Any]:
    if naflex.is_naflex(processor):
        smallest = augmentation.random_resized_crop
        cut = [] if smallest is None else [naflex.RandomCrop((smallest, 1.0))]
        return [partial(_to_tensor, processor=processor), *cut, partial(naflex.resize, image_processor=processor)]
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    if augmentation.random_resized_crop is not None:
        return [_RandomCrop(processor, crop or size, augmentation.random_resized_crop)]
    steps = [partial(_to_tensor, processor=processor)]
    if processor.do_resize:
        steps.append(partial(_shown, size=dict(size), crop=crop and dict(crop)))
        steps.append(partial(processor.resize, size=size, resample=processor.resample))
    return [*steps, partial(processor.center_crop, size=crop)] if crop else steps


class _RandomCrop:
    """A crop of random size and place, at the model's size, within what the checkpoint's own resize and centre crop
    show. (A crop of the whole of a long picture would be squashed, by up to 4/3, as nothing is in use: arXiv:1906.06423
    on sizes that differ between training and use.)
    """

    def __init__(self, processor: Any, target: Any, share: float) -> None:
        self.processor = processor
        self.side = (target.height or target.shortest_edge, target.width or target.shortest_edge)
        self.resample = pil_torch_interpolation_mapping[processor.resample]
        self.crop = v2.RandomResizedCrop(self.side, scale=(share, 1.0), interpolation=self.resample, antialias=True)

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, EncodedPicture):
            width, height = image.size()
            box = self._box(width, height)
            pixels = _to_tensor(image.decode(self._reduction(box)), self.processor)
        else:
            pixels = _to_tensor(image, self.processor)
            height, width = pixels.shape[-2:]
            box = self._box(width, height)
        return self._resized(pixels, box, pixels.shape[-1] / width, pixels.shape[-2] / height)

    def _box(self, width: int, height: int) -> dict[str, float]:
        """In pixels of the picture, drawn in the proportions of the model's input."""
        shown_height, shown_width = self._shown(width, height)
        scale = min(shown_height / self.side[0], shown_width / self.side[1])
        canvas = [max(round(side * scale), 1) for side in self.side]
        box = self.crop.make_params([torch.empty(3, *canvas, device="meta")])
        down, across = shown_height / canvas[0], shown_width / canvas[1]
        return {
            "top": (height - shown_height) / 2 + down * box["top"],
            "left": (width - shown_width) / 2 + across * box["left"],
            "height": down * box["height"],
            "width": across * box["width"],
        }

    def _shown(self, width: int, height: int) -> tuple[float, float]:
        """Height and width of the picture's middle that is left of it in use."""
        if not self.processor.do_center_crop:
            return height, width
        size = self.processor.size
        if size.shortest_edge:
            across = down = min(width, height) / size.shortest_edge
        else:
            across, down = width / size.width, height / size.height
        return min(height, self.side[0] * down), min(width, self.side[1] * across)

    def _reduction(self, box: dict[str, float]) -> int:
        spare = min(box["height"] / self.side[0], box["width"] / self.side[1]) / _REDUCING_GAP
        return 1 if spare < 2 else min(2 ** int(math.log2(spare)), _LARGEST_REDUCTION)

    def _resized(self, pixels: Tensor, box: dict[str, float], across: float, down: float) -> Tensor:
        top, left = round(box["top"] * down), round(box["left"] * across)
        height, width = max(round(box["height"] * down), 1), max(round(box["width"] * across), 1)
        return v2.functional.resized_crop(pixels, top, left, height, width, self.side, self.resample, antialias=True)


def _changes(processor: Any, augmentation: Augmentation) -> list[Any]:
    steps: list[Any] = []
    if augmentation.rotation:
        mean = [round(255 * value) for value in processor.image_mean]
        steps.append(v2.RandomRotation(augmentation.rotation, v2.InterpolationMode.BILINEAR, fill=mean))
    if augmentation.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.horizontal_flip))
    if augmentation.color_jitter:
        strength = augmentation.color_jitter
        steps.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    if augmentation.blur:
        kernel = 2 * math.ceil(3 * augmentation.blur) + 1
        steps.append(v2.GaussianBlur(kernel, (0.05, augmentation.blur)))
    if augmentation.noise:
        steps.append(partial(_add_noise, largest=augmentation.noise))
    return steps


def _add_noise(pixels: Tensor, largest: float) -> Tensor:
    """Gaussian noise of a strength drawn up to ``largest``, the same in all channels as grey pictures need it."""
    strength = float(torch.rand(())) * largest * 255
    noise = torch.randn(pixels.shape[-2:]) * strength
    return (pixels + noise).round_().clamp_(0, 255).to(torch.uint8)


def _normalisation(processor: Any) -> Callable[[Tensor], Tensor]:
    return partial(
        processor.rescale_and_normalize,
        do_rescale=processor.do_rescale,
        rescale_factor=processor.rescale_factor,
        do_normalize=processor.do_normalize,
        image_mean=tuple(processor.image_mean),
        image_std=tuple(processor.image_std),
    )
