"""clipft.fuse on peft's LoRA layers, clipft.add_lora, adapter folders."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import LENGTH, SIZE, tiny_clip, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import CLIPModel

import clipft

peft = pytest.importorskip("peft")
lora = peft.tuners.lora

ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LAYERS = 2 * 3 * len(ALL)  # of the tiny model's two towers


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    captions = [f"picture number {index} {'of many' * (index % 3)}" for index in range(6)]
    tokens = tiny_tokenizer()(captions, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    pixels = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the fused layers that ran."""
    from clipft import lora_layers

    seen: list[Tensor] = []

    def counted(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(x)
            return op(x, *args, **kwargs)

        return run

    for name in ("lora_linear", "quick_gelu_lora_linear"):
        monkeypatch.setattr(lora_layers, name, counted(getattr(lora_layers, name)))
    return seen


def config(**options: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ALL} | options))


def randomised(model: Any, seed: int = 0) -> Any:
    """B is zero at first: give every adapter weight a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: CLIPModel | None = None, **options: Any) -> Any:
    return randomised(peft.get_peft_model(model or tiny_model(), config(**options)).eval())


def both(**options: Any) -> tuple[Any, Any]:
    """The same model by peft and fused."""
    plain = adapted(**options)
    return plain, clipft.fuse(copy.deepcopy(plain))


def embeds(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return torch.cat([output.image_embeds, output.text_embeds])


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, return_loss=True).loss


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-5, floor: float = 0.0) -> None:
    """Sums of a few hundred float32 terms in another order, through three layers: some hundred roundings of the
    largest.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.double().abs().max().item() + floor


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Where terms cancel (the bias of k_proj, which softmax does not see), the error is in roundings of the terms, so
    of the largest gradients.
    """
    assert got.keys() == expected.keys()
    floor = 8 * torch.finfo(torch.float32).eps * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        try:
            assert_near(got[name], value, 1e-4, floor)
        except AssertionError as error:
            raise AssertionError(name) from error


def fused_layers(model: Any) -> int:
    return sum(isinstance(m, lora.Linear) and type(m) is not lora.Linear for m in model.modules())


# ---- the same numbers as peft ----


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 1}, {"r": 7, "lora_alpha": 3}, {"r": 40}])
def test_outputs_and_gradients_are_those_of_peft(
    batch: dict[str, Tensor], calls: list[Tensor], options: dict[str, Any]
) -> None:
    plain, fused = both(**options)
    assert_near(embeds(fused, batch), embeds(plain, batch))
    assert len(calls) == fused_layers(fused) == LAYERS
    assert_same_gradients(gradients(fused, batch), gradients(plain, batch))


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
    torch.manual_seed(1)
    expected = gradients(fused, batch)
    fused.activation_checkpointing_enable({"use_reentrant": reentrant})
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


# ---- add_lora ----


def targets_of(model: Any) -> set[str]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, m in model.named_modules() if isinstance(m, lora.Linear)}


def test_add_lora_by_default(batch: dict[str, Tensor], calls: list[Tensor]) -> None:
    model = clipft.add_lora(tiny_model())
    assert isinstance(model, peft.PeftModel)
    assert len(targets_of(model)) == LAYERS
    settings = model.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (16, 32, 0.1)
    assert settings.target_modules == set(ALL)  # as short as if it had been written by hand
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not any(module.training for module in model.modules())
    assert_near(embeds(model, batch), embeds(tiny_model(), batch))  # an adapter starts as nothing
    assert len(calls) == LAYERS
    assert clipft.add_lora(tiny_model().train()).training


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("vision", {f"vision {layer} {name}" for layer in range(3) for name in ALL}),
        ("text:q_proj", {f"text {layer} q_proj" for layer in range(3)}),
        ("vision.1-2:q_proj,v_proj", {f"vision {layer} {name}" for layer in (1, 2) for name in ("q_proj", "v_proj")}),
        ("text.0", {f"text 0 {name}" for name in ALL}),
        ("vision.last1:fc1, fc2", {"vision 2 fc1", "vision 2 fc2"}),
        ("fc1", {f"{tower} {layer} fc1" for tower in ("vision", "text") for layer in range(3)}),
        (["text.last2:fc1", "text.1-1:fc1"], {"text 1 fc1", "text 2 fc1"}),
        ("vision.2,visual_projection", {f"vision 2 {name}" for name in ALL} | {"visual_projection"}),
    ],
)
def test_add_lora_targets(targets: Any, expected: set[str]) -> None:
    found = set()
    for name in targets_of(clipft.add_lora(tiny_model(), targets=targets)):
        parts = name.split(".")
        found.add(f"{parts[0].removesuffix('_model')} {parts[3]} {parts[-1]}" if len(parts) > 1 else name)
    assert found == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "query",
            r"targets: 'query': 'query' matches nothing; there are vision \(layers 0-2\) and text \(layers 0-2\) with "
            r"k_proj, v_proj, q_proj, out_proj, fc1, fc2, and visual_projection, text_projection",
        ),
        (["vision", "text:fc3"], "'text:fc3': 'fc3' matches nothing; there are vision"),
        ("vision:visual_projection", "'visual_projection' matches nothing; there are vision"),
        ("vision:", "'' matches nothing"),
        ("", "'' matches nothing"),
        ("audio:q_proj", r"expected vision or text, vision\.FIRST-LAST, .* got 'audio'"),
        ("vision.x", r"expected vision or text, vision\.FIRST-LAST, .* got 'vision\.x'"),
        ("vision.1-3", r"expected layers from 0 to 2, which vision has, got 'vision\.1-3'"),
        ("text.2-1", "expected layers from 0 to 2"),
        ("text.last4:fc1", "expected layers from 0 to 2"),
        ("text.last0", "expected layers from 0 to 2"),
        ([], "targets: expected at least one, got none"),
    ],
)
def test_a_target_that_matches_nothing_lists_what_exists(targets: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        clipft.add_lora(model, targets=targets)
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was touched


def test_add_lora_checks_its_arguments() -> None:
    model = tiny_model()
    for options, error, message in (
        ({"r": 0}, ValueError, "r: expected an integer of at least 1, got 0"),
        ({"r": 2.5}, ValueError, "r: expected an integer"),
        ({"alpha": 0}, ValueError, "alpha: expected a number above 0"),
        ({"alpha": "32"}, TypeError, "alpha: expected a number, got str"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, ValueError, "dropout: expected a probability"),
    ):
        with pytest.raises(error, match=message):
            clipft.add_lora(model, **options)
    with pytest.raises(TypeError, match=r"model: expected a CLIPModel, .* got PeftModel"):
        clipft.add_lora(clipft.add_lora(model))
    with pytest.raises(ValueError, match="model: expected a model without adapters"):
        clipft.add_lora(model)


def test_without_peft_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['peft'] = None; import clipft; from transformers import CLIPConfig, CLIPModel\n"
        "tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)\n"
        "model = clipft.fuse(CLIPModel(CLIPConfig(text_config=tower, vision_config=tower)))\n"
        "try: clipft.add_lora(clipft.unfuse(model))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("LoRA needs peft: pip install 'clipft[lora]'")


# ---- a late first trainable layer ----


def test_nothing_before_the_first_adapter_keeps_activations_or_has_gradients(batch: dict[str, Tensor]) -> None:
    """LoRA on the last layer of three: what autograd keeps is what that layer keeps, one third of all layers'."""
    kept: dict[str, int] = {}
    for targets in ("vision.last1", "vision"):
        model = clipft.add_lora(tiny_model().train(), targets=targets)
        layers = model.base_model.model.vision_model.encoder.layers
        outputs: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
            for layer in layers
        ]
        storages: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor: Tensor, storages: dict[int, int] = storages, weights: set[int] = weights) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output.sum()
        kept[targets] = sum(storages.values())
        loss.backward()
        first = 2 if targets == "vision.last1" else 0
        assert [output.requires_grad for output in outputs] == [layer >= first for layer in range(3)]
        assert [bool([p for p in layer.parameters() if p.grad is not None]) for layer in layers] == [
            layer >= first for layer in range(3)
        ]
        for hook in hooks:
            hook.remove()
    head = 6 * 64 * 4 * 4  # the norm and the projection after the layers
    assert kept["vision.last1"] - head <= (kept["vision"] + head) / 3


