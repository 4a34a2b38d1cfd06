"""Classes of image embeddings, whatever made these: class vectors, a scale, a temperature; numpy alone, no torch.

A head and a zero-shot classifier are the same thing here: logits are products of embeddings and class vectors. What a
calibration adds is one temperature (Guo et al. 2017, arXiv:1706.04599), which changes no decision, and the probability
below which there is none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from clipft.errors import short

__all__ = ["ZERO_SHOT", "Calibration", "Classifier", "calibrations_of"]

Array = NDArray[np.float32]
ZERO_SHOT = "zero_shot"  # where a head has its name


@dataclass(frozen=True)
class Calibration:
    """What was learnt about a classifier's probabilities on rows that it was not trained on.

    Attributes:
        temperature: what logits are divided by before the softmax, > 0.
        threshold: the least probability of an answer, in [0, 1]; below it the class is unknown. None: always answer.
        precision: the precision that the threshold was chosen for, in [0, 1].
        classes: those that it was fitted on and holds for; none: whatever the classifier's are.
    """

    temperature: float = 1.0
    threshold: float | None = None
    precision: float | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """ValueError: a number out of its range."""
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature: expected a finite number above 0, got {short(self.temperature)}")
        for name in ("threshold", "precision"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name}: expected a number from 0 to 1, got {short(value)}")

    def holds_for(self, names: Sequence[str]) -> bool:
        """Whether it was fitted on these classes, in whatever order."""
        return not self.classes or set(self.classes) == set(names)

    def to_json(self) -> dict[str, Any]:
        """Without what is not known."""
        values = {"temperature": self.temperature, "threshold": self.threshold, "precision": self.precision}
        known = {name: float(value) for name, value in values.items() if value is not None}
        return {**known, **({"classes": list(self.classes)} if self.classes else {})}

    @staticmethod
    def from_json(value: Any, where: str) -> Calibration:
        """What :meth:`to_json` gave and anybody may have edited since.

        Raises:
            ValueError: it is something else; the message begins with ``where``, the file or key.
        """
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a calibration, an object with a temperature, found {short(value)}")
        classes = value.get("classes", [])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"{where}: expected classes to be a list of names, found {short(classes)}")
        try:
            return Calibration(
                value.get("temperature", 1.0), value.get("threshold"), value.get("precision"), tuple(classes)
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def calibrations_of(stored: Any, where: str) -> dict[str, Calibration]:
    """Those that a configuration or an export holds under ``clipft_calibration``, by head or :data:`ZERO_SHOT`.

    Args:
        stored: the object there; None: nothing was calibrated.
        where: the file and key, for errors.

    Raises:
        ValueError: it is something else.
    """
    if stored is None:
        return {}
    if not isinstance(stored, dict):
        raise ValueError(f"{where}: expected an object with a calibration a head, found {short(stored)}")
    return {str(name): Calibration.from_json(value, f"{where}: {name}") for name, value in stored.items()}


@dataclass(frozen=True, eq=False)
class Classifier:
    """Classes by their vectors.

    Args:
        names: C classes, each once.
        weights: [C, D] float32. A head's hold its scale; those of zero-shot classes are unit vectors.
        scale: of the logits: 1 for a head, exp(logit_scale) for zero-shot classes.
        calibration: one that was fitted on other classes is left out.

    Raises:
        ValueError: names and weights do not fit together, or a class is there twice.
    """

    names: Sequence[str]
    weights: Array
    scale: float = 1.0
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        """What is given in other types becomes those of the fields."""
        names = tuple(map(str, self.names))
        weights = np.ascontiguousarray(self.weights, np.float32)
        if weights.ndim != 2 or len(weights) != len(names) or not names:
            raise ValueError(f"weights: expected a vector for each of {len(names)} classes, got {list(weights.shape)}")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"names: expected each class once, got {', '.join(twice[:5])} more than once")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "weights", weights)
        if not self.calibration.holds_for(names):
            object.__setattr__(self, "calibration", Calibration())

    @property
    def dim(self) -> int:
        """D, of the embeddings that it takes."""
        return self.weights.shape[1]

    def calibrated(self, calibration: Calibration | None) -> Classifier:
        """The same with this calibration, if there is one and it was fitted on these classes."""
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
