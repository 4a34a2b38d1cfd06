"""clipft.metrics against scikit-learn and plain computations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sklearn.metrics
import torch

from clipft.data.rows import index_texts
from clipft.evaluation import metrics, resampling
from clipft.evaluation.metrics import Blockwise, Classification, Retrieval, retrieval_metrics


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def shared_texts(images: int, texts: int) -> list[list[int]]:
    """Ragged: one to three texts an image, every text used."""
    rng = np.random.default_rng(1)
    own = [{image % texts, *rng.integers(0, texts, image % 3).tolist()} for image in range(images)]
    return [sorted(each) for each in own]


# ---- retrieval ----


@pytest.mark.parametrize("tile", [1, 1000, 1 << 22])
def test_ranks_equal_scikit_learn_whatever_the_tile(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(metrics, "_TILE", tile)
    texts_of = shared_texts(60, 37)
    image, text = unit(60, 8), unit(37, 8, seed=1)
    truth = np.zeros((60, 37), dtype=int)
    for row, own in enumerate(texts_of):
        truth[row, own] = 1
    found = retrieval_metrics(image, text, texts_of)
    for way, right, scores in (
        ("image_to_text", truth, image @ text.t()),
        ("text_to_image", truth.T, text @ image.t()),
    ):
        by_rank = np.take_along_axis(right, (-scores).argsort(1).numpy(), axis=1)
        first = by_rank.argmax(1) + 1
        assert found[f"{way}_median_rank"] == np.median(first)
        for k in (1, 5, 10):
            assert found[f"{way}_R@{k}"] == pytest.approx(np.mean(first <= k))
        expected = sklearn.metrics.label_ranking_average_precision_score(right, scores.numpy())
        assert found[f"{way}_mAP"] == pytest.approx(expected)
        each = [
            sklearn.metrics.average_precision_score(own, row) for own, row in zip(right, scores.numpy(), strict=True)
        ]
        assert found[f"{way}_mAP"] == pytest.approx(np.mean(each))


def test_equal_captions_are_one_text() -> None:
    texts_of, texts = index_texts([["a cat"], ["a dog", "a cat"], ["a cat"]])
    assert (texts_of, texts) == ([[0], [0, 1], [0]], ["a cat", "a dog"])
    image = torch.eye(3)
    text = torch.tensor([[0.6, 0.0, 0.8], [0.9, 0.1, 0.0]])
    result = retrieval_metrics(image, text, texts_of)
    assert result["image_to_text_R@1"] == pytest.approx(2 / 3)  # image 0 finds the dog, 1 the dog, 2 the cat
    assert result["text_to_image_R@1"] == pytest.approx(1 / 2)  # any image with the cat would do; the dog finds image 0


def test_a_collapsed_model_gains_nothing_by_ties() -> None:
    result = retrieval_metrics(torch.ones(100, 4), torch.ones(100, 4), [[i] for i in range(100)])
    assert result["text_to_image_R@10"] == 0
    assert result["image_to_text_median_rank"] == 100
    scores, truth = np.ones((100, 100)), np.eye(100, dtype=int)
    expected = sklearn.metrics.label_ranking_average_precision_score(truth, scores)
    assert result["image_to_text_mAP"] == pytest.approx(expected)


def test_memory_does_not_grow_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the ranking is larger than a few tiles."""
    monkeypatch.setattr(metrics, "_TILE", 5000)
    largest = 0
    rank = metrics._rank

    def watch(scores: torch.Tensor, right: object) -> object:
        nonlocal largest
        largest = max(largest, scores.numel())
        return rank(scores, right)  # type: ignore[arg-type]

    monkeypatch.setattr(metrics, "_rank", watch)
    retrieval_metrics(unit(700, 4), unit(700, 4, seed=1), [[i] for i in range(700)])
    assert 0 < largest <= 5000


