"""Mined hard negatives: what is chosen, what is never chosen, and that a run with them repeats and resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from ranks import run_ranks
from scripts import import_paths
from tiny_clip import captioned, labelled, picture
from tiny_trainer import StopAfter, losses, same, trainer_of
from torch import Tensor

import clipft
from clipft.data.sampling import HardNegativeSampler, hardest, positives_of_each_other


def clusters(count: int, size: int, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Pairs in tight clusters: a pair's own similarity is 1, that within a cluster about .8, else about 0."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)
    rows = centres.repeat_interleave(size, 0) + 0.2 * torch.randn(count * size, dim, generator=generator)
    embeds = torch.nn.functional.normalize(rows, dim=1)
    return embeds, embeds.clone()


def sampler_of(embeds: Any, positives: Any = None, negatives: int = 3, batch: int = 8, **options: Any) -> Any:
    rows = range(len(embeds[0])) if positives is None else positives
    return HardNegativeSampler(lambda: embeds, rows, negatives, batch, **({"seed": 1, "epoch": lambda: 0} | options))


def test_the_hardest_are_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(37, 6, generator=generator), dim=1) for _ in range(2))
    texts = torch.nn.functional.normalize(texts + 2 * images, dim=1)
    positives = torch.arange(37) // 2
    expected = []
    similarity, own = (images @ texts.T).tolist(), (images * texts).sum(1).tolist()
    for i in range(37):
        allowed = [
            (-max(similarity[i][j], similarity[j][i]), j)
            for j in range(37)
            if i // 2 != j // 2 and max(similarity[i][j], similarity[j][i]) <= own[i] - 0.05 * abs(own[i])
        ]
        rows = [j for _, j in sorted(allowed)][:5]
        expected.append(rows + [-1] * (5 - len(rows)))
    for chunk in (1, 8, 100):
        assert hardest(images, texts, positives, 5, chunk).tolist() == expected
    assert hardest(images, texts, torch.zeros(37), 5).eq(-1).all()


def test_what_is_nearer_than_the_pair_itself_is_no_negative() -> None:
    images = torch.eye(3)
    texts = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0.2], [0.97, 0.1, 0.2], [0.3, 0, 1.0]]), dim=1)
    assert hardest(images, texts, torch.arange(3), 2)[0].tolist() == [2, -1]  # the second text fits the first picture


def test_either_side_is_held_against_the_pairs_own_similarity() -> None:
    """Pair 0 is at .4, its text at .6 to the picture of pair 1, which is at .9."""
    images, texts = torch.zeros(3, 6), torch.zeros(3, 6)
    images[0, 0], images[0, 3], images[1, 0], images[1, 1] = 0.4, 0.84**0.5, 0.6, 0.8
    texts[0, 0], texts[1, 0], texts[1, 1], texts[1, 4] = 1.0, 0.54, 0.72, 0.19**0.5
    images[2, 2] = texts[2, 2] = 1.0
    assert hardest(images, texts, torch.arange(3), 2)[:2].tolist() == [[2, -1], [0, 2]]


def batches_of(sampler: Any, size: int) -> list[list[int]]:
    rows = [index for _, index in sampler]
    assert sorted(rows) == list(range(len(rows)))  # every row comes once
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def test_nearly_every_pair_meets_three_of_its_hardest() -> None:
    batches = batches_of(sampler_of(clusters(16, 8, 16), batch=16), 16)
    met = [sum(row // 8 == other // 8 for other in batch) > 3 for batch in batches for row in batch]
    assert sum(met) >= 0.9 * len(met)


def test_what_is_nearer_than_the_pair_itself_is_not_drawn_in_by_others() -> None:
    """Rows 0 and 1 are all but one; each is among the hardest of the six others of their cluster."""
    embeds = torch.eye(50)
    embeds[:8] += embeds[8]
    embeds[1] = embeds[0] + 0.1 * embeds[9]
    embeds = torch.nn.functional.normalize(embeds, dim=1)
    for seed in range(4):
        batch = next(own for own in batches_of(sampler_of((embeds, embeds), batch=10, seed=seed), 10) if 0 in own)
        assert 1 not in batch


@pytest.mark.parametrize("dim, noise", [(16, 0.2), (32, 0.5)])
def test_batches_are_harder_than_random_ones(dim: int, noise: float) -> None:
    images, _ = clusters(32, 8, dim)
    texts = torch.nn.functional.normalize(images + noise * torch.randn(images.shape).div(dim**0.5), dim=1)

    def loss(batches: list[list[int]]) -> float:
        return float(
            torch.stack([clipft.contrastive_loss(images[b], texts[b], torch.tensor(20.0)) for b in batches]).mean()
        )

    mined = loss(batches_of(sampler_of((images, texts), batch=32), 32))
    assert mined > 1.5 * loss(list(torch.randperm(256).view(8, 32).tolist()))


def test_equal_labels_and_captions_are_not_mined() -> None:
    positives = positives_of_each_other([["a", "b"], ["c"], ["b", "d"], ["e"], ["d"]])
    assert len(set(positives)) == 3
    assert positives[0] == positives[2] == positives[4]
    assert len(set(positives_of_each_other([["a"], ["b"], ["c"]], [1, 0, 1]))) == 2
    embeds = clusters(4, 8)
    rows = [index for _, index in sampler_of(embeds, [row // 2 for row in range(32)], batch=4)]
    batches = [rows[start : start + 4] for start in range(0, 32, 4)]
    within = [batch for batch in batches if len({row // 8 for row in batch}) == 1]
    assert within and all(len({row // 2 for row in batch}) == 4 for batch in within)


def test_the_order_follows_from_seed_epoch_and_embeddings() -> None:
    embeds = clusters(8, 4)
    orders = [list(sampler_of(embeds, seed=seed, epoch=lambda e=e: e)) for seed, e in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert {epoch for epoch, _ in orders[3]} == {1}
    assert [row for _, row in orders[0]] != [row for _, row in orders[3]]


def scenes(count: int) -> datasets.Dataset:
    """Captions that tell colour and shape, as `captioned` has them, without the number at their end."""
    rows = [picture(index) for index in range(count)]
    return datasets.Dataset.from_dict(
        {"image": [row[0] for row in rows], "caption": [row[1] for row in rows]},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )


def test_mined_batches_are_harder_for_the_same_weights(tmp_path: Path) -> None:
    taught = trainer_of(tmp_path, scenes(16), num_train_epochs=20, learning_rate=3e-3)
    taught.train()
    loaded, mean = (clipft.unfuse(taught.model), taught.processing_class), {}
    for negatives in (0, 3):
        trainer = trainer_of(
            tmp_path, scenes(16), loaded=loaded, hard_negatives=negatives, per_device_train_batch_size=4
        )
        with torch.no_grad():
            found = [trainer.compute_loss(trainer.model.eval(), batch) for batch in trainer.get_train_dataloader()]
        mean[negatives] = torch.stack(found).mean().item()
    assert mean[3] > 1.2 * mean[0], mean


@pytest.mark.parametrize("stop", [2, 4])  # within the first epoch, of captions, and at its end, of classes
def test_resume_is_exact(tmp_path: Path, stop: int) -> None:
    data = captioned(27, captions=2) if stop == 2 else labelled(27)
    options: dict[str, Any] = {"hard_negatives": 3, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": stop}
    whole = trainer_of(tmp_path / "whole", data, random_resized_crop=0.5, **options)
    whole.train()
    trainer_of(tmp_path / "broken", data, random_resized_crop=0.5, callbacks=[StopAfter(stop)], **options).train()
    resumed = trainer_of(tmp_path / "broken", data, random_resized_crop=0.5, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert same(resumed.model, whole.model)
    (tmp_path / "broken" / f"checkpoint-{stop}" / "hard_negatives.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not a whole checkpoint .*hard_negatives.safetensors"):
        trainer_of(tmp_path / "broken", data, **options).train(
            resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{stop}")
        )


RANKS = """
import json, sys
from pathlib import Path
import torch
sys.path[:0] = {tests!r}
from ranks import leave
from tiny_clip import captioned
from tiny_trainer import losses, trainer_of
torch.set_num_threads(1)
trainer = trainer_of(Path(sys.argv[1]), captioned(32), per_device_train_batch_size=4, per_device_eval_batch_size=5,
    hard_negatives=3, gradual_unfreezing=0.5)
trainer.train()
if trainer.is_world_process_zero():
    Path(sys.argv[1], "result.json").write_text(json.dumps([losses(trainer), trainer._mined._mined]))
leave()
"""


def test_two_processes_mine_and_unfreeze_as_one(tmp_path: Path) -> None:
    run_ranks(RANKS.format(tests=import_paths(__file__)), tmp_path)
    found, order = json.loads((tmp_path / "result.json").read_text())
    one = trainer_of(tmp_path / "one", captioned(32), hard_negatives=3, gradual_unfreezing=0.5)
    one.train()
    assert found == pytest.approx(losses(one), rel=1e-4)
    assert order[0] == 1 and sorted(order[1]) == list(range(32))


def test_arguments_are_checked() -> None:
    for options in ({"hard_negatives": -1}, {"hard_negatives": 3, "class_balanced": True}, {"hard_negatives": 32}):
        with pytest.raises(ValueError, match="hard_negatives: expected"):
            clipft.CLIPTrainingArguments(output_dir="x", use_cpu=True, **options)
