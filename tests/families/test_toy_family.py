"""A family that shares no name with CLIP goes through the public functions by its row alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import captioned, labelled, picture
from tiny_trainer import losses, trainer_of
from torch import nn
from toy import DEPTHS, TOY, ToyModel, toy
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import clipft
from clipft.data.collate import tokenize
from clipft.families.registry import FAMILIES, family_of
from clipft.training.feature_cache import FrozenTowers, frozen_towers

TEXTS = ["a red square", "a blue bar", "x"]


@pytest.fixture(autouse=True)
def row() -> Iterator[None]:
    """The family, for one test."""
    AutoConfig.register("toy", ToyModel.config_class)
    FAMILIES.append(TOY)
    yield
    FAMILIES.remove(TOY)
    del CONFIG_MAPPING._extra_content["toy"]


def saved(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def inputs(processor: Any, count: int = 6) -> dict[str, torch.Tensor]:
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, **tokenize(processor, [picture(i)[1] for i in range(count)], family=TOY)}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def plain_text(model: Any, processor: Any, texts: list[str]) -> torch.Tensor:
    tokens = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        return nn.functional.normalize(model.word_out(model.words(tokens["input_ids"]).pooler_output), dim=-1)


# ---- models ----


def test_the_row_is_needed() -> None:
    FAMILIES.remove(TOY)
    try:
        with pytest.raises(TypeError, match=r"expected a CLIPModel, .* or OpenCLIPModel, got ToyModel"):
            clipft.freeze(toy()[0], "none")
    finally:
        FAMILIES.append(TOY)


@pytest.mark.parametrize(
    ("strategy", "prefixes"),
    [
        ("none", ("",)),
        ("vision", ("words", "word_out", "logit_scale")),
        ("text", ("pictures", "picture_out", "logit_scale")),
        ("towers", ("picture_out", "word_out", "logit_scale")),
        ("vision:1", ("pictures.blocks.2", "pictures.close", "picture_out", "words", "word_out", "logit_scale")),
        ("text:2", ("words.blocks", "words.close", "word_out", "pictures", "picture_out", "logit_scale")),
    ],
)
def test_freeze(strategy: str, prefixes: tuple[str, ...]) -> None:
    model = clipft.freeze(toy()[0], strategy)
    assert trained(model) == names(model, *prefixes)


def test_fused_it_computes_what_torch_computes() -> None:
    model, processor = toy()
    plain, batch = copy.deepcopy(model), inputs(processor)
    want, got = plain(**batch), clipft.fuse(model)(**batch, return_loss=True)
    assert got.logits_per_image is None
    torch.testing.assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(model(**batch, return_logits=True).logits_per_image, want.logits_per_image)
    assert type(clipft.unfuse(model)) is ToyModel


def test_fused_it_can_be_pickled_and_copied() -> None:
    model, processor = toy()
    batch = inputs(processor)
    want = clipft.fuse(model)(**batch, return_loss=True).loss
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        assert torch.equal(other(**batch, return_loss=True).loss, want)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, processor = toy()
    loaded, its = clipft.load(saved(model, processor, tmp_path))
    assert type(loaded) is ToyModel
    assert its.tokenizer.model_max_length == TOY.most_positions(model.config)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_captions_are_padded_by_the_model_and_not_by_the_processor(tmp_path: Path) -> None:
    """CLIP's row stands before it and has the same processor."""
    model, processor = clipft.load(saved(*toy(), tmp_path))
    want = plain_text(model, processor, TEXTS)
    torch.testing.assert_close(clipft.embed(model, processor, texts=TEXTS), want)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(clipft.embed(model, processor, texts=[text]), want[row : row + 1])


def test_zero_shot_heads_start_from_its_texts() -> None:
    model, processor = toy()
    clipft.add_head(model, processor, ["red", "blue"], templates=["a {} square"])
    want = plain_text(model, processor, ["a red square", "a blue square"]) * model.logit_scale.exp()
    torch.testing.assert_close(model.heads[0].weight, want)
    assert clipft.classify(model, processor, [picture(0)[0]]).shape == (1, 2)


