"""clipft.load, freeze, fuse and unfuse."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import import_paths
from tiny_clip import LENGTH, SIZE, check_gradients, tiny_clip, tiny_model, tiny_tokenizer
from transformers import CLIPModel, CLIPVisionModel

import clipft
from clipft.models.freezing import what_trains


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pytest.importorskip("torchvision")
    model, processor = tiny_clip()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    captions = [f"picture number {index} {'of many' * (index % 3)}" for index in range(6)]
    tokens = tiny_tokenizer()(captions, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    pixels = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


# ---- the package ----


def test_import_is_lazy_and_names_exist() -> None:
    pytest.importorskip("torchvision")
    code = (
        "import sys, clipft; assert not {'torch', 'torchvision', 'transformers'} & set(sys.modules), 'not lazy';"
        "assert set(clipft.__all__) <= set(dir(clipft)); [getattr(clipft, name) for name in clipft.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = clipft.nonsense


def test_a_model_itself_needs_no_torchvision() -> None:
    """Loading does, whose processors are torchvision's."""
    code = f"import sys; sys.modules['torchvision'] = None; sys.path[:0] = {import_paths(__file__)!r}\n" + (
        "import clipft; from tiny_clip import tiny_model\nclipft.quantize(clipft.fuse(tiny_model()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- load ----


def test_load_gives_the_saved_model_with_torchvision_preprocessing(saved: Path) -> None:
    model, processor = clipft.load(saved)
    expected = tiny_clip()[0].state_dict()
    assert type(model) is CLIPModel
    assert not model.training
    assert processor.image_processor.backend == "torchvision"
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_load_passes_options_on(saved: Path) -> None:
    assert clipft.load(saved, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_load_names_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder '/no/such/model'"):
        clipft.load("/no/such/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json; found nothing"):
        clipft.load(tmp_path / "empty")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    with pytest.raises(ValueError, match=r"expected model_type 'clip' .* found 'blip'"):
        clipft.load(saved)


# ---- freeze ----


def trainable(model: CLIPModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names(model: CLIPModel, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def test_freeze_strategies() -> None:
    model = tiny_model()
    everything = names(model, "")
    text, vision = names(model, "text_model", "text_projection"), names(model, "vision_model", "visual_projection")
    assert trainable(clipft.freeze(model, "text")) == everything - text
    assert trainable(clipft.freeze(model, "vision")) == everything - vision
    assert trainable(clipft.freeze(model, "towers")) == {
        "text_projection.weight",
        "visual_projection.weight",
        "logit_scale",
    }
    assert trainable(clipft.freeze(model, "none")) == everything


def test_freeze_all_but_the_last_layers() -> None:
    model = tiny_model()
    everything = names(model, "")
    stem = ("vision_model.embeddings", "vision_model.pre_layrnorm")
    first = tuple(f"vision_model.encoder.layers.{layer}." for layer in (0, 1))
    assert trainable(clipft.freeze(model, "vision:1")) == everything - names(model, *stem, *first)
    assert trainable(clipft.freeze(model, "vision:3")) == everything - names(model, *stem)
    first = tuple(f"text_model.encoder.layers.{layer}." for layer in (0,))
    assert trainable(clipft.freeze(model, "text:2")) == everything - names(model, "text_model.embeddings", *first)


def test_freeze_takes_one_strategy_a_tower_and_says_what_trains() -> None:
    model = clipft.freeze(tiny_model(), "text, vision:1")
    own = ("vision_model.encoder.layers.2.", "vision_model.post_layernorm", "visual_projection", "logit_scale")
    assert trainable(model) == names(model, *own)
    vision = [p for name, p in model.named_parameters() if name.startswith("vis")]
    share = f"{sum(p.numel() for p in vision if p.requires_grad):,} of {sum(p.numel() for p in vision):,} parameters"
    assert what_trains(model) == f"{share} of the vision tower, nothing of the text tower, the logit scale"
    assert what_trains(clipft.freeze(model, "vision")).startswith("nothing of the vision tower, all of the text tower")
    assert trainable(clipft.freeze(model, "text,vision")) == {"logit_scale"}
    for strategy in ("text,text:2", "vision:1,vision"):
        with pytest.raises(ValueError, match="freeze: expected each tower once"):
            clipft.freeze(model, strategy)


@pytest.mark.parametrize("strategy", ["foo", "vision:", "vision:-1", "towers:1", "", "text:x", "text,", "towers,text"])
def test_freeze_lists_the_strategies(strategy: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r'"none", "text", "vision", "towers", "vision:N", "text:N"'):
        clipft.freeze(model, strategy)


@pytest.mark.parametrize("strategy", ["vision:0", "vision:4", "text:99"])
def test_freeze_checks_the_number_of_layers(strategy: str) -> None:
    model = tiny_model()
    clipft.freeze(model, "text")
    before = trainable(model)
    with pytest.raises(ValueError, match="from 1 to 3"):
        clipft.freeze(model, strategy)
    assert trainable(model) == before  # a refused strategy changes nothing


# ---- fuse ----


def test_fused_loss_and_gradients_are_those_of_transformers(batch: dict[str, torch.Tensor]) -> None:
    plain = tiny_model()
    fused, exact = clipft.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    results = {}
    for name, model in (("plain", plain), ("fused", fused), ("exact", exact)):
        inputs = batch | {"pixel_values": batch["pixel_values"].to(model.dtype)}
        results[name] = model(**inputs, return_loss=True)
        results[name].loss.backward()
    torch.testing.assert_close(results["fused"].loss, results["plain"].loss)
    torch.testing.assert_close(results["fused"].image_embeds, results["plain"].image_embeds)
    check_gradients(fused, plain, exact)


def test_fused_in_float64(batch: dict[str, torch.Tensor]) -> None:
    plain = tiny_model().double()
    inputs = batch | {"pixel_values": batch["pixel_values"].double()}
    want = plain(**inputs, return_loss=True).loss
    got = clipft.fuse(plain)(**inputs, return_loss=True)
    assert got.loss.dtype == got.image_embeds.dtype == torch.float64
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=0.0)


def test_fused_logits_only_when_asked(batch: dict[str, torch.Tensor]) -> None:
    model = tiny_model()
    expected = model(**batch).logits_per_image
    clipft.fuse(model)
    assert model(**batch, return_loss=True).logits_per_image is None
    torch.testing.assert_close(model(**batch, return_loss=True, return_logits=True).logits_per_image, expected)
    torch.testing.assert_close(model(**batch).logits_per_text, expected.t())  # without a loss, as ever


def test_fuse_keeps_the_object_and_unfuse_gives_it_back(batch: dict[str, torch.Tensor]) -> None:
    model = tiny_model()
    before, state, calls = dict(vars(model)), dict(model.named_parameters()), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert clipft.fuse(model) is model
    assert clipft.fuse(model) is model
    assert isinstance(model, CLIPModel)
    model(**batch)
    assert calls == [1]
    assert clipft.unfuse(model) is model
    assert type(model) is CLIPModel
    assert vars(model).keys() == before.keys()
    assert all(parameter is state[name] for name, parameter in model.named_parameters())
    assert model(**batch, return_loss=True).logits_per_image is not None
    assert clipft.unfuse(model) is model


def test_fused_model_is_copied_pickled_and_saved(batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = tiny_model()
    expected = clipft.fuse(model)(**batch, return_loss=True).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert twin.logit_scale is not model.logit_scale
        assert torch.equal(twin(**batch, return_loss=True).loss, expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CLIPModel"]
    loaded = CLIPModel.from_pretrained(tmp_path)
    assert type(loaded) is CLIPModel
    torch.testing.assert_close(loaded(**batch, return_loss=True).loss, expected)


def test_fused_tuple_output(batch: dict[str, torch.Tensor]) -> None:
    model = clipft.fuse(tiny_model())
    loss = model(**batch, return_loss=True).loss
    assert torch.equal(model(**batch, return_loss=True, return_dict=False)[0], loss)


def test_fused_embeddings_of_a_half_precision_model_are_float32(batch: dict[str, torch.Tensor]) -> None:
    model = clipft.fuse(tiny_model().to(torch.bfloat16))
    output = model(**batch, return_loss=True)
    assert output.image_embeds.dtype == output.text_embeds.dtype == torch.float32
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), torch.ones(6))


def test_fuse_refuses_other_models() -> None:
    class Own(CLIPModel):
        pass

    with pytest.raises(TypeError, match=r"expected a CLIPModel, .* got .*Own"):
        clipft.fuse(Own(tiny_model().config))
    with pytest.raises(TypeError, match="got CLIPVisionModel"):
        clipft.fuse(CLIPVisionModel(tiny_model().config.vision_config))


def test_fuse_takes_the_model_inside_a_peft_model(batch: dict[str, torch.Tensor]) -> None:
    peft = pytest.importorskip("peft")
    model: Any = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    expected = model(**batch, return_loss=True).loss
    assert clipft.fuse(model) is model
    output = model(**batch, return_loss=True)
    assert output.logits_per_image is None
    torch.testing.assert_close(output.loss, expected)
    clipft.unfuse(model)
    assert type(model.get_base_model()) is CLIPModel


# ---- the last layer, of which the class token alone is used ----


def inputs_of(model: CLIPModel, batch: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 500, (batch, 7))
    ids[:, -1] = model.config.text_config.eos_token_id
    return {"pixel_values": torch.randn(batch, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gradients(model: CLIPModel, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs_of(model), return_loss=True, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_computes_the_class_token_alone(
    attention: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_clip()[0].train()
    model.set_attn_implementation(attention)
    want = gradients(model)
    fused = clipft.fuse(copy.deepcopy(model))
    if checkpointing:
        fused.gradient_checkpointing_enable()
    rows = []
    last = fused.vision_model.encoder.layers[-1]
    forward = type(last.mlp).forward
    monkeypatch.setattr(type(last.mlp), "forward", lambda mlp, x: (rows.append(x.shape[1]), forward(mlp, x))[1])
    got = gradients(fused)
    assert 1 in rows and got.keys() == want.keys()
    for name in want:  # of which the largest are 5: either errs by up to 8e-6 of the truth
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)
    rows.clear()
    gradients(fused, return_logits=True)
    assert 1 not in rows  # 4 patches and the class token in all layers, 7 tokens of text


LAST = "vision_model.encoder.layers.2"
WATCHED = ["vision_model", "vision_model.encoder", LAST] + [
    f"{LAST}.{part}"
    for part in ("self_attn", "self_attn.q_proj", "self_attn.out_proj", "layer_norm2", "mlp", "mlp.fc2")
]


@pytest.mark.parametrize("how", ["forward hook", "pre-hook", "replaced forward", "global hook"])
def test_who_watches_the_last_layer_sees_all_tokens(how: str) -> None:
    """Each module that Hugging Face calls is called, with what it gives it."""
    plain = tiny_clip()[0]
    fused = clipft.fuse(copy.deepcopy(plain))
    for name in WATCHED:
        seen: list[list[Any]] = []
        for model in (plain, fused):
            calls: list[Any] = []
            undo = watch(model.get_submodule(name), how, calls)
            model(**inputs_of(model), return_loss=True)
            undo()
            seen.append(calls)
        assert seen[0] and seen[0] == seen[1], name


def watch(module: Any, how: str, calls: list[Any]) -> Callable[[], Any]:
    def shape(value: Any) -> Any:
        value = value[0] if isinstance(value, tuple) and value else value
        return list(getattr(value, "last_hidden_state", value).shape) if value != () else None

    if how == "global hook":
        note = lambda called, args, output: calls.append(shape(output)) if called is module else None  # noqa: E731
        return torch.nn.modules.module.register_module_forward_hook(note).remove
    if how == "forward hook":
        return module.register_forward_hook(lambda _, args, output: calls.append(shape(output))).remove
    if how == "pre-hook":
        return module.register_forward_pre_hook(lambda _, args: calls.append(shape(args))).remove
    own = module.forward
    module.forward = lambda *args, **kwargs: (calls.append(shape(args)), own(*args, **kwargs))[1]
    return lambda: vars(module).pop("forward")


def test_who_asks_for_all_tokens_gets_them() -> None:
    fused = clipft.fuse(tiny_clip()[0])
    fused.set_attn_implementation("eager")
    inputs = inputs_of(fused)
    with torch.no_grad():
        assert fused(**inputs, return_loss=True).vision_model_output.last_hidden_state is None
        whole = fused(**inputs).vision_model_output.last_hidden_state
        assert whole.shape == (4, 5, 32)
        assert torch.equal(fused.vision_model(inputs["pixel_values"]).last_hidden_state, whole)
        for asked in ("output_hidden_states", "output_attentions"):
            output = fused(**inputs, return_loss=True, **{asked: True}).vision_model_output
            assert torch.equal(output.last_hidden_state, whole)
        assert len(output.attentions) == 3 and output.attentions[-1].shape == (4, 2, 5, 5)
