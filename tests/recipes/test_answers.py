"""From a folder to answers: train; predict in torch, int8 and ONNX; where it looks; what is not normal."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from commands import run
from PIL import Image
from tiny_clip import COLOURS, picture

import clipft
from clipft.models.formats import CALIBRATION_KEY


def done(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def apart(report: dict[str, Any]) -> float:
    """Most that the cosine of a picture and a text of unit length moves, by the least cosines of a report."""
    least = (report["image_cosine"]["min"], report["text_cosine"]["min"])
    return float(sum(np.sqrt(2 - 2 * np.minimum(least, 1))))


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of its exporter
def test_from_a_folder_to_answers(base: Path, colours: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, new = tmp_path / "run", tmp_path / "new"
    for index in range(100, 116):
        image, _, colour = picture(index)
        (new / colour).mkdir(parents=True, exist_ok=True)
        image.save(new / colour / f"{index}.png")
    done("train", "--model", base, "--data", colours, "--output", model, "--epochs", 8, "--batch-size", 8, "--lr", 3e-3)
    config = json.loads((model / "config.json").read_text())
    config[CALIBRATION_KEY]["zero_shot"]["temperature"] = temperature = 1.5  # of so few pictures it is 1
    (model / "config.json").write_text(json.dumps(config))
    done("quantize", "--model", model, "--output", tmp_path / "int8", "--data", colours)
    done("export", "--model", model, "--output", tmp_path / "onnx", "--data", colours)

    answers = {}
    for name, folder in (("torch", model), ("int8", tmp_path / "int8"), ("onnx", tmp_path / "onnx")):
        done("predict", "--model", folder, "--data", new, "--output", tmp_path / f"{name}.csv", "--top", 4)
        answers[name] = rows_of(tmp_path / f"{name}.csv")
    names = [str(path.relative_to(new)) for path in sorted(new.rglob("*.png"))]
    assert [[row["image"] for row in rows] for rows in answers.values()] == [names] * 3
    right = np.mean([row["class"] == Path(row["image"]).parent.name for row in answers["torch"]])
    assert right >= 0.75, "the tiny model has not learnt its colours"

    reports = {
        "int8": json.loads((tmp_path / "int8/quantization_report.json").read_text()),
        "onnx": json.loads((tmp_path / "onnx/clipft_onnx.json").read_text())["parity"]["fp32"],
    }
    scale = clipft.load(model)[0].logit_scale.exp().item() / temperature
    for name, report in reports.items():
        most = scale * apart(report)  # a probability moves by half of what logits do, at the most
        for mine, other in zip(answers["torch"], answers[name], strict=True):
            own, theirs = by_class(mine), by_class(other)
            assert own.keys() == theirs.keys() == set(COLOURS)
            difference = max(abs(own[colour] - theirs[colour]) for colour in COLOURS)
            assert difference <= most, (name, mine["image"], difference, most)
            if float(mine["probability"]) - float(mine["probability_2"]) > 2 * most:
                assert mine["class"] == other["class"]

    done("explain", "--model", model, "--image", new / names[0], "--text", "red", "--output", tmp_path / "heat.png")
    assert Image.open(tmp_path / "heat.png").size > (0, 0)
    scores = clipft.explain(model, [new / name for name in names[::4]], ["red", "blue"]).scores
    assert scores.shape == (4, 2, 40, 50) and 0 <= scores.min() <= scores.max() <= 1

    own = ["--data", new, "--output", tmp_path / "odd.csv", "--maps", tmp_path / "maps"]
    done("anomaly", "--model", model, "--normal", colours / "red", "--zoom", 2, *own)
    odd = rows_of(tmp_path / "odd.csv")
    assert [row["image"] for row in odd] == names
    labels = [not name.startswith("red/") for name in names]
    assert sklearn.metrics.roc_auc_score(labels, [float(row["score"]) for row in odd]) > 0.8
    assert all(np.load(tmp_path / "maps" / Path(name).with_suffix(".npy")).shape == (40, 50) for name in names)


def by_class(row: dict[str, str]) -> dict[str, float]:
    return {row[f"class{place}"]: float(row[f"probability{place}"]) for place in ("", "_2", "_3", "_4")}
