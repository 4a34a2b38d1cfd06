"""What the recipes take and give back: models in any form, runs, and scores that a notebook shows as a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipft.families.registry import check_in_torch
from clipft.models.given import given_model
from clipft.recipes.sources import name_of
from clipft.report.html import body_of

__all__ = ["Run", "Scores", "loaded", "model_name"]


@dataclass
class Run:
    """What :func:`clipft.train` gives back; in a notebook it shows its report.

    Attributes:
        model, processor: the trained model, in evaluation mode, an adapter merged in; and its processor.
        before, after: scores by part (``zero_shot``, ``retrieval``, ``head``, ``attribute_NAME``) and metric, on rows
            that were not trained on.
        gains: after - before, by part and metric: ``value`` and ``interval``.
        folder: model, ``report.html``, ``report.json``, ``config.yaml`` and checkpoints.
        history: what was logged, a dictionary a step.
    """

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    before: dict[str, Any] = field(repr=False)
    after: dict[str, Any] = field(repr=False)
    gains: dict[str, Any] = field(repr=False)
    folder: Path
    history: list[dict[str, Any]] = field(repr=False)
    _temporary: Any = field(default=None, repr=False)  # the folder, where nobody named one: it goes with the run

    def _repr_html_(self) -> str:
        return body_of((self.folder / "report.html").read_text(encoding="utf-8"))


class Scores(dict[str, Any]):
    """Metrics by part, as a dictionary; in a notebook the page that was written, or that would have been, without the
    maps that need the model.
    """

    def __init__(self, scores: dict[str, Any], page: Callable[[], str]) -> None:
        super().__init__(scores)
        self._page = page

    def _repr_html_(self) -> str:
        return body_of(self._page())


def loaded(model: Any) -> tuple[Any, Any]:
    """Model and processor of a folder, a name, a run, or of themselves.

    Raises:
        TypeError: encoders in ONNX, or a model without its processor.
    """
    found, processor = given_model(model)
    check_in_torch(found)
    if processor is None:
        raise TypeError(
            f"model: expected a folder, a name, a run or (model, processor), got {type(found).__name__} without a "
            "processor"
        )
    return found, processor


def model_name(model: Any) -> str:
    """For messages and the report: a model as it was given, of a run its folder."""
    if isinstance(model, Run):
        return str(model.folder)
    inner = model[0] if isinstance(model, tuple) else model
    return str(getattr(inner, "name_or_path", "") or name_of(inner))
