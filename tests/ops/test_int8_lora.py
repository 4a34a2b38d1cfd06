"""clipft.ops.int8_lora_linear against its emulation in plain torch, for every instruction set; its gradients, torch's
contracts, nn.Int8Weight's state, and bad input. Cases and tolerances: int8_lora_cases.py."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from int8_lora_cases import BF16, CASES, F16, F32, Int8LoraCase, assert_within, ours
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import clipft.ops
from clipft import reference
from clipft.nn import Int8Weight, QuantizedLinear
from clipft.ops import int8_lora_linear, quick_gelu_int8_lora_linear


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_emulation(case: Int8LoraCase, int8_isa: str) -> None:
    got = ours(case)
    assert got["output"].dtype == case.dtype and got["output"].shape == (*case.shape[:-1], case.out)
    assert_within(case, got)


@pytest.mark.parametrize("shape, out", [((50, 768), 300), ((13, 131), 40), ((7, 33), 5000), ((3, 4, 40), 64)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_without_a_branch_bit_for_bit(shape: tuple[int, ...], out: int, dtype: torch.dtype, int8_isa: str) -> None:
    case = Int8LoraCase(shape, out, dtype=dtype, bias=False)
    weight, dy, got = case.weight(), case.upstream().reshape(-1, out), ours(case)
    want = reference.int8_input_gradient(dy, weight.weight_int8, weight.weight_scale).to(dtype)
    assert torch.equal(got["input"].reshape(want.shape), want)
    x = case.tensors()[0].detach()
    assert torch.equal(got["output"], clipft.ops.quantized_linear(x, weight.weight_int8, weight.weight_scale))


def test_gradient_is_near_that_of_float_weights() -> None:
    """Seven bits of a row of dy, eight of a weight: as for the outputs, errors are random."""
    case = Int8LoraCase((200, 256), 384)
    weight = case.weight()
    got, w = ours(case)["input"], weight.weight_int8 * weight.weight_scale[:, None]
    assert F.cosine_similarity(got, case.upstream() @ w).min() >= 0.999
    assert abs((got * (case.upstream() @ w)).sum() / (case.upstream() @ w).square().sum() - 1.0) <= 1e-3


@pytest.mark.parametrize("rows, mean, spread", [(128, 0.0, 1.0), (32, 0.5, 1.0), (32, 0.0, 30.0)])
def test_rounding_has_no_bias_and_little_variance(rows: int, mean: float, spread: float) -> None:
    """Over draws of weights and batches: outputs and gradients are not shrunk or stretched, by three standard errors
    and by 1e-3; and to the gradient of what comes before the layer rounding adds less than a hundredth of the variance
    that batches have. ``mean``: of the input. ``spread``: of the upstream gradient's rows over each other."""
    g = torch.Generator().manual_seed(11)
    factors, steps = [], []
    fixed = torch.randn(96, 128, generator=g) / 128**0.5
    for _ in range(200):
        before = torch.ones(128, requires_grad=True)
        z = torch.randn(rows, 128, generator=g) + mean
        dy = torch.randn(rows, 96, generator=g) * spread ** torch.linspace(-1, 1, rows)[:, None]
        both = []
        for weight in (fixed, torch.randn(96, 128, generator=g) / 128**0.5):
            passes = []
            for layer, own in ((int8_lora_linear, Int8Weight.from_weight(weight)), (F.linear, weight)):
                x = before * z
                y = layer(x, own, None)
                passes.append((y.detach(), *torch.autograd.grad(y, (x, before), dy)))
            both.append(passes)
        steps.append([step for _, _, step in both[0]])
        factors.append([(got * want).sum() / want.square().sum() - 1 for got, want in zip(*both[1], strict=True)][:2])
    bias = torch.tensor(factors)
    assert (bias.mean(0).abs() <= torch.minimum(3 * bias.std(0) / len(bias) ** 0.5, torch.tensor(1e-3))).all()
    got, want = (torch.stack(own) for own in zip(*steps, strict=True))
    assert (got - want).var(0).sum() <= 0.01 * want.var(0).sum()


