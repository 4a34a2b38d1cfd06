"""How many optimiser steps a small set needs: three domains cut to a few pictures a class, and whole.

    pip install elpv-dataset
    CLIPFT_DATA=FOLDER python benchmarks/small_sets.py [--sets ...] [--sizes 2 4 8 16 whole] [--least 0 50 100 200]
        [--seeds 42 43 44 45 46] [--methods model lora head] [--seconds 280]

The sets of ``learning.py``. A fifth is held out by the seed with each class's share, as ``clipft train`` does; of the
rest so many pictures a class are drawn, the smaller cuts out of the larger ones. The embedded model is trained as
``clipft train`` trains it, in 5 epochs, and in as many more as make the ``--least`` steps (0: 5 epochs). A run that is
in the result's file already is not repeated, and none is begun after ``--seconds``: call it again to go on.

Balanced accuracy on what was held out. A gain is paired by set, size and seed; its interval, of one set or of all, is
Nadeau and Bengio's over the pairs (see ``learning.py``), which allows for training sets that overlap; cuts overlap
less.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import kept, machine, save
from learning import SEEDS, folder_of, mean
from rich.console import Console
from rich.table import Table
from transformers.trainer_callback import PrinterCallback

import clipft
from clipft.data.rows import class_names_of, class_targets
from clipft.data.sampling import classes_are_uneven
from clipft.evaluation.metrics import Classification
from clipft.evaluation.tasks import logits_of
from clipft.inference.classify import zero_shot_classifier
from clipft.models.heads import heads_of
from clipft.models.lora import add_lora
from clipft.recipes.arguments import arguments_of, heads_asked_for
from clipft.recipes.options import TrainOptions
from clipft.recipes.sets import HELD_OUT
from clipft.training.arguments import default_learning_rate
from clipft.training.trainer import CLIPTrainer

SETS = ("chest_xray", "clothing", "elpv")
SIZES = ("2", "4", "8", "16", "whole")
METHODS = ("model", "lora", "head")
EPOCHS = 5  # of clipft train, whatever the set
SETTINGS = {"epochs": EPOCHS, "model": "demo"}
KEY = ("set", "size", "seed", "method", "batch", "least")


class Split:
    """One set, divided by one seed: rows to train on, and what the held out ones look like to the model."""

    def __init__(self, name: str, data: Path, seed: int, processor: Any) -> None:
        self.name, self.seed = name, seed
        parts = clipft.load_pairs(str(data)).train_test_split(HELD_OUT, seed=seed, stratify_by_column="label")
        self.train, self.names = parts["train"], class_names_of(parts["train"]) or []
        pixels = [processor(images=row["image"], return_tensors="pt")["pixel_values"] for row in parts["test"]]
        self.pixels = torch.cat(pixels)  # [N, 3, side, side]
        self.labels = class_targets(parts["test"], "label", self.names)

    def cut(self, size: str) -> Any:
        """So many pictures of each class."""
        if size == "whole":
            return self.train
        labels, random = np.array(self.train["label"]), np.random.default_rng(self.seed)
        drawn = [random.permutation(np.flatnonzero(labels == label))[: int(size)] for label in range(len(self.names))]
        return self.train.select(sorted(np.concatenate(drawn).tolist()))

    @torch.no_grad()
    def score(self, model: Any, processor: Any, templates: list[str]) -> float:
        """Balanced accuracy of what the run trained."""
        model.eval()
        embeds = torch.cat([pooled(model.get_image_features(part)) for part in self.pixels.split(64)])
        embeds = torch.nn.functional.normalize(embeds)
        if heads := heads_of(model):
            logits = heads["label"](embeds)
        else:
            logits = logits_of(embeds, zero_shot_classifier(model, processor, self.names, templates, 64))
        found = Classification(self.labels, logits, self.names)
        return float(found.metrics()["balanced_accuracy"])


def pooled(features: Any) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def epochs_of(rows: int, batch: int, least: int) -> int:
    """Passes over the rows that make so many steps, 5 at least."""
    return max(EPOCHS, -(-least // -(-rows // batch)))


def measure(split: Split, size: str, least: int, method: str, batch: int, folder: Path) -> dict[str, Any]:
    """Train on a cut, and score."""
    rows = split.cut(size)
    epochs = epochs_of(len(rows), batch, least)
    options = TrainOptions(
        epochs=epochs, seed=split.seed, batch_size=batch, head="text" if method == "head" else "none"
    )
    args = arguments_of(options, folder, heads_asked_for(options), Console(quiet=True))
    model, processor = clipft.load("demo")
    args.save_strategy, args.learning_rate = "no", default_learning_rate(model, lora=method == "lora")
    args.class_balanced = classes_are_uneven(rows, args.train_batch_size)
    if method == "lora":
        torch.manual_seed(split.seed)
        model = add_lora(model, 16, 32, options.lora_dropout, ("vision", "text"))
    trainer = CLIPTrainer(model, args, train_dataset=rows, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    start = split.score(model, processor, args.caption_templates)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    return {
        **dict(zip(KEY, (split.name, size, split.seed, method, batch, least), strict=True)),
        "rows": len(rows),
        "epochs": epochs,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "start": start,
        "balanced_accuracy": split.score(model, processor, args.caption_templates),
    }


# ---- what was found ----


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a method, batch, set, size and least number of steps; and the gain over all sets of a size."""
    names = ("method", "batch", "set", "size", "least")
    found = []
    for key in sorted({tuple(run[name] for name in names) for run in runs}, key=str):
        chosen = dict(zip(names, key, strict=True))
        own = matching(runs, chosen)
        row = chosen | {"runs": len(own), "steps": own[0]["steps"]} | mean([run["balanced_accuracy"] for run in own])
        found.append(row | gain(runs, chosen))
    for key in sorted({tuple(run[name] for name in ("method", "batch", "size", "least")) for run in runs}, key=str):
        found.append(dict(zip(("method", "batch", "size", "least"), key, strict=True)) | {"set": "all"})
        found[-1] |= gain(runs, {name: value for name, value in found[-1].items() if name != "set"})
    return [row for row in found if row["set"] != "all" or "gain" in row]


