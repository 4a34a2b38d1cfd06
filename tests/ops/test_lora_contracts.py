"""lora_linear and quick_gelu as torch ops: opcheck, torch.compile, autocast, threads, bad input; quick_gelu values."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
from lora_cases import BF16, F16, F32, NAMES, LoraCase, U
from torch import Tensor

import clipft
from clipft import reference
from clipft.ops import dropout_mask, quick_gelu, quick_gelu_lora_linear

# ---- quick_gelu ----


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(1,), (0, 4), (3, 1000), (2, 3, 4, 5), (7, 4096)])
def test_quick_gelu_against_float64(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    g = torch.Generator().manual_seed(1)
    x = (4 * torch.randn(shape, generator=g)).to(dtype).requires_grad_()
    dy = torch.randn(shape, generator=g).to(dtype)
    y = quick_gelu(x)
    y.backward(dy)
    want_x = x.detach().double().requires_grad_()
    want = reference.quick_gelu(want_x)
    want.backward(dy.double())
    half = torch.finfo(dtype).eps / 2
    tiny = {F32: 1e-37, BF16: 1e-37, F16: 2.0**-24}[dtype]
    for got, w, size in ((y, want, want.abs()), (x.grad, want_x.grad, dy.double().abs())):
        z = (1.702 * x.double()).abs()
        tolerance = half * w.abs() * (1 if dtype != F32 else 0) + U * (12 + 3 * z) * size.clamp(max=1e30) + tiny
        assert got.dtype == dtype and ((got.double() - w).abs() <= tolerance).all()


def test_quick_gelu_takes_any_layout_and_no_third_tensor() -> None:
    x = torch.randn(6, 8).t().requires_grad_()
    quick_gelu(x).sum().backward()
    want = x.detach().clone().requires_grad_()
    reference.quick_gelu(want).sum().backward()
    torch.testing.assert_close(x.grad, want.grad)
    for value in (math.nan, math.inf):
        assert not quick_gelu(torch.full((37,), value)).isfinite().any()
    assert torch.equal(quick_gelu(torch.full((37,), -1e4)), torch.zeros(37))


# ---- torch's contracts ----


def lora_samples() -> list[tuple]:
    samples = []
    for case in (
        LoraCase((6, 8), 5, 2, 0.3),
        LoraCase((2, 3, 8), 5, 2, 0.0, True),
        LoraCase((6, 8), 5, 17, 0.3, dtype=BF16, lora_dtype=F32),
    ):
        x, w, b, a, c = case.tensors()
        args = (x, w, b, a, c, torch.tensor(5), 2.0, case.dropout, case.activation)
        samples.append((torch.ops.clipft.lora_linear.default, args))
        frozen = (x, w.detach(), b.detach(), a, c, torch.tensor(5), 2.0, case.dropout, case.activation)
        samples.append((torch.ops.clipft.lora_linear.default, frozen))
        rank = torch.ops.clipft.lora_linear(*args)[1].detach()
        for needs in ((True,) * 5, (True, False, False, True, False)):
            args = (case.upstream(), x.detach(), w.detach(), a.detach(), c.detach(), torch.tensor(5), rank)
            samples.append(
                (torch.ops.clipft.lora_linear_backward.default, (*args, 2.0, case.dropout, case.activation, *needs))
            )
    x = torch.randn(3, 4, requires_grad=True)
    samples.append((torch.ops.clipft.quick_gelu.default, (x,)))
    samples.append((torch.ops.clipft.quick_gelu_backward.default, (torch.randn(3, 4), x.detach())))
    samples.append((torch.ops.clipft.dropout_mask.default, (torch.tensor(1), 5, 7, 0.5)))
    return samples


@pytest.mark.parametrize("op, args", lora_samples(), ids=lambda x: getattr(x, "__name__", ""))
def test_opcheck(op: Callable, args: tuple) -> None:
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    def block(x: Tensor, w: Tensor, b: Tensor, a: Tensor, c: Tensor) -> Tensor:
        h = quick_gelu(clipft.lora_linear(x.sin(), w, b, a, c, 2.0))
        return quick_gelu_lora_linear(h, w, None, a, c, 0.5).cos()

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for n in (6, 9, 14):
        x, *rest = LoraCase((2, n, 16), 16, 4).tensors()
        rest = [rest[0].detach(), rest[1].detach(), *rest[2:]]
        want_x, *want_rest = (t.detach().clone().requires_grad_(t.requires_grad) for t in (x, *rest))
        y, want = compiled(x, *rest), block(want_x, *want_rest)
        y.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(y, want)
        for t, u in zip((x, *rest), (want_x, *want_rest), strict=True):
            if t.requires_grad:
                torch.testing.assert_close(t.grad, u.grad)


def test_compiles_with_dropout() -> None:
    def branch(x: Tensor, w: Tensor) -> Tensor:
        return clipft.lora_linear(x, w, None, torch.eye(256), torch.eye(256), 1.0, dropout=0.25, training=True)

    y = torch.compile(branch, fullgraph=True)(torch.ones(64, 256), torch.zeros(256, 256))
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs((y != 0).float().mean() - 0.75) <= 0.02


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype: torch.dtype) -> None:
    case = LoraCase((2, 20, 64), 48, 8)
    x, w, b, a, c = case.tensors()
    with torch.autocast("cpu", dtype=dtype):
        y = clipft.lora_linear(x, w, b, a, c, 2.0)
        h = clipft.lora_linear(x.to(dtype), w, b, a, c, 2.0)
    assert y.dtype == dtype and torch.equal(y, h)
    want = clipft.lora_linear(x.to(dtype), w.to(dtype), b.to(dtype), a, c, 2.0)
    assert torch.equal(y, want)
    y.backward(case.upstream().to(dtype))
    assert all(t.grad.dtype == F32 for t in (x, w, b, a, c))


def test_several_threads_at_once() -> None:
    args = [LoraCase((60 + k, 32), 24, 4).tensors() for k in range(4)]
    want = [clipft.lora_linear(*a, 2.0) for a in args]
    bad: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            if not torch.allclose(clipft.lora_linear(*args[k], 2.0), want[k], rtol=1e-5, atol=1e-5):
                bad.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(args))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not bad


def test_meta_tensors_have_shapes() -> None:
    x, *weights = (t.detach().to("meta") for t in LoraCase((2, 20, 64), 48, 8).tensors())
    y = clipft.lora_linear(x.requires_grad_(), *weights, 2.0, dropout=0.1, training=True)
    assert (y.shape, y.device.type) == ((2, 20, 48), "meta")
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_without_kernels_plain_torch_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    args = LoraCase((2, 20, 64), 48, 8).tensors()
    want, want_gelu = clipft.lora_linear(*args, 2.0), quick_gelu_lora_linear(*args, 2.0)
    monkeypatch.setattr("clipft.ops.kernels._WARNED", set())
    monkeypatch.setattr("clipft.ops.kernels.problem", lambda device, *code: "as the test wants it")
    monkeypatch.delenv("CLIPFT_STRICT", raising=False)
    with pytest.warns(
        UserWarning, match=r"lora_linear: the kernels do not run here: as the test wants it. Plain torch"
    ):
        torch.testing.assert_close(clipft.lora_linear(*args, 2.0), want)
    torch.testing.assert_close(quick_gelu_lora_linear(*args, 2.0), want_gelu)
    with pytest.warns(UserWarning, match=r"clipft.quick_gelu: the kernels do not run here"):
        torch.testing.assert_close(quick_gelu(args[0]), reference.quick_gelu(args[0]))
    dropped = clipft.lora_linear(*args, 2.0, dropout=0.5, training=True)
    assert dropped.shape == want.shape and not torch.equal(dropped, want)
    want_half = clipft.lora_linear(*(t.to(BF16) for t in args[:3]), *args[3:], 2.0)
    with torch.autocast("cpu", dtype=BF16):  # the branch stays float32
        assert torch.equal(clipft.lora_linear(*args, 2.0), want_half)
    monkeypatch.setenv("CLIPFT_STRICT", "1")
    with pytest.raises(NotImplementedError, match="as the test wants it"):
        clipft.lora_linear(*args, 2.0)


# ---- bad input ----


def good(**change: object) -> dict[str, object]:
    args = dict(zip(NAMES, (t.detach() for t in LoraCase((4, 8), 6, 2).tensors()), strict=True))
    return args | {"scaling": 2.0} | change


BAD = {
    "input integer": (
        {"input": torch.ones(4, 8).long()},
        TypeError,
        "input must be float32, bfloat16 or float16, got int64",
    ),
    "input float64": (
        {"input": torch.ones(4, 8).double()},
        TypeError,
        "input must be float32, bfloat16 or float16, got float64",
    ),
    "input 0-d": (
        {"input": torch.ones(())},
        ValueError,
        r"input must be \[\.\.\., in\] with in > 0 and at most 8 dimensions, got shape \[\]",
    ),
    "no features": ({"input": torch.ones(4, 0)}, ValueError, r"input must be .* got shape \[4, 0\]"),
    "weight dtype": (
        {"weight": torch.ones(6, 8).bfloat16()},
        TypeError,
        "weight must have the dtype of input, float32, got bfloat16",
    ),
    "weight shape": (
        {"weight": torch.ones(6, 9)},
        ValueError,
        r"weight must be \[out, in\] with in = 8, got shape \[6, 9\]",
    ),
    "weight 1-d": ({"weight": torch.ones(8)}, ValueError, r"weight must be \[out, in\] with in = 8, got shape \[8\]"),
    "no outputs": (
        {"weight": torch.ones(0, 8)},
        ValueError,
        r"weight must be \[out, in\] with in = 8, got shape \[0, 8\]",
    ),
    "bias shape": ({"bias": torch.ones(5)}, ValueError, r"bias must be \[out\], \[6\], got shape \[5\]"),
    "bias dtype": (
        {"bias": torch.ones(6).half()},
        TypeError,
        "bias must have the dtype of input, float32, got float16",
    ),
    "lora_a shape": (
        {"lora_a": torch.ones(2, 7)},
        ValueError,
        r"lora_a must be \[r, in\] with in = 8, got shape \[2, 7\]",
    ),
    "lora_a empty": (
        {"lora_a": torch.ones(0, 8)},
        ValueError,
        r"lora_a must be \[r, in\] with in = 8, got shape \[0, 8\]",
    ),
    "lora_a dtype": (
        {"lora_a": torch.ones(2, 8).bfloat16()},
        TypeError,
        "lora_a must have the dtype of input, float32, or float32, got bfloat16",
    ),
    "rank mismatch": (
        {"lora_b": torch.ones(6, 3)},
        ValueError,
        r"lora_b must be \[out, r\], \[6, 2\], got shape \[6, 3\]",
    ),
    "lora_b rows": (
        {"lora_b": torch.ones(5, 2)},
        ValueError,
        r"lora_b must be \[out, r\], \[6, 2\], got shape \[5, 2\]",
    ),
    "lora_b dtype": (
        {"lora_b": torch.ones(6, 2).double()},
        TypeError,
        "lora_b must have the dtype of input, float32, or float32, got float64",
    ),
    "dropout one": ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1"),
    "dropout negative": ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
    "dropout nan": ({"dropout": math.nan}, ValueError, r"dropout must be in \[0, 1\), got nan"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", [False, True])
def test_bad_input_is_named_and_the_bare_op_says_the_same(name: str, training: bool) -> None:
    change, error, message = BAD[name]
    args = good(**change)
    with pytest.raises(error, match=message) as caught:
        clipft.lora_linear(**args, training=training)
    dropout = args.pop("dropout", 0.0)
    scaling = args.pop("scaling")
    with pytest.raises(RuntimeError, match=message) as bare:
        torch.ops.clipft.lora_linear(*args.values(), torch.tensor(0), scaling, dropout)
    assert str(caught.value) in str(bare.value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": [[1.0]]}, TypeError, "input must be a tensor, got list"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"lora_b": 3}, TypeError, "lora_b must be a tensor, got int"),
        (
            {"lora_a": torch.ones(2, 8, device="meta")},
            ValueError,
            "lora_a must be on the device of the other tensors, cpu, got meta",
        ),
        ({"scaling": "2"}, TypeError, "scaling must be a float, got str"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a float, got str"),
    ],
)
def test_bad_arguments_of_the_function(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clipft.lora_linear(**good(**change))


def test_bad_input_of_the_other_ops() -> None:
    with pytest.raises(TypeError, match=r"clipft.quick_gelu: input must be float32, bfloat16 or float16, got int64"):
        quick_gelu(torch.ones(3).long())
    with pytest.raises(ValueError, match=r"clipft.quick_gelu: input must have 1 to 8 dimensions, got shape \[\]"):
        quick_gelu(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"clipft.quick_gelu: input must be contiguous"):
        torch.ops.clipft.quick_gelu(torch.ones(2, 3, 4).permute(0, 2, 1))
    with pytest.raises(ValueError, match=r"clipft.dropout_mask: dropout must be in \[0, 1\), got 1"):
        dropout_mask(1, 2, 3, 1.0)
    with pytest.raises(RuntimeError, match=r"clipft.lora_linear: seed must be an int64 tensor, got float32"):
        torch.ops.clipft.lora_linear(*list(good().values())[:5], torch.tensor(1.0), 2.0, 0.5)
    with pytest.raises(RuntimeError, match=r"rank must be what the forward pass returned, \[4, 16\] contiguous, got"):
        x, w, _, a, b = list(good().values())[:5]
        flags = (2.0, 0.0, False, True, False, False, True, True)
        torch.ops.clipft.lora_linear_backward(torch.ones(4, 6), x, w, a, b, torch.tensor(0), torch.ones(4, 2), *flags)


def test_results_without_elements_and_of_too_many() -> None:
    """Rows without columns are no work, however many; strides of empty tensors mean nothing."""
    assert clipft.ops.quick_gelu(torch.empty(3, 2, 0).transpose(0, 1)).shape == (2, 3, 0)
    assert torch.ops.clipft.quick_gelu(torch.empty(2**62, 0)).shape == (2**62, 0)
    assert torch.ops.clipft.dropout_mask(torch.tensor(3), 2**62, 0, 0.1).shape == (2**62, 0)
    with pytest.raises(RuntimeError, match=r"a float32 result of 2\^63 elements or more was asked for"):
        torch.ops.clipft.dropout_mask(torch.tensor(3), 2**40, 2**40, 0.1)
