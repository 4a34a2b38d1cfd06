"""Retrieval and zero-shot classification of a CLIP model, without an N x N matrix.

Equal captions are one text: an image is right with any of its captions, and a caption with any image that carries it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from clipft.data import DEFAULT_TEMPLATES, PairRows, build_transform, read_row, render, stack_pictures, tokenize

__all__ = ["evaluate_retrieval", "evaluate_zero_shot"]

_KS = (1, 5, 10)
_QUERIES, _CANDIDATES = 1024, 8192  # a tile of similarities: 32 MB
Progress = Callable[[Iterable[Any]], Iterable[Any]]


def evaluate_retrieval(
    model: nn.Module,
    processor: Any,
    dataset: Any,
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Recall of text by image and of image by text.

    Args:
        model: a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``, fused or not, or a peft model of one; used on its
            device, in evaluation mode, and left as it was.
        processor: its processor.
        dataset: columns ``image`` and ``caption`` (a string or a list), or ``image`` and ``label`` with class names.
        templates: make captions from class names, where there is no column ``caption``.
        batch_size: pictures or captions a forward pass.
        num_workers: processes that load pictures.
        progress: wraps the loop over picture batches, for instance ``tqdm.tqdm``.

    Returns:
        ``image_to_text_R@1``, ``R@5``, ``R@10`` (over images: any of its captions among the k best texts) and
        ``text_to_image_...`` (over distinct captions: any image that has it among the k best), in [0, 1].
    """
    rows = PairRows(dataset, templates)
    texts_of, texts = index_texts(rows.captions())
    image_embeds = embed_images(
        model, processor, rows, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    return retrieval_metrics(image_embeds, embed_texts(model, processor, texts, batch_size), texts_of)


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
) -> dict[str, Any]:
    """Classify pictures by the nearest class text; a class's text embedding is the mean over ``templates``.

    Args:
        model, processor, batch_size, num_workers, progress: as in :func:`evaluate_retrieval`.
        dataset: columns ``image`` and ``label``, an index into ``class_names``.
        class_names: in the order of the labels; underscores read as spaces.
        templates: captions with one ``{}`` for the class name.

    Returns:
        ``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``top5`` in [0, 1], and ``per_class``: a list of rows with
        ``class``, ``precision``, ``recall``, ``f1`` and ``support``. A class that was never predicted has precision 0.
    """
    if isinstance(class_names, str) or len(class_names) < 2:
        raise ValueError(f"class_names: expected at least two names, got {class_names!r}")
    labels = _labels(dataset, len(class_names))
    image_embeds = embed_images(
        model, processor, _Pictures(dataset), batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    classes = torch.stack([_class_embedding(model, processor, templates, name, batch_size) for name in class_names])
    return classification_metrics(labels, (image_embeds @ classes.t()).numpy(), class_names)


# ---- embeddings ----


class _Pictures(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_row(self.dataset, index)["image"]}


class _StackPictures:
    def __init__(self, processor: Any) -> None:
        self.image_processor = processor.image_processor
        self.transform = build_transform(processor.image_processor)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return stack_pictures(self.image_processor, [self.transform(row["image"]) for row in rows])


def embed_images(
    model: nn.Module,
    processor: Any,
    rows: Dataset[Any],
    *,
    batch_size: int,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """[N, D] float32 on the CPU, L2-normalised."""
    loader = DataLoader(rows, batch_size, num_workers=num_workers, collate_fn=_StackPictures(processor))
    with evaluating(model) as device:
        parts = [
            _unit(model.get_image_features(**{name: tensor.to(device) for name, tensor in pictures.items()}))  # type: ignore[operator]
            for pictures in (progress(loader) if progress else loader)
        ]
    return torch.cat(parts)


def embed_texts(
    model: nn.Module, processor: Any, texts: Sequence[str], batch_size: int, max_length: int | None = None
) -> Tensor:
    """[N, D] float32 on the CPU, L2-normalised. Texts of like length share a batch, so that few padding tokens are
    computed.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with evaluating(model) as device:
        parts = []
        for start in range(0, len(order), batch_size):
            tokens = tokenize(processor, [texts[index] for index in order[start : start + batch_size]], max_length)
            features = model.get_text_features(**{name: ids.to(device) for name, ids in tokens.items()})  # type: ignore[operator]
            parts.append(_unit(features))
    embeds = torch.cat(parts)
    return torch.empty_like(embeds).index_copy_(0, torch.tensor(order), embeds)


def _unit(features: Any) -> Tensor:
    return nn.functional.normalize(features.pooler_output.float(), dim=-1).cpu()


def _class_embedding(model: nn.Module, processor: Any, templates: Sequence[str], name: str, batch_size: int) -> Tensor:
    return nn.functional.normalize(embed_texts(model, processor, render(templates, name), batch_size).mean(0), dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, on the model's device; each module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, training in modes.items():
            module.training = training


# ---- retrieval ----


def index_texts(captions: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[str]]:
    """For each image the indices of its texts, and the distinct texts in order of first appearance."""
    number: dict[str, int] = {}
    texts_of = [sorted({number.setdefault(text, len(number)) for text in own}) for own in captions]
    return texts_of, list(number)


def retrieval_metrics(image_embeds: Tensor, text_embeds: Tensor, texts_of: Sequence[Sequence[int]]) -> dict[str, float]:
    """Recall at 1, 5 and 10 from embeddings [images, D] and [distinct texts, D], L2-normalised."""
    images_of: list[list[int]] = [[] for _ in range(len(text_embeds))]
    for image, own in enumerate(texts_of):
        for text in own:
            images_of[text].append(image)
    recalls = {}
    for name, queries, candidates, right in (
        ("image_to_text", image_embeds, text_embeds, texts_of),
        ("text_to_image", text_embeds, image_embeds, images_of),
    ):
        best = top_k(queries, candidates, max(_KS)).tolist()
        for k in _KS:
            hits = [not own.isdisjoint(found[:k]) for own, found in zip(map(set, right), best, strict=True)]
            recalls[f"{name}_R@{k}"] = sum(hits) / len(hits)
    return recalls


def top_k(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Indices [Q, min(k, C)] of the candidates with the largest products, best first; a tile of products at a time."""
    if not (torch.isfinite(queries).all() and torch.isfinite(candidates).all()):
        raise ValueError("embeddings: expected finite numbers, got NaN or Inf; has the training diverged?")
    return torch.cat([_top_k_of(block, candidates, k) for block in queries.split(_QUERIES)])


def _top_k_of(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    values = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(candidates), _CANDIDATES):
        products = queries @ candidates[start : start + _CANDIDATES].t()
        block_values, block_indices = products.topk(min(k, products.shape[1]), dim=1)
        values, indices = torch.cat([values, block_values], 1), torch.cat([indices, block_indices + start], 1)
        values, chosen = values.topk(min(k, values.shape[1]), dim=1)
        indices = indices.gather(1, chosen)
    return indices


# ---- classification ----


def _labels(dataset: Any, classes: int) -> np.ndarray[Any, Any]:
    by_column = hasattr(dataset, "column_names") and "label" in dataset.column_names
    values = dataset["label"] if by_column else [dataset[index]["label"] for index in range(len(dataset))]
    labels = np.asarray(values)
    if labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"dataset: expected labels from 0 to {classes - 1}, one for each of class_names, "
            f"got {sorted(set(labels.tolist()))[:10]}"
        )
    return labels


def classification_metrics(
    labels: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], class_names: Sequence[str]
) -> dict[str, Any]:
    """Metrics of :func:`evaluate_zero_shot` from labels [N] and scores [N, classes]."""
    if not np.isfinite(scores).all():
        raise ValueError("embeddings: expected finite numbers, got NaN or Inf; has the training diverged?")
    every, predicted = list(range(len(class_names))), scores.argmax(1)
    columns = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0.0)
    rows = [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in zip(class_names, *columns, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "y_pred contains classes not in y_true"
        )  # the mean is over the classes present
        balanced = balanced_accuracy_score(labels, predicted)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(balanced),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "top5": float(top_k_accuracy_score(labels, scores, k=5, labels=every)) if len(every) > 5 else 1.0,
        "per_class": rows,
    }
