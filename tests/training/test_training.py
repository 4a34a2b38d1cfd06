"""clipft.CLIPTrainer: loss, optimiser, evaluation, the best checkpoint, several processes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from scripts import import_paths
from tiny_clip import captioned, labelled, tiny_clip
from tiny_trainer import StopAfter, arguments, losses, same, trainer_of
from transformers import CLIPModel, EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

import clipft


def test_the_default_rate_follows_the_models_size() -> None:
    from clipft.training.arguments import default_learning_rate

    sizes = {"b32": 151_277_313, "l14": 427_616_513, "small": 12_000_000, "tiny": 100_000}
    models = {name: torch.nn.ParameterList([torch.empty(size, device="meta")]) for name, size in sizes.items()}
    rates = {name: default_learning_rate(model) for name, model in models.items()}
    assert rates["b32"] == pytest.approx(1e-5, rel=0.02) and rates["l14"] == 5e-6
    assert rates["small"] == pytest.approx(1.25e-4) and rates["tiny"] == 2e-4
    assert default_learning_rate(models["b32"], lora=True) == pytest.approx(2e-4, rel=0.02)
    assert default_learning_rate(models["tiny"], lora=True) == 2e-3


# ---- loss ----


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(8))
    batch = next(iter(trainer.get_train_dataloader()))
    plain = copy.deepcopy(clipft.unfuse(tiny_clip()[0]))
    expected = plain(**{k: v for k, v in batch.items() if k != "labels"}, return_loss=True).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_equal_captions_are_positives_and_smoothing_is_the_losss(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, labelled(8), label_smoothing_factor=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    output = trainer.model(**{k: v for k, v in batch.items() if k != "labels"})
    assert len(set(batch["labels"].tolist())) == 4
    expected = clipft.reference.contrastive_loss(
        output.image_embeds, output.text_embeds, output.logit_scale, labels=batch["labels"], label_smoothing=0.1
    )
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_a_pair_that_would_be_a_batch_of_its_own_is_left_out_where_it_teaches_nothing(tmp_path: Path) -> None:
    """Each epoch another; what a head says of one picture is something."""
    seen: list[set[str]] = []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(set())

    trainer = trainer_of(tmp_path, captioned(9), num_train_epochs=4, callbacks=[Watch()])
    trainer.model.register_forward_pre_hook(
        lambda _, __, inputs: seen[-1].update(map(str, inputs["pixel_values"].flatten(1).sum(1).tolist())),
        with_kwargs=True,
    )
    trainer.train()
    assert trainer.state.global_step == 4 and min(losses(trainer)) > 0
    assert [len(pictures) for pictures in seen] == [8] * 4 and len(set.union(*seen)) == 9
    others = (
        trainer_of(tmp_path, labelled(9), head="text"),
        clipft.CLIPTrainer(
            trainer.model,
            arguments(tmp_path),
            loss=lambda images, texts, batch: (images - texts).square().sum(),
            train_dataset=captioned(9),
            processing_class=trainer.processing_class,
        ),
        trainer_of(tmp_path, captioned(10)),
    )
    assert [len(other.get_train_dataloader()) for other in others] == [2, 2, 2]


def test_training_learns_and_never_builds_logits(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(16), captioned(16), num_train_epochs=12, learning_rate=3e-3)
    shapes = []
    trainer.model.register_forward_hook(lambda _, __, output: shapes.append(output.logits_per_image))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert set(shapes) == {None}
    assert after["eval_loss"] < before["eval_loss"] - 0.3
    assert after["eval_image_to_text_R@1"] > before["eval_image_to_text_R@1"]
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_accumulated_gradients_are_the_mean_over_the_micro_batches(tmp_path: Path) -> None:
    """One step over 2 x 8 pairs moves as the mean of both batches' gradients would (plain SGD shows the gradient)."""
    trainer = trainer_of(
        tmp_path,
        captioned(16),
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.1,
        warmup_steps=0,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
    )
    plain = clipft.fuse(tiny_clip()[0])
    batches = list(trainer.get_train_dataloader())
    sum(trainer.compute_loss(plain, batch) for batch in batches).div(len(batches)).backward()
    assert len(batches) == 2
    trainer.train()
    assert trainer.state.global_step == 1
    for (name, after), (_, before) in zip(trainer.model.named_parameters(), plain.named_parameters(), strict=True):
        expected = before - 0.1 * before.grad
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    runs = [trainer_of(tmp_path, captioned(16), bf16=bf16) for bf16 in (False, True)]
    for run in runs:
        run.train()
    assert losses(runs[0]) != losses(runs[1])
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0.02)
    model = clipft.unfuse(runs[1].model)
    assert type(model) is CLIPModel
    assert "forward" not in vars(model)  # accelerate's wrapper of the fused forward went with it


