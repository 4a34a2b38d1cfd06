"""What ``clipft train`` learns from few pictures: three domains, against the start, from scratch, and HOG.

    pip install elpv-dataset scikit-image
    CLIPFT_DATA=FOLDER python benchmarks/learning.py [--sets chest_xray clothing elpv] [--seeds 42 43 44 45 46]
    CLIPFT_DATA=FOLDER python benchmarks/learning.py --frozen  # LoRA, r = 16: an int8 base against a float base

Radiographs (400, two classes), product photographs (600, ten classes), and solar cells from elpv-dataset (2223: defect
probability 0 against 1). ``clipft train --model demo`` at default settings plus ``--epochs``; a test set is the fifth
that it holds out by ``--seed``, with each class's share. Epochs were chosen on splits of the same pictures by the seeds
100 to 106. "From scratch" is the same command, hence the same steps and rates, for a model of the same shape with
random weights. HOG + logistic regression sees the same split, and chooses its penalty by cross-validation inside the
training part.

All numbers are balanced accuracy: the mean over the seeds. One split's test set of 80 to 445 pictures is a coarse
measure (its 95 % bootstrap interval is kept for each run); the interval of a mean, and of a gain, which is paired by
seed, is Nadeau and Bengio's for repeated random splits (2003, "Inference for the generalization error", eq. 9): a
t interval whose variance allows for training sets that overlap.

With ``--frozen`` there is a fourth set, the demo's drawings in the style of OpenMoji with their names and keywords,
whose number is ``image_to_text_mAP``. Both adapters are scored on the float base, which is what is served, and on the
int8 base; "loss" is the mean of the losses that a run logged, that is the area under their curve; "at least" is the
one-sided 95 % bound of int8 - float, by set and over all sets, whose means are independent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import kept, machine, save
from peft import PeftModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from skimage.feature import hog
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import clipft
from clipft.data.rows import class_names_of
from clipft.demo import random_weights
from clipft.evaluation.metrics import Classification
from clipft.models.frozen import to_int8
from clipft.models.saving import save_model
from clipft.recipes.train import HELD_OUT

SEEDS = (42, 43, 44, 45, 46)
EPOCHS = {"chest_xray": 5, "clothing": 20, "elpv": 3}
BARS = {"chest_xray": 0.75, "clothing": None, "elpv": 0.75}  # balanced accuracy
GAIN, OVER_SCRATCH = 0.25, 0.05
SIDE = 128  # pixels of a picture for HOG
STAGES = ("start", "fine-tuned", "scratch", "HOG + LR")
DRAWINGS = "drawings"
FROZEN_EPOCHS = EPOCHS | {DRAWINGS: 3}
ACCURACY, PRECISION = "balanced_accuracy", "image_to_text_mAP"
Score = dict[str, Any]


def folder_of(name: str, temporary: Path) -> Path:
    """Class folders of a set."""
    if name != "elpv":
        return Path(os.environ["CLIPFT_DATA"]) / name
    from elpv_dataset.utils import load_dataset

    pictures, probabilities, _ = load_dataset()
    for kind, probability in (("intact", 0.0), ("defective", 1.0)):
        (temporary / "elpv" / kind).mkdir(parents=True)
        for index in np.flatnonzero(probabilities == probability):
            Image.fromarray(pictures[index]).save(temporary / "elpv" / kind / f"{index:04d}.png")
    return temporary / "elpv"


def train(model: str, data: Path, output: Path, epochs: int, seed: int, *options: str) -> dict[str, Any]:
    """report.json of the command."""
    command = ["train", "--model", model, "--data", str(data), "--output", str(output)]
    command += ["--epochs", str(epochs), "--seed", str(seed), *options]
    subprocess.run([sys.executable, "-m", "clipft.cli", *command], check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def metric_of(name: str) -> str:
    return PRECISION if name == DRAWINGS else ACCURACY


def score(metrics: dict[str, Any], name: str = ACCURACY) -> Score:
    return {name: metrics[name], "interval": metrics["intervals"][name]}


def hog_score(data: Path, seed: int) -> Score:
    """On the split that ``clipft train`` makes."""
    pairs = clipft.load_pairs(str(data))
    parts = pairs.train_test_split(test_size=HELD_OUT, seed=seed, stratify_by_column="label")
    features = {part: np.stack([hog_of(row["image"]) for row in parts[part]]) for part in ("train", "test")}
    regression = LogisticRegressionCV(
        Cs=np.logspace(-4, 0, 5),
        cv=5,
        class_weight="balanced",
        scoring="balanced_accuracy",
        max_iter=1000,
        l1_ratios=(0,),
        use_legacy_attributes=False,
    )
    classifier = make_pipeline(StandardScaler(), regression).fit(features["train"], parts["train"]["label"])
    scores = classifier.decision_function(features["test"])
    scores = np.stack([-scores, scores], 1) if scores.ndim == 1 else scores
    found = Classification(np.array(parts["test"]["label"]), scores, class_names_of(pairs) or [])
    counts = np.ones(len(scores), dtype=np.int64)
    return score(found.weighted(counts) | {"intervals": found.intervals()})


def hog_of(image: Image.Image) -> Any:
    """[1764]: nine directions in cells of 16 px, normalised in blocks of 2 x 2, of the picture's middle."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    grey = image.convert("L").crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return hog(np.asarray(grey), orientations=9, pixels_per_cell=(16, 16), cells_per_block=(2, 2))


