"""clipft.quantize of families other than CLIP, whose own tests say what int8 is: what differs, and their files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import captioned, class_folders
from tiny_clip import tiny_model as tiny_clip_model
from tiny_families import KINDS, tiny_family
from tiny_siglip import tiny_inputs, tiny_model, tiny_siglip
from torch import Tensor, nn
from typer.testing import CliRunner

import clipft
from clipft.cli import app
from clipft.families.siglip import SplitPoolingHead
from clipft.nn import QuantizedLinear

WEIGHTS = "clipft_int8.safetensors"
BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
HEAD = ("attention.kv_proj", "attention.out_proj", "mlp.fc1", "mlp.fc2")
LAYERS = {
    *(f"{tower}_model.encoder.layers.{n}.{part}" for tower in ("vision", "text") for n in range(3) for part in BLOCK),
    *(f"vision_model.head.{part}" for part in HEAD),
    "vision_model.embeddings.patch_embedding",
    "text_model.head",
}


@pytest.fixture
def plain() -> Any:
    """With biases that are not the zeros of a new model."""
    model = tiny_model("siglip")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def embeddings(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model(**tiny_inputs("siglip"), **options)
    return output.image_embeds, output.text_embeds


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.float(), b.float()).min())


def near(model: Any, plain: Any, least: float = 0.995) -> None:
    for got, want in zip(embeddings(model), embeddings(plain), strict=True):
        assert cosine(got, want) > least and not torch.equal(got, want)


# ---- what becomes int8 ----


def test_every_product_becomes_int8_and_the_model_stays(plain: Any) -> None:
    before = copy.deepcopy(plain.state_dict())
    quantized = clipft.quantize(plain)
    assert isinstance(quantized, type(plain)) and not quantized.training and quantized is not plain
    assert not any(isinstance(module, (nn.Linear, nn.Conv2d)) for module in quantized.modules())
    assert sum(isinstance(module, QuantizedLinear) for module in quantized.modules()) == 2 * 3 * 4 + 4 + 1 + 1
    assert quantized.quantization_report["layers"].keys() == LAYERS
    near(quantized, plain)
    assert all(torch.equal(plain.state_dict()[name], before[name]) for name in before)


def test_the_pooling_head_in_linear_layers_is_the_plain_one(plain: Any) -> None:
    """With all layers left in float, the query of its probe worked out beforehand is all that differs."""
    same = clipft.quantize(plain, skip=[*LAYERS])
    assert type(same.vision_model.head) is SplitPoolingHead and not hasattr(same.vision_model.head, "probe")
    for got, want in zip(embeddings(same), embeddings(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_gelu_tanh_belongs_to_the_layer_before_it(plain: Any) -> None:
    quantized = clipft.quantize(plain)
    found = {name: part.activation for name, part in quantized.named_modules() if name.endswith("fc1")}
    assert len(found) == 7 and set(found.values()) == {"gelu_tanh"}
    by_steps = copy.deepcopy(quantized)
    for module in by_steps.modules():
        if type(module).__name__ == "QuantizedMLP":  # as it would be without an activation in the op
            module.fc1.activation = None
            module.__class__ = type(plain.text_model.encoder.layers[0].mlp)
        elif type(module).__name__ == "QuantizedEncoderLayer":
            module.__class__ = type(plain.text_model.encoder.layers[0])
    for got, want in zip(embeddings(quantized), embeddings(by_steps), strict=True):
        assert cosine(got, want) > 0.9995


def test_hidden_states_attentions_and_hooks(plain: Any) -> None:
    quantized = clipft.quantize(plain)
    want = embeddings(quantized)
    got = quantized.get_image_features(tiny_inputs("siglip")["pixel_values"], output_hidden_states=True)
    assert len(got.hidden_states) == 4 and got.last_hidden_state.shape == (6, 16, 32)
    quantized.set_attn_implementation("eager")
    shapes: list[Any] = []
    quantized.text_model.encoder.layers[-1].mlp.fc1.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    for one, other in zip(embeddings(quantized), want, strict=True):
        assert cosine(one, other) > 0.999
    assert shapes == [(6, 16, 64)]


def test_other_picture_sizes(plain: Any) -> None:
    quantized, pixels = clipft.quantize(plain), torch.randn(2, 3, 50, 66)
    with torch.no_grad():
        got, want = (
            m.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output for m in (quantized, plain)
        )
    assert cosine(got, want) > 0.99
    with pytest.raises(ValueError, match="expected pictures of the model's size, 32 x 32, got 50 x 66"):
        quantized.get_image_features(pixels)


def test_fused_adapted_and_sixteen_bit_models(plain: Any) -> None:
    pytest.importorskip("peft")
    near(clipft.quantize(clipft.fuse(copy.deepcopy(plain))), plain)
    adapted = clipft.add_lora(copy.deepcopy(plain), r=4, dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    near(clipft.quantize(adapted), copy.deepcopy(clipft.unfuse(adapted)).merge_and_unload().eval())
    half = clipft.quantize(copy.deepcopy(plain).bfloat16())
    assert half.dtype == embeddings(half)[1].dtype == torch.bfloat16
    near(half, plain, 0.98)


def test_naflex_and_a_tower_without_its_head_are_refused(plain: Any) -> None:
    with pytest.raises(ValueError, match=r"int8 takes a CLIPModel, .* or SiglipModel so far, got a Siglip2Model"):
        clipft.quantize(tiny_model("naflex"))
    plain.vision_model.use_head = False
    del plain.vision_model.head
    with pytest.raises(ValueError, match=r"expected a vision tower with its pooling head \(vision_use_head\)"):
        clipft.quantize(plain)


# ---- the report, and calibration ----


def test_calibration_moves_scale_into_the_norms_of_blocks_and_head(plain: Any) -> None:
    with torch.no_grad():  # an input channel that dwarfs the others
        for norm in (plain.vision_model.head.layernorm, plain.text_model.encoder.layers[0].layer_norm1):
            norm.weight[5], norm.bias[5] = 40.0, 20.0
    as_it_is, calibrated = clipft.quantize(plain), clipft.quantize(plain, calibrate=True)
    before, after = (model.quantization_report["layers"] for model in (as_it_is, calibrated))
    for name in ("vision_model.head.mlp.fc1", "text_model.encoder.layers.0.self_attn.q_proj"):
        assert after[name]["smoothing"] is not None and after[name]["error"] < 0.7 * before[name]["error"]
    assert after["vision_model.head.attention.kv_proj"]["smoothing"] is None  # what it reads, others read too
    near(calibrated, plain)


def test_the_report_is_of_padded_captions(plain: Any) -> None:
    """The last token, padding here, is what is pooled."""
    plain.config.text_config.max_position_embeddings = 20
    plain, seen = type(plain)(plain.config).eval(), []
    plain.text_model.register_forward_pre_hook(lambda *args: seen.append(args[2]["input_ids"]), with_kwargs=True)
    report = clipft.quantize(plain).quantization_report
    assert len(seen) == 2 and all(ids.shape == (32, 20) and set(ids[:, 16:].flatten().tolist()) == {1} for ids in seen)
    assert report["texts"] == "32 of random tokens" and report["text_cosine"]["mean"] > 0.99
    assert report["image_cosine"]["mean"] > 0.99 and report["bytes"]["int8"] < report["bytes"]["float"]
    assert json.loads(json.dumps(report)) == report


# ---- files ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an int8 model, as the command writes it."""
    pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("siglip")
    model, processor = tiny_siglip("siglip", path / "tokenizer")
    model.save_pretrained(path / "float")
    processor.save_pretrained(path / "float")
    run("quantize", "--model", path / "float", "--output", path / "int8", "--calibrate", "--min-cosine", "0.9")
    return path / "int8"


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_saved_loaded_copied_and_pickled(folder: Path, tmp_path: Path) -> None:
    assert not (folder / "model.safetensors").exists()
    loaded, _ = clipft.load(folder)
    want = embeddings(loaded)
    near(loaded, clipft.load(folder.parent / "float")[0])
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["SiglipModel"]
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert type(other) is type(loaded) and all(map(torch.equal, embeddings(other), want))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_the_commands_take_the_folder(folder: Path, tmp_path: Path) -> None:
    pictures, vectors = class_folders(tmp_path / "pictures", 8), tmp_path / "vectors.npy"
    assert "accuracy" in run("evaluate", "--model", folder, "--data", pictures).lower()
    run("embed", "--model", folder, "--data", pictures, "--output", vectors)
    assert ".png" in run("search", "--text", "a red square", "--model", folder, "--index", vectors)


