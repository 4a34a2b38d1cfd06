"""Temperatures, calibration errors and thresholds against known truths, scikit-learn and plain computations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import binomtest

from clipft.evaluation import calibration
from clipft.evaluation.calibration import Reliability, calibrate, fit_temperature, folds_of, precision_at
from clipft.evaluation.metrics import Blockwise, Classification
from clipft.inference.classifier import Calibration

CLASSES = 4


def overconfident(count: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the softmax of logits / temperature, and the logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, CLASSES)) * 2 * temperature
    probabilities = softmax(logits / temperature, axis=1)
    labels = (rng.random(count)[:, None] > probabilities.cumsum(1)).sum(1)
    return labels, logits


def found(labels: Any, logits: Any) -> Classification:
    return Classification(np.asarray(labels), logits, [str(name) for name in range(logits.shape[1])])


# ---- temperatures ----


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0, 30.0])
def test_a_known_temperature_comes_back(temperature: float) -> None:
    """Within four standard errors, by the information that rows have on average: the variance of the logits."""
    labels, logits = overconfident(4000, temperature)
    found = fit_temperature(labels, logits, CLASSES)
    scaled = logits / temperature
    probabilities = softmax(scaled, axis=1)
    variance = ((probabilities * scaled**2).sum(1) - (probabilities * scaled).sum(1) ** 2).mean()
    assert abs(np.log(found.value / temperature)) < 4 / np.sqrt(len(labels) * variance)
    assert not found.note


def test_scikit_learn_finds_the_same() -> None:
    from sklearn.base import BaseEstimator, ClassifierMixin

    sklearn = pytest.importorskip("sklearn.calibration")
    if not hasattr(sklearn, "_TemperatureScaling"):
        pytest.skip("needs scikit-learn 1.8")
    from sklearn.frozen import FrozenEstimator

    class Given(ClassifierMixin, BaseEstimator):
        classes_ = np.arange(CLASSES)

        def __sklearn_is_fitted__(self) -> bool:
            return True

        def fit(self, *rows: Any) -> Any:
            return self

        def predict(self, rows: Any) -> Any:
            return rows.argmax(1)

        def decision_function(self, rows: Any) -> Any:
            return rows

    labels, logits = overconfident(500, 2.5)
    peer = sklearn.CalibratedClassifierCV(FrozenEstimator(Given()), method="temperature").fit(logits, labels)
    expected = 1 / peer.calibrated_classifiers_[0].calibrators[0].beta_
    assert fit_temperature(labels, logits, CLASSES).value == pytest.approx(expected, rel=1e-4)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, logits = overconfident(300, 2.0)
    whole = fit_temperature(labels, logits, CLASSES).value
    monkeypatch.setattr(calibration, "_TILE", 7 * CLASSES)
    seen: list[int] = []
    blocks = Blockwise(logits, lambda part: seen.append(len(part)) or part)
    assert fit_temperature(labels, blocks, CLASSES).value == pytest.approx(whole, rel=1e-6)
    assert max(seen) == 7


def _by_a_hair() -> np.ndarray:
    """39 rows right by a tenth, one wrong by next to nothing."""
    logits = np.eye(2)[[0, 1] * 20] / 10
    logits[39] = 0, 1e-9
    return logits


@pytest.mark.parametrize(
    ("labels", "logits", "value", "note"),
    [
        ([0, 1] * 9, np.eye(2)[[0, 1] * 9], 1.0, "18 rows are too few"),
        ([1] * 40, np.eye(2)[[0, 1] * 20], 1.0, "all rows are of one class"),
        ([0, 1] * 20, np.eye(2)[[0, 1] * 20], 1.0, "all 40 rows are right"),
        ([0, 1] * 20, np.eye(2)[[1, 0] * 20], 100.0, "no better than chance"),
        ([0, 1] * 19 + [0, 0], _by_a_hair(), 0.01, "hair's"),
    ],
)
def test_what_rows_do_not_determine_is_said(labels: list[int], logits: Any, value: float, note: str) -> None:
    temperature = fit_temperature(np.array(labels), logits, 2)
    assert temperature.value == value and note in temperature.note


def test_logits_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="logits: expected finite"):
        fit_temperature(np.array([0, 1] * 20), np.full((40, 2), np.nan), 2)


def test_the_halves_share_no_row_and_have_each_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [1, 10, 7, 31])
    np.random.default_rng(0).shuffle(labels)
    folds = folds_of(labels, 0)
    assert set(folds) == {0, 1} and abs((folds == 0).sum() - (folds == 1).sum()) <= 1
    for label in range(4):
        assert abs((folds[labels == label] == 0).sum() - (folds[labels == label] == 1).sum()) <= 1
    assert (folds_of(labels, 0) == folds).all() and (folds_of(labels, 1) != folds).any()


def test_the_reported_error_is_of_rows_that_were_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, logits = overconfident(400, 3.0)
    folds = folds_of(labels, 0)
    confidence = np.empty(400)
    for fold in (0, 1):
        value = fit_temperature(labels[folds != fold], logits[folds != fold], CLASSES).value
        confidence[folds == fold] = softmax(logits[folds == fold] / value, axis=1).max(1)
    got = calibrate(found(labels, logits))
    losses = np.zeros(400)
    expected = Reliability.of(confidence, logits.argmax(1) == labels, labels, losses)
    assert got.after.ece == pytest.approx(expected.ece, abs=1e-6)
    assert got.calibration.temperature == pytest.approx(fit_temperature(labels, logits, CLASSES).value)


# ---- calibration errors ----


def reliability(confidence: np.ndarray, right: np.ndarray, **options: Any) -> Reliability:
    return Reliability.of(confidence, right, np.zeros(len(right), dtype=int), np.zeros(len(right)), **options)


def test_the_error_equals_a_plain_computation() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(305)
    right = rng.random(305) < confidence**2
    got = reliability(confidence, right, resamples=10)
    bins = np.array_split(np.argsort(confidence), 15)
    assert sorted(len(own) for own in bins) == sorted(row["rows"] for row in got.bins)
    width = 305 / 15
    edges = [int(np.ceil(number * width)) for number in range(16)]
    order = np.argsort(confidence)
    own = [order[start:end] for start, end in itertools.pairwise(edges)]
    gaps = [len(rows) * abs(confidence[rows].mean() - right[rows].mean()) for rows in own]
    assert got.ece == pytest.approx(sum(gaps) / 305)
    for row, rows in zip(got.bins, own, strict=True):
        assert (row["rows"], row["accuracy"]) == (len(rows), right[rows].mean())
        exact = binomtest(int(right[rows].sum()), len(rows)).proportion_ci(method="exact")
        assert row["interval"] == pytest.approx([exact.low, exact.high])


def test_right_probabilities_show_no_more_than_chance() -> None:
    """And the interval holds 0 in nineteen draws of twenty: binomial, four standard errors."""
    draws, count = 100, 300
    inside, errors, chances = 0, [], []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        confidence = 1 - 0.5 * rng.random(count)
        got = reliability(confidence, rng.random(count) < confidence, resamples=200, seed=seed)
        inside += got.interval[0] == 0
        errors.append(got.ece)
        chances.append(got.by_chance)
    assert inside >= draws * 0.975 - 4 * np.sqrt(draws * 0.975 * 0.025)
    assert np.mean(errors) == pytest.approx(np.mean(chances), abs=4 * np.std(errors) / np.sqrt(draws))


def test_an_interval_holds_the_true_error() -> None:
    """In more than 70 % of draws: it does in 88 %, the bootstrap's percentiles in 25 %, for the bias of both."""
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        confidence = 1 - 0.7 * rng.beta(1, 4, 200)
        share = np.clip(confidence - 0.05, 0, 1)
        low, high = reliability(confidence, rng.random(200) < share, resamples=100, seed=seed).interval
        inside += low <= (confidence - share).mean() <= high
    assert inside > 0.7 * 60