def measure(name: str, data: Path, seed: int, temporary: Path) -> dict[str, Any]:
    """The four stages on one split."""
    epochs = EPOCHS[name]
    tuned = train("demo", data, temporary / f"tuned-{seed}", epochs, seed)
    scratch = train(str(temporary / "random"), data, temporary / f"scratch-{seed}", epochs, seed)
    reports = (tuned["before"], tuned["after"], scratch["after"])
    scores = [*(score(report["zero_shot"]) for report in reports), hog_score(data, seed)]
    return {"seed": seed} | dict(zip(STAGES, scores, strict=True))


def variance(values: Any) -> float:
    """Of the mean over splits, by Nadeau and Bengio."""
    return float(np.var(values, ddof=1) * (1 / len(values) + HELD_OUT / (1 - HELD_OUT)))


def mean(values: list[float]) -> Score:
    """Over splits, with Nadeau and Bengio's interval; none for one split."""
    found: Score = {"balanced_accuracy": float(np.mean(values))}
    if len(values) > 1:
        reach = float(student.ppf(0.975, len(values) - 1) * variance(values) ** 0.5)
        found["interval"] = [found["balanced_accuracy"] - reach, min(found["balanced_accuracy"] + reach, 1.0)]
    return found


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the stages and of the gains, and which bars are missed."""
    values = {stage: [run[stage]["balanced_accuracy"] for run in runs] for stage in STAGES}
    gains = {
        f"over {other}": mean([a - b for a, b in zip(values["fine-tuned"], values[other], strict=True)])
        for other in ("start", "scratch")
    }
    row = {"set": name, "epochs": EPOCHS[name], **{stage: mean(values[stage]) for stage in STAGES}, **gains}
    return row | {"missed": missed(row), "runs": runs}


# ---- an int8 base under LoRA ----


def split(name: str, data: Path, seed: int, temporary: Path) -> tuple[Path, Any, tuple[str, ...]]:
    """What to train on, the rows to test on, and the options that say so."""
    if name != DRAWINGS:  # clipft train holds out the same
        rows = clipft.load_pairs(str(data)).train_test_split(HELD_OUT, seed=seed, stratify_by_column="label")
        return data, rows["test"], ()
    from clipft.demo.styles import openmoji

    parts = openmoji().select_columns(["image", "caption"]).train_test_split(HELD_OUT, seed=seed)
    folders = {part: temporary / f"{name}-{seed}" / part for part in parts}
    for part, folder in folders.items():
        parts[part].save_to_disk(folder)
    return folders["train"], parts["test"], ("--eval-data", str(folders["test"]))


def measure_frozen(name: str, data: Path, seed: int, temporary: Path) -> dict[str, Any]:
    """One split: the adapter trained on either base, and both scored on either."""
    run: dict[str, Any] = {"seed": seed}
    metric = metric_of(name)
    source, test, own = split(name, data, seed, temporary)
    for frozen in ("float", "int8"):
        options = ("--lora-r", "16", "--frozen", frozen, "--control-data", "none", *own)
        output = temporary / f"{name}-{frozen}-{seed}"
        report = train("demo", source, output, FROZEN_EPOCHS[name], seed, *options)
        losses = [entry["loss"] for entry in report["history"] if "loss" in entry]
        task = "retrieval" if name == DRAWINGS else "zero_shot"
        run |= {"start": score(report["before"][task], metric), frozen: score(report["after"][task], metric)}
        run[frozen] |= {"loss": float(np.mean(losses)), "on_int8": on_int8(output, test)[metric]}
    return run


def on_int8(adapter: Path, test: Any) -> dict[str, Any]:
    """Metrics of an adapter on the int8 base."""
    model, processor = clipft.load("demo")
    adapted = PeftModel.from_pretrained(model, str(adapter))
    to_int8(adapted)
    if "label" not in test.column_names:
        return clipft.evaluate_retrieval(adapted, processor, test, resamples=0)
    return clipft.evaluate_zero_shot(adapted, processor, test, class_names_of(test) or [], resamples=0)


def summary_frozen(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and int8 - float paired by seed, on either base."""
    metric = metric_of(name)
    values = {what: [run[what][metric] for run in runs] for what in ("start", "float", "int8")}
    row = {"set": name, "metric": metric, "epochs": FROZEN_EPOCHS[name]}
    row |= {what: float(np.mean(own)) for what, own in values.items()}
    row |= {what: gap(gaps_of(runs, key)) for what, key in (("gap", metric), ("gap_on_int8", "on_int8"))}
    row["loss"] = float(np.mean([run["int8"]["loss"] / run["float"]["loss"] for run in runs]))
    return row | {"runs": runs}


