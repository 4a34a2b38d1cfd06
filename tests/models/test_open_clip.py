"""open_clip's models, loaded as Hugging Face's and written back: the same embeddings, tokens and pixels there."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from safetensors.torch import load_file
from tiny_clip import picture, tiny_clip
from tiny_families import tiny_tokenizer
from tiny_open_clip import TEXTS, open_clip_model, tiny_cfg, write_folder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

import clipft
from clipft.data.transforms import build_transform
from clipft.families.registry import family_of_type
from clipft.models import open_clip_layout
from clipft.models.convert import reasons, to_hf, to_open_clip
from clipft.models.saving import save_model

open_clip = pytest.importorskip("open_clip")
PICTURES = [picture(index)[0].resize((61, 47)) for index in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny", tiny_cfg(), open_clip_model(tiny_cfg()).state_dict())


def check_same(loaded: tuple[Any, Any], folder: Path, side: int = 32) -> None:
    """clipft's model and processor against what open_clip makes of the folder."""
    (model, processor), name = loaded, f"local-dir:{folder}"
    peer, _, preprocess = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    own = processor.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    whole = (own == processor.tokenizer.eos_token_id).cumsum(1) <= 1  # up to the end; what comes then is padding
    end = whole & (own != processor.tokenizer.eos_token_id)
    assert own.shape == tokens.shape and torch.equal(own[end], tokens[end])
    pixels = torch.stack([preprocess(one) for one in PICTURES])
    mine = torch.stack([build_transform(processor.image_processor)(one) for one in PICTURES])
    assert mine.shape == pixels.shape == (len(PICTURES), 3, side, side)
    assert (mine - pixels).abs().max() < 0.02
    with torch.no_grad():
        texts, images = peer.eval().encode_text(tokens, normalize=True), peer.encode_image(pixels, normalize=True)
        inputs = {"pixel_values": pixels, "input_ids": own}
        found = model(**inputs)
        for got, want in ((found.text_embeds, texts), (found.image_embeds, images)):
            assert (normalize(got) - want).abs().max() < 1e-5
        logits = peer.logit_scale.exp() * images @ texts.t()
        logits = logits if peer.logit_bias is None else logits + peer.logit_bias
    torch.testing.assert_close(found.logits_per_image, logits, atol=1e-3, rtol=1e-4)


# ---- what can be expressed is the same ----

