"""Classes of image embeddings, whatever made these: class vectors, a scale, a temperature; numpy alone, no torch.

A head and a zero-shot classifier are the same thing here: logits are products of embeddings and class vectors. What a
calibration adds is one temperature (Guo et al. 2017, arXiv:1706.04599), which changes no decision, and the probability
below which there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from clipft.models.calibrated import ZERO_SHOT, Calibration, calibrations_of

__all__ = ["ZERO_SHOT", "Calibration", "Classifier", "calibrations_of"]

Array = NDArray[np.float32]
_LARGEST = 1e30  # sums of 10^4 such, over the least temperature, are still a float32


@dataclass(frozen=True, eq=False)
class Classifier:
    """Classes by their vectors.

    Args:
        names: C classes, each once.
        weights: [C, D] float32. A head's hold its scale; those of zero-shot classes are unit vectors.
        scale: of the logits: 1 for a head, exp(logit_scale) for zero-shot classes.
        calibration: one that was fitted on other classes, or with other templates, is left out.
        templates: of zero-shot classes the texts, with ``{}`` for the class, that the vectors are of.

    Raises:
        ValueError: names and weights do not fit together, a class is there twice, or logits would be no numbers.
    """

    names: Sequence[str]
    weights: Array
    scale: float = 1.0
    calibration: Calibration = field(default_factory=Calibration)
    templates: Sequence[str] = ()

    def __post_init__(self) -> None:
        """What is given in other types becomes those of the fields."""
        names = tuple(map(str, self.names))
        weights = np.ascontiguousarray(self.weights, np.float32)
        if weights.ndim != 2 or len(weights) != len(names) or not names:
            raise ValueError(f"weights: expected a vector for each of {len(names)} classes, got {list(weights.shape)}")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"names: expected each class once, got {', '.join(twice[:5])} more than once")
        largest = float(np.abs(weights).max(initial=0.0)) * abs(self.scale)
        if not largest <= _LARGEST:
            raise ValueError(f"weights, scale: expected products of at most {_LARGEST:g}, got up to {largest:g}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "weights", weights)
        if not self.calibration.holds_for(names, self.templates):
            object.__setattr__(self, "calibration", Calibration())

    @property
    def dim(self) -> int:
        """D, of the embeddings that it takes."""
        return self.weights.shape[1]

    def calibrated(self, calibration: Calibration | None) -> Classifier:
        """The same with this calibration, if there is one and it was fitted on these classes and templates."""
        return self if calibration is None else replace(self, calibration=calibration)

    def logits(self, embeds: Array) -> Array:
        """[N, D], L2-normalised -> [N, C] float32, the temperature left out.

        Raises:
            ValueError: embeddings of another size.
        """
        embeds = np.asarray(embeds, np.float32)
        if embeds.ndim != 2 or embeds.shape[1] != self.dim:
            raise ValueError(
                f"embeds: expected [N, {self.dim}], as the class vectors are, got {list(embeds.shape)}: another model's"
            )
        products = embeds @ self.weights.T
        return cast(Array, products if self.scale == 1 else products * np.float32(self.scale))

    def probabilities(self, embeds: Array) -> Array:
        """[N, D], L2-normalised -> [N, C] float32: the softmax of logits / temperature."""
        scaled = self.logits(embeds) / np.float32(self.calibration.temperature)
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return cast(Array, powers / powers.sum(axis=1, keepdims=True))
