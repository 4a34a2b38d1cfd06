"""clipft.fuse on peft's LoRA layers: peft's numbers, objects and methods."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import tiny_model
from torch import Tensor, nn
from transformers import CLIPModel

import clipft

pytest.importorskip("peft")

from peft_models import (
    LAYERS,
    adapted,
    assert_near,
    assert_same_gradients,
    both,
    config,
    embeds,
    fused_layers,
    gradients,
    lora,
    peft,
    randomised,
    tiny_batch,
    watch_calls,
)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return tiny_batch()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    return watch_calls(monkeypatch)


# ---- the same numbers as peft ----


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 1}, {"r": 7, "lora_alpha": 3}, {"r": 40}])
def test_outputs_and_gradients_are_those_of_peft(
    batch: dict[str, Tensor], calls: list[Tensor], options: dict[str, Any]
) -> None:
    plain, fused = both(**options)
    assert_near(embeds(fused, batch), embeds(plain, batch))
    assert len(calls) == fused_layers(fused) == LAYERS
    assert_same_gradients(gradients(fused, batch), gradients(plain, batch))


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "SEQ_CLS"])
def test_a_task_type_changes_nothing(batch: dict[str, Tensor], task: str) -> None:
    """peft's classes for tasks hand on the arguments of text models, unset; peft alone fails by them."""
    expected = adapted()
    model = clipft.fuse(adapted(task_type=task))
    assert type(model) is not type(expected)
    assert_near(embeds(model, batch), embeds(expected, batch))
    assert_same_gradients(gradients(model, batch), gradients(clipft.fuse(expected), batch))


def test_gradients_of_trained_base_weights(batch: dict[str, Tensor]) -> None:
    plain, fused = both()
    for model in (plain, fused):
        model.requires_grad_(True)
    assert_same_gradients(gradients(fused, batch), gradients(plain, batch))


def test_a_half_precision_model_with_float32_adapters(batch: dict[str, Tensor], calls: list[Tensor]) -> None:
    plain = adapted(tiny_model().to(torch.bfloat16))
    fused = clipft.fuse(copy.deepcopy(plain))
    assert plain.get_submodule("base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.default").weight.dtype == (
        torch.float32
    )
    reference = adapted(tiny_model())
    truth = embeds(reference, batch)
    ours, peers = (embeds(clipft.fuse(m), batch) if m is fused else embeds(m, batch) for m in (fused, plain))
    assert len(calls) == LAYERS
    # bfloat16 rounds each layer's result: neither is nearer the truth than a few of these roundings
    assert (ours - truth).norm() <= 1.5 * (peers.float() - truth).norm()
    for name, value in gradients(fused, batch).items():
        assert value.dtype == torch.float32, name


def test_autocast(batch: dict[str, Tensor], calls: list[Tensor]) -> None:
    plain, fused = both()
    truth = gradients(plain, batch)
    with torch.autocast("cpu", torch.bfloat16):
        ours, peers = gradients(fused, batch), gradients(plain, batch)
    assert len(calls) == LAYERS
    assert ours.keys() == truth.keys()
    error, peers_error = (
        torch.stack([(g[name] - value).norm() for name, value in truth.items()]).norm() for g in (ours, peers)
    )
    assert error <= 1.5 * peers_error


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(batch: dict[str, Tensor], reentrant: bool) -> None:
    fused = clipft.fuse(adapted(lora_dropout=0.3)).train()
    if reentrant and not hasattr(fused, "activation_checkpointing_enable"):
        pytest.skip("old transformers make no frozen layer's outputs ask for gradients, which that way needs")
    torch.manual_seed(1)
    expected = gradients(fused, batch)
    enable = getattr(fused, "activation_checkpointing_enable", None) or fused.gradient_checkpointing_enable  # as of old
    enable({"use_reentrant": reentrant})
    torch.manual_seed(1)
    assert_same_gradients(gradients(fused, batch), expected)


def test_dropout_is_drawn_in_training_only_and_a_seed_repeats_it(batch: dict[str, Tensor]) -> None:
    fused = clipft.fuse(adapted(lora_dropout=0.5))
    quiet = embeds(fused, batch)
    assert torch.equal(embeds(fused, batch), quiet)
    fused.train()
    torch.manual_seed(3)
    first, second = embeds(fused, batch), embeds(fused, batch)
    torch.manual_seed(3)
    assert torch.equal(embeds(fused, batch), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, quiet)


def test_compiles_without_a_break(batch: dict[str, Tensor]) -> None:
    fused = clipft.fuse(adapted())
    layer = fused.base_model.model.vision_model.encoder.layers[0].mlp
    x = torch.randn(2, 5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), layer(x))


# ---- quick_gelu ----