def test_diverged_embeddings_are_an_error() -> None:
    with pytest.raises(ValueError, match="finite"):
        retrieval_metrics(torch.full((2, 4), float("nan")), torch.ones(2, 4), [[0], [1]])
    with pytest.raises(ValueError, match="finite"):
        Classification(np.array([0, 1]), np.full((2, 2), np.inf), ["a", "b"])


# ---- classification ----


def noisy(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores that find a good part of them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return labels, rng.normal(size=(count, classes)) + 1.2 * np.eye(classes)[labels]


def test_top5_over_more_than_five_classes() -> None:
    labels, scores = noisy(200, 9)
    result = Classification(labels, scores, [str(i) for i in range(9)]).metrics()
    expected = np.mean([label in row.argsort()[-5:] for label, row in zip(labels, scores, strict=True)])
    assert result["top5"] == pytest.approx(expected)
    assert "auc" not in result


def test_auc_of_two_classes() -> None:
    labels, scores = noisy(80, 2)
    result = Classification(labels, scores, ["no", "yes"]).metrics()
    assert result["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    assert "auc" not in Classification(np.ones(80, dtype=int), scores, ["no", "yes"]).metrics()


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_weighted_metrics_equal_scikit_learn(classes: int) -> None:
    """What a resample counts, with ties, a class without pictures and pictures drawn twice or never."""
    labels, scores = noisy(150, classes)
    scores = scores.round(1)
    labels[labels == 1] = 0 if classes > 2 else 1
    counts = np.random.default_rng(3).integers(0, 4, 150)
    got = Classification(labels, scores, [str(i) for i in range(classes)]).weighted(counts)
    predicted, every = scores.argmax(1), list(range(classes))
    many = np.repeat(np.arange(150), counts)
    truth, guess = labels[many], predicted[many]
    assert got["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, guess))
    present = np.unique(truth)
    recalls = sklearn.metrics.recall_score(truth, guess, labels=present, average=None)
    assert got["balanced_accuracy"] == pytest.approx(recalls.mean())
    f1 = sklearn.metrics.f1_score(truth, guess, average="macro", zero_division=0.0)
    assert got["macro_f1"] == pytest.approx(f1)
    columns = sklearn.metrics.precision_recall_fscore_support(truth, guess, labels=every, zero_division=0.0)
    for name, expected in zip(("precision", "recall", "f1"), columns, strict=False):
        np.testing.assert_allclose(got[name], expected)
    if classes == 2:
        expected = sklearn.metrics.roc_auc_score(truth, (scores[:, 1] - scores[:, 0])[many])
        assert got["auc"] == pytest.approx(expected)


# ---- bootstrap ----


def test_intervals_of_accuracy_are_the_binomial_ones() -> None:
    """Of one class, accuracy is a proportion: its bootstrap distribution is Binomial(n, p) / n, whose quantiles the
    interval meets within the noise of 1000 resamples.
    """
    n, right = 400, 300
    scores = np.zeros((n, 2))
    scores[:right, 0] = scores[right:, 1] = 1
    result = Classification(np.zeros(n, dtype=int), scores, ["a", "b"])
    low, high = result.intervals()["accuracy"]
    deviation = np.sqrt(0.75 * 0.25 / n)
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.01)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.01)
    assert result.intervals(seed=1) != result.intervals(seed=0) == result.intervals(seed=0)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Balanced accuracy of 100 data sets of 120 pictures, truth known by a large one; 95 % within 3 deviations (2.2 %
    each), and a little less since percentiles of few pictures are narrow.
    """
    labels, scores = noisy(50_000, 3, seed=9)
    truth = Classification(labels, scores, ["a", "b", "c"]).metrics()["balanced_accuracy"]
    covered = 0
    for start in range(0, 12_000, 120):
        part = slice(start, start + 120)
        low, high = Classification(labels[part], scores[part], ["a", "b", "c"]).intervals(100)["balanced_accuracy"]
        covered += low <= truth <= high
    assert covered / 100 >= 0.87


def test_every_class_keeps_its_number_of_pictures() -> None:
    labels = np.array([0] * 5 + [1] * 50 + [2] * 2)
    scores = np.eye(3)[labels]
    seen = []
    result = Classification(labels, scores, ["a", "b", "c"])
    weighted = result.weighted
    result.weighted = lambda counts: seen.append(np.bincount(labels, counts).tolist()) or weighted(counts)  # type: ignore
    assert result.intervals(50)["balanced_accuracy"] == [1.0, 1.0]
    assert seen == [[5, 50, 2]] * 50


def test_intervals_of_retrieval_resample_pictures_with_their_captions() -> None:
    """With every text's two pictures, drawn as one would draw rows of a table."""
    image, text = unit(80, 8), unit(40, 8, seed=1)
    texts_of = [[i // 2] for i in range(80)]
    found = Retrieval(image, text, texts_of)
    values = found.resampled(20)
    draws = list(resampling.draws(80, None, 20, 0))
    best = (image @ text.t()).argmax(1).numpy() == np.arange(80) // 2
    hit = (text @ image.t()).argmax(1).numpy() // 2 == np.arange(40)
    for number, counts in enumerate(draws):
        assert values["image_to_text_R@1"][number] == pytest.approx(np.average(best, weights=counts))
        pairs = counts.reshape(40, 2).mean(1)
        assert values["text_to_image_R@1"][number] == pytest.approx(np.average(hit, weights=pairs))
    low, high = found.intervals()["image_to_text_median_rank"]
    assert low <= found.metrics()["image_to_text_median_rank"] <= high


# ---- ties and many classes ----


def test_top5_and_its_interval_have_one_definition() -> None:
    """Ties as scikit-learn breaks them."""
    labels, scores = noisy(300, 9)
    scores = scores.round(0)
    found = Classification(labels, scores, [str(i) for i in range(9)])
    expected = sklearn.metrics.top_k_accuracy_score(labels, scores, k=5)
    assert found.metrics()["top5"] == found.weighted(np.ones(300))["top5"] == pytest.approx(expected)
    low, high = found.intervals(100)["top5"]
    assert low < expected < high


def test_a_class_without_a_vote_is_not_among_the_best_five() -> None:
    votes = np.zeros((40, 20))
    votes[:, [3, 7]] = 0.4, 0.6
    labels = np.array([3, 7, 18, 19] * 10)
    found = Classification(labels, votes, [str(i) for i in range(20)], votes=True)
    assert found.metrics()["top5"] == 0.5
    assert found.intervals(50)["top5"] == [0.5, 0.5]  # within each class all are hits or none


def test_ten_thousand_classes_take_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_TILE", 50_000)
    labels, classes, largest = np.arange(40) % 20, 10_000, 0

    def scores(rows: np.ndarray) -> np.ndarray:
        nonlocal largest
        largest = max(largest, rows.size * classes)
        return np.eye(classes, dtype=np.float32)[np.where(rows % 20 < 2, 5, rows % 20)]

    found = Classification(labels, Blockwise(np.arange(40), scores), [f"thing {i}" for i in range(classes)])
    result = {**found.metrics(), "intervals": found.intervals(10)}
    assert 0 < largest <= 50_000
    assert "confusion_matrix" not in result and result["accuracy"] == 0.9
    assert result["confusions"] == [
        {"class": "thing 0", "predicted": "thing 5", "count": 2},
        {"class": "thing 1", "predicted": "thing 5", "count": 2},
    ]
    assert result["balanced_accuracy"] == pytest.approx(0.9)
    assert len(json.dumps(result)) < 300 * classes


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores = noisy(100, 7)
    whole = Classification(labels, scores, [str(i) for i in range(7)]).metrics()
    monkeypatch.setattr(metrics, "_TILE", 50)
    assert Classification(labels, scores, [str(i) for i in range(7)]).metrics() == whole
