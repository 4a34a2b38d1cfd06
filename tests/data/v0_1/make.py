"""How the files here came about: python make.py FOLDER, with clipft 0.1 installed and tests/ on PYTHONPATH.

A base model, runs of the command line on class folders of it, and pickles; ``expected.safetensors`` holds what 0.1
computed with them on the pictures and texts below.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_clip import class_folders, picture, tiny_clip
from transformers import CLIPConfig, CLIPModel

import clipft

TEXTS = ["a red square", "a blue bar", "x"]
TRAIN = ("--model", "base", "--data", "colours", "--epochs", "1", "--batch-size", "8", "--control-data", "none")
LEFT_OUT = ("checkpoints", "features", "merged", "report.html", "README.md", ".cache*")


def small() -> tuple[Any, Any]:
    """The tiny CLIP at half the width and two layers a tower."""
    model, processor = tiny_clip()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    parts = {name: getattr(model.config, name).to_dict() | tower for name in ("text_config", "vision_config")}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(**parts, projection_dim=8)).eval(), processor


def clipft_command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "clipft.cli", *arguments], check=True)


def write_folders(out: Path) -> None:
    """In the working directory, so that no file names another, and copied from there without what tests do not read."""
    from clipft.vectors import VectorFile

    model, processor = small()
    model.save_pretrained("base")
    processor.save_pretrained("base")
    class_folders(Path("colours"), 24)
    clipft_command("train", *TRAIN, "--output", "run", "--head", "text")
    clipft_command("train", *TRAIN, "--output", "adapter", "--lora-r", "2", "--lora-targets", "vision")
    clipft_command("quantize", "--model", "base", "--output", "int8")
    clipft_command("export", "--model", "base", "--output", "onnx")
    for name in ("base", "run", "adapter", "int8", "onnx"):
        shutil.copytree(name, out / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in ("vectors.parquet", "vectors.npy"):
        clipft_command("embed", "--model", "base", "--data", "colours", "--output", name)
        file = VectorFile.read(Path(name))
        replace(file, description=replace(file.description, source="colours")).write(out / name)


def write_expected(out: Path) -> None:
    pictures = [picture(index)[0] for index in range(3)]
    expected = {}
    for name in ("base", "run", "adapter", "int8", "onnx"):
        loaded = (clipft.OnnxCLIP("onnx"), None) if name == "onnx" else clipft.load(name)
        expected[f"{name}.image"] = clipft.embed(*loaded, images=pictures)
        expected[f"{name}.text"] = clipft.embed(*loaded, texts=TEXTS)
    expected["run.head"] = clipft.classify(*clipft.load("run"), pictures)
    save_file(expected, out / "expected.safetensors")


def write_pickles(out: Path) -> None:
    values = {"fused": clipft.fuse(small()[0]), "lora": clipft.add_lora(small()[0], r=2, targets="vision")}
    torch.manual_seed(3)
    values["int8_layer"] = clipft.nn.QuantizedLinear.from_linear(torch.nn.Linear(8, 6))
    for name, value in values.items():
        (out / f"{name}.pickle").write_bytes(pickle.dumps(value))


def main(folder: str) -> None:
    assert clipft.__version__ == "0.1.0"
    out = Path(folder).resolve()
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        write_folders(out)
        write_expected(out)
        write_pickles(out)


if __name__ == "__main__":
    main(sys.argv[1])
