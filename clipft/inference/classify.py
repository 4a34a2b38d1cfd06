"""Classifiers of a model: its heads, started from text, and classes that are texts alone; probabilities of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from clipft.data.rows import DEFAULT_TEMPLATES, check_class_names, class_text
from clipft.families.registry import base_model, check_model
from clipft.inference.classifier import ZERO_SHOT, Calibration, Classifier
from clipft.inference.encode import class_vectors, embed, encoder_of, load_any
from clipft.models.calibrated import model_calibrations
from clipft.models.formats import HEADS_KEY
from clipft.models.given import given_model
from clipft.models.heads import LABEL, ClassificationHead, attach_head, heads_of
from clipft.models.run_folder import templates_of_run

__all__ = [
    "add_head",
    "classifier_of",
    "classifiers_of",
    "classify",
    "model_calibrations",
    "usual_templates",
    "zero_shot_calibration",
    "zero_shot_classifier",
]


def classifier_of(head: ClassificationHead, calibration: Calibration | None = None) -> Classifier:
    """A head as it is now."""
    weights = head.weight.detach().float().cpu().numpy()
    return Classifier(head.class_names, weights).calibrated(calibration)


def classifiers_of(model: Any) -> Mapping[str, Classifier]:
    """A model's heads by name, calibrated; of a :class:`clipft.OnnxCLIP` also the classes that it brings along, under
    ``zero_shot``.
    """
    if hasattr(model, "encode_images"):
        return cast(Mapping[str, Classifier], model.classifiers)
    known = model_calibrations(model)
    return {name: classifier_of(head, known.get(name)) for name, head in heads_of(model).items()}


def zero_shot_classifier(
    model: Any,
    processor: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
) -> Classifier:
    """Classes by their texts, calibrated where the model was on these classes and templates.

    Args:
        model: as of :func:`clipft.embed`; ``processor`` is None with :class:`clipft.OnnxCLIP`.
        class_names: C; underscores read as spaces.
        templates: texts with one ``{}`` for the class; their embeddings are averaged.
        batch_size: texts a forward pass.
    """
    vectors = class_vectors(encoder_of(model, processor, batch_size).texts, class_names, templates)
    onnx = hasattr(model, "encode_images")
    scale = model.logit_scale if onnx else base_model(model).logit_scale.detach().float().exp()
    found = Classifier(class_names, vectors.numpy(), float(scale), templates=tuple(templates))
    return found.calibrated(zero_shot_calibration(model))


def zero_shot_calibration(model: Any) -> Calibration:
    """Of a model or a :class:`clipft.OnnxCLIP`; one that changes nothing, where it has none."""
    known = model.calibrations if hasattr(model, "encode_images") else model_calibrations(model)
    return cast(Calibration, known.get(ZERO_SHOT, Calibration()))


def usual_templates(model: Any, name: str) -> list[str]:
    """Texts of a model's classes, where nobody gives any: its run's (``name``: the model's folder), else those that it
    was calibrated with.
    """
    own = model.info.get("templates") if hasattr(model, "encode_images") else templates_of_run(name)
    return list(own or zero_shot_calibration(model).templates or DEFAULT_TEMPLATES)


def default_templates(name: str) -> tuple[str, ...]:
    """Texts of a head's classes, where nobody gives any: of the attribute "color", "a photo, color: red."."""
    return DEFAULT_TEMPLATES if name == LABEL else (f"a photo, {class_text(name)}: {{}}.",)


def add_head(
    model: Any,
    processor: Any,
    class_names: Sequence[str],
    *,
    name: str = LABEL,
    templates: Sequence[str] | None = None,
    batch_size: int = 64,
) -> Any:
    """Give a model a classification head that starts as its zero-shot classifier.

    Args:
        model: a ``CLIPModel`` or one of another family, fused or not; changed in place.
        processor: its processor.
        class_names: two or more; underscores read as spaces.
        name: the data column that holds the classes; ``"label"`` or an attribute's.
        templates: texts with one ``{}`` for the class; their embeddings are averaged. Default: "a photo of a {}.", of
            an attribute "a photo, NAME: {}.".
        batch_size: texts a forward pass.

    Returns:
        The same model, with ``model.heads``. ``clipft.CLIPTrainer`` trains the heads that its arguments name.

    Raises:
        TypeError: not such a model, or one inside a peft model, which would not save it.
        ValueError: fewer than two classes, one twice, or a head of this name.
    """
    check_model(model)
    check_class_names(class_names)
    names = [str(class_name) for class_name in class_names]
    if len(set(names)) < len(names):
        raise ValueError(f"class_names: expected each once, got {sorted({n for n in names if names.count(n) > 1})}")
    if name in heads_of(model):
        raise ValueError(f"name: the model has a head {name!r} already, of {heads_of(model)[name].class_names}")
    templates = default_templates(name) if templates is None else templates
    start = zero_shot_classifier(model, processor, names, templates, batch_size)
    weight = start.scale * torch.from_numpy(start.weights)
    attach_head(model, ClassificationHead(name, names, weight.to(model.logit_scale.device, model.dtype)))
    stored = {"name": name, "classes": names}
    setattr(model.config, HEADS_KEY, [*(getattr(model.config, HEADS_KEY, None) or []), stored])
    return model


def classify(
    model: Any,
    processor: Any = None,
    images: Any = None,
    *,
    head: str = LABEL,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Tensor:
    """Probabilities of a head's classes: the softmax of its logits over the temperature that the model was saved with.

    Args:
        model: as :func:`clipft.embed` takes it, with heads (:func:`add_head`, a run of ``CLIPTrainer``, or loaded from
            one).
        processor: of a model in torch that comes without its own.
        images: PIL pictures, paths, or a data set with the column ``image``.
        head: the head's name.
        batch_size, num_workers: pictures at a time; processes that load them.

    Returns:
        [N, C] float32 on the CPU, by the head's calibration where it has one; the classes are
        ``clipft.inference.classify.classifiers_of(model)[head].names``.

    Raises:
        ValueError: there is no such head.
    """
    model, processor = given_model(model, processor, load_any)
    found = classifiers_of(model)
    if head not in found:
        raise ValueError(
            f"head: expected one of the model's heads, {sorted(found) or 'of which it has none'}, got {head!r}"
        )
    embeds = embed(model, processor, images=images, batch_size=batch_size, num_workers=num_workers)
    return torch.from_numpy(found[head].probabilities(embeds.numpy()))
