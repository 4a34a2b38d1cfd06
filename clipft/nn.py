"""The ops as modules, for those who build a training step from parts."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from clipft.ops import contrastive_loss, sigmoid_loss

__all__ = ["ContrastiveLoss", "SigmoidLoss"]


class ContrastiveLoss(nn.Module):
    """:func:`clipft.contrastive_loss` with its smoothing and group fixed."""

    def __init__(self, *, label_smoothing: float = 0.0, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.group = group

    def forward(
        self, image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, labels: Tensor | None = None
    ) -> Tensor:
        """[N, D] twice, the scale and optional labels [N] -> 0-d float32 loss."""
        return contrastive_loss(
            image_embeds,
            text_embeds,
            logit_scale,
            labels=labels,
            label_smoothing=self.label_smoothing,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"label_smoothing={self.label_smoothing:g}"


class SigmoidLoss(nn.Module):
    """:func:`clipft.sigmoid_loss` with its group fixed."""

    def __init__(self, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def forward(
        self, image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
    ) -> Tensor:
        """[N, D] twice, scale and bias -> 0-d float32 loss."""
        return sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias, group=self.group)