@pytest.mark.parametrize("fault", ["missing tensor", "other shape", "the float model's head", "no head", "CLIP's"])
def test_a_strange_folder_is_refused(fault: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights, head = load_file(folder / WEIGHTS), "vision_model.head"
    config = json.loads((folder / "config.json").read_text())
    if fault == "missing tensor":
        del weights[f"{head}.attention.query"]
    elif fault == "other shape":
        weights[f"{head}.attention.kv_proj.weight_int8"] = torch.ones(32, 32, dtype=torch.int8)
    elif fault == "the float model's head":
        weights[f"{head}.probe"] = torch.zeros(1, 1, 32)
    elif fault == "no head":
        config["vision_config"]["vision_use_head"] = False
    else:
        clipft.quantize(tiny_clip_model()).save_pretrained(tmp_path / "clip")
        weights = load_file(tmp_path / "clip" / WEIGHTS)
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"clipft_int8.safetensors: |pooling head"):
        clipft.load(tmp_path)


def test_an_int8_folder_of_0_1_is_written_as_it_was_read(tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "data" / "v0_1" / "int8"
    clipft.load(old)[0].save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (old / WEIGHTS).read_bytes()


# ---- MetaCLIP 2 and Chinese-CLIP ----


@pytest.fixture(params=KINDS)
def other(request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, Tensor]]:
    """A model, its processor and a batch with padded captions."""
    model, processor = tiny_family(request.param)
    tokens = processor.tokenizer(["a red square", "red", "blue bar 12"], padding=True, return_tensors="pt")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, processor, {"pixel_values": pixels, **tokens}


