"""Training classification heads: which ones, on which columns, with which loss, alone or beside that of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clipft.data.rows import MISSING, class_names_of, class_targets, column_names
from clipft.evaluation.metrics import Classification
from clipft.families.registry import family_of
from clipft.inference.classify import add_head
from clipft.models.heads import LABEL, ClassificationHead, head_logits, heads_of
from clipft.ops.distributed import with_other_ranks
from clipft.training.arguments import CLIPTrainingArguments
from clipft.training.head_losses import balanced_class_weights, head_loss

__all__ = ["HeadTraining"]

METRICS = ("accuracy", "balanced_accuracy", "macro_f1")


class HeadTraining:
    """The heads that a run trains: that of the classes (``args.head``) and of attributes (``args.attributes``).

    Heads that the model lacks are added, started from text; further ones that it has are frozen. With ``args.head`` no
    text is encoded: what only texts use is frozen.

    Args:
        args: the run's.
        model: fused.
        processor: its processor.
        train_dataset: has the columns; their ``ClassLabel`` names are the classes. None: the model has the heads.

    Attributes:
        pairs: whether the loss over pairs is part of the sum.
        classes: of each head, by name.
    """

    def __init__(self, args: CLIPTrainingArguments, model: Any, processor: Any, train_dataset: Any) -> None:
        if hasattr(model, "peft_config"):
            raise ValueError("head, attributes: expected a model without adapter; peft saves the adapter without heads")
        self.args, self.pairs = args, args.head == "none"
        self.factors = ({} if self.pairs else {LABEL: 1.0}) | args.attributes
        for name in self.factors:
            _have_head(model, processor, name, train_dataset, args.caption_templates)
        own = heads_of(model)
        self.heads: list[ClassificationHead] = [own[name] for name in self.factors]
        self._places = [list(own).index(name) for name in self.factors]
        self.classes = {head.name: head.class_names for head in self.heads}
        for name, head in own.items():
            head.requires_grad_(name in self.factors)
        if not self.pairs:
            _freeze_text(model)
        self.class_weights = {head.name: _class_weights(args.class_weights, head, train_dataset) for head in self.heads}

    def logits(self, image_embeds: Tensor) -> tuple[Tensor, ...]:
        """[N, C] of each head, without gradient."""
        with torch.no_grad():
            return tuple(head(image_embeds) for head in self.heads)

    def loss(
        self, weights: Sequence[Tensor], image_embeds: Tensor, targets: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        """The weighted sum of the heads' losses; over the rows of all ranks, since a weighted mean, a mean of what is
        not missing and Dice are not means of the ranks' own.

        Args:
            weights: of all heads that the model has, as its forward gives them.
            image_embeds: [N, D], L2-normalised, of this rank.
            targets: [N, heads], of this rank.
            group: of the ranks, if there are several. Gradients are those of this rank's rows.
        """
        args = self.args
        targets = targets if group is None else with_other_ranks(targets, group)
        total = image_embeds.new_zeros(())
        for column, (head, place) in enumerate(zip(self.heads, self._places, strict=True)):
            logits = head_logits(image_embeds, weights[place])
            of_classes = self.class_weights[head.name]
            total = total + self.factors[head.name] * head_loss(
                args.head_loss,
                logits if group is None else with_other_ranks(logits, group),
                targets[:, column],
                weight=None if of_classes is None else of_classes.to(logits.device),
                label_smoothing=args.label_smoothing_factor,
                gamma=args.focal_gamma,
            )
        return total

    def metrics(self, logits: Sequence[np.ndarray[Any, Any]], targets: dict[str, Any]) -> dict[str, float]:
        """``accuracy``, ``balanced_accuracy`` and ``macro_f1`` of the rows with a class, for attributes under their
        names: ``color_accuracy``.
        """
        found: dict[str, float] = {}
        for head, own in zip(self.heads, logits, strict=True):
            known = targets[head.name] != MISSING
            if known.any():
                metrics = Classification(targets[head.name][known], own[known], head.class_names).metrics()
                prefix = "" if head.name == LABEL else f"{head.name}_"
                found |= {f"{prefix}{metric}": metrics[metric] for metric in METRICS}
        return found


def _have_head(model: Any, processor: Any, name: str, dataset: Any, caption_templates: Sequence[str]) -> None:
    """Add the head of a column, or see that the one there has the column's classes."""
    names = None if dataset is None else class_names_of(dataset, name)
    option = "head: 'text'" if name == LABEL else f"attributes: {name!r}"
    head = heads_of(model).get(name)
    if head is None and names is None:
        raise ValueError(
            f"{option}: expected a training set with a column {name!r} of type datasets.ClassLabel, found the columns "
            f"{[] if dataset is None else sorted(column_names(dataset))}"
        )
    if head is None and len(names or []) < 2:
        raise ValueError(f"{option}: expected two classes or more in the training set, found {names}")
    if head is None:
        add_head(model, processor, names or [], name=name, templates=caption_templates if name == LABEL else None)
    elif names is not None and not set(names) <= set(head.class_names):
        raise ValueError(f"{option}: the model's head has the classes {head.class_names}, the training set {names}")


def _freeze_text(model: Any) -> None:
    text = family_of(model).text
    for part in (*text.body_of(model), text.projection_of(model)):
        part.requires_grad_(False)
    for name in ("logit_scale", "logit_bias"):
        if hasattr(model, name):
            getattr(model, name).requires_grad_(False)


def _class_weights(wanted: Any, head: ClassificationHead, dataset: Any) -> Tensor | None:
    """[C], or None for equal ones. A list is for the classes of ``label``."""
    if wanted is None or (wanted != "balanced" and head.name != LABEL):
        return None
    count = len(head.class_names)
    if wanted == "balanced":
        if dataset is None:
            return None  # nothing to train, hence no share of the classes
        return balanced_class_weights(class_targets(dataset, head.name, head.class_names), count)
    if len(wanted) != count:
        raise ValueError(f"class_weights: expected {count}, one for each of {head.class_names}, got {len(wanted)}")
    return torch.tensor([float(weight) for weight in wanted])