def gaps_of(runs: list[dict[str, Any]], key: str) -> np.ndarray[Any, Any]:
    """int8 - float of each run."""
    return np.array([run["int8"][key] - run["float"][key] for run in runs])


def gap(gaps: np.ndarray[Any, Any]) -> dict[str, float]:
    return bounded(float(gaps.mean()), variance(gaps) if len(gaps) > 1 else float("nan"), len(gaps) - 1)


def bounded(value: float, spread: float, freedom: int) -> dict[str, float]:
    """``spread``: the value's variance."""
    least = float(value - student.ppf(0.95, freedom) * spread**0.5)
    return {"mean": value, "variance": spread, "at_least": least}


def over_all(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over sets; and the bound that all pairs of runs give if their splits are taken as independent."""
    found: dict[str, Any] = {"loss": float(np.mean([row["loss"] for row in rows]))}
    for what in ("gap", "gap_on_int8"):
        means, variances = ([row[what][key] for row in rows] for key in ("mean", "variance"))
        freedom = sum(len(row["runs"]) - 1 for row in rows)
        found[what] = bounded(float(np.mean(means)), sum(variances) / len(rows) ** 2, freedom)
        gaps = np.concatenate([gaps_of(row["runs"], row["metric"] if what == "gap" else "on_int8") for row in rows])
        found[what]["pairs"] = len(gaps)
        found[what]["at_least_paired"] = bounded(gaps.mean(), gaps.var(ddof=1) / len(gaps), len(gaps) - 1)["at_least"]
    return found


def show_frozen(rows: list[dict[str, Any]], console: Console) -> None:
    head = ("", "start", "float", "int8", "int8 - float", "both on int8", "loss / loss")
    table = Table(*head, title="LoRA on a float base and on an int8 base")
    for row in [*rows, {"set": "all", **over_all(rows)}]:
        gaps = [f"{row[what]['mean']:+.4f}, at least {row[what]['at_least']:+.4f}" for what in ("gap", "gap_on_int8")]
        scores = [f"{row[what]:.3f}" if what in row else "" for what in ("start", "float", "int8")]
        table.add_row(row["set"], *scores, *gaps, f"{row['loss']:.4f}")
    console.print(table)


def compare_bases(names: list[str], seeds: list[int], console: Console) -> None:
    """Written after each set; sets that are there already, of the same seeds, are not measured again."""
    about, settings = machine(), {"seeds": seeds}
    rows = kept("learning-frozen", about, settings)
    for name in (name for name in names if name not in {row["set"] for row in rows}):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder)
            data = temporary if name == DRAWINGS else folder_of(name, temporary)
            rows.append(summary_frozen(name, [measure_frozen(name, data, seed, temporary) for seed in seeds]))
        save("learning-frozen", {"machine": about, "settings": settings, "all": over_all(rows), "rows": rows})
    show_frozen(rows, console)


# ---- bars ----


def missed(row: dict[str, Any]) -> list[str]:
    bars = {"over start": GAIN, "over scratch": OVER_SCRATCH, "fine-tuned": BARS[row["set"]]}
    found = {what: row[what]["balanced_accuracy"] for what in bars}
    return [
        f"missed: {row['set']}, {what}: {found[what]:.3f}, bar {bar}"
        for what, bar in bars.items()
        if bar is not None and found[what] < bar
    ]


def show(row: dict[str, Any], console: Console) -> None:
    seeds = [str(run["seed"]) for run in row["runs"]]
    table = Table("", "mean", "95 % interval", *seeds, title=f"{row['set']}, {row['epochs']} epochs: balanced accuracy")
    for what in (*STAGES, "over start", "over scratch"):
        interval = "{:.2f} - {:.2f}".format(*row[what]["interval"]) if "interval" in row[what] else ""
        each = [f"{run[what]['balanced_accuracy']:.3f}" for run in row["runs"] if what in run]
        table.add_row(what, f"{row[what]['balanced_accuracy']:.3f}", interval, *each)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(FROZEN_EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--frozen", action="store_true")
    args = parser.parse_args()
    sets = args.sets or list(FROZEN_EPOCHS if args.frozen else EPOCHS)
    if DRAWINGS in sets and not args.frozen:
        parser.error(f"--sets {DRAWINGS}: goes with --frozen")
    if not os.environ.get("CLIPFT_DATA") and not set(sets) <= {"elpv", DRAWINGS}:
        parser.error("CLIPFT_DATA: expected the folder that holds chest_xray/ and clothing/")
    console = Console()
    if args.frozen:
        compare_bases(sets, args.seeds, console)
        return
    for name in sets:
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder)
            data = folder_of(name, temporary)
            model, processor = clipft.load("demo")
            save_model(random_weights(model.config), processor, temporary / "random")
            row = summary(name, [measure(name, data, seed, temporary) for seed in args.seeds])
        show(row, console)
        console.print(f"written to {save(f'learning-{name}', {'machine': machine(), **row})}")
        for line in row["missed"]:
            console.print(line)


if __name__ == "__main__":
    main()
