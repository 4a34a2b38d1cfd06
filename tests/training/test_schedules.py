"""Class-balanced batches, layer-wise rates, gradual unfreezing, averaged weights; and an exact resume with all."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import captioned, labelled, tiny_clip
from tiny_trainer import StopAfter, losses, same, trainer_of
from transformers import EarlyStoppingCallback, TrainerCallback

import clipft
from clipft.data.sampling import ClassBalancedSampler, classes_are_uneven
from clipft.families.clip import CLIP
from clipft.training.schedules import depth_from_top

# ---- class-balanced batches ----


def imbalanced() -> Any:
    """16 red pictures, 4 green, 2 blue, 1 yellow."""
    data = labelled(64)
    kept = Counter[int]()
    most = {0: 16, 1: 4, 2: 2, 3: 1}
    rows = []
    for index, label in enumerate(data["label"]):
        kept[label] += 1
        if kept[label] <= most[label]:
            rows.append(index)
    return data.select(rows)


def test_every_round_has_each_class_once() -> None:
    labels = [0] * 16 + [1] * 4 + [2] * 2 + [3]
    rows = list(ClassBalancedSampler(labels, 7, lambda: 0))
    assert len(rows) == len(labels) == 23
    picked = [labels[index] for _, index, _ in rows]
    assert all(sorted(picked[start : start + 4]) == [0, 1, 2, 3] for start in range(0, 20, 4))
    assert len(set(rows)) == 23  # a row that comes again has another draw
    of_two = [index for _, index, _ in rows if labels[index] == 2]
    assert max(Counter(of_two).values()) - min(Counter(of_two).values()) <= 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [list(ClassBalancedSampler([0, 1, 0, 1, 0], seed, lambda e=e: e)) for seed, e in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] == list(ClassBalancedSampler([0, 1, 0, 1, 0], 1, lambda: 0))
    assert len({tuple(order) for order in orders}) == 3
    assert [epoch for epoch, _, _ in orders[1]] == [1] * 5


def test_batches_are_balanced_and_repeats_are_augmented_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, imbalanced(), class_balanced=True, random_resized_crop=0.3)
    batches = list(trainer.get_train_dataloader())
    assert [sorted(Counter(batch["labels"].tolist()).values()) for batch in batches[:2]] == [[2, 2, 2, 2]] * 2
    yellow = torch.cat([batch["pixel_values"][batch["labels"] == 3] for batch in batches])
    assert len(yellow) >= 5
    assert len({picture.sum().item() for picture in yellow}) == len(yellow)


def test_balance_needs_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_balanced: expected a data set with a column 'label'"):
        trainer_of(tmp_path, captioned(8), class_balanced=True).train()
    rows = imbalanced()
    labels = [-1, None, *rows["label"][2:]]
    rows = rows.remove_columns("label").add_column("label", labels, feature=rows.features["label"])
    with pytest.raises(ValueError, match="class_balanced: expected a class in every row, found 2 of 23 without"):
        trainer_of(tmp_path, rows, class_balanced=True).train()


def test_classes_are_uneven_where_the_largest_has_half_again_the_smallest_and_a_batch_has_room() -> None:
    assert classes_are_uneven(imbalanced(), 4)
    assert not classes_are_uneven(imbalanced(), 3)
    assert not classes_are_uneven(labelled(64), 32)
    assert not classes_are_uneven(captioned(8), 32)
    assert not classes_are_uneven(imbalanced().add_column("caption", ["what is on it"] * 23), 32)
    rows = imbalanced()
    some = (
        rows.remove_columns("label")
        .add_column("label", [-1, *rows["label"][1:]])
        .cast_column("label", rows.features["label"])
    )
    assert not classes_are_uneven(some, 32)
    two = labelled(64).filter(lambda label: label < 2, input_columns="label")
    first, second = ([row for row, label in enumerate(two["label"]) if label == wanted] for wanted in (0, 1))
    assert not classes_are_uneven(two.select(first[:9] + second[:6]), 32)
    assert classes_are_uneven(two.select(first[:10] + second[:6]), 32)
    assert classes_are_uneven(two.select(first[:19] + second[:1]), 32)
    assert not classes_are_uneven(two.select((first * 2)[:20] + second[:1]), 32)  # it would come 10.5 times an epoch


# ---- layer-wise decay ----


def test_depth_from_top() -> None:
    layers: Any = {
        tower: [f"{tower}_model.encoder.layers.{layer}" for layer in range(count)]
        for tower, count in (("text", 3), ("vision", 12))
    }
    for name, depth in (
        ("logit_scale", 0),
        ("visual_projection.weight", 0),
        ("vision_model.post_layernorm.bias", 0),
        ("vision_model.encoder.layers.11.mlp.fc1.weight", 1),
        ("base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_A.default.weight", 12),
        ("text_model.encoder.layers.2.self_attn.q_proj.bias", 1),
        ("text_model.embeddings.token_embedding.weight", 4),
        ("vision_model.pre_layrnorm.weight", 13),
    ):
        assert depth_from_top(name, layers, CLIP) == depth, name


def test_rates_fall_with_depth_and_follow_the_schedule(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(16), layer_decay=0.5, learning_rate=1e-3, num_train_epochs=1)
    optimizer = trainer.create_optimizer()
    name_of = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {name_of[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == dict(trainer.model.named_parameters()).keys()
    assert rates["text_projection.weight"] == rates["logit_scale"] == 1e-3
    assert rates["vision_model.encoder.layers.0.mlp.fc1.weight"] == pytest.approx(1e-3 / 8)
    assert rates["vision_model.embeddings.patch_embedding.weight"] == pytest.approx(1e-3 / 16)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    trainer.create_scheduler(10, optimizer)
    optimizer.step()
    trainer.lr_scheduler.step()
    ratios = {group["lr"] / group["initial_lr"] for group in optimizer.param_groups}
    assert max(ratios) == pytest.approx(min(ratios))


def test_the_lower_layers_move_less(tmp_path: Path) -> None:
    start = tiny_clip()[0].vision_model.embeddings.patch_embedding.weight
    moved = {}
    for decay in (1.0, 0.3):
        trainer = trainer_of(tmp_path, captioned(16), layer_decay=decay)
        trainer.train()
        moved[decay] = (trainer.model.vision_model.embeddings.patch_embedding.weight - start).abs().max().item()
    assert 0.0 < moved[0.3] < 0.1 * moved[1.0]


# ---- gradual unfreezing ----


class Trainable(TrainerCallback):
    """Which parameters got a gradient in each step."""

    def __init__(self) -> None:
        self.steps: list[set[str]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name for name, p in model.named_parameters() if p.grad is not None})


def layers_of(names: set[str]) -> set[str]:
    return {name.split(".layers.")[1][0] for name in names if ".layers." in name}


def test_one_layer_more_trains_every_so_many_epochs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = Trainable()
    options: dict[str, Any] = {"gradual_unfreezing": 0.5, "num_train_epochs": 2, "l2_sp": 0.1, "layer_decay": 0.9}
    trainer = trainer_of(tmp_path, captioned(32), callbacks=[seen], **options)
    start = dict(tiny_clip()[0].named_parameters())
    trainer.train()
    assert not caplog.text
    expected = [{"2"}] * 2 + [{"1", "2"}] * 2 + [{"0", "1", "2"}] * 4
    assert [layers_of(names) for names in seen.steps] == expected
    embeddings = [any("embeddings" in name for name in names) for names in seen.steps]
    assert embeddings == [False] * 6 + [True] * 2
    assert all({"logit_scale", "text_projection.weight"} <= names for names in seen.steps)
    assert all(not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters() if "k_proj" not in name)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_layers_that_are_frozen_anyway_stay_frozen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = tiny_clip()
    clipft.freeze(model, "vision:2")
    before = copy.deepcopy(model.vision_model.encoder.layers[0])
    seen = Trainable()
    options: dict[str, Any] = {"gradual_unfreezing": 1.0, "num_train_epochs": 3}
    trainer_of(tmp_path, captioned(8), loaded=(model, processor), callbacks=[seen], **options).train()
    assert "gradual_unfreezing: 3 epochs reach the upper 3 of 4 layers" in caplog.text  # of the text tower
    vision = [{name for name in names if "vision_model" in name} for names in seen.steps]
    assert [layers_of(names) for names in vision] == [{"2"}, {"1", "2"}, {"1", "2"}]
    assert same(model.vision_model.encoder.layers[0], before)
    clipft.freeze(model, "towers")
    with pytest.raises(ValueError, match="gradual_unfreezing: expected layers that train below the top one"):
        trainer_of(tmp_path, captioned(8), loaded=(model, processor), **options).train()


# ---- averaged weights ----


class Weights(TrainerCallback):
    """Collects the trained scale's value after each step."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.values.append(model.visual_projection.weight.detach().clone())


