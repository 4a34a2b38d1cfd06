"""The losses' CUDA kernels and the C that launches them, on an emulated GPU: the cases, checks and tolerances of the
CPU's. Every launch is checked for races and bounds (tests/cuda/emulation.h), and new memory is full of NaN."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from emulated_cuda import EmulatedCuda
from loss_cases import (
    CASES,
    LABEL_CASES,
    SIGMOID_CASES,
    LossCase,
    check_contrastive,
    check_extreme_logits,
    check_sigmoid,
    check_sigmoid_bias_near_convergence,
    check_sigmoid_labels_near_convergence,
    run,
    unit,
)
from torch.utils._python_dispatch import TorchDispatchMode

import clipft

NONE = torch.empty(0, dtype=torch.int64)


def affordable(case: LossCase) -> bool:
    """The emulated GPU's tiles are [256, 512]: N = 1025 has all kinds of them."""
    return case.n < 2000


@pytest.mark.parametrize("case", [*filter(affordable, CASES)], ids=str)
def test_cuda_contrastive_against_float64(case: LossCase, cuda: EmulatedCuda) -> None:
    before = cuda.launches()
    check_contrastive(case, "emulated")
    assert cuda.launches() > before


@pytest.mark.parametrize("case", [*filter(affordable, SIGMOID_CASES)], ids=str)
def test_cuda_sigmoid_against_float64(case: LossCase, cuda: EmulatedCuda) -> None:
    check_sigmoid(case, "emulated")


@pytest.mark.parametrize("case", [*filter(affordable, LABEL_CASES)], ids=str)
def test_cuda_sigmoid_with_labels_against_float64(case: LossCase, cuda: EmulatedCuda) -> None:
    check_sigmoid(case, "emulated", labelled=True)


