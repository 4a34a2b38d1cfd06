"""The cases of the losses, one registry for tests of values, gradients, op contracts and processes.

Tolerances: u = 2^-24. A logit s <i, t> of unit vectors is computed with an error of at most about u |s| (2 + sqrt(D) /
4) (products in float32 lanes, random signs), which moves a probability by that share of itself. The gradient of an
embedding is a sum of N terms, each at most 2 |s| / N times a component, whose probabilities add up to at most 2: hence
the bounds below. What a 16-bit result adds is half an ulp of that result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import clipft
from clipft import reference

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
    LossCase(192, 16, 0.0),
    LossCase(192, 16, -20.0),
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


SIGMOID_CASES = [c for c in CASES if c.classes is None and not c.smoothing]
LABEL_CASES = [c for c in CASES if c.classes is not None and not c.smoothing]

BIAS = -3.0


def run(
    function: Callable[..., Tensor],
    case: LossCase,
    dtype: torch.dtype | None = None,
    bias: bool = False,
    device: str = "cpu",
    **kwargs,
) -> list[Tensor]:
    """Loss and gradients of both embeddings, the scale, and the bias; inputs rounded to the case's dtype first."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    image, text = (x.to(dtype or x.dtype) if dtype else x for x in case.embeds())
    args = [
        *(on_device(x, device).detach().requires_grad_() for x in (image, text)),
        torch.tensor(case.scale, dtype=wide, requires_grad=True, device=device),
    ]
    if bias:
        args.append(torch.tensor(BIAS, dtype=wide, requires_grad=True, device=device))
    loss = function(*args, **kwargs)
    loss.backward()
    return [loss.detach().cpu(), *(a.grad.cpu() for a in args)]


def on_device(x: Tensor, device: str) -> Tensor:
    """With its strides."""
    return x if device == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def coefficient_rounding(case: LossCase, device: str) -> float:
    """On a GPU the coefficients of a gradient's sum have the embeddings' dtype (the pair's own excepted). They add up
    to 4 at most (probabilities of rows and columns, and targets), each times |s| / 2N and a component below 1."""
    if device == "cpu" or case.dtype == torch.float32:
        return 0.0
    return torch.finfo(case.dtype).eps / 2 * 2 * abs(case.scale) / case.n


def check_contrastive(case: LossCase, device: str = "cpu") -> None:
    """Loss and gradients against float64. ``device`` "emulated" is the CPU with a GPU's kernels."""
    where = "cpu" if device == "emulated" else device
    options = {"labels": case.labels(), "label_smoothing": case.smoothing}
    ours = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in options.items()}
    loss, d_image, d_text, d_scale = run(clipft.contrastive_loss, case, device=where, **ours)
    want, want_image, want_text, want_scale = run(reference.contrastive_loss, case, torch.float64, **options)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert d_image.dtype == case.dtype and d_text.dtype == case.dtype
    extra = coefficient_rounding(case, device)
    assert_close(loss, want, value_tolerance(case, want.item()), "loss")
    assert_close(d_image, want_image, gradient_tolerance(case, want_image) + extra, "image gradient")
    assert_close(d_text, want_text, gradient_tolerance(case, want_text) + extra, "text gradient")
    assert_close(
        d_scale,
        want_scale,
        gradient_tolerance(case, want_scale) * case.n / max(abs(case.scale), 1e-3),
        "scale gradient",
    )


def check_sigmoid(case: LossCase, device: str = "cpu", *, labelled: bool = False) -> None:
    """As :func:`check_contrastive`; ``labelled``: with the case's labels."""
    where = "cpu" if device == "emulated" else device
    labels = case.labels() if labelled else None
    got = run(clipft.sigmoid_loss, case, bias=True, device=where, labels=None if labels is None else labels.to(where))
    want = run(reference.sigmoid_loss, case, torch.float64, bias=True, labels=labels)
    # A sum over all pairs / N: its terms are as large as the logits, and there are N of them to a row.
    rows = case.n if case.scale > 0 else 1
    extra = coefficient_rounding(case, device) * rows
    assert_close(got[0], want[0], value_tolerance(case, want[0].item()) * max(1.0, want[0].item()), "loss")
    for name, g, w in zip(("image", "text"), got[1:3], want[1:3], strict=True):
        assert_close(g, w, gradient_tolerance(case, w) * rows + extra, f"{name} gradient")
    for name, g, w in zip(("scale", "bias"), got[3:], want[3:], strict=True):
        assert_close(g, w, gradient_tolerance(case, w) * rows * case.n / max(abs(case.scale), 1e-3), f"{name} gradient")


def check_sigmoid_labels_near_convergence() -> None:
    """Eight pairs to a class, all near: each positive has its own small term, and none is a large negative's less z."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 8
    centres = F.normalize(torch.randn(8, 64, generator=generator), dim=1)
    x = F.normalize(centres[labels] + 0.01 * torch.randn(64, 64, generator=generator), dim=1)
    args = [x.clone().requires_grad_(), x.clone().requires_grad_(), torch.tensor(100.0), torch.tensor(-30.0)]
    exact = [arg.detach().double().requires_grad_() for arg in args]
    got = clipft.sigmoid_loss(*args[:2], *(arg.requires_grad_() for arg in args[2:]), labels=labels)
    want = reference.sigmoid_loss(*exact, labels=labels)
    assert 0 < want < 1e-3
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0.0)
    grads, exact_grads = torch.autograd.grad(got, args), torch.autograd.grad(want, exact)
    for g, w in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-3 * float(w.abs().max()))


def unit(n: int = 24, dim: int = 8, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def check_extreme_logits() -> None:
    """Logits of +-1e4 and columns that lie far below their tile's maximum: never Inf, never a lost row."""
    image = torch.cat([unit(40), 100.0 * unit(40, seed=2)]).requires_grad_()
    text = torch.cat([unit(40, seed=1), 1.0 * unit(40, seed=2)]).requires_grad_()
    loss = clipft.contrastive_loss(image, text, 100.0)
    loss.backward()
    exact_image, exact_text = image.detach().double().requires_grad_(), text.detach().double().requires_grad_()
    exact = reference.contrastive_loss(exact_image, exact_text, 100.0)
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(image.grad.double(), exact_image.grad, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(text.grad.double(), exact_text.grad, rtol=1e-3, atol=1e-2)


def check_sigmoid_bias_near_convergence(n: int) -> None:
    """The pair's sigmoid, 1 but for rounding, must not take the others, of 1e-8 each, out of the sum."""
    scale, bias = torch.tensor(35.0), torch.tensor(-18.0, requires_grad=True)  # logits 17 and -18
    clipft.sigmoid_loss(torch.eye(n), torch.eye(n), scale, bias).backward()
    others, pair = torch.tensor([-18.0, -17.0], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(bias.grad.double(), (n - 1) * others - pair, rtol=1e-5, atol=0.0)