# ---- optimiser ----


def test_decay_is_for_matrices_only(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(8))
    decayed, free = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    name_of = {parameter: name for name, parameter in trainer.model.named_parameters()}
    without = {name_of[parameter] for parameter in free["params"]}
    assert {"logit_scale", "vision_model.embeddings.class_embedding"} <= without
    assert all(
        "bias" in n or "norm" in n or n in ("logit_scale", "vision_model.embeddings.class_embedding") for n in without
    )
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(name_of)


def test_the_logit_scale_is_clamped_at_100(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(8), learning_rate=0.0)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(6.0)
    trainer.train()
    assert trainer.model.logit_scale.item() == pytest.approx(math.log(100.0), abs=1e-6)


def test_a_frozen_scale_and_tower_stay(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(8))
    clipft.freeze(trainer.model, "text")
    trainer.model.logit_scale.requires_grad_(False).fill_(6.0)
    before = copy.deepcopy(trainer.model)
    trainer.train()
    assert trainer.model.logit_scale == 6.0
    assert same(trainer.model.text_model, before.text_model)
    assert not same(trainer.model.vision_model, before.vision_model)


def test_recipe_defaults(tmp_path: Path) -> None:
    args = clipft.CLIPTrainingArguments(output_dir=str(tmp_path))
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (1e-5, 32, 5)
    assert (args.warmup_steps, args.max_grad_norm, args.optim.value) == (0.1, 1.0, "adamw_torch_fused")
    assert args.get_warmup_steps(200) == 20