def test_rows_with_nan_come_out_nan_and_others_unharmed(int8_isa: str) -> None:
    case = Int8LoraCase((40, 64), 48, 4)
    tensors = case.tensors()
    want = ours(case)
    dy = case.upstream()
    with torch.no_grad():
        tensors[0][3, 5], tensors[0][39, 63] = float("nan"), float("inf")
    dy[7, 9] = float("nan")
    y = int8_lora_linear(tensors[0], case.weight(), *tensors[1:], case.scaling)
    y.backward(dy)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 39]] = True
    assert y[bad].isnan().all() and torch.equal(y[~bad], want["output"][~bad])
    assert tensors[0].grad[7].isnan().all()
    assert torch.equal(tensors[0].grad[[*range(7), *range(8, 40)]], want["input"][[*range(7), *range(8, 40)]])
    assert not tensors[2].grad.isfinite().all()


# ---- what gets a gradient ----


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("needed", range(16))
def test_gradients_only_where_needed(needed: int, activation: bool) -> None:
    case = Int8LoraCase((9, 20), 12, 3, 0.2, activation)
    every = ours(case)
    tensors = [t.detach().requires_grad_(bool(needed >> k & 1)) for k, t in enumerate(case.tensors())]
    function = quick_gelu_int8_lora_linear if activation else int8_lora_linear
    torch.manual_seed(3)
    x, bias, a, b = tensors
    y = function(x, case.weight(), bias, a, b, case.scaling, dropout=case.dropout, training=True)
    assert torch.equal(y.detach(), every["output"]) and y.requires_grad == (needed != 0)
    if needed:
        y.backward(case.upstream())
    for k, (t, name) in enumerate(zip(tensors, ("input", "bias", "lora_a", "lora_b"), strict=True)):
        assert (t.grad is not None) == bool(needed >> k & 1)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, every[name])


def test_without_a_branch_no_input_is_kept() -> None:
    case = Int8LoraCase((9, 20), 12)
    x, bias, _, _ = case.tensors()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        int8_lora_linear(x, case.weight(), bias)
    assert (9, 20) not in kept and kept


def test_dropout_only_in_training() -> None:
    case = Int8LoraCase((9, 20), 12, 3)
    x, *rest = case.tensors()
    plain = int8_lora_linear(x, case.weight(), *rest, 2.0)
    assert torch.equal(int8_lora_linear(x, case.weight(), *rest, 2.0, dropout=0.5), plain)
    assert not torch.equal(int8_lora_linear(x, case.weight(), *rest, 2.0, dropout=0.5, training=True), plain)


def test_used_twice_in_one_graph(int8_isa: str) -> None:
    case = Int8LoraCase((10, 16), 16, 4)
    results = []
    for function, kind in ((int8_lora_linear, torch.float32), (reference.int8_lora_linear, torch.float64)):
        x, *rest = case.tensors()
        weight = case.weight()
        codes = (weight,) if kind == torch.float32 else (weight.weight_int8, weight.weight_scale)
        y = function(function(x, *codes, *rest, 2.0), *codes, *rest, 2.0)
        y.backward(case.upstream().to(kind))
        results.append([y, *(t.grad for t in (x, *rest))])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()  # the second's input may be a level off


