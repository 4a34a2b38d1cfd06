"""clipft.attention: against float64, on every instruction set; torch's contracts; NaN; bad input.

Tolerance, u = 2^-24: a score errs by (dim + 3) u of the sum of its magnitudes and by the rounding of its distance to
the row's greatest; weights by that, twice, for they are divided by their sum, and 3 u of the exponential; sums over the
keys by (length + 4) u. A 16-bit result adds half an ulp of itself.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from clipft.ops.attention import attention

U = 2.0**-24
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def projected(batch: int, length: int, heads: int, dim: int, spread: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * length + dim)
    return torch.randn(batch, length, 3 * heads * dim, generator=generator) * spread


def truth(qkv: Tensor, heads: int, causal: bool = False, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """The result in float64, and a bound of the error of float32."""
    batch, length, width = qkv.shape
    dim = width // 3 // heads
    query, key, value = qkv.double().view(batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind()
    query = query[:, :, : length if queries is None else queries]
    scores = query @ key.mT * dim**-0.5
    error = ((dim + 3) * U * query.abs() @ key.abs().mT * dim**-0.5).amax(-1, keepdim=True)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    far = scores.amax(-1, keepdim=True) - scores.masked_fill(scores.isinf(), torch.inf).amin(-1, keepdim=True)
    weights = scores.softmax(-1)
    bound = (2 * (error + U * far) + (length + 10) * U) * (weights @ value.abs())
    return tuple(x.transpose(1, 2).flatten(2) for x in (weights @ value, bound))  # type: ignore[return-value]


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


def test_op_and_compile() -> None:
    qkv = projected(2, 9, 2, 8)
    torch.library.opcheck(torch.ops.clipft.attention.default, (qkv, 2, 9, 0.3, True))
    compiled = torch.compile(lambda x: attention(x, 2, causal=True) * 2, fullgraph=True)
    assert torch.equal(compiled(qkv), attention(qkv, 2, causal=True) * 2)
    strided = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attention(strided, 2), attention(qkv, 2))


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


def test_no_gradient() -> None:
    qkv = projected(1, 4, 1, 8).requires_grad_()
    with pytest.raises(RuntimeError, match=r"clipft\.attention has no gradient"):
        attention(qkv, 1).sum().backward()


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
    if isinstance(qkv, Tensor):  # the op checks for itself
        heads, queries, scale = options["heads"], options.get("queries", 1), options.get("scale", 1.0)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.clipft.attention(qkv, heads, queries, scale, False)
