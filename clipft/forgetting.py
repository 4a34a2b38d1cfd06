"""Against forgetting: what keeps a fine-tune near where it started, and weights between the two ends.

- L2-SP (Li et al. 2018, arXiv:1802.01483): lambda / 2 * |w - w_start|^2 over the weights that train.
- Distillation of embeddings: the mean squared distance of a batch's embeddings to those that the starting model gives
  them, so that what stays put is the model's answers rather than its weights.
- WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): (1 - alpha) * start + alpha * tuned, often better than either end on
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

from clipft.data.collate import model_inputs
from clipft.evaluation.metrics import Classification, Retrieval
from clipft.families.registry import check_model
from clipft.models.fusing import check_float, unfuse

__all__ = ["StartingPoint", "Sweep", "WeightLine", "sweep", "wise_ft"]

ALPHAS = tuple(number / 10 for number in range(11))
RULE = "the smallest alpha whose score on held-out rows is within one standard error of the best (paired bootstrap)"


# ---- penalties in training ----


class StartingPoint:
    """A model as it was when training began.

    Args:
        model: a fused model or a peft model of one; what does not train is shared with it, not copied.
        l2_sp: lambda of L2-SP.
        distillation: weight of the embeddings' distance.
    """

    def __init__(self, model: nn.Module, *, l2_sp: float, distillation: float) -> None:
        self.l2_sp, self.distillation = l2_sp, distillation
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self._weights = {name: p.detach().clone() for name, p in model.named_parameters() if l2_sp and p.requires_grad}
        self._model = copy.deepcopy(model, shared).requires_grad_(False).eval() if distillation else None
        self._targets: tuple[Tensor, ...] = ()

    def see(self, inputs: dict[str, Tensor], autocast: Callable[[], Any]) -> None:
        """The batch that the next :meth:`distance` is about."""
        if self._model is None:
            return
        with torch.no_grad(), autocast():
            outputs = self._model(**model_inputs(inputs), return_logits=False)
        embeds = (outputs.image_embeds, outputs.text_embeds)
        self._targets = tuple(part.float() for part in embeds if part is not None)

    def distance(self, *embeds: Tensor) -> Tensor | float:
        """``distillation`` times the mean squared distance of [N, D] embeddings, L2-normalised, of pictures and, where
        the batch has any, of texts, to the start's.
        """
        if not self._targets:
            return 0.0
        pairs = zip(embeds, self._targets, strict=True)
        parts = [(own.float() - target).square().sum(1).mean() for own, target in pairs]
        return self.distillation * torch.stack(parts).mean()

    def forget_batch(self) -> None:
        """No distance until :meth:`see`: evaluation's loss is without."""
        self._targets = ()

    @torch.no_grad()
    def pull(self, model: nn.Module, scale: float) -> None:
        """Add L2-SP's gradient, lambda (w - w_start), times ``scale``, to the gradients of ``model``."""
        for name, parameter in model.named_parameters():
            if name in self._weights and parameter.requires_grad:  # not a layer that waits
                start = self._weights[name] = self._weights[name].to(parameter.device)
                gradient = (parameter - start).mul_(self.l2_sp * scale)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


# ---- weights between start and end ----


def wise_ft(start: nn.Module, tuned: nn.Module, alpha: float) -> Any:
    """Interpolate two models' weights: (1 - alpha) * start + alpha * tuned.

    Args:
        start: a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``; stays as it is.
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
        points: ``alpha``, ``held_out`` (the score), ``difference`` and ``standard_error`` (of the best to it), and
            ``control`` where it was scored.
    """

    alpha: float
    metric: str
    points: list[dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        return {"alpha": self.alpha, "rule": RULE, "metric": self.metric, "points": self.points}


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
        points.append({"alpha": alpha, "held_out": _mean(found)} | ({"control": _mean(control())} if control else {}))
    best = max(range(len(points)), key=lambda index: points[index]["held_out"])
    for point, resampled in zip(points, samples, strict=True):
        point["difference"] = points[best]["held_out"] - point["held_out"]
        point["standard_error"] = float(np.std(samples[best] - resampled))
    chosen = next(p["alpha"] for p in points if p["difference"] <= p["standard_error"])
    line.move_to(chosen)
    return Sweep(chosen, _metric(found), points)


def _metric(found: Found) -> str:
    return "balanced accuracy" if isinstance(found, Classification) else "mAP, mean of both directions"


def _compared(found: Found) -> tuple[str, ...]:
    """mAP moves with every rank, where R@1 of a few rows jumps."""
    return ("balanced_accuracy",) if isinstance(found, Classification) else ("image_to_text_mAP", "text_to_image_mAP")


def _mean(found: Found) -> float:
    metrics = found.metrics()
    return math.fsum(metrics[name] for name in _compared(found)) / len(_compared(found))
