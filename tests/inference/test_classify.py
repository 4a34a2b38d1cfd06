"""Heads and zero-shot classes of a model as classifiers: the numbers of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import labelled, tiny_clip

import clipft
from clipft.data.rows import class_names_of, class_targets
from clipft.evaluation.metrics import Classification
from clipft.inference.classify import classifiers_of, zero_shot_classifier
from clipft.inference.encode import embed_texts
from clipft.models.formats import CALIBRATION_KEY
from clipft.models.heads import heads_of


@pytest.fixture(scope="module")
def headed() -> tuple[Any, Any]:
    model, processor = tiny_clip()
    clipft.add_head(model, processor, ["red", "green", "blue"], name="colour")
    return model, processor


def test_scores_are_those_of_plain_torch_to_the_bit() -> None:
    model, processor = tiny_clip()
    data = labelled(24)
    names = class_names_of(data)
    assert names is not None
    images = clipft.embed(model, processor, images=data)
    texts = embed_texts(model, processor, [f"a photo of a {name}." for name in names], 64)
    plain = Classification(class_targets(data, "label", names), (images @ texts.t()).numpy(), names)
    found = clipft.evaluate_zero_shot(model, processor, data, names)
    assert {name: found[name] for name in plain.metrics()} == plain.metrics()
    assert found["intervals"] == plain.intervals()

    clipft.add_head(model, processor, names)
    with torch.no_grad():
        logits = heads_of(model)["label"](images)
    headed = Classification(class_targets(data, "label", names), logits.numpy(), names)
    scores = clipft.evaluate_heads(model, processor, data)["label"]
    assert {name: scores[name] for name in headed.metrics()} == headed.metrics()


def test_a_head_starts_as_the_zero_shot_classifier(headed: tuple[Any, Any]) -> None:
    model, processor = headed
    head = classifiers_of(model)["colour"]
    start = zero_shot_classifier(model, processor, head.names, ["a photo, colour: {}."])
    torch.testing.assert_close(
        torch.from_numpy(head.logits(start.weights)), torch.from_numpy(start.logits(start.weights))
    )


def test_probabilities_have_the_head_s_temperature(headed: tuple[Any, Any]) -> None:
    model, processor = headed
    pictures = [row["image"] for row in labelled(5)]
    with torch.no_grad():
        logits = heads_of(model)["colour"](clipft.embed(model, processor, images=pictures))
    before = clipft.classify(model, processor, pictures, head="colour")
    torch.testing.assert_close(before, logits.softmax(1))
    try:
        setattr(model.config, CALIBRATION_KEY, {"colour": {"temperature": 3.0}})
        after = clipft.classify(model, processor, pictures, head="colour")
    finally:
        delattr(model.config, CALIBRATION_KEY)
    torch.testing.assert_close(after, (logits / 3).softmax(1))
    with pytest.raises(ValueError, match=r"head: expected one of the model's heads, \['colour'\], got 'label'"):
        clipft.classify(model, processor, pictures)
