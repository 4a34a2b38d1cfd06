"""clipft.quantize: what becomes int8, what it costs in accuracy, its report, and its files."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import captioned, tiny_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import clipft
from clipft.nn import QuantizedLinear
from clipft.ops.attention import attention

WEIGHTS = "clipft_int8.safetensors"


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(0, 500, (5, 11))
    ids[:, -1] = tiny_model().config.text_config.eos_token_id
    return {"pixel_values": torch.randn(5, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def embeddings(model: CLIPModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model(**batch)
    return output.image_embeds, output.text_embeds


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a, b).min())


def near(model: CLIPModel, plain: CLIPModel, batch: dict[str, Tensor], least: float = 0.995) -> None:
    for got, want in zip(embeddings(model, batch), embeddings(plain, batch), strict=True):
        assert cosine(got, want) > least and not torch.equal(got, want)


# ---- what becomes int8 ----


def test_every_linear_layer_becomes_int8_and_the_model_stays(batch: dict[str, Tensor]) -> None:
    plain = tiny_model()
    before = copy.deepcopy(plain.state_dict())
    quantized = clipft.quantize(plain)
    assert isinstance(quantized, CLIPModel) and not quantized.training and quantized is not plain
    assert not any(isinstance(module, (nn.Linear, nn.Conv2d)) for module in quantized.modules())
    assert sum(isinstance(module, QuantizedLinear) for module in quantized.modules()) == 2 * 3 * 4 + 3
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    near(quantized, plain, batch)
    assert type(plain) is CLIPModel and all(torch.equal(plain.state_dict()[name], before[name]) for name in before)


def test_logits_and_loss_as_a_clip_model_gives_them(batch: dict[str, Tensor]) -> None:
    quantized = clipft.quantize(tiny_model())
    with torch.no_grad():
        output = quantized(**batch, return_loss=True, output_hidden_states=True)
    assert output.logits_per_image.shape == (5, 5) and output.loss.isfinite()
    assert len(output.vision_model_output.hidden_states) == 4


def test_a_block_in_one_pass_equals_its_steps(batch: dict[str, Tensor]) -> None:
    """Where a layer is skipped the block's norms and sums are torch's own: the same model but for rounding."""
    plain = tiny_model()
    quantized = clipft.quantize(plain)
    kinds = [type(layer).__name__ for layer in quantized.vision_model.encoder.layers]
    assert kinds == ["QuantizedEncoderLayer", "QuantizedEncoderLayer", "QuantizedLastLayer"]
    by_steps = copy.deepcopy(quantized)
    for tower in (by_steps.vision_model, by_steps.text_model):
        for layer in tower.encoder.layers:
            layer.__class__ = CLIPEncoderLayer
    for got, want in zip(embeddings(quantized, batch), embeddings(by_steps, batch), strict=True):
        assert cosine(got, want) > 0.9995
    quantized.set_attn_implementation("eager")
    with torch.no_grad():
        output = quantized.vision_model(pixel_values=batch["pixel_values"], output_attentions=True)
    assert len(output.attentions) == 3 and output.attentions[0].shape[0] == 5


def test_in_place(batch: dict[str, Tensor]) -> None:
    plain = tiny_model()
    quantized = clipft.quantize(plain, inplace=True)
    assert quantized is plain
    near(quantized, tiny_model(), batch)


@pytest.mark.parametrize(
    "skip, float_layers",
    [
        ("visual_projection", {"visual_projection"}),
        (["text_projection", "patch_embedding"], {"text_projection", "vision_model.embeddings.patch_embedding"}),
        (["fc1"], {f"{t}_model.encoder.layers.{n}.mlp.fc1" for t in ("text", "vision") for n in range(3)}),
        (["vision_model.encoder.layers.1.self_attn.k_proj"], None),
    ],
)
def test_skip_leaves_layers_in_float(skip: Any, float_layers: set[str] | None, batch: dict[str, Tensor]) -> None:
    plain = tiny_model()
    quantized = clipft.quantize(plain, skip=skip)
    left = {name for name, module in quantized.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    expected = set(skip) if float_layers is None else float_layers
    assert left == expected and set(quantized.quantization_report["skipped"]) == expected
    assert not expected & quantized.quantization_report["layers"].keys()
    near(quantized, plain, batch)


def test_a_skip_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"skip: 'c_fc' matches no layer; there are .*q_proj.*fc2.*visual_projection"):
        clipft.quantize(tiny_model(), skip=["c_fc"])
    with pytest.raises(ValueError, match="'proj' matches no layer"):  # whole parts of names only
        clipft.quantize(tiny_model(), skip="proj")


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu", "relu"])
def test_activations(hidden_act: str, batch: dict[str, Tensor]) -> None:
    plain = tiny_model()
    config = CLIPConfig(
        text_config=plain.config.text_config.to_dict() | {"hidden_act": hidden_act},
        vision_config=plain.config.vision_config.to_dict() | {"hidden_act": hidden_act},
        projection_dim=16,
    )
    torch.manual_seed(0)
    plain = CLIPModel(config).eval()
    quantized = clipft.quantize(plain)
    fused = quantized.vision_model.encoder.layers[0].mlp.fc1.activation
    assert fused == (hidden_act if hidden_act != "relu" else None)
    near(quantized, plain, batch)


def test_fused_and_lora_models(batch: dict[str, Tensor]) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny_model()
    near(clipft.quantize(clipft.fuse(copy.deepcopy(plain))), plain, batch)
    adapted = clipft.add_lora(tiny_model(), r=4, dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    merged = copy.deepcopy(clipft.unfuse(adapted)).merge_and_unload().eval()
    assert cosine(*(embeddings(model, batch)[0] for model in (merged, plain))) < 0.999
    near(clipft.quantize(adapted), merged, batch)
    assert isinstance(adapted, peft.PeftModel) and any("lora_A" in name for name, _ in adapted.named_parameters())


def test_sixteen_bit_models(batch: dict[str, Tensor]) -> None:
    plain = tiny_model()
    half = clipft.quantize(copy.deepcopy(plain).to(torch.bfloat16))
    inputs = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
    assert half.dtype == torch.bfloat16 and embeddings(half, inputs)[0].dtype == torch.bfloat16
    for got, want in zip(embeddings(half, inputs), embeddings(plain, batch), strict=True):
        assert cosine(got.float(), want) > 0.98


def test_other_picture_sizes(batch: dict[str, Tensor]) -> None:
    plain = tiny_model()
    quantized = clipft.quantize(plain)
    pixels = torch.randn(2, 3, 50, 66)  # 3 x 4 whole patches of 16
    with torch.no_grad():
        got, want = (
            m.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output for m in (quantized, plain)
        )
    assert cosine(got, want) > 0.995
    with pytest.raises(ValueError, match="expected pictures of the model's size, 32 x 32, got 50 x 66"):
        quantized.get_image_features(pixels)


def test_one_picture() -> None:
    plain = tiny_model()
    quantized, pixels = clipft.quantize(plain), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        got, want = (model.get_image_features(pixels).pooler_output for model in (quantized, plain))
    assert got.shape == (1, 16) and cosine(got, want) > 0.99


def test_the_last_layer_computes_the_class_token_alone(batch: dict[str, Tensor]) -> None:
    quantized = clipft.quantize(tiny_model())
    pixels = batch["pixel_values"]
    whole, only = (quantized.get_image_features(pixels, class_token_only=flag) for flag in (False, True))
    assert whole.last_hidden_state.shape == (len(pixels), 5, 32) and only.last_hidden_state is None
    assert torch.nn.functional.cosine_similarity(whole.pooler_output, only.pooler_output).min() > 0.9999
    hidden = quantized.get_image_features(pixels, output_hidden_states=True)
    assert len(hidden.hidden_states) == 4 and torch.equal(hidden.last_hidden_state, whole.last_hidden_state)
    layer = quantized.vision_model.encoder.layers[0]  # kwargs reach every layer
    assert layer(torch.randn(2, 5, 32), class_token_only=True).shape == (2, 5, 32)


@pytest.mark.parametrize(
    "part", ["", "layer_norm1", "self_attn", "self_attn.out_proj", "layer_norm2", "mlp", "mlp.fc1", "mlp.fc2"]
)
@pytest.mark.parametrize("layer", [0, -1])
def test_hooks_of_every_part_see_all_tokens(layer: int, part: str, batch: dict[str, Tensor]) -> None:
    quantized, shapes = clipft.quantize(tiny_model()), []
    want = embeddings(quantized, batch)[0]
    block = quantized.vision_model.encoder.layers[layer]
    block.get_submodule(part).register_forward_hook(
        lambda _, inputs, output: shapes.append((output[0] if isinstance(output, tuple) else output).shape[1])
    )
    assert cosine(embeddings(quantized, batch)[0], want) > 0.999 and shapes == [5]


def test_attention_is_ours_but_under_a_mask(batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give what eager attention gives, for pictures, texts of one length, and texts that padding makes equal."""
    import clipft.models.int8_layers as module

    calls: list[bool] = []

    def counted(*args: Any, causal: bool, **kwargs: Any) -> Tensor:
        calls.append(causal)
        return attention(*args, causal=causal, **kwargs)

    monkeypatch.setattr(module, "attention", counted)
    padded = batch | {"attention_mask": batch["attention_mask"].clone()}
    padded["attention_mask"][2, 7:] = 0
    quantized = clipft.quantize(tiny_model())
    eager = copy.deepcopy(quantized)
    eager.set_attn_implementation("eager")
    for inputs, expected in ((batch, [False] * 3 + [True] * 3), (padded, [False] * 3)):
        calls.clear()
        got = embeddings(quantized, inputs)
        assert sorted(calls) == expected
        for ours, plain in zip(got, embeddings(eager, inputs), strict=True):
            assert cosine(ours, plain) > 0.9999
        assert sorted(calls) == expected