def test_wrong_probabilities_are_outside_of_chance() -> None:
    labels, logits = overconfident(1000, 3.0)
    got = calibrate(found(labels, logits))
    assert got.before.interval[0] > 2 * got.before.by_chance
    assert got.after.ece < 2 * got.after.by_chance and got.after.interval[0] == 0
    assert got.after.nll < got.before.nll
    assert got.before.interval[0] <= got.before.ece <= got.before.interval[1]


# ---- thresholds ----


def test_a_threshold_gives_its_precision() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    right = rng.random(500) < confidence
    got = precision_at(confidence, right, 0.8)
    assert got.value is not None
    above = confidence >= got.value
    assert right[above].mean() == got.precision >= 0.8
    assert (got.coverage, got.answers) == (above.mean(), above.sum())
    assert all(right[confidence >= lower].mean() < 0.8 for lower in confidence[confidence < got.value])
    exact = binomtest(int(right[above].sum()), int(above.sum())).proportion_ci(method="exact")
    assert got.interval == pytest.approx([exact.low, exact.high])
    assert (confidence.astype(np.float32).astype(float) >= got.value).sum() == above.sum()


def test_a_threshold_that_no_rows_give() -> None:
    confidence, right = np.linspace(0, 1, 50), np.arange(50) % 2 == 0
    got = precision_at(confidence, right, 0.9)
    assert got.value is None and "precision 0.9" in got.note and "the most is 0." in got.note
    few = precision_at(confidence[:5], right[:5], 0.1)
    assert few.value is None and few.precision is None
    tied = precision_at(np.full(40, 0.7), np.arange(40) < 30, 0.8)  # which share is right of tied rows has no order
    assert tied.value is None and tied.precision == 0.75
    every = precision_at(confidence, np.ones(50, dtype=bool), 1.0)
    assert every.coverage == 1.0 and every.value == 0.0
    for wrong in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="precision_at: expected a share"):
            precision_at(confidence, right, wrong)


def test_what_is_saved_and_what_is_told() -> None:
    labels, logits = overconfident(600, 3.0)
    got = calibrate(found(labels, logits), precision=0.9, classes=("a", "b", "c", "d"))
    assert got.threshold is not None and got.threshold.two_fold is not None
    saved = got.calibration
    assert (saved.threshold, saved.precision, saved.classes) == (got.threshold.value, 0.9, ("a", "b", "c", "d"))
    confidence = softmax(logits / saved.temperature, axis=1).max(1)
    above = confidence >= saved.threshold
    assert (logits.argmax(1) == labels)[above].mean() == got.threshold.precision >= 0.9
    assert abs(got.threshold.two_fold["precision"] - 0.9) < 0.1
    again = calibrate(found(labels, logits), saved=saved)
    assert again.saved and again.calibration == saved
    assert again.threshold is not None
    assert (again.threshold.precision, again.threshold.wanted) == (got.threshold.precision, 0.9)
    assert again.to_json()["threshold"].keys() == got.to_json()["threshold"].keys() - {"two_fold"}
    other = calibrate(found(labels, logits), saved=Calibration(1.0), precision=0.5)
    assert other.threshold is not None and other.threshold.wanted == 0.5
    assert other.before == other.after


def test_few_rows_are_left_as_they_are() -> None:
    labels, logits = overconfident(12, 3.0)
    got = calibrate(found(labels, logits), precision=0.99)
    assert got.calibration == Calibration(1.0)
    assert got.before == got.after and len(got.before.bins) == 1
    assert any("too few" in note for note in got.notes) and any("no threshold" in note for note in got.notes)
