"""What clipft does with each package that it depends on, a step a use: `python tests/stack_steps.py` runs them in any
environment, in a minute or two. CI does in one of the oldest versions that pyproject.toml takes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import run
from peft import PeftModel
from PIL import Image
from tiny_clip import SIZE, class_folders, picture, tiny_clip
from tiny_families import tiny_family
from tiny_siglip import tiny_siglip
from tiny_trainer import arguments, same
from transformers import AutoProcessor, CLIPModel, TrainerCallback

import clipft

STEPS: list[Callable[[Path], None]] = []
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "control_data": "none"}


def step(function: Callable[[Path], None]) -> Callable[[Path], None]:
    STEPS.append(function)
    return function


def command(*words: Any) -> None:
    done = run(*words)
    assert done.exit_code == 0, done.output


@step
def show_the_environment(folder: Path) -> None:
    command("env", "--json")


@step
def load_and_save(folder: Path) -> None:
    model, processor = tiny_clip()
    for part in (model, processor):
        part.save_pretrained(folder / "base")
    class_folders(folder / "data", 40)
    loaded, _ = clipft.load(folder / "base")
    assert same(loaded, model)


@step
def look_at_data(folder: Path) -> None:
    assert clipft.doctor(folder / "data", model=folder / "base")["statistics"]


@step
def compile_a_loss(folder: Path) -> None:
    x = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    compiled = torch.compile(clipft.contrastive_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, 20.0), clipft.contrastive_loss(x, x, 20.0))


@step
def train_on_folders(folder: Path) -> None:
    more = {"workers": 1, "augmentation": "light", "early_stopping_patience": 1, "wise_ft": True}
    done = clipft.train(folder / "base", folder / "data", folder / "run", **QUICK | more)
    assert done.after and (folder / "run" / "report.html").is_file()
    CLIPModel.from_pretrained(folder / "run")
    AutoProcessor.from_pretrained(folder / "run")


@step
def resume(folder: Path) -> None:
    class Killed(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.epoch == 1:
                raise KeyboardInterrupt

    whole = clipft.train(folder / "base", folder / "data", folder / "whole", **QUICK)
    with contextlib.suppress(KeyboardInterrupt):
        clipft.train(folder / "base", folder / "data", folder / "broken", callbacks=[Killed()], **QUICK)
    assert same(
        clipft.train(folder / "base", folder / "data", folder / "broken", resume=True, **QUICK).model, whole.model
    )


@step
def train_captions_from_a_table(folder: Path) -> None:
    rows = []
    (folder / "table").mkdir()
    for index in range(24):
        picture(index)[0].save(folder / "table" / f"{index}.jpg")
        rows.append(json.dumps({"image": f"{index}.jpg", "caption": f"{picture(index)[1]} {index}"}))
    (folder / "table" / "pairs.jsonl").write_text("\n".join(rows))
    clipft.train(folder / "base", folder / "table" / "pairs.jsonl", folder / "captions", freeze="towers", **QUICK)


@step
def train_a_head(folder: Path) -> None:
    clipft.train(folder / "base", folder / "data", folder / "head", head="text", class_weights="balanced", **QUICK)


@step
def train_with_the_trainer(folder: Path) -> None:
    model, processor = clipft.load(folder / "base")
    rows = clipft.load_pairs(folder / "data")
    settings = arguments(folder / "trainer", eval_strategy="epoch", ema_decay=0.9, bf16=True)
    trainer = clipft.CLIPTrainer(model, settings, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    trainer.train()
    assert "eval_image_to_text_R@1" in trainer.evaluate()


@step
def train_an_adapter_and_merge_it(folder: Path) -> None:
    clipft.train(folder / "base", folder / "data", folder / "lora", lora_r=4, **QUICK)
    command("merge", "--model", folder / "lora", "--output", folder / "merged")
    merged = CLIPModel.from_pretrained(folder / "merged").eval()
    plain = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder / "base"), folder / "lora").eval()
    inputs = {"input_ids": torch.tensor([[512, 7, 9, 513]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    outputs = [model.get_text_features(**inputs) for model in (merged, plain)]
    tensors = [out if isinstance(out, torch.Tensor) else out.pooler_output for out in outputs]
    torch.testing.assert_close(*tensors, atol=1e-4, rtol=1e-4)


@step
def train_a_siglip(folder: Path) -> None:
    model, processor = tiny_siglip("siglip2", folder)
    for part in (model, processor):
        part.save_pretrained(folder / "siglip")
    clipft.train(folder / "siglip", folder / "data", folder / "siglip-run", **QUICK)


@step
def fuse_other_families(folder: Path) -> None:
    for kind in ("metaclip_2", "chinese_clip"):
        model, pixels = tiny_family(kind)[0], torch.randn(2, 3, SIZE, SIZE)
        plain = model.get_image_features(pixel_values=pixels).pooler_output
        fused = clipft.fuse(model).get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@step
def evaluate(folder: Path) -> None:
    for file in class_folders(folder / "test", 60).rglob("*.png"):
        if int(file.stem) < 40:
            file.unlink()
    command("evaluate", "--model", folder / "run", "--data", folder / "test", "--probe-data", folder / "data")


@step
def quantize(folder: Path) -> None:
    command("quantize", "--model", folder / "run", "--output", folder / "int8", "--min-cosine", 0.5)
    clipft.load(folder / "int8")


@step
def export(folder: Path) -> None:
    command("export", "--model", folder / "run", "--output", folder / "onnx", "--int8", "--min-cosine", 0.5)


@step
def encode_by_onnx(folder: Path) -> None:
    ours = clipft.embed(*clipft.load(folder / "run"), texts=["a red square", "a blue bar"])
    theirs = clipft.OnnxCLIP(folder / "onnx").encode_texts(["a red square", "a blue bar"])
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4)


@step
def embed(folder: Path) -> None:
    command("embed", "--model", folder / "run", "--data", folder / "data", "--output", folder / "vectors.parquet")
    command("embed", "--model", folder / "onnx", "--data", folder / "data", "--output", folder / "vectors.npy")


@step
def search(folder: Path) -> None:
    words = ["--model", folder / "run", "--text", "a red square", "--output", folder / "hits.png"]
    command("search", "--index", folder / "vectors.parquet", *words)
    assert Image.open(folder / "hits.png").width > 100


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for function in STEPS:
            begin, said = time.monotonic(), io.StringIO()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    function(Path(folder))
            except Exception:
                print(said.getvalue(), traceback.format_exc(), sep="\n")
                failed += 1
            print(f"{function.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    print(f"{len(STEPS) - failed} passed, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