def test_compiles(batch: dict[str, Tensor]) -> None:
    quantized = clipft.quantize(tiny_model())
    compiled = torch.compile(lambda pixels: quantized.get_image_features(pixel_values=pixels).pooler_output)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(batch["pixel_values"]), quantized.get_image_features(batch["pixel_values"]).pooler_output
        )


def test_several_threads_at_once(batch: dict[str, Tensor]) -> None:
    quantized = clipft.quantize(tiny_model())
    want = embeddings(quantized, batch)[0]
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(embeddings(quantized, batch)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, want) for result in results)


# ---- the report, and calibration ----


def test_report_tells_each_layer_and_the_whole() -> None:
    plain = tiny_model()
    report = clipft.quantize(plain).quantization_report
    assert json.loads(json.dumps(report)) == report
    linears = {name for name, module in plain.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert report["layers"].keys() == linears
    assert all(0 < layer["error"] < 0.05 for layer in report["layers"].values())
    for kind in ("image", "text"):
        assert 0.99 < report[f"{kind}_cosine"]["min"] <= report[f"{kind}_cosine"]["mean"] <= 1.0
    assert report["pictures"] == "32 embedded drawings" and report["texts"] == "32 of random tokens"
    assert report["bytes"]["int8"] < 0.6 * report["bytes"]["float"]  # a third of this model is embeddings


def test_report_sees_bad_layers() -> None:
    plain = tiny_model()
    with torch.no_grad():  # one huge input takes all levels of its row
        plain.vision_model.encoder.layers[1].layer_norm1.bias[5] = 1000.0
        plain.vision_model.encoder.layers[1].self_attn.v_proj.weight[:, 5] = 0.0
    layers = clipft.quantize(plain).quantization_report["layers"]
    assert max(layers, key=lambda name: layers[name]["error"]) == "vision_model.encoder.layers.1.self_attn.v_proj"


def test_calibration_lowers_errors_where_it_is_kept(batch: dict[str, Tensor]) -> None:
    plain = tiny_model()
    with torch.no_grad():  # an input channel that dwarfs the others, as real CLIPs have
        for layer in plain.vision_model.encoder.layers:
            layer.layer_norm1.weight[5] = 40.0
            layer.layer_norm1.bias[5] = 20.0
    as_it_is, calibrated = clipft.quantize(plain), clipft.quantize(plain, calibrate=True)
    before, after = as_it_is.quantization_report, calibrated.quantization_report
    name = "vision_model.encoder.layers.0.self_attn.q_proj"
    assert after["layers"][name]["smoothing"] is not None
    assert after["layers"][name]["error"] < 0.7 * before["layers"][name]["error"]
    near(calibrated, plain, batch)
    assert after["image_cosine"]["mean"] >= before["image_cosine"]["mean"]


def test_given_data_and_captions() -> None:
    pytest.importorskip("torchvision")
    from tiny_clip import tiny_clip

    model, processor = tiny_clip()
    report = clipft.quantize(model, data=captioned(40), processor=processor).quantization_report
    assert report["pictures"] == "32 rows of the data" and report["texts"] == "captions of the 32 rows of the data"
    with pytest.raises(ValueError, match="processor: expected the model's processor together with data"):
        clipft.quantize(model, data=captioned(4))


# ---- files ----


def test_saved_and_loaded(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    pytest.importorskip("torchvision")
    from tiny_clip import tiny_clip

    plain, processor = tiny_clip()
    quantized = clipft.quantize(plain, calibrate=True, skip=["text_projection"])
    quantized.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob(".*"))
    loaded, _ = clipft.load(tmp_path)
    assert all(map(torch.equal, embeddings(loaded, batch), embeddings(quantized, batch)))
    assert loaded.quantization_report == quantized.quantization_report and type(loaded) is type(quantized)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(OSError, match="no file named model"):
        CLIPModel.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"dtype: not for .*, an int8 model"):
        clipft.load(tmp_path, dtype=torch.float16)


