"""MetaCLIP 2 and Chinese-CLIP through the same functions as CLIP; transformers' own models are the truth."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import SIZE, captioned, check_gradients, class_folders, labelled, picture
from tiny_families import KINDS, tiny_family
from tiny_trainer import losses, trainer_of
from torch import nn
from transformers import ChineseCLIPModel, MetaClip2Model
from typer.testing import CliRunner

import clipft
from clipft.cli import app
from clipft.data.collate import CLIPDataCollator, tokenize
from clipft.data.rows import PairRows
from clipft.families.registry import family_of
from clipft.training.feature_cache import FrozenTowers, frozen_towers

CLASSES = {"metaclip_2": MetaClip2Model, "chinese_clip": ChineseCLIPModel}
TITLES = {"metaclip_2": "MetaCLIP 2", "chinese_clip": "Chinese-CLIP"}
TEXTS = ["a red square", "x", "一张红色的方块照片", "A RED SQUARE, a second one and more than fits"]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # a BERT without dropout


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def still(kind: str, seed: int = 0) -> tuple[Any, Any]:
    return tiny_family(kind, seed, **(STILL if kind == "chinese_clip" else {}))


def saved(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def inputs_of(model: Any, processor: Any, count: int = 6) -> dict[str, torch.Tensor]:
    pixels = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    texts = [*TEXTS, *(picture(index)[1] for index in range(count))][:count]
    return {"pixel_values": pixels, **tokenize(processor, texts, family=family_of(model))}


def names(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- what goes in ----


def test_loaded_it_takes_what_its_processor_makes(kind: str, tmp_path: Path) -> None:
    plain, own = tiny_family(kind)
    model, processor = clipft.load(saved(plain, own, tmp_path))
    assert type(model) is CLASSES[kind] and type(processor) is type(own) and not model.training
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    rows = PairRows(captioned(5))
    batch = CLIPDataCollator(processor, family=family_of(model))([rows[index] for index in range(5)])
    pictures, texts = zip(*((rows[index]["image"], rows[index]["captions"][0]) for index in range(5)), strict=True)
    want = own(text=list(texts), images=list(pictures), padding=True, truncation=True, return_tensors="pt")
    for name in ("pixel_values", "input_ids", "attention_mask"):
        assert torch.equal(batch[name], want[name]), name
    with torch.no_grad():  # without the token types that BERT's tokenizer gives, which are those of one text
        output = plain(**want)
    texts = clipft.embed(model, processor, texts=list(texts))
    torch.testing.assert_close(texts, output.text_embeds)
    torch.testing.assert_close(clipft.embed(model, processor, images=list(pictures)), output.image_embeds)


def test_padding_changes_no_text(kind: str, tmp_path: Path) -> None:
    model, processor = clipft.load(saved(*tiny_family(kind), tmp_path))
    together = clipft.embed(model, processor, texts=TEXTS)
    alone = torch.cat([clipft.embed(model, processor, texts=[text]) for text in TEXTS])
    torch.testing.assert_close(together, alone)
    assert torch.pdist(together).min() > 1e-3


def test_texts_that_end_elsewhere_are_refused(tmp_path: Path) -> None:
    model, processor = tiny_family("metaclip_2", eos_token_id=7)
    with pytest.raises(ValueError, match=r"texts end with token 7 .* ends them with 2"):
        clipft.load(saved(model, processor, tmp_path))
    processor.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="expected a tokenizer that ends texts with its end token"):
        family_of(model).fit_tokenizer(model, processor.tokenizer)


def test_a_bert_is_pooled_at_its_first_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which padding on the left would be."""
    model, processor = tiny_family("chinese_clip")
    want = clipft.embed(model, processor, texts=TEXTS)
    config = saved(model, processor, tmp_path) / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "left"}))
    loaded = clipft.load(tmp_path)
    torch.testing.assert_close(clipft.embed(*loaded, texts=TEXTS), want)
    assert any("padded on the right" in line for line in caplog.messages)
    processor.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"expected a tokenizer that begins texts with \[CLS\]"):
        family_of(model).fit_tokenizer(model, processor.tokenizer)


# ---- fuse ----


def test_fused_loss_and_gradients_are_those_of_transformers(kind: str) -> None:
    """In float64 transformers' own loss is the truth."""
    plain, processor = tiny_family(kind)
    fused, exact = clipft.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    inputs, found = inputs_of(plain, processor), {}
    for name, model in (("plain", plain), ("fused", fused), ("exact", exact)):
        output = model(**inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}, return_loss=True)
        found[name] = output.loss
        output.loss.backward()
    assert abs(found["fused"] - found["exact"]) <= 1e-6 * found["exact"]
    check_gradients(fused, plain, exact)
    double = clipft.fuse(copy.deepcopy(exact))(**inputs | {"pixel_values": inputs["pixel_values"].double()})
    torch.testing.assert_close(double.logits_per_image, exact(**inputs).logits_per_image, rtol=1e-12, atol=1e-12)


