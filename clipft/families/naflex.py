"""SigLIP 2's NaFlex pictures: as many patches as the model takes, in the picture's own aspect ratio, padded in a batch.

The steps are those of Hugging Face's ``Siglip2ImageProcessor``, in two halves: a picture becomes a tensor [3, H, W] as
for any model, and a batch of them becomes patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from transformers.image_utils import SizeDict
from transformers.models.siglip2.image_processing_siglip2 import (
    Siglip2ImageProcessor,
    convert_image_to_patches,
    get_image_size_for_max_num_patches,
    pad_along_first_dim,
)

__all__ = ["RandomCrop", "is_naflex", "patchify", "resize"]


def is_naflex(image_processor: Any) -> bool:
    """Whether the model takes patches of pictures of any shape."""
    return isinstance(image_processor, Siglip2ImageProcessor)


def resize(picture: Tensor, image_processor: Any) -> Tensor:
    """[3, H, W] with sides that are multiples of the patch size, and at most as many patches as the model takes."""
    height, width = get_image_size_for_max_num_patches(
        image_height=picture.shape[-2],
        image_width=picture.shape[-1],
        patch_size=image_processor.patch_size,
        max_num_patches=image_processor.max_num_patches,
    )
    size = SizeDict(height=height, width=width)
    return image_processor.resize(picture, size=size, resample=image_processor.resample)


def patchify(pictures: Sequence[Tensor], image_processor: Any) -> dict[str, Tensor]:
    """``pixel_values`` [N, P, 3 * side * side], ``pixel_attention_mask`` [N, P] and ``spatial_shapes`` [N, 2], in
    patches."""
    side, most = image_processor.patch_size, image_processor.max_num_patches
    padded = [pad_along_first_dim(convert_image_to_patches(picture, side), most) for picture in pictures]
    patches, masks = zip(*padded, strict=True)
    shapes = [(picture.shape[-2] // side, picture.shape[-1] // side) for picture in pictures]
    return {
        "pixel_values": torch.stack(patches),
        "pixel_attention_mask": torch.stack(masks),
        "spatial_shapes": torch.tensor(shapes),
    }


class RandomCrop(v2.RandomResizedCrop):
    """``RandomResizedCrop`` without the resize, which is the model's own afterwards."""

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__(size=1, scale=scale)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut the rectangle out."""
        return v2.functional.crop(inpt, **params)
