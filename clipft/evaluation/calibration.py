"""Probabilities that mean something: a temperature, how far they are from the share that is right, and a threshold.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599) divides logits by one number, so no decision changes. It is
fitted after training, on rows that were held out of it: all of them give the number that is saved, and what is reported
of it is measured in two folds, each half with the temperature that fits the other.

The expected calibration error (ECE) is the mean distance between confidence, the largest probability, and accuracy in
bins of equally many rows: of bins of equal width one has most of them. It is biased upwards, since no distance is
negative: ``by_chance`` is what probabilities that are right would show on as many rows. Its interval is ``2 ece`` less
the bootstrap's percentiles, in which that bias cancels (Kumar et al. 2019, arXiv:1909.10155), widened to ``ece`` itself
and, where chance alone explains it (Bröcker & Smith 2007: in more than 2.5 % of draws), to 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincinv, logsumexp

from clipft.evaluation.metrics import Blockwise, Classification
from clipft.evaluation.resampling import LEVEL, RESAMPLES, Array, draws
from clipft.inference.classifier import Calibration

__all__ = ["Calibrated", "Reliability", "Temperature", "Threshold", "calibrate", "fit_temperature", "precision_at"]

LEAST_ROWS = 20  # to fit a temperature on; of the two folds half of that
LEAST_ANSWERS = 10  # above a threshold
BOUND = 100.0  # temperatures from 1 / 100 to 100
BINS, ROWS_A_BIN = 15, 20
_TILE = 1 << 22  # logits at a time
_ROOM = 1e-4  # of a threshold below the least probability that it was chosen to let through


# ---- the temperature ----


@dataclass(frozen=True)
class Temperature:
    """``value``, and why it is not simply the minimum, where it is not."""

    value: float
    note: str = ""


class _Rows:
    """Labels and logits, a block at a time in float64."""

    def __init__(self, labels: Array, logits: Array | Blockwise, classes: int) -> None:
        self.labels, self._logits = labels, logits
        self._size = max(1, _TILE // classes)

    def _blocks(self) -> Iterator[tuple[slice, Array]]:
        for start in range(0, len(self.labels), self._size):
            block = slice(start, start + self._size)
            logits = np.asarray(self._logits[block], np.float64)
            if not np.isfinite(logits).all():
                raise ValueError("logits: expected finite numbers, got NaN or Inf; has the training diverged?")
            yield block, logits - logits.max(axis=1, keepdims=True)

    def right(self) -> Array:
        """[N] whether the best class is the right one."""
        return np.concatenate([logits.argmax(1) == self.labels[block] for block, logits in self._blocks()])

    def slopes(self, inverse: float) -> Array:
        """[N]: how each row's negative log-likelihood grows with the inverse temperature: the mean logit under the
        softmax, less that of the right class. Each grows with ``inverse``: the likelihood has one maximum.
        """
        parts = []
        for block, logits in self._blocks():
            powers = np.exp(inverse * logits)
            means = (powers * logits).sum(1) / powers.sum(1)
            parts.append(means - logits[np.arange(len(logits)), self.labels[block]])
        return np.concatenate(parts)

    def probabilities(self, temperature: float) -> tuple[Array, Array]:
        """[N] confidence, and [N] negative log-likelihood of the right class."""
        confidence, loss = [], []
        for block, logits in self._blocks():
            scaled = logits / temperature
            total = logsumexp(scaled, axis=1)
            confidence.append(np.exp(-total))
            loss.append(total - scaled[np.arange(len(scaled)), self.labels[block]])
        return np.concatenate(confidence), np.concatenate(loss)


def fit_temperature(labels: Array, logits: Array | Blockwise, classes: int, *, least: int = LEAST_ROWS) -> Temperature:
    """The temperature under which rows are the likeliest.

    Args:
        labels: [N] integers.
        logits: [N, C], an array or by blocks.
        classes: C.
        least: rows below which none is fitted.

    Returns:
        In [1 / 100, 100], and 1, with a note, where the rows do not determine it: too few of them, one class alone, or
        no mistake, so that ever smaller ones would be likelier.

    Raises:
        ValueError: NaN or Inf among the logits.
    """
    rows = _Rows(labels, logits, classes)
    return _fitted(rows, np.ones(len(labels), dtype=bool), rows.right(), least)


def _fitted(rows: _Rows, chosen: Array, right: Array, least: int) -> Temperature:
    """On the ``chosen`` [N] of the rows."""
    count = int(chosen.sum())
    if count < least:
        return Temperature(1.0, f"left at 1: {count} rows are too few to fit it on, {least} are the least")
    if len(np.unique(rows.labels[chosen])) < 2:
        return Temperature(1.0, "left at 1: all rows are of one class")
    if right[chosen].all():
        return Temperature(1.0, f"left at 1: all {count} rows are right, and the likelihood has no maximum")

    def slope(log_inverse: float) -> float:
        return float(rows.slopes(float(np.exp(log_inverse)))[chosen].mean())

    low, high = -np.log(BOUND), np.log(BOUND)
    if slope(low) >= 0:
        return Temperature(BOUND, "at its bound: the classifier is no better than chance on these rows")
    if slope(high) <= 0:
        return Temperature(1 / BOUND, "at its bound: the few mistakes are all by hair's breadths")
    return Temperature(float(np.exp(-brentq(slope, low, high, xtol=1e-7))))


def folds_of(labels: Array, seed: int) -> Array:
    """[N] 0 or 1: two halves, of each class too, up to a row."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = np.arange(len(labels)) % 2
    return folds