def test_copies_and_pickles(batch: dict[str, Tensor]) -> None:
    quantized = clipft.quantize(tiny_model())
    want = embeddings(quantized, batch)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert all(map(torch.equal, embeddings(other, batch), want))
        assert other.quantization_report == quantized.quantization_report


def saved(folder: Path) -> Path:
    pytest.importorskip("torchvision")
    from tiny_clip import tiny_clip

    plain, processor = tiny_clip()
    clipft.quantize(plain).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "fault", ["cut", "noise", "missing tensor", "other shape", "float weights", "half scales", "foreign"]
)
def test_a_damaged_file_is_named(fault: str, tmp_path: Path) -> None:
    weights = saved(tmp_path) / WEIGHTS
    tensors = load_file(weights)
    name = "vision_model.encoder.layers.0.mlp.fc1"
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "noise":
        weights.write_bytes(bytes(range(256)) * 10)
    else:
        if fault == "missing tensor":
            del tensors[f"{name}.weight_scale"]
        if fault == "other shape":
            tensors[f"{name}.weight_int8"] = tensors[f"{name}.weight_int8"][:, :-1].contiguous()
        if fault == "float weights":
            tensors[f"{name}.weight_int8"] = tensors[f"{name}.weight_int8"].float()
        if fault == "half scales":
            tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].half()
        if fault == "foreign":
            tensors = {"a.weight_int8": torch.ones(2, 2, dtype=torch.int8)}
        save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"clipft_int8.safetensors: (expected |)(the |)(weights|.*weight_)"):
        clipft.load(tmp_path)


def test_an_int8_model_does_not_share_a_folder_with_a_float_one(tmp_path: Path) -> None:
    plain = tiny_model()
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder of its own for an int8 model, found model.safetensors"):
        clipft.quantize(plain).save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_a_folder_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = clipft.quantize(tiny_model())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipft.models.int8.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        quantized.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- bad input ----


def test_what_it_refuses() -> None:
    quantized = clipft.quantize(tiny_model())
    with pytest.raises(ValueError, match="expected a float model, got one that has int8 layers already"):
        clipft.quantize(quantized)
    with pytest.raises(TypeError, match=r"model: expected a CLIPModel, .* or a peft model of one, got Linear"):
        clipft.quantize(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="expected a model on the CPU, got one on meta"):
        clipft.quantize(tiny_model().to("meta"))
    broken = tiny_model()
    broken.text_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model: text_projection: .*weight must be finite"):
        clipft.quantize(broken)
    for train in (clipft.fuse, lambda model: clipft.freeze(model, "text"), clipft.add_lora):
        with pytest.raises(ValueError, match="expected a float model, got one with int8 layers, which do not train"):
            train(quantized)
