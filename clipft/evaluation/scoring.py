"""A model's scores on one data set, for reports: pictures and texts are embedded once for all of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from clipft.console import bar
from clipft.data.rows import PairRows, class_names_of, class_targets, class_text, column_names, index_texts
from clipft.evaluation.calibration import Calibrated, calibrate
from clipft.evaluation.metrics import Classification, Retrieval, interval
from clipft.evaluation.tasks import heads_found, logits_of
from clipft.inference.classify import zero_shot_classifier
from clipft.inference.encode import Pictures, embed_images, embed_texts, unified
from clipft.models.calibrated import ZERO_SHOT, Calibration
from clipft.models.heads import LABEL, heads_of

__all__ = ["Found", "Scorer", "calibrated", "calibrations_to_save", "gains"]

_ATTRIBUTE = "attribute_"


@dataclass(frozen=True)
class Found:
    """What a model found in a data set.

    Attributes:
        parts: ``zero_shot`` where classes have names, ``retrieval`` where there are captions; ``head``, first, and
            ``attribute_NAME`` where the model has heads.
        image_embeds: [N, D]; ``text_embeds`` [texts, D]: of the captions, or where there are none, of the classes.
        texts: the captions or class names; ``texts_of``: which of them are right for each picture.
        templates: the texts that ``zero_shot`` tells classes by.
    """

    parts: dict[str, Classification | Retrieval]
    image_embeds: Tensor = field(repr=False)
    text_embeds: Tensor = field(repr=False)
    texts: list[str]
    texts_of: list[list[int]]
    templates: Sequence[str] = ()

    @property
    def main(self) -> Classification | Retrieval:
        """Classes where there are classes, else captions."""
        return next(iter(self.parts.values()))

    @functools.cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The numbers by part: a run's reports, tables and gains all show them."""
        return {name: part.metrics() for name, part in self.parts.items()}

    def to_json(self) -> dict[str, Any]:
        """The numbers for report.json, each with its interval under ``intervals``."""
        return {name: {**self.metrics[name], "intervals": part.intervals()} for name, part in self.parts.items()}


def gains(before: Found, after: Found) -> dict[str, dict[str, Any]]:
    """after - before of every number: ``value``, and ``interval``, 95 %, over the same resamples of the pictures."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in after.parts.items():
        first, last = before.metrics[name], after.metrics[name]
        one, other = before.parts[name].resampled(), part.resampled()
        found[name] = {
            metric: {"value": last[metric] - first[metric], "interval": interval(other[metric] - one[metric])}
            for metric in other
            if metric in last
        }
    return found


def calibrated(found: Found, saved: Mapping[str, Calibration], precision: float | None) -> dict[str, Calibrated]:
    """By part the probabilities of the classifiers: under what the model has saved of them, else fitted.

    Args:
        found: on rows that the model was not trained on.
        saved: by head or ``zero_shot``, as :func:`clipft.models.calibrated.model_calibrations` gives it.
        precision: choose thresholds that give it.
    """
    result = {}
    for name, part in found.parts.items():
        if isinstance(part, Classification):
            own, told = saved.get(_key(name)), name == ZERO_SHOT
            templates = tuple(found.templates) if told else ()
            result[name] = calibrate(
                part,
                saved=own if own is not None and own.holds_for(part.class_names, templates) else None,
                precision=precision,
                classes=tuple(part.class_names) if told else (),
                templates=templates,
            )
    return result


def calibrations_to_save(parts: Mapping[str, Calibrated]) -> dict[str, Calibration]:
    """By head or ``zero_shot``."""
    return {_key(name): part.calibration for name, part in parts.items()}


def _key(part: str) -> str:
    return LABEL if part == "head" else part.removeprefix(_ATTRIBUTE)


@dataclass(frozen=True)
class Scorer:
    """Scores a model on a data set: ``zero_shot`` where classes have names, ``retrieval`` where there are captions."""

    clip: Any
    processor: Any
    dataset: Any
    templates: list[str]
    batch_size: int
    workers: int
    console: Console
    class_names: Sequence[str] | None = None  # that pictures are told apart by; default: the data's own

    def __call__(self, stage: str) -> Found:
        """Score the model as it is now; ``stage`` is shown beside the progress bar."""
        names, captioned = self.class_names or class_names_of(self.dataset), "caption" in column_names(self.dataset)
        if not (names or captioned):
            raise ValueError(
                "--data: expected captions, or labels with names, found labels that are numbers only: name them with "
                "class_names (--class-names)"
            )
        with bar(self.console) as progress:
            image_embeds = embed_images(
                self.clip,
                self.processor,
                Pictures(self.dataset),
                batch_size=self.batch_size,
                num_workers=self.workers,
                progress=functools.partial(progress.track, description=stage),
            )
        heads = self._heads_found(image_embeds)
        parts: dict[str, Any] = {"head": heads[LABEL]} if LABEL in heads else {}
        texts, texts_of, text_embeds = [], [], torch.empty(0)
        if names:
            labels = class_targets(self.dataset, "label", names)
            classes = zero_shot_classifier(self.clip, self.processor, names, self.templates, self.batch_size)
            text_embeds = torch.from_numpy(classes.weights)
            parts["zero_shot"] = Classification(labels, logits_of(image_embeds, classes), names)
            if LABEL in heads:  # it is what has learnt
                names = heads[LABEL].class_names
                labels = class_targets(self.dataset, LABEL, names)
                text_embeds = normalize(heads_of(self.clip)[LABEL].weight.detach().float().cpu())
            texts, texts_of = [class_text(name) for name in names], [[label] for label in labels.tolist()]
        if captioned:
            captions = PairRows(self.dataset, self.templates).captions()
            texts_of, texts = index_texts(unified(self.clip, self.processor, captions))
            text_embeds = embed_texts(self.clip, self.processor, texts, self.batch_size)
            parts["retrieval"] = Retrieval(image_embeds, text_embeds, texts_of)
        parts |= {f"{_ATTRIBUTE}{name}": found for name, found in heads.items() if name != LABEL}
        return Found(parts, image_embeds, text_embeds, texts, texts_of, self.templates)

    def _heads_found(self, image_embeds: Tensor) -> dict[str, Classification]:
        """Of the heads for these classes; a control set, say, has others."""
        others = [
            name
            for name, head in heads_of(self.clip).items()
            if not set(class_names_of(self.dataset, name) or ()) <= set(head.class_names)
        ]
        for name in others:
            self.console.print(f"the model's head {name!r} knows other classes than this data has: not scored")
        rest = [name for name in column_names(self.dataset) if name not in others]
        return heads_found(self.clip, image_embeds, self.dataset, rest)