@pytest.mark.parametrize("rank", [None, 2])
def test_upstream_gradient_may_be_expanded_and_the_graph_retained(rank: int | None) -> None:
    for shape in ((6, 8), (2, 3, 8)):
        case = Int8LoraCase(shape, 5, rank)
        x, *rest = case.tensors()
        y = int8_lora_linear(x, case.weight(), *rest, 2.0)
        (once,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (thrice,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
        torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("rows", [30, 430])  # few: channels are shared out; many: blocks of rows
def test_results_do_not_depend_on_threads(rows: int, int8_isa: str) -> None:
    case = Int8LoraCase((rows, 96), 150, 8, 0.2, True)
    before = torch.get_num_threads()
    want = ours(case)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = ours(case)
            assert all(torch.equal(value, want[name]) for name, value in got.items())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_gives_the_same(reentrant: bool) -> None:
    case = Int8LoraCase((3, 9, 20), 12, 3, 0.3, True)
    weight, results = case.weight(), []
    for wrap in (lambda function, *args: function(*args), checkpoint):
        x, *rest = case.tensors()

        def layer(x: Tensor, *rest: Tensor) -> Tensor:
            return quick_gelu_int8_lora_linear(x, weight, *rest, 2.0, dropout=0.3, training=True)

        torch.manual_seed(3)
        y = wrap(layer, x, *rest, **({} if wrap is not checkpoint else {"use_reentrant": reentrant}))
        y.backward(case.upstream())
        results.append([y, *(t.grad for t in (x, *rest))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- torch's contracts ----


def operands(case: Int8LoraCase) -> tuple[object, ...]:
    """The op's arguments."""
    weight, (x, bias, a, b) = case.weight(), case.tensors()
    none = x.detach().new_empty(0)
    tensors = (t if t is not None else none for t in (bias, a, b))
    packings = weight._packed, weight._packed_t, weight.weight_scale
    return (x, *packings, *tensors, torch.tensor(5), case.scaling, case.dropout, case.activation)


@pytest.mark.parametrize(
    "case",
    [
        Int8LoraCase((6, 8), 5, 2, 0.3),
        Int8LoraCase((2, 3, 8), 5, 17, activation=True, dtype=BF16, lora_dtype=F32),
        Int8LoraCase((6, 8), 5, bias=False),
        Int8LoraCase((2, 3, 8), 5, activation=True),
    ],
    ids=str,
)
def test_opcheck(case: Int8LoraCase) -> None:
    args = operands(case)
    torch.library.opcheck(torch.ops.clipft.int8_lora_linear.default, args)
    x, _, packed_t, scale, _, a, b, seed, *numbers = (t.detach() if isinstance(t, Tensor) else t for t in args)
    rank = torch.ops.clipft.int8_lora_linear(*args)[1].detach()
    rest = packed_t, scale, a, b, seed, rank, case.shape[-1], *numbers
    for needs in ((True, True, True, True), (True, False, False, False), (False, False, True, True)):
        op = torch.ops.clipft.int8_lora_linear_backward.default
        torch.library.opcheck(op, (case.upstream(), x, *rest, *needs))


def test_second_derivative_is_refused() -> None:
    case = Int8LoraCase((6, 8), 5, 2)
    x, bias, a, b = case.tensors()
    (grad,) = torch.autograd.grad(int8_lora_linear(x, case.weight(), bias, a, b).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_the_bare_op_checks_what_it_gets() -> None:
    x, packed, packed_t, *rest = operands(Int8LoraCase((6, 8), 5, 2))
    op = torch.ops.clipft.int8_lora_linear
    with pytest.raises(RuntimeError, match=r"packed_t must be of the transpose, \[8, 5\], got \[5, 8\]"):
        op(x, packed, packed, *rest)
    with pytest.raises(RuntimeError, match="packed must be what quantized_pack gave"):
        op(x, packed[:-1], packed_t, *rest)
    scale, bias, a, b, *rest = rest
    with pytest.raises(RuntimeError, match="lora_a and lora_b must come together"):
        op(x, packed, packed_t, scale, bias, a[:0, 0], b, *rest)
    with pytest.raises(RuntimeError, match=r"weight_scale must be \[out\], \[5\], got shape \[4\]"):
        op(x, packed, packed_t, scale[:4], bias, a, b, *rest)


@pytest.mark.parametrize("rank", [None, 4])
def test_compiles_to_one_graph(rank: int | None) -> None:
    case = Int8LoraCase((2, 6, 16), 16, rank)
    weight = case.weight()

    def block(x: Tensor, *rest: Tensor | None) -> Tensor:
        h = int8_lora_linear(x.sin(), weight, *rest, 2.0)
        return quick_gelu_int8_lora_linear(h, weight, *rest, 2.0).cos()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9):
        results = []
        for function in (compiled, block):
            x, *rest = Int8LoraCase((2, n, 16), 16, rank).tensors()
            y = function(x, *rest)
            y.sum().backward()
            results.append([y, *(t.grad for t in (x, *rest) if t is not None)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype: torch.dtype) -> None:
    case = Int8LoraCase((2, 20, 64), 48, 8)
    x, bias, a, b = case.tensors()
    weight = case.weight()
    with torch.autocast("cpu", dtype=dtype):
        y = int8_lora_linear(x, weight, bias, a, b, 2.0)
    assert torch.equal(y, int8_lora_linear(x.to(dtype), weight, bias.to(dtype), a, b, 2.0)) and y.dtype == dtype
    y.backward(case.upstream().to(dtype))
    assert all(t.grad.dtype == F32 for t in (x, bias, a, b))


@pytest.mark.parametrize("rank", [None, 4])
def test_without_kernels_plain_torch_and_why(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Int8LoraCase((2, 20, 64), 48, rank)
    want = ours(case)
    monkeypatch.setattr("clipft.ops.kernels._WARNED", set())
    monkeypatch.setattr("clipft.ops.kernels.problem", lambda device, *code: "as the test wants it")
    monkeypatch.delenv("CLIPFT_STRICT", raising=False)
    with pytest.warns(UserWarning, match=r"int8_lora_linear: the kernels do not run here: as the test wants it. Plain"):
        got = ours(case)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4)
    if rank is not None:
        x, *rest = case.tensors()
        dropped = int8_lora_linear(x, case.weight(), *rest, 2.0, dropout=0.5, training=True)
        assert not torch.allclose(dropped, want["output"], rtol=1e-2, atol=1e-2)
    monkeypatch.setenv("CLIPFT_STRICT", "1")
    with pytest.raises(NotImplementedError, match="as the test wants it"):
        ours(case)


def test_gradients_of_torch_func() -> None:
    case = Int8LoraCase((6, 16), 12, 4)
    x, *rest = (t.detach() for t in case.tensors())
    weight = case.weight()

    def loss(x: Tensor) -> Tensor:
        return int8_lora_linear(x, weight, *rest, 2.0).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad, rtol=1e-2, atol=1e-2)


def test_forward_mode_is_refused_for_the_input_and_right_for_the_rest() -> None:
    case = Int8LoraCase((6, 16), 12, 4)
    x, *rest = (t.detach() for t in case.tensors())
    weight = case.weight()
    with pytest.raises(NotImplementedError, match="int8_lora_linear: the input has no derivative in forward mode"):
        torch.func.jvp(lambda x: int8_lora_linear(x, weight, *rest, 2.0), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        int8_lora_linear(forward_ad.make_dual(x, x), weight, *rest, 2.0)
    bias, a, b = rest
    for branch in ((), (a, b, 2.0)):
        _, moved = torch.func.jvp(lambda bias, own=branch: int8_lora_linear(x, weight, bias, *own), (bias,), (bias,))
        torch.testing.assert_close(moved, bias.expand(6, 12))
        with forward_ad.dual_level():
            y = int8_lora_linear(x, weight, forward_ad.make_dual(bias, bias), *branch)
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, bias.expand(6, 12))


@pytest.mark.parametrize("rank", [None, 2])
def test_what_float16_does_not_hold_is_infinite_as_in_float(rank: int | None, int8_isa: str) -> None:
    x = torch.ones(4, 8, dtype=F16, requires_grad=True)
    weight = torch.full((16, 8), 8.0)
    branch = (torch.zeros(2, 8, dtype=F16), torch.zeros(16, 2, dtype=F16)) if rank else ()
    dy = torch.full((4, 16), 1000.0, dtype=F16)
    dy[1] /= 2  # 64,000, the others twice that
    (got,) = torch.autograd.grad(int8_lora_linear(x, Int8Weight.from_weight(weight), None, *branch), x, dy)
    (want,) = torch.autograd.grad(F.linear(x, weight.half()), x, dy)
    assert torch.equal(got, want) and got.isinf().sum() == 3 * 8


# ---- the weight ----


def test_weight_is_saved_once_and_comes_back_whole() -> None:
    case = Int8LoraCase((9, 40), 72, 4)
    weight, want = case.weight(), ours(case)
    state = weight.state_dict()
    assert sorted(state) == ["weight_int8", "weight_scale"] and state["weight_int8"].shape == (72, 40)
    held = sum(buffer.untyped_storage().nbytes() for buffer in Int8Weight(768, 3072).buffers())
    assert held <= 0.52 * 4 * 768 * 3072
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    empty, narrow = Int8Weight(40, 72), copy.deepcopy(weight).to(torch.bfloat16)
    empty.load_state_dict(state)
    with torch.device("meta"):
        meta = Int8Weight(40, 72)
    meta.load_state_dict(state, assign=True)
    changed = Int8Weight(40, 72)
    changed.weight_scale.copy_(state["weight_scale"])
    changed.weight_int8.copy_(state["weight_int8"])
    for other in (copy.deepcopy(weight), torch.load(buffer, weights_only=False), empty, narrow, meta, changed):
        x, *rest = case.tensors()
        y = int8_lora_linear(x, other, *rest, case.scaling)
        y.backward(case.upstream())
        assert torch.equal(y, want["output"]) and torch.equal(x.grad, want["input"])


def test_codes_are_those_of_an_int8_layer() -> None:
    linear = torch.nn.Linear(40, 72)
    weight, layer = Int8Weight.from_weight(linear.weight), QuantizedLinear.from_linear(linear)
    assert torch.equal(weight.weight_int8, layer.weight_int8) and torch.equal(weight.weight_scale, layer.weight_scale)
    assert not list(weight.parameters())


def test_meta_tensors_have_shapes() -> None:
    x, *rest = (t.detach().to("meta") for t in Int8LoraCase((2, 20, 64), 48, 8).tensors())
    y = int8_lora_linear(x.requires_grad_(), Int8Weight(64, 48, device="meta"), *rest, 2.0)
    assert (y.shape, y.device.type) == ((2, 20, 48), "meta")
    y.sum().backward()
    assert x.grad.shape == x.shape


# ---- bad input ----

X, W, A, B = torch.ones(4, 8), Int8Weight(8, 6), torch.ones(2, 8), torch.ones(6, 2)
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "float weight": (
        lambda: int8_lora_linear(X, torch.ones(6, 8), None),
        TypeError,
        "weight must be a clipft.nn.Int8Weight, got Tensor",
    ),
    "half a branch": (
        lambda: int8_lora_linear(X, W, None, A),
        TypeError,
        "lora_a and lora_b must both be tensors or both be None",
    ),
    "input float64": (
        lambda: int8_lora_linear(X.double(), W, None, A, B),
        TypeError,
        "input must be float32, bfloat16 or float16, got float64",
    ),
    "features": (
        lambda: int8_lora_linear(X[:, :7], W, None),
        ValueError,
        r"input must have the weight's 8 features last, got shape \[4, 7\]",
    ),
    "0-d": (lambda: int8_lora_linear(X.sum(), W, None), ValueError, r"input must .*, got shape \[\]"),
    "bias": (
        lambda: int8_lora_linear(X, W, torch.ones(5)),
        ValueError,
        r"bias must be \[out\], \[6\], got shape \[5\]",
    ),
    "bias dtype": (
        lambda: int8_lora_linear(X, W, torch.ones(6).half()),
        TypeError,
        "bias must have the dtype of input, float32, or float32, got float16",
    ),
    "lora_a": (
        lambda: int8_lora_linear(X, W, None, A[:, :7], B),
        ValueError,
        r"lora_a must be \[r, in\] with in = 8, got shape \[2, 7\]",
    ),
    "lora_b": (
        lambda: int8_lora_linear(X, W, None, A, B[:, :1]),
        ValueError,
        r"lora_b must be \[out, r\], \[6, 2\], got shape \[6, 1\]",
    ),
    "lora dtype": (lambda: int8_lora_linear(X, W, None, A, B.double()), TypeError, "lora_b must have .*, got float64"),
    "dropout": (
        lambda: int8_lora_linear(X, W, None, A, B, dropout=1.0),
        ValueError,
        r"dropout must be in \[0, 1\), got 1",
    ),
    "scaling": (lambda: int8_lora_linear(X, W, None, A, B, "2"), TypeError, "scaling must be a float, got str"),
    "wide": (lambda: Int8Weight(1, 131073), ValueError, "out_features must be at most 131072, got 131073"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    function, error, message = BAD[name]
    with pytest.raises(error, match=f"clipft.*: {message}"):
        function()
