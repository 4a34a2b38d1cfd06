"""The losses over pairs of pictures and texts, one row each.

Fused models, the trainer, its arguments and the command line read these rows; nothing else names a loss.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["LOSSES", "PairLoss"]


@dataclass(frozen=True)
class PairLoss:
    """A loss of a batch of pairs.

    Attributes:
        name: as ``CLIPTrainingArguments(loss=...)`` has it.
        function: the loss, or where it is (looked up at first use: the command line reads the rows without torch);
            (image_embeds [N, D], text_embeds [N, D], logit_scale, and logit_bias if it needs one, labels=, group=, and
            label_smoothing= if it smooths) -> 0-d loss.
        needs_bias: whether the model must have a ``logit_bias``.
        needs_others: whether a pair alone has no loss, which is told from the batch's others.
        smooths: whether its targets are distributions, which ``label_smoothing_factor`` can smooth.
        float64: the same in plain torch, where the function does not take float64, for models that compute in it.
    """

    name: str
    function: str | Callable[..., Any]
    needs_bias: bool = False
    needs_others: bool = False
    smooths: bool = False
    float64: str | None = None

    def __call__(self, image_embeds: Any, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        function = self.function
        if self.float64 and kwargs.get("group") is None and str(image_embeds.dtype) == "torch.float64":
            function = self.float64
            kwargs = {name: value for name, value in kwargs.items() if name != "group"}
        if isinstance(function, str):
            function = pkgutil.resolve_name(function)
        return function(image_embeds, *args, **kwargs)


LOSSES = {
    loss.name: loss
    for loss in (
        PairLoss(
            "contrastive",
            "clipft.ops:contrastive_loss",
            needs_others=True,
            smooths=True,
            float64="clipft.reference:contrastive_loss",
        ),
        PairLoss("sigmoid", "clipft.ops:sigmoid_loss", needs_bias=True, float64="clipft.reference:sigmoid_loss"),
    )
}