# ---- how far probabilities are from what they say ----


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy of some rows.

    Attributes:
        ece: the expected calibration error, in [0, 1]; ``interval`` [low, high], 95 %; ``by_chance``: what is expected
            of it where every probability is right.
        nll: mean negative log-likelihood of the right class.
        bins: ``rows``, mean ``confidence``, ``accuracy``, and its 95 % ``interval`` (Clopper & Pearson), ascending.
    """

    ece: float
    interval: list[float]
    by_chance: float
    nll: float
    bins: list[dict[str, Any]]

    @staticmethod
    def of(
        confidence: Array, right: Array, labels: Array, loss: Array, resamples: int = RESAMPLES, seed: int = 0
    ) -> Reliability:
        """From [N] each: largest probabilities, whether they are right, classes (draws are within one), losses."""
        count = max(1, min(BINS, len(confidence) // ROWS_A_BIN))
        bins = np.empty(len(confidence), dtype=np.int64)
        bins[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * count // len(confidence)
        over = confidence - right

        def error(weighted: Array) -> float:
            return float(np.abs(np.bincount(bins, weighted, minlength=count)).sum() / len(confidence))

        ece = error(over)
        drawn = np.array([error(counts * over) for counts in draws(len(labels), labels, resamples, seed)])
        rng = np.random.default_rng(seed)
        null = np.array([error(confidence - (rng.random(len(confidence)) < confidence)) for _ in range(resamples)])
        tail = (1 - LEVEL) / 2
        low, high = 2 * ece - np.quantile(drawn, (1 - tail, tail))
        explained = ece <= np.quantile(null, 1 - tail)
        interval = [0.0 if explained else max(0.0, min(low, ece)), float(max(high, ece))]
        rows, hits = np.bincount(bins), np.bincount(bins, right)
        means = np.bincount(bins, confidence) / rows
        table = [
            {"rows": int(n), "confidence": float(mean), "accuracy": float(k / n), "interval": share_interval(k, n)}
            for n, k, mean in zip(rows, hits, means, strict=True)
        ]
        return Reliability(ece, [float(edge) for edge in interval], float(null.mean()), float(loss.mean()), table)


def share_interval(hits: float, rows: float) -> list[float]:
    """[low, high], 95 %, of a share of which ``hits`` of ``rows`` were seen (Clopper & Pearson 1934)."""
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(hits, rows - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, rows - hits, 1 - tail)) if hits < rows else 1.0
    return [low, high]


# ---- the threshold ----


@dataclass(frozen=True)
class Threshold:
    """A probability below which a classifier gives no answer.

    Attributes:
        wanted: the precision asked for, the share of the answers, of whatever class, that are right; None if a saved
            threshold does not say.
        value: the threshold; None where none gives that precision.
        precision, interval, coverage, answers: on these rows the share of the answers that are right, with its 95 %
            interval (Clopper & Pearson), the share of the rows that get one, and how many. Where there is no threshold:
            of the rows with the highest precision.
        two_fold: ``precision`` (None without answers) and ``coverage`` of thresholds chosen on the other half.
    """

    wanted: float | None
    value: float | None
    precision: float | None
    interval: list[float]
    coverage: float
    answers: int
    two_fold: dict[str, float | None] | None = None

    @property
    def note(self) -> str:
        """Empty if it was found."""
        if self.value is not None:
            return ""
        most = "" if self.precision is None else f": the most is {self.precision:.3f}, of {self.answers}"
        return f"no threshold with {LEAST_ANSWERS} answers or more gives precision {self.wanted:g} on these rows{most}"

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        values = {"threshold" if name == "value" else name: value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if name != "two_fold" or value is not None}


def precision_at(confidence: Array, right: Array, wanted: float) -> Threshold:
    """The lowest threshold on the largest probability above which at least the share ``wanted`` is right, of ten rows
    or more.

    Args:
        confidence: [N].
        right: [N] whether the best class is the right one.
        wanted: in (0, 1].
    """
    if not 0 < wanted <= 1:
        raise ValueError(f"precision_at: expected a share above 0 and at most 1, got {wanted!r}")
    order = np.argsort(-confidence, kind="stable")
    ranked, hits = confidence[order], np.cumsum(right[order])
    answers = np.arange(1, len(ranked) + 1)
    ends = np.append(ranked[1:] < ranked[:-1], True) & (answers >= LEAST_ANSWERS)  # rows that tie stay together
    shares = np.where(ends, hits / answers, -1.0)
    enough = np.flatnonzero(shares >= wanted)
    if not ends.any():
        return Threshold(wanted, None, None, [0.0, 1.0], 0.0, 0)
    place = enough[-1] if len(enough) else shares.argmax()
    value = _just_below(ranked, int(place)) if len(enough) else None
    return _at(wanted, value, int(hits[place]), int(answers[place]), len(ranked))


def _just_below(ranked: Array, place: int) -> float:
    """Of descending probabilities: under that of a place, over the next; another batch moves them by some 1e-5."""
    between = (ranked[place] + ranked[place + 1]) / 2 if place + 1 < len(ranked) else 0.0
    return float(max(between, ranked[place] - _ROOM))


def _at(wanted: float | None, value: float | None, hits: int, answers: int, rows: int) -> Threshold:
    precision = hits / answers if answers else None
    return Threshold(wanted, value, precision, share_interval(hits, answers), answers / rows, answers)


def _applied(confidence: Array, right: Array, wanted: float | None, value: float) -> Threshold:
    above = confidence >= value
    return _at(wanted, value, int(right[above].sum()), int(above.sum()), len(confidence))


# ---- all of it ----


@dataclass(frozen=True)
class Calibrated:
    """A classifier's probabilities on rows that it was not trained on.

    Attributes:
        calibration: what a model saves of it.
        rows: how many there were.
        saved: whether the calibration is the model's own. Else it was fitted on these rows.
        before: with the logits as they are.
        after: with the model's own temperature on all rows, or with one that fits the other half of them.
        threshold: where one was asked for, or saved.
        notes: why a number is not simply what it says.
    """

    calibration: Calibration
    rows: int
    saved: bool
    before: Reliability
    after: Reliability
    threshold: Threshold | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        threshold = {} if self.threshold is None else {"threshold": self.threshold.to_json()}
        return {
            "temperature": self.calibration.temperature,
            "saved": self.saved,
            "rows": self.rows,
            "before": asdict(self.before),
            "after": asdict(self.after),
            **threshold,
            "notes": self.notes,
        }


def calibrate(
    found: Classification,
    *,
    saved: Calibration | None = None,
    precision: float | None = None,
    classes: tuple[str, ...] = (),
    templates: tuple[str, ...] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Calibrated:
    """Fit a classifier's temperature, or look at the one that it has.

    Args:
        found: rows with their logits for scores.
        saved: the model's own calibration, if it has one.
        precision: choose the threshold that gives it.
        classes, templates: that a new calibration holds for alone.
        resamples, seed: of the intervals; the seed also of the two halves.
    """
    rows = _Rows(found.labels, found.scores, len(found.class_names))
    judge = _Judge(rows, rows.right(), resamples, seed)
    if saved is not None:
        return judge.of_saved(saved, precision)
    return judge.of_fitted(precision, Calibration(classes=classes, templates=templates))


@dataclass(frozen=True)
class _Judge:
    rows: _Rows
    right: Array
    resamples: int
    seed: int

    def of_saved(self, saved: Calibration, precision: float | None) -> Calibrated:
        """All rows under the model's own temperature, and its threshold or a new one."""
        confidence, loss = self.rows.probabilities(saved.temperature)
        threshold, notes = None, list[str]()
        if precision is not None:
            threshold = precision_at(confidence, self.right, precision)
            notes = [threshold.note] if threshold.note else []
        elif saved.threshold is not None:
            threshold = _applied(confidence, self.right, saved.precision, saved.threshold)
        after = self._reliability(confidence, loss)
        return Calibrated(saved, len(self.right), True, self._as_they_are(), after, threshold, notes)

    def of_fitted(self, precision: float | None, new: Calibration) -> Calibrated:
        """Temperature and threshold of all rows, and what those of one half do on the other."""
        whole = _fitted(self.rows, np.ones(len(self.right), dtype=bool), self.right, LEAST_ROWS)
        folds, halves = folds_of(self.rows.labels, self.seed), [whole, whole]
        if not whole.note:
            halves = [_fitted(self.rows, folds == fold, self.right, LEAST_ROWS // 2) for fold in (0, 1)]
        by_half = [self.rows.probabilities(half.value) for half in halves]
        confidence, loss = (np.where(folds == 0, of_1, of_0) for of_0, of_1 in zip(*by_half, strict=True))
        after = self._reliability(confidence, loss)
        notes = [f"temperature {whole.note}"] if whole.note else []
        notes += [f"fitted on one half: {half.note}" for half in halves if half.note and not whole.note]
        threshold = None
        if precision is not None:
            threshold = precision_at(self.rows.probabilities(whole.value)[0], self.right, precision)
            notes += [threshold.note] if threshold.note else []
            threshold = replace(threshold, two_fold=self._two_fold(precision, folds, [own for own, _ in by_half]))
        kept = None if threshold is None else threshold.value
        chosen = None if kept is None else precision
        saved = replace(new, temperature=whole.value, threshold=kept, precision=chosen)
        return Calibrated(saved, len(self.right), False, self._as_they_are(), after, threshold, notes)

    def _two_fold(self, wanted: float, folds: Array, by_half: Sequence[Array]) -> dict[str, float | None]:
        """Thresholds chosen on one half, under its temperature, and applied to the other."""
        answered = np.zeros(len(folds), dtype=bool)
        for fold, confidence in enumerate(by_half):
            own = folds == fold
            value = precision_at(confidence[own], self.right[own], wanted).value
            if value is not None:
                answered |= ~own & (confidence >= value)
        hits, answers = int(self.right[answered].sum()), int(answered.sum())
        return {"precision": hits / answers if answers else None, "coverage": answers / len(folds)}

    def _as_they_are(self) -> Reliability:
        return self._reliability(*self.rows.probabilities(1.0))

    def _reliability(self, confidence: Array, loss: Array) -> Reliability:
        return Reliability.of(confidence, self.right, self.rows.labels, loss, self.resamples, self.seed)
