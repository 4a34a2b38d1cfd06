"""Maps of where texts are: right places on drawings, in each picture's own pixels, and the model as it was."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from tiny_clip import SIZE, tiny_clip
from tiny_families import tiny_family
from tiny_siglip import tiny_siglip

import clipft
from clipft.families.registry import family_of
from clipft.inference.explain import Locator, boxes_of
from clipft.inference.patches import PatchTower, windows_of
from clipft.models.int8_layers import QuantizedAttention

spec = importlib.util.spec_from_file_location("bench_explain", Path(__file__).parents[2] / "benchmarks" / "explain.py")
assert spec and spec.loader
bench = sys.modules["bench_explain"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def noise(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tiny():
    return tiny_clip()


# ---- right places ----


def test_drawings_are_found_where_they_are():
    """A small run of benchmarks/explain.py, whose results have the figures."""
    torch.manual_seed(0)
    model, processor = clipft.load("demo")
    found = bench.scenes(4, seed=3)
    maps = bench.maps_of(model, processor, found)
    own, prior = bench.score(maps, found), bench.priors(found)
    assert own["auroc"] > 0.93 > max(one["auroc"] for one in prior.values())
    assert own["pointing"] > 0.6 > 0.1 + max(one["pointing"] for one in prior.values())
    random = bench.maps_of(bench.random_weights(model.config).eval(), processor, found)
    assert abs(bench.correlation(maps, random)["mean"]) < 0.15
    assert bench.correlation(maps, random)["mean_of_sizes"] < 0.35


def test_what_lies_beyond_the_centre_crop_is_found_too():
    found = bench.scenes(3, "medium", seed=5, shape=(128, 384))
    maps = bench.maps_of(*clipft.load("demo"), found)
    beyond = [
        (scores, mask)
        for own, one in zip(maps, found, strict=True)
        for scores, mask in zip(own, one.masks, strict=True)
        if not mask[:, 128:256].any()  # which the model's crop keeps
    ]
    assert len(beyond) >= 3
    assert np.mean([bench.auroc(*pair) for pair in beyond]) > 0.93


@pytest.mark.parametrize("size", [(50, 40), (40, 157), (33, 33), (200, 1), (1, 1), (SIZE, SIZE)])
@pytest.mark.parametrize("zoom", [1.0, 2.5])
def test_every_pixel_has_the_mean_of_its_windows(tiny, size, zoom):
    """Two equal texts and an equal background share each place evenly."""
    scores = Locator(*tiny, ["a", "a"], background=["a"], zoom=zoom)(noise(*size))
    assert scores.shape == (2, size[1], size[0])
    np.testing.assert_allclose(scores, 1 / 3, atol=1e-5)


def test_boxes_surround_parts_above_the_threshold_best_first():
    scores = np.zeros((8, 10), np.float32)
    scores[1:3, 2:5], scores[5:8, 7:10], scores[6, 8] = 0.6, 0.7, 0.9
    scores[0, 9] = 0.5
    boxes = [(box.left, box.top, box.right, box.bottom, pytest.approx(box.score)) for box in boxes_of(scores, 0.5)]
    assert boxes == [(7, 5, 10, 8, 0.9), (2, 1, 5, 3, 0.6)]
    assert [box.left for box in boxes_of(scores, 0.5, 7)] == [7]


# ---- every model that can, as it is ----


def made(kind, folder):
    if kind == "clip":
        return tiny_clip()
    return tiny_siglip(kind, folder) if kind == "siglip2" else tiny_family(kind)


def maps(model, processor, zoom=2.0):
    return clipft.explain((model, processor), noise(), ["red", "square"], zoom=zoom).scores


@pytest.mark.parametrize("kind", ["clip", "metaclip_2", "chinese_clip", "siglip2"])
def test_families_fused_and_in_int8(kind, tmp_path):
    model, processor = made(kind, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    plain = maps(model, processor)
    assert plain.shape == (1, 2, 40, 50)
    assert np.ptp(plain[0, 0]) > 0
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    np.testing.assert_allclose(maps(clipft.fuse(copy.deepcopy(model)), processor), plain, atol=1e-5)
    int8 = clipft.quantize(model.eval())
    assert any(isinstance(module, QuantizedAttention) for module in int8.vision_model.modules())
    assert np.abs(maps(int8, processor) - plain).max() < 0.1
    embed = family_of(model).vision.embed_patches
    with torch.no_grad():
        own, exact = (
            embed(one, torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))[0]
            for one in (int8, model)
        )
    assert torch.nn.functional.cosine_similarity(own, exact, dim=-1).min() > 0.97


def test_patches_are_what_keys_that_attend_to_keys_find(tiny):
    """In the upper half of the layers, the formula in plain torch."""
    model = copy.deepcopy(tiny[0])
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches, whole = family_of(model).vision.embed_patches(model, pixels)
        output = model.get_image_features(pixels, output_hidden_states=True)
        total = torch.zeros(())
        for states, layer in list(zip(output.hidden_states, model.vision_model.encoder.layers, strict=False))[1:]:
            attention, given = layer.self_attn, layer.layer_norm1(states)
            keys, values = (part.unflatten(-1, (2, 16)) for part in (attention.k_proj(given), attention.v_proj(given)))
            shares = (torch.einsum("nqhd,nkhd->nhqk", keys, keys) / 4).softmax(-1)
            total = total + attention.out_proj(torch.einsum("nhqk,nkhd->nqhd", shares, values).flatten(2))
        expected = model.visual_projection(model.vision_model.post_layernorm(total))[:, 1:]
    torch.testing.assert_close(patches, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, output.pooler_output)


@pytest.mark.parametrize("kind", ["clip", "chinese_clip", "siglip2"])
def test_a_patch_tells_of_its_own_place(kind, tmp_path):
    """What changes in the upper right changes the patches there most."""
    model, processor = made(kind, tmp_path)
    tower, (whole,) = PatchTower(model, processor), windows_of(SIZE, SIZE, 1)
    pixels = tower.pixels(noise(SIZE, SIZE))
    changed = pixels.clone()
    changed[:, : SIZE // 2, SIZE // 2 :] = 255 - changed[:, : SIZE // 2, SIZE // 2 :]
    before, after = (tower.embeddings(one, [whole])[0][0] for one in (pixels, changed))
    moved = (after - before).norm(dim=-1)
    half = len(moved) // 2
    others = torch.stack([moved[:half, :half], moved[half:, :half], moved[half:, half:]])
    assert moved[:half, half:].mean() > 1.2 * others.mean((1, 2)).max()


def test_an_adapter_is_looked_through(tiny):
    pytest.importorskip("peft")
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    base = maps(*tiny)
    adapted = clipft.add_lora(model, r=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    own = maps(adapted, processor)
    assert np.abs(own - base).max() > 0.01
    np.testing.assert_allclose(maps(adapted.merge_and_unload(), processor), own, atol=1e-5)


def test_who_cannot_say_where(tmp_path):
    with pytest.raises(ValueError, match=r"model: maps are for ViTs as of CLIP, .*; SigLIP 2 NaFlex has no patches"):
        maps(*tiny_siglip("naflex", tmp_path))
    with pytest.raises(TypeError, match="model: expected one in torch, got ONNX encoders"):
        maps(SimpleNamespace(encode_images=None), None)


# ---- what is given and what comes back ----


def test_pictures_of_several_sizes_come_back_each_in_its_own(tiny, tmp_path):
    path = tmp_path / "a.png"
    noise().save(path)
    grey = noise(20, 30).convert("L")
    found = clipft.explain(tiny, [path, grey], "red")
    assert [one.scores.shape for one in found] == [(1, 40, 50), (1, 30, 20)]
    assert [one.name for one in found] == [str(path), "picture 1"]
    with pytest.raises(ValueError, match="scores: expected pictures of one size, got 2"):
        _ = found.scores
    one = clipft.explain(tiny, noise(), "red")
    np.testing.assert_array_equal(one.scores[0], found[0].scores)
    assert found._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": []}, ValueError, "texts: expected at least one text, got none"),
        ({"texts": ["red", " "]}, ValueError, "texts: expected what is to be found in words, got an empty text"),
        ({"texts": ["red", 3]}, TypeError, "texts: expected strings, got int"),
        ({"images": []}, ValueError, "images: expected at least one picture, got none"),
        ({"images": 3}, TypeError, "images: expected a picture, a path or several, got int"),
        ({"images": [3]}, TypeError, "images: expected PIL pictures or paths, got int"),
        ({"images": "missing.png"}, ValueError, "missing.png: the image cannot be read"),
        ({"threshold": 1.0}, ValueError, "threshold: expected a score between 0 and 1, got 1.0"),
        ({"threshold": 0.0}, ValueError, "threshold: expected a score between 0 and 1, got 0.0"),
        ({"zoom": 0.5}, ValueError, "zoom: expected at least 1"),
        ({"background": []}, ValueError, "background: expected at least one text, got none"),
        ({"output": "heat.jpg"}, ValueError, "output: expected the name of a .png"),
        ({"thresold": 0.5}, TypeError, "thresold: no such option; did you mean 'threshold'"),
    ],
)
def test_what_does_not_fit_is_named(tiny, change, error, message):
    with pytest.raises(error, match=message):
        clipft.explain(**{"model": tiny, "images": noise(), "texts": ["red"], **change})


# ---- the command ----


def test_the_command_draws_and_lists(base, tmp_path):
    picture, heat = tmp_path / "$a$.png", tmp_path / "out" / "heat.png"
    noise().save(picture)
    texts = ["--text", "a $red$ square", "--text", "blue"]
    result = run("explain", "--model", base, "--image", picture, *texts, "--output", heat, "--threshold", 0.01)
    assert result.exit_code == 0, result.output
    with Image.open(heat) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 3 * 200
    said = json.loads(heat.with_suffix(".json").read_text())
    (one,) = said["images"]
    assert (one["image"], one["width"], one["height"]) == (str(picture), 50, 40)
    assert [text["text"] for text in one["texts"]] == ["a $red$ square", "blue"]
    assert one["texts"][0]["boxes"][0].keys() == {"left", "top", "right", "bottom", "score"}
    assert "a $red$ square" in result.output


def test_the_command_names_what_is_wrong_by_its_options(base, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_text("no picture")
    command = ["explain", "--model", base, "--image", picture, "--text"]
    for arguments, message in (
        ([*command, "red"], f"error: {picture}: the image cannot be read (cannot identify it as a picture)"),
        ([*command, ""], "error: --text: expected what is to be found in words"),
        ([*command, "red", "--output", "heat.gif"], "error: --output: expected the name of a .png"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.output
