"""The cases and checks of quantized_linear and nn.QuantizedLinear, for whichever device runs them.

Tolerances: u = 2^-24. Behind the exact sum stand four roundings, and an activation of slope at most 1.13 that is
computed with a relative error of a few u (quick_gelu) or an absolute one of 1e-7 |v| (gelu). gelu_tanh is
v / (1 + e^-t) with t moved by 5 u of itself, which moves the whole by 5 u |v| t e^-t / (1 + e^-t)^2 < 1.5 u |v|. A
16-bit result adds half an ulp of itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import clipft
from clipft import reference
from clipft.nn import QuantizedLinear

U = 2.0**-24


@dataclass(frozen=True)
class Int8Case:
    rows: int
    features: int
    out: int
    activation: str | None = None
    bias: bool = True
    dtype: torch.dtype = torch.float32
    values: str = "random"  # random | positive | outliers | halves
    layout: str = "contiguous"  # contiguous | transposed | strided | offset

    def __str__(self) -> str:
        parts = [f"{self.rows}x{self.features}x{self.out}", str(self.activation), self.values, self.layout]
        return "-".join([*parts, str(self.dtype)[6:], "bias" if self.bias else "plain"])

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str | None]:
        generator = torch.Generator().manual_seed(1000 * self.rows + self.features)
        x = torch.randn(self.rows, self.features, generator=generator)
        if self.values == "positive":
            x = x.abs() + 3.0
        if self.values == "outliers" and self.features > 5:
            x[:, 5] *= 100.0
        if self.values == "halves":  # scale 1: every element lies between two levels
            x = torch.randint(-60, 60, x.shape, generator=generator) + 0.5
            x[:, 0], x[:, -1] = -63.0, 64.0
        weight = torch.randint(-128, 128, (self.out, self.features), dtype=torch.int8, generator=generator)
        scale = torch.rand(self.out, generator=generator) * 0.01
        bias = torch.randn(self.out, generator=generator).to(self.dtype) if self.bias else None
        return self._lay_out(x.to(self.dtype)), weight, scale, bias, self.activation

    def _lay_out(self, x: Tensor) -> Tensor:
        if self.layout == "transposed":
            return x.t().contiguous().t()
        nan = float("nan")
        if self.layout == "strided":
            return torch.full((2 * self.rows, 2 * self.features), nan, dtype=x.dtype)[::2, ::2].copy_(x)
        if self.layout == "offset":
            wide = torch.full((self.rows * (self.features + 3) + 1,), nan, dtype=x.dtype)[1:]
            return wide.view(self.rows, self.features + 3)[:, : self.features].copy_(x)
        return x


SHAPES = [(1, 1, 1), (2, 3, 5), (5, 4, 16), (7, 63, 17), (13, 64, 64), (12, 65, 130), (50, 768, 768), (26, 1030, 100)]
CASES = [Int8Case(*shape, activation=a) for shape in SHAPES for a in (None, "quick_gelu", "gelu", "gelu_tanh")]
CASES += [Int8Case(9, 100, 40, values=v) for v in ("positive", "outliers", "halves")]
CASES += [Int8Case(9, n, 40, "gelu", dtype=t) for n in (1029, 1032) for t in (torch.bfloat16, torch.float16)]
CASES += [
    Int8Case(11, 70, 50, layout=x, dtype=t)
    for x in ("transposed", "strided", "offset")
    for t in (torch.float32, torch.bfloat16)
]
CASES += [Int8Case(9, 1029, 40, "gelu_tanh", dtype=t) for t in (torch.bfloat16, torch.float16)]
CASES += [Int8Case(3, 3072, 48, bias=False), Int8Case(1700, 5000, 20), Int8Case(0, 8, 8, "quick_gelu")]


def tolerance(case: Int8Case, want: Tensor, size: Tensor) -> Tensor:
    """`size`: of the terms before the activation."""
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[case.dtype]
    error = 5 * U * size
    if case.activation == "quick_gelu":
        error += U * (8 + 4 * size) * want.abs()
    if case.activation == "gelu":
        error += (1e-7 + 8 * U) * size
    if case.activation == "gelu_tanh":
        error += U * (8 * want.abs() + 1.5 * size)
    return error + rounding * (want.abs() + error) + 1e-30 + (2.0**-25 if case.dtype == torch.float16 else 0.0)


LEADS = [(), (1,), (0,), (3, 7), (2, 0, 5), (2, 3, 1, 4), (1, 1, 1, 1, 1, 2, 2)]


def linear(*args: Tensor | str | None, device: str = "cpu") -> Tensor:
    """``clipft.quantized_linear`` on that device, the result on the CPU."""
    return clipft.quantized_linear(*(a.to(device) if isinstance(a, Tensor) else a for a in args)).cpu()


def check_case(case: Int8Case, device: str = "cpu") -> None:
    x, weight, scale, bias, activation = case.arguments()
    got = linear(x, weight, scale, bias, activation, device=device)
    want = reference.quantized_linear(x, weight, scale, bias, activation)
    size = reference.quantized_linear(x, weight, scale).abs() + (0.0 if bias is None else bias.double().abs())
    assert got.dtype == case.dtype and got.shape == (case.rows, case.out)
    assert ((got.double() - want).abs() <= tolerance(case, want, size)).all()


def check_sums(shape: tuple[int, int, int], values: str, device: str = "cpu") -> None:
    """Scale 1 and no bias: what is left is the integer sum, rounded once by the row's scale."""
    x, weight, *_ = Int8Case(*shape, values=values).arguments()
    levels, row_scale, zero = reference.quantize_rows(x)
    sums = (levels - zero[:, None]) @ weight.long().t()
    assert torch.equal(linear(x, weight, torch.ones(shape[2]), device=device), sums.float() * row_scale[:, None])


