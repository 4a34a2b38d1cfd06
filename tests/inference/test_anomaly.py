"""What is not normal: patches, windows, and the memory of normal pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import tiny_clip
from tiny_families import tiny_family
from tiny_siglip import tiny_siglip

from clipft.inference.anomaly import PatchMemory, coreset_of
from clipft.inference.patches import to_map, windows_of


def surface(seed: int, hole: tuple[int, int] | None = None) -> Image.Image:
    """A grey surface [60, 90] of noise, with a dark square of 20 pixels, if any."""
    pixels = np.random.default_rng(seed).integers(110, 150, (60, 90), dtype=np.uint8)
    if hole is not None:
        pixels[hole[0] : hole[0] + 20, hole[1] : hole[1] + 20] = 10
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(60, 90), (64, 64), (7, 400), (1, 1)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_windows_cover_every_pixel(size: tuple[int, int], count: int) -> None:
    windows = windows_of(*size, count)
    seen = np.zeros(size, int)
    for one in windows:
        seen[one.top : one.top + one.height, one.left : one.left + one.width] += 1
    assert seen.min() > 0
    assert len(windows) >= count**2 or min(size) < count


def test_a_map_is_in_the_pictures_own_coordinates() -> None:
    windows = windows_of(40, 100, 1)
    values = torch.zeros(len(windows), 4, 4)
    values[-1, 0, 3] = 1.0
    found = to_map(values, windows, (40, 100))
    assert found.shape == (40, 100)
    assert divmod(int(found.argmax()), 100)[0] < 10
    assert divmod(int(found.argmax()), 100)[1] >= 90
    assert torch.allclose(to_map(torch.ones_like(values), windows, (40, 100)), torch.ones(40, 100))


@pytest.mark.parametrize("kind", ["clip", "siglip", "metaclip_2", "chinese_clip"])
def test_a_defect_stands_out_where_it_is(kind: str, tmp_path: Path) -> None:
    if kind == "siglip":
        model, processor = tiny_siglip(kind, tmp_path)
    else:
        model, processor = tiny_clip() if kind == "clip" else tiny_family(kind)
    memory = PatchMemory.fit(model, processor, [surface(seed) for seed in range(4)], windows=3)
    bad, good = (memory.score(model, processor, one) for one in (surface(9, (20, 60)), surface(9)))
    assert bad.score > good.score
    assert bad.map.shape == (60, 90)
    row, column = divmod(int(bad.map.argmax()), 90)
    assert 15 <= row < 45
    assert 55 <= column < 85


def test_a_memory_comes_back_from_its_file_and_knows_its_model(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    memory = PatchMemory.fit(model, processor, [surface(seed) for seed in range(2)])
    memory.save(tmp_path / "m.safetensors")
    again = PatchMemory.load(tmp_path / "m.safetensors")
    again.check(model, processor)
    assert again.score(model, processor, surface(5)).score == memory.score(model, processor, surface(5)).score
    with pytest.raises(ValueError, match="memory: expected a memory of this model"):
        again.check(*tiny_clip(seed=1))


def test_a_coreset_leaves_no_point_far() -> None:
    centres = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 10
    points = centres.repeat_interleave(40, 0) + torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    assert sorted((coreset_of(points, 5) // 40).tolist()) == [0, 1, 2, 3, 4]


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="normal: expected at least one normal picture"):
        PatchMemory.fit(*tiny_clip(), [])
    naflex = tiny_siglip("naflex", tmp_path)
    with pytest.raises(ValueError, match="fixed grid of patches"):
        PatchMemory.fit(*naflex, [surface(0)])
