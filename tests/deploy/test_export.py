"""clipft.export_onnx and clipft.OnnxCLIP: parity with torch, what the files hold, and what goes wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_folders import undescribed
from PIL import Image
from tiny_clip import SIZE, captioned, picture, tiny_clip
from torch import nn
from transformers import CLIPImageProcessor
from typer.testing import CliRunner

import clipft
import clipft.nn
from clipft.cli import app
from clipft.data.pictures import to_pixels
from clipft.data.transforms import build_transform

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
FILES = {"image_encoder.onnx", "text_encoder.onnx", "clipft_onnx.json", "processor_config.json", "tokenizer.json"}
INT8 = {"image_encoder.int8.onnx", "text_encoder.int8.onnx"}


@pytest.fixture
def written(exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Encoders that torch has exported once stand for those of each further export, whose models are here."""
    models = []

    def write(model: Any, folder: Path, kind: str, info: dict[str, Any]) -> None:
        models.append(model)
        for side in ("image", "text"):
            shutil.copy(exported[0] / f"{side}_encoder{kind}.onnx", folder)

    monkeypatch.setattr("clipft.deploy.export._write_encoders", write)
    return models


def embeds(features: Any) -> np.ndarray:
    return nn.functional.normalize(features.pooler_output, dim=-1).numpy()


# ---- parity ----


def test_the_folder_and_its_report(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, parity = exported
    names = {file.name for file in folder.iterdir()}
    assert names == FILES | INT8 | {"tokenizer_config.json", "class_vectors.npy"}  # one file an encoder
    assert not list(folder.parent.glob(".onnx*"))
    info = json.loads((folder / "clipft_onnx.json").read_text())
    assert info["parity"] == parity and info["opset"] == 20 and info["dim"] == 16
    assert info["logit_scale"] == pytest.approx(float(tiny_clip()[0].logit_scale.exp()))
    assert parity["data"] == "40 rows of the data"
    for kind, least in (("fp32", 1 - 1e-6), ("int8", 0.998)):
        for part in ("image_cosine", "text_cosine"):
            assert least < parity[kind][part]["min"] <= parity[kind][part]["mean"] <= 1 + 1e-6
        assert parity[kind]["retrieval"].keys() == parity["torch"]["retrieval"].keys()
        assert parity[kind]["latency_ms"]["image"] > 0
    assert parity["fp32"]["retrieval"] == parity["torch"]["retrieval"] and parity["fp32"]["top1_agreement"] == 1.0
    assert parity["int8"]["bytes"]["image_encoder"] < parity["fp32"]["bytes"]["image_encoder"]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("count, length", [(1, 2), (3, 9), (5, 24)])
def test_encoders_compute_what_the_model_computes(
    int8: bool, count: int, length: int, exported: tuple[Path, dict[str, Any]]
) -> None:
    """int8 against our own int8 layers: the same levels, sums and scales."""
    model, processor = tiny_clip()
    if int8:
        model = clipft.quantize(model, processor=processor)
    clip = clipft.OnnxCLIP(exported[0], int8=int8)
    torch.manual_seed(count)
    pixels, ids = torch.randn(count, 3, SIZE, SIZE), torch.randint(0, 500, (count, length))
    mask = torch.ones_like(ids)
    ids[:, -1] = model.config.text_config.eos_token_id
    ids[0, length // 2 :], mask[0, length // 2 + 1 :] = ids[0, -1], 0  # padding
    with torch.no_grad():
        images = embeds(model.get_image_features(pixel_values=pixels))
        texts = embeds(model.get_text_features(input_ids=ids, attention_mask=mask))
    np.testing.assert_allclose(clip.run_images(pixels.numpy()), images, atol=2e-6)
    np.testing.assert_allclose(clip.run_texts(ids.numpy(), mask.numpy()), texts, atol=2e-6)


def test_standard_operators_and_int8_weights(exported: tuple[Path, dict[str, Any]]) -> None:
    quantized = clipft.quantize(tiny_clip()[0])
    for name in FILES | INT8:
        if not name.endswith(".onnx"):
            continue
        model = onnx.load(exported[0] / name)
        onnx.checker.check_model(model, full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)] and not model.functions
        metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props if "clipft." in entry.key}
        assert metadata["clipft.preprocessing"]["crop_size"] == {"height": SIZE, "width": SIZE}
        assert metadata["clipft.logit_scale"] > 1 and metadata["clipft.tokenizer"] == "tokenizer.json"
        dims = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input]
        outputs = [output.name for output in model.graph.output]
        if name.startswith("image"):
            assert dims == [["batch", 3, SIZE, SIZE]] and outputs == ["image_embeds", "logits"]
        else:
            assert dims == [["batch", "length"]] * 2 and outputs == ["text_embeds"]
        own = {array.tobytes() for array in map(onnx.numpy_helper.to_array, model.graph.initializer)}
        tower = "vision" if name.startswith("image") else "text"
        kept = [t for n, t in quantized.state_dict().items() if n.endswith("weight_int8") and n.startswith(tower)]
        found = [tensor.numpy().tobytes() in own or tensor.t().numpy().tobytes() in own for tensor in kept]
        assert all(found) if name in INT8 else not any(found)