def test_a_tower_without_adapters_keeps_nothing(batch: dict[str, Tensor]) -> None:
    model = clipft.add_lora(tiny_model(), targets="vision").train()
    output = model(**batch)
    assert output.image_embeds.requires_grad
    assert not output.text_embeds.requires_grad


# ---- adapter folders ----


@pytest.fixture
def base(tmp_path: Path) -> Path:
    pytest.importorskip("torchvision")
    model, processor = tiny_clip()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = randomised(clipft.add_lora(clipft.load(base)[0], r=4))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_saved_here_loads_in_plain_peft_without_clipft(
    base: Path, adapter: Path, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = embeds(peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter), batch)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["auto_mapping"] == {
        "base_model_class": "CLIPModel",
        "parent_library": "transformers.models.clip.modeling_clip",
    }
    torch.save(batch, tmp_path / "batch.pt")
    code = (
        "import sys, torch; sys.modules['clipft'] = None; from peft import AutoPeftModel\n"
        "folder, batch, out = sys.argv[1:]\n"
        "model = AutoPeftModel.from_pretrained(folder).eval()\n"
        "output = model(**torch.load(batch))\n"
        "torch.save(torch.cat([output.image_embeds, output.text_embeds]).detach(), out)"
    )
    out = tmp_path / "out.pt"
    arguments = [sys.executable, "-P", "-c", code, str(adapter), str(tmp_path / "batch.pt"), str(out)]
    subprocess.run(arguments, check=True, capture_output=True)
    assert torch.equal(torch.load(out), expected)


