"""What clipft 0.1 saved still loads and computes the same, and what it could import is still found."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import picture
from torch import Tensor

import clipft
from clipft._moved import MOVED
from clipft.inference.vectors import VectorFile

DATA = Path(__file__).parent / "data" / "v0_1"
NAMES: dict[str, list[str]] = {
    module: names
    for module, names in json.loads((DATA / "names.json").read_text()).items()
    if not module.startswith("clipft.cli.")  # what the command line's modules had for each other
}
TEXTS = ["a red square", "a blue bar", "x"]
WARNING = "the old name goes with the next version"
ERRORS = f"import warnings; warnings.filterwarnings('error', '.*{WARNING}');"


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(DATA / "expected.safetensors")


def pictures() -> list[Any]:
    return [picture(index)[0] for index in range(3)]


def close(got: Any, want: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(got), want, atol=atol, rtol=0)


# ---- what was saved ----


@pytest.mark.parametrize(("folder", "atol"), [("base", 1e-5), ("run", 1e-5), ("adapter", 1e-5), ("int8", 2e-3)])
def test_folders(folder: str, atol: float, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 codes of another CPU differ by one here and there."""
    monkeypatch.chdir(DATA)  # the adapter names its base as it was given then
    if folder == "adapter":
        pytest.importorskip("peft")
    model, processor = clipft.load(folder)
    close(clipft.embed(model, processor, images=pictures()), expected[f"{folder}.image"], atol)
    close(clipft.embed(model, processor, texts=TEXTS), expected[f"{folder}.text"], atol)
    assert (folder == "int8") == hasattr(model, "quantization_report")


def test_the_folders_differ(expected: dict[str, Tensor]) -> None:
    """By more than their tests let pass. (A head leaves the text tower as it is.)"""
    for one, other in (("base.image", "run.image"), ("base.image", "adapter.image")):
        assert (expected[one] - expected[other]).abs().max() > 1e-4, (one, other)


def test_a_head(expected: dict[str, Tensor]) -> None:
    model, processor = clipft.load(DATA / "run")
    close(clipft.classify(model, processor, pictures()), expected["run.head"])
    assert [head.class_names for head in model.heads] == [["blue", "green", "red", "yellow"]]


def test_onnx(expected: dict[str, Tensor]) -> None:
    pytest.importorskip("onnxruntime")
    model = clipft.OnnxCLIP(DATA / "onnx")
    close(clipft.embed(model, images=pictures()), expected["onnx.image"])
    close(clipft.embed(model, texts=TEXTS), expected["onnx.text"])
    assert model.tokenize(["x", "a blue bar"])["input_ids"].shape == (2, 10)  # padded to the longest


@pytest.mark.parametrize("name", ["vectors.parquet", "vectors.npy"])
def test_vectors(name: str, expected: dict[str, Tensor]) -> None:
    file = VectorFile.read(DATA / name)
    assert file.vectors.shape == (24, 8)
    assert (file.description.kind, file.description.model, file.description.source) == ("images", "base", "colours")
    for row, own in enumerate(["red/0.png", "green/1.png", "blue/2.png"]):
        want = expected["base.image"][row]
        place = file.ids.index(own)
        close(file.vectors[place], want)
        scores, found = clipft.search(file.vectors, want[None].numpy(), 1)
        assert int(found[0, 0]) == place
        assert float(scores[0, 0]) == pytest.approx(1.0, abs=1e-5)


def unpickled(name: str) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = pickle.loads((DATA / f"{name}.pickle").read_bytes())
    shown = [str(warning.message) for warning in caught if WARNING in str(warning.message)]
    assert shown or name == "int8_layer"  # clipft.nn holds that one's name
    return value


def batch() -> dict[str, Tensor]:
    processor = clipft.load(DATA / "base")[1]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, **processor.tokenizer(TEXTS, padding=True, return_tensors="pt")}


def test_a_pickled_fused_model() -> None:
    model, fresh = unpickled("fused"), clipft.fuse(clipft.load(DATA / "base")[0])
    assert type(model) is type(fresh)
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs, return_loss=True)
        clipft.fuse(model)  # the attention too, which was transformers' own
        got, want = (part(**inputs, return_loss=True) for part in (model, fresh))
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    assert torch.equal(got.loss, want.loss) and got.logits_per_image is before.logits_per_image is None
    torch.testing.assert_close(before.loss, got.loss)
    assert type(clipft.unfuse(model)).__name__ == "CLIPModel"