class HostNeverWaits(TorchDispatchMode):
    """Refuses the ops of torch for which the host would wait for a GPU: those whose result's shape, or a number in
    Python, depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "unique", "equal", "masked_select", "repeat_interleave", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_cuda_labels_never_make_the_host_wait(cuda: EmulatedCuda) -> None:
    args = [x.requires_grad_() for x in (unit(), unit(seed=1), torch.tensor(20.0), torch.tensor(-5.0))]
    labels = torch.arange(24) // 3
    with HostNeverWaits():
        torch.autograd.grad(clipft.sigmoid_loss(*args, labels=labels), args)
        torch.autograd.grad(clipft.contrastive_loss(*args[:3], labels=labels), args[:3])
        with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
            float(args[2].detach())


LOSSES = {
    "contrastive": clipft.contrastive_loss,
    "sigmoid": lambda image, text, scale: clipft.sigmoid_loss(image, text, scale, -5.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "needs",
    [(True, False, False), (False, True, False), (False, False, True), (True, False, True), (False, True, True)],
)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_cuda_gradients_only_where_needed(
    loss: Callable, needs: tuple[bool, bool, bool], dtype: torch.dtype, cuda: EmulatedCuda
) -> None:
    args = [unit(270).to(dtype), unit(270, seed=1).to(dtype), torch.tensor(20.0)]
    every = [a.clone().requires_grad_() for a in args]
    loss(*every).backward()
    some = [a.clone().requires_grad_(need) for a, need in zip(args, needs, strict=True)]
    loss(*some).backward()
    for a, b, need in zip(some, every, needs, strict=True):
        assert (a.grad is not None) == need
        if need:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_cuda_upstream_gradient_scales(loss: Callable, cuda: EmulatedCuda) -> None:
    image, scale = unit().requires_grad_(), torch.tensor(20.0, requires_grad=True)
    value = loss(image, unit(seed=1), scale)
    once = torch.autograd.grad(value, (image, scale), retain_graph=True)
    thrice = torch.autograd.grad(3 * value, (image, scale))
    for a, b in zip(thrice, once, strict=True):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda_gives_the_same_bits_every_time(loss: Callable, dtype: torch.dtype, cuda: EmulatedCuda) -> None:
    case = LossCase(600, 24, 100.0, "paired", dtype=dtype)
    first, second = run(loss, case), run(loss, case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("n", [5, 300])
def test_cuda_nan_and_inf_come_out_as_nan(value: float, which: int, n: int, cuda: EmulatedCuda) -> None:
    args = [unit(n), unit(n, seed=1)]
    args[which][n // 2, 3] = value
    image = args[0].requires_grad_()
    loss = clipft.contrastive_loss(image, args[1], 20.0)
    assert loss.isnan() and clipft.sigmoid_loss(*args, 20.0, -5.0).isnan()
    loss.backward()
    assert image.grad.isnan().any()
    assert clipft.contrastive_loss(unit(), unit(seed=1), float("nan")).isnan()


def test_cuda_extreme_logits_stay_finite(cuda: EmulatedCuda) -> None:
    check_extreme_logits()


def test_cuda_sigmoid_bias_gradient_near_convergence(cuda: EmulatedCuda) -> None:
    check_sigmoid_bias_near_convergence(512)


def test_cuda_sigmoid_labels_near_convergence(cuda: EmulatedCuda) -> None:
    check_sigmoid_labels_near_convergence()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", [None, torch.arange(601) % 7])
def test_cuda_shards_make_the_whole(labels: torch.Tensor | None, dtype: torch.dtype, cuda: EmulatedCuda) -> None:
    """What a process group's ranks do, of which one has no images."""
    image, text = unit(601).to(dtype), unit(601, seed=1).to(dtype)
    scale, none, grad = torch.tensor(20.0), NONE if labels is None else labels, torch.tensor(2.0)
    whole = torch.ops.clipft.contrastive_loss(image, text, scale, none, 0.1)
    want = torch.ops.clipft.contrastive_loss_backward(
        grad, image, text, scale, none, 0.1, 0, *whole[1:3], whole[4], True, True
    )
    bounds, columns, rows, targets = [0, 280, 280, 601], [], [], []
    for begin, end in pairwise(bounds):
        _, row, col, target, _ = torch.ops.clipft.contrastive_loss_shard(
            image[begin:end], text, scale, none, 0.1, True, begin
        )
        rows.append(row), columns.append(col), targets.append(target)
    columns = torch.logsumexp(torch.stack(columns), 0)
    torch.testing.assert_close(columns, whole[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(rows), whole[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sum(targets), whole[3], rtol=1e-6, atol=1e-6)
    parts = [
        torch.ops.clipft.contrastive_loss_backward(
            grad, image[b:e], text, scale, none, 0.1, b, row, columns, torch.empty(0, 601), True, True
        )
        for (b, e), row in zip(pairwise(bounds), rows, strict=True)
    ]
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-4}
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), want[0], **close)
    torch.testing.assert_close(sum(p[1].float() for p in parts), want[1].float(), **close)
    torch.testing.assert_close(sum(p[2] for p in parts), want[2], rtol=1e-4, atol=1e-6)

    bias = torch.tensor(-5.0)
    want = torch.ops.clipft.sigmoid_loss(image, text, scale, bias, NONE, True, True, True)
    parts = [
        torch.ops.clipft.sigmoid_loss_shard(image[b:e], text, scale, bias, NONE, True, True, True, b)
        for b, e in pairwise(bounds)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), want[0])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), want[1], **close)
    torch.testing.assert_close(sum(p[2] for p in parts), want[2], **close)
    torch.testing.assert_close(sum(p[3] for p in parts), want[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: unit(4, 9)}, r"text_embeds must have the shape of image_embeds, \[4, 9\], got \[4, 8\]"),
        ({2: torch.ones(2)}, r"logit_scale must be 0-d, got shape \[2\]"),
        ({3: torch.arange(3)}, r"labels must have one entry per pair, \[4\], got shape \[3\]"),
        ({4: 1.0}, r"label_smoothing must be in \[0, 1\), got 1"),
    ],
)
def test_cuda_bad_input_is_named(change: dict, message: str, cuda: EmulatedCuda) -> None:
    args = {0: unit(4), 1: unit(4, seed=1), 2: torch.tensor(1.0), 3: NONE, 4: 0.0} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.clipft.contrastive_loss(*args.values())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_cuda_memory_does_not_grow_with_the_square(
    loss: Callable, cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No allocation of more elements than a tile has: N^2 would be twenty times that."""
    monkeypatch.setenv("EMULATED_MEMORY", str(256 * 512))
    run(loss, LossCase(1600, 16, 20.0))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_cuda_out_of_memory_is_torchs_own_error(
    loss: Callable, cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [unit(400).requires_grad_(), unit(400, seed=1), 20.0]
    value = loss(*args)
    monkeypatch.setenv("EMULATED_MEMORY", "1000")
    with pytest.raises(
        torch.OutOfMemoryError, match="could not allocate a float32 tensor of 102400 elements: CUDA out"
    ):
        loss(*args)
    if loss is clipft.contrastive_loss:  # the other's gradients are there, and torch's to multiply
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            value.backward()