def test_an_adapter_of_plain_peft_trains_on_here(base: Path, batch: dict[str, Tensor], tmp_path: Path) -> None:
    plain = adapted(CLIPModel.from_pretrained(base), use_rslora=True)
    plain.save_pretrained(tmp_path / "plain")
    loaded = peft.PeftModel.from_pretrained(clipft.load(base)[0], tmp_path / "plain", is_trainable=True)
    assert_same_gradients(gradients(clipft.fuse(loaded), batch), gradients(plain, batch))
    merged, _ = clipft.load(tmp_path / "plain")
    assert_near(embeds(merged, batch), embeds(plain, batch))


def test_load_merges_an_adapter_folder(base: Path, adapter: Path, batch: dict[str, Tensor]) -> None:
    model, processor = clipft.load(adapter)
    assert type(model) is CLIPModel
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert processor.image_processor.backend == "torchvision"
    assert_near(embeds(model, batch), embeds(peft.PeftModel.from_pretrained(clipft.load(base)[0], adapter), batch))
    assert clipft.load(adapter, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_adapter_of_an_adapter_folder(adapter: Path, batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = randomised(clipft.add_lora(clipft.load(adapter)[0], r=2), seed=5)
    model.save_pretrained(tmp_path / "second")
    assert_near(embeds(clipft.load(tmp_path / "second")[0], batch), embeds(model, batch))


def change(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_load_names_what_is_wrong_with_an_adapter(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    for values, error, message in (
        ({"peft_type": "LOHA"}, ValueError, "expected peft_type 'LORA', found 'LOHA'"),
        ({"base_model_name_or_path": None}, ValueError, "to name the base model, found None"),
        ({"base_model_name_or_path": "/no/base"}, FileNotFoundError, "the base model '/no/base' does not load"),
        ({"target_modules": ["q_proj"]}, ValueError, "does not fit its base model .*left over: base_model.model.text"),
        ({"r": 3}, ValueError, "does not fit its base model .*size mismatch"),
    ):
        before = (adapter / "adapter_config.json").read_text()
        change(adapter, **values)
        with pytest.raises(error, match=message):
            clipft.load(adapter)
        (adapter / "adapter_config.json").write_text(before)
    weights.rename(adapter / "gone")
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle, which clipft does not open"):
        clipft.load(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        clipft.load(adapter)
