"""Classification heads started from text: their losses, training with them, and that nothing is lost on the way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from ranks import run_ranks
from scripts import import_paths
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from tiny_clip import COLOURS, attributes_csv, labelled, tiny_clip
from tiny_trainer import StopAfter, arguments, losses, same, trainer_of
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

import clipft
from clipft.data.rows import MISSING
from clipft.models.heads import heads_of

NAMES = list(COLOURS)

# ---- the head itself ----


def shown(count: int = 24) -> Any:
    """Pictures with their colour as label."""
    return labelled(count)


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["a {}", "one {}.", "{}"]])
def test_a_new_head_is_the_zero_shot_classifier(templates: list[str]) -> None:
    model, processor = tiny_clip()
    before = clipft.evaluate_zero_shot(model, processor, shown(), NAMES, templates)
    assert clipft.add_head(model, processor, NAMES, templates=templates) is model
    found = clipft.evaluate_heads(model, processor, shown())
    assert found == {"label": before}
    images, texts = clipft.embed(model, processor, images=shown()), [t.format(n) for n in NAMES for t in templates]
    classes = clipft.embed(model, processor, texts=texts).view(4, len(templates), -1).mean(1)
    scores = images @ functional.normalize(classes, dim=-1).t()
    logits = heads_of(model)["label"](images)
    torch.testing.assert_close(logits, model.logit_scale.exp() * scores)
    torch.testing.assert_close(clipft.classify(model, processor, shown()), logits.softmax(1))


def test_a_head_is_saved_and_loaded_with_the_model(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    clipft.add_head(model, processor, NAMES)
    clipft.add_head(model, processor, ["big", "small"], name="size")
    with torch.no_grad():
        for head in model.heads:
            head.weight.normal_()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = clipft.load(tmp_path)
    assert type(again) is CLIPModel
    assert [(head.name, head.class_names) for head in again.heads] == [("label", NAMES), ("size", ["big", "small"])]
    for one, other in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    plain = CLIPModel.from_pretrained(tmp_path)
    assert torch.equal(plain.visual_projection.weight, model.visual_projection.weight)


def test_an_int8_model_keeps_its_head(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    clipft.add_head(model, processor, NAMES)
    small = clipft.quantize(model)
    small.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = clipft.load(tmp_path)
    assert torch.equal(again.heads[0].weight, model.heads[0].weight)
    expected = clipft.classify(model, processor, shown())
    torch.testing.assert_close(clipft.classify(again, processor, shown()), expected, atol=0.05, rtol=0.0)


def test_weights_that_are_missing_are_an_error(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    clipft.add_head(model, processor, NAMES)
    del model.heads
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"are missing: heads\.0\.weight"):
        clipft.load(tmp_path)


def test_head_arguments_are_checked() -> None:
    model, processor = tiny_clip()
    with pytest.raises(ValueError, match="class_names: expected at least two"):
        clipft.add_head(model, processor, ["one"])
    with pytest.raises(ValueError, match="class_names: expected each once"):
        clipft.add_head(model, processor, ["one", "two", "one"])
    with pytest.raises(ValueError, match="head: expected one of the model's heads, of which it has none"):
        clipft.classify(model, processor, shown())
    with pytest.raises(ValueError, match="dataset: expected a column of the model's heads, of which it has none"):
        clipft.evaluate_heads(model, processor, shown())
    clipft.add_head(model, processor, NAMES)
    with pytest.raises(ValueError, match="name: the model has a head 'label' already"):
        clipft.add_head(model, processor, NAMES)
    other = shown().rename_column("label", "kind").add_column("label", ["red", "pink"] * 12)
    with pytest.raises(ValueError, match=r"column 'label': expected classes among .* found \['pink'\]"):
        clipft.evaluate_heads(model, processor, other)


# ---- attributes in data ----


def test_attribute_columns_are_classes_with_gaps(tmp_path: Path) -> None:
    path = attributes_csv(tmp_path)
    data = clipft.load_pairs(path, attribute_columns=["color", "shape"])
    assert data.column_names == ["image", "caption", "color", "shape"]
    assert data.features["color"].names == sorted(NAMES)
    assert data["color"][:6] == [None, 1, 0, 3, 2, None]
    table = datasets.Dataset.from_csv(str(path), cache_dir=str(tmp_path / "cache")).remove_columns("image")
    table = table.add_column("image", [(tmp_path / f"{index}.png").read_bytes() for index in range(24)])
    table.to_parquet(tmp_path / "pairs.parquet")
    other = clipft.load_pairs(tmp_path / "pairs.parquet", attribute_columns=["color", "shape"])
    assert [other[name][:] for name in ("color", "shape")] == [data[name][:] for name in ("color", "shape")]


def test_attribute_columns_are_checked(tmp_path: Path) -> None:
    path = attributes_csv(tmp_path)
    for columns, message in (
        (["size"], r"expected columns of .*pairs.csv among \['color', 'shape'\], got \['size'\]"),
        (["label"], "expected a list of columns other than"),
        (["caption"], "expected a list of columns other than"),
    ):
        with pytest.raises(ValueError, match=f"attribute_columns: {message}"):
            clipft.load_pairs(path, attribute_columns=columns)
    rows = path.read_text().splitlines()
    one, none = tmp_path / "one.csv", tmp_path / "none.csv"
    one.write_text("\n".join([rows[0], *(row for row in rows if ",red," in row)]))  # as a small test set may be
    assert clipft.load_pairs(one, attribute_columns=["color"]).features["color"].names == ["red"]
    with pytest.raises(ValueError, match="attributes: 'color': expected two classes or more in the training set"):
        trainer_of(tmp_path, clipft.load_pairs(one, attribute_columns=["color"]), attributes={"color": 1.0})
    none.write_text("\n".join([rows[0], *(row for row in rows if ",," in row)]))
    with pytest.raises(ValueError, match=r"attribute_columns: 'color': expected values in this column of .*none.csv"):
        clipft.load_pairs(none, attribute_columns=["color"])
    with path.open("a") as file:
        file.write("1.png,a green thing,blue,\n")
    with pytest.raises(
        ValueError, match="row 24: expected color of an earlier row with this image, 'green', got 'blue'"
    ):
        clipft.load_pairs(path, attribute_columns=["color"])


def test_heads_of_attributes_count_the_rows_that_have_a_value(tmp_path: Path) -> None:
    data = clipft.load_pairs(attributes_csv(tmp_path), attribute_columns=["color", "shape"])
    model, processor = tiny_clip()
    for name in ("color", "shape"):
        clipft.add_head(model, processor, data.features[name].names, name=name)
    found = clipft.evaluate_heads(model, processor, data)
    known = [index for index, value in enumerate(data["color"]) if value is not None]
    truth, said = np.array(data["color"], dtype=object), clipft.classify(model, processor, data, head="color").argmax(1)
    assert found["color"]["accuracy"] == accuracy_score(list(truth[known]), said[known])
    assert found["color"]["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(list(truth[known]), said[known])
    )
    assert sum(row["support"] for row in found["color"]["per_class"]) == len(known) < 24
    assert sum(row["support"] for row in found["shape"]["per_class"]) == 24


# ---- training ----


def accuracy_of(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_accuracy"])


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "dice"])
def test_a_head_learns_and_the_text_tower_stays(tmp_path: Path, loss: str) -> None:
    options: dict[str, Any] = {"head_loss": loss, "class_weights": "balanced", "num_train_epochs": 8}
    trainer = trainer_of(tmp_path, shown(32), shown(32), head="text", learning_rate=3e-3, **options)
    start = copy.deepcopy(trainer.model)
    zero_shot = clipft.evaluate_zero_shot(start, trainer.processing_class, shown(32), NAMES)
    before = trainer.evaluate()
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert before[f"eval_{name}"] == zero_shot[name]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.2
    assert same(trainer.model.text_model, start.text_model)
    assert same(trainer.model.text_projection, start.text_projection)
    assert trainer.model.logit_scale == start.logit_scale
    assert not torch.equal(trainer.model.heads[0].weight, start.heads[0].weight)
    prediction = trainer.predict(shown(8))
    assert prediction.predictions.shape == (8, 4) and prediction.label_ids.tolist() == shown(8)["label"]
    found = clipft.evaluate_heads(trainer.model, trainer.processing_class, shown(32))["label"]
    assert found["balanced_accuracy"] == pytest.approx(after["eval_balanced_accuracy"])


def test_the_loss_is_that_of_the_whole_model(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, shown(8), head="text", class_weights=[1.0, 2.0, 3.0, 4.0], label_smoothing_factor=0.1
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == {"pixel_values", "targets"}
    embeds = functional.normalize(trainer.model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    logits = embeds @ trainer.model.heads[0].weight.t()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = functional.cross_entropy(logits, batch["targets"][:, 0], weight, label_smoothing=0.1)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def attributed(folder: Path, count: int = 24) -> Any:
    return clipft.load_pairs(attributes_csv(folder, count), attribute_columns=["color", "shape"])


def test_attribute_losses_are_added_to_that_of_the_pairs(tmp_path: Path) -> None:
    data = attributed(tmp_path)
    trainer = trainer_of(tmp_path, data, attributes={"color": 0.5, "shape": 2.0})
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["targets"] == MISSING).any()
    pairs = trainer_of(tmp_path, data)
    same_pairs = next(iter(pairs.get_train_dataloader()))
    assert torch.equal(batch["pixel_values"], same_pairs["pixel_values"])
    embeds = pairs.model(**{k: v for k, v in same_pairs.items() if k != "labels"}, return_logits=False).image_embeds
    logits = [embeds @ head.weight.t() for head in trainer.model.heads]
    terms = [functional.cross_entropy(own, batch["targets"][:, place]) for place, own in enumerate(logits)]
    expected = pairs.compute_loss(pairs.model, same_pairs) + 0.5 * terms[0] + 2.0 * terms[1]
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_attribute_heads_learn_beside_the_pairs(tmp_path: Path) -> None:
    data = attributed(tmp_path, 32)
    trainer = trainer_of(
        tmp_path, data, data, attributes={"color": 0.5, "shape": 0.5}, num_train_epochs=12, learning_rate=3e-3
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("color_accuracy", "color_balanced_accuracy", "shape_macro_f1", "image_to_text_R@1"):
        assert after[f"eval_{name}"] > before[f"eval_{name}"], name
    found = clipft.evaluate_heads(trainer.model, trainer.processing_class, data)
    assert {name: after[f"eval_{name}_accuracy"] for name in found} == {n: f["accuracy"] for n, f in found.items()}
    images, texts, color, shape = trainer.predict(data).predictions
    assert images.shape == texts.shape == (32, 16) and color.shape == shape.shape == (32, 4)


HEADS: dict[str, Any] = {"head": "text", "class_weights": "balanced"}
BESIDE: dict[str, Any] = {"attributes": {"color": 0.5, "shape": 1.0}, "head_loss": "focal"}


def data_of(options: dict[str, Any], folder: Path) -> Any:
    return shown() if "head" in options else attributed(folder)


@pytest.mark.parametrize("options", [HEADS, BESIDE], ids=["head", "attributes"])
def test_resume_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    data = data_of(options, tmp_path)
    recipe = options | {"ema_decay": 0.9, "layer_decay": 0.8, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path / "whole", data, **recipe)
    whole.train()
    trainer_of(tmp_path / "broken", data, callbacks=[StopAfter(2)], **recipe).train()
    resumed = trainer_of(tmp_path / "broken", data, **recipe)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert same(resumed.model, whole.model)
    loaded, processor = clipft.load(tmp_path / "whole" / "checkpoint-6")
    assert same(loaded, whole.model)
    more = trainer_of(tmp_path, data, loaded=(loaded, processor), **options)  # goes on from the heads that are there
    assert torch.equal(more.model.heads[0].weight, whole.model.heads[0].weight)


def gradients(trainer: Any) -> dict[str, Tensor]:
    model = trainer.model
    model.zero_grad()
    torch.manual_seed(1)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, next(iter(trainer.get_train_dataloader())))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [HEADS, {**HEADS, "head_loss": "dice"}, BESIDE], ids=["head", "dice", "attributes"])
def test_gradient_caching_gives_the_same_gradients(tmp_path: Path, options: dict[str, Any]) -> None:
    data = data_of(options, tmp_path)
    whole, chunked = (gradients(trainer_of(tmp_path, data, grad_cache_chunk_size=n, **options)) for n in (None, 3))
    assert whole.keys() == chunked.keys() and any("heads" in name for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [HEADS, BESIDE], ids=["head", "attributes"])
def test_features_of_frozen_towers_train_the_same_heads(tmp_path: Path, options: dict[str, Any]) -> None:
    data, runs = data_of(options, tmp_path), []
    for cached in (True, False):
        model, processor = tiny_clip()
        clipft.freeze(model, "towers")
        trainer = trainer_of(tmp_path, data, data, loaded=(model, processor), cache_frozen=cached, **options)
        trainer.train()
        runs.append((losses(trainer), trainer.evaluate()["eval_loss"]))
    assert list(tmp_path.glob("features/vision-*"))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5) and runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)


def test_penalties_and_balanced_batches_work_with_a_head(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, shown(), head="text", l2_sp=0.01, distillation=1.0, class_balanced=True, auto_batch=True
    )
    trainer.train()
    assert len(losses(trainer)) == 6


def test_other_recipes_work_with_heads(tmp_path: Path) -> None:
    for data, options in (
        (shown(16), {"head": "text", "gradual_unfreezing": 0.5}),
        (attributed(tmp_path, 16), {"attributes": {"color": 1.0}, "hard_negatives": 2}),
    ):
        trainer = trainer_of(tmp_path, data, num_train_epochs=1, **options)
        start = copy.deepcopy(trainer.model.heads)
        trainer.train()
        assert not same(trainer.model.heads, start)


def test_head_options_are_checked(tmp_path: Path) -> None:
    for options, message in (
        ({"head": "linear"}, "head: expected one of none, text"),
        ({"head": "text", "head_loss": "mse"}, "head_loss: expected one of cross_entropy, focal, dice"),
        ({"head_loss": "dice"}, "head_loss, class_weights: there is no head"),
        ({"head": "text", "loss": "contrastive"}, "head: it takes the place of the loss over pairs"),
        ({"head": "text", "hard_negatives": 3}, "hard_negatives: they are those of pairs"),
        ({"attributes": {"color": 0.0}}, "attributes: 'color': expected a weight above 0"),
        ({"head": "text", "class_weights": [1.0, 0.0]}, "class_weights: expected 'balanced' or a list"),
        (
            {"attributes": {"color": 1.0}, "class_weights": [1.0, 2.0]},
            "class_weights: a list is for the classes of lab",
        ),
        (
            {"head": "text", "head_loss": "dice", "label_smoothing_factor": 0.1},
            "label_smoothing_factor: not in the dice",
        ),
        ({"head": "text", "focal_gamma": -1.0}, "focal_gamma"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **options)
    with pytest.raises(ValueError, match="class_weights: expected 4, one for each"):
        trainer_of(tmp_path, shown(), head="text", class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"head: 'text': expected .* column 'label' .*, found the columns \['caption'"):
        trainer_of(tmp_path, attributed(tmp_path), head="text")
    with pytest.raises(ValueError, match="attributes: 'size': expected a training set with a column 'size'"):
        trainer_of(tmp_path, attributed(tmp_path), attributes={"size": 1.0})
    model, processor = tiny_clip()
    adapted = clipft.add_lora(model, 2, 4, 0.0)
    with pytest.raises(ValueError, match="head, attributes: expected a model without adapter"):
        trainer_of(tmp_path, shown(), loaded=(adapted, processor), head="text")


# ---- several processes ----

WORKER = """
import json, os, sys
from pathlib import Path
import torch
sys.path[:0] = {tests!r}
from ranks import leave
from test_heads import attributed, shown
from tiny_trainer import losses, trainer_of
torch.set_num_threads(1)
folder, batch, results = Path(sys.argv[1]), int(sys.argv[2]), {{}}
kinds = {{"dice": {{"head": "text", "head_loss": "dice", "class_weights": [1.0, 2.0, 3.0, 4.0]}},
    "attributes": {{"attributes": {{"color": 0.5, "shape": 1.0}}, "class_weights": "balanced"}},
    "chunks": {{"attributes": {{"color": 0.5}}, "grad_cache_chunk_size": 3}}}}
