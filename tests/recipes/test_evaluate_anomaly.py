"""``clipft evaluate --anomaly`` on surfaces with known defects."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from commands import run
from PIL import Image

import clipft
from clipft.data.inspection import read_mask

KINDS = ("crack", "spot")


def surface(seed: int, kind: str | None = None) -> tuple[Image.Image, Image.Image]:
    """A grey surface of 48 x 40 pixels, and its mask."""
    rng = np.random.default_rng(seed)
    pixels, mask = rng.integers(100, 140, (40, 48)).astype(np.uint8), np.zeros((40, 48), np.uint8)
    y, x = rng.integers(4, 26, 2)
    if kind == "crack":
        mask[y : y + 3, 4:44] = 255
    elif kind == "spot":
        mask[y : y + 10, x : x + 10] = 255
    pixels[mask > 0] = 250 if kind == "spot" else 5
    return Image.fromarray(pixels), Image.fromarray(mask)


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "tiles"
    for seed in range(4):
        save(surface(seed)[0], root / f"train/good/{seed}.png")
        save(surface(10 + seed)[0], root / f"test/good/{seed}.png")
        for number, kind in enumerate(KINDS):
            picture, mask = surface(20 + seed + 10 * number, kind)
            save(picture, root / f"test/{kind}/{seed}.png")
            save(mask, root / f"ground_truth/{kind}/{seed}_mask.png")
    return root


def test_numbers_are_those_of_the_scores_and_maps_of_anomaly(tiles: Path, base: Path, tmp_path: Path) -> None:
    result = run("evaluate", "--anomaly", "--model", base, "--data", tiles, "--output", tmp_path / "x/score.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "x/score.json").read_text())
    score = written["anomaly"]
    assert {option: own["read"] for option, own in written["reading"].items()} == {"data": 12, "masks": 8}
    assert "Anomaly detection" in (tmp_path / "x/score.html").read_text()
    found = clipft.anomaly(base, tiles / "test", normal=tiles / "train/good")
    kinds = [Path(row.image).parent.name for row in found]
    labels, scores = np.array([kind != "good" for kind in kinds]), np.array([row.score for row in found])
    assert score["image_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    above = scores >= score["threshold"] - 1e-5  # a second run rounds otherwise
    assert score["best_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, above))
    masks = [
        np.zeros(row.map.shape, bool)
        if kind == "good"
        else read_mask(tiles / "ground_truth" / Path(row.image).with_name(f"{Path(row.image).stem}_mask.png"))
        for kind, row in zip(kinds, found, strict=True)
    ]
    flat = np.concatenate([mask.ravel() for mask in masks]), np.concatenate([row.map.ravel() for row in found])
    assert score["pixel_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(*flat), abs=1e-4)
    assert score["pixel_auroc"] > 0.6
    assert (score["normal"], score["anomalies"], score["regions"]) == (4, 8, 8)
    assert [row["kind"] for row in score["per_kind"]] == list(KINDS)
    assert {"image_auroc", "best_f1", "pixel_auroc", "aupro@30"} <= score["intervals"].keys()
    for name, (low, high) in score["intervals"].items():
        assert low <= score[name] <= high
    for kind in KINDS:
        assert re.search(rf"{kind} .*\b4\b", result.stdout), result.stdout
    assert "aupro@30" in result.stdout and f"{tiles}/ground_truth: read 8 of 8" in result.stdout


def test_the_page_has_the_worst_pictures_with_maps_beside_masks(tiles: Path, base: Path) -> None:
    scores = clipft.evaluate(base, tiles, anomaly=True)
    page = scores._repr_html_()
    for words in ("Anomaly detection", "kind of defect", "with the lowest scores", "Normal pictures with the highest"):
        assert words in page
    scored = clipft.anomaly(base, tiles / "test", normal=tiles / "train/good")
    by_score = [row.image for row in sorted(scored, key=lambda row: row.score)]
    defects = [name for name in by_score if not name.startswith("good/")]
    normal = [name for name in by_score if name.startswith("good/")]
    strips = re.findall(r'alt="the map of (.*?)"', page)
    assert strips[:8] == defects[:4] + normal[::-1]
    assert len(strips) == 12 and set(strips[8:]) <= set(defects)  # those of the worst places
    assert re.findall(r'alt="the mask of (.*?)"', page) == strips[:4] + strips[8:]


def test_without_masks_pictures_alone_are_scored(tiles: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "test").symlink_to(tiles / "test")
    result = run("evaluate", "--anomaly", "--model", base, "--data", tmp_path, "--normal", tiles / "train/good")
    assert result.exit_code == 0, result.output
    assert "has no ground_truth with masks: numbers of pictures alone" in result.stdout
    assert "image auroc" in result.stdout and "pixel" not in result.stdout


def test_what_does_not_fit_is_one_line(tiles: Path, base: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--model", base, "--data"]
    bad = tmp_path / "bad"
    for part in ("train", "test"):
        (bad / part).parent.mkdir(exist_ok=True)
        (bad / part).symlink_to(tiles / part)
    for kind in KINDS:
        for seed in range(4):
            save(surface(0)[1].resize((4, 4)), bad / f"ground_truth/{kind}/{seed}_mask.png")
    for wrong, message in (
        ([tiles, "--anomaly", "--probe-data", tiles], "--probe-data: expected nothing beside anomaly (--anomaly)"),
        ([tiles, "--normal", tiles], "--normal: expected anomaly=True (--anomaly) beside it"),
        ([tiles, "--anomaly", "--normal-text", "a good tile"], "--anomaly-text: expected at least one text"),
        ([tiles / "test", "--anomaly"], "expected MVTec AD's layout"),
        ([tmp_path / "none", "--anomaly"], "--data: expected a folder in MVTec AD's layout"),
        ([bad, "--anomaly"], "crack/0_mask.png: expected 48 x 40 pixels as"),
    ):
        result = run(*command, *wrong)
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1
