"""Frozen towers: their outputs are computed once, found again by content, and change nothing in a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import captioned, labelled, picture, tiny_clip
from tiny_siglip import tiny_siglip
from tiny_trainer import losses, trainer_of
from torch.utils.data import Dataset

import clipft
from clipft.data.transforms import augmentation_set


def run(
    folder: Path,
    train: Any,
    test: Any = None,
    *,
    strategy: str = "none",
    seen: Counter[str] | None = None,
    **options: Any,
) -> clipft.CLIPTrainer:
    """Train two epochs; `seen` counts the pictures and captions that go through each tower."""
    model, processor = tiny_clip()
    clipft.freeze(model, strategy)
    for name, tower in (("vision", model.vision_model), ("text", model.text_model)):

        def count(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            if seen is not None:
                seen[name] += len(output.pooler_output)

        tower.register_forward_hook(count, with_kwargs=True)
    trainer = trainer_of(folder, train, test, loaded=(model, processor), **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("strategy", ["text", "vision", "towers"])
@pytest.mark.parametrize("data", ["captions", "classes"])
def test_a_run_goes_as_without_the_cache(strategy: str, data: str, tmp_path: Path) -> None:
    train = captioned(20, captions=3) if data == "captions" else labelled(20)
    options: dict[str, Any] = {"strategy": strategy, "eval_strategy": "epoch"}
    test = captioned(9, captions=2)
    cached = run(tmp_path / "cached", train, test, **options)
    plain = run(tmp_path / "plain", train, test, cache_frozen=False, **options)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4, abs=1e-5)
    for name in ("eval_loss", "eval_image_to_text_R@1"):
        assert cached.state.log_history[-2][name] == pytest.approx(plain.state.log_history[-2][name], abs=1e-4)
    assert list((tmp_path / "cached" / "features").glob("*.safetensors")) and not (tmp_path / "plain/features").exists()


def test_captions_of_equal_tokens_are_positives_with_and_without_the_cache(tmp_path: Path) -> None:
    texts = ["A dog!", "a dog", *(f"{number} cats" for number in range(6))]
    same = captioned(8).remove_columns("caption").add_column("caption", texts)
    one = same.remove_columns("caption").add_column("caption", ["a dog", *texts[1:]])

    def losses_of(data: Any, **options: Any) -> list[float]:
        model, processor = tiny_siglip("siglip", tmp_path)  # whose loss sees a pair that is taken for a negative
        clipft.freeze(model, "towers")
        trainer = trainer_of(tmp_path / "run", data, loaded=(model, processor), num_train_epochs=1, **options)
        trainer.train()
        return losses(trainer)

    expected = losses_of(one, cache_frozen=False)
    assert losses_of(same, cache_frozen=False) == pytest.approx(expected, rel=1e-5)
    assert losses_of(same, feature_cache=str(tmp_path / "cache")) == pytest.approx(expected, rel=1e-5)


def test_a_frozen_tower_runs_once_for_each_input(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    run(tmp_path, labelled(20), strategy="towers", seen=seen)
    assert seen == {"vision": 20, "text": 4}  # four class names
    run(tmp_path, labelled(20), strategy="towers", seen=seen)
    assert seen == {"vision": 20, "text": 4}  # all found on disk
    run(tmp_path, labelled(23), strategy="towers", seen=seen)
    assert seen == {"vision": 23, "text": 4}
    with_text: Counter[str] = Counter()
    run(tmp_path, labelled(20), strategy="vision", seen=with_text)
    assert with_text["vision"] == 0 and with_text["text"] <= 2 * 3 * 4  # equal captions of a batch once


def test_augmented_pictures_are_not_cached(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    run(tmp_path, captioned(16), strategy="towers", seen=seen, horizontal_flip=0.5)
    assert seen == {"vision": 32, "text": 16}


@pytest.mark.parametrize("strategy", ["none", "text", "vision", "towers"])
def test_long_runs_crop_pictures_unless_their_tower_is_frozen(strategy: str, tmp_path: Path) -> None:
    loaded = tiny_clip()
    clipft.freeze(loaded[0], strategy)
    for options, kind, overridden in (
        ({"num_train_epochs": 6}, "crop", {}),
        ({"max_steps": 6}, "crop", {}),  # of one batch each
        ({"num_train_epochs": 5}, "none", {}),
        ({"max_steps": 5}, "none", {}),
        ({"num_train_epochs": 6, "horizontal_flip": 0.5}, "crop", {"horizontal_flip": 0.5}),
        ({"num_train_epochs": 1, "augmentation": "light"}, "light", {}),
    ):
        trainer = trainer_of(tmp_path, captioned(8), loaded=loaded, **options)
        frozen = strategy in ("vision", "towers") and kind == "crop"
        assert trainer.data_collator.augmentation == augmentation_set("none" if frozen else kind, **overridden)


def test_what_a_single_epoch_would_compute_anyway_is_not_kept(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    run(tmp_path, captioned(16), strategy="towers", seen=seen, max_steps=1)
    assert seen == {"vision": 8, "text": 8} and not (tmp_path / "features").exists()


def test_another_model_or_picture_misses(tmp_path: Path) -> None:
    store = tmp_path / "store"
    options: dict[str, Any] = {"strategy": "vision", "feature_cache": str(store)}
    run(tmp_path / "a", captioned(8), **options)
    (first,) = store.iterdir()
    seen: Counter[str] = Counter()
    other = captioned(8).to_list()
    rows = [row | {"image": picture(99)[0] if number == 3 else row["image"]} for number, row in enumerate(other)]
    run(tmp_path / "b", datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()), seen=seen, **options)
    assert seen["vision"] == 1 and list(store.iterdir()) == [first]

    model, processor = tiny_clip()
    clipft.freeze(model, "vision")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    trainer = trainer_of(tmp_path, captioned(8), loaded=(model, processor), feature_cache=str(store))
    trainer.get_train_dataloader()
    assert len(list(store.iterdir())) == 2
    with torch.no_grad():
        model.vision_model.post_layernorm.bias += 1.0
    trainer.get_train_dataloader()
    assert len(list(store.iterdir())) == 3


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    want = run(tmp_path, captioned(8), strategy="vision")
    (file,) = (tmp_path / "features").iterdir()
    whole = file.read_bytes()
    for damage in (whole[:100], b"", whole[:-5]):
        file.write_bytes(damage)
        assert losses(run(tmp_path, captioned(8), strategy="vision")) == losses(want)
        assert file.read_bytes() == whole
    digests, table = (load_file(file)[name] for name in ("digests", "pooler_output"))
    others = (
        (digests[[0, *range(len(digests) - 1)]], table),
        (digests, table.half()),
        (digests, table[0]),
        (digests[0],),
    )
    for tensors in others:  # one row twice, another dtype, no table, neither
        save_file({name: x.clone() for name, x in zip(("digests", "pooler_output"), tensors, strict=False)}, file)
        assert losses(run(tmp_path, captioned(8), strategy="vision")) == losses(want)
        assert file.read_bytes() == whole


class Pictures(Dataset[dict[str, Any]]):
    """Not from `datasets`: content is the decoded picture."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        image: Image.Image = picture(index)[0]
        return {"image": image, "caption": f"number {index}"}