KINDS = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True, "vision_cfg__final_ln_after_pool": True},
    "tanh, eps, odd widths": {
        "vision_cfg__act_kwargs": {"approximate": "tanh"},
        "text_cfg__norm_kwargs": {"eps": 1e-3},
        "vision_cfg__mlp_ratio": 4.9231,
        "text_cfg__vocab_size": 49408,
    },
    "custom_text": {"custom_text": True, "nonscalar_logit_scale": True},
    "eos": {"text_cfg__pool_type": "eos", "text_cfg__eos_id": 49407, "vision_cfg__patch_dropout": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    model_cfg, preprocess = tiny_cfg(**KINDS[kind]), None
    if kind == "eos":
        preprocess = {"mean": 0.5, "std": [0.5, 0.4, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    source = write_folder(tmp_path / "source", model_cfg, open_clip_model(model_cfg).state_dict(), preprocess)
    loaded = clipft.load(source)
    check_same(loaded, source)
    clipft.convert(loaded, tmp_path / "back", to="open_clip")
    check_same(loaded, tmp_path / "back")
    if kind == "eos":
        clipft.convert(source, tmp_path / "hf", to="hf")
        check_same(clipft.load(tmp_path / "hf"), source)


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """timm's SigLIP tower with two narrow layers."""
    timm = pytest.importorskip("timm")
    name, make = "vit_base_patch16_siglip_224", timm.create_model
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: make(*args, **kwargs | small))
    tower = open_clip_layout.TimmTower(64, 2, 2, 256, 16, 224, "gelu")
    monkeypatch.setitem(open_clip_layout.TIMM_SIGLIP, name, tower)
    yield name


def siglip_cfg(timm_name: str, **text: Any) -> dict[str, Any]:
    model_cfg = dict(open_clip.get_model_config("ViT-B-16-SigLIP"))
    model_cfg["embed_dim"] = 64
    assert model_cfg["vision_cfg"]["timm_model_name"] == timm_name
    model_cfg["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2, "vocab_size": 300, "context_length": 16} | text
    return model_cfg


def save_tokenizer(folder: Path) -> None:
    """Of words, as T5's are: ends with </s>, pads on the right."""
    words = sorted({word for text in TEXTS for word in text.lower().replace("!", "").replace(",", "").split()})
    vocabulary = {
        token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *words, "its", "oclock", "!"])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="</s>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("text", [{}, {"act_kwargs": {"approximate": "tanh"}}, {"proj_type": "none"}])
def test_a_siglip(text: dict[str, Any], small_timm: str, tmp_path: Path) -> None:
    model_cfg = siglip_cfg(small_timm, **text)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    state = open_clip_model(model_cfg).state_dict()
    source = write_folder(tmp_path / "source", model_cfg, state, preprocess)
    save_tokenizer(source)
    loaded = clipft.load(source)
    assert type(loaded[0]).__name__ == "SiglipModel"
    check_same(loaded, source, 224)
    clipft.convert(loaded, tmp_path / "back", to="open_clip")
    check_same(loaded, tmp_path / "back", 224)
    clipft.convert(loaded, tmp_path / "hf", to="hf")
    check_same(clipft.load(tmp_path / "hf"), source, 224)


def test_a_metaclip_2(tmp_path: Path) -> None:
    """Its texts end with XLM-R's token 2, which is not the largest."""
    tokenizer = tiny_tokenizer("metaclip_2")
    model_cfg = tiny_cfg(quick_gelu=True, text_cfg__vocab_size=len(tokenizer))
    model_cfg["text_cfg"] |= {"pool_type": "eos", "eos_id": 2, "hf_tokenizer_name": "theirs"}
    source = write_folder(tmp_path / "source", model_cfg, open_clip_model(model_cfg).state_dict())
    tokenizer.save_pretrained(source)
    loaded = clipft.load(source)
    assert type(loaded[0]).__name__ == "MetaClip2Model"
    check_same(loaded, source)
    clipft.convert(loaded, tmp_path / "back", to="open_clip")
    check_same(loaded, tmp_path / "back")
    clipft.convert(source, tmp_path / "hf", to="hf")
    check_same(clipft.load(tmp_path / "hf"), source)


def test_longer_sides_are_not_padded(tmp_path: Path) -> None:
    """open_clip's third way to make a square, which none of its checkpoints has."""
    state = open_clip_model(tiny_cfg()).state_dict()
    folder = write_folder(tmp_path / "tiny", tiny_cfg(), state, {"resize_mode": "longest"})
    refused(folder, "expected resize_mode 'shortest' or 'squash', found 'longest'")


# ---- every architecture ----

LACKING = {  # architectures that neither a CLIPModel nor a SiglipModel is, by what their names have, and a reason
    "CLIPA": "no_ln_pre",
    "RN": "a ResNet",
    "alt": "layer scale",
    "coca": "CoCa's decoder",
    "convnext": "a tower of timm's",
    "roberta": "a text tower of Hugging Face's",
    "mt5": "a text tower of Hugging Face's",
    "nllb": "a text tower of Hugging Face's",
    "ViTamin": "a tower of timm's",
}


def on_meta(model_cfg: dict[str, Any]) -> dict[str, Tensor]:
    own = copy.deepcopy(model_cfg)
    with torch.device("meta"):
        return dict((open_clip.CustomTextCLIP if own.pop("custom_text", False) else open_clip.CLIP)(**own).state_dict())


def shallow(name: str) -> dict[str, Any]:
    model_cfg: dict[str, Any] = open_clip.get_model_config(name)
    for part in ("vision_cfg", "text_cfg"):
        model_cfg[part]["layers"] = 2
    return model_cfg


@pytest.fixture
def shallow_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: make(*args, **kwargs, depth=2))
    for name, tower in open_clip_layout.TIMM_SIGLIP.items():
        monkeypatch.setitem(open_clip_layout.TIMM_SIGLIP, name, dataclasses.replace(tower, layers=2))


def test_every_architecture_that_can_be_expressed(shallow_timm: None) -> None:
    """Names and shapes of all tensors, there and back; widths are their own."""
    names = [name for name in open_clip.list_models() if not reasons(open_clip.get_model_config(name))]
    assert len(names) >= 64
    for name in names:
        model_cfg = shallow(name)
        peer = on_meta(model_cfg)
        config, state = to_hf(model_cfg, peer, Path(name))
        with torch.device("meta"):
            model = family_of_type(config.model_type, name).model(config)
        assert {key: own.shape for key, own in model.state_dict().items()} == {key: t.shape for key, t in state.items()}
        written, back = to_open_clip(model)
        if model_cfg["text_cfg"].get("proj_type") == "none":  # a projection that changes nothing stands there
            peer |= {f"text.text_projection.{key}": state[f"text_model.head.{key}"] for key in ("weight", "bias")}
        assert {key: tensor.numel() for key, tensor in back.items()} == {key: t.numel() for key, t in peer.items()}
        assert (
            written["vision_cfg"].items()
            >= {
                key: value for key, value in model_cfg["vision_cfg"].items() if key in ("patch_size", "timm_model_name")
            }.items()
        )


@pytest.mark.parametrize("part, reason", LACKING.items())
def test_what_others_have_is_named(part: str, reason: str) -> None:
    names = [name for name in open_clip.list_models() if part in name and "RN50x" not in name]
    told = {name: "; ".join(reasons(open_clip.get_model_config(name))) for name in names}
    assert any(reason in line for line in told.values()), told


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-S-16-alt", "ViT-B-16-SigLIP2"])
def test_at_its_own_widths(name: str, shallow_timm: None, tmp_path: Path) -> None:
    """Two layers a tower, and fewer words."""
    model_cfg = shallow(name)
    model_cfg["text_cfg"]["vocab_size"] = 1000
    peer = open_clip_model(model_cfg)
    config, state = to_hf(model_cfg, peer.state_dict(), Path(name))
    model = family_of_type(config.model_type, name).model.from_pretrained(None, config=config, state_dict=state).eval()
    side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    pixels, ids = torch.randn(1, 3, side, side), torch.randint(3, 1000, (1, length))
    ids[:, -1] = config.text_config.vocab_size - 1
    with torch.no_grad():
        found = model(pixel_values=pixels, input_ids=ids)
        for got, want in ((found.text_embeds, peer.encode_text(ids)), (found.image_embeds, peer.encode_image(pixels))):
            assert (normalize(got) - normalize(want)).abs().max() < 1e-5


# ---- where they are ----


def checkpoint(path: Path, state: dict[str, Tensor]) -> Path:
    """As open_clip's training writes one: numpy's numbers stand in the optimizer's state."""
    path.parent.mkdir(exist_ok=True)
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(1e-3), "betas": (0.9, np.float32(0.98))}]}
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "name": "tiny", "state_dict": wrapped, "optimizer": optimizer}, path)
    return path


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``tiny``, which open_clip knows for the time of a test, with a tag in a cache of the hub."""
    factory, pretrained = (importlib.import_module(f"open_clip.{name}") for name in ("factory", "pretrained"))
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", tiny_cfg())
    tag = pretrained._slpcfg(hf_hub="org/tiny/", quick_gelu=True)
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"webli": tag, "other": tag})
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repo = cache / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    write_folder(repo / "snapshots" / ("0" * 40), tiny_cfg(), open_clip_model(tiny_cfg()).state_dict())
    return "tiny"


@pytest.mark.parametrize("prefix", ["hf-hub:", ""])
def test_a_name_on_the_hub(prefix: str, architecture: str) -> None:
    peer, _, _ = open_clip.create_model_and_transforms("hf-hub:org/tiny")
    model, _ = clipft.load(f"{prefix}org/tiny")
    assert torch.equal(model.visual_projection.weight, peer.visual.proj.t())
    assert model.name_or_path == f"{prefix}org/tiny"


def test_a_tag(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    """The activation is the one that its weights were trained with, which open_clip says only in a warning."""
    model, processor = clipft.load("open_clip:tiny/webli")
    assert "quick_gelu" in caplog.text and model.config.text_config.hidden_act == "quick_gelu"
    assert processor.image_processor.image_mean == (0.5,) * 3
    with pytest.raises(ValueError, match=r"open_clip:tiny/nothing: .*the tags of tiny: webli, other"):
        clipft.load("open_clip:tiny/nothing")
    with pytest.raises(ValueError, match="no architecture 'ViT-B-33'; there are ViT-B-32"):
        clipft.load("open_clip:ViT-B-33/openai")


def test_a_checkpoint(folder: Path, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "logs" / "epoch_3.pt", load_file(folder / "open_clip_model.safetensors"))
    monkeypatch.chdir(tmp_path)
    loaded = clipft.load("open_clip:tiny/logs/epoch_3.pt")
    assert loaded[0].name_or_path == f"open_clip:tiny/{path}"  # wherever it is read again
    check_same(loaded, folder)
    with pytest.raises(ValueError, match=r"name it, as in open_clip:ViT-B-32/.*epoch_3.pt"):
        clipft.load(path)


def test_weights_of_openai(tmp_path: Path) -> None:
    """The architecture from the shapes, as open_clip reads it."""
    model_cfg = tiny_cfg(quick_gelu=True, vision_cfg__head_width=64, text_cfg__width=64, text_cfg__heads=1)
    state = open_clip_model(model_cfg).state_dict()
    numbers = {name: torch.tensor(16) for name in ("input_resolution", "context_length", "vocab_size")}
    path = tmp_path / "ViT.pt"
    torch.save({name: tensor.half() for name, tensor in state.items()} | numbers, path)
    model, processor = clipft.load(path, dtype=torch.float32)
    peer = open_clip.load_openai_model(str(path), precision="fp32", device="cpu").eval()
    tokens = processor.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = peer.encode_text(open_clip.SimpleTokenizer(context_length=16)(TEXTS), normalize=True)
        got = model.get_text_features(tokens).pooler_output
    assert (normalize(got) - want).abs().max() < 1e-5


def test_both_libraries_files_in_one_folder(folder: Path, base: Path) -> None:
    """Hugging Face's are meant; a config.json of timm's says nothing."""
    (folder / "config.json").write_text('{"architecture": "vit"}')
    shutil.copy(base / "model.safetensors", folder)
    assert clipft.load(folder)[0].config.projection_dim == 16
    shutil.copytree(base, folder, dirs_exist_ok=True)
    assert clipft.load(folder)[0].config.text_config.num_hidden_layers == 3


def test_an_adapter_finds_its_base_and_open_clip_has_it_merged(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, processor = clipft.load(folder)
    adapted = clipft.add_lora(model, r=2)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_B" in name:
                tensor.normal_()
    save_model(adapted, processor, tmp_path / "run")
    merged = clipft.load(tmp_path / "run")
    result = run("convert", tmp_path / "run", "--to", "open_clip", "--output", tmp_path / "back")
    assert result.exit_code == 0 and "local-dir:" in result.output
    check_same(merged, tmp_path / "back")


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    loaded = tiny_clip()
    clipft.convert(loaded, tmp_path / "out", to="open_clip")
    check_same(loaded, tmp_path / "out")
    again = clipft.load(tmp_path / "out")
    check_same(again, tmp_path / "out")


# ---- refused ----


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def meta(state: dict[str, Any]) -> None:
    state["visual.proj"] = torch.empty(64, 16, device="meta")


def one_number(state: dict[str, Any]) -> None:
    state["visual.proj"] = torch.zeros(1).as_strided((64, 16), (0, 0))


@pytest.mark.parametrize(
    "change, message",
    [
        (meta, "expected whole tensors .* visual.proj"),
        (one_number, "expected whole tensors .* visual.proj"),
        (lambda state: state.update(x=Code()), "asks to run posix.mkdir"),
        (lambda state: state.update(other=torch.zeros(2)), "found others too: other"),
        (lambda state: state.pop("ln_final.bias"), "asks for are missing: ln_final.bias"),
        (
            lambda state: state.update({"visual.proj": torch.zeros(3, 16)}),
            r"visual.proj \[3, 16\] in place of \[64, 16",
        ),
        (lambda state: state.update(logit_scale=torch.tensor(1)), "logit_scale"),
        (lambda state: state.clear(), "expected a state dict"),
    ],
)
def test_weights_that_are_none(
    change: Callable[[Any], Any], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    change(state)
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    refused(folder, message)
    assert not (tmp_path / "ran").exists()


def refused(folder: Path, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        clipft.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_cfg__ls_init_value": 0.1}, "they lack: visual.transformer.resblocks.0.ls_1"),
        ({"vision_cfg__layers": 10**6}, "asks for 1000000 layers"),
        ({"vision_cfg__layers": 3}, "are missing: visual.transformer.resblocks.2"),
        ({"text_cfg__width": 1 << 30}, "hidden_size to be a number from 1 to"),
        ({"text_cfg__width": 64}, "shapes that the architecture asks for"),
        ({"text_cfg__tokenizer_kwargs": {"clean": "other"}}, "a tokenizer that transformers has"),
        ({"vision_cfg": None}, "vision_cfg and text_cfg are not both there"),
    ],
)
def test_configurations_that_lie(change: dict[str, Any], message: str, folder: Path) -> None:
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"] = tiny_cfg(**change)
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    refused(folder, message)


def test_files_that_are_not_there(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").write_bytes(b"cut")
    refused(folder, "expected weights as safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    refused(folder, "expected the weights in open_clip_model.safetensors or")
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps([1, 2]))
    refused(folder, "expected ")


@pytest.mark.parametrize("name, tag", [("ViT-L-14-336px", "ViT-L-14-336-quickgelu"), ("mine", "ARCHITECTURE")])
def test_an_archive_names_the_tag(name: str, tag: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/constants.pkl", b"")
    result = run("convert", path, "--to", "hf", "--output", tmp_path / "out")
    assert result.exit_code == 2 and f"open_clip:{tag}" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda model, processor: setattr(model.config.text_config, "hidden_act", "gelu"),
            "activations gelu and quick",
        ),
        (lambda model, processor: setattr(processor.image_processor, "resample", 0), "no preprocessing like this"),
    ],
)
def test_what_open_clip_has_not(change: Callable[[Any, Any], None], message: str, tmp_path: Path) -> None:
    model, processor = tiny_clip()
    change(model, processor)
    with pytest.raises(ValueError, match=message):
        clipft.convert((model, processor), tmp_path / "out", to="open_clip")
    assert not (tmp_path / "out" / "open_clip_config.json").exists()


def test_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'clipft\[open_clip\]'"):
        clipft.load("open_clip:ViT-B-32/openai")
