"""Weights between the start and the end of a fine-tune.

WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): (1 - alpha) * start + alpha * tuned, often better than either end on
what the fine-tune did not see. For a LoRA adapter the same line is the scale that it is merged with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipft.evaluation.metrics import Classification, Retrieval
from clipft.families.registry import check_model
from clipft.models.calibrated import set_calibrations
from clipft.models.fusing import check_float, unfuse

__all__ = ["RULE", "Sweep", "WeightLine", "sweep", "wise_ft"]

ALPHAS = tuple(number / 10 for number in range(11))
RULE = (
    "the smallest alpha whose score on held-out rows is within one standard error of the best (paired bootstrap), or "
    "the best itself where its lead over the start is below two, too little to give any of it away"
)


# ---- weights between start and end ----


def wise_ft(start: nn.Module, tuned: nn.Module, alpha: float) -> Any:
    """Interpolate two models' weights: (1 - alpha) * start + alpha * tuned.

    Args:
        start: a ``CLIPModel`` or one of another family; stays as it is.
        tuned: one of the same shapes, usually fine-tuned from ``start``; stays as it is.
        alpha: in [0, 1]; 0 is ``start``, 1 is ``tuned``.

    Returns:
        A new model, not fused, on ``tuned``'s device and in its dtype.

    Raises:
        TypeError: not such models (merge adapters first: ``clipft.load`` of an adapter folder does).
        ValueError: ``alpha`` outside [0, 1], or weights of other names or shapes.
    """
    for model in (start, tuned):
        check_model(model)
        check_float(model)
    check_alpha(alpha)
    first, last = start.state_dict(), tuned.state_dict()
    other = sorted(first.keys() ^ last.keys())
    other += [name for name in first if name in last and first[name].shape != last[name].shape]
    if other:
        raise ValueError(f"start, tuned: expected weights of the same names and shapes, these differ: {other[:5]}")
    model = unfuse(copy.deepcopy(tuned))
    set_calibrations(model, {})  # of other weights
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(_between(first[name].to(value.device), value, alpha))
    return model


def check_alpha(alpha: float) -> None:
    """In [0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected a number from 0 (the start) to 1 (the fine-tuned model), got {alpha!r}")


def _between(first: Tensor, last: Tensor, alpha: float) -> Tensor:
    """Computed in float32 and exact at both ends."""
    if alpha in (0.0, 1.0):
        return last if alpha else first
    return torch.lerp(first.float(), last.float(), alpha).to(last.dtype)


class WeightLine:
    """A model that is trained in place, and all weights between its start and its end.

    Made before training. Of a peft model the line is the adapter's scale: its B matrices from zero to where they ended.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if hasattr(model, "peft_config"):
            self._moving = {name: p for name, p in self._moving.items() if "lora_B" in name}
        self._start = self._copy()
        self._end: dict[str, Tensor] | None = None

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._moving.items()}

    @torch.no_grad()
    def move_to(self, alpha: float) -> None:
        """Set the weights to (1 - alpha) * start + alpha * end; the first call takes the present ones as the end."""
        check_alpha(alpha)
        self._end = self._copy() if self._end is None else self._end
        for name, parameter in self._moving.items():
            start = self._start[name].to(parameter.device)
            parameter.copy_(_between(start, self._end[name].to(parameter.device), alpha))


# ---- the sweep ----

Found = Retrieval | Classification


@dataclass(frozen=True)
class Sweep:
    """Points of a line of weights and the chosen one.

    Attributes:
        alpha: the chosen point, by ``RULE``.
        metric: what was compared.
        note: that the rows were too few, or the start the best; else empty.
        points: ``alpha``, ``held_out`` (the score), ``difference`` and ``standard_error`` (of the best to it), and
            ``control`` where it was scored.
    """

    alpha: float
    metric: str
    points: list[dict[str, float]]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        note = {"note": self.note} if self.note else {}
        return {"alpha": self.alpha, "rule": RULE, "metric": self.metric, "points": self.points, **note}


def sweep(
    line: WeightLine,
    score: Callable[[], Found],
    control: Callable[[], Found] | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> Sweep:
    """Score every alpha on held-out rows and choose by ``RULE``; leaves the model there.

    Args:
        line: of the model that ``score`` and ``control`` score.
        score: on rows that neither trained the model nor test it.
        control: on what may have been forgotten; reported, not used in the choice.
        alphas: ascending.
    """
    points, samples = [], []
    for alpha in alphas:
        line.move_to(alpha)
        found = score()
        resampled = found.resampled()
        samples.append(np.mean([resampled[name] for name in _compared(found)], axis=0))
        points.append(
            {"alpha": alpha, "held_out": _mean_score(found)} | ({"control": _mean_score(control())} if control else {})
        )
    best = max(range(len(points)), key=lambda index: points[index]["held_out"])
    for point, resampled in zip(points, samples, strict=True):
        point["difference"] = points[best]["held_out"] - point["held_out"]
        point["standard_error"] = float(np.std(samples[best] - resampled))
    chosen, metric = points[best], _metric_name(found)
    if (lead := points[0]["difference"]) >= 2.0 * points[0]["standard_error"]:
        chosen = next(point for point in points if point["difference"] <= point["standard_error"])
        note = "" if lead else f"no point of the fine-tune scored above the start on the {found.pictures} held-out rows"
    else:
        note = (
            f"{found.pictures} held-out rows are too few to tell the best from the start ({metric} +{lead:.3f}, "
            f"standard error {points[0]['standard_error']:.3f}), so the best was taken: more rows choose better"
        )
    line.move_to(chosen["alpha"])
    return Sweep(chosen["alpha"], metric, points, note)


def _metric_name(found: Found) -> str:
    return "balanced accuracy" if isinstance(found, Classification) else "mAP, mean of both directions"


def _compared(found: Found) -> tuple[str, ...]:
    """mAP moves with every rank, where R@1 of a few rows jumps."""
    return ("balanced_accuracy",) if isinstance(found, Classification) else ("image_to_text_mAP", "text_to_image_mAP")


def _mean_score(found: Found) -> float:
    metrics = found.metrics()
    return math.fsum(metrics[name] for name in _compared(found)) / len(_compared(found))