def test_quick_gelu_is_one_op_until_unfused(batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    activations = [m for name, m in model.named_modules() if name.endswith("activation_fn")]
    before = [type(m) for m in activations]
    expected = gradients(model, batch)
    clipft.fuse(model)
    assert not {type(m) for m in activations} & set(before)
    assert_same_gradients(gradients(model, batch), expected)
    assert repr(activations[0]) == "QuickGELUActivation()"
    clipft.unfuse(model)
    assert [type(m) for m in activations] == before
    relu = tiny_model()
    relu.text_model.encoder.layers[0].mlp.activation_fn = nn.ReLU()
    assert type(clipft.fuse(relu).text_model.encoder.layers[0].mlp.activation_fn) is nn.ReLU


# ---- the objects ----


def test_fuse_keeps_the_objects_and_unfuse_gives_them_back(batch: dict[str, Tensor]) -> None:
    model = adapted()
    before = {name: (module, type(module), set(vars(module))) for name, module in model.named_modules()}
    parameters, shown = dict(model.named_parameters()), repr(model)
    assert clipft.fuse(model) is model
    assert clipft.fuse(model) is model
    assert fused_layers(model) == LAYERS
    assert repr(model) == shown
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    embeds(model, batch)
    assert clipft.unfuse(model) is model
    for name, module in model.named_modules():
        assert (module, type(module), set(vars(module))) == before[name]
    assert clipft.unfuse(model) is model


def test_copies_and_pickles(batch: dict[str, Tensor]) -> None:
    model = clipft.fuse(adapted())
    expected = embeds(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_layers(twin) == LAYERS
        assert torch.equal(embeds(twin, batch), expected)
        assert type(clipft.unfuse(twin).get_base_model()) is CLIPModel
        assert fused_layers(model) == LAYERS


def test_a_peft_model_of_another_model_has_its_layers_fused(calls: list[Tensor]) -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = randomised(peft.get_peft_model(inner, peft.LoraConfig(target_modules=["0", "2"], lora_dropout=0.0)))
    fused, x = clipft.fuse(copy.deepcopy(plain)), torch.randn(5, 8)
    assert_near(fused(x), plain(x))
    assert len(calls) == 2
    assert torch.equal(fused.double()(x.double()), plain.double()(x.double()))  # no such kernel: peft's forward
    assert len(calls) == 2
    assert fused_layers(clipft.unfuse(fused)) == 0

    class Own(CLIPModel):
        pass

    with pytest.raises(TypeError, match=r"expected a CLIPModel, .* got .*Own"):
        clipft.fuse(adapted(Own(tiny_model().config)))


def test_adapters_injected_into_a_plain_model(batch: dict[str, Tensor], calls: list[Tensor]) -> None:
    """As transformers' own ``add_adapter`` does."""
    model = peft.inject_adapter_in_model(config(), tiny_model())
    expected = embeds(randomised(model), batch)
    assert_near(embeds(clipft.fuse(model), batch), expected)
    assert len(calls) == LAYERS


# ---- everything that peft does ----


def pair_of_adapters(**other: Any) -> tuple[Any, Any]:
    plain = adapted()
    plain.add_adapter("other", config(**({"r": 2, "target_modules": ["q_proj", "fc1"]} | other)))
    return randomised(plain, seed=1), clipft.fuse(copy.deepcopy(plain))


def test_switching_adapters(batch: dict[str, Tensor], calls: list[Tensor]) -> None:
    plain, fused = pair_of_adapters()
    for name, count in (("other", 12), ("default", LAYERS)):
        for model in (plain, fused):
            model.set_adapter(name)
        calls.clear()
        assert_same_gradients(gradients(fused, batch), gradients(plain, batch))
        assert len(calls) == count


def test_several_active_adapters(batch: dict[str, Tensor], calls: list[Tensor]) -> None:
    plain, fused = pair_of_adapters()
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "other"])
    assert_near(embeds(fused, batch), embeds(plain, batch))
    assert len(calls) == LAYERS - 12  # where there is only one of them


def test_adding_and_deleting_adapters_after_fusing(batch: dict[str, Tensor], calls: list[Tensor]) -> None:
    plain, fused = both(target_modules=["q_proj"])
    for model in (plain, fused):
        model.add_adapter("other", config(target_modules=["q_proj", "fc2"]))
        model.set_adapter("other")
        randomised(model, seed=2)
    assert_near(embeds(fused, batch), embeds(plain, batch))
    assert len(calls) == 6  # fc2's layers are new
    calls.clear()
    assert_near(embeds(clipft.fuse(fused), batch), embeds(plain, batch))
    assert len(calls) == 12
    for model in (plain, fused):
        model.delete_adapter("other")
        model.set_adapter("default")
    assert_near(embeds(fused, batch), embeds(plain, batch))
    assert peft.get_peft_model_state_dict(fused).keys() == peft.get_peft_model_state_dict(plain).keys()


def test_disabling_adapters(batch: dict[str, Tensor]) -> None:
    fused = clipft.fuse(adapted())
    before = embeds(fused, batch)
    with fused.disable_adapter():
        assert torch.equal(embeds(fused, batch), embeds(clipft.fuse(tiny_model()), batch))
    assert torch.equal(embeds(fused, batch), before)


