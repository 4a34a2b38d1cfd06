"""clipft.forgetting: penalties to the start, and weights between start and end."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import captioned, labelled, tiny_clip
from tiny_trainer import StopAfter, arguments, losses, same, trainer_of

import clipft
from clipft.evaluation.metrics import Classification
from clipft.training.regularizers import StartingPoint
from clipft.training.wise_ft import RULE, Sweep, WeightLine, sweep

SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
}


def moved(trainer: clipft.CLIPTrainer) -> float:
    """Distance of the weights to the start."""
    start = dict(tiny_clip()[0].named_parameters())
    return sum((p - start[name]).square().sum().item() for name, p in trainer.model.named_parameters()) ** 0.5


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"grad_cache_chunk_size": 3}])
def test_l2_sp_adds_its_gradient(tmp_path: Path, options: dict[str, Any]) -> None:
    """Two steps of SGD by hand from the trainer's own gradients: w -= lr (g + lambda (w - w_start))."""
    data, strength = captioned(32), 0.7
    steps: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    trainer = trainer_of(tmp_path, data, l2_sp=strength, max_steps=2, **SGD, **options)
    assert trainer._start is None
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    backward = trainer._backward

    def watch(model: Any, *args: Any) -> Any:
        loss = backward(model, *args)
        copies = ((p.clone(), p.grad.clone()) for p in model.parameters())
        names = [name for name, _ in model.named_parameters()]
        weights, gradients = (dict(zip(names, part, strict=True)) for part in zip(*copies, strict=True))
        steps.append((weights, gradients))
        return loss

    trainer._backward = watch  # type: ignore[method-assign]
    trainer.train()
    weights, gradients = steps[-1]
    share = options.get("gradient_accumulation_steps", 1)  # the earlier micro-batch's pull is in the gradient already
    for name, p in trainer.model.named_parameters():
        expected = weights[name] - 0.05 * (gradients[name] + strength / share * (weights[name] - start[name]))
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [None, 3])
def test_distillation_is_in_the_loss(tmp_path: Path, chunk: int | None) -> None:
    data = captioned(16)
    plain = trainer_of(tmp_path, data, **SGD)
    pulled = trainer_of(tmp_path, data, distillation=3.0, grad_cache_chunk_size=chunk, **SGD)
    plain.train()
    pulled.train()
    assert losses(pulled)[0] == pytest.approx(losses(plain)[0], abs=1e-5)  # nothing has moved yet
    assert losses(pulled)[1] > losses(plain)[1] - 1e-3
    assert not same(pulled.model, plain.model)
    assert pulled.evaluate(data)["eval_loss"] < losses(pulled)[1] + 1  # without the distance
    assert pulled._start is not None
    assert pulled._start.distance(torch.ones(1, 2), torch.ones(1, 2)) == 0.0


def test_distance_of_embeddings() -> None:
    model, processor = tiny_clip()
    batch = clipft.CLIPDataCollator(processor)(
        [{"image": r["image"], "captions": [r["caption"]]} for r in captioned(4)]
    )
    clipft.fuse(model)
    start = StartingPoint(model, l2_sp=0.0, distillation=2.0)
    with torch.no_grad():
        before = model(**{k: v for k, v in batch.items() if k != "labels"}, return_logits=False)
        for parameter in model.parameters():
            parameter.add_(0.05)
        after = model(**{k: v for k, v in batch.items() if k != "labels"}, return_logits=False)
    start.encode_start(batch, torch.enable_grad)
    pairs = ((after.image_embeds, before.image_embeds), (after.text_embeds, before.text_embeds))
    expected = 2.0 * sum((a - b).square().sum(1).mean() / 2 for a, b in pairs)
    torch.testing.assert_close(start.distance(after.image_embeds, after.text_embeds), expected)
    assert expected > 0.01


@pytest.mark.parametrize("penalty", [{"l2_sp": 20.0}, {"distillation": 100.0}])
def test_penalties_keep_the_model_near_its_start(tmp_path: Path, penalty: dict[str, float]) -> None:
    options = {"num_train_epochs": 6, "learning_rate": 3e-3}
    data = captioned(32)
    free, held = trainer_of(tmp_path, data, **options), trainer_of(tmp_path, data, **options, **penalty)
    free.train()
    held.train()
    if "l2_sp" in penalty:
        assert moved(held) < 0.7 * moved(free)
    else:
        start, _ = tiny_clip()
        models, processor = (start, free.model, held.model), free.processing_class
        images = [clipft.embed(model, processor, images=data["image"][:]) for model in models]
        embeds = [torch.from_numpy(np.asarray(part)) for part in images]
        assert (embeds[2] - embeds[0]).norm() < 0.7 * (embeds[1] - embeds[0]).norm()


@pytest.mark.parametrize("penalty", [{"l2_sp": 0.5}, {"distillation": 2.0}])
def test_resume_pulls_to_the_same_start(tmp_path: Path, penalty: dict[str, float]) -> None:
    data = captioned(24)
    options = {"save_strategy": "steps", "save_steps": 3, **penalty}
    whole = trainer_of(tmp_path / "whole", data, **options)
    whole.train()
    trainer_of(tmp_path / "broken", data, callbacks=[StopAfter(3)], **options).train()
    resumed = trainer_of(tmp_path / "broken", data, **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.model, whole.model)


