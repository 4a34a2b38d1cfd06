"""One classifier for heads and zero-shot classes, and what a calibration may hold."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from clipft.inference.classifier import Calibration, Classifier, calibrations_of


def _embeds(rows: int, dim: int = 8) -> Any:
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows)), dim=1)


def test_probabilities_are_the_softmax_of_scaled_cosines_over_the_temperature() -> None:
    images, classes = _embeds(5), _embeds(3)
    found = Classifier(list("abc"), classes.numpy(), 20.0, Calibration(temperature=4.0))
    torch.testing.assert_close(torch.from_numpy(found.logits(images.numpy())), 20 * images @ classes.t())
    wanted = (5 * images @ classes.t()).softmax(1)
    torch.testing.assert_close(torch.from_numpy(found.probabilities(images.numpy())), wanted)
    assert found.logits(images.numpy()).dtype == found.probabilities(images.numpy()).dtype == np.float32


def test_large_logits_do_not_overflow() -> None:
    weights = np.array([[1e4, 0], [0, 1e4]], np.float32)
    np.testing.assert_array_equal(Classifier("ab", weights).probabilities(np.eye(2, dtype=np.float32)), np.eye(2))


def test_a_calibration_holds_for_the_classes_it_was_fitted_on() -> None:
    fitted = Calibration(temperature=2.0, threshold=0.7, classes=("b", "a"))
    weights = np.eye(2, dtype=np.float32)
    assert Classifier(["a", "b"], weights).calibrated(fitted).calibration == fitted
    assert Classifier(["a", "c"], weights, calibration=fitted).calibration == Calibration()
    assert Classifier(["a", "c"], weights, calibration=Calibration(2.0)).calibration.temperature == 2
    told = Calibration(2.0, classes=("a", "b"), templates=("a {}", "the {}"))
    for templates, holds in ((("the {}", "a {}"), True), (("a {}",), False), ((), False)):
        assert (Classifier("ab", weights, templates=templates).calibrated(told).calibration == told) is holds


def test_a_calibration_comes_back_from_json() -> None:
    for one in (Calibration(), Calibration(1.5, 0.25, 0.95, ("x", "y"), ("a {}",))):
        assert Calibration.from_json(one.to_json(), "here") == one
    assert calibrations_of(None, "here") == {}
    assert calibrations_of({"label": {"temperature": 2}}, "here")["label"].temperature == 2


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ([], "config.json: expected an object with a calibration a head"),
        ({"label": 2}, "config.json: label: expected a calibration"),
        (
            {"label": {"temperature": 0}},
            "config.json: label: temperature: expected a number from 1e-6 to 1e6, got 0",
        ),
        ({"label": {"temperature": math.nan}}, "temperature: expected a number from 1e-6 to 1e6, got nan"),
        ({"label": {"temperature": math.inf}}, "temperature: expected a number from 1e-6 to 1e6, got inf"),
        ({"label": {"temperature": True}}, "temperature: expected a number from 1e-6 to 1e6, got True"),
        ({"label": {"threshold": 1.5}}, "threshold: expected a number from 0 to 1, got 1.5"),
        ({"label": {"precision": "high"}}, "precision: expected a number from 0 to 1, got 'high'"),
        ({"label": {"classes": "ab"}}, "expected classes to be a list of texts, found 'ab'"),
    ],
)
def test_an_edited_calibration_is_named(stored: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        calibrations_of(stored, "config.json")


def test_names_weights_and_embeddings_fit_together() -> None:
    with pytest.raises(ValueError, match=r"a vector for each of 3 classes, got \[2, 4\]"):
        Classifier("abc", np.ones((2, 4), np.float32))
    with pytest.raises(ValueError, match="each class once, got a more than once"):
        Classifier("aba", np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"expected \[N, 4\], as the class vectors are, got \[1, 5\]"):
        Classifier("ab", np.ones((2, 4), np.float32)).logits(np.ones((1, 5), np.float32))


def test_it_needs_no_torch() -> None:
    code = "import sys, clipft.inference.classifier; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
