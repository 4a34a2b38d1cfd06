"""The ops in plain torch, as one would write them from the papers: the truth that tests compare with, run in float64.

They build the full N x N matrix of logits and support autograd in every dtype that torch does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["contrastive_loss", "sigmoid_loss"]


def contrastive_targets(n: int, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """[n, n] float64 target probabilities: uniform over the pairs of equal label, smoothed as (1 - e) q + e / n."""
    equal = torch.eye(n, dtype=torch.float64) if labels is None else (labels[:, None] == labels[None, :]).double()
    return (1.0 - label_smoothing) * equal / equal.sum(dim=1, keepdim=True) + label_smoothing / n


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric cross-entropy over cosine logits (CLIP, arXiv:2103.00020, figure 3); the dtype is the embeddings'."""
    logits = logit_scale * image_embeds @ text_embeds.t()
    targets = contrastive_targets(len(logits), labels, label_smoothing).to(logits)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2


def sigmoid_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv:2303.15343, algorithm 1): the sum over all pairs divided by N."""
    logits = logit_scale * image_embeds @ text_embeds.t() + logit_bias
    signs = 2.0 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1.0
    return -F.logsigmoid(signs * logits).sum() / len(logits)
