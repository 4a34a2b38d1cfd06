"""The ops on a GPU: `pytest -m gpu tests`. The cases, checks and tolerances of the CPU's, and torch's contracts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from int8_cases import CASES as INT8_CASES
from int8_cases import (
    LEADS,
    Int8Case,
    check_bad_rows,
    check_bad_rows_in_a_chain,
    check_case,
    check_extreme_levels,
    check_float32_bias,
    check_leading_shape,
    check_long_rows,
    check_sums,
    check_surroundings,
    check_zero_huge_and_tiny_rows,
)
from lora_cases import CASES as LORA_CASES
from lora_cases import LoraCase, assert_within, exact, ours
from loss_cases import (
    CASES,
    LABEL_CASES,
    SIGMOID_CASES,
    LossCase,
    check_contrastive,
    check_sigmoid,
    run,
    unit,
)
from torch import Tensor

import clipft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LOSSES = {
    "contrastive": clipft.contrastive_loss,
    "sigmoid": lambda image, text, scale: clipft.sigmoid_loss(image, text, scale, -5.0),
    "sigmoid with labels": lambda image, text, scale: clipft.sigmoid_loss(
        image, text, scale, -5.0, labels=torch.arange(len(image), device=image.device) // 3
    ),
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


@pytest.mark.parametrize("case", LABEL_CASES, ids=str)
def test_sigmoid_with_labels_against_float64(case: LossCase) -> None:
    check_sigmoid(case, "cuda", labelled=True)


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


# ---- linear layers ----


@pytest.fixture
def no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("case", LORA_CASES, ids=str)
def test_lora_against_float64(case: LoraCase, no_tf32: None) -> None:
    case = dataclasses.replace(case, device="cuda")
    assert_within(case, ours(case), exact(case), on_gpu=True)


def test_lora_mask_is_the_cpus() -> None:
    seed = torch.tensor(-(2**40) + 5)
    mask = clipft.ops.dropout_mask(seed.cuda(), 700, 333, 0.3)
    assert torch.equal(mask.cpu(), clipft.ops.dropout_mask(seed, 700, 333, 0.3))


@pytest.mark.parametrize("case", INT8_CASES, ids=str)
def test_int8_against_exact_integers(case: Int8Case) -> None:
    check_case(case, "cuda")


@pytest.mark.parametrize("shape", [(50, 768, 100), (13, 131, 40), (7, 5000, 33), (20000, 64, 96)], ids=str)
@pytest.mark.parametrize("values", ["random", "positive", "halves"])
def test_int8_sums_are_exact(shape: tuple[int, int, int], values: str) -> None:
    check_sums(shape, values, "cuda")


def test_int8_special_rows() -> None:
    for features in (2, 64, 4099, 131072):
        check_extreme_levels(features, "cuda")
    for activation in (None, "quick_gelu", "gelu", "gelu_tanh"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_bad_rows(activation, dtype, "cuda")
    check_bad_rows_in_a_chain("cuda")
    for features in (1500, 3000, 8200, 9000):
        check_long_rows(features, "cuda")
    check_zero_huge_and_tiny_rows("cuda")
    check_float32_bias("cuda")
    for lead in LEADS:
        check_leading_shape(lead, "cuda")


@pytest.mark.parametrize("rows", [0, 1, 50, 411, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_norm_residual_and_a_second_layer(rows: int, dtype: torch.dtype) -> None:
    check_surroundings(rows, dtype, "cuda")


def lora_step(device: str = "cuda") -> Callable[[Tensor], list[Tensor]]:
    case = LoraCase((3, 50, 96), 128, 16)
    _, *weights = (t.detach().to(device).requires_grad_() for t in case.tensors())

    def step(x: Tensor) -> list[Tensor]:
        y = clipft.ops.quick_gelu_lora_linear(x, *weights, 2.0)
        return [y, *torch.autograd.grad(y.square().sum(), (x, *weights))]

    return step


def int8_step(device: str = "cuda") -> Callable[[Tensor], list[Tensor]]:
    torch.manual_seed(1)
    first = clipft.nn.QuantizedLinear.from_linear(torch.nn.Linear(96, 200), "gelu").to(device)
    second = clipft.nn.QuantizedLinear.from_linear(torch.nn.Linear(200, 96)).to(device)
    norm = torch.nn.LayerNorm(96).requires_grad_(False).to(device)
    return lambda x: [first(x.detach(), norm, x.detach(), second)]


every_layer = pytest.mark.parametrize("make", [lora_step, int8_step])


def layer_input(device: str = "cuda", seed: int = 0) -> Tensor:
    x = torch.randn(3, 50, 96, generator=torch.Generator().manual_seed(seed))
    return x.to(device).requires_grad_()


@every_layer
def test_layers_never_make_the_host_wait(make: Callable) -> None:
    step, x = make(), layer_input()
    step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_layer
def test_layers_in_a_cuda_graph(make: Callable) -> None:
    step, x = make(), layer_input()
    with torch.cuda.stream(torch.cuda.Stream()):
        step(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(x)
    with torch.no_grad():
        x.copy_(layer_input(seed=1))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, step(x), strict=True):
        torch.testing.assert_close(a, b)


@every_layer
def test_layers_on_another_stream(make: Callable) -> None:
    step, x = make(), layer_input()
    want = step(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = step((x.detach() * 1.0).requires_grad_())
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_layer
def test_layers_on_the_second_gpu(make: Callable) -> None:
    for a, b in zip(make("cuda:1")(layer_input("cuda:1")), make()(layer_input()), strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_layers_compile_to_one_graph() -> None:
    case = LoraCase((3, 50, 96), 128, 16)
    tensors = [t.detach().cuda() for t in case.tensors()]
    compiled = torch.compile(lambda *args: clipft.lora_linear(*args, 2.0), fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), clipft.lora_linear(*tensors, 2.0))
    layer = clipft.nn.QuantizedLinear.from_linear(torch.nn.Linear(96, 200), "gelu").cuda()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(tensors[0]), layer(tensors[0]))
