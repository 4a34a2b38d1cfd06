"""SigLIP and SigLIP 2 through the same functions as CLIP: what a checkpoint of each kind gives, and what differs."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import captioned, check_gradients, class_folders, labelled, picture
from tiny_clip import tiny_model as tiny_clip_model
from tiny_siglip import KINDS, LENGTH, PATCHES, tiny_inputs, tiny_model, tiny_siglip
from tiny_trainer import losses, trainer_of
from transformers import Siglip2Model, SiglipModel
from typer.testing import CliRunner

import clipft
from clipft.cli import app
from clipft.data.collate import CLIPDataCollator, tokenize
from clipft.data.rows import PairRows
from clipft.data.transforms import Augmentation
from clipft.training.feature_cache import frozen_towers

pytest.importorskip("sentencepiece")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(kind)
    model, processor = tiny_siglip(kind, path / "tokenizer")
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    return path / "model"


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Any]:
    return clipft.load(folder)


# ---- load ----


def test_load_gives_the_model_its_class_and_the_tokenizer_its_length(kind: str, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    assert type(model) is (Siglip2Model if kind == "naflex" else SiglipModel)
    assert not model.training
    assert processor.image_processor.backend == "torchvision"
    assert processor.tokenizer.model_max_length == LENGTH


def test_a_tokenizer_without_sentencepiece_names_the_extra(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("SiglipTokenizer requires the SentencePiece library but it was not found")

    processor = type(clipft.load(folder)[1])
    monkeypatch.setattr(processor, "from_pretrained", missing)
    with pytest.raises(ImportError, match=r"pip install 'clipft\[siglip\]'"):
        clipft.load(folder)


# ---- what goes in ----


def test_batches_are_those_of_the_processor(kind: str, loaded: tuple[Any, Any]) -> None:
    """Pictures bit for bit, captions padded to the full length: the last token, padding or not, is what is pooled."""
    processor = loaded[1]
    rows = PairRows(captioned(5))
    batch = CLIPDataCollator(processor)([rows[index] for index in range(5)])
    pictures, captions = zip(*((rows[index]["image"], rows[index]["captions"][0]) for index in range(5)), strict=True)
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    expected = {
        **processor.image_processor(list(pictures), return_tensors="pt"),
        **processor.tokenizer(list(captions), return_tensors="pt", **options),
    }
    assert set(batch) == {*expected, "labels"}
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    assert batch["input_ids"].shape == (5, LENGTH)
    assert ("pixel_attention_mask" in batch) == (kind == "naflex")


def test_the_tokenizer_lowers_letters(loaded: tuple[Any, Any]) -> None:
    ids = tokenize(loaded[1], ["A Red Square", "a red square"])["input_ids"]
    assert torch.equal(ids[0], ids[1])


def test_augmentation_is_drawn_by_the_row_and_keeps_the_shape(kind: str, loaded: tuple[Any, Any]) -> None:
    collator = CLIPDataCollator(loaded[1], augmentation=Augmentation(random_resized_crop=0.3, horizontal_flip=0.5))
    rows = PairRows(captioned(4))
    drawn = [collator([rows[(epoch, index)] for index in range(4)])["pixel_values"] for epoch in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].shape == drawn[2].shape == collator([rows[index] for index in range(4)])["pixel_values"].shape
    assert not torch.equal(drawn[0], drawn[2])


def test_naflex_keeps_the_aspect_ratio(tmp_path: Path) -> None:
    collator = CLIPDataCollator(tiny_siglip("naflex", tmp_path)[1])
    wide = picture(0)[0].resize((120, 30))
    batch = collator([{"image": wide, "caption": "one"}, {"image": wide.rotate(90, expand=True), "caption": "two"}])
    rows, columns = batch["spatial_shapes"][0].tolist()
    assert columns > 2 * rows
    assert rows * columns <= PATCHES
    assert batch["spatial_shapes"][1].tolist() == [columns, rows]
    assert batch["pixel_attention_mask"].sum(1).tolist() == [rows * columns] * 2


# ---- freeze ----


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names(model: Any, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def test_freeze(kind: str) -> None:
    model = tiny_model(kind)
    everything = names(model, "")
    heads = names(model, "vision_model.head.", "text_model.head.")
    assert len(heads) > 4
    assert trainable(clipft.freeze(model, "text")) == everything - names(model, "text_model.")
    assert trainable(clipft.freeze(model, "vision")) == everything - names(model, "vision_model.")
    assert trainable(clipft.freeze(model, "towers")) == heads | {"logit_scale", "logit_bias"}
    first = ("vision_model.embeddings", "vision_model.encoder.layers.0.", "vision_model.encoder.layers.1.")
    assert trainable(clipft.freeze(model, "vision:1")) == everything - names(model, *first)
    assert trainable(clipft.freeze(model, "text:3")) == everything - names(model, "text_model.embeddings")
    with pytest.raises(ValueError, match="from 1 to 3"):
        clipft.freeze(model, "text:4")
    assert trainable(clipft.freeze(model, "none")) == everything


def test_a_tower_whose_head_trains_is_not_frozen(kind: str) -> None:
    model = tiny_model(kind)
    assert frozen_towers(clipft.freeze(model, "towers")) == frozenset()
    assert frozen_towers(clipft.freeze(model, "vision")) == {"vision"}


# ---- fuse ----


def test_fused_loss_and_gradients_are_those_of_transformers(kind: str) -> None:
    """In float64 transformers' own loss is the truth."""
    plain, inputs = tiny_model(kind), tiny_inputs(kind)
    fused, exact = clipft.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    losses = {}
    for name, model in (("plain", plain), ("fused", fused), ("exact", exact)):
        own = inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}
        losses[name] = model(**own, return_loss=True).loss
        losses[name].backward()
    assert abs(losses["fused"] - losses["exact"]) <= 1e-6 * losses["exact"]
    check_gradients(fused, plain, exact)


