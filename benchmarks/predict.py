"""Seconds of ``clipft predict`` beside ``clipft embed`` on the same folder: answers should cost what vectors cost.

    python benchmarks/predict.py [--pictures 512] [--repeats 7]

Both as commands in one process, loading the model and writing the file included, in turn; drawings of the package as
PNG files, the demo's model with a head of its ten classes, in torch, in int8, and by ONNX Runtime in both.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from common import interleave, machine, ratio, save, summary
from rich.console import Console
from rich.table import Table

import clipft
from clipft.cli import app
from clipft.data.drawings import control_drawings

CLASSES = ["apple", "banana", "pear", "cat", "dog", "car", "tree", "house", "key", "cup"]


def folder_of_pictures(folder: Path, count: int) -> Path:
    """The drawings again and again, as files."""
    drawings = control_drawings()
    folder.mkdir()
    for number in range(count):
        drawings[number % len(drawings)]["image"].save(folder / f"{number:05d}.png")
    return folder


def models(folder: Path) -> dict[str, list[str]]:
    """By kind, what the commands are told."""
    model, processor = clipft.load("demo")
    clipft.add_head(model, processor, CLASSES)
    quantized = clipft.quantize(model, processor=processor)
    for name, own in (("torch", model), ("int8", quantized)):
        own.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    clipft.export_onnx(model, processor, folder / "onnx", int8=True)
    kinds = {"torch": ["torch"], "int8": ["int8"], "ONNX": ["onnx"], "ONNX int8": ["onnx", "--int8"]}
    return {kind: ["--model", str(folder / own), *more] for kind, (own, *more) in kinds.items()}


def command(*line: str) -> None:
    """In this process, silently."""
    with redirect_stdout(io.StringIO()):
        app(list(line), standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = str(folder_of_pictures(folder / "new", args.pictures))
        for kind, model in models(folder).items():
            line = [*model, "--data", pictures, "--restart", "--output"]
            competitors: dict[str, Callable[[], object]] = {
                "embed": partial(command, "embed", *line, str(folder / "vectors.parquet")),
                "predict": partial(command, "predict", *line, str(folder / "answers.csv")),
            }
            seconds = interleave(competitors, args.repeats)
            found = {verb: summary(own) for verb, own in seconds.items()}
            rows.append({"kind": kind, "seconds": found, "ratio": ratio(seconds["predict"], seconds["embed"])})
    table = Table("model", "embed, pictures/s", "predict, pictures/s", "predict / embed, seconds, minima")
    for row in rows:
        rates = (f"{args.pictures / row['seconds'][verb]['min_s']:.0f}" for verb in ("embed", "predict"))
        table.add_row(row["kind"], *rates, f"{row['ratio']['min']:.3f}")
    Console().print(table)
    save("predict", {"machine": machine(), "pictures": args.pictures, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
