"""What ``clipft.doctor`` finds about a model, and about pictures beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from clipft.families.registry import family_of
from clipft.recipes.findings import Finding, finding_of, share

__all__ = ["check_preprocessing", "check_scale", "check_sizes"]

_CLOSE = 1e-3  # to the ceiling of the logit scale


def check_preprocessing(processor: Any, config: Any) -> list[Finding]:
    """Against what a checkpoint of this kind is pre-trained with: what its configuration says, as open_clip's do, or a
    processor of the same class, untouched."""
    images, usual = processor.image_processor, type(processor.image_processor)()
    if own := getattr(config, "preprocess_cfg", None):
        usual.image_mean, usual.image_std, usual.resample = own["mean"], own["std"], images.resample
    found = []
    for name in ("image_mean", "image_std", "rescale_factor", "resample", "do_resize", "do_rescale", "do_normalize"):
        have, want = getattr(images, name), getattr(usual, name)
        numbers = isinstance(want, (list, tuple, float))
        if not (np.allclose(have, want, atol=1e-3) if numbers and have is not None else have == want):
            found.append(f"{name}: {have}, usual {want}")
    return [
        finding_of(
            "preprocessing",
            "problem",
            found,
            f"settings differ from those that {type(images).__name__} has for checkpoints of this kind; right only if "
            "the model was pre-trained with them",
            "as checkpoints of this kind are pre-trained",
        )
    ]


def check_sizes(pictures: dict[str, tuple[int, int]], size: int | None) -> list[Finding]:
    """Of pictures by place, their width and height; ``size``: the model's, None where it takes any."""
    if size is None:
        return []
    small = [f"{place}: {sides[0]} x {sides[1]}" for place, sides in pictures.items() if min(sides) < size]
    text = f"pictures are smaller than the model's {size} pixels and are enlarged ({share(small, pictures)})"
    return [finding_of("size", "note", small, text, f"all pictures have at least the model's {size} pixels")]


def check_scale(clip: Any) -> list[Finding]:
    """Against the ceiling of its family."""
    scale, ceiling = clip.logit_scale.item(), family_of(clip).max_log_scale
    shown = f"{math.exp(scale):.1f}" + (f", ceiling {math.exp(ceiling):g}" if ceiling is not None else "")
    if ceiling is not None and scale > ceiling + _CLOSE:
        return [Finding("logit scale", "problem", f"{shown}: above it training is unstable; clipft clamps it", 1)]
    if ceiling is not None and scale > ceiling - _CLOSE:
        text = f"{shown}: it cannot rise further; usual for OpenAI's checkpoints, a sign of overfitting after a run"
        return [Finding("logit scale", "note", text, 1)]
    return [Finding("logit scale", "ok", shown)]