def test_logits_only_when_asked(kind: str) -> None:
    model, inputs = tiny_model(kind), tiny_inputs(kind)
    expected = model(**inputs).logits_per_image
    clipft.fuse(model)
    assert model(**inputs, return_loss=True).logits_per_image is None
    torch.testing.assert_close(model(**inputs, return_loss=True, return_logits=True).logits_per_image, expected)
    torch.testing.assert_close(model(**inputs).logits_per_text, expected.t())
    assert torch.equal(model(**inputs, return_loss=True, return_dict=False)[0], model(**inputs, return_loss=True).loss)


def test_a_tower_alone(kind: str) -> None:
    model, inputs = clipft.fuse(tiny_model(kind)), tiny_inputs(kind)
    both = model(**inputs, return_logits=False)
    ids = inputs.pop("input_ids")
    alone = model(input_ids=ids, return_logits=False)
    assert alone.image_embeds is None
    assert torch.equal(alone.text_embeds, both.text_embeds)
    assert torch.equal(model(**inputs, return_logits=False).image_embeds, both.image_embeds)
    with pytest.raises(ValueError, match="expected pixel_values and input_ids"):
        model(**inputs, return_loss=True)


def test_fuse_is_undone_copied_pickled_and_saved(kind: str, tmp_path: Path) -> None:
    model, inputs = tiny_model(kind), tiny_inputs(kind)
    plain, before, state = type(model), dict(vars(model)), dict(model.named_parameters())
    assert clipft.fuse(model) is model
    assert clipft.fuse(model) is model
    assert type(model) is not plain
    assert (type(model).__name__, isinstance(model, plain)) == (plain.__name__, True)
    expected = model(**inputs, return_loss=True).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin(**inputs, return_loss=True).loss, expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [plain.__name__]
    assert type(plain.from_pretrained(tmp_path)) is plain
    assert clipft.unfuse(model) is model
    assert type(model) is plain
    assert vars(model).keys() == before.keys()
    assert all(parameter is state[name] for name, parameter in model.named_parameters())