def matching(runs: list[dict[str, Any]], chosen: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for run in runs if all(run[name] == value for name, value in chosen.items())]


def gain(runs: list[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, Any]:
    """Over 5 epochs, where both were run."""
    usual = {tuple(run[name] for name in KEY[:-1]): run["balanced_accuracy"] for run in runs if run["least"] == 0}
    longer = matching(runs, chosen) if chosen["least"] else []
    pairs = [(run["balanced_accuracy"], usual.get(tuple(run[name] for name in KEY[:-1]))) for run in longer]
    found = [after - before for after, before in pairs if before is not None]
    return {"gain": mean(found) | {"pairs": len(found)}} if found else {}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """A table a method and batch."""
    for method, batch in sorted({(row["method"], row["batch"]) for row in rows}):
        own = [row for row in rows if (row["method"], row["batch"]) == (method, batch)]
        leasts = sorted({row["least"] for row in own})
        heads = [f"{least} steps at least" if least else f"{EPOCHS} epochs" for least in leasts]
        table = Table("set", "a class", *heads, title=f"{method}, batches of {batch}")
        for name, place in sorted({(row["set"], SIZES.index(row["size"])) for row in own}):
            found = {row["least"]: row for row in own if (row["set"], row["size"]) == (name, SIZES[place])}
            table.add_row(name, SIZES[place], *(cell(found[least]) if least in found else "" for least in leasts))
        console.print(table)


def cell(row: dict[str, Any]) -> str:
    text = f"{row['balanced_accuracy']:.3f} ({row['steps']} steps, {row['runs']} runs) " if "steps" in row else ""
    if "gain" not in row:
        return text
    own = row["gain"]
    reach = " ({:+.3f} to {:+.3f})".format(*own["interval"]) if "interval" in own else ""
    return text + f"{own['balanced_accuracy']:+.3f}{reach}"


def plan(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """What is asked for, as ``KEY``: the cheap cuts first, of one set and seed together."""
    return [
        (name, size, seed, method, args.batch, least)
        for seed in args.seeds
        for name in args.sets
        for method in args.methods
        for size in args.sizes
        for least in args.least
    ]


def measure_all(wanted: list[tuple[Any, ...]], runs: list[dict[str, Any]], until: float, console: Console) -> None:
    """What is not there yet, each result saved at once."""
    _, processor = clipft.load("demo")
    split: Split | None = None
    with tempfile.TemporaryDirectory() as temporary:
        folders: dict[str, Path] = {}
        for number, (name, size, seed, method, batch, least) in enumerate(wanted, 1):
            if time.monotonic() > until:
                console.print(f"{len(wanted) - number + 1} runs left: call again to go on")
                return
            if name not in folders:
                folders[name] = folder_of(name, Path(temporary))
            if split is None or (split.name, split.seed) != (name, seed):
                split = Split(name, folders[name], seed, processor)
            run = measure(split, size, least, method, batch, Path(temporary) / "run")
            console.print(*(run[key] for key in KEY), run["steps"], f"{run['balanced_accuracy']:.3f}", run["seconds"])
            runs.append(run)
            save("small-sets", {"machine": machine(), "settings": SETTINGS, "summary": summary(runs), "rows": runs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=SETS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--least", nargs="+", type=int, default=(0, 50, 100, 200))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=("model",))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    args = parser.parse_args()
    if not os.environ.get("CLIPFT_DATA") and set(args.sets) != {"elpv"}:
        parser.error("CLIPFT_DATA: expected the folder that holds chest_xray/ and clothing/")
    until, console = time.monotonic() + args.seconds, Console()
    runs = kept("small-sets", machine(), SETTINGS)
    done = {tuple(run[name] for name in KEY) for run in runs}
    wanted = [key for key in plan(args) if key not in done]
    if wanted:
        measure_all(wanted, runs, until, console)
    show(summary(runs), console)


if __name__ == "__main__":
    main()
