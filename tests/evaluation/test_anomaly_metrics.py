"""Image and pixel metrics of anomalies against scikit-learn, and against slow float64 loops over thresholds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sklearn.metrics

from clipft.evaluation import anomaly
from clipft.evaluation.anomaly import AnomalyDetection, PixelScores, best_f1, regions_of

Array = np.ndarray


def noisy(count: int, seed: int = 0, digits: int = 1) -> tuple[Array, Array]:
    """Labels, and scores with ties."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.4).astype(int)
    labels[:2] = 0, 1
    return labels, (rng.normal(size=count) + labels).round(digits)


def surfaces(count: int, size: tuple[int, int] = (20, 24), digits: int = 2) -> list[tuple[Array, Array | None]]:
    """Maps, and masks of the first half: two or three regions, one of them met at a corner only."""
    rng = np.random.default_rng(5)
    found: list[tuple[Array, Array | None]] = []
    for number in range(count):
        scores = rng.normal(size=size)
        mask = np.zeros(size, dtype=bool)
        if number < count // 2:
            mask[2 : 4 + number, 3:7] = True
            mask[4 + number : 6 + number, 7] = True  # at a corner: the same region
            mask[15:18, 10 : 12 + 2 * number] = True
            scores[mask] += rng.random() * 2
        found.append((scores.round(digits).astype(np.float32), mask if mask.any() else None))
    return found


def slow_regions(mask: Array) -> list[set[tuple[int, int]]]:
    """By flooding, over all eight neighbours."""
    left, regions = {tuple(map(int, place)) for place in np.argwhere(mask)}, []
    while left:
        region, waiting = set(), [left.pop()]
        while waiting:
            y, x = waiting.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy, dx in itertools.product((-1, 0, 1), repeat=2)} & left
            left -= near
            waiting += near
        regions.append(region)
    return regions


def slow_aupro(pictures: list[tuple[Array, Array | None]], limit: float = 0.3) -> float:
    """As Bergmann et al. have it: at every threshold the false positive rate and the mean overlap of the regions."""
    normal = np.concatenate([m[~k] if k is not None else m.ravel() for m, k in pictures]).astype(np.float64)
    regions = [
        np.array([scores[place] for place in region], dtype=np.float64)
        for scores, mask in pictures
        if mask is not None
        for region in slow_regions(mask)
    ]
    thresholds = np.unique(np.concatenate([normal, *regions]))[::-1]
    rates = np.array([0.0, *((normal >= t).mean() for t in thresholds)])
    overlaps = np.array([0.0, *(np.mean([(region >= t).mean() for region in regions]) for t in thresholds)])
    area = 0.0
    for x0, x1, y0, y1 in zip(rates, rates[1:], overlaps, overlaps[1:], strict=False):
        if x0 < limit:
            end = min(x1, limit)
            y = y1 if x1 == x0 else y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y) / 2
    return area / limit


def taken(pictures: list[tuple[Array, Array | None]]) -> PixelScores:
    pixels = PixelScores()
    for scores, mask in pictures:
        pixels.add(scores, mask)
    return pixels


def pixel_auroc(pictures: list[tuple[Array, Array | None]]) -> float:
    """By scikit-learn."""
    labels = np.concatenate([(np.zeros(m.shape, bool) if k is None else k).ravel() for m, k in pictures])
    return float(sklearn.metrics.roc_auc_score(labels, np.concatenate([m.ravel() for m, _ in pictures])))


# ---- pictures ----


@pytest.mark.parametrize("seed", range(5))
def test_image_metrics_equal_scikit_learn(seed: int) -> None:
    labels, scores = noisy(60, seed)
    found = AnomalyDetection(scores, ["bad" if label else None for label in labels]).metrics()
    assert found["image_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    every = {t: sklearn.metrics.f1_score(labels, scores >= t) for t in np.unique(scores)}
    assert found["best_f1"] == pytest.approx(max(every.values()))
    assert every[found["threshold"]] == pytest.approx(found["best_f1"])
    assert sklearn.metrics.f1_score(labels, scores >= found["threshold"]) == pytest.approx(found["best_f1"])
    assert (found["normal"], found["anomalies"]) == ((labels == 0).sum(), labels.sum())


def test_the_best_f1_of_one_score_for_all_and_of_a_perfect_order() -> None:
    assert best_f1(np.array([0, 1, 0]), np.ones(3)) == (0.5, 1.0)
    assert best_f1(np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 7.0, 9.0])) == (1.0, 7.0)


def test_a_resample_counts_each_picture_as_often_as_it_was_drawn() -> None:
    scores = noisy(40)[1]
    pictures = surfaces(40, (6, 8), digits=0)
    kinds = ["bad" if mask is not None else None for _, mask in pictures]
    found = AnomalyDetection(scores, kinds, taken(pictures))
    counts = np.random.default_rng(1).integers(0, 3, 40)
    many = np.repeat(np.arange(40), counts)
    own = found.weighted(counts)
    again = AnomalyDetection(scores[many], [kinds[i] for i in many], taken([pictures[i] for i in many])).metrics()
    for name in ("image_auroc", "best_f1", "pixel_auroc", "aupro@30"):
        assert own[name] == pytest.approx(again[name], abs=1e-6), name  # few distinct scores: bins hold one each


