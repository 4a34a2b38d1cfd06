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
        smooths: whether its targets are distributions, which ``label_smoothing_factor`` can smooth.
    """

    name: str
    function: str | Callable[..., Any]
    needs_bias: bool = False
    smooths: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        function = pkgutil.resolve_name(self.function) if isinstance(self.function, str) else self.function
        return function(*args, **kwargs)


LOSSES = {
    loss.name: loss
    for loss in (
        PairLoss("contrastive", "clipft.ops:contrastive_loss", smooths=True),
        PairLoss("sigmoid", "clipft.ops:sigmoid_loss", needs_bias=True),
    )
}
