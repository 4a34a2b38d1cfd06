"""Losses over the ranks of a process group equal one process with the joined batch: 2 and 3 gloo processes, uneven rows, one rank empty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_cases import LossCase, assert_close, gradient_tolerance, value_tolerance

import clipft

SPLITS = {2: [(5, 11), (16, 0)], 3: [(1, 20, 9), (7, 7, 7)]}


def joined(case: LossCase, kind: str) -> list[torch.Tensor]:
    image, text = (x.clone().requires_grad_() for x in case.embeds())
    scale, bias = torch.tensor(case.scale, requires_grad=True), torch.tensor(-4.0, requires_grad=True)
    if kind == "contrastive":
        loss = clipft.contrastive_loss(image, text, scale, labels=case.labels(), label_smoothing=case.smoothing)
        loss.backward()
        return [loss.detach(), image.grad, text.grad, scale.grad]
    loss = clipft.sigmoid_loss(image, text, scale, bias)
    loss.backward()
    return [loss.detach(), image.grad, text.grad, scale.grad, bias.grad]


def worker(rank: int, counts: tuple[int, ...], case: LossCase, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=len(counts))
    group = dist.new_group(list(range(len(counts))))
    begin = sum(counts[:rank])
    rows = slice(begin, begin + counts[rank])
    image, text = (x[rows].clone().requires_grad_() for x in case.embeds())
    scale, bias = torch.tensor(case.scale, requires_grad=True), torch.tensor(-4.0, requires_grad=True)
    if kind == "contrastive":
        labels = None if case.classes is None else case.labels()[rows]
        loss = clipft.contrastive_loss(image, text, scale, labels=labels, label_smoothing=case.smoothing, group=group)
    else:
        loss = clipft.sigmoid_loss(image, text, scale, bias, group=group)
    loss.backward()
    torch.save([loss.detach(), image.grad, text.grad, scale.grad, bias.grad], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind, classes, smoothing", [("contrastive", None, 0.0), ("contrastive", 3, 0.1), ("sigmoid", None, 0.0)])
@pytest.mark.parametrize("counts", [c for splits in SPLITS.values() for c in splits], ids=str)
def test_ranks_equal_the_joined_batch(counts: tuple[int, ...], kind: str, classes: int | None, smoothing: float, tmp_path: Path) -> None:
    case = LossCase(sum(counts), 12, 20.0, "paired", classes, smoothing)
    mp.spawn(worker, (counts, case, kind, str(tmp_path)), nprocs=len(counts))
    want = joined(case, kind)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(counts))]
    for got in ranks:
        assert_close(got[0], want[0], 2 * value_tolerance(case, want[0].item()) * max(1.0, want[0].item()), "loss")
        assert_close(got[3], want[3], 2 * gradient_tolerance(case, want[3]) * case.n, "scale gradient")
        if kind == "sigmoid":
            assert_close(got[4], want[4], 2 * gradient_tolerance(case, want[4]) * case.n, "bias gradient")
    for k, name in ((1, "image gradient"), (2, "text gradient")):
        assert_close(torch.cat([got[k] for got in ranks]), want[k], 2 * gradient_tolerance(case, want[k]), name)


def all_empty(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    with pytest.raises(ValueError, match="got none on any rank"):
        clipft.contrastive_loss(torch.empty(0, 4), torch.empty(0, 4), 1.0, group=dist.group.WORLD)
    dist.destroy_process_group()


def test_no_rows_on_any_rank_is_an_error_on_all(tmp_path: Path) -> None:
    mp.spawn(all_empty, (str(tmp_path),), nprocs=2)
