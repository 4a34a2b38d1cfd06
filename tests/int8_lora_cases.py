"""The cases of int8_lora_linear against its emulation in ``clipft.reference``.

Tolerances: u = 2^-24. Integer sums are exact; behind them stand the four roundings of int8_cases.py. The branch's sums
err by about sqrt(n) u of the sum of magnitudes, as in lora_cases.py; 16-bit results add half an ulp of each rounding.
After an activation, which errs by a few u, one element of a row may lie on the other side of a level: a step of the row
times a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lora_cases import laid_out
from torch import Tensor

from clipft import reference
from clipft.nn import Int8Weight
from clipft.ops import int8_lora_linear, quick_gelu_int8_lora_linear

U = 2.0**-24
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("output", "input", "bias", "lora_a", "lora_b")


@dataclass(frozen=True)
class Int8LoraCase:
    shape: tuple[int, ...]  # of the input
    out: int
    rank: int | None = None  # None: no branch
    dropout: float = 0.0
    activation: bool = False
    bias: bool = True
    dtype: torch.dtype = F32
    lora_dtype: torch.dtype | None = None  # the input's
    layout: str = "contiguous"  # contiguous | transposed | strided | expanded
    scaling: float = 2.0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), f"to{self.out}", f"r{self.rank}", str(self.dtype)[6:], self.layout]
        parts += [f"p{self.dropout:g}"] if self.dropout else []
        parts += ["gelu"] if self.activation else []
        parts += ["lora" + str(self.lora_dtype)[6:]] if self.lora_dtype else []
        return "-".join(parts + ([] if self.bias else ["nobias"]))

    def weight(self) -> Int8Weight:
        g = torch.Generator().manual_seed(5)
        return Int8Weight.from_weight(torch.randn(self.out, self.shape[-1], generator=g) / self.shape[-1] ** 0.5)

    def tensors(self) -> list[Tensor | None]:
        """Input, bias, lora_a and lora_b as leaves that need gradients."""
        g = torch.Generator().manual_seed(7)
        lora, features = self.lora_dtype or self.dtype, self.shape[-1]
        x = laid_out(torch.randn(self.shape, generator=g).to(self.dtype), self.layout)
        bias = torch.randn(self.out, generator=g).to(self.dtype) if self.bias else None
        a = b = None
        if self.rank is not None:
            a = (torch.randn(self.rank, features, generator=g) / features**0.5).to(lora)
            b = (torch.randn(self.out, self.rank, generator=g) / self.rank**0.5).to(lora)
        return [None if t is None else t.detach().requires_grad_() for t in (x, bias, a, b)]

    def upstream(self) -> Tensor:
        return torch.randn(*self.shape[:-1], self.out, generator=torch.Generator().manual_seed(8)).to(self.dtype)


def ours(case: Int8LoraCase, tensors: list[Tensor | None] | None = None) -> dict[str, Tensor]:
    """The output and the gradients of everything that has one."""
    x, bias, a, b = tensors = tensors or case.tensors()
    function = quick_gelu_int8_lora_linear if case.activation else int8_lora_linear
    torch.manual_seed(3)
    y = function(x, case.weight(), bias, a, b, case.scaling, dropout=case.dropout, training=True)
    y.backward(case.upstream())
    values = [y.detach(), *(None if t is None else t.grad for t in tensors)]
    return {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}


def the_mask(case: Int8LoraCase) -> Tensor | None:
    """What the run above drops: the seed is the first draw."""
    if not case.dropout or case.rank is None:
        return None
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    return reference.dropout_mask(int(seed), math.prod(case.shape[:-1]), case.shape[-1], case.dropout)


def emulated(case: Int8LoraCase) -> dict[str, Tensor]:
    """In float64, but for the levels, which are those of float32."""
    x, bias, a, b = tensors = case.tensors()
    weight = case.weight()
    wide = x.double()
    if case.activation:
        wide = reference.quick_gelu(wide)
    y = reference.int8_lora_linear(
        wide, weight.weight_int8, weight.weight_scale, bias, a, b, case.scaling,
        dropout=case.dropout, mask=the_mask(case),
    )  # fmt: skip
    y.backward(case.upstream().double())
    values = [y.detach(), *(None if t is None else t.grad for t in tensors)]
    return {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}


def sizes(case: Int8LoraCase) -> dict[str, Tensor]:
    """Magnitudes: the same formula on absolute values."""
    x, bias, a, b = (None if t is None else t.detach().double().abs() for t in case.tensors())
    weight = case.weight()
    w = weight.weight_int8.double().abs() * weight.weight_scale.double()[:, None]
    dy = case.upstream().double().abs().reshape(-1, case.out)
    x = x.reshape(-1, x.shape[-1])
    size = {"output": x @ w.t() + (0.0 if bias is None else bias), "input": dy @ w, "bias": dy.sum(0)}
    if a is not None and b is not None:
        s, kept = case.scaling / (1 - case.dropout), x
        size["output"] += s * (kept @ a.t()) @ b.t()
        u = s * dy @ b
        size |= {"input": size["input"] + u @ a, "lora_a": u.t() @ kept, "lora_b": s * dy.t() @ (kept @ a.t())}
    size["output"] = size["output"].view(*case.shape[:-1], case.out)
    size["input"] = 1.1 * size["input"].view(case.shape)
    return size


def assert_within(case: Int8LoraCase, got: dict[str, Tensor]) -> None:
    n = max(math.prod(case.shape[:-1]), case.shape[-1], case.out) + (case.rank or 0)
    want, size = emulated(case), sizes(case)
    assert got.keys() == want.keys()
    for name, value in got.items():
        exact = want[name].double()
        half = torch.finfo(value.dtype).eps / 2 if value.dtype != F32 else 0.0
        tolerance = U * (4 * n**0.5 + 16) * size[name] + 3.0 * half * torch.maximum(exact.abs(), size[name] / 4)
        error = (value.double() - exact).abs() - (2.0**-24 if value.dtype == F16 else 0.0)
        if case.activation and name == "output":
            tolerance = tolerance + _step(case)
        assert value.isfinite().all() and (error <= tolerance).all(), f"{name}: {(error / tolerance).max():.3g}"


def _step(case: Int8LoraCase) -> float:
    """A level of a row times a weight: activations here span less than 5, weights less than 5 / sqrt(in)."""
    return 5.0 / 127 * 5.0 / case.shape[-1] ** 0.5


SHAPES = [
    Int8LoraCase((1, 1), 1),
    Int8LoraCase((1, 1), 1, 1),
    Int8LoraCase((3, 5), 7, 2, bias=False),
    Int8LoraCase((17, 33), 31, 3, 0.25),
    Int8LoraCase((25, 257), 255, 7),
    Int8LoraCase((193, 64), 100, 8, 0.1, True),
    Int8LoraCase((193, 64), 100, None, 0.0, True),
    Int8LoraCase((50, 300), 520, 16, 0.5),
    Int8LoraCase((40, 100), 65, 17, activation=True),
    Int8LoraCase((400, 40), 24, 64, 0.9),
    Int8LoraCase((30, 130), 140, 128),
    Int8LoraCase((30, 130), 140),
    Int8LoraCase((5,), 3, 2),
    Int8LoraCase((5,), 3),
    Int8LoraCase((2, 3, 10), 12, 4, 0.1),
    Int8LoraCase((2, 1, 3, 10), 12, 4, activation=True),
    Int8LoraCase((2, 3, 10), 12),
    Int8LoraCase((0, 8), 4, 2),
    Int8LoraCase((3, 0, 8), 4, 2, 0.1),
    Int8LoraCase((0, 8), 4),
]
LAYOUTS = [
    Int8LoraCase(shape, 9, rank, 0.2, layout=layout, dtype=dtype)
    for shape in ((12, 10), (4, 3, 10))
    for layout in ("transposed", "strided", "expanded")
    for dtype in (F32, BF16)
    for rank in (3, None)
]
SIXTEEN = [
    Int8LoraCase((37, 70), 90, 5, p, act, dtype=dtype, lora_dtype=lora)
    for dtype in (BF16, F16)
    for lora in (None, F32)
    for p, act in ((0.0, False), (0.3, False), (0.3, True))
]
SIXTEEN += [Int8LoraCase((70, 36), 132, None, 0.3, act, dtype=dtype) for dtype in (BF16, F16) for act in (False, True)]
REAL = [
    Int8LoraCase((4, 50, 768), 768, 16, 0.1),
    Int8LoraCase((64, 768), 3072, 16, 0.1),
    Int8LoraCase((50, 3072), 768, 16),
]
CASES = SHAPES + LAYOUTS + SIXTEEN + REAL
