"""Evaluation of a CLIP model: retrieval, zero-shot classification, a linear probe and nearest neighbours.

Captions that become the same tokens are one text: an image is right with any of its captions, and a caption with any
image that carries it.
The numbers and their intervals: ``clipft.evaluation.metrics``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipft.data.objects import as_rows
from clipft.data.rows import (
    DEFAULT_TEMPLATES,
    MISSING,
    PairRows,
    check_class_names,
    class_names_of,
    class_targets,
    column_names,
    column_values,
    index_texts,
)
from clipft.evaluation.metrics import Blockwise, Classification, Retrieval
from clipft.evaluation.resampling import RESAMPLES
from clipft.inference.classifier import Classifier
from clipft.inference.classify import classifier_of, zero_shot_classifier
from clipft.inference.encode import Pictures, Progress, embed_images, embed_texts, unified
from clipft.models.heads import heads_of

__all__ = [
    "checked_labels",
    "evaluate_heads",
    "evaluate_knn",
    "evaluate_linear_probe",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "heads_found",
    "logits_of",
]


def evaluate_retrieval(
    model: nn.Module,
    processor: Any,
    dataset: Any,
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Texts found by image and images found by text.

    Args:
        model: a ``CLIPModel`` or one of another family, fused or not, or a peft model of one; used on its
            device, in evaluation mode, and left as it was.
        processor: its processor.
        dataset: columns ``image`` and ``caption`` (a string or a list), or ``image`` and ``label`` with class names.
        templates: make captions from class names, where there is no column ``caption``.
        batch_size: pictures or captions a forward pass.
        num_workers: processes that load pictures.
        progress: wraps the loop over picture batches, for instance ``tqdm.tqdm``.
        resamples: of the bootstrap for the intervals; 0 leaves them out.
        seed: of the resamples.

    Returns:
        ``image_to_text_R@1``, ``R@5``, ``R@10`` (over images: any of its captions among the k best texts),
        ``image_to_text_mAP`` (mean over images of the average precision over its captions; with one caption the mean
        of 1 / rank) in [0, 1], ``image_to_text_median_rank`` of the best right text, from 1; the same of
        ``text_to_image_...`` over distinct texts, right with any image that has them. A tie counts as a miss.
        ``intervals``: for each of these [low, high], the 95 % bootstrap interval over pictures.
    """
    rows = PairRows(dataset, templates)
    texts_of, texts = index_texts(unified(model, processor, rows.captions()))
    image_embeds = embed_images(
        model, processor, rows, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    found = Retrieval(image_embeds, embed_texts(model, processor, texts, batch_size), texts_of)
    return _with_intervals(found, resamples, seed)


def evaluate_zero_shot(
    model: nn.Module,
    processor: Any,
    dataset: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Classify pictures by the nearest class text; a class's text embedding is the mean over ``templates``.

    Args:
        model, processor, batch_size, num_workers, progress, resamples, seed: as in :func:`evaluate_retrieval`.
        dataset: columns ``image`` and ``label``, an index into ``class_names``.
        class_names: in the order of the labels; underscores read as spaces.
        templates: captions with one ``{}`` for the class name.

    Returns:
        ``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``top5`` in [0, 1], with two classes also ``auc`` (area under
        the ROC curve of the second class), ``per_class``: a list of rows with ``class``, ``precision``, ``recall``,
        ``f1`` and ``support``, ``confusions``: the 50 most frequent, rows with ``class``, what it was taken for as
        ``predicted``, and ``count``, and, of up to 200 classes, ``confusion_matrix``: rows are the truth
        pictures. A class that was never predicted has precision 0. ``intervals``: [low, high] for each of these
        numbers, the 95 % bootstrap interval over the pictures of each class.
    """
    check_class_names(class_names)
    class_names, dataset = list(class_names), as_rows(dataset)
    labels = checked_labels(dataset, len(class_names))
    image_embeds = embed_images(
        model, processor, Pictures(dataset), batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    classes = zero_shot_classifier(model, processor, class_names, templates, batch_size)
    return _with_intervals(Classification(labels, logits_of(image_embeds, classes), class_names), resamples, seed)


def logits_of(image_embeds: Tensor, classifier: Classifier) -> Blockwise:
    """Scores of pictures [N, D], L2-normalised, for the classes."""
    return Blockwise(image_embeds.numpy(), classifier.logits)


def evaluate_heads(
    model: nn.Module,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Classify pictures by the model's classification heads.

    Args:
        model, processor, batch_size, num_workers, progress, resamples, seed: as in :func:`evaluate_retrieval`; the
            model with heads (``clipft.add_head``).
        dataset: columns ``image`` and those that heads are named after; a row without a value does not count.

    Returns:
        For each head with a column in the data set, by its name, what :func:`evaluate_zero_shot` returns.

    Raises:
        ValueError: no head has a column here, or a column has a class that its head does not know.
    """
    dataset = as_rows(dataset)
    image_embeds = embed_images(
        model, processor, Pictures(dataset), batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    found = heads_found(model, image_embeds, dataset, column_names(dataset))
    if not found:
        raise ValueError(
            f"dataset: expected a column of the model's heads, {sorted(heads_of(model)) or 'of which it has none'}, "
            f"found {sorted(column_names(dataset))}"
        )
    return {name: _with_intervals(part, resamples, seed) for name, part in found.items()}


def heads_found(model: Any, image_embeds: Tensor, dataset: Any, columns: Sequence[str]) -> dict[str, Classification]:
    """What the heads of these columns make of image embeddings [N, D], L2-normalised, of a data set's rows: of those
    with a value, for each head that has any.
    """
    found = {}
    for name, head in heads_of(model).items():
        if name in columns:
            targets = class_targets(dataset, name, head.class_names)
            known = targets != MISSING
            if known.any():
                logits = logits_of(image_embeds[torch.from_numpy(known)], classifier_of(head))
                found[name] = Classification(targets[known], logits, head.class_names)
    return found


def evaluate_linear_probe(
    model: nn.Module,
    processor: Any,
    train_dataset: Any,
    test_dataset: Any,
    *,
    C: float | None = None,  # noqa: N803  (scikit-learn's name)
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Logistic regression on the image embeddings: what the image tower knows, whatever the text tower makes of it.

    Args:
        model, processor, batch_size, num_workers, progress, resamples, seed: as in :func:`evaluate_retrieval`.
        train_dataset: columns ``image`` and ``label``; fits the regression.
        test_dataset: the same, with classes among those; scored.
        C: inverse strength of the L2 penalty. None chooses among powers of ten from 0.1 to 10000 by five-fold
            cross-validated balanced accuracy on ``train_dataset`` (fewer folds where a class has fewer pictures).

    Returns:
        As :func:`evaluate_zero_shot`, and ``C``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    run = _Features(model, processor, batch_size, num_workers, progress)
    names, (features, labels), (test_features, test_labels) = run.of_both(train_dataset, test_dataset)
    probe = LogisticRegression(C=1.0 if C is None else C, max_iter=2000)
    folds = min(5, int(np.unique(labels, return_counts=True)[1].min()))
    if C is None and folds > 1:
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
        search = GridSearchCV(probe, {"C": np.logspace(-1, 4, 6)}, cv=splits, scoring="balanced_accuracy")
        probe = search.fit(features, labels).best_estimator_
    else:
        probe.fit(features, labels)
    found = _voted(probe, test_features, test_labels, names)
    return {**_with_intervals(found, resamples, seed), "C": float(probe.C)}


def evaluate_knn(
    model: nn.Module,
    processor: Any,
    train_dataset: Any,
    test_dataset: Any,
    *,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Classes by vote of the ``k`` nearest training pictures, each with weight exp(cosine / temperature), as in Wu et
    al. 2018 (arXiv:1805.01978) and DINO.

    Args:
        model, processor, batch_size, num_workers, progress, resamples, seed: as in :func:`evaluate_retrieval`.
        train_dataset: columns ``image`` and ``label``; the neighbours.
        test_dataset: the same, with classes among those; scored.
        k: neighbours, at most as many as there are training pictures.
        temperature: of the votes.

    Returns:
        As :func:`evaluate_zero_shot`.
    """
    from sklearn.neighbors import KNeighborsClassifier

    if not 1 <= k <= len(train_dataset):
        raise ValueError(f"k: expected 1 to {len(train_dataset)}, the number of training pictures, got {k}")
    run = _Features(model, processor, batch_size, num_workers, progress)
    names, (features, labels), (test_features, test_labels) = run.of_both(train_dataset, test_dataset)
    # of unit vectors: distance² = 2 - 2 cosine
    votes = KNeighborsClassifier(k, algorithm="brute", weights=lambda far: np.exp(-(far**2) / (2 * temperature)))
    votes.fit(features, labels)
    return _with_intervals(_voted(votes, test_features, test_labels, names), resamples, seed)


def _with_intervals(found: Retrieval | Classification, resamples: int, seed: int) -> dict[str, Any]:
    metrics: dict[str, Any] = found.metrics()
    return {**metrics, "intervals": found.intervals(resamples, seed)} if resamples else metrics


def checked_labels(dataset: Any, classes: int) -> np.ndarray[Any, Any]:
    """[N] integers from 0 to ``classes`` - 1."""
    labels = np.asarray(column_values(dataset, "label"))
    if labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"dataset: expected labels from 0 to {classes - 1}, one for each of class_names, "
            f"got {sorted(set(labels.tolist()))[:10]}"
        )
    return labels


class _Features:
    """Image embeddings and labels of data sets with the same classes."""

    def __init__(
        self, model: nn.Module, processor: Any, batch_size: int, num_workers: int, progress: Progress | None
    ) -> None:
        self.model, self.processor = model, processor
        self.options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}

    def of_both(self, train: Any, test: Any) -> tuple[list[str], Any, Any]:
        """The class names, and of each data set (features [N, D], labels [N])."""
        train, test = as_rows(train), as_rows(test)
        names, test_names = class_names_of(train), class_names_of(test)
        if names is None or test_names is None or not set(test_names) <= set(names):
            raise ValueError(
                "train_dataset, test_dataset: expected a column 'label' of type datasets.ClassLabel, the test set's "
                f"names among those of training, got {names} and {test_names}"
            )
        check_class_names(names)
        labels = checked_labels(train, len(names))
        if len(np.unique(labels)) < 2:
            raise ValueError("train_dataset: expected pictures of two classes or more, found those of one")
        return names, (self._of(train), labels), (self._of(test), class_targets(test, "label", names))

    def _of(self, dataset: Any) -> np.ndarray[Any, Any]:
        return embed_images(self.model, self.processor, Pictures(dataset), **self.options).numpy()


def _voted(fitted: Any, features: Any, labels: Any, names: Sequence[str]) -> Classification:
    """By the probabilities that scikit-learn gives; a class that was not fitted has none."""

    def scores(part: Any) -> np.ndarray[Any, Any]:
        full = np.zeros((len(part), len(names)))
        full[:, fitted.classes_] = fitted.predict_proba(part)
        return full

    return Classification(labels, Blockwise(features, scores), names, votes=True)
