"""The cases of the losses, one registry for tests of values, gradients, op contracts and processes.

Tolerances: u = 2^-24. A logit s <i, t> of unit vectors is computed with an error of at most about u |s| (2 + sqrt(D) /
4) (products in float32 lanes, random signs), which moves a probability by that share of itself. The gradient of an
embedding is a sum of N terms, each at most 2 |s| / N times a component, whose probabilities add up to at most 2: hence
the bounds below. What a 16-bit result adds is half an ulp of that result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

U = 2.0**-24


@dataclass(frozen=True)
class LossCase:
    n: int
    dim: int
    scale: float
    values: str = "random"  # random | paired | equal | duplicates | opposed | collapsed
    classes: int | None = None
    smoothing: float = 0.0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # contiguous | transposed | strided | offset

    def __str__(self) -> str:
        parts = [f"{self.n}x{self.dim}", f"s{self.scale:g}", self.values, self.layout, str(self.dtype)[6:]]
        parts += [f"classes{self.classes}"] if self.classes else []
        parts += [f"smooth{self.smoothing:g}"] if self.smoothing else []
        return "-".join(parts)

    def labels(self) -> Tensor | None:
        if self.classes is None:
            return None
        generator = torch.Generator().manual_seed(self.n)
        return torch.randint(-self.classes // 2, self.classes, (self.n,), generator=generator) * 10**12

    def embeds(self) -> tuple[Tensor, Tensor]:
        """Unit vectors [n, dim] in the case's dtype and layout."""
        generator = torch.Generator().manual_seed(1000 * self.n + self.dim)
        image = torch.randn(self.n, self.dim, generator=generator)
        noise = torch.randn(self.n, self.dim, generator=generator)
        text = {
            "random": noise,
            "paired": image + noise,
            "equal": torch.ones_like(image),
            "duplicates": image,
            "opposed": -image,
            "collapsed": image + 0.05 * noise,
        }[self.values]
        if self.values == "equal":
            image = torch.ones_like(image)
        if self.values == "duplicates":
            image = image[torch.arange(self.n) // 3 * 3 % self.n]
        return self._lay_out(F.normalize(image, dim=1)), self._lay_out(F.normalize(text, dim=1))

    def _lay_out(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.layout == "transposed":
            return x.t().contiguous().t()
        if self.layout == "strided":
            out = torch.full((2 * self.n, 2 * self.dim), float("nan"), dtype=self.dtype)[::2, ::2]
            return out.copy_(x)
        if self.layout == "offset":
            out = torch.full((self.n * (self.dim + 3) + 1,), float("nan"), dtype=self.dtype)[1:].view(
                self.n, self.dim + 3
            )
            return out[:, : self.dim].copy_(x)
        return x


def value_tolerance(case: LossCase, loss: float) -> float:
    """The logits' error, and the rounding of the float32 result."""
    return U * abs(case.scale) * (2 + case.dim**0.5 / 4) + 2 * U * abs(loss)


def gradient_tolerance(case: LossCase, exact: Tensor) -> float:
    logit_error = U * abs(case.scale) * (2 + case.dim**0.5 / 4)
    largest = 2 * max(abs(case.scale), 1e-3) / case.n
    rounding = torch.finfo(case.dtype).eps / 2 * float(exact.abs().max()) if case.dtype != torch.float32 else 0.0
    smallest = {torch.float16: 2.0**-25, torch.bfloat16: 0.0, torch.float32: 0.0}[case.dtype]
    return largest * (8 * U + logit_error + U * case.n**0.5) + rounding + smallest


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Absolute, and written so that NaN fails."""
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    assert error <= tolerance, f"{what}: error {error:.3g} > {tolerance:.3g}"


SHAPES = [(1, 1), (1, 8), (2, 3), (3, 1), (17, 5), (31, 64), (127, 33), (1023, 8), (1024, 16), (1025, 24), (2053, 12)]

CASES = [LossCase(n, d, scale) for n, d in SHAPES for scale in (1.0, 14.285, 100.0)]
CASES += [LossCase(300, 64, 100.0, values) for values in ("paired", "equal", "duplicates", "opposed", "collapsed")]
CASES += [
    LossCase(1100, 48, 100.0, "collapsed"),
    LossCase(3300, 16, 100.0, "collapsed"),
    LossCase(130, 16, 0.0),
    LossCase(130, 16, -20.0),
]
CASES += [
    LossCase(n, 32, 30.0, "paired", c, e) for n in (5, 65, 1030) for c, e in ((None, 0.1), (4, 0.0), (7, 0.3), (1, 0.0))
]
CASES += [LossCase(n, 40, 50.0, "paired", dtype=t) for n in (7, 1030) for t in (torch.bfloat16, torch.float16)]
CASES += [
    LossCase(70, 24, 20.0, layout=x, dtype=t)
    for x in ("transposed", "strided", "offset")
    for t in (torch.float32, torch.bfloat16)
]
CASES += [LossCase(64, 512, 100.0, "paired"), LossCase(128, 768, 100.0, "paired")]
