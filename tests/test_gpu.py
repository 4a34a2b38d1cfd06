"""The losses on a GPU: `pytest -m gpu tests`. The cases, checks and tolerances of the CPU's, and torch's contracts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_cases import CASES, SIGMOID_CASES, LossCase, check_contrastive, check_sigmoid, run, unit
from torch import Tensor

import clipft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LOSSES = {
    "contrastive": clipft.contrastive_loss,
    "sigmoid": lambda image, text, scale: clipft.sigmoid_loss(image, text, scale, -5.0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture(autouse=True)
def no_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFT_STRICT", "1")


def inputs(n: int = 300, dim: int = 64, device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    embeds = (unit(n, dim, seed).to(device, dtype) for seed in (0, 1))
    return [x.requires_grad_() for x in (*embeds, torch.tensor(20.0, device=device))]


def gradients(loss: Callable, args: list[Tensor]) -> list[Tensor]:
    value = loss(*args)
    return [value, *torch.autograd.grad(value, args)]


@pytest.mark.parametrize("case", [*CASES, LossCase(9000, 64, 50.0, "paired", dtype=torch.bfloat16)], ids=str)
def test_contrastive_against_float64(case: LossCase) -> None:
    check_contrastive(case, "cuda")


@pytest.mark.parametrize("case", SIGMOID_CASES, ids=str)
def test_sigmoid_against_float64(case: LossCase) -> None:
    check_sigmoid(case, "cuda")


@every_loss
def test_the_host_never_waits(loss: Callable) -> None:
    args = inputs()
    gradients(loss, args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(loss, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_loss
def test_on_another_stream(loss: Callable) -> None:
    args = inputs()
    want = gradients(loss, args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [(x.detach() * 1.0).requires_grad_() for x in args]
        got = gradients(loss, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@every_loss
def test_in_a_cuda_graph(loss: Callable) -> None:
    args = inputs()
    gradients(loss, args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(loss, args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(loss, args)
    with torch.no_grad():
        args[0].copy_(unit(300, 64, 7))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, gradients(loss, args), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_loss
def test_on_the_second_gpu(loss: Callable) -> None:
    want = gradients(loss, inputs())
    got = gradients(loss, inputs(device="cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, want, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_loss
def test_same_bits_every_time(loss: Callable, dtype: torch.dtype) -> None:
    args = inputs(5000, 64, dtype=dtype)
    first, second = gradients(loss, args), gradients(loss, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_loss
def test_compiles_to_one_graph(loss: Callable) -> None:
    args = inputs()
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(gradients(compiled, args), gradients(loss, args), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_embeddings_dtype() -> None:
    image, text, scale = inputs(dtype=torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = clipft.contrastive_loss(image, text, scale)
    assert loss.dtype == torch.float32 and loss == clipft.contrastive_loss(image, text, scale)


@every_loss
def test_memory_does_not_grow_with_the_square(loss: Callable) -> None:
    """N = 32768, D = 768, bfloat16, below 1 GB, of which a matrix of logits alone would be 4."""
    args = inputs(32768, 768, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(loss, args)
    assert torch.cuda.max_memory_allocated() - before < 10**9


@every_loss
def test_out_of_memory_is_torchs_own_error(loss: Callable) -> None:
    args = inputs(20000, 64, dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            gradients(loss, args)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_come_out_as_nan(value: float) -> None:
    case = LossCase(300, 16, 20.0)
    image, text = (x.cuda() for x in case.embeds())
    image[150, 3] = value
    assert clipft.contrastive_loss(image, text, 20.0).isnan() and clipft.sigmoid_loss(image, text, 20.0, -5.0).isnan()
    assert run(clipft.contrastive_loss, case, device="cuda")[0].isfinite()
