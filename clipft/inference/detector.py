"""What is not normal by words (WinCLIP, arXiv:2303.14814), and by whatever of words and normal pictures there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipft.families.forward import normalised
from clipft.families.registry import base_model
from clipft.inference.anomaly import Anomaly, PatchMemory, zooms_of
from clipft.inference.encode import embed_texts
from clipft.inference.patches import PatchTower, to_map, windows_of

__all__ = ["Detector", "States"]


class States:
    """Normal and not in words, each by the mean of its texts.

    Args:
        model, processor: as :func:`clipft.load` gives them.
        normal_text, anomaly_text: one text or more each, of whole things: "a good tile", "a cracked tile".
        zoom: as of :meth:`PatchMemory.fit`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        normal_text: Sequence[str],
        anomaly_text: Sequence[str],
        *,
        zoom: float | None = None,
    ) -> None:
        means = [embed_texts(model, processor, list(texts), 64).mean(0) for texts in (normal_text, anomaly_text)]
        self.embeds = normalised(torch.stack(means))  # [2, D]
        self.scale = base_model(model).logit_scale.detach().float().exp().reshape(()).cpu()
        self.zooms = sorted({1.0, *zooms_of(zoom, PatchTower(model, processor).grid)})

    def look(self, tower: PatchTower, picture: Any) -> Anomaly:
        """The share of what is not normal in a softmax of the two, at the model's own scale: as the score that of the
        picture as a whole, or its largest on the map, in the mean; on the map the harmonic mean over windows of each
        size, each patch by itself and by its window.
        """
        pixels = tower.pixels(picture)
        height, width = pixels.shape[-2:]
        whole, inverse = 0.0, torch.zeros(height, width)
        for zoom in self.zooms:
            windows = windows_of(height, width, zoom)
            patches, embeds = tower.embeddings(pixels, windows)
            if zoom == 1:
                whole = float(self._shares(embeds).max())
            near = self._shares((patches + embeds[:, None, None]) / 2)
            inverse += 1 / to_map(near, windows, (height, width)).clamp(min=1e-6)
        found = (len(self.zooms) / inverse).numpy()
        return Anomaly((whole + float(found.max())) / 2, found)

    def _shares(self, embeds: Tensor) -> Tensor:
        """[..., D] -> [...]."""
        return (self.scale * embeds @ self.embeds.t()).softmax(-1)[..., 1]


class Detector:
    """Looks at pictures by a memory of normal ones, by words, or by both: then score and map are the means of the two.

    Args:
        model, processor: as :func:`clipft.load` gives them, of a family whose image tower is a ViT.
        memory: of this model (:meth:`PatchMemory.check`).
        states: of this model.

    Raises:
        ValueError: neither, or a model without patches.
    """

    def __init__(
        self, model: Any, processor: Any, memory: PatchMemory | None = None, states: States | None = None
    ) -> None:
        self.tower = PatchTower(model, processor)
        self.parts = [part for part in (memory, states) if part is not None]
        if not self.parts:
            raise ValueError("memory, states: expected one of them or both, got neither")

    def __call__(self, picture: Any) -> Anomaly:
        """Of a PIL picture or a :class:`clipft.data.pictures.EncodedPicture`."""
        found = [part.look(self.tower, picture) for part in self.parts]
        return Anomaly(float(np.mean([one.score for one in found])), np.mean([one.map for one in found], axis=0))