def test_the_last_layer_computes_the_class_token_unless_all_are_asked_for(kind: str) -> None:
    model, processor = tiny_family(kind)
    inputs, last, seen = inputs_of(model, processor), model.vision_model.encoder.layers[-1], []
    plain = model(**inputs)
    clipft.fuse(model)
    handle = last.layer_norm2.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    assert model(**inputs, return_loss=True).image_embeds is not None and seen == [5]  # a hook waits for all tokens
    handle.remove()
    few = model(**inputs, return_loss=True)
    assert few.logits_per_image is None and few.vision_model_output.last_hidden_state is None
    torch.testing.assert_close(few.image_embeds, plain.image_embeds)
    every = model(**inputs, return_loss=True, return_logits=True)
    torch.testing.assert_close(every.logits_per_text, plain.logits_per_text)
    torch.testing.assert_close(every.vision_model_output.last_hidden_state, plain.vision_model_output.last_hidden_state)
    assert len(model(**inputs, output_hidden_states=True, return_loss=True).vision_model_output.hidden_states) == 4


def test_fuse_is_undone_copied_pickled_and_saved(kind: str, tmp_path: Path) -> None:
    model, processor = tiny_family(kind)
    inputs, classes = inputs_of(model, processor), [type(module) for module in model.modules()]
    assert clipft.fuse(clipft.fuse(model)) is model
    assert type(model) is not CLASSES[kind] and isinstance(model, CLASSES[kind])
    want = model(**inputs, return_loss=True).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(twin(**inputs, return_loss=True).loss, want)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [CLASSES[kind].__name__]
    assert [type(module) for module in clipft.unfuse(model).modules()] == classes


# ---- freeze ----


def test_freeze(kind: str) -> None:
    model = tiny_family(kind)[0]
    everything, layers = names(model, ""), family_of(model).text.layers
    assert trained(clipft.freeze(model, "text")) == everything - names(model, "text_model", "text_projection")
    assert trained(clipft.freeze(model, "towers")) == names(model, "visual_proj", "text_proj", "logit_scale")
    below = ("text_model.embeddings", f"{layers}.0.", f"{layers}.1.")
    assert trained(clipft.freeze(model, "text:1,vision")) == everything - names(model, *below, "vision", "visual")
    assert trained(clipft.freeze(model, "none")) == everything


def test_a_tower_is_frozen_if_it_is_not_random(kind: str) -> None:
    assert frozen_towers(clipft.freeze(still(kind)[0], "towers")) == {"vision", "text"}
    model = tiny_family(kind, **({"hidden_dropout_prob": 0.0} if kind == "chinese_clip" else {}))[0]
    assert frozen_towers(clipft.freeze(model, "towers")) == {"vision", *(["text"] if kind == "metaclip_2" else [])}


def test_frozen_features_are_what_the_projection_takes(kind: str, tmp_path: Path) -> None:
    model, processor = still(kind)
    features = FrozenTowers(clipft.freeze(model, "towers"), processor, tmp_path).texts(TEXTS)
    with torch.no_grad():
        want = model.get_text_features(**tokenize(processor, TEXTS, family=family_of(model))).pooler_output
        torch.testing.assert_close(model.text_projection(features), want)
    losses_of = []
    for cache in (True, False):
        own, _ = still(kind)
        options = {"cache_frozen": cache, "num_train_epochs": 3}
        trainer = trainer_of(
            tmp_path / str(cache), captioned(16), loaded=(clipft.freeze(own, "towers"), processor), **options
        )
        trainer.train()
        losses_of.append(losses(trainer))
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4)


def test_layer_decay(kind: str, tmp_path: Path) -> None:
    model, processor = tiny_family(kind)
    trainer = trainer_of(tmp_path, captioned(8), loaded=(model, processor), layer_decay=0.5, learning_rate=1.0)
    rate = {own: group["lr"] for group in trainer.create_optimizer().param_groups for own in group["params"]}
    layers = family_of(model).text.layers
    for prefix, power in (("text_model.embeddings", 4), (f"{layers}.0.", 3), (f"{layers}.2.", 1), ("text_proj", 0)):
        assert {rate[model.get_parameter(name)] for name in names(model, prefix)} == {0.5**power}, prefix


# ---- LoRA ----