def test_merging_and_unmerging(batch: dict[str, Tensor]) -> None:
    fused = clipft.fuse(adapted())
    before, weights = embeds(fused, batch), copy.deepcopy(fused.state_dict())
    fused.merge_adapter(safe_merge=True)
    assert_near(embeds(fused, batch), before)
    fused.unmerge_adapter()
    assert_near(embeds(fused, batch), before)
    for name, value in fused.state_dict().items():
        assert_near(value, weights[name], 1e-6)
    merged = fused.merge_and_unload()
    assert_near(embeds(merged, batch), before)
    assert type(clipft.unfuse(merged)) is CLIPModel
    assert {type(m) for m in merged.modules()} == {type(m) for m in tiny_model().modules()}
    assert merged.state_dict().keys() == tiny_model().state_dict().keys()


def test_unloading_gives_the_base_model(batch: dict[str, Tensor]) -> None:
    base = clipft.unfuse(clipft.fuse(adapted()).unload())
    expected = tiny_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in base.state_dict().items())


def test_modules_to_save(batch: dict[str, Tensor], tmp_path: Path) -> None:
    plain, fused = both(modules_to_save=["visual_projection"])
    got = gradients(fused, batch)
    assert_same_gradients(got, gradients(plain, batch))
    assert any("visual_projection" in name for name in got)
    fused.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_near(embeds(loaded, batch), embeds(fused, batch))


def test_mixed_batches_and_other_kinds_of_dropout_and_bias_are_pefts(
    batch: dict[str, Tensor], calls: list[Tensor]
) -> None:
    plain, fused = pair_of_adapters()
    names = ["default", "other", "__base__"] * 2
    assert_near(embeds(fused, batch | {"adapter_names": names}), embeds(plain, batch | {"adapter_names": names}))
    assert not calls


# ---- what is left to peft, and said ----


def use_dtype_casting_off(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, lora.Linear):
            module.cast_input_dtype_enabled = False
    return model


def with_hook(model: Any) -> Any:
    model.base_model.model.text_model.encoder.layers[1].mlp.fc1.base_layer.register_forward_hook(lambda *_: None)
    return model


def with_other_dropout(model: Any) -> Any:
    model.base_model.model.text_model.encoder.layers[1].mlp.fc1.lora_dropout["default"] = nn.AlphaDropout(0.1).eval()
    return model


def with_tensor_scaling(model: Any) -> Any:
    layer = model.base_model.model.text_model.encoder.layers[1].mlp.fc1
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    return model


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


LEFT: dict[str, tuple[Any, int, str]] = {
    "dora": (lambda: adapted(use_dora=True), LAYERS, "DoraLinearVariant is not plain LoRA"),
    "lora_bias": (lambda: adapted(lora_bias=True), LAYERS, "the adapter has a bias (lora_bias)"),
    "merged": (lambda: merged(adapted()), LAYERS, "the adapter is merged into the weight"),
    "bfloat16 adapters": (
        lambda: (
            adapted()
            .to(torch.bfloat16)
            .apply(lambda m: m.float() if type(m) is nn.Linear and m.out_features > 4 else m)
        ),
        LAYERS,
        "an adapter in torch.bfloat16 on a layer in torch.float32",
    ),
    "no casting": (
        lambda: use_dtype_casting_off(adapted(tiny_model().to(torch.bfloat16))),
        LAYERS,
        "casting the input to the adapter's dtype is turned off",
    ),
    "hook": (lambda: with_hook(adapted()), 1, "a module inside has a hook or a replaced forward"),
    "dropout": (lambda: with_other_dropout(adapted()), 1, "AlphaDropout is not torch's Dropout"),
    "scaling": (lambda: with_tensor_scaling(adapted()), 1, "a scaling of type Tensor"),
    "convolution": (
        lambda: adapted(target_modules=["patch_embedding", "fc1"]),
        1,
        "lora.Conv2d is not lora.Linear",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_the_op_does_not_cover_runs_pefts_forward_and_is_said(
    case: str, batch: dict[str, Tensor], calls: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    make, count, reason = LEFT[case]
    plain = make()
    fused = copy.deepcopy(plain)
    with caplog.at_level(logging.WARNING):
        clipft.fuse(fused)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("clipft")]
    assert line.startswith(f"clipft.fuse: {count} LoRA layer(s) run peft's own forward: ")
    assert reason in line
    assert "encoder.layers." in line or "patch_embedding" in line
    total = sum(isinstance(m, lora.LoraLayer) for m in fused.modules())
    try:
        expected = embeds(plain, batch)
    except RuntimeError as error:  # peft's own limits stay what they are
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            embeds(fused, batch)
        return
    assert_near(embeds(fused, batch).to(expected.dtype), expected)
    assert len(calls) == total - count


def test_a_replaced_forward_of_a_layer_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(target_modules=["fc2"])
    layer = model.base_model.model.text_model.encoder.layers[2].mlp.fc2
    layer.forward = layer.forward  # as accelerate's hooks do
    clipft.fuse(model)
    assert type(layer) is lora.Linear
    assert "1 LoRA layer(s) run peft's own forward: something else replaced the layer's forward" in caplog.text


def test_nothing_is_said_where_everything_is_fused(caplog: pytest.LogCaptureFixture) -> None:
    clipft.fuse(adapted(lora_dropout=0.1))
    assert not [record for record in caplog.records if record.name.startswith("clipft")]