def check_extreme_levels(features: int, device: str = "cpu") -> None:
    """Full activations against -128 and 127: pairs in 16 bits are as large as they get, and so are the sums."""
    weight = torch.full((17, features), -128, dtype=torch.int8)
    weight[1] = 127
    weight[2, ::2] = 127
    for sign in (1, -1):
        x = sign * torch.full((3, features), 127.0)
        want = (weight.long().sum(dim=1) * 127 * sign).float().expand(3, 17)
        assert torch.equal(linear(x, weight, torch.ones(17), device=device), want)


def check_bad_rows(activation: str | None, dtype: torch.dtype, device: str = "cpu") -> None:
    """They come out NaN and the others unharmed."""
    case = Int8Case(40, 77, 70, activation, dtype=dtype)
    x, *rest = case.arguments()
    for row, col, value in ((3, 0, "nan"), (11, 76, "inf"), (12, 40, "-inf"), (39, 17, "nan")):
        x[row, col] = float(value)
    bad = torch.tensor([3, 11, 12, 39])
    good = torch.ones(40, dtype=torch.bool).index_fill(0, bad, False)
    got = linear(x, *rest, device=device)
    assert got[bad].isnan().all() and got[good].isfinite().all()
    assert torch.equal(got[good], linear(case.arguments()[0], *rest, device=device)[good])