def test_the_average_is_evaluated_saved_and_kept(tmp_path: Path) -> None:
    weights = Weights()
    trainer = trainer_of(
        tmp_path,
        captioned(16),
        captioned(16),
        callbacks=[weights],
        ema_decay=0.9,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    average = trainer.model.visual_projection.weight.detach().clone()
    trainer.train()
    averages = []
    for step, value in enumerate(weights.values, 1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
        averages.append(average)
    torch.testing.assert_close(trainer.model.visual_projection.weight.detach(), averages[-1])
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    torch.testing.assert_close(saved["visual_projection.weight"], averages[-1])
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-6)
    assert clipft.evaluate_retrieval(trainer.model, trainer.processing_class, captioned(16)).keys()


def test_the_best_average_comes_back(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        captioned(16),
        captioned(16),
        callbacks=[EarlyStoppingCallback(1)],
        ema_decay=0.9,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


# ---- all together ----

RECIPE: dict[str, Any] = {
    "class_balanced": True,
    "layer_decay": 0.7,
    "ema_decay": 0.99,
    "gradual_unfreezing": 0.7,
    "num_train_epochs": 3,
    "random_resized_crop": 0.5,
    "save_strategy": "steps",
}


@pytest.mark.parametrize("stop", [2, 3])  # within the first epoch, and at its end
def test_resume_is_exact(tmp_path: Path, stop: int) -> None:
    options = RECIPE | {"save_steps": stop}
    whole = trainer_of(tmp_path / "whole", imbalanced(), **options)
    whole.train()
    trainer_of(tmp_path / "broken", imbalanced(), callbacks=[StopAfter(stop)], **options).train()
    resumed = trainer_of(tmp_path / "broken", imbalanced(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert same(resumed.model, whole.model)


def test_a_checkpoint_without_the_trained_weights_is_an_error(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 2}
    trainer_of(tmp_path, captioned(8), callbacks=[StopAfter(1)], **options).train()
    with pytest.raises(ValueError, match="ema_decay: expected trained_weights"):
        trainer_of(tmp_path, captioned(8), ema_decay=0.9, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "value"), [("layer_decay", 0.0), ("layer_decay", 1.5), ("ema_decay", 1.0), ("gradual_unfreezing", -1.0)]
)
def test_arguments_are_checked(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        clipft.CLIPTrainingArguments(output_dir=str(tmp_path), **{name: value})
