"""Losses over the ranks of a process group equal one process with the joined batch: 2 and 3 gloo processes, uneven
rows, one rank empty. On a GPU those share it, which NCCL does not let them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loss_cases import LossCase, assert_close, gradient_tolerance, value_tolerance
from ranks import leave, start_ranks

import clipft

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SPLITS = [
    *(((5, 11), "cpu"), ((16, 0), "cpu"), ((1, 20, 9), "cpu"), ((7, 7, 7), "cpu")),
    pytest.param((1, 20, 9), "cuda", marks=ON_GPU),
    pytest.param((16, 0), "cuda", marks=ON_GPU),
]
VARIANTS = [  # kind, classes, smoothing
    ("contrastive", None, 0.0),
    ("contrastive", 3, 0.1),
    ("sigmoid", None, 0.0),
    ("sigmoid", 3, 0.0),
]


def step(
    case: LossCase, kind: str, rows: slice, group: dist.ProcessGroup | None, device: str = "cpu"
) -> list[torch.Tensor | None]:
    """Loss and gradients over these rows of the case, on the CPU."""
    image, text = (x[rows].to(device, copy=True).requires_grad_() for x in case.embeds())
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (case.scale, -4.0))
    labels = None if case.classes is None else case.labels()[rows].to(device)
    if kind == "contrastive":
        loss = clipft.contrastive_loss(image, text, scale, labels=labels, label_smoothing=case.smoothing, group=group)
    else:
        loss = clipft.sigmoid_loss(image, text, scale, bias, labels=labels, group=group)
    loss.backward()
    found = loss.detach(), image.grad, text.grad, scale.grad, bias.grad
    return [None if x is None else x.cpu() for x in found]


def cases(n: int) -> list[tuple[str, LossCase]]:
    return [(kind, LossCase(n, 12, 20.0, "paired", classes, smoothing)) for kind, classes, smoothing in VARIANTS]


def worker(rank: int, counts: tuple[int, ...], folder: str, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=len(counts))
    begin = sum(counts[:rank])
    rows = slice(begin, begin + counts[rank])
    results = [step(case, kind, rows, dist.group.WORLD, device) for kind, case in cases(sum(counts))]
    torch.save(results, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.parametrize("counts, device", SPLITS, ids=str)
def test_ranks_equal_the_joined_batch(counts: tuple[int, ...], device: str, tmp_path: Path) -> None:
    start_ranks(worker, (counts, str(tmp_path), device), nprocs=len(counts))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(counts))]
    for variant, (kind, case) in enumerate(cases(sum(counts))):
        want = step(case, kind, slice(None), None)
        got = [results[variant] for results in ranks]
        for on_rank in got:
            assert_close(
                on_rank[0], want[0], 2 * value_tolerance(case, want[0].item()) * max(1.0, want[0].item()), "loss"
            )
            assert_close(on_rank[3], want[3], 2 * gradient_tolerance(case, want[3]) * case.n, "scale gradient")
            if kind == "sigmoid":
                assert_close(on_rank[4], want[4], 2 * gradient_tolerance(case, want[4]) * case.n, "bias gradient")
        for k, name in ((1, "image gradient"), (2, "text gradient")):
            assert_close(torch.cat([g[k] for g in got]), want[k], 2 * gradient_tolerance(case, want[k]), name)


def bad_on_all(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for loss in (clipft.contrastive_loss, partial(clipft.sigmoid_loss, logit_bias=0.0)):  # before any rank waits
        with pytest.raises(ValueError, match="text_embeds must have the shape of image_embeds"):
            loss(torch.ones(3, 4), torch.ones(2, 4), logit_scale=1.0, group=dist.group.WORLD)
        with pytest.raises(ValueError, match=r"labels must have one entry per pair, \[3\], got shape \[1\]"):
            loss(
                torch.ones(3, 4),
                torch.ones(3, 4),
                logit_scale=1.0,
                labels=torch.zeros(1, dtype=torch.int64),
                group=dist.group.WORLD,
            )
    with pytest.raises(ValueError, match="got none on any rank"):
        clipft.contrastive_loss(torch.empty(0, 4), torch.empty(0, 4), 1.0, group=dist.group.WORLD)
    leave()


def test_bad_input_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    start_ranks(bad_on_all, (str(tmp_path),), nprocs=2)
