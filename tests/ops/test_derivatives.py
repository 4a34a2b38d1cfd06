"""Derivatives besides backward: those of plain torch, or refused; never a tangent lost without a word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_cases import unit
from torch import Tensor
from torch.autograd import forward_ad

import clipft
from clipft import reference
from clipft.nn import QuantizedLinear
from clipft.ops import attention, quantized_linear, quick_gelu, quick_gelu_lora_linear

Function = Callable[[Tensor], Tensor]

X, TEXT, STEP = unit(6, 16), unit(6, 16, seed=1), unit(6, 16, seed=2)
LABELS = torch.tensor([0, 1, 0, 2, 3, 1])
W, A, B = (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) for shape in ((12, 16), (4, 16), (12, 4)))

OPS: dict[str, tuple[Function, Function]] = {
    "contrastive": (
        lambda x: clipft.contrastive_loss(x, TEXT, 10.0, labels=LABELS),
        lambda x: reference.contrastive_loss(x, TEXT, 10.0, labels=LABELS),
    ),
    "contrastive scale": (
        lambda x: clipft.contrastive_loss(X, TEXT, x.norm()),
        lambda x: reference.contrastive_loss(X, TEXT, x.norm()),
    ),
    "sigmoid": (
        lambda x: clipft.sigmoid_loss(x, TEXT, 10.0, -5.0, labels=LABELS),
        lambda x: reference.sigmoid_loss(x, TEXT, 10.0, -5.0, labels=LABELS),
    ),
    "sigmoid bias": (
        lambda x: clipft.sigmoid_loss(X, TEXT, 10.0, x.sum()),
        lambda x: reference.sigmoid_loss(X, TEXT, 10.0, x.sum()),
    ),
    "quick_gelu": (lambda x: quick_gelu(x).square().sum(), lambda x: reference.quick_gelu(x).square().sum()),
    "lora_linear": (
        lambda x: clipft.lora_linear(x, W, None, A, B, 2.0).square().sum(),
        lambda x: reference.lora_linear(x, W, None, A, B, 2.0).square().sum(),
    ),
    "quick_gelu_lora_linear": (
        lambda x: quick_gelu_lora_linear(x, W, None, A, B, 2.0).square().sum(),
        lambda x: reference.lora_linear(reference.quick_gelu(x), W, None, A, B, 2.0).square().sum(),
    ),
    "attention": (
        lambda x: attention(x.repeat(1, 3)[None], 2, causal=True).square().sum(),
        lambda x: reference.attention(x.repeat(1, 3)[None], 2, 8**-0.5, causal=True).square().sum(),
    ),
}


def forward_mode(function: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, STEP))).tangent
        assert tangent is not None, "the tangent was lost"
        return tangent


TRANSFORMS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "forward mode": forward_mode,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (STEP,))[1],
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vjp": lambda function, x: torch.func.vjp(function, x)[1](torch.tensor(2.0))[0],
    "vmap of grad": lambda function, x: torch.func.vmap(torch.func.grad(function))(torch.stack([x, x + STEP])),
    "hessian": lambda function, x: torch.func.hessian(function)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_as_plain_torch(op: str, transform: str) -> None:
    function, plain = OPS[op]
    got, want = (TRANSFORMS[transform](one, X) for one in (function, plain))
    assert want.abs().max() > 1e-4
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("of", ["op", "layer"])
def test_int8_refuses(of: str, transform: str) -> None:
    layer = QuantizedLinear.from_linear(torch.nn.Linear(16, 4))
    op = layer if of == "layer" else lambda x: quantized_linear(x, layer.weight_int8, layer.weight_scale)
    with pytest.raises(NotImplementedError, match="int8 layers are for inference and have no derivative"):
        TRANSFORMS[transform](lambda x: op(x).sum(), X)


@pytest.mark.parametrize("op", OPS)
def test_a_second_backward_is_refused(op: str) -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(OPS[op][0](x), x, create_graph=True)[0].sum().backward()