def test_cudnn_benchmark_is_on_during_training_only(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(torch.backends.cudnn.benchmark)

    trainer_of(tmp_path, captioned(8), callbacks=[Look()], num_train_epochs=1, cudnn_benchmark=True).train()
    assert seen == [True]
    assert torch.backends.cudnn.benchmark is False
    with pytest.raises(ValueError, match="cudnn_benchmark"):
        arguments(tmp_path, cudnn_benchmark=True, full_determinism=True)


def test_arguments_are_checked(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=r"args: expected clipft\.CLIPTrainingArguments, got TrainingArguments"):
        clipft.CLIPTrainer(model, plain, train_dataset=captioned(8), processing_class=processor)
    with pytest.raises(TypeError, match="processing_class: expected a CLIPProcessor"):
        clipft.CLIPTrainer(model, arguments(tmp_path), train_dataset=captioned(8))
    with pytest.raises(ValueError, match="compute_loss_func"):
        clipft.CLIPTrainer(model, arguments(tmp_path), processing_class=processor, compute_loss_func=print)
    with pytest.raises(ValueError, match="train_sampling_strategy: expected 'random'"):
        clipft.CLIPTrainer(model, arguments(tmp_path, train_sampling_strategy="sequential"), processing_class=processor)
    with pytest.raises(ValueError, match="fp16: needs a GPU"):
        clipft.CLIPTrainer(model, arguments(tmp_path, fp16=True), processing_class=processor)


def test_a_model_made_by_model_init_is_fused(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    trainer = clipft.CLIPTrainer(
        args=arguments(tmp_path, num_train_epochs=1),
        model_init=lambda: model,
        train_dataset=captioned(8),
        processing_class=processor,
    )
    trainer.train()
    assert trainer.model is model
    assert type(model) is not CLIPModel


# ---- evaluation ----


@pytest.mark.parametrize("captions", [1, 3])
def test_evaluation_is_that_of_evaluate_retrieval(tmp_path: Path, captions: int) -> None:
    test = captioned(21, captions)
    trainer = trainer_of(tmp_path, captioned(8), test)
    metrics = trainer.evaluate()
    expected = clipft.evaluate_retrieval(trainer.model, trainer.processing_class, test, resamples=0)
    assert {f"eval_{name}": value for name, value in expected.items()}.items() <= metrics.items()
    assert metrics["eval_loss"] > 0


def test_predictions_are_embeddings(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(8))
    output = trainer.predict(captioned(13))
    assert [part.shape for part in output.predictions] == [(13, 16), (13, 16)]
    assert output.label_ids.shape == (13,)
    assert {"test_loss", "test_image_to_text_R@5"} <= output.metrics.keys()


def test_several_eval_sets_and_own_metrics(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    trainer = clipft.CLIPTrainer(
        model,
        arguments(tmp_path),
        eval_dataset={"one": captioned(5), "two": labelled(8)},
        processing_class=processor,
        compute_metrics=lambda prediction: {"count": len(prediction.predictions[0])},
    )
    metrics = trainer.evaluate()
    assert (metrics["eval_one_count"], metrics["eval_two_count"]) == (5, 8)
    assert {"eval_one_loss", "eval_two_image_to_text_R@1"} <= metrics.keys()


@pytest.mark.parametrize("captions", [1, 3])
def test_metrics_by_batches_leave_those_of_retrieval(tmp_path: Path, captions: int) -> None:
    """The loop then gives the last result alone, lists of batches, or what was made of the embeddings."""
    rows = captioned(21, captions)
    seen: list[int] = []

    def count(prediction: Any, compute_result: bool) -> dict[str, int]:
        seen.append(len(prediction.predictions[0]))
        return {"count": sum(seen)} if compute_result else {}

    model, processor = tiny_clip()
    options: dict[str, Any] = {"eval_dataset": rows, "processing_class": processor}
    expected = clipft.evaluate_retrieval(model, processor, rows, resamples=0)
    by_batches = clipft.CLIPTrainer(
        model, arguments(tmp_path, batch_eval_metrics=True), compute_metrics=count, **options
    ).evaluate()
    assert (seen, by_batches["eval_count"]) == ([8, 8, 5], 21)
    as_lists = clipft.CLIPTrainer(model, arguments(tmp_path, eval_do_concat_batches=False), **options).evaluate()
    norms = clipft.CLIPTrainer(
        model,
        arguments(tmp_path),
        preprocess_logits_for_metrics=lambda embeds, labels: embeds[0].norm(dim=1),
        **options,
    ).evaluate()
    for metrics in (by_batches, as_lists, norms):
        assert {f"eval_{name}": value for name, value in expected.items()}.items() <= metrics.items()


def test_loss_only(tmp_path: Path) -> None:
    metrics = trainer_of(tmp_path, captioned(8), captioned(8), prediction_loss_only=True).evaluate()
    assert "eval_loss" in metrics
    assert not any("R@" in name for name in metrics)


def test_early_stopping_on_a_retrieval_metric(tmp_path: Path) -> None:
    """A rate of zero gains nothing, so patience ends the run; the best model, the first, comes back."""
    trainer = trainer_of(
        tmp_path,
        captioned(16),
        captioned(16),
        callbacks=[EarlyStoppingCallback(2)],
        num_train_epochs=9,
        learning_rate=0.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_text_to_image_R@1",
    )
    trainer.train()
    assert trainer.state.epoch == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    ("name", "greater"), [("image_to_text_median_rank", False), ("eval_loss", False), ("eval_text_to_image_mAP", True)]
)
def test_the_best_of_ranks_and_losses_is_the_least(tmp_path: Path, name: str, greater: bool) -> None:
    assert trainer_of(tmp_path, captioned(8), metric_for_best_model=name).args.greater_is_better is greater
    assert arguments(tmp_path, metric_for_best_model=name, greater_is_better=True).greater_is_better


class Backend:
    """Of a search that tries one thing."""

    default_hp_space = None

    def ensure_available(self) -> None: ...

    def run(self, trainer: Any, trials: int, direction: Any, **more: Any) -> float:
        metrics = {"eval_loss": 2.0, "eval_image_to_text_R@1": 0.5, "eval_text_to_image_median_rank": 9.0, "epoch": 3.0}
        return float(trainer.compute_objective(metrics | {"eval_image_to_text_mAP": 0.25, "eval_runtime": 7.0}))


@pytest.mark.parametrize(
    ("options", "metric", "expected"),
    [
        ({}, None, 2.0),
        ({"direction": "maximize"}, None, 0.75),
        ({}, "image_to_text_R@1", 0.5),
        ({}, "eval_text_to_image_median_rank", 9.0),
        ({"compute_objective": lambda metrics: metrics["epoch"]}, None, 3.0),
    ],
)
def test_a_search_for_hyper_parameters_adds_no_ranks_to_recalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], metric: str | None, expected: float
) -> None:
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend("optuna"), Backend)  # type: ignore[misc]
    args = arguments(tmp_path, metric_for_best_model=metric)
    trainer = clipft.CLIPTrainer(args=args, model_init=lambda: tiny_clip()[0], processing_class=tiny_clip()[1])
    assert trainer.hyperparameter_search(backend="optuna", **options) == expected