def test_any_data_set_with_rows(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    run(tmp_path, Pictures(), strategy="towers", seen=seen)
    assert seen == {"vision": 8, "text": 8}


def test_only_an_adapter_on_one_tower_leaves_the_other_frozen(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, processor = tiny_clip()
    adapted = clipft.add_lora(model, r=2, targets="vision")
    trainer = trainer_of(tmp_path, captioned(8), loaded=(adapted, processor))
    batch = next(iter(trainer.get_train_dataloader()))
    assert "text_pooler_output" in batch and "pixel_values" in batch
    trainer.compute_loss(adapted, batch).backward()


# ---- equal captions ----


def test_equal_captions_of_a_batch_are_encoded_once(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    rows = [{"image": picture(index)[0], "captions": [f"caption {index % 3}"]} for index in range(7)]
    batch = clipft.data.collate.CLIPDataCollator(processor)(rows)
    assert batch["input_ids"].shape[0] == 3 and batch["text_index"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    fused = clipft.fuse(model)
    features = {name: tensor for name, tensor in batch.items() if name != "labels"}
    output = fused(**features, return_logits=True)
    plain = {name: batch[name][batch["text_index"]] for name in ("input_ids", "attention_mask")}
    want = fused(pixel_values=batch["pixel_values"], **plain, return_logits=True)
    torch.testing.assert_close(output.logits_per_image, want.logits_per_image)
    assert "text_index" not in clipft.data.collate.CLIPDataCollator(processor)(rows[:3])
