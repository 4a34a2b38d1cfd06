"""What is known of the probabilities of a model's classifiers: in its configuration, under ``clipft_calibration``.

An object a head, by its name, and one under ``zero_shot``. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.errors import short, shown
from clipft.files import read_json, unchanged, write_json
from clipft.models.formats import ADAPTER_WEIGHTS, CALIBRATION_KEY, MODEL_MANIFEST

__all__ = [
    "ZERO_SHOT",
    "Calibration",
    "calibrations_of",
    "model_calibrations",
    "record_calibrations",
    "recorded_calibrations",
    "set_calibrations",
]

ZERO_SHOT = "zero_shot"  # where a head has its name
_MOST = 1e6  # a temperature: what is divided by it stays a float32


@dataclass(frozen=True)
class Calibration:
    """What was learnt about a classifier's probabilities on rows that it was not trained on.

    Attributes:
        temperature: what logits are divided by before the softmax, in [1e-6, 1e6].
        threshold: the least probability of an answer, in [0, 1]; below it the class is unknown. None: always answer.
        precision: the precision that the threshold was chosen for, in [0, 1].
        classes: those that it was fitted on and holds for; none: whatever the classifier's are.
        templates: of zero-shot classes the texts that it was fitted with and holds for; none: whatever they are.
    """

    temperature: float = 1.0
    threshold: float | None = None
    precision: float | None = None
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """ValueError: a number out of its range."""
        if not (_is_number(self.temperature) and 1 / _MOST <= self.temperature <= _MOST):
            raise ValueError(f"temperature: expected a number from 1e-6 to 1e6, got {short(self.temperature)}")
        for name in ("threshold", "precision"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name}: expected a number from 0 to 1, got {short(value)}")

    def holds_for(self, names: Sequence[str], templates: Sequence[str] = ()) -> bool:
        """Whether it was fitted on these classes, told by these templates, in whatever order."""
        same_classes = not self.classes or set(self.classes) == set(names)
        return same_classes and (not self.templates or set(self.templates) == set(templates))

    def to_json(self) -> dict[str, Any]:
        """Without what is not known."""
        values = {"temperature": self.temperature, "threshold": self.threshold, "precision": self.precision}
        known = {name: float(value) for name, value in values.items() if value is not None}
        lists = {"classes": list(self.classes), "templates": list(self.templates)}
        return {**known, **{name: own for name, own in lists.items() if own}}

    @staticmethod
    def from_json(value: Any, where: str) -> Calibration:
        """What :meth:`to_json` gave and anybody may have edited since.

        Raises:
            ValueError: it is something else; the message begins with ``where``, the file or key.
        """
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a calibration, an object with a temperature, found {short(value)}")
        lists = []
        for name in ("classes", "templates"):
            own = value.get(name, [])
            if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
                raise ValueError(f"{where}: expected {name} to be a list of texts, found {short(own)}")
            lists.append(tuple(own))
        try:
            return Calibration(value.get("temperature", 1.0), value.get("threshold"), value.get("precision"), *lists)
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
    return {name: Calibration.from_json(value, f"{where}: {shown(name):.200}") for name, value in stored.items()}


# ---- models ----


def model_calibrations(model: Any) -> dict[str, Calibration]:
    """A model's, also inside a peft model; none if it has none.

    Raises:
        ValueError: its configuration holds something else.
    """
    return calibrations_of(getattr(_config(model), CALIBRATION_KEY, None), f"config: {CALIBRATION_KEY}")


def set_calibrations(model: Any, calibrations: Mapping[str, Calibration]) -> None:
    """In place of what a model has; of none nothing stays, as when its weights change."""
    config = _config(model)
    vars(config).pop(CALIBRATION_KEY, None)
    if calibrations:
        setattr(config, CALIBRATION_KEY, {name: own.to_json() for name, own in calibrations.items()})


def _config(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).config


# ---- adapters, whose folder has no config.json ----


def record_calibrations(model: Any, staging: Path) -> None:
    """Beside an adapter: what its model's configuration has, in the manifest."""
    if stored := getattr(_config(model), CALIBRATION_KEY, None):
        path = staging / MODEL_MANIFEST
        write_json(path, (read_json(path) if path.is_file() else {}) | {CALIBRATION_KEY: stored})


def recorded_calibrations(folder: Path) -> dict[str, Calibration]:
    """None of an adapter whose weights are other than those that were calibrated, or that plain peft saved.

    Raises:
        ValueError: the manifest holds something else.
    """
    path = folder / MODEL_MANIFEST
    try:
        stored = read_json(path).get(CALIBRATION_KEY)
    except (OSError, ValueError):
        return {}
    known = stored is not None and unchanged(folder, MODEL_MANIFEST, ADAPTER_WEIGHTS)
    return calibrations_of(stored, f"{path}: {CALIBRATION_KEY}") if known else {}