class Told(clipft.CLIPTrainer):
    """Evaluations that find these losses."""

    losses: list[float]

    @classmethod
    def of(cls, folder: Path, losses: list[float], options: dict[str, Any]) -> Told:
        (model, processor), data = tiny_clip(), captioned(16)
        own: dict[str, Any] = {"train_dataset": data, "eval_dataset": data, "processing_class": processor}
        trainer = cls(model, arguments(folder, **options), **own)
        trainer.losses = list(losses)
        return trainer

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return super()._determine_best_metric(metrics | {"eval_loss": self.losses.pop(0)}, trial)


@pytest.mark.parametrize(("found", "best"), [([1.0, 2.0, 3.0], 2), ([3.0, 2.0, 2.5], 4), ([3.0, 2.0, 1.0], 6)])
@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_checkpoint_is_known_and_kept_when_saved_more_often_than_evaluated(
    tmp_path: Path, found: list[float], best: int, limit: int | None
) -> None:
    often: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": limit}
    options = often | {"eval_strategy": "epoch", "metric_for_best_model": "loss", "num_train_epochs": 3}
    trainer = Told.of(tmp_path, found, options)
    trainer.train()
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert (tmp_path / f"checkpoint-{best}" / "model.safetensors").is_file()


def test_an_earlier_runs_checkpoint_is_never_the_best_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    options = {"save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    trainer = Told.of(tmp_path, [1.0, 2.0, 3.0, 4.0], options)
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.best_model_checkpoint is None


def test_a_run_that_was_moved_knows_its_best_checkpoint(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "metric_for_best_model": "loss"}
    data = captioned(8)
    trainer_of(tmp_path / "here", data, data, callbacks=[StopAfter(1)], **options).train()
    (tmp_path / "here").rename(tmp_path / "there")
    resumed = trainer_of(tmp_path / "there", data, data, learning_rate=0.0, **options)
    resumed.train(resume_from_checkpoint=True)
    assert str(resumed.state.best_model_checkpoint).startswith(str(tmp_path / "there"))


# ---- several processes ----

WORKER = """
import json, sys
from pathlib import Path
import torch
sys.path[:0] = {tests!r}
from ranks import leave
from tiny_clip import captioned
from tiny_trainer import losses, trainer_of
torch.set_num_threads(1)
folder, batch, chunk = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
trainer = trainer_of(folder, captioned(32, captions=2), captioned(18, captions=2), per_device_train_batch_size=batch,
    per_device_eval_batch_size=batch, random_resized_crop=0.5, save_strategy="epoch", gradient_accumulation_steps=2,
    label_smoothing_factor=0.1, optim="sgd", learning_rate=0.3, warmup_steps=0, lr_scheduler_type="constant",
    weight_decay=0.0, max_grad_norm=0.0, grad_cache_chunk_size=chunk or None, distillation=5.0)
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    parameters = {{name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}}
    (folder / "result.json").write_text(json.dumps([losses(trainer), parameters, metrics]))
leave()
"""


def run_processes(folder: Path, count: int, batch: int, chunk: int = 0) -> Any:
    folder.mkdir()
    run_ranks(WORKER.format(tests=import_paths(__file__)), folder, batch, chunk, count=count)
    return json.loads((folder / "result.json").read_text())


def test_two_processes_train_as_one_with_the_joined_batch(tmp_path: Path) -> None:
    """Negatives across ranks, gradients scaled for DDP's mean, same draws: only the order of sums differs. (Plain SGD,
    since Adam would hide a wrong factor.)
    """
    one, two = run_processes(tmp_path / "one", 1, 8), run_processes(tmp_path / "two", 2, 4)
    chunked = run_processes(tmp_path / "chunked", 2, 4, 3)
    assert len(one[0]) == 4
    assert chunked[0] == pytest.approx(one[0], rel=1e-5)
    for name, value in one[1].items():
        assert chunked[1][name] == pytest.approx(value, rel=1e-3, abs=1e-2), name
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    for name, value in one[1].items():
        assert two[1][name] == pytest.approx(value, rel=1e-3, abs=1e-2), name
    for name, value in one[2].items():
        if "R@" in name:
            assert two[2][name] == pytest.approx(value, abs=0.06), name
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert len(list((tmp_path / "two" / "checkpoint-4").glob("rng_state_*.pth"))) == 2