own = folder / os.environ.get("RANK", "0")
own.mkdir()
for name, options in kinds.items():
    data = shown(32) if "head" in options else attributed(own, 32)
    trainer = trainer_of(folder / name, data, data, per_device_train_batch_size=batch, optim="sgd",
        learning_rate=0.01, warmup_steps=0, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0,
        num_train_epochs=1, **options)
    trainer.train()
    metrics = trainer.evaluate()
    parameters = {{name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}}
    results[name] = [losses(trainer), parameters, {{k: v for k, v in metrics.items() if "accuracy" in k}}]
if trainer.is_world_process_zero():
    (folder / "result.json").write_text(json.dumps(results))
leave()
"""


def run_processes(folder: Path, count: int, batch: int) -> Any:
    folder.mkdir()
    run_ranks(WORKER.format(tests=import_paths(__file__)), folder, batch, count=count)
    return json.loads((folder / "result.json").read_text())


def test_two_processes_train_heads_as_one_with_the_joined_batch(tmp_path: Path) -> None:
    """Dice and weighted means are over the rows of both; plain SGD, since Adam would hide a wrong factor."""
    one, two = run_processes(tmp_path / "one", 1, 8), run_processes(tmp_path / "two", 2, 4)
    for kind, (loss, parameters, metrics) in one.items():
        assert two[kind][0] == pytest.approx(loss, rel=1e-4), kind
        for name, value in parameters.items():
            assert two[kind][1][name] == pytest.approx(value, rel=1e-3, abs=2e-3), (kind, name)
        assert two[kind][2] == pytest.approx(metrics, abs=0.07), kind