def test_penalties_check_their_strength(tmp_path: Path) -> None:
    for name in ("l2_sp", "distillation"):
        with pytest.raises(ValueError, match=f"{name}: expected a number of at least 0"):
            arguments(tmp_path, **{name: -1.0})


# ---- WiSE-FT ----


def test_wise_ft_is_linear_and_exact_at_its_ends() -> None:
    start, tuned = tiny_clip(0)[0], tiny_clip(1)[0]
    kept = copy.deepcopy(tuned)
    assert same(clipft.wise_ft(start, tuned, 0), start)
    assert same(clipft.wise_ft(start, clipft.fuse(tuned), 1.0), tuned)
    middle = clipft.wise_ft(start, tuned, 0.25)
    assert type(middle) is type(start)
    first, last = start.state_dict(), tuned.state_dict()
    for name, value in middle.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * last[name])
    assert same(clipft.unfuse(tuned), kept)


def test_wise_ft_checks_its_arguments() -> None:
    start, _ = tiny_clip()
    with pytest.raises(ValueError, match="alpha: expected a number from 0"):
        clipft.wise_ft(start, start, 1.5)
    with pytest.raises(TypeError):
        clipft.wise_ft(start, torch.nn.Linear(2, 2), 0.5)
    other = tiny_clip()[0]
    other.visual_projection = torch.nn.Linear(32, 8, bias=False)
    with pytest.raises(ValueError, match=r"same names and shapes, these differ: \['visual_projection.weight'\]"):
        clipft.wise_ft(start, other, 0.5)


def test_the_line_of_an_adapter_is_its_merge_scale() -> None:
    pytest.importorskip("peft")
    model, _ = tiny_clip()
    start = copy.deepcopy(model)
    adapted = clipft.add_lora(model, 4, 8, 0.0)
    line = WeightLine(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    merged = copy.deepcopy(adapted).merge_and_unload()
    for alpha in (0.3, 0.0, 1.0):
        line.move_to(alpha)
        got = copy.deepcopy(adapted).merge_and_unload().state_dict()
        for name, value in clipft.wise_ft(start, merged, alpha).state_dict().items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_the_sweep_takes_the_smallest_alpha_as_good_as_the_best() -> None:
    """Scores by alpha: wrong for most at 0, and at 0.6 to 1 but for one row the same."""
    model, _ = tiny_clip()
    line = WeightLine(model)
    start = model.logit_scale.item()
    with torch.no_grad():
        model.logit_scale.add_(1.0)
    labels = np.arange(60) % 2

    def score() -> Classification:
        alpha = model.logit_scale.item() - start
        right = 20 if alpha < 0.35 else 40 if alpha < 0.55 else 59 if alpha < 0.95 else 60
        guess = np.where(np.arange(60) < right, labels, 1 - labels)
        return Classification(labels, np.eye(2)[guess], ["a", "b"])

    found = sweep(line, score, score)
    assert found.alpha == 0.6
    assert model.logit_scale.item() == pytest.approx(start + 0.6)
    assert [point["alpha"] for point in found.points] == [number / 10 for number in range(11)]
    assert found.points[-1]["held_out"] == 1.0
    expected = {"alpha": 0.6, "held_out": 59 / 60, "control": 59 / 60, "difference": 1 / 60, "standard_error": 1 / 60}
    assert found.points[6] == pytest.approx(expected, abs=2e-3)
    assert found.to_json()["rule"] == RULE


def test_too_few_rows_give_nothing_of_a_gain_away() -> None:
    """Of 22 rows the fine-tune gets 3 more right, which noise might."""
    model, _ = tiny_clip()
    start, labels = model.logit_scale.item(), np.arange(22) % 2

    def swept(right: list[int]) -> Sweep:
        line = WeightLine(model)
        with torch.no_grad():
            model.logit_scale.add_(1.0)

        def score() -> Classification:
            place = round(10 * (model.logit_scale.item() - start))
            guess = np.where(np.isin(np.arange(22), np.arange(right[place])), labels, 1 - labels)
            guess[:4] = 1 - guess[:4] if place == 10 else guess[:4]  # it loses others
            return Classification(labels, np.eye(2)[guess], ["a", "b"])

        found = sweep(line, score)
        line.move_to(0.0)
        return found

    found = swept([12] * 10 + [19])
    assert found.alpha == 1.0
    assert re.match(r"22 held-out rows are too few .*balanced accuracy \+0\.136, standard error 0\.\d+", found.note)
    assert found.to_json()["note"] == found.note
    worse = swept([12] + [11] * 9 + [14])
    assert worse.alpha == 0.0 and worse.note.startswith("no point of the fine-tune scored above the start")


def test_embeddings_stay_where_only_the_text_tower_trains(tmp_path: Path) -> None:
    """With frozen features in place of pixels the distance is that of the same inputs."""
    trainer = trainer_of(tmp_path, labelled(16), distillation=1.0, num_train_epochs=3)
    clipft.freeze(trainer.model, "vision")
    trainer.train()
    assert trainer.state.global_step == 6
    assert all(np.isfinite(losses(trainer)))