def test_scores_of_one_sort_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="kinds: expected normal pictures and anomalies"):
        AnomalyDetection(np.ones(3), [None] * 3)
    with pytest.raises(ValueError, match="finite"):
        AnomalyDetection(np.array([1.0, np.nan]), [None, "bad"])
    with pytest.raises(ValueError, match="finite"):
        PixelScores().add(np.full((2, 2), np.inf), None)


# ---- pixels ----


def test_regions_meet_at_corners() -> None:
    for _, mask in surfaces(10):
        if mask is not None:
            numbers, count = regions_of(mask)
            assert count == len(slow_regions(mask)) == 2
            assert {frozenset(map(tuple, np.argwhere(numbers == i + 1))) for i in range(count)} == {
                frozenset(region) for region in slow_regions(mask)
            }


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_pixel_metrics_equal_the_slow_ones_with_ties(digits: int) -> None:
    pictures = surfaces(8, digits=digits)
    found = taken(pictures).metrics()
    assert found["pixel_auroc"] == pytest.approx(pixel_auroc(pictures), abs=1e-6)
    assert found["aupro@30"] == pytest.approx(slow_aupro(pictures), abs=1e-6)


def test_maps_that_say_nothing_and_maps_that_say_all() -> None:
    pictures = [(np.zeros(mask.shape, np.float32), mask) for _, mask in surfaces(6)[:3]]
    assert taken(pictures).metrics() == pytest.approx({"pixel_auroc": 0.5, "aupro@30": 0.15}, abs=1e-6)
    pictures = [(mask.astype(np.float32), mask) for _, mask in pictures]
    assert taken(pictures).metrics() == pytest.approx({"pixel_auroc": 1.0, "aupro@30": 1.0}, abs=1e-6)


def test_quantiles_of_large_maps_stay_within_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = surfaces(8, digits=6)
    for quantiles in (16, 64):
        monkeypatch.setattr(anomaly, "_QUANTILES", quantiles)
        pixels = taken(pictures)
        found = pixels.metrics()
        assert abs(found["pixel_auroc"] - pixel_auroc(pictures)) <= 2 / quantiles
        assert abs(found["aupro@30"] - slow_aupro(pictures)) <= (1 + 1 / 0.3) / quantiles
        kept = sum(own.shape[1] for own in pixels._kept)
        assert kept <= (len(pictures) + pixels.regions) * quantiles


def test_a_quantile_stands_in_the_middle_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomaly, "_QUANTILES", 10)
    for place in range(0, 1000, 7):  # a defect of one pixel among 1000 normal ones
        scores = np.array([[*range(1000), place + 0.5]], np.float32)
        own = PixelScores().add(scores, np.arange(1001)[None] == 1000)
        assert own == pytest.approx((place + 1) / 1000, abs=0.0501)


def test_add_tells_a_pictures_own_auroc() -> None:
    pixels = PixelScores()
    for scores, mask in surfaces(6):
        own = pixels.add(scores, mask)
        assert own == (None if mask is None else pytest.approx(pixel_auroc([(scores, mask)]), abs=1e-6))
    assert (pixels.pictures, pixels.regions) == (6, 6)
    with pytest.raises(ValueError, match="mask: expected 24 x 20 pixels as the map has, got 20 x 24"):
        pixels.add(np.zeros((20, 24), np.float32), np.zeros((24, 20), bool))
    assert pixels.pictures == 6


def test_intervals_hold_the_number_and_kinds_stand_alone() -> None:
    pictures = surfaces(24)
    kinds: list[str | None] = [None if mask is None else "ab"[i % 2] for i, (_, mask) in enumerate(pictures)]
    scores = np.array([float(values.max()) for values, _ in pictures])
    found = AnomalyDetection(scores, kinds, taken(pictures))
    metrics, intervals = found.metrics(), found.intervals(200)
    for name, (low, high) in intervals.items():
        assert low <= metrics[name] <= high and high - low < 0.5, name
    for row in found.per_kind():
        chosen = [i for i, kind in enumerate(kinds) if kind in (None, row["kind"])]
        own = [pictures[i] for i in chosen]
        labels = [kinds[i] is not None for i in chosen]
        assert row["support"] == sum(labels) == 6
        assert row["image_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores[chosen]))
        assert row["pixel_auroc"] == pytest.approx(pixel_auroc(own), abs=1e-6)
        assert row["aupro@30"] == pytest.approx(slow_aupro(own), abs=1e-6)
        assert set(row["intervals"]) == {"image_auroc", "pixel_auroc", "aupro@30"}


def test_pictures_alone_have_no_numbers_of_pixels() -> None:
    labels, scores = noisy(30)
    found = AnomalyDetection(scores, ["bad" if label else None for label in labels])
    assert not {"pixel_auroc", "aupro@30", "regions"} & found.metrics().keys()
    assert set(found.intervals(20)) == {"image_auroc", "best_f1"}
    assert set(found.per_kind()[0]["intervals"]) == {"image_auroc"}
