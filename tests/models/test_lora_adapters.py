"""clipft.add_lora, what its adapters train, and adapter folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import tiny_clip, tiny_model
from torch import Tensor
from transformers import CLIPModel

import clipft

pytest.importorskip("peft")

from peft_models import (
    ALL,
    LAYERS,
    adapted,
    assert_near,
    assert_same_gradients,
    embeds,
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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
    arguments = [sys.executable, "-c", code, str(adapter), str(tmp_path / "batch.pt"), str(out)]
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
        ({"target_modules": ["q_proj"]}, ValueError, "does not fit the base model .*left over: base_model.model.text"),
        ({"r": 3}, ValueError, "asks for rank 3 at .*, where adapter_model.safetensors has rank"),
    ):
        before = (adapter / "adapter_config.json").read_text()
        change(adapter, **values)
        with pytest.raises(error, match=message):
            clipft.load(adapter)
        (adapter / "adapter_config.json").write_text(before)
    weights.rename(adapter / "gone")
    with pytest.raises(FileNotFoundError, match=r"weights in adapter_model\.safetensors, which is missing"):
        clipft.load(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        clipft.load(adapter)
