"""What is not normal: patches, windows, and the memory of normal pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from surfaces import surface
from tiny_clip import tiny_clip
from tiny_families import tiny_family
from tiny_siglip import tiny_siglip

import clipft
from clipft.inference.anomaly import PatchMemory, coreset_of
from clipft.inference.patches import to_map, windows_of


@pytest.mark.parametrize("size", [(60, 90), (64, 64), (7, 400), (1, 1)])
@pytest.mark.parametrize("zoom", [1, 1.5, 3])
def test_windows_cover_every_pixel(size: tuple[int, int], zoom: float) -> None:
    windows = windows_of(*size, zoom)
    seen = np.zeros(size, int)
    for one in windows:
        seen[one.top : one.top + one.height, one.left : one.left + one.width] += 1
    assert seen.min() > 0
    assert windows[0].height <= max(size[0] / zoom + 1, size[0] / 16)


def test_a_map_is_in_the_pictures_own_coordinates() -> None:
    windows = windows_of(40, 100, 1)
    values = torch.zeros(len(windows), 4, 4)
    values[-1, 0, 3] = 1.0
    found = to_map(values, windows, (40, 100))
    assert found.shape == (40, 100)
    assert divmod(int(found.argmax()), 100)[0] < 10
    assert divmod(int(found.argmax()), 100)[1] >= 90
    assert torch.allclose(to_map(torch.ones_like(values), windows, (40, 100)), torch.ones(40, 100))


@pytest.mark.parametrize("kind", ["clip", "siglip", "metaclip_2", "chinese_clip", "int8"])
def test_a_defect_stands_out_where_it_is(kind: str, tmp_path: Path) -> None:
    if kind == "siglip":
        model, processor = tiny_siglip(kind, tmp_path)
    else:
        model, processor = tiny_clip() if kind in ("clip", "int8") else tiny_family(kind)
    model = clipft.quantize(model) if kind == "int8" else model
    memory = PatchMemory.fit(model, processor, [surface(seed) for seed in range(4)], zoom=2)
    bad, good = (memory.score(model, processor, one) for one in (surface(9, (20, 60)), surface(9)))
    assert bad.score > good.score
    assert bad.map.shape == (60, 90)
    inside = np.zeros((60, 90), bool)
    inside[20:40, 60:80] = True
    assert bad.map[inside].mean() > 1.1 * bad.map[~inside].mean()


def test_a_memory_comes_back_from_its_file_and_knows_its_model(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    memory = PatchMemory.fit(model, processor, [surface(seed) for seed in range(2)])
    memory.save(tmp_path / "m.safetensors")
    again = PatchMemory.load(tmp_path / "m.safetensors")
    again.check(model, processor)
    assert again.score(model, processor, surface(5)).score == memory.score(model, processor, surface(5)).score
    with pytest.raises(ValueError, match="memory: expected a memory of this model"):
        again.check(*tiny_clip(seed=1))


def test_normal_pictures_are_held_against_the_others() -> None:
    """With all patches kept, each has itself at distance 0."""
    model, processor = tiny_clip()
    memory = PatchMemory.fit(model, processor, [surface(seed) for seed in range(4)], zoom=2, coreset=1.0)
    assert all(level.typical > 0.01 for level in memory.levels)
    assert len(memory.normal_scores) == 4
    assert 0.5 < min(memory.normal_scores) < max(memory.normal_scores) < 4
    assert 0.4 < memory.score(model, processor, surface(9)).score < 0.6
    assert memory.score(model, processor, surface(2)).score < 0.01  # one of its own


def test_a_coreset_leaves_no_point_far() -> None:
    centres = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 10
    points = centres.repeat_interleave(40, 0) + torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    assert sorted((coreset_of(points, 5) // 40).tolist()) == [0, 1, 2, 3, 4]


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="normal: expected at least 2 normal pictures, found 1"):
        PatchMemory.fit(*tiny_clip(), [surface(0)])
    naflex = tiny_siglip("naflex", tmp_path)
    with pytest.raises(ValueError, match="fixed grid of patches"):
        PatchMemory.fit(*naflex, [surface(0)])
