"""clipft.ops.attend and attention: against float64, on every instruction set, the gradients too; torch's contracts;
NaN; bad input.

Tolerance, u = 2^-24: a score errs by (dim + 3) u of the sum of its magnitudes and by the rounding of its distance to
the row's greatest; weights by that, twice, for they are divided by their sum, and 3 u of the exponential; sums over the
keys by (length + 4) u. A 16-bit result adds half an ulp of itself. A gradient's sums over n terms err by (n + 2) u of
their magnitudes, and by what the terms carry in: weights, the products with the values, and the mean of these.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from clipft import reference
from clipft.ops.attention import attend, attention

U = 2.0**-24
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def projected(batch: int, length: int, heads: int, dim: int, spread: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * length + dim)
    return torch.randn(batch, length, 3 * heads * dim, generator=generator) * spread


def by_head(x: Tensor, heads: int) -> Tensor:
    """[batch, rows, heads * dim] -> [batch, heads, rows, dim], float64."""
    return x.detach().double().unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def side_by_side(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def weights_of(query: Tensor, key: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """In float64, and a bound of their relative error in float32, [..., queries, 1]."""
    length, dim = key.shape[-2:]
    scores = query @ key.mT * dim**-0.5
    error = ((dim + 3) * U * query.abs() @ key.abs().mT * dim**-0.5).amax(-1, keepdim=True)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    far = scores.amax(-1, keepdim=True) - scores.masked_fill(scores.isinf(), torch.inf).amin(-1, keepdim=True)
    return scores.softmax(-1), 2 * (error + U * far) + (length + 10) * U


def truth(qkv: Tensor, heads: int, causal: bool = False, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """The result in float64, and a bound of the error of float32."""
    query, key, value = (by_head(x, heads) for x in qkv.chunk(3, -1))
    weights, error = weights_of(query[:, :, :queries], key, causal)
    return side_by_side(weights @ value), side_by_side(error * (weights @ value.abs()))


def assert_close(got: Tensor, qkv: Tensor, heads: int, causal: bool = False, queries: int | None = None) -> None:
    want, bound = truth(qkv, heads, causal, queries)
    assert got.shape == want.shape and got.dtype == qkv.dtype
    bound = bound + HALF_ULP[got.dtype] * (want.abs() + bound) + 1e-7 * (got.dtype == torch.float16)
    assert ((got.double() - want).abs() <= bound).all()


SHAPES = [(1, 1, 1, 1), (2, 3, 2, 5), (2, 7, 3, 80), (1, 16, 2, 16), (2, 17, 2, 33), (3, 50, 12, 64), (1, 77, 8, 64)]
SHAPES += [(1, 65, 2, 128), (2, 257, 2, 88), (1, 577, 1, 64)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int, int, int], causal: bool, isa: str) -> None:
    qkv, heads = projected(*shape), shape[2]
    assert_close(attention(qkv, heads, causal=causal), qkv, heads, causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_sixteen_bits(dtype: torch.dtype, causal: bool, isa: str) -> None:
    qkv = projected(2, 51, 3, 24).to(dtype)
    assert_close(attention(qkv, 3, causal=causal), qkv, 3, causal)


@pytest.mark.parametrize("queries", [0, 1, 4, 50])
def test_the_first_tokens_alone(queries: int, isa: str) -> None:
    qkv = projected(2, 50, 4, 64)
    assert_close(attention(qkv, 4, queries=queries), qkv, 4, queries=queries)


def test_scores_far_apart_and_scales(isa: str) -> None:
    qkv = projected(1, 40, 2, 64, spread=20.0)
    assert_close(attention(qkv, 2), qkv, 2)
    assert_close(attention(qkv / 20, 2, scale=64**-0.5), qkv / 20, 2)
    assert torch.isfinite(attention(qkv * 1e15, 2)).all()
    assert attention(projected(0, 5, 2, 8), 2).shape == (0, 5, 16) and attention(projected(2, 0, 2, 8), 2).numel() == 0


@pytest.mark.parametrize("causal", [False, True])
def test_nan_reaches_whoever_attends_to_it_and_none_else(causal: bool, isa: str) -> None:
    clean = projected(2, 23, 3, 20)
    qkv = clean.clone()
    qkv[0, 9, 60 + 20 + 4] = float("nan")  # key of head 1
    qkv[0, 9, 120 + 20 + 4] = float("inf")  # its value
    qkv[1, 5, 40 + 1] = float("nan")  # query of head 2
    got, want = attention(qkv, 3, causal=causal), attention(clean, 3, causal=causal)
    bad = torch.zeros(2, 23, 3, 20, dtype=torch.bool)
    bad[0, 9 if causal else 0 :, 1] = True
    bad[1, 5, 2] = True
    bad = bad.flatten(2)
    assert got[bad].isnan().all() and torch.equal(got[~bad], want[~bad])


def test_the_same_with_any_number_of_threads_and_in_several_at_once() -> None:
    qkv = projected(3, 50, 4, 64)
    want, before = attention(qkv, 4), torch.get_num_threads()
    results: list[Tensor] = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention(qkv, 4))
    finally:
        torch.set_num_threads(before)
    workers = [threading.Thread(target=lambda: results.append(attention(qkv, 4))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 7 and all(torch.equal(one, want) for one in results)


# ---- gradients ----


def gradients(grad: Tensor, projections: list[Tensor], heads: int, causal: bool) -> list[tuple[Tensor, Tensor]]:
    """Of query, key and value in float64, each with a bound of the error of float32."""
    g, q, k, v = (by_head(x, heads) for x in (grad, *projections))
    scale, dim, rows, length = q.shape[-1] ** -0.5, q.shape[-1], q.shape[-2], k.shape[-2]
    p, error = weights_of(q, k, causal)
    dp, dp_error = g @ v.mT, (dim + 1) * U * g.abs() @ v.abs().mT
    mean = (p * dp).sum(-1, keepdim=True)
    mean_error = (p * (error * dp.abs() + dp_error + (length + 4) * U * dp.abs())).sum(-1, keepdim=True)
    ds = scale * p * (dp - mean)
    ds_error = scale * p * ((error + 4 * U) * (dp - mean).abs() + dp_error + mean_error)
    of_keys, of_rows = (length + 2) * U, (rows + 2) * U
    pairs = [
        (ds @ k, (ds_error + of_keys * ds.abs()) @ k.abs()),
        (ds.mT @ q, (ds_error + of_rows * ds.abs()).mT @ q.abs()),
        (p.mT @ g, ((error + of_rows) * p).mT @ g.abs()),
    ]
    return [(side_by_side(want), side_by_side(bound)) for want, bound in pairs]


def assert_gradients(projections: list[Tensor], heads: int, causal: bool = False) -> None:
    leaves = [x.detach().requires_grad_() for x in projections]
    result = attend(*leaves, heads, causal=causal)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).to(result.dtype)
    got = torch.autograd.grad(result, leaves, grad)
    for one, leaf, (want, bound) in zip(got, leaves, gradients(grad, projections, heads, causal), strict=True):
        assert one.shape == leaf.shape and one.dtype == leaf.dtype
        rounded = HALF_ULP[one.dtype] * (want.abs() + bound) + 1e-7 * (one.dtype == torch.float16)
        assert ((one.double() - want).abs() <= bound + rounded + 1e-37).all()


def several(batch: int, queries: int, length: int, width: int, spread: float = 1.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * length + width)
    return [torch.randn(batch, rows, width, generator=generator) * spread for rows in (queries, length, length)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_float64(shape: tuple[int, int, int, int], causal: bool, isa: str) -> None:
    batch, length, heads, dim = shape
    assert_gradients(several(batch, length, length, heads * dim), heads, causal)


@pytest.mark.parametrize("queries, length", [(1, 50), (3, 9), (59, 60), (60, 61), (61, 130), (121, 64), (9, 2)])
def test_gradients_of_other_numbers_of_queries(queries: int, length: int, isa: str) -> None:
    projections = several(2, queries, length, 3 * 24)
    assert_gradients(projections, 3)
    if queries <= length:
        assert_gradients(projections, 3, causal=True)
    got, want = attend(*projections, 3), reference.attend(*projections, 3, 24**-0.5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_sixteen_bits(dtype: torch.dtype, causal: bool, isa: str) -> None:
    assert_gradients([x.to(dtype) for x in several(2, 51, 51, 3 * 24)], 3, causal)


def test_gradients_of_scores_far_apart_and_of_none(isa: str) -> None:
    assert_gradients(several(1, 40, 40, 128, spread=10.0), 2)
    for rows in ((0, 5, 5), (2, 0, 5), (2, 0, 0)):
        leaves = [x.requires_grad_() for x in several(*rows, 16)]
        for got, leaf in zip(torch.autograd.grad(attend(*leaves, 2).sum(), leaves), leaves, strict=True):
            assert got.shape == leaf.shape and not got.any()


def test_gradients_of_one_projection_are_those_of_its_parts(isa: str) -> None:
    qkv = projected(2, 33, 3, 20).requires_grad_()
    (got,) = torch.autograd.grad(attention(qkv, 3, causal=True, queries=7).square().sum(), qkv)
    parts = [part.detach().contiguous().requires_grad_() for part in qkv.chunk(3, -1)]
    first = attend(parts[0][:, :7], *parts[1:], 3, causal=True)
    assert torch.equal(got, torch.cat(torch.autograd.grad(first.square().sum(), parts), -1))


@pytest.mark.parametrize("causal", [False, True])
def test_nan_reaches_the_gradients_of_its_head_alone(causal: bool, isa: str) -> None:
    def of(projections: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in projections]
        return torch.autograd.grad(attend(*leaves, 3, causal=causal).sum(), leaves)

    clean = several(2, 23, 23, 3 * 20)
    bad = [x.clone() for x in clean]
    bad[1][0, 9, 20 + 4] = float("nan")
    for got, want in zip(of(bad), of(clean), strict=True):
        inside = torch.zeros(got.shape, dtype=torch.bool)
        inside[0, :, 20:40] = True
        assert torch.equal(got[~inside], want[~inside])
        assert got[0, 9:, 20:40].isnan().any(-1).all() or got is of(bad)[2]


def test_gradients_are_the_same_with_any_number_of_threads() -> None:
    projections, before = [x.requires_grad_() for x in several(3, 50, 50, 4 * 64)], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(attend(*projections, 4).square().sum(), projections))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, first) for result in results for one, first in zip(result, results[0], strict=True))


# ---- torch's contracts ----


def test_op_and_compile() -> None:
    projections = [x.requires_grad_() for x in several(2, 9, 9, 16)]
    torch.library.opcheck(torch.ops.clipft.attention.default, (*projections, 2, 0.3, True))
    plain = [x.detach() for x in projections]
    torch.library.opcheck(torch.ops.clipft.attention_backward.default, (plain[0], *plain, 2, 0.3, True))

    def step(*xs: Tensor) -> Tensor:
        return (attend(*xs, 2, causal=True) * 2).square().sum()

    compiled = torch.compile(step, fullgraph=True)
    got = torch.autograd.grad(compiled(*projections), projections)
    want = torch.autograd.grad(step(*projections), projections)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_any_strides() -> None:
    query, key, value = several(3, 9, 9, 16)
    want = attend(query, key, value, 2)
    across = query.transpose(0, 1).contiguous().transpose(0, 1)
    columns = key.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([value, value], dim=2)[:, :, :16]
    assert torch.equal(attend(across, columns, wide, 2), want)
    leaf = value.clone().requires_grad_()
    expanded = torch.ones(()).expand(want.shape)  # as sum() gives it
    (got,) = torch.autograd.grad(attend(query, key, leaf, 2), leaf, expanded)
    (same,) = torch.autograd.grad(attend(query, key, leaf, 2), leaf, expanded.contiguous())
    assert torch.equal(got, same)
    whole = projected(2, 9, 2, 8)
    strided = whole.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attention(strided, 2, queries=4), attention(whole, 2, queries=4))


@pytest.mark.parametrize("causal", [False, True])
def test_a_device_without_the_kernel_takes_plain_torch(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = projected(2, 9, 2, 8).bfloat16()
    want = attention(qkv, 2, causal=causal, queries=4)
    monkeypatch.setattr("clipft.ops.kernels.problem", lambda device, *code: "there are none for such tensors")
    monkeypatch.setattr("clipft.ops.kernels._WARNED", set())
    with pytest.warns(
        UserWarning, match=r"clipft\.attention: the kernels do not run here: there are none .* Plain torch"
    ):
        got = attention(qkv, 2, causal=causal, queries=4)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    monkeypatch.setenv("CLIPFT_STRICT", "1")
    with pytest.raises(NotImplementedError, match=r"clipft\.attention: the kernels do not run here"):
        attention(qkv, 2)


@pytest.mark.parametrize(
    "qkv, options, kind, message",
    [
        ([1.0], {"heads": 1}, TypeError, "qkv must be a tensor, got list"),
        (torch.zeros(1, 2, 6).double(), {"heads": 1}, TypeError, "float32, bfloat16 or float16, got float64"),
        (torch.zeros(1, 2, 6), {"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        (torch.zeros(1, 2, 6), {"heads": 4}, ValueError, r"with 4 heads, got shape \[1, 2, 6\]"),
        (torch.zeros(2, 6), {"heads": 1}, ValueError, r"got shape \[2, 6\]"),
        (torch.zeros(1, 2, 0), {"heads": 1}, ValueError, r"got shape \[1, 2, 0\]"),
        (torch.zeros(1, 2, 6), {"heads": 1, "queries": 3}, ValueError, "queries must be 0 to the length, 2, got 3"),
        (torch.zeros(1, 2, 6), {"heads": 1, "scale": 0.0}, ValueError, "scale must be finite and > 0, got 0"),
        (torch.zeros(1, 2, 6), {"heads": 1, "scale": float("nan")}, ValueError, "scale must be finite and > 0"),
    ],
)
def test_bad_input(
    qkv: Any, options: dict[str, Any], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kind, match=message):
        attention(qkv, **options)
    with monkeypatch.context() as without_kernels, pytest.raises(kind, match=message):
        without_kernels.setattr("clipft.ops.kernels.problem", lambda device, *code: "there are none for such tensors")
        without_kernels.setattr("clipft.ops.kernels._WARNED", {("attention", "cpu")})
        attention(qkv, **options)


ONE = torch.zeros(1, 2, 6)


@pytest.mark.parametrize(
    "projections, options, kind, message",
    [
        ((ONE, [1.0], ONE), {}, TypeError, "key must be a tensor, got list"),
        ((ONE, ONE, ONE.double()), {}, TypeError, "value must be float32, bfloat16 or float16, got float64"),
        ((ONE, ONE.half(), ONE), {}, TypeError, "key must have the dtype of query, float32, got float16"),
        ((ONE, ONE, ONE), {"heads": -1}, ValueError, "heads must be at least 1, got -1"),
        ((ONE, ONE, ONE), {"heads": 4}, ValueError, r"query must be \[.*\] with 4 heads, got shape \[1, 2, 6\]"),
        ((ONE, ONE[0], ONE), {}, ValueError, r"key must be \[batch, length, heads \* dim\] with 2 heads, got shape"),
        ((ONE, ONE, ONE[:, :1]), {}, ValueError, r"value must have the shape of key, \[1, 2, 6\], got shape \[1, 1, 6"),
        ((ONE, ONE[..., :4], ONE[..., :4]), {}, ValueError, r"key must be \[1, length, 6\] as query is, got shape"),
        ((ONE, ONE[:, :0], ONE[:, :0]), {}, ValueError, "key must have tokens, got 0 of them for 2 queries"),
        ((ONE, ONE[:, :1], ONE[:, :1]), {"causal": True}, ValueError, "key must have a token for each query, got 1"),
        ((ONE, ONE, ONE), {"scale": float("inf")}, ValueError, "scale must be finite and > 0, got inf"),
    ],
)
def test_bad_projections(
    projections: Any, options: dict[str, Any], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"heads": 2, "scale": 1.0, "causal": False} | options
    heads, scale, causal = options.values()
    with pytest.raises(kind, match=message):
        attend(*projections, heads, scale=scale, causal=causal)
    if all(isinstance(one, Tensor) for one in projections):  # the op checks for itself
        with pytest.raises(RuntimeError, match=message):
            torch.ops.clipft.attention(*projections, heads, scale, causal)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.clipft.attention_backward(projections[0], *projections, heads, scale, causal)
    monkeypatch.setattr("clipft.ops.kernels.problem", lambda device, *code: "there are none for such tensors")
    monkeypatch.setattr("clipft.ops.kernels._WARNED", {("attention", "cpu")})
    with pytest.raises(kind, match=message):
        attend(*projections, heads, scale=scale, causal=causal)


def test_a_bad_gradient() -> None:
    with pytest.raises(RuntimeError, match=r"grad must have the shape of query, \[1, 2, 6\], got shape \[1, 1, 6\]"):
        torch.ops.clipft.attention_backward(ONE[:, :1], ONE, ONE, ONE, 2, 1.0, False)