def test_pictures_and_texts(exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    model, processor = tiny_clip()
    rows = captioned(7)
    clip = clipft.OnnxCLIP(exported[0])
    pictures, texts = list(rows["image"]), list(rows["caption"])
    with torch.no_grad():
        inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
        output = model(**inputs)
    np.testing.assert_allclose(clip.encode_images(pictures, batch_size=3), output.image_embeds.numpy(), atol=2e-6)
    np.testing.assert_allclose(clip.encode_texts(texts, batch_size=2), output.text_embeds.numpy(), atol=2e-6)
    pictures[2].save(tmp_path / "a.png")
    assert np.array_equal(clip.encode_images([tmp_path / "a.png"]), clip.encode_images([pictures[2]]))
    assert clip.encode_images([]).shape == (0, 16) and clip.encode_texts([]).shape == (0, 16)
    assert len(clip.tokenize(["x" * 500])["input_ids"][0]) == 24
    with pytest.raises(TypeError, match="texts: expected a list of strings, got str"):
        clip.encode_texts("a cat")
    with pytest.raises(TypeError, match="images: expected a list of PIL pictures or paths, got str"):
        clip.encode_images("a.png")
    with pytest.raises(TypeError, match="images: expected PIL pictures or paths, got int"):
        clip.encode_images([3])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("shape", [(50, 40), (64, 64), (333, 500), (37, 901), (10, 10), (2, 300)])
def test_pixels_are_those_of_training(mode: str, shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    for config in (
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
        {"size": {"shortest_edge": 48}, "crop_size": {"height": 64, "width": 56}},  # padded
        {"size": {"height": 64, "width": 96}, "do_center_crop": False},
    ):
        processor: Any = CLIPImageProcessor(**config)
        own = json.loads(json.dumps(processor.to_dict(), default=dict))
        assert np.array_equal(to_pixels(image, own), build_transform(processor)(image).numpy())


def test_adapters_are_merged(written: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, processor = tiny_clip()
    plain, pixels = tiny_clip()[0], torch.randn(2, 3, SIZE, SIZE)
    adapted = clipft.add_lora(model, r=4, dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        want, other = (embeds(m.get_image_features(pixel_values=pixels)) for m in (adapted.eval(), plain))
    clipft.export_onnx(adapted, processor, tmp_path / "out", data=captioned(4), min_cosine=-1)
    with torch.no_grad():
        got = embeds(written[0].get_image_features(pixel_values=pixels))
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert type(written[0]).__name__ == "CLIPModel" and not any("lora" in name for name in written[0].state_dict())
    assert np.abs(want - other).max() > 1e-3


def test_a_bfloat16_model_is_exported_in_float32(written: list[Any], tmp_path: Path) -> None:
    model, processor = tiny_clip()
    clipft.export_onnx(model.to(torch.bfloat16), processor, tmp_path, data=captioned(4))
    assert {tensor.dtype for tensor in written[0].parameters()} == {torch.float32} and model.dtype == torch.bfloat16


def test_alone(exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """With numpy, pillow, tokenizers and onnxruntime, as ``pip install --no-deps clipft`` beside them."""
    captioned(1)[0]["image"].save(tmp_path / "a.png")
    absent = ("torch", "torchvision", "transformers", "datasets", "accelerate", "safetensors", "pyarrow", "sklearn")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({(*absent, 'typer', 'rich', 'jinja2', 'yaml', 'onnx', 'peft')!r});"
        f"import clipft; clip = clipft.OnnxCLIP({str(exported[0])!r});"
        f"embeds = clip.encode_images([{str(tmp_path / 'a.png')!r}]);"
        "print(embeds.shape, clip.encode_texts(['a red square']).shape, clip.classifiers['label'].logits(embeds).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 16) (1, 16) (1, 4)", done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_it_goes_to_workers(method: str, exported: tuple[Path, dict[str, Any]]) -> None:
    clip = clipft.OnnxCLIP(exported[0], threads=1)
    assert len(pickle.dumps(clip)) < 1_000_000
    picture, texts = captioned(1)[0]["image"], ["a red square"]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert np.array_equal(pool.apply(clip.preprocess, [picture]), clip.preprocess(picture))
        assert np.array_equal(pool.apply(clip.encode_texts, [texts]), clip.encode_texts(texts))


def test_threads(exported: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="threads: expected a number of at least 1, got 0"):
        clipft.OnnxCLIP(exported[0], threads=0)
    asked = []

    class Noted(clipft.OnnxCLIP):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            asked.append(options["threads"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr("clipft.inference.onnx_clip.OnnxCLIP", Noted)
    (tmp_path / "texts.txt").write_text("a red square\n")
    out = tmp_path / "texts.npy"
    embed = ("embed", "--model", exported[0], "--texts", tmp_path / "texts.txt", "--output", out)
    assert run(*embed, "--threads", 1).exit_code == 0
    found = run("search", "--index", out, "--model", exported[0], "--text", "a red square", "--threads", 2)
    assert found.exit_code == 0 and asked == [1, 2], found.output


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no sets of cores")
def test_a_thread_for_each_core_that_it_may_use(exported: tuple[Path, dict[str, Any]]) -> None:
    """ONNX Runtime by itself takes those of the machine."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import clipft.inference.onnx_clip as own;"
        f"clip = own.OnnxCLIP({str(exported[0])!r}); print(clip._image.get_session_options().intra_op_num_threads)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.usefixtures("written")
def test_weights_over_the_limit_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    parity = clipft.export_onnx(*tiny_clip(), folder, data=captioned(4), external_data_above=100_000)
    data = [folder / f"{name}.onnx.data" for name in ("image_encoder", "text_encoder")]
    assert {path.name for path in folder.iterdir()} == FILES | {"tokenizer_config.json", *(path.name for path in data)}
    assert all(
        (folder / f"{name}.onnx").stat().st_size < 100_000 < size for name, size in parity["fp32"]["bytes"].items()
    )
    assert parity["fp32"]["image_cosine"]["min"] > 1 - 1e-6
    clip = clipft.OnnxCLIP(folder)
    before = clip.identity()
    with pytest.raises(ValueError, match=r"written together: image_encoder.onnx.data not as clipft_onnx.json knows"):
        data[0].write_bytes(data[0].read_bytes()[:-1] + b"?")
        clipft.OnnxCLIP(folder)
    assert clip.identity() != before
    data[0].unlink()
    with pytest.raises(ValueError, match=r"image_encoder.onnx: ONNX Runtime cannot load it: .*does not exist"):
        clipft.OnnxCLIP(folder)
    (tmp_path / "outside").write_bytes(bytes(1 << 20))
    data[0].symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"image_encoder.onnx.data"):
        clipft.OnnxCLIP(folder)
    undescribed(folder)
    with pytest.raises(ValueError, match=r"image_encoder.onnx: ONNX Runtime cannot load it: .*escapes model directory"):
        clipft.OnnxCLIP(folder)


# ---- what goes wrong ----


@pytest.mark.usefixtures("written")
def test_a_missed_threshold_leaves_nothing(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    with pytest.raises(ValueError, match=r"at least 0.99999999 .* the int8 (image|text) encoder has 0.99"):
        clipft.export_onnx(model, processor, tmp_path / "out", int8=True, data=captioned(6), min_cosine=1 - 1e-8)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"min_cosine: expected a cosine in \[-1, 1\], got 2"):
        clipft.export_onnx(model, processor, tmp_path / "out", min_cosine=2)


@pytest.mark.usefixtures("written")
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_clip()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipft.deploy.export._compare", full)  # the encoders are there by then
    with pytest.raises(OSError, match="No space left"):
        clipft.export_onnx(model, processor, tmp_path / "out", data=captioned(4))
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=r"directory: expected a folder, .*out is a file"):
        clipft.export_onnx(*tiny_clip(), tmp_path / "out", data=captioned(4))
    assert (tmp_path / "out").read_text() == "mine"


def test_preprocessing_that_cannot_be_deployed(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    processor.image_processor.resample = 2
    with pytest.raises(ValueError, match=r"processor: expected a bicubic resize .* got resample 2"):
        clipft.export_onnx(model, processor, tmp_path / "out", data=captioned(4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault, error, message",
    [
        (
            "no folder",
            FileNotFoundError,
            r"expected a folder that clipft.export_onnx wrote; clipft_onnx.json is missing",
        ),
        ("no encoder", FileNotFoundError, r"expected a folder .* image_encoder.onnx is missing"),
        ("cut encoder", ValueError, r"written together: image_encoder.onnx not as clipft_onnx.json knows it"),
        ("no tokenizer", FileNotFoundError, r"tokenizer.json is missing"),
        ("bad tokenizer", ValueError, r"tokenizer.json: expected a tokenizer"),
        ("bad info", ValueError, r"clipft_onnx.json: expected a JSON object"),
    ],
)
def test_a_damaged_folder_is_named(
    fault: str, error: type[Exception], message: str, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for file in exported[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    encoder, tokenizer = tmp_path / "image_encoder.onnx", tmp_path / "tokenizer.json"
    folder = tmp_path / "absent" if fault == "no folder" else tmp_path
    if fault == "no encoder":
        encoder.unlink()
    if fault == "cut encoder":
        encoder.write_bytes(encoder.read_bytes()[:5000])
    if fault == "no tokenizer":
        tokenizer.unlink()
    if fault == "bad tokenizer":
        tokenizer.write_text("{}")
    if fault == "bad info":
        (tmp_path / "clipft_onnx.json").write_text("{")
    with pytest.raises(error, match=message):
        clipft.OnnxCLIP(folder)


@pytest.mark.parametrize(
    "file, key, value, message",
    [
        (
            "clipft_onnx.json",
            "dim",
            17,
            r"image_encoder.onnx: gives .* 16\], expected embeddings of 17 numbers",
        ),
        ("clipft_onnx.json", "dim", "16", r"clipft_onnx.json: expected dim to be a number above 0, found '16'"),
        ("clipft_onnx.json", "logit_scale", None, r"clipft_onnx.json: expected logit_scale to be a number above 0"),
        (
            "clipft_onnx.json",
            "text_length",
            4000,
            r"text_encoder.onnx: fails, expected captions of 4000 tokens",
        ),
        ("tokenizer_config.json", "model_max_length", 25, r"text_encoder.onnx: fails, expected captions of 25 tokens"),
        ("tokenizer_config.json", "model_max_length", "many", r"tokenizer_config.json: expected model_max_length"),
        ("tokenizer_config.json", "pad_token", ["a"], r"tokenizer_config.json: expected a pad_token"),
        (
            "processor_config.json",
            "crop_size",
            {"height": 32, "width": 48},
            r"image_encoder.onnx: takes pixel_values as .*, expected .*\[batch, 3, 32, 48\]",
        ),
        (
            "processor_config.json",
            "crop_size",
            {"height": -1, "width": 10**9},
            r"expected a crop_size",
        ),
        ("processor_config.json", "image_std", [0, 0, 0], r"processor_config.json: expected image_std"),
        ("text_encoder.onnx", "", "image_encoder.onnx", r"text_encoder.onnx: takes .*it is not of the same export"),
    ],
)
def test_a_description_that_disagrees_with_its_graph(
    file: str, key: str, value: Any, message: str, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for path in exported[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    undescribed(tmp_path)
    if key:
        described = json.loads((tmp_path / file).read_text())
        (described["image_processor"] if file.startswith("processor") else described)[key] = value
        (tmp_path / file).write_text(json.dumps(described))
    else:
        (tmp_path / file).write_bytes((tmp_path / value).read_bytes())
    with pytest.raises(ValueError, match=message):
        clipft.OnnxCLIP(tmp_path)


@pytest.mark.usefixtures("written")
def test_int8_that_is_not_there(tmp_path: Path) -> None:
    clipft.export_onnx(*tiny_clip(), tmp_path, data=captioned(4))
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"tokenizer_config.json"}
    with pytest.raises(FileNotFoundError, match=r"no int8 encoders here; export with int8=True \(--int8\)"):
        clipft.OnnxCLIP(tmp_path, int8=True)


# ---- the demo model and the command line ----


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_demo_model_keeps_its_recall(tmp_path: Path) -> None:
    result = run("export", "--model", "demo", "--output", tmp_path / "out", "--int8", "--min-cosine", 0.999)
    assert result.exit_code == 0 and "same best caption" in result.output, result.output
    parity = json.loads((tmp_path / "out" / "clipft_onnx.json").read_text())["parity"]
    assert parity["data"] == "300 embedded drawings"
    for way in ("image_to_text_R@1", "text_to_image_R@1"):
        assert parity["int8"]["retrieval"][way] >= parity["torch"]["retrieval"][way] - 0.01


def test_quantize_command(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    result = run(
        "quantize", "--model", tmp_path / "base", "--output", tmp_path / "int8", "--skip", "fc2", "--calibrate"
    )
    assert result.exit_code == 0 and "worst layer: " in result.output and "MB in float" in result.output, result.output
    loaded, _ = clipft.load(tmp_path / "int8")
    assert set(loaded.quantization_report["skipped"]) == {
        f"{t}_model.encoder.layers.{n}.mlp.fc2" for t in ("text", "vision") for n in range(3)
    }
    same = run("quantize", "--model", tmp_path / "base", "--output", tmp_path / "base")
    assert same.exit_code == 2 and "expected a folder of its own for an int8 model" in same.output
    missed = run("quantize", "--model", tmp_path / "base", "--output", tmp_path / "no", "--min-cosine", 1.0)
    assert missed.exit_code == 2 and "--min-cosine: expected at least 1.0" in missed.output
    assert not (tmp_path / "no").exists()
    again = run("quantize", "--model", tmp_path / "int8", "--output", tmp_path / "no")
    assert again.exit_code == 2 and "expected a float model, got one that has int8 layers already" in again.output
    names = [f"{number}.png" for number in range(9)]
    for number, name in enumerate(names[:8]):
        picture(number)[0].save(tmp_path / name)
    rows = [json.dumps({"file": name, "words": f"number {name}"}) for name in names]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    how = ("--image-column", "file", "--caption-column", "words", "--on-bad-row", "skip")
    read = run(
        "quantize", "--model", tmp_path / "base", "--output", tmp_path / "of", "--data", tmp_path / "rows.jsonl", *how
    )
    assert read.exit_code == 0 and "read 8 of 9: 1 without its file: row 8" in read.output, read.output
    for command in ("quantize", "export"):
        alone = run(command, "--model", tmp_path / "base", "--output", tmp_path / "no", "--split", "test")
        assert alone.exit_code == 2 and "--data: expected with the options that say how it is read" in alone.output


# ---- torch's own exporter ----


class Features(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> Any:
        output = self.model(input_ids=ids, pixel_values=pixels, return_loss=True)
        return output.image_embeds, output.text_embeds, output.loss


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_torch_exports_a_fused_model(lora: bool, dynamo: bool, tmp_path: Path) -> None:
    import onnxruntime

    model = tiny_clip()[0].eval()
    model = clipft.add_lora(model, r=2, targets="vision.last1:fc2").eval() if lora else clipft.fuse(model)
    inputs = torch.randn(2, 3, SIZE, SIZE), torch.tensor([[500, 7, 501], [500, 9, 501]])
    inputs[1][:, -1] = model.config.text_config.eos_token_id
    torch.onnx.export(Features(model), inputs, tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    with torch.no_grad():
        for got, want in zip(found, Features(model)(*inputs), strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_torch_exports_no_int8_model(dynamo: bool, tmp_path: Path) -> None:
    layer = clipft.nn.QuantizedLinear(8, 4)
    with pytest.raises(Exception, match=r"clipft.export_onnx\(model, processor, folder, int8=True\)"):
        torch.onnx.export(layer, (torch.ones(2, 8),), tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