def test_lora_reaches_the_linears_of_each_tower_and_computes_what_peft_does(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, processor = still(kind)
    adapted = clipft.add_lora(model, r=4, dropout=0.0)
    linears = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert len(linears) == 2 * 3 * 6  # of a BERT query, key, value and three dense
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    plain = clipft.unfuse(copy.deepcopy(adapted))
    kinds = {type(module).__mro__[1].__name__ for module in adapted.modules() if type(module).__name__.endswith("MLP")}
    assert kinds == {"ActivationAfter"}
    inputs = inputs_of(model, processor)
    for one in (adapted, plain):
        one.train()(**inputs, return_loss=True).loss.backward()
    for own, other in zip(adapted.parameters(), plain.parameters(), strict=True):
        if own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=2e-5)  # of gradients up to 2


def test_lora_by_name_and_its_folder(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, processor = clipft.load(saved(*still(kind), tmp_path / "base"))
    with pytest.raises(ValueError, match="'c_fc' matches nothing"):
        clipft.add_lora(model, targets="text:c_fc")
    own = {"metaclip_2": ("q_proj", 1), "chinese_clip": ("dense", 3)}[kind]
    adapted = clipft.add_lora(model, r=2, targets=f"text.last1:{own[0]}")
    assert len([name for name in trained(adapted) if "lora_A" in name]) == own[1]
    trainer_of(tmp_path / "run", captioned(8), loaded=(adapted, processor), learning_rate=1e-2).train()
    adapted.save_pretrained(tmp_path / "adapter")
    merged, its = clipft.load(tmp_path / "adapter")
    assert type(merged) is CLASSES[kind]
    want = clipft.embed(adapted.eval(), processor, texts=TEXTS)
    torch.testing.assert_close(clipft.embed(merged, its, texts=TEXTS), want, rtol=1e-4, atol=1e-5)
    assert (want - clipft.embed(*clipft.load(tmp_path / "base"), texts=TEXTS)).abs().max() > 1e-4


# ---- training and evaluation ----


def test_training_starts_at_transformers_loss_and_learns(kind: str, tmp_path: Path) -> None:
    model, processor = still(kind)
    plain, data = copy.deepcopy(model), captioned(8)
    options = {"num_train_epochs": 30, "augmentation": "none"}
    trainer = trainer_of(tmp_path, data, data, loaded=(model, processor), **options)
    batch = trainer.data_collator([PairRows(data)[index] for index in range(8)])
    batch.pop("labels")
    want = plain(**batch, return_loss=True).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(want, rel=1e-5)
    assert losses(trainer)[-1] < 0.95 * want  # BERT's, with norms after its layers, begin slowly
    found = clipft.evaluate_retrieval(trainer.model, processor, data)
    own = trainer.evaluate()
    assert all(own[f"eval_{name}"] == value for name, value in found.items() if "R@" in name)


def test_gradient_caching_draws_the_same_dropout(tmp_path: Path) -> None:
    """Each chunk runs twice: the second time with the random numbers of the first."""
    runs = []
    for chunk in (None, 8):
        options = {"grad_cache_chunk_size": chunk, "optim": "sgd", "num_train_epochs": 1, "learning_rate": 1.0}
        trainer = trainer_of(tmp_path, captioned(8), loaded=tiny_family("chinese_clip"), **options)
        trainer.train()
        runs.append(trainer.model.text_projection.weight.detach())
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-6)


def test_zero_shot_and_a_head(kind: str) -> None:
    model, processor = tiny_family(kind)
    found = clipft.evaluate_zero_shot(model, processor, labelled(8), ["red", "green", "blue", "yellow"])
    assert len(found["per_class"]) == 4
    clipft.add_head(model, processor, ["red", "blue"], templates=["a {} square"])
    assert clipft.classify(model, processor, [picture(0)[0]]).shape == (1, 2)


# ---- the command line ----


def run(*arguments: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def test_the_commands(kind: str, tmp_path: Path) -> None:
    folder = saved(*tiny_family(kind), tmp_path / "model")
    data = class_folders(tmp_path / "data", 24)
    quick = ("--epochs", 1, "--batch-size", 8, "--control-data", "none")
    run("train", "--model", folder, "--data", data, "--output", tmp_path / "run", *quick)
    assert {"before", "after"} <= json.loads((tmp_path / "run" / "report.json").read_text()).keys()
    assert type(clipft.load(tmp_path / "run")[0]) is CLASSES[kind]
    run("embed", "--model", tmp_path / "run", "--data", data, "--output", tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").shape == (24, 16)
    clipft.doctor(data, model=tmp_path / "run", json=tmp_path / "doctor.json")
    assert json.loads((tmp_path / "doctor.json").read_text())["model"]["family"] == kind
    assert f"{TITLES[kind]}: {CLASSES[kind].__name__}" in run("env")