def check_zero_huge_and_tiny_rows(device: str = "cpu") -> None:
    _, weight, scale, bias, _ = Int8Case(5, 64, 30).arguments()
    base = torch.randn(64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    weight[4] = 0
    x = torch.stack([torch.zeros(64), base * 3e38, base * 1e-40, base * 1e-20, torch.full((64,), 5.0)])
    got = linear(x, weight, scale, bias, device=device)
    assert torch.equal(got[0], bias) and torch.equal(got[:, 4], bias[4].expand(5))
    want = reference.quantized_linear(x, weight, scale, bias)
    fits = want.abs() < 3.4e38
    assert ((got.double() - want).abs() <= 1e-6 * want.abs() + 1e-5)[fits].all()
    assert torch.equal(got[~fits].sign().double(), want[~fits].sign()) and fits[2:].all()


def check_leading_shape(lead: tuple[int, ...], device: str = "cpu") -> None:
    x = torch.randn(*lead, 36, generator=torch.Generator().manual_seed(1))
    rest = (*Int8Case(1, 36, 20).arguments()[1:4], "gelu")
    got = linear(x, *rest, device=device)
    assert got.shape == (*lead, 20)
    assert torch.equal(got.reshape(-1, 20), linear(x.reshape(-1, 36), *rest, device=device))
    if len(lead) > 1:
        assert torch.equal(linear(x.transpose(0, 1), *rest, device=device), got.transpose(0, 1))


def check_float32_bias(device: str = "cpu") -> None:
    """Beside a 16-bit input."""
    x, weight, scale, bias, _ = Int8Case(9, 40, 30, dtype=torch.bfloat16).arguments()
    exact = reference.quantized_linear(x, weight, scale, bias.float() + 1e-3)
    got = linear(x, weight, scale, bias.float() + 1e-3, device=device)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, exact.to(torch.bfloat16), rtol=2.0**-7, atol=1e-6)


def check_surroundings(rows: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Norm, residual and a second layer in one pass, against the steps one by one, whose norm rounds otherwise: a level
    may then be the next one.
    """
    torch.manual_seed(7)
    first = QuantizedLinear.from_linear(torch.nn.Linear(70, 131), "quick_gelu").to(device)
    second = QuantizedLinear.from_linear(torch.nn.Linear(131, 70)).to(device)
    norm = torch.nn.LayerNorm(70).requires_grad_(False).to(device)
    torch.nn.init.normal_(norm.weight)
    x = (3.0 * torch.randn(rows, 70) + 1.0).to(device, dtype)
    wide = x.float()
    step = 2.0**-7 if dtype == torch.bfloat16 else 1e-2
    for got, want in (
        (first(x, norm), first(norm(wide))),
        (second(first(x), None, x), second(first(wide)) + wide),
        (first(x, norm, x, second), wide + second(first(norm(wide)))),
        (first(x, None, None, second), second(first(wide))),
    ):
        assert got.dtype == dtype and got.shape == want.shape
        assert rows == 0 or (got.float() - want).norm() <= step * want.norm()
    if dtype == torch.float32:
        assert torch.equal(first(x, None, x, second), second(first(x)) + x)


def check_long_rows(features: int, device: str = "cpu") -> None:
    """Norm and a second layer on rows that a GPU's warps share."""
    torch.manual_seed(7)
    first = QuantizedLinear.from_linear(torch.nn.Linear(features, 16)).to(device)
    up = QuantizedLinear.from_linear(torch.nn.Linear(16, features), "gelu").to(device)
    norm = torch.nn.LayerNorm(features).requires_grad_(False).to(device)
    torch.nn.init.normal_(norm.weight)
    x = (3.0 * torch.randn(5, features) + 1.0).to(device)
    for got, want in ((first(x, norm), first(norm(x))), (up(x[:, :16], None, None, first), first(up(x[:, :16])))):
        assert (got - want).norm() <= 1e-2 * want.norm()


def check_bad_rows_in_a_chain(device: str = "cpu") -> None:
    """They harm no other row."""
    torch.manual_seed(7)
    first = QuantizedLinear.from_linear(torch.nn.Linear(20, 30), "gelu").to(device)
    second = QuantizedLinear.from_linear(torch.nn.Linear(30, 20)).to(device)
    norm = torch.nn.LayerNorm(20).requires_grad_(False).to(device)
    x = torch.randn(2, 60, 20).to(device)
    want = first(x, norm, x, second)
    bad = x.clone()
    bad[0, 3, 5], bad[1, 59, 0] = float("nan"), float("inf")
    got = first(bad, norm, bad, second)
    assert got[0, 3].isnan().all() and got[1, 59].isnan().all()
    good = bad.isfinite().all(dim=-1)
    assert torch.equal(got[good], want[good])