# ---- LoRA ----


def test_lora_targets_and_an_adapter_folder(kind: str, folder: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = loaded[0], tiny_inputs(kind)
    adapted = clipft.add_lora(model, r=4, dropout=0.0, targets=("vision.last2", "text.0:q_proj", "head"))
    layers = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(layers) == 2 * 6 + 1 + 1
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = adapted(**inputs, return_loss=True).loss
    adapted.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    merged, _ = clipft.load(tmp_path)
    torch.testing.assert_close(merged(**inputs, return_loss=True).loss, loss, rtol=1e-5, atol=0)


def test_an_adapter_is_never_put_where_it_would_do_nothing(kind: str) -> None:
    """torch's MultiheadAttention, in the pooling head, reads its out_proj's weight and calls no forward."""
    pytest.importorskip("peft")
    adapted = clipft.add_lora(tiny_model(kind), targets="out_proj")
    assert not any("head.attention" in name for name, _ in adapted.named_parameters() if "lora_" in name)


# ---- the trainer ----


def test_the_first_loss_is_that_of_transformers(kind: str, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    plain, train = copy.deepcopy(loaded[0]), captioned(8)
    trainer = trainer_of(tmp_path, train, train, loaded=loaded, num_train_epochs=30, augmentation="none")
    inputs = trainer.data_collator([PairRows(train)[index] for index in range(8)])
    inputs.pop("labels")
    expected = plain(**inputs, return_loss=True).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert losses(trainer)[-1] < 0.5 * expected
    assert not torch.equal(trainer.model.logit_bias, plain.logit_bias)


def test_rows_of_equal_label_are_positives(kind: str, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, labelled(8), labelled(8), loaded=loaded)
    rows = PairRows(labelled(8))
    inputs = trainer.data_collator([rows[index] for index in range(8)])
    with torch.no_grad():
        out = trainer.model(**{name: x for name, x in inputs.items() if name != "labels"}, return_logits=False)
    embeds = out.image_embeds.double(), out.text_embeds.double()
    expected = clipft.reference.sigmoid_loss(
        *embeds, out.logit_scale.double(), out.logit_bias.double(), labels=inputs["labels"]
    )
    assert len(inputs["input_ids"]) == 4  # four colours, each encoded once
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_contrastive_loss_on_request(kind: str, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    train, bias = captioned(8), loaded[0].logit_bias.clone()
    trainer = trainer_of(
        tmp_path, train, loaded=loaded, loss="contrastive", num_train_epochs=3, label_smoothing_factor=0.1
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(2.08, abs=0.4)  # near log 8
    assert torch.equal(trainer.model.logit_bias, bias)


def test_a_loss_that_does_not_fit_is_an_error(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing_factor: the sigmoid loss"):
        trainer_of(tmp_path, captioned(8), loaded=loaded, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="loss: expected one of auto, contrastive, sigmoid, got 'softmax'"):
        trainer_of(tmp_path, captioned(8), loaded=loaded, loss="softmax")
    with pytest.raises(ValueError, match=r"loss: 'sigmoid' needs the logit bias .* CLIPModel has none"):
        trainer_of(tmp_path, captioned(8), loaded=(tiny_clip_model(), loaded[1]), loss="sigmoid")


def test_a_scale_above_clips_ceiling_stays(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """SigLIP's published checkpoints have a scale of 110 to 120."""
    with torch.no_grad():
        loaded[0].logit_scale.fill_(4.77)
    trainer = trainer_of(tmp_path, captioned(8), loaded=loaded, learning_rate=1e-6)
    trainer.train()
    assert trainer.model.logit_scale.item() == pytest.approx(4.77, abs=1e-4)


def test_gradient_caching_gives_the_same_run(folder: Path, tmp_path: Path) -> None:
    runs = []
    for chunk in (None, 3):
        trainer = trainer_of(
            tmp_path, captioned(16), loaded=clipft.load(folder), grad_cache_chunk_size=chunk, optim="sgd"
        )
        trainer.train()
        runs.append((losses(trainer), trainer.model.logit_bias.item()))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-5)


@pytest.mark.parametrize("frozen", ["text", "vision"])
def test_a_frozen_tower_runs_once(folder: Path, tmp_path: Path, frozen: str) -> None:
    runs = []
    for cache in (True, False):
        model, processor = clipft.load(folder)
        clipft.freeze(model, frozen)
        counted = model.get_submodule(f"{frozen}_model")
        calls: list[int] = []
        counted.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        options = {"cache_frozen": cache, "num_train_epochs": 4}
        trainer = trainer_of(tmp_path / str(cache), captioned(16), loaded=(model, processor), **options)
        trainer.train()
        runs.append((losses(trainer), len(calls)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert (runs[0][1], runs[1][1]) == (2, 8)


# ---- evaluation ----


def test_evaluation_ranks_as_the_logits_do(folder: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """By cosine; the scale and bias change no order. And the trainer's own metrics are the same."""
    model, processor = loaded
    data = captioned(12)
    rows = PairRows(data)
    inputs = CLIPDataCollator(processor)([rows[index] for index in range(12)])
    inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    ranks = (logits > logits.diagonal()[:, None]).sum(1)
    metrics = clipft.evaluate_retrieval(model, processor, data)
    assert metrics["image_to_text_R@5"] == pytest.approx((ranks < 5).double().mean().item())
    trainer = trainer_of(tmp_path, data, data, loaded=loaded)
    own = trainer.evaluate()
    assert all(own[f"eval_{name}"] == value for name, value in metrics.items() if "R@" in name)
    zero_shot = clipft.evaluate_zero_shot(model, processor, labelled(8), ["red", "green", "blue", "yellow"])
    assert len(zero_shot["per_class"]) == 4


def test_embed(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    pictures = [picture(index)[0] for index in range(3)]
    vectors = clipft.embed(model, processor, images=pictures)
    with torch.no_grad():
        features = model.get_image_features(**processor.image_processor(pictures, return_tensors="pt")).pooler_output
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(features, dim=-1))
    assert clipft.embed(model, processor, texts=["a red square"]).shape == (1, 32)
    assert clipft.embed(model, processor, images=[]).shape == (0, 32)


# ---- the command line ----


def run(*arguments: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("peft")
    data = class_folders(tmp_path / "data", 24)
    quick = ("--epochs", 1, "--batch-size", 8, "--control-data", "none")
    run("train", "--model", folder, "--data", data, "--output", tmp_path / "run", *quick)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"before", "after"} <= report.keys()
    assert type(clipft.load(tmp_path / "run")[0]) is type(clipft.load(folder)[0])
    run("evaluate", "--model", tmp_path / "run", "--data", data)
    lora = ("--lora-r", 2, "--loss", "contrastive", *quick)
    run("train", "--model", folder, "--data", data, "--output", tmp_path / "lora", *lora)
    run("merge", "--model", tmp_path / "lora", "--output", tmp_path / "merged")
    clipft.load(tmp_path / "merged")
    run("embed", "--model", tmp_path / "run", "--data", data, "--output", tmp_path / "v.parquet")
    assert "red" in run(
        "search", "--index", tmp_path / "v.parquet", "--model", tmp_path / "run", "--text", "red", "-k", 24
    )


def test_what_does_not_take_it_says_so(folder: Path, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    for command in ("quantize", "export") if kind == "naflex" else ():
        shown = run(command, "--model", folder, "--output", tmp_path / "out", status=2)
        assert "takes a CLIPModel" in shown and "so far, got a Siglip" in shown
        assert not (tmp_path / "out").exists()