# ---- LoRA ----


def test_lora_by_target() -> None:
    model = clipft.add_lora(toy()[0], r=2, targets=["vision.last1", "text"])
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in trained(model)}
    layers = ["pictures.blocks.2", *(f"words.blocks.{layer}" for layer in range(DEPTHS["text"]))]
    assert adapted == {f"{layer}.{linear}" for layer in layers for linear in ("mix", "up", "down")}
    with pytest.raises(ValueError, match=r"vision \(layers 0-2\) and text \(layers 0-1\) with mix, up, down, and pic"):
        clipft.add_lora(toy()[0], targets="q_proj")


def test_an_adapter_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    base = saved(*toy(), tmp_path / "base")
    model, processor = clipft.load(base)
    model = clipft.add_lora(model, r=4, targets=["vision.last1", "text"])
    start = copy.deepcopy(model)
    trainer = trainer_of(tmp_path / "out", captioned(24), loaded=(model, processor), learning_rate=2e-2)
    trainer.train()
    assert np.mean(losses(trainer)[-3:]) < np.mean(losses(trainer)[:3])
    changed = {
        n for (n, a), b in zip(model.named_parameters(), start.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed == trained(model)
    model.save_pretrained(tmp_path / "adapter")
    merged, its = clipft.load(tmp_path / "adapter")
    assert type(merged) is ToyModel
    want = clipft.embed(model, processor, texts=TEXTS)
    torch.testing.assert_close(clipft.embed(merged, its, texts=TEXTS), want, atol=1e-5, rtol=1e-4)


# ---- training ----


def test_training(tmp_path: Path) -> None:
    data = captioned(32)
    trainer = trainer_of(tmp_path, data, data, loaded=toy(), num_train_epochs=6, learning_rate=3e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.2
    model, processor = trainer.model, trainer.processing_class
    measured = clipft.evaluate_retrieval(model, processor, data)
    for name in ("image_to_text_R@1", "text_to_image_R@1"):
        assert measured[name] == pytest.approx(after[f"eval_{name}"])
    texts = plain_text(model, processor, list(data["caption"]))
    images = clipft.embed(model, processor, images=data)
    right = (images @ texts.t()).argmax(1) == torch.arange(len(data))
    assert measured["image_to_text_R@1"] == pytest.approx(float(right.float().mean()))


def test_the_scale_ends_at_the_family_s_ceiling(tmp_path: Path) -> None:
    model, processor = toy()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    trainer_of(tmp_path, captioned(8), loaded=(model, processor), num_train_epochs=1).train()
    assert model.logit_scale.item() == pytest.approx(TOY.max_log_scale)


def test_a_head_is_trained(tmp_path: Path) -> None:
    data = labelled(32)
    options = {"head": "text", "num_train_epochs": 6, "learning_rate": 5e-3}
    trainer = trainer_of(tmp_path, data, data, loaded=toy(), **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert not trained(trainer.model) & names(trainer.model, "words", "word_out", "logit_scale")


def calls_of(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_hook(lambda own, args, kwargs, output: seen.append(len(output[0])), with_kwargs=True)
    return seen


@pytest.mark.parametrize(("tower", "module", "other"), [("vision", "pictures", "words"), ("text", "words", "pictures")])
def test_a_frozen_tower_runs_once(tmp_path: Path, tower: str, module: str, other: str) -> None:
    runs = {}
    for cached in (True, False):
        model, processor = toy()
        clipft.freeze(model, f"{tower}")
        getattr(model, {"pictures": "picture_out", "words": "word_out"}[module]).requires_grad_(True)
        assert frozen_towers(model) == {tower}
        seen, trains = calls_of(getattr(model, module)), calls_of(getattr(model, other))
        trainer = trainer_of(
            tmp_path / str(cached), captioned(16), loaded=(model, processor), num_train_epochs=3, cache_frozen=cached
        )
        trainer.train()
        assert sum(seen) == (16 if cached else 48)
        assert sum(trains) == 48
        runs[cached] = losses(trainer)
    assert runs[True] == pytest.approx(runs[False], rel=1e-4)


def test_a_tower_with_dropout_is_not_frozen() -> None:
    assert frozen_towers(clipft.freeze(toy(forget=0.1)[0], "towers")) == {"text"}


def test_a_parameter_of_the_tower_itself_counts(tmp_path: Path) -> None:
    model, processor = toy()
    clipft.freeze(model, "text")
    model.words.places.requires_grad_(True)
    assert "text" not in frozen_towers(model)
    model.words.places.requires_grad_(False)
    before = FrozenTowers(model, processor, tmp_path).texts(TEXTS)
    with torch.no_grad():
        model.words.places.neg_()
    assert not torch.allclose(FrozenTowers(model, processor, tmp_path).texts(TEXTS), before)


def depth(name: str) -> int:
    """As told to a reader: 0 above the layers, 1 the last layer, then one more a layer; first and places at the end."""
    module, part, *rest = [*name.split("."), ""]
    tower = {"pictures": "vision", "words": "text"}.get(module)
    if tower is None or part == "close":
        return 0
    return DEPTHS[tower] - int(rest[0]) if part == "blocks" else DEPTHS[tower] + 1


def test_layer_decay(tmp_path: Path) -> None:
    options = {"layer_decay": 0.5, "learning_rate": 1.0}
    trainer = trainer_of(tmp_path, captioned(8), loaded=toy(), **options)
    rate = {
        parameter: group["lr"] for group in trainer.create_optimizer().param_groups for parameter in group["params"]
    }
    found = {name: rate[parameter] for name, parameter in trainer.model.named_parameters()}
    assert found == {name: 0.5 ** depth(name) for name in found}
    assert {depth(name) for name in found} == set(range(DEPTHS["vision"] + 2))


def test_gradual_unfreezing(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    seen: list[set[str]] = []

    class Look(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(trained(trainer.model))

    options = {"gradual_unfreezing": 1.0, "num_train_epochs": 4, "callbacks": [Look()]}
    trainer = trainer_of(tmp_path, captioned(8), loaded=toy(), **options)
    trainer.train()
    every = names(trainer.model, "")
    assert seen == [{name for name in every if depth(name) <= epoch} for epoch in (1, 2, 3, 4)]


def test_a_checkpoint_resumes_and_loads(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    whole = trainer_of(tmp_path, captioned(16), loaded=toy(), **options)
    whole.train()
    again = trainer_of(tmp_path, captioned(16), loaded=toy(seed=1), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    model, _ = clipft.load(tmp_path / "checkpoint-4")
    torch.testing.assert_close(model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


# ---- export ----


def test_onnx_computes_what_torch_computes(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, processor = toy()
    report = clipft.export_onnx(model, processor, tmp_path, data=captioned(6))
    assert report["fp32"]["text_cosine"]["min"] > 1 - 1e-5
    onnx = clipft.OnnxCLIP(tmp_path)
    pictures = [picture(index)[0] for index in range(3)]
    np.testing.assert_allclose(onnx.encode_texts(TEXTS), plain_text(model, processor, TEXTS), atol=2e-6)
    np.testing.assert_allclose(onnx.encode_images(pictures), clipft.embed(model, processor, pictures), atol=2e-6)


def test_what_the_family_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, processor = toy()
    with pytest.raises(ValueError, match=r"int8 takes a CLIPModel, .* or SiglipModel so far, got a ToyModel"):
        clipft.quantize(model)
    with pytest.raises(ValueError, match=r"int8: expected a CLIPModel, .* or SiglipModel, got a ToyModel"):
        clipft.export_onnx(model, processor, tmp_path / "out", int8=True, data=captioned(4))
    assert not (tmp_path / "out").exists()
    assert family_of(model) is TOY


def test_errors_name_the_families_that_have_the_use() -> None:
    from tiny_siglip import tiny_model

    with pytest.raises(ValueError, match=r"onnx takes a CLIPModel, .* or ToyModel so far, got a Siglip2Model"):
        clipft.export_onnx(tiny_model("naflex"), None, "nowhere")
