"""Losses of classification heads, in plain torch: the products are tiny. The losses over pairs are ``clipft.ops``.

Each takes logits [N, C] and labels [N] int64, in which ``MISSING`` rows are left out, and gives a 0-d float32 tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clipft.data.rows import MISSING

__all__ = ["HEAD_LOSSES", "balanced_class_weights", "dice_loss", "focal_loss", "head_loss"]

HEAD_LOSSES = ("cross_entropy", "focal", "dice")


def focal_loss(logits: Tensor, labels: Tensor, *, gamma: float = 2.0, weight: Tensor | None = None) -> Tensor:
    """Focal loss over classes (Lin et al. 2017, arXiv:1708.02002): -w_y (1 - p_y)^gamma log p_y, where p is the softmax
    and w the class weight (their alpha). What is classified well already counts little.

    Args:
        logits: [N, C].
        labels: [N] int64, the classes; ``MISSING`` rows are left out.
        gamma: 0 gives cross-entropy.
        weight: [C], of the classes.

    Returns:
        The mean, weighted by ``weight`` as in ``torch.nn.functional.cross_entropy``; 0 where every label is missing.
    """
    logits, labels, weight = _known(logits, labels, weight)
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    of_row = torch.ones_like(log_p) if weight is None else weight[labels]
    # 1 - p from log p: exact near p = 1, where 1 - exp(log p) cancels, and where its power has no gradient to divide by
    rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -(of_row * rest**gamma * log_p).sum() / _or_one(of_row.sum())


def dice_loss(logits: Tensor, labels: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Soft Dice loss over classes: 1 - sum_c w_c D_c / sum_c w_c, over the classes present in the batch, with

        D_c = 2 sum_n p_nc y_nc / (sum_n p_nc + sum_n y_nc),

    p the softmax, y the one-hot labels. A class counts alike however few pictures it has, so that imbalance does not
    drown a rare one. Milletari et al. 2016 (arXiv:1606.04797, with squares in the denominator); without them Sudre et
    al. 2017 (arXiv:1707.03237), MONAI and segmentation_models.pytorch; the last one leaves absent classes out too.

    Args:
        logits: [N, C]; large batches, since D_c is a quotient of sums over the batch.
        labels: [N] int64, the classes; ``MISSING`` rows are left out.
        weight: [C], of the classes.

    Returns:
        A number in [0, 1]; 0 where every label is missing.
    """
    logits, labels, weight = _known(logits, labels, weight)
    p = logits.softmax(1)
    y = functional.one_hot(labels, logits.shape[1]).to(p.dtype)
    present = y.sum(0) > 0
    of_class = present.to(p.dtype) * (1.0 if weight is None else weight)
    dice = 2.0 * (p * y).sum(0) / (p.sum(0) + y.sum(0)).where(present, torch.ones(()).to(p))
    return (of_class * (1.0 - dice)).sum() / _or_one(of_class.sum())


def head_loss(
    kind: str,
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    gamma: float = 2.0,
) -> Tensor:
    """``"cross_entropy"`` (which alone takes ``label_smoothing``), ``"focal"`` or ``"dice"``."""
    if kind == "focal":
        return focal_loss(logits, labels, gamma=gamma, weight=weight)
    if kind == "dice":
        return dice_loss(logits, labels, weight=weight)
    logits, labels, weight = _known(logits, labels, weight)
    if not len(labels):
        return logits.sum()
    return functional.cross_entropy(logits, labels, weight, label_smoothing=label_smoothing)


def balanced_class_weights(labels: Sequence[int] | np.ndarray[Any, Any], classes: int) -> Tensor:
    """[classes] float32: N / (K n_c) for N labels, n_c of class c, and K classes that occur, as scikit-learn's
    ``class_weight="balanced"``; 1 for a class without labels. ``MISSING`` ones do not count.
    """
    from sklearn.utils.class_weight import compute_class_weight

    known = np.asarray(labels)
    known = known[known != MISSING]
    present = np.unique(known)
    weights = torch.ones(classes)
    if len(present):
        weights[torch.from_numpy(present)] = torch.from_numpy(
            compute_class_weight("balanced", classes=present, y=known)
        ).float()
    return weights


def _known(logits: Tensor, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and labels of the rows that have one, checked, in float32 or wider."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits, labels: expected [N, C] and [N], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if weight is not None and weight.shape != logits.shape[1:]:
        raise ValueError(f"weight: expected one for each of {logits.shape[1]} classes, got {tuple(weight.shape)}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    known = labels != MISSING
    return logits[known], labels[known], None if weight is None else weight.to(logits)


def _or_one(total: Tensor) -> Tensor:
    return total.where(total > 0, torch.ones_like(total))
