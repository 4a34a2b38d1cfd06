"""Losses of classification heads against their equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

import clipft
from clipft.data.rows import MISSING
from clipft.training.head_losses import balanced_class_weights, head_loss


def logits_and_labels(rows: int = 11, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, classes, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), torch.randint(classes, (rows,), generator=generator)


def focal_by_rows(logits: Tensor, labels: Tensor, gamma: float, weight: Tensor) -> Tensor:
    p = logits.softmax(1)
    terms = [weight[y] * (1 - p[i, y]) ** gamma * -p[i, y].log() for i, y in enumerate(labels.tolist())]
    return torch.stack(terms).sum() / weight[labels].sum()


def dice_by_classes(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    p, present = logits.softmax(1), sorted(set(labels.tolist()))
    losses = [1 - 2 * p[labels == c, c].sum() / (p[:, c].sum() + (labels == c).sum()) for c in present]
    return (torch.stack(losses) * weight[present]).sum() / weight[present].sum()


@pytest.mark.parametrize("rows", [1, 2, 11, 97])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_its_equation(rows: int, gamma: float) -> None:
    logits, labels = logits_and_labels(rows)
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    got = clipft.focal_loss(logits, labels, gamma=gamma, weight=weight)
    expected = focal_by_rows(logits, labels, gamma, weight)
    torch.testing.assert_close(got, expected)
    one, other = (torch.autograd.grad(value, logits)[0] for value in (got, expected))
    torch.testing.assert_close(one, other)


def test_focal_loss_without_gamma_is_cross_entropy() -> None:
    logits, labels = logits_and_labels()
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(
        clipft.focal_loss(logits, labels, gamma=0.0, weight=weight), functional.cross_entropy(logits, labels, weight)
    )


@pytest.mark.parametrize("rows", [1, 2, 11, 97])  # with one or two, classes are absent
def test_dice_loss_is_its_equation(rows: int) -> None:
    logits, labels = logits_and_labels(rows)
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    got, expected = clipft.dice_loss(logits, labels, weight=weight), dice_by_classes(logits, labels, weight)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(expected, logits)[0])
    assert 0.0 < clipft.dice_loss(logits, labels) < 1.0
    sure = 1000.0 * functional.one_hot(labels, 4)
    assert clipft.dice_loss(sure, labels) == 0.0 == clipft.focal_loss(sure, labels)


@pytest.mark.parametrize("kind", ["cross_entropy", "focal", "dice"])
def test_missing_labels_are_as_if_their_rows_were_not_there(kind: str) -> None:
    logits, labels = logits_and_labels(12)
    some = labels.clone()
    some[::3] = MISSING
    known = some != MISSING
    torch.testing.assert_close(head_loss(kind, logits, some), head_loss(kind, logits[known], labels[known]))
    none = head_loss(kind, logits, torch.full_like(labels, MISSING))
    assert none == 0.0
    assert torch.autograd.grad(none, logits)[0].abs().max() == 0.0


@pytest.mark.parametrize("kind", ["focal", "dice"])
def test_extreme_logits_have_finite_gradients(kind: str) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], requires_grad=True)
    loss = head_loss(kind, logits, torch.tensor([0, 0, 1]), gamma=0.5)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert torch.isnan(head_loss(kind, torch.full((2, 2), torch.nan), torch.tensor([0, 1])))


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [3] + [MISSING] * 5)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels[:10])
    assert balanced_class_weights(labels, 4).tolist() == pytest.approx([*expected[:2], 1.0, expected[2]])


def test_losses_check_their_arguments() -> None:
    logits, labels = logits_and_labels()
    with pytest.raises(ValueError, match=r"expected \[N, C\] and \[N\]"):
        clipft.dice_loss(logits, labels[:3])
    with pytest.raises(ValueError, match="weight: expected one for each of 4 classes"):
        clipft.focal_loss(logits, labels, weight=torch.ones(3))
