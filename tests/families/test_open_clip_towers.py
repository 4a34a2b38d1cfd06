"""Architectures that only open_clip has: the same outputs as open_clip's own model, and all that other families do."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import captioned, labelled, picture
from tiny_open_clip_towers import ARCHITECTURES, model_cfg, peer, saved, tiny_towers, tokens
from tiny_trainer import losses, trainer_of
from torch import nn
from torch.nn.functional import normalize

import clipft
from clipft.data.transforms import build_transform
from clipft.families.open_clip import OpenCLIPConfig, OpenCLIPModel
from clipft.families.registry import family_of
from clipft.training.feature_cache import frozen_towers

open_clip = pytest.importorskip("open_clip")
TEXTS = ["a red square", "blue!", "a green bar and a yellow column, and more than fits"]
PICTURES = [picture(index)[0] for index in range(3)]


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names(model: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def peers_embeddings(theirs: Any, processor: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    transform = build_transform(processor.image_processor)
    with torch.no_grad():
        images = theirs.encode_image(torch.stack([transform(one) for one in PICTURES]), normalize=True)
        return images, theirs.encode_text(tokens(TEXTS, kind), normalize=True)


def check_same(model: Any, processor: Any, theirs: Any, kind: str) -> None:
    images, texts = peers_embeddings(theirs, processor, kind)
    torch.testing.assert_close(clipft.embed(model, processor, PICTURES), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(clipft.embed(model, processor, texts=TEXTS), texts, atol=1e-5, rtol=0)


# ---- the same model ----


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_is_open_clips_model_before_and_after_it_is_saved(kind: str, tmp_path: Path) -> None:
    model, processor = tiny_towers(kind)
    check_same(model, processor, peer(kind), kind)
    check_same(model, processor, open_clip.create_model(f"local-dir:{saved(model, processor, tmp_path)}").eval(), kind)
    again, its = clipft.load(tmp_path)
    assert type(again) is OpenCLIPModel and not again.training
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    check_same(again, its, peer(kind), kind)


@pytest.mark.parametrize("kind", ["layer scale", "pools the last"])
def test_fused_it_computes_what_torch_computes(kind: str) -> None:
    model, _ = tiny_towers(kind)
    plain, theirs = copy.deepcopy(model), peer(kind)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batch = {"pixel_values": pixels, "input_ids": tokens(TEXTS, kind)}
    want, got = plain(**batch, return_loss=True), clipft.fuse(model)(**batch, return_loss=True)
    torch.testing.assert_close(want.logits_per_image, theirs.get_logits(pixels, batch["input_ids"])[0])
    assert got.logits_per_image is None
    torch.testing.assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(**batch, return_loss=True).loss, got.loss)
    assert type(clipft.unfuse(model)) is OpenCLIPModel


def test_each_architecture_has_a_row_of_its_own() -> None:
    softmax, sigmoid = (family_of(tiny_towers(kind)[0]) for kind in ("layer scale", "pools the last"))
    assert (softmax.loss, softmax.padding) == ("contrastive", "longest")
    assert softmax.max_log_scale == pytest.approx(math.log(100))
    assert (sigmoid.loss, sigmoid.padding, sigmoid.max_log_scale) == ("sigmoid", "max_length", None)


def test_weights_in_half_precision_stay_so_and_compute(tmp_path: Path) -> None:
    model, processor = tiny_towers("layer scale")
    saved(model.bfloat16(), processor, tmp_path)
    half, its = clipft.load(tmp_path)
    assert half.dtype is torch.bfloat16
    assert clipft.embed(half, its, PICTURES).isfinite().all()
    assert clipft.load(tmp_path, dtype="float32")[0].dtype is torch.float32


# ---- training ----


def test_training_lowers_the_loss_and_open_clip_has_what_was_saved(tmp_path: Path) -> None:
    model, processor = tiny_towers("layer scale")
    data = captioned(32)
    options = {"num_train_epochs": 6, "learning_rate": 3e-3, "save_strategy": "epoch"}
    trainer = trainer_of(tmp_path, data, data, loaded=(model, processor), **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before - 0.2
    measured = clipft.evaluate_retrieval(model, processor, data)
    assert measured["image_to_text_R@1"] == pytest.approx(after["eval_image_to_text_R@1"])
    checkpoint = tmp_path / "checkpoint-24"
    check_same(model, processor, open_clip.create_model(f"local-dir:{checkpoint}").eval(), "layer scale")
    check_same(*clipft.load(checkpoint), open_clip.create_model(f"local-dir:{checkpoint}").eval(), "layer scale")


@pytest.mark.parametrize(
    ("kind", "strategy", "prefixes"),
    [
        ("convnext", "none", ("",)),
        ("convnext", "vision", ("text", "logit_scale")),
        ("convnext", "towers", ("visual.head", "text.text_projection", "logit_scale")),
        ("convnext", "vision:1", ("visual.trunk.stages.3", "visual.trunk.head", "visual.head", "text", "logit_scale")),
        ("resnet", "towers", ("visual.attnpool", "text.text_projection", "logit_scale")),
        ("resnet", "vision:1,text", ("visual.layer4", "visual.attnpool", "logit_scale")),
        ("timm vit", "vision:2", ("visual.trunk.blocks.4", "visual.trunk.blocks.5", "visual.trunk.norm",
                                  "visual.trunk.head", "text", "logit_scale")),
        ("layer scale", "towers", ("visual.proj", "text.text_projection", "logit_scale")),
        ("bert", "text:1", ("text.transformer.encoder.layer.1", "text.proj", "visual", "logit_scale")),
    ],
)  # fmt: skip
def test_freeze(kind: str, strategy: str, prefixes: tuple[str, ...]) -> None:
    model = clipft.freeze(tiny_towers(kind)[0], strategy)
    assert trained(model) == names(model, *prefixes)


def test_rates_fall_with_depth(tmp_path: Path) -> None:
    options = {"layer_decay": 0.5, "learning_rate": 1.0}
    trainer = trainer_of(tmp_path, captioned(8), loaded=tiny_towers("resnet"), **options)
    rate = {p: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    found = {name: rate[parameter] for name, parameter in trainer.model.named_parameters()}
    assert found["visual.conv1.weight"] == 0.5**5
    assert found["visual.layer1.0.conv1.weight"] == 0.5**4
    assert found["visual.layer4.0.bn1.weight"] == 0.5
    assert found["text.token_embedding.weight"] == 0.5**3
    assert found["visual.attnpool.positional_embedding"] == found["text.text_projection"] == 1


def test_a_frozen_resnet_keeps_its_statistics() -> None:
    model = clipft.freeze(tiny_towers("resnet")[0], "vision")
    before = copy.deepcopy(model.visual.state_dict())
    model.train()
    model.get_image_features(torch.randn(4, 3, 32, 32))
    torch.testing.assert_close(model.visual.state_dict(), before, rtol=0, atol=0)
    clipft.freeze(model, "none").train()
    model.get_image_features(torch.randn(4, 3, 32, 32))
    assert not torch.equal(model.visual.bn1.running_mean, before["bn1.running_mean"])


def test_a_frozen_tower_runs_once(tmp_path: Path) -> None:
    runs = {}
    for cached in (True, False):
        model, processor = tiny_towers("layer scale")
        clipft.freeze(model, "vision")
        assert frozen_towers(model) == {"vision"}
        seen: list[int] = []
        model.visual.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(output)))
        options = {"num_train_epochs": 3, "cache_frozen": cached}
        trainer = trainer_of(tmp_path / str(cached), captioned(16), loaded=(model, processor), **options)
        trainer.train()
        assert sum(seen) == (16 if cached else 48)
        runs[cached] = losses(trainer)
    assert runs[True] == pytest.approx(runs[False], rel=1e-4)


def test_a_tower_that_drops_something_is_not_frozen() -> None:
    model = clipft.freeze(tiny_towers("layer scale")[0], "vision,text")
    assert frozen_towers(model) == {"vision", "text"}
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    assert frozen_towers(model) == {"text"}


def test_a_head_is_trained_and_comes_back(tmp_path: Path) -> None:
    data, loaded = labelled(16), tiny_towers("layer scale")
    options = {"head": "text", "num_train_epochs": 4, "learning_rate": 5e-3}
    trainer = trainer_of(tmp_path, data, data, loaded=loaded, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    again, its = clipft.load(saved(trainer.model, loaded[1], tmp_path / "saved"))
    want = clipft.classify(trainer.model, loaded[1], PICTURES)
    torch.testing.assert_close(torch.as_tensor(clipft.classify(again, its, PICTURES)), torch.as_tensor(want))


# ---- LoRA ----


def test_lora_stands_beside_the_linear_layers() -> None:
    model = clipft.add_lora(tiny_towers("bert")[0], r=2, targets="text.last1")
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in trained(model)}
    inside = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    assert adapted == {
        f"text.transformer.encoder.layer.1.{name}" for name in (*inside, "intermediate.dense", "output.dense")
    }
    model = clipft.add_lora(tiny_towers("layer scale")[0], r=2, targets="vision")
    assert all(".mlp.c_" in name for name in trained(model))  # its attention is torch's own


def test_lora_where_there_is_no_linear_layer_is_refused() -> None:
    reason = r"targets: 'vision': a linear layer .* matches nothing; there are vision \(layers 0-3\) and text"
    with pytest.raises(ValueError, match=reason):
        clipft.add_lora(tiny_towers("resnet")[0], targets="vision")
    with pytest.raises(ValueError, match="'q_proj' matches nothing"):  # its weight is used, it is not called
        clipft.add_lora(tiny_towers("resnet")[0], targets="q_proj")


def test_an_adapter_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    model, processor = clipft.load(saved(*tiny_towers("layer scale"), tmp_path / "base"))
    model = clipft.add_lora(model, r=4)
    start = copy.deepcopy(model)
    trainer = trainer_of(tmp_path / "out", captioned(24), loaded=(model, processor), learning_rate=2e-2)
    trainer.train()
    assert np.mean(losses(trainer)[-3:]) < np.mean(losses(trainer)[:3])
    pairs = zip(model.named_parameters(), start.parameters(), strict=True)
    assert {name for (name, a), b in pairs if not torch.equal(a, b)} == trained(model)
    model.save_pretrained(tmp_path / "adapter")
    merged, its = clipft.load(tmp_path / "adapter")
    assert type(merged) is OpenCLIPModel
    want = clipft.embed(model, processor, texts=TEXTS)
    torch.testing.assert_close(clipft.embed(merged, its, texts=TEXTS), want, atol=1e-5, rtol=1e-4)


# ---- what is refused ----


def test_int8_and_onnx_are_refused(tmp_path: Path) -> None:
    model, processor = tiny_towers("layer scale")
    with pytest.raises(ValueError, match=r"int8 takes a .*, got a OpenCLIPModel"):
        clipft.quantize(model)
    with pytest.raises(ValueError, match=r"onnx takes a .*, got a OpenCLIPModel"):
        clipft.export_onnx(model, processor, tmp_path)


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:someone/model"}, "expected timm_model_name to be one that timm has"),
        ("text_cfg", {"hf_model_name": "someone/model"}, "expected text_tower"),
        ("text_cfg", {"width": 64}, "the weights are not those of the architecture: they have other shapes for"),
        ("text_cfg", {"layers": 3}, "they lack: text.transformer.resblocks.2"),
        ("text_cfg", {"layers": 1}, "they have more than they need: text.transformer.resblocks.1"),
    ],
)
def test_another_architecture_is_refused(part: str, changes: dict[str, Any], reason: str) -> None:
    cfg = model_cfg("layer scale")
    cfg[part] |= changes
    with pytest.raises(ValueError, match=reason):
        OpenCLIPModel.from_state(OpenCLIPConfig(model_cfg=cfg), peer("layer scale").state_dict())


def test_code_of_a_text_tower_is_refused() -> None:
    tower = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    with pytest.raises(ValueError, match=r"text tower: expected model_type bert or m2m_100 .* found 'mine'"):
        OpenCLIPModel.from_state(OpenCLIPConfig(model_cfg=model_cfg("bert"), text_tower=tower), {})


def test_cocas_decoder_is_refused() -> None:
    cfg = model_cfg("layer scale") | {"multimodal_cfg": {}}
    with pytest.raises(ValueError, match="found CoCa's multimodal_cfg"):
        OpenCLIPModel.from_state(OpenCLIPConfig(model_cfg=cfg), {})


def test_a_configuration_that_lies_is_refused_before_a_layer_is_made(tmp_path: Path) -> None:
    model, processor = tiny_towers("layer scale")
    saved(model, processor, tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    for key, value in (('"layers": 2', '"layers": 1000000000'), ('"width": 64', '"width": 1000000000')):
        path.write_text(text.replace(key, value, 1))
        with pytest.raises(ValueError, match=r"model_cfg: expected (layers|width) to be at most"):
            clipft.load(tmp_path)


def test_without_open_clip_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(*tiny_towers("layer scale"), tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'clipft\[open_clip\]'"):
        clipft.load(tmp_path)


def test_normalised_embeddings_are_what_the_tower_says() -> None:
    model, processor = tiny_towers("layer scale")
    with torch.no_grad():
        plain = model.get_text_features(tokens(TEXTS, "layer scale")).pooler_output
    torch.testing.assert_close(clipft.embed(model, processor, texts=TEXTS), normalize(plain, dim=-1))
