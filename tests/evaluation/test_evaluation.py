"""clipft.evaluate_retrieval and evaluate_zero_shot, against straightforward computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics
import torch
from tiny_clip import captioned, labelled, tiny_clip

import clipft


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def features(clip, images, texts):
    model, processor = clip
    with torch.no_grad():
        image = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
        text = [model.get_text_features(**processor(text=[t], return_tensors="pt")).pooler_output[0] for t in texts]
    return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(torch.stack(text), dim=-1)


def recalls(similarity, right, k):
    """Share of the rows that have one of the right columns among the k largest."""
    best = similarity.argsort(dim=1, descending=True)[:, :k].tolist()
    return np.mean([bool(set(found) & own) for found, own in zip(best, right, strict=True)])


@pytest.mark.parametrize("captions", [1, 3])
def test_retrieval_equals_the_full_matrix(clip, captions: int) -> None:
    dataset = captioned(40, captions)
    own = [[c] if isinstance(c, str) else c for c in dataset["caption"]]
    texts = [text for texts in own for text in texts]
    image, text = features(clip, dataset["image"][:], texts)
    texts_of = [set(range(captions * i, captions * (i + 1))) for i in range(40)]
    images_of = [{i // captions} for i in range(len(texts))]
    result = clipft.evaluate_retrieval(*clip, dataset, batch_size=16)
    for k in (1, 5, 10):
        assert result[f"image_to_text_R@{k}"] == pytest.approx(recalls(image @ text.t(), texts_of, k))
        assert result[f"text_to_image_R@{k}"] == pytest.approx(recalls(text @ image.t(), images_of, k))
    assert len(result) == 11  # with median rank and mAP of both ways, and the intervals


def test_captions_of_equal_tokens_are_one_text(clip) -> None:
    rows = captioned(6)
    same = rows.map(
        lambda row, i: {"caption": ["A  dog", "a cat"][i % 2] if i < 4 else row["caption"]}, with_indices=True
    )
    other = same.map(lambda row, i: {"caption": "a dog " if i == 2 else row["caption"]}, with_indices=True)
    assert clipft.evaluate_retrieval(*clip, other, resamples=0) == clipft.evaluate_retrieval(*clip, same, resamples=0)


def test_labels_make_captions_for_retrieval(clip) -> None:
    result = clipft.evaluate_retrieval(*clip, labelled(16), templates=["a {} thing"])
    one = clipft.evaluate_zero_shot(*clip, labelled(16), ["red", "green", "blue", "yellow"], ["a {} thing"])
    assert result["image_to_text_R@1"] == pytest.approx(one["accuracy"])


def test_zero_shot_equals_scikit_learn(clip) -> None:
    names, templates = ["red", "green", "blue", "yellow"], ["a photo of a {}.", "{}"]
    dataset = labelled(30)
    captions = [template.format(name) for name in names for template in templates]
    image, text = features(clip, dataset["image"][:], captions)
    classes = torch.nn.functional.normalize(text.view(4, 2, -1).mean(1), dim=-1)
    predicted = (image @ classes.t()).argmax(1).numpy()
    labels = np.array(dataset["label"])
    result = clipft.evaluate_zero_shot(*clip, dataset, names, templates, batch_size=8)
    assert result["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert result["balanced_accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, predicted))
    assert result["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    report = sklearn.metrics.classification_report(
        labels, predicted, target_names=names, output_dict=True, zero_division=0
    )
    for row in result["per_class"]:
        expected = report[row["class"]]
        assert row["f1"] == pytest.approx(expected["f1-score"])
        assert (row["precision"], row["recall"]) == pytest.approx((expected["precision"], expected["recall"]))
        assert row["support"] == expected["support"]
    assert result["confusion_matrix"] == sklearn.metrics.confusion_matrix(labels, predicted).tolist()
    assert "auc" not in result
    counts = {"classes", "classes_with_pictures"}
    assert result["intervals"].keys() == result.keys() - {"confusion_matrix", "confusions", "intervals"} - counts
    assert [result[name] for name in sorted(counts)] == [4, 4]


@pytest.mark.parametrize("evaluate", [clipft.evaluate_linear_probe, clipft.evaluate_knn])
def test_probes_tell_colours_apart(clip, evaluate) -> None:
    """A random image tower tells colours of pictures; chance is 0.25."""
    options = {"k": 5} if evaluate is clipft.evaluate_knn else {}
    train, test = labelled(80).select(range(64)), labelled(80).select(range(64, 80))
    result = evaluate(*clip, train, test, batch_size=16, **options)
    assert result["balanced_accuracy"] >= 0.6
    assert result["intervals"]["balanced_accuracy"][0] <= result["balanced_accuracy"]
    assert np.sum(result["confusion_matrix"]) == 16
    assert evaluate(*clip, train, test, batch_size=16, **options) == result  # seeded


def test_probes_equal_scikit_learn(clip) -> None:
    train, test = labelled(40), labelled(60).select(range(40, 60))
    image, _ = features(clip, train["image"][:] + test["image"][:], ["a"])
    x, y, z = image[:40].numpy(), np.array(train["label"]), np.array(test["label"])
    probe = sklearn.linear_model.LogisticRegression(C=10.0, max_iter=2000).fit(x, y)
    result = clipft.evaluate_linear_probe(*clip, train, test, C=10.0, resamples=0)
    assert result["accuracy"] == pytest.approx(probe.score(image[40:].numpy(), z))
    assert result["C"] == 10.0
    assert "intervals" not in result
    similarity = image[40:] @ image[:40].t()
    votes = torch.zeros(20, 4)
    for row, (values, places) in enumerate(zip(*similarity.topk(7, dim=1), strict=True)):
        votes[row].index_add_(0, torch.from_numpy(y)[places], (values / 0.07).exp())
    expected = np.mean(votes.argmax(1).numpy() == z)
    assert clipft.evaluate_knn(*clip, train, test, k=7)["accuracy"] == pytest.approx(expected)


def test_a_model_that_gives_nan_is_named_by_every_task() -> None:
    model, processor = tiny_clip()
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = torch.nan
    rows = labelled(8)
    for task in (
        lambda: clipft.evaluate_knn(model, processor, rows, rows, k=1),
        lambda: clipft.evaluate_linear_probe(model, processor, rows, rows),
        lambda: clipft.evaluate_zero_shot(model, processor, rows, rows.features["label"].names),
        lambda: clipft.evaluate_retrieval(model, processor, captioned(8)),
    ):
        with pytest.raises(ValueError, match="row 0: the model gives NaN or Inf for it and 7 more of 8"):
            task()


def test_probes_check_their_arguments(clip) -> None:
    with pytest.raises(ValueError, match="k: expected 1 to 8"):
        clipft.evaluate_knn(*clip, labelled(8), labelled(8))
    with pytest.raises(ValueError, match="names among those of training"):
        clipft.evaluate_linear_probe(*clip, labelled(8), captioned(8))
    with pytest.raises(ValueError, match="two classes or more"):
        clipft.evaluate_knn(*clip, labelled(1), labelled(8), k=1)


def test_zero_shot_checks_its_arguments(clip) -> None:
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        clipft.evaluate_zero_shot(*clip, labelled(8), ["red", "green"])
    with pytest.raises(ValueError, match="at least two names"):
        clipft.evaluate_zero_shot(*clip, labelled(8), "red")
    with pytest.raises(ValueError, match=r"exactly one \{\}"):
        clipft.evaluate_zero_shot(*clip, labelled(8), ["a", "b", "c", "d"], ["a photo"])


def test_modes_and_gradients_come_back(clip) -> None:
    model, processor = clip
    model.train()
    model.vision_model.eval()
    before = {name: module.training for name, module in model.named_modules()}
    clipft.evaluate_retrieval(model, processor, captioned(4))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()
    model.eval()


def test_fused_and_plain_models_score_alike() -> None:
    model, processor = tiny_clip()
    plain = clipft.evaluate_retrieval(model, processor, captioned(20))
    assert clipft.evaluate_retrieval(clipft.fuse(model), processor, captioned(20)) == plain


def test_real_pictures(clip, data_folder: Path) -> None:
    dataset = clipft.load_pairs(data_folder / "chest_xray").shuffle(seed=0).select(range(24))
    seen: list[int] = []

    def progress(batches):
        for batch in batches:
            seen.append(len(batch["pixel_values"]))
            yield batch

    result = clipft.evaluate_zero_shot(
        *clip, dataset, dataset.features["label"].names, batch_size=10, num_workers=2, progress=progress
    )
    assert seen == [10, 10, 4]
    assert 0.0 <= result["balanced_accuracy"] <= 1.0
    assert sum(row["support"] for row in result["per_class"]) == 24
