"""The int8 layer's CUDA kernels and the C that launches them, on an emulated GPU: cases and tolerances of the CPU's.
The emulated integer product refuses the shapes that torch's refuses."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import EmulatedCuda
from int8_cases import (
    CASES,
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
from tiny_clip import tiny_model

import clipft
from clipft.nn import QuantizedLinear
from clipft.ops.int8 import quantize_weight

AFFORDABLE = [case for case in CASES if case.rows * (case.features + case.out) < 100_000]


@pytest.mark.parametrize("case", [*AFFORDABLE, Int8Case(600, 24, 33, "gelu")], ids=str)  # the last in blocks of rows
def test_cuda_int8_against_exact_integers(case: Int8Case, cuda: EmulatedCuda) -> None:
    before = cuda.launches()
    check_case(case)
    assert cuda.launches() > before or case.rows == 0


@pytest.mark.parametrize("shape", [(50, 768, 100), (13, 131, 40), (7, 5000, 33)], ids=str)
@pytest.mark.parametrize("values", ["random", "positive", "halves"])
def test_cuda_int8_sums_are_exact(shape: tuple[int, int, int], values: str, cuda: EmulatedCuda) -> None:
    check_sums(shape, values)


def test_cuda_int8_special_rows(cuda: EmulatedCuda) -> None:
    for features in (2, 64, 4099, 131072):
        check_extreme_levels(features)
    for activation in (None, "quick_gelu", "gelu", "gelu_tanh"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_bad_rows(activation, dtype)
    check_bad_rows_in_a_chain()
    for features in (1500, 3000, 8200, 9000):
        check_long_rows(features)
    check_zero_huge_and_tiny_rows()
    check_float32_bias()


@pytest.mark.parametrize("lead", LEADS)
def test_cuda_int8_any_leading_shape(lead: tuple[int, ...], cuda: EmulatedCuda) -> None:
    check_leading_shape(lead)


@pytest.mark.parametrize("rows", [0, 1, 50, 411])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_int8_norm_residual_and_a_second_layer(rows: int, dtype: torch.dtype, cuda: EmulatedCuda) -> None:
    check_surroundings(rows, dtype)


def test_cuda_int8_is_the_cpus_to_the_bit(emulated_gpu: EmulatedCuda) -> None:
    """Without an activation, and with scales of 1 that leave no rounding but that by the row's."""
    x, weight, *_ = Int8Case(300, 131, 90, values="outliers").arguments()
    want = clipft.quantized_linear(x, weight, torch.ones(90))
    with emulated_gpu.installed():
        assert torch.equal(clipft.quantized_linear(x, weight, torch.ones(90)), want)


def test_cuda_int8_model_gives_the_cpus_embeddings(emulated_gpu: EmulatedCuda) -> None:
    small = clipft.quantize(tiny_model())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = small.get_image_features(pixels).pooler_output
    with emulated_gpu.installed():
        before = emulated_gpu.launches()
        got = small.get_image_features(pixels).pooler_output
        assert emulated_gpu.launches() > before
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)  # a level may be the next one


def test_cuda_int8_weights_of_any_layout(cuda: EmulatedCuda) -> None:
    x, weight, scale, bias, _ = Int8Case(9, 64, 48).arguments()
    want = clipft.quantized_linear(x, weight, scale, bias)
    strided = torch.zeros(96, 128, dtype=torch.int8)[::2, ::2].copy_(weight)
    offset = torch.zeros(48 * 64 + 1, dtype=torch.int8)[1:].view(48, 64).copy_(weight)
    for other in (weight.t().contiguous().t(), strided, offset):
        assert torch.equal(clipft.quantized_linear(x, other, scale, bias), want)


def test_cuda_int8_compiles_and_has_no_gradient(cuda: EmulatedCuda) -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(52, 39), "quick_gelu")
    x = torch.randn(7, 52)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
    weight, scale = quantize_weight(torch.randn(39, 52))
    torch.library.opcheck(torch.ops.clipft.quantized_linear.default, (x, weight, scale, x[0, :0], 1))
    with pytest.raises(RuntimeError, match="int8 layers are for inference"):
        layer(x.requires_grad_()).sum().backward()


def test_cuda_int8_bad_input_is_named(cuda: EmulatedCuda) -> None:
    x, weight, scale, none = torch.ones(4, 8), torch.ones(6, 8, dtype=torch.int8), torch.ones(6), torch.empty(0)
    linear, chain = torch.ops.clipft.quantized_linear, torch.ops.clipft.quantized_chain
    with pytest.raises(RuntimeError, match=r"input must have the weight's 8 features last, got shape \[4, 7\]"):
        linear(x[:, :7], weight, scale, none)
    layers = (weight, scale, none, 0, weight, scale, none)
    with pytest.raises(RuntimeError, match="packed2 must take the first layer's 6 features, got 8"):
        chain(x, none, none, 0.0, *layers, none)
    with pytest.raises(RuntimeError, match=r"residual must be contiguous and of the result's 4 rows of 6"):
        chain(x, none, none, 0.0, *layers[:4], none, none, none, x)


def test_cuda_int8_out_of_memory_is_torchs_own_error(cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Int8Case(50, 64, 64).arguments()
    monkeypatch.setenv("EMULATED_MEMORY", "3000")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        clipft.quantized_linear(*args)
