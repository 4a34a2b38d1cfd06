"""The classes that an export brings along: logits in its graph, class vectors beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_folders import undescribed
from tiny_clip import picture

import clipft

onnxruntime = pytest.importorskip("onnxruntime")


def test_the_image_encoder_gives_the_logits_of_its_head(exported: tuple[Path, dict[str, Any]]) -> None:
    for int8 in (False, True):
        clip = clipft.OnnxCLIP(exported[0], int8=int8)
        kind = ".int8" if int8 else ""
        session = onnxruntime.InferenceSession(exported[0] / f"image_encoder{kind}.onnx")
        pixels = np.stack([clip.preprocess(picture(number)[0]) for number in range(3)])
        embeds, logits = session.run(["image_embeds", "logits"], {"pixel_values": pixels})
        np.testing.assert_allclose(logits, clip.classifiers["label"].logits(embeds), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classifiers": {"label": []}}, "expected a list of classifiers, each with name, classes and scale"),
        ({"classifiers": [{"name": "label", "classes": ["a", "a"], "scale": 1}]}, "expected a list of classifiers"),
        ({"classifiers": [{"name": "label", "classes": ["a", "b"], "scale": -1}]}, "expected a list of classifiers"),
        ({"classifiers": [{"name": "label", "classes": ["a", "b"], "scale": 1}]}, "expected 2 finite vectors of 16"),
        ({"calibration": {"label": {"temperature": 0}}}, "label: temperature: expected a number from 1e-6 to 1e6"),
    ],
)
def test_a_damaged_description_of_classes_is_named(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "copy")
    undescribed(folder, **change)
    with pytest.raises(ValueError, match=said):
        clipft.OnnxCLIP(folder)


def test_class_vectors_are_checked_and_an_older_export_has_none(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "copy")
    vectors = np.load(folder / "class_vectors.npy")
    np.save(folder / "class_vectors.npy", vectors[::-1])
    with pytest.raises(ValueError, match=r"expected files that were written together: class_vectors\.npy"):
        clipft.OnnxCLIP(folder)
    undescribed(folder)
    (folder / "class_vectors.npy").write_bytes((folder / "class_vectors.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"class_vectors\.npy: expected an array of class vectors"):
        clipft.OnnxCLIP(folder)
    (folder / "class_vectors.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"class_vectors\.npy is missing"):
        clipft.OnnxCLIP(folder)
    undescribed(folder, classifiers=None)
    assert clipft.OnnxCLIP(folder).classifiers == {}
