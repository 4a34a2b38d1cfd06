"""clipft.lora_linear against float64, for every instruction set: values, gradients, dropout's statistics, checkpoints,
special values, and what 16-bit floats keep."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lora_cases import (
    BF16,
    CASES,
    F32,
    LoraCase,
    U,
    assert_within,
    check_gradients_only_where_needed,
    exact,
    ours,
    run,
    the_mask,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import clipft
from clipft import reference
from clipft.ops import dropout_mask


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: LoraCase, isa: str) -> None:
    got, want = ours(case), exact(case)
    assert got[0].dtype == case.dtype and got[0].shape == (*case.shape[:-1], case.out)
    assert_within(case, got, want)


@pytest.mark.parametrize("case", [LoraCase((8, 40, 96), 128, 16, p, act) for p in (0.0, 0.1) for act in (False, True)])
def test_agrees_with_peft_arithmetic_in_float32(case: LoraCase, isa: str) -> None:
    """The root mean square error is no larger than that of the same formula in plain float32 torch."""

    def eager(x: Tensor, *rest: Tensor) -> Tensor:
        x = reference.quick_gelu(x) if case.activation else x
        return reference.lora_linear(x, *rest, dropout=case.dropout, mask=the_mask(case))

    for o, e, x in zip(ours(case), run(eager, case, case.tensors()), exact(case), strict=True):
        floor = U * x.pow(2).mean().sqrt()
        assert (o.double() - x).pow(2).mean().sqrt() <= 1.5 * (e.double() - x).pow(2).mean().sqrt() + floor


# ---- what gets a gradient ----


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("needed", range(32))
def test_gradients_only_where_needed(needed: int, activation: bool, dtype: torch.dtype) -> None:
    check_gradients_only_where_needed(needed, activation, dtype)


def test_no_gradient_no_graph() -> None:
    case = LoraCase((9, 20), 12, 3)
    with torch.no_grad():
        y = clipft.lora_linear(*case.tensors(), 2.0)
    assert not y.requires_grad


def test_dropout_only_in_training() -> None:
    x, w, b, a, c = LoraCase((9, 20), 12, 3).tensors()
    plain = clipft.lora_linear(x, w, b, a, c, 2.0)
    assert torch.equal(clipft.lora_linear(x, w, b, a, c, 2.0, dropout=0.5), plain)
    assert not torch.equal(clipft.lora_linear(x, w, b, a, c, 2.0, dropout=0.5, training=True), plain)


def test_a_branch_of_zeros_is_the_base_layer(isa: str) -> None:
    """As peft starts: lora_b is zero, and the output is that of the base layer."""
    x, w, b, a, c = LoraCase((50, 96), 128, 16).tensors()
    with torch.no_grad():
        got = clipft.lora_linear(x, w, b, a, torch.zeros_like(c), 2.0, dropout=0.1, training=True)
        torch.testing.assert_close(got, F.linear(x, w, b), rtol=1e-6, atol=1e-6)


def test_used_twice_in_one_graph(isa: str) -> None:
    case = LoraCase((10, 16), 16, 4)
    x, w, b, a, c = case.tensors()
    y = clipft.lora_linear(clipft.lora_linear(x, w, b, a, c, 2.0), w, b, a, c, 2.0)
    y.backward(case.upstream())
    d = [t.detach().double().requires_grad_() for t in (x, w, b, a, c)]
    reference.lora_linear(reference.lora_linear(*d, 2.0), *d[1:], 2.0).backward(case.upstream().double())
    for t, want in zip((x, w, b, a, c), d, strict=True):
        torch.testing.assert_close(t.grad.double(), want.grad, rtol=1e-5, atol=1e-4)


def test_upstream_gradient_may_be_expanded_and_the_graph_retained() -> None:
    for shape in ((6, 8), (2, 3, 8)):
        x, w, b, a, c = LoraCase(shape, 5, 2).tensors()
        y = clipft.lora_linear(x, w, b, a, c, 2.0)
        (once,) = torch.autograd.grad(y.sum(), a, retain_graph=True)
        (thrice,) = torch.autograd.grad(y, a, torch.full_like(y, 3.0))
        torch.testing.assert_close(thrice, 3 * once)


def test_second_derivative_is_refused() -> None:
    x, w, b, a, c = LoraCase((6, 8), 5, 2).tensors()
    (grad,) = torch.autograd.grad(clipft.lora_linear(x, w, b, a, c, 2.0).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


# ---- dropout ----


def test_mask_is_the_same_on_every_instruction_set(isa: str) -> None:
    for rows, cols in ((1, 1), (3, 1000), (700, 33), (0, 4)):
        for seed in (0, -1, 2**62 + 12345):
            for p in (0.0, 0.1, 0.999):
                want = reference.dropout_mask(seed, rows, cols, p)
                assert torch.equal(dropout_mask(seed, rows, cols, p), want.float())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    """Of the whole, of each row and of each column: binomial, within 5 standard deviations of what n draws leave."""
    rows, cols = 2000, 1536
    mask = dropout_mask(987654321, rows, cols, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) <= 5 * deviation / (rows * cols) ** 0.5
    for dim, n in ((0, rows), (1, cols)):
        z = (mask.mean(dim) - (1 - p)) / (deviation / n**0.5)
        assert z.abs().max() <= 5.5
        assert abs(z.std() - 1.0) <= 5 / (2 * z.numel()) ** 0.5  # neither too regular nor too clustered


def test_elements_are_independent() -> None:
    """Correlations between neighbours at every small distance in a row and a column, between seeds, and between layers
    of the same seed's rows, are those of chance.
    """
    p, rows, cols = 0.3, 512, 1024
    mask = (dropout_mask(5, rows, cols, p).double() - (1 - p)) / (p * (1 - p)) ** 0.5
    bound = 5.0 / (rows * cols) ** 0.5
    for d in (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 64, 128, 256):
        assert abs((mask[:, d:] * mask[:, :-d]).mean()) <= 1.5 * bound, f"columns {d} apart"
        assert abs((mask[d:] * mask[:-d]).mean()) <= 1.5 * bound, f"rows {d} apart"
        assert abs((mask[d:, d:] * mask[:-d, :-d]).mean()) <= 2 * bound, f"diagonal {d}"
    for seed in (4, 6, 5 + 2**32, -5, 1 << 63 - 1):
        other = (dropout_mask(seed, rows, cols, p).double() - (1 - p)) / (p * (1 - p)) ** 0.5
        assert abs((mask * other).mean()) <= bound, f"seed {seed}"
        assert abs((mask[1:] * other[:-1]).mean()) <= bound, f"seed {seed}, next row"
    correlation = mask @ mask.t() / cols  # of every two rows
    off = correlation[~torch.eye(rows, dtype=torch.bool)]
    assert off.abs().max() <= 6.5 / cols**0.5 and abs(off.std() * cols**0.5 - 1.0) <= 0.02


def test_runs_of_kept_elements_are_geometric() -> None:
    """Chi-squared over the lengths of runs, 20 degrees of freedom: 52.4 has a probability of 1e-4."""
    p = 0.5
    bits = dropout_mask(11, 300, 4096, p).flatten().long()
    lengths = torch.diff(torch.nonzero(torch.diff(bits)).flatten())
    counts = torch.bincount(lengths.clamp(max=20), minlength=21)[1:].double()
    probability = torch.tensor([0.5**k for k in range(1, 20)] + [0.5**19], dtype=torch.float64)
    expected = probability * counts.sum()
    big = expected >= 5
    assert ((counts - expected)[big] ** 2 / expected[big]).sum() <= 52.4


def test_same_seed_repeats_and_the_next_draw_differs() -> None:
    x, w, b, a, c = LoraCase((50, 64), 32, 4).tensors()

    def draw() -> Tensor:
        return clipft.lora_linear(x, w, b, a, c, 2.0, dropout=0.3, training=True)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and torch.equal(draw(), second) and not torch.equal(first, second)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mask_and_branch_do_not_depend_on_threads(threads: int) -> None:
    case = LoraCase((700, 96), 80, 8, 0.2)
    x, w, b, a, c = (t.detach() for t in case.tensors())
    seed = torch.tensor(99)
    args = (x, torch.zeros_like(w), b, a, c, seed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        want = torch.ops.clipft.lora_linear(*args, 2.0, 0.2)
        want_mask = dropout_mask(99, 700, 96, 0.2)
        torch.set_num_threads(threads)
        got = torch.ops.clipft.lora_linear(*args, 2.0, 0.2)
        assert torch.equal(dropout_mask(99, 700, 96, 0.2), want_mask)
        for g, t in zip(got, want, strict=True):
            assert torch.equal(g, t)
        back = (case.upstream(), x, args[1], a, c, seed, got[1], 2.0, 0.2, False, False, False, False, True, True)
        grads = torch.ops.clipft.lora_linear_backward(*back)
        torch.set_num_threads(before)
        for g, t in zip(grads, torch.ops.clipft.lora_linear_backward(*back), strict=True):
            assert torch.equal(g, t)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(reentrant: bool) -> None:
    case = LoraCase((20, 30), 25, 4, 0.4)
    tensors = case.tensors()

    def layer(*args: Tensor) -> Tensor:
        return clipft.lora_linear(*args, case.scaling, dropout=case.dropout, training=True)

    want = ours(case)
    torch.manual_seed(3)
    y = checkpoint(layer, *tensors, use_reentrant=reentrant)
    y.backward(case.upstream())
    for g, w in zip([y.detach(), *(t.grad for t in tensors)], want, strict=True):
        assert torch.equal(g, w)


# ---- special values ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_nan_and_inf_come_through(which: int, value: float, p: float, isa: str) -> None:
    case = LoraCase((30, 40), 20, 3, p)
    tensors = [t.detach().clone() for t in case.tensors()]
    tensors[which].view(-1)[7] = value
    tensors = [t.requires_grad_() for t in tensors]
    y = clipft.lora_linear(*tensors, 2.0, dropout=p, training=True)
    assert not y.isfinite().all()
    y.backward(torch.ones_like(y))
    if which in (1, 3, 4):
        assert not tensors[0].grad.isfinite().all()


def test_nan_upstream_reaches_every_gradient(isa: str) -> None:
    case = LoraCase((30, 40), 20, 3)
    tensors = case.tensors()
    g = case.upstream()
    g[3, 4] = math.nan
    clipft.lora_linear(*tensors, 2.0).backward(g)
    assert all(t.grad.isnan().any() for t in tensors)


# ---- 16-bit floats ----


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    """Trains lora_b towards a small known change of the layer. Computed apart, the branch arrives; merged into the
    weight, W + s B A rounds to W, the output never moves, and so neither does the loss.
    """
    torch.manual_seed(0)
    n_in, n_out, r, steps = 64, 48, 4, 400
    weight = (torch.randn(n_out, n_in) + 3.0).bfloat16()
    a = torch.randn(r, n_in) / n_in**0.5
    target_b = 2e-3 * torch.randn(n_out, r)
    x = torch.randn(256, n_in).bfloat16()
    want = x.float() @ weight.float().t() + x.float() @ a.t() @ target_b.t()

    def train(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        b = torch.zeros(n_out, r, requires_grad=True)
        for _ in range(steps):
            (grad,) = torch.autograd.grad((forward(b).float() - want).pow(2).mean(), b)
            with torch.no_grad():
                b -= 2.0 * grad  # steps of about 1e-5, far below half an ulp of the weight, 2^-8
        return b.detach(), float((b.detach() - target_b).norm() / target_b.norm())

    def separate(b: Tensor) -> Tensor:
        return clipft.lora_linear(x, torch.zeros_like(weight), None, a, b, 1.0) + (x.float() @ weight.float().t())

    def merged(b: Tensor) -> Tensor:
        update = (b @ a).bfloat16()
        return (x @ (weight + update).t()).float()

    _, error_separate = train(separate)
    learnt, _ = train(merged)
    assert error_separate <= 0.1
    moved = (weight + (learnt @ a).bfloat16() != weight).float().mean()
    kept = (weight + (target_b @ a).bfloat16() != weight).float().mean()
    assert kept <= 0.2, "the change must be below the weight's resolution for this test to say anything"
    assert moved <= 0.2
    lost = (x @ (weight + (target_b @ a).bfloat16()).t()).float() - x.float() @ weight.float().t()
    true = want - x.float() @ weight.float().t()
    assert F.cosine_similarity(lost.flatten(), true.flatten(), dim=0) <= 0.9


def test_mixed_dtypes_round_as_peft_does() -> None:
    """A bfloat16 layer with float32 adapters: base rounded, branch added in float32, one rounding."""
    case = LoraCase((40, 64), 48, 8, dtype=BF16, lora_dtype=F32)
    x, w, b, a, c = (t.detach() for t in case.tensors())
    want = (F.linear(x, w, b) + F.linear(F.linear(x.float(), a), c) * 2.0).to(BF16)
    got = clipft.lora_linear(x, w, b, a, c, 2.0)
    differ = got != want
    assert differ.float().mean() <= 0.01  # a sum at the edge of rounding
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-9)