def test_a_pickled_lora_model() -> None:
    pytest.importorskip("peft")
    model = clipft.fuse(unpickled("lora")).eval()
    fresh = clipft.add_lora(clipft.load(DATA / "base")[0], r=2, targets="vision").eval()
    fresh.load_state_dict(model.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    inputs = batch()
    with torch.no_grad():
        for part in (model, fresh):
            for name, parameter in part.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        got, want = (part(**inputs, return_loss=True).loss for part in (model, fresh))
    assert torch.equal(got, want)


def test_a_pickled_int8_layer() -> None:
    layer = unpickled("int8_layer")
    torch.manual_seed(3)
    fresh = clipft.nn.QuantizedLinear.from_linear(torch.nn.Linear(8, 6))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    assert type(layer) is type(fresh)
    assert torch.equal(layer(x), fresh(x))


def test_new_pickles_load_in_a_fresh_process(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    inputs = batch()
    for name, model in {
        "fused": clipft.fuse(clipft.load(DATA / "base")[0]),
        "lora": clipft.add_lora(clipft.load(DATA / "base")[0], r=2).eval(),
    }.items():
        with torch.no_grad():
            want = model(**inputs, return_loss=True).loss.item()
        (tmp_path / name).write_bytes(pickle.dumps((model, inputs)))
        code = (
            f"import pickle, sys; model, inputs = pickle.load(open({str(tmp_path / name)!r}, 'rb'));"
            "print(model(**inputs, return_loss=True).loss.item())"
        )
        assert float(python("-c", ERRORS + code)) == pytest.approx(want, rel=1e-5)


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- what could be imported ----

WHOLE = {f"clipft.{old}": f"clipft.{next(iter(new))}" for old, new in MOVED.items() if list(new.values()) == ["*"]}
SPLIT = {f"clipft.{old}" for old in MOVED} - set(WHOLE)
PUBLIC = {"clipft.nn", "clipft.ops", "clipft.reference"}  # their names stay
NEEDS_MORE = ("clipft.demo.pretrain", "clipft.demo.build_pictures")  # extras of those who make the package


def place_of(module: str, name: str) -> tuple[str, str]:
    """Where the table has it."""
    for new, names in MOVED[module.removeprefix("clipft.")].items():
        renamed = dict(entry.partition("=")[::2] for entry in names.split())
        if name in renamed:
            return f"clipft.{new}", renamed[name] or name
    raise AssertionError(f"{module}.{name} is not in the table")


def imported(module: str, name: str) -> tuple[Any, list[str]]:
    """As a user would, and what our warnings say."""
    scope: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(f"from {module} import {name}", scope)
    ours = [warning for warning in caught if WARNING in str(warning.message)]
    assert all(warning.category is DeprecationWarning for warning in ours)
    return scope[name], [str(warning.message) for warning in ours]


def test_the_list_is_whole() -> None:
    assert {f"clipft.{old}" for old in MOVED} <= set(NAMES)
    assert sum(map(len, NAMES.values())) > 200
    assert {"clipft.data", "clipft.vectors", "clipft.quantized_clip", "clipft.cli"} <= set(NAMES)


@pytest.mark.parametrize("module", sorted(SPLIT - PUBLIC))
def test_names_of_a_module_that_was_split(module: str) -> None:
    for name in NAMES[module]:
        place, own = place_of(module, name)
        value, shown = imported(module, name)
        assert value is getattr(importlib.import_module(place), own), name
        assert set(shown) == {f"{module}.{name} is {place}.{own} now; {WARNING}"}, name
    with pytest.raises(ImportError, match="nothing_of_the_kind"):
        imported(module, "nothing_of_the_kind")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        importlib.import_module(module).nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize("module", sorted(WHOLE))
def test_a_module_that_moved_whole_is_the_new_one(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = importlib.import_module(WHOLE[module])
    monkeypatch.delitem(sys.modules, module, raising=False)  # its import warns, once
    with pytest.warns(DeprecationWarning, match=f"{module} is {WHOLE[module]} now; {WARNING}"):
        old = importlib.import_module(module)
    assert old is new
    assert new.__name__ == WHOLE[module] and new.__spec__ is not None and new.__spec__.name == WHOLE[module]
    for name in NAMES[module]:
        value, _ = imported(module, name)
        assert value is getattr(new, name), name
    monkeypatch.setattr(old, "set_by_the_test", 1, raising=False)
    assert new.set_by_the_test == 1  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="nothing_of_the_kind"):
        imported(module, "nothing_of_the_kind")


@pytest.mark.parametrize("module", sorted(PUBLIC | set(NAMES) - SPLIT - set(WHOLE)))
def test_names_that_stay_do_not_warn(module: str) -> None:
    if module.startswith(NEEDS_MORE):
        pytest.skip("needs the extras of pre-training")
    for name in NAMES[module]:
        value, shown = imported(module, name)
        assert value is getattr(importlib.import_module(module), name)
        assert not shown, name


def test_submodules_of_the_package_need_no_import_and_do_not_warn() -> None:
    code = (
        "import clipft; clipft.ops.contrastive_loss, clipft.nn.ContrastiveLoss, clipft.reference.contrastive_loss;"
        "print(all(getattr(clipft, name) is not None for name in clipft.__all__))"
    )
    assert python("-c", ERRORS + code) == "True\n"


def test_an_unknown_module_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"clipft\.nothing_of_the_kind"):
        importlib.import_module("clipft.nothing_of_the_kind")
    with pytest.raises(AttributeError, match="module 'clipft' has no attribute 'nothing_of_the_kind'"):
        clipft.nothing_of_the_kind  # noqa: B018


HEAVY = ("torch", "torchvision", "transformers", "datasets", "pyarrow", "sklearn")


@pytest.mark.parametrize(
    "code",
    [
        "clipft.OnnxCLIP",
        "from clipft.onnx_clip import OnnxCLIP",
        "from clipft.pixels import open_picture",
        "from clipft.cli import app",
        "import clipft.data, clipft.models, clipft.training, clipft.evaluation, clipft.families, clipft.report",
    ],
)
def test_what_needs_no_torch_imports_none(code: str) -> None:
    if "onnx" in code.lower():
        pytest.importorskip("onnxruntime")
    shown = python("-W", "ignore", "-c", f"import sys, clipft; {code}; print([m for m in {HEAVY} if m in sys.modules])")
    assert shown.strip() == "[]"


def test_commands_need_no_extra_of_others() -> None:
    """And load no ONNX Runtime, which writes files of its own as it loads."""
    extras = ("onnx", "onnxruntime", "onnxscript", "faiss", "peft", "matplotlib", "tensorboard", "sentencepiece")
    modules = "clipft.demo, clipft.recipes.train, clipft.recipes.evaluate, clipft.recipes.doctor, clipft.cli"
    more = "clipft.deploy.quantize, clipft.inference.vectors"
    code = f"import sys; sys.modules |= dict.fromkeys({extras}); import {modules}, {more}; print('whole')"
    assert python("-W", "ignore", "-c", code).strip() == "whole"