def of_batch(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model(**batch)
    return output.image_embeds, output.text_embeds


def test_other_families_become_int8_whole(other: tuple[Any, Any, dict[str, Tensor]]) -> None:
    plain, _, batch = other
    quantized = clipft.quantize(plain)
    assert isinstance(quantized, type(plain))
    assert not any(isinstance(module, (nn.Linear, nn.Conv2d)) for module in quantized.modules())
    assert sum(isinstance(module, QuantizedLinear) for module in quantized.modules()) == 2 * 3 * 4 + 3
    kinds = [type(layer).__name__ for layer in quantized.vision_model.encoder.layers]
    assert kinds == ["QuantizedEncoderLayer", "QuantizedEncoderLayer", "QuantizedLastLayer"]
    assert quantized.get_image_features(batch["pixel_values"]).last_hidden_state is None
    for got, want in zip(of_batch(quantized, batch), of_batch(plain, batch), strict=True):
        assert cosine(got, want) > 0.99 and not torch.equal(got, want)
    report = quantized.quantization_report
    assert len(report["layers"]) == 2 * 3 * 6 + 3 and report["text_cosine"]["mean"] > 0.99


def test_their_blocks_in_one_pass_are_their_steps(other: tuple[Any, Any, dict[str, Tensor]]) -> None:
    """Which also run where someone watches a part."""
    plain, _, batch = other
    quantized, seen = clipft.quantize(plain), []
    watched = copy.deepcopy(quantized)
    for module in watched.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(lambda *args: seen.append(args[2].shape))
    for got, want in zip(of_batch(quantized, batch), of_batch(watched, batch), strict=True):
        assert cosine(got, want) > 0.9995
    assert len(seen) == 2 * 3 * 4 + 3


def test_their_files_calibration_and_adapters(other: tuple[Any, Any, dict[str, Tensor]], tmp_path: Path) -> None:
    plain, processor, batch = other
    quantized = clipft.quantize(plain, calibrate=True, data=captioned(12), processor=processor)
    quantized.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = clipft.load(tmp_path)
    for same in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert type(same) is type(quantized) and all(
            map(torch.equal, of_batch(same, batch), of_batch(quantized, batch))
        )
    for got, want in zip(of_batch(loaded, batch), of_batch(plain, batch), strict=True):
        assert cosine(got, want) > 0.99


def test_part_of_a_bert_stays_in_float() -> None:
    """A block with a float layer runs as the plain one."""
    plain, processor = tiny_family("chinese_clip")
    tokens = processor.tokenizer(["a red square", "red"], padding=True, return_tensors="pt")
    for skip in (["key"], ["intermediate"], ["attention.output.dense"], ["output"]):
        quantized = clipft.quantize(plain, skip=skip)
        left = {name for name, module in quantized.named_modules() if isinstance(module, nn.Linear)}
        assert left == set(quantized.quantization_report["skipped"]) and len(left) in (3, 6)
        with torch.no_grad():
            got, want = (model.get_text_features(**tokens).pooler_output for model in (quantized, plain))
        assert cosine(got, want) > 0.99 and not torch.equal(got, want)
