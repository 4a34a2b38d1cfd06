"""Penalties that keep a fine-tune near where it started.

- L2-SP (Li et al. 2018, arXiv:1802.01483): lambda / 2 * |w - w_start|^2 over the weights that train.
- Distillation of embeddings: the mean squared distance of a batch's embeddings to those that the starting model gives
  them, so that what stays put is the model's answers rather than its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clipft.data.collate import model_inputs
from clipft.ops.int8_lora import Int8Weight
from clipft.training.precision import wide_copy

__all__ = ["StartingPoint"]

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
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        shared |= {id(module): module for module in model.modules() if isinstance(module, Int8Weight)}
        self._weights = {name: wide_copy(p) for name, p in model.named_parameters() if l2_sp and p.requires_grad}
        self._model = copy.deepcopy(model, shared).requires_grad_(False).eval() if distillation else None
        self._targets: tuple[Tensor, ...] = ()

    def encode_start(self, inputs: dict[str, Tensor], autocast: Callable[[], Any]) -> None:
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
        """No distance until :meth:`encode_start`: evaluation's loss is without."""
        self._targets = ()

    @torch.no_grad()
    def add_l2_sp_gradient(self, model: nn.Module, scale: float) -> None:
        """Add L2-SP's gradient, lambda (w - w_start), times ``scale``, to the gradients of ``model``."""
        for name, parameter in model.named_parameters():
            if name in self._weights and parameter.requires_grad:  # not a layer that waits
                start = self._weights[name] = self._weights[name].to(parameter.device)
                gradient = (parameter.to(start.dtype) - start).mul_(self.l2_sp * scale)
                if parameter.grad is None:
                    parameter.grad = gradient.to(parameter.dtype)
                else:
                    parameter.grad.add_(gradient)
