"""Gradient caching: the gradient of the whole batch, whatever the chunks; dropout drawn alike in both passes."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import tiny_trainer
import torch
from tiny_clip import captioned, labelled, tiny_clip

import clipft


def trainer_of(folder: Path, model: Any = None, data: Any = None, **options: Any) -> clipft.CLIPTrainer:
    """Plain SGD, which shows the gradient."""
    own, processor = tiny_clip()
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 12,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    rows = captioned(12) if data is None else data
    return tiny_trainer.trainer_of(
        folder, rows, loaded=(own if model is None else model, processor), **defaults | options
    )


def step(trainer: clipft.CLIPTrainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Sums in another order: some roundings of each tensor's norm apart. (A key's bias has a gradient of zero.)"""
    assert got.keys() == want.keys() and got
    for name, value in want.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize("data", ["captions", "classes"])
def test_the_gradient_is_that_of_the_undivided_batch(chunk: int, data: str, tmp_path: Path) -> None:
    rows = captioned(12) if data == "captions" else labelled(12)  # classes: four texts for twelve pictures
    whole = step(trainer_of(tmp_path, data=rows, label_smoothing_factor=0.1))
    got = step(trainer_of(tmp_path, data=rows, label_smoothing_factor=0.1, grad_cache_chunk_size=chunk))
    torch.testing.assert_close(got[0], whole[0])
    close(got[1], whole[1])


@pytest.mark.parametrize("strategy", ["text", "vision", "towers"])
def test_with_frozen_towers(strategy: str, tmp_path: Path) -> None:
    models = [clipft.freeze(tiny_clip()[0], strategy) for _ in range(2)]
    options: dict[str, Any] = {"num_train_epochs": 2}
    whole = step(trainer_of(tmp_path, models[0], **options))
    close(step(trainer_of(tmp_path, models[1], grad_cache_chunk_size=5, **options))[1], whole[1])


def test_with_gradient_checkpointing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, grad_cache_chunk_size=5)
    trainer.model.gradient_checkpointing_enable()
    close(step(trainer)[1], step(trainer_of(tmp_path))[1])


def test_dropout_is_the_same_in_both_passes(tmp_path: Path) -> None:
    """In one chunk the masks are those of the undivided batch; in several, a step gives the derivative of the loss that
    it tells, as a finite difference along the gradient shows."""
    model = clipft.add_lora(tiny_clip()[0], r=4, dropout=0.4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)

    def seeded(chunk: int | None, own: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        trainer = trainer_of(tmp_path, own, grad_cache_chunk_size=chunk)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1
        own.zero_grad()
        torch.manual_seed(3)
        loss = trainer.training_step(own, dict(batch))
        return loss, {name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None}

    whole, chunked = seeded(None, model), seeded(12, model)
    torch.testing.assert_close(chunked[0], whole[0])
    close(chunked[1], whole[1])
    _, gradient = seeded(5, model)
    length = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
    losses = []
    for sign in (-1.0, 1.0):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in gradient:
                    parameter.add_(sign * 2e-3 * gradient[name] / length)
        losses.append(seeded(5, moved)[0])
    assert float(losses[1] - losses[0]) / 4e-3 == pytest.approx(float(length), rel=0.02)


def test_training_goes_as_without(tmp_path: Path) -> None:
    runs = []
    for chunk in (None, 5):
        trainer = trainer_of(tmp_path, data=captioned(24), gradient_accumulation_steps=2, grad_cache_chunk_size=chunk)
        trainer.train()
        runs.append((trainer.state.log_history[0]["loss"], trainer.model.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_no_more_than_a_chunk_has_a_graph(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, grad_cache_chunk_size=3)
    alive: list[int] = []

    def with_a_graph() -> list[torch.Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.grad_fn is not None and o.dim() == 3]

    def count(*_: Any) -> None:
        alive.append(max((t.shape[0] for t in with_a_graph() if id(t) not in before), default=0))

    before = {id(tensor): tensor for tensor in with_a_graph()}  # compiled code keeps those of earlier tests
    trainer.model.visual_projection.register_forward_hook(count)
    step(trainer)
    assert max(alive) <= 3


def test_a_chunk_has_at_least_one_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="grad_cache_chunk_size: expected at least 1, or None, got 0"):
        trainer_of(tmp_path, grad_cache_chunk_size=0)


def test_one_side_alone_gives_embeddings_and_no_loss() -> None:
    fused = clipft.fuse(tiny_clip()[0])
    output = fused(pixel_values=torch.zeros(2, 3, 32, 32), return_logits=False)
    assert output.image_embeds.shape == (2, 16) and output.text_embeds is None
    with pytest.raises(ValueError, match="expected pixel_values and input_ids"):
        fused(pixel_values=torch.zeros(2, 3, 32, 32), return_loss=True)
