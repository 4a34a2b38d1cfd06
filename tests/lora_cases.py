"""The cases of lora_linear, one registry for tests of values, gradients and op contracts, on whichever device.

Tolerances: u = 2^-24. A sum of n products errs by at most n u of the sum of magnitudes; with random signs by about
sqrt(n) u of it, which 4 sqrt(n) + 16 covers for the maximum over a tensor. The magnitudes are the same formula on
absolute values. A 16-bit result adds half an ulp of itself, and so does each 16-bit product of torch's that it passes
through. Tensor cores take a float32 factor as two bfloat16 that miss 2^-18 of it and leave out the product of two lower
halves, 2^-18 again: 2^-16 of the magnitudes for two products of two such factors one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import clipft
from clipft import reference
from clipft.ops import quick_gelu_lora_linear

U = 2.0**-24
NAMES = ("input", "weight", "bias", "lora_a", "lora_b")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class LoraCase:
    shape: tuple[int, ...]  # of the input
    out: int
    rank: int
    dropout: float = 0.0
    activation: bool = False
    bias: bool = True
    dtype: torch.dtype = F32
    lora_dtype: torch.dtype | None = None  # the input's
    layout: str = "contiguous"  # contiguous | transposed | strided | expanded
    scaling: float = 2.0
    device: str = "cpu"  # of what computes; values are made on the CPU, and so is the truth

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), f"to{self.out}", f"r{self.rank}", str(self.dtype)[6:], self.layout]
        parts += [f"p{self.dropout:g}"] if self.dropout else []
        parts += ["gelu"] if self.activation else []
        parts += ["lora" + str(self.lora_dtype)[6:]] if self.lora_dtype else []
        return "-".join(parts + ([] if self.bias else ["nobias"]))

    def tensors(self) -> list[Tensor | None]:
        """Input, weight, bias, lora_a and lora_b as leaves that need gradients."""
        g = torch.Generator().manual_seed(7)
        lora = self.lora_dtype or self.dtype
        fan_in = self.shape[-1]
        x = laid_out(torch.randn(self.shape, generator=g).to(self.dtype), self.layout)
        weight = (torch.randn(self.out, fan_in, generator=g) / fan_in**0.5).to(self.dtype)
        bias = torch.randn(self.out, generator=g).to(self.dtype) if self.bias else None
        a = (torch.randn(self.rank, fan_in, generator=g) / fan_in**0.5).to(lora)
        b = (torch.randn(self.out, self.rank, generator=g) / self.rank**0.5).to(lora)
        return [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, a, b)]

    def upstream(self) -> Tensor:
        return torch.randn(*self.shape[:-1], self.out, generator=torch.Generator().manual_seed(8)).to(self.dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
        return wide[..., ::2].copy_(x)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def run(function: Callable[..., Tensor], case: LoraCase, tensors: list[Tensor | None], **kwargs) -> list[Tensor]:
    """The output and the gradients of everything that has one."""
    torch.manual_seed(3)
    y = function(*tensors, case.scaling, **kwargs)
    y.backward(case.upstream().to(y))
    return [y.detach(), *(t.grad for t in tensors if t is not None)]


def ours(case: LoraCase) -> list[Tensor]:
    function = quick_gelu_lora_linear if case.activation else clipft.lora_linear
    tensors = [None if t is None else t.detach().to(case.device).requires_grad_() for t in case.tensors()]
    return [t.cpu() for t in run(function, case, tensors, dropout=case.dropout, training=True)]


def the_mask(case: LoraCase) -> Tensor | None:
    """What the run above drops: the seed is the first draw."""
    if not case.dropout:
        return None
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=case.device)
    rows = math.prod(case.shape[:-1])
    return reference.dropout_mask(int(seed), rows, case.shape[-1], case.dropout).view(case.shape)


def exact(case: LoraCase) -> list[Tensor]:
    def function(x: Tensor, *rest: Tensor) -> Tensor:
        x = reference.quick_gelu(x) if case.activation else x
        return reference.lora_linear(x, *rest, dropout=case.dropout, mask=the_mask(case))

    tensors = [None if t is None else t.detach().double().requires_grad_() for t in case.tensors()]
    return run(function, case, tensors)


def sizes(case: LoraCase) -> list[Tensor]:
    """Magnitudes: the same on absolute values, by hand because an absolute value has no place in autograd."""
    x, weight, bias, a, b = (None if t is None else t.detach().double().abs() for t in case.tensors())
    dy = case.upstream().double().abs().reshape(-1, case.out)
    mask, s = the_mask(case), case.scaling / (1 - case.dropout)
    x = x.reshape(-1, x.shape[-1])
    kept = x if mask is None else x * mask.view(x.shape)
    u = s * dy @ b
    d_x = 1.1 * (dy @ weight + u @ a)
    y = x @ weight.t() + s * (kept @ a.t()) @ b.t() + (0 if bias is None else bias)
    d_bias = [] if bias is None else [dy.sum(0)]
    return [
        y.view(*case.shape[:-1], case.out),
        d_x.view(case.shape),
        dy.t() @ x,
        *d_bias,
        u.t() @ kept,
        s * dy.t() @ (kept @ a.t()),
    ]


def assert_within(case: LoraCase, got: list[Tensor], want: list[Tensor], *, on_gpu: bool = False) -> None:
    halved = 2.0**-16 if on_gpu and case.dtype == BF16 else 0.0
    n = max(math.prod(case.shape[:-1]), case.shape[-1], case.out) + case.rank
    names = ["output", *(name for name in NAMES if case.bias or name != "bias")]
    for name, g, w, size in zip(names, got, want, sizes(case), strict=True):
        u16 = torch.finfo(g.dtype).eps / 2 if g.dtype != F32 else 0.0
        # output and input gradient: torch's product is rounded, then the sum; with the activation also its input
        twice = (3.0 if case.activation else 2.0) if name in ("output", "input", "weight") else 1.0
        rounding = twice * u16 * (size if case.activation else torch.maximum(w.abs(), size / 4)) + (
            2.0**-24 if g.dtype == F16 else 0
        )
        tolerance = (U * (4 * n**0.5 + 16) + halved) * size + rounding
        error = (g.double() - w).abs()
        assert (error <= tolerance).all(), f"{name}: {(error / tolerance).max():.3g} of the tolerance"


SHAPES = [
    LoraCase((1, 1), 1, 1),
    LoraCase((3, 5), 7, 2, bias=False),
    LoraCase((17, 33), 31, 3, 0.25),
    LoraCase((25, 257), 255, 7),
    LoraCase((193, 64), 100, 8, 0.1, True),
    LoraCase((50, 300), 520, 16, 0.5),
    LoraCase((40, 100), 65, 17, activation=True),
    LoraCase((400, 40), 24, 64, 0.9),
    LoraCase((30, 130), 140, 128),
    LoraCase((5,), 3, 2),
    LoraCase((2, 3, 10), 12, 4, 0.1),
    LoraCase((2, 1, 3, 10), 12, 4, activation=True),
    LoraCase((0, 8), 4, 2),
    LoraCase((3, 0, 8), 4, 2, 0.1),
]
LAYOUTS = [
    LoraCase(shape, 9, 3, 0.2, layout=layout, dtype=dtype)
    for shape in ((12, 10), (4, 3, 10))
    for layout in ("transposed", "strided", "expanded")
    for dtype in (F32, BF16)
]
SIXTEEN = [
    LoraCase((37, 70), 90, 5, p, act, dtype=dtype, lora_dtype=lora)
    for dtype in (BF16, F16)
    for lora in (None, F32)
    for p, act in ((0.0, False), (0.3, False), (0.3, True))
]
SIXTEEN += [LoraCase((70, 36), 132, 20, 0.3, act, dtype=dtype) for dtype in (BF16, F16) for act in (False, True)]
TENSOR_CORES = [  # rows of aligned quads, around the tiles of a block
    LoraCase((rows, fan_in), out, rank, p, act, dtype=BF16, lora_dtype=lora)
    for rows, fan_in, out, rank in ((1, 4, 4, 1), (67, 260, 136, 16), (129, 128, 20, 40), (300, 36, 132, 17))
    for p, act, lora in ((0.0, False, None), (0.0, False, F32), (0.3, False, F32), (0.0, True, F32), (0.3, True, None))
]
REAL = [LoraCase((16, 50, 768), 768, 16, p) for p in (0.0, 0.1)] + [LoraCase((64, 768), 3072, 16, 0.1)]
CASES = SHAPES + LAYOUTS + SIXTEEN + TENSOR_CORES + REAL


def check_gradients_only_where_needed(needed: int, activation: bool, dtype: torch.dtype) -> None:
    """Bit k of ``needed``: tensor k of the case asks for its gradient, which is that of a call that asks for all."""
    case = LoraCase((9, 20), 12, 3, 0.2, activation, dtype=dtype)
    every = ours(case)
    function = quick_gelu_lora_linear if activation else clipft.lora_linear
    tensors = [t.detach().requires_grad_(bool(needed >> k & 1)) for k, t in enumerate(case.tensors())]
    torch.manual_seed(3)
    y = function(*tensors, case.scaling, dropout=case.dropout, training=True)
    assert torch.equal(y.detach(), every[0]) and y.requires_grad == (needed != 0)
    if needed:
        y.backward(case.upstream())
    for k, t in enumerate(tensors):
        assert (t.grad is not None) == bool(needed >> k & 1)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, every[k + 1])
