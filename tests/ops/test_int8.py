"""clipft.quantized_linear and nn.QuantizedLinear: exact integer arithmetic on every instruction set, float64 behind it;
torch's contracts; state; bad input. Cases and tolerances: int8_cases.py."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
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
    check_sums,
    check_surroundings,
    check_zero_huge_and_tiny_rows,
)
from torch import Tensor, nn

import clipft
import clipft.ops  # registers the fake kernels that opcheck runs
from clipft import _C
from clipft.nn import QuantizedLinear
from clipft.ops.int8 import quantize_and_pack, quantize_weight


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_exact_integers(case: Int8Case, int8_isa: str) -> None:
    check_case(case)


@pytest.mark.parametrize("shape", [(50, 768, 100), (13, 131, 40), (7, 5000, 33)], ids=str)
@pytest.mark.parametrize("values", ["random", "positive", "halves"])
def test_sums_are_exact(shape: tuple[int, int, int], values: str, int8_isa: str) -> None:
    check_sums(shape, values)


def test_extreme_levels_do_not_saturate(int8_isa: str) -> None:
    for features in (2, 64, 4099, 131072):
        check_extreme_levels(features)


@pytest.mark.parametrize("activation", [None, "quick_gelu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_rows_come_out_nan_and_others_unharmed(activation: str | None, dtype: torch.dtype, int8_isa: str) -> None:
    check_bad_rows(activation, dtype)


def test_zero_huge_and_tiny_rows(int8_isa: str) -> None:
    check_zero_huge_and_tiny_rows()


@pytest.mark.parametrize("lead", LEADS)
def test_any_leading_shape(lead: tuple[int, ...], int8_isa: str) -> None:
    check_leading_shape(lead)


def test_rows_do_not_depend_on_their_batch_or_on_threads(int8_isa: str) -> None:
    x, *rest = Int8Case(430, 768, 100, "quick_gelu").arguments()
    whole = clipft.quantized_linear(x, *rest)
    assert torch.equal(whole[17:18], clipft.quantized_linear(x[17:18], *rest))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, clipft.quantized_linear(x, *rest))
        torch.set_num_threads(5)
        assert torch.equal(whole, clipft.quantized_linear(x, *rest))
    finally:
        torch.set_num_threads(threads)


def test_every_instruction_set_gives_the_same_without_activation() -> None:
    case = Int8Case(60, 1031, 90, values="outliers")
    x, weight, *_ = case.arguments()
    before, results = _C.isa(), []
    for name in _C.isas():
        _C.set_isa(name)
        results.append(clipft.quantized_linear(x, weight, torch.ones(90)))
    _C.set_isa(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_bias_may_stay_float32() -> None:
    check_float32_bias()


def test_error_against_float_weights_is_that_of_seven_and_eight_bits() -> None:
    """Uniform rounding: a row's step is its range / 127, a channel's its largest weight / 127; errors are random."""
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(200, 768, generator=generator), torch.randn(300, 768, generator=generator)
    got = clipft.quantized_linear(x, *quantize_weight(weight))
    error = (got - x @ weight.t()).pow(2).mean().sqrt() / (x @ weight.t()).pow(2).mean().sqrt()
    step_x = (x.amax(dim=1) - x.amin(dim=1)).pow(2).mean().sqrt() / 127
    step_w = weight.abs().amax(dim=1).pow(2).mean().sqrt() / 127
    assert error <= 1.1 * ((step_x**2 + step_w**2) / 12).sqrt()


# ---- a layer and what stands around it ----


@pytest.mark.parametrize("rows", [0, 1, 7, 50, 411])  # few: channels are shared out; many: blocks of rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_residual_and_a_second_layer_in_one_pass(rows: int, dtype: torch.dtype, int8_isa: str) -> None:
    check_surroundings(rows, dtype)


def test_rows_with_nan_harm_no_other_row() -> None:
    check_bad_rows_in_a_chain()


def test_what_stands_around_a_layer_is_checked() -> None:
    layer, x = QuantizedLinear(8, 3), torch.ones(4, 8)
    for change, error, message in (
        ({"norm": torch.nn.LayerNorm(7)}, ValueError, r"norm must be over the input's 8 features, got \(7,\)"),
        (
            {"norm": torch.nn.RMSNorm(8)},
            TypeError,
            "norm must be a torch.nn.LayerNorm with weight and bias, got RMSNorm",
        ),
        ({"residual": torch.ones(4, 8)}, ValueError, r"residual must have the result's shape, \[4, 3\], got \[4, 8\]"),
        (
            {"residual": torch.ones(4, 3).half()},
            TypeError,
            "residual must have the dtype of input, float32, got float16",
        ),
        (
            {"then": QuantizedLinear(4, 3)},
            ValueError,
            "then must be a QuantizedLinear of 3 features without an activation",
        ),
        ({"then": torch.nn.Linear(3, 3)}, ValueError, "then must be a QuantizedLinear of 3 features"),
    ):
        with pytest.raises(error, match=f"clipft.nn.QuantizedLinear: {message}"):
            layer(x, **change)


# ---- torch's contracts ----


def test_opcheck() -> None:
    x, weight, scale, bias, _ = Int8Case(6, 37, 21).arguments()
    packed = torch.ops.clipft.quantized_pack(weight)
    assert packed.shape == (64 + 32 * (40 + 4) + 2,)
    torch.library.opcheck(torch.ops.clipft.quantized_pack.default, (weight,))
    torch.library.opcheck(torch.ops.clipft.quantized_linear.default, (x, weight, scale, bias, 1))
    none, more = x.new_empty(0), torch.ops.clipft.quantized_pack(weight[:5, :21].contiguous())
    alone = (x, none, none, 0.0, packed, scale, none, 2, none, none, none, none)
    torch.library.opcheck(torch.ops.clipft.quantized_chain.default, alone)
    whole = (x, x[0], x[1], 1e-5, packed, scale, bias, 1, more, scale[:5], none, x[:, :5].contiguous())
    torch.library.opcheck(torch.ops.clipft.quantized_chain.default, whole)


@pytest.mark.parametrize("shape", [(1, 1), (37, 21), (48, 64), (130, 257)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e37, 1e-38, 1e-44])
def test_a_float_weight_is_quantised_and_packed_in_one_op(shape: tuple[int, int], size: float, int8_isa: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    weight[len(weight) // 2] = 0.0
    codes, scale = quantize_weight(weight)
    pack = torch.ops.clipft.quantized_pack
    for given in (weight, weight.t().contiguous().t(), nn.Parameter(weight)):
        got = quantize_and_pack(given)
        assert torch.equal(got[2], scale) and not got[2].requires_grad
        assert torch.equal(got[0], pack(codes)) and torch.equal(got[1], pack(codes.t().contiguous()))
    assert torch.equal(pack(codes.t()), pack(codes.t().contiguous()))


def test_a_float_weight_that_does_not_do() -> None:
    for weight, error, words in (
        ([1.0], TypeError, "weight must be a tensor, got list"),
        (torch.ones(3, 2, dtype=torch.float64), TypeError, "weight must be float32, got float64"),
        (torch.ones(3), ValueError, r"weight must be \[out, in\], each 1 to 131072, got shape \[3\]"),
        (torch.ones(0, 3), ValueError, r"weight must be \[out, in\], each 1 to 131072, got shape \[0, 3\]"),
        (torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), ValueError, "weight must be finite, got NaN or Inf in it"),
        (torch.tensor([[1.0, 2.0], [-float("inf"), 2.0]]), ValueError, "weight must be finite, got NaN or Inf in it"),
    ):
        with pytest.raises(error, match=f"clipft.quantized_weight: {words}"):
            quantize_and_pack(weight)  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.clipft.quantized_weight.default, (torch.randn(37, 21),))
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        torch.ops.clipft.quantized_weight(torch.ones(3, 2).t())


def make_layer(activation: str | None = "quick_gelu", bias: bool = True) -> tuple[torch.nn.Linear, QuantizedLinear]:
    torch.manual_seed(5)
    linear = torch.nn.Linear(52, 39, bias=bias)
    return linear, QuantizedLinear.from_linear(linear, activation)


def test_compiled_in_one_graph() -> None:
    _, layer = make_layer()
    model = torch.nn.Sequential(layer, torch.nn.LayerNorm(39))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((7, 52), (2, 5, 52), (9, 52)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), model(x))
        layer.load_state_dict(make_layer(bias=True)[1].state_dict() | {"weight_scale": torch.ones(39)})
        torch.testing.assert_close(compiled(x), model(x))


def test_compiled_function() -> None:
    x, weight, scale, bias, _ = Int8Case(6, 37, 21).arguments()
    compiled = torch.compile(lambda y: clipft.quantized_linear(y * 2, weight, scale, bias, "gelu") + 1, fullgraph=True)
    want = clipft.quantized_linear(x * 2, weight, scale, bias, "gelu") + 1
    torch.testing.assert_close(compiled(x), want)


def test_no_gradient_says_so() -> None:
    x, *rest = Int8Case(6, 37, 21).arguments()
    out = clipft.quantized_linear(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="quantized_linear has no gradient: int8 layers are for inference"):
        out.sum().backward()


def test_several_threads_at_once(int8_isa: str) -> None:
    layers = [make_layer()[1] for _ in range(3)]
    inputs = [torch.randn(50 + k, 52) for k in range(6)]
    want = [layers[k % 3](x) for k, x in enumerate(inputs)]
    fresh = [copy.deepcopy(layer) for layer in layers]  # not packed yet: threads race to do it
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            if not torch.equal(fresh[k % 3](inputs[k]), want[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_kernels_plain_torch_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = make_layer()
    second, norm = QuantizedLinear.from_linear(torch.nn.Linear(39, 52)), torch.nn.LayerNorm(52).requires_grad_(False)
    x = torch.randn(2, 7, 52)
    args = (x, first.weight_int8, first.weight_scale, first.bias, "gelu")
    want, want_block = clipft.quantized_linear(*args), first(x, norm, x, second)
    half, narrow, narrow2 = x.bfloat16(), copy.deepcopy(first).bfloat16(), copy.deepcopy(second).bfloat16()
    norms = norm, copy.deepcopy(norm).bfloat16()  # of either dtype that goes with the input
    want_half = [narrow(half, some_norm, half, narrow2) for some_norm in norms]
    monkeypatch.setattr("clipft.ops.kernels._WARNED", set())
    monkeypatch.setattr("clipft.ops.kernels.problem", lambda device, *code: "as the test wants it")
    monkeypatch.delenv("CLIPFT_STRICT", raising=False)
    with pytest.warns(UserWarning, match=r"quantized_linear: the kernels do not run here: as the test wants it. Plain"):
        torch.testing.assert_close(clipft.quantized_linear(*args), want)
    with pytest.warns(UserWarning, match=r"nn.QuantizedLinear: the kernels do not run here"):
        torch.testing.assert_close(first(x, norm, x, second), want_block, rtol=1e-2, atol=1e-2)
    for some_norm, value in zip(norms, want_half, strict=True):
        got = narrow(half, some_norm, half, narrow2)
        assert got.dtype == torch.bfloat16 and (got != value).float().mean() <= 0.02  # rounded in the end only
    monkeypatch.setenv("CLIPFT_STRICT", "1")
    with pytest.raises(NotImplementedError, match="as the test wants it"):
        first(x)


# ---- the module ----


@pytest.mark.parametrize("bias", [True, False])
def test_module_is_close_to_the_linear_it_came_from(bias: bool, int8_isa: str) -> None:
    linear, layer = make_layer(None, bias)
    x = torch.randn(30, 52)
    assert torch.nn.functional.cosine_similarity(layer(x), linear(x)).min() > 0.999
    assert torch.equal(layer(x), clipft.quantized_linear(x, layer.weight_int8, layer.weight_scale, layer.bias))
    assert sorted(layer.state_dict()) == ["bias"] * bias + ["weight_int8", "weight_scale"]
    assert not list(layer.parameters())


def test_module_survives_copies_pickles_and_state_dicts() -> None:
    _, layer = make_layer()
    x = torch.randn(4, 52)
    want = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), want) and torch.equal(other.weight_int8, layer.weight_int8)
    empty = QuantizedLinear(52, 39, activation="quick_gelu")
    assert not torch.equal(empty(x), want)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), want)
    with torch.device("meta"):
        meta = QuantizedLinear(52, 39, activation="quick_gelu")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), want)


def test_module_packs_again_after_a_change() -> None:
    _, layer = make_layer(None)
    x = torch.randn(4, 52)
    layer(x)
    layer.weight_int8.neg_()
    assert torch.equal(layer(x), clipft.quantized_linear(x, layer.weight_int8, layer.weight_scale, layer.bias))
    layer.weight_int8 = torch.zeros_like(layer.weight_int8)
    assert torch.equal(layer(x), layer.bias.expand(4, 39))
    with torch.inference_mode():
        layer.weight_int8 = torch.ones(39, 52, dtype=torch.int8)
        assert not torch.equal(layer(x), layer.bias.expand(4, 39))


def test_module_in_sixteen_bits_keeps_its_scales() -> None:
    _, layer = make_layer(None)
    scale = layer.weight_scale.clone()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.bias.dtype == torch.bfloat16 and half.weight_int8.dtype == torch.int8
    assert half(torch.randn(4, 52, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(half.float().weight_scale, scale)


def test_weights_quantise_to_the_nearest_level() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-40, 0.0, -1e-40]])
    int8, scale = quantize_weight(weight)
    assert int8.dtype == torch.int8 and int8.tolist()[:2] == [[64, -127, 32], [0, 0, 0]] and int8.abs().max() <= 127
    assert scale[1] == 1.0 and ((int8 * scale[:, None] - weight).abs() <= scale[:, None] / 2).all()
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_weight(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match=r"weight must be \[out, in\], not empty, got shape \[3\]"):
        quantize_weight(torch.ones(3))
    with pytest.raises(TypeError, match="weight must be a float tensor, got int64"):
        quantize_weight(torch.ones(3, 3, dtype=torch.int64))


# ---- bad input ----

X, W, S, B = torch.ones(4, 8), torch.ones(6, 8, dtype=torch.int8), torch.ones(6), torch.ones(6)
BAD = {
    "float64": ((X.double(), W, S, B), TypeError, "input must be float32, bfloat16 or float16, got float64"),
    "integer": ((W, W, S, B), TypeError, "input must be float32, bfloat16 or float16, got int8"),
    "scalar": (
        (torch.tensor(1.0), W, S, B),
        ValueError,
        r"input must be \[..., in\] with in > 0 and at most 8 dimensions, got shape \[\]",
    ),
    "no features": ((X[:, :0], W, S, B), ValueError, r"with in > 0 and at most 8 dimensions, got shape \[4, 0\]"),
    "features differ": (
        (X[:, :7], W, S, B),
        ValueError,
        r"input must have the weight's 8 features last, got shape \[4, 7\]",
    ),
    "float weight": ((X, W.float(), S, B), TypeError, "weight_int8 must be int8, got float32"),
    "one-dimensional weight": (
        (X, W[0], S, B),
        ValueError,
        r"weight_int8 must be \[out, in\] with 0 < out <= 16777216 and 0 < in <= 131072, got shape \[8\]",
    ),
    "more channels than bytes can be counted": (
        (X[:, :1], W[:1, :1].expand(2**61, 1), S, B),
        ValueError,
        r"0 < out <= 16777216 and .* got shape \[2305843009213693952, 1\]",
    ),
    "no channels": ((X, W[:0], S, B), ValueError, r"0 < in <= 131072, got shape \[0, 8\]"),
    "half scale": ((X, W, S.half(), B), TypeError, "weight_scale must be float32, got float16"),
    "scale too short": ((X, W, S[:5], B), ValueError, r"weight_scale must be \[out\], \[6\], got shape \[5\]"),
    "scale a matrix": ((X, W, S[:, None], B), ValueError, r"weight_scale must be \[out\], \[6\], got shape \[6, 1\]"),
    "bias of another dtype": (
        (X, W, S, B.half()),
        TypeError,
        "bias must have the dtype of input, float32, or float32, got float16",
    ),
    "bias too long": ((X, W, S, torch.ones(7)), ValueError, r"bias must be \[out\], \[6\], got shape \[7\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_the_bare_op_says_the_same(name: str) -> None:
    args, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        clipft.quantized_linear(*args)
    with pytest.raises(RuntimeError) as bare:
        torch.ops.clipft.quantized_linear(*args, 0)
    assert str(caught.value) in str(bare.value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": [[1.0]]}, TypeError, "input must be a tensor, got list"),
        ({"weight_int8": None}, TypeError, "weight_int8 must be a tensor, got NoneType"),
        ({"weight_scale": 1.0}, TypeError, "weight_scale must be a tensor, got float"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        (
            {"input": X.to("meta")},
            ValueError,
            "weight_int8 must be on the device of the other tensors, meta, got cpu",
        ),
        ({"activation": "relu"}, ValueError, 'activation must be None, .* or "gelu_tanh", got "relu"'),
        ({"activation": 1}, TypeError, 'activation must be None, .* or "gelu_tanh", got int'),
    ],
)
def test_bad_arguments_of_the_function(change: dict, error: type[Exception], message: str) -> None:
    args = {"input": X, "weight_int8": W, "weight_scale": S, "bias": B} | change
    with pytest.raises(error, match=message):
        clipft.quantized_linear(**args)


def chain(x: Tensor, packed: Tensor, **change: Any) -> Tensor:
    none = x.new_empty(0)
    layers = {"packed": packed, "scale": S, "bias": B, "activation": 0, "packed2": none, "scale2": none, "bias2": none}
    args = {"norm_weight": none, "norm_bias": none, "eps": 0.0, **layers, "residual": none} | change
    return torch.ops.clipft.quantized_chain(x, *args.values())


def test_bare_ops_refuse_what_the_function_never_passes() -> None:
    packed = torch.ops.clipft.quantized_pack(W)
    with pytest.raises(RuntimeError, match=r'activation must be None, .* or "gelu_tanh" \(0 to 3\), got 4'):
        torch.ops.clipft.quantized_linear(X, W, S, B, 4)
    for foreign in (packed[:-1], torch.zeros_like(packed), torch.zeros(3, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="packed must be what quantized_pack gave"):
            chain(X, foreign)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].copy_(packed)  # at an odd address
    assert torch.equal(chain(X, shifted), chain(X, packed))
    with pytest.raises(RuntimeError, match="packed must be uint8, got int8"):
        chain(X, W)
    with pytest.raises(RuntimeError, match="input must have the weight's 8 features last"):
        chain(X[:, :7], packed)
    with pytest.raises(RuntimeError, match=r"packed2 must take the first layer's \d+ features, got 8"):
        chain(X, packed, packed2=packed, scale2=S)
    with pytest.raises(RuntimeError, match="norm_weight and norm_bias must come together"):
        chain(X, packed, norm_weight=torch.ones(8))
    with pytest.raises(
        RuntimeError, match=r"residual must be contiguous and of the result's 4 rows of \d+, got shape \[4, 2\]"
    ):
        chain(X, packed, residual=torch.ones(4, 2))
    with pytest.raises(RuntimeError, match=r"clipft.quantized_pack: weight_int8 must be int8, got float32"):
        torch.ops.clipft.quantized_pack(X)


def test_module_names_its_arguments() -> None:
    _, layer = make_layer()
    with pytest.raises(ValueError, match=r"clipft.nn.QuantizedLinear: input must have the weight's 52 features last"):
        layer(torch.ones(3, 51))
    with pytest.raises(ValueError, match=r'activation must be None, .* or "gelu_tanh", got "relu"'):
        QuantizedLinear(3, 4, activation="relu")
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear, got Conv2d"):
        QuantizedLinear.from_linear(torch.nn.Conv2d(3, 3, 3))
    assert "in_features=52, out_features=39, bias=True, activation='quick_gelu'" in repr(layer)
