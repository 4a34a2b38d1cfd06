"""A linear layer's weights in int8: rounding, and the search that ``calibrate`` asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipft.models.int8 import fused_activation, tower_of
from clipft.models.int8_layers import BLOCKS, QuantizedPatchEmbedding
from clipft.ops.int8 import quantize_weight, quantized_linear
from clipft.ops.nn import QuantizedLinear

__all__ = ["patch_layer", "quantize_layer"]

_CLIPS = (1.0, 0.97, 0.94, 0.91, 0.87, 0.82, 0.76, 0.7)  # shares of a channel's range that the search tries
_SMOOTHINGS = (0.35, 0.5, 0.65)  # SmoothQuant's alpha


# ---- a layer ----


@dataclass
class _Rounded:
    """Weights in int8 for inputs that are divided by ``divisor``, and the relative error on the judging rows."""

    int8: Tensor  # [out, in]
    scale: Tensor  # [out]
    error: float
    clipped: bool = False
    smoothing: float | None = None
    divisor: Tensor | None = None  # [in]


def quantize_layer(
    model: nn.Module, name: str, sources: list[str], rows: Tensor, calibrate: bool
) -> tuple[QuantizedLinear, dict[str, dict[str, Any]]]:
    """The int8 layer ``name`` that stands for these float layers, and of each of them what the report says.

    Args:
        rows: [rows, in] of the layer's input; every other one serves the search, the rest judge.
        calibrate: search clipping and smoothing, which is moved into the model's norm before the layer.
    """
    modules: list[Any] = [model.get_submodule(source) for source in sources]
    weight = torch.cat([module.weight.detach().flatten(1).float() for module in modules])
    search, judge = rows[::2], rows[1::2]
    try:
        best = _round(weight, judge)
        if calibrate:
            norm = _norm_before(model, name)
            best = min(_candidates(weight, search, judge, norm is not None, best), key=lambda one: one.error)
            if norm is not None and best.divisor is not None:
                norm.weight.data /= best.divisor
                norm.bias.data /= best.divisor
    except ValueError as error:
        raise ValueError(f"model: {name}: {error}") from error
    layer = _new_layer(model, name, modules, best)
    found = {"clipped": best.clipped, "smoothing": best.smoothing} if calibrate else {}
    errors = _errors(weight, best, judge, len(sources))
    return layer, {source: {"error": error, **found} for source, error in zip(sources, errors, strict=True)}


def _new_layer(model: nn.Module, name: str, modules: list[Any], rounded: _Rounded) -> QuantizedLinear:
    first, out = modules[0], len(rounded.scale)
    layer: QuantizedLinear
    if isinstance(first, nn.Conv2d):
        layer = patch_layer(first)
    else:
        activation = fused_activation(model, name)
        layer = QuantizedLinear(first.in_features, out, first.bias is not None, activation, device="meta")
    layer.weight_int8, layer.weight_scale = rounded.int8, rounded.scale
    if first.bias is not None:
        layer.bias = torch.cat([module.bias.detach() for module in modules])
    return layer


def patch_layer(conv: nn.Conv2d) -> QuantizedPatchEmbedding:
    """The layer, without weights, that takes the convolution's place."""
    side, bias = conv.kernel_size[0], conv.bias is not None
    return QuantizedPatchEmbedding(conv.in_channels, side, conv.out_channels, bias, device="meta")


def _norm_before(model: nn.Module, name: str) -> nn.LayerNorm | None:
    """The norm whose output this layer, and nothing else, takes in."""
    tower = tower_of(model, name)
    for layer, norms in BLOCKS[tower.block].norms.items() if tower else ():
        if name.endswith(f".{layer}"):
            around: Any = model.get_submodule(name.removesuffix(f".{layer}"))
            return cast(nn.LayerNorm, next(getattr(around, norm) for norm in norms if hasattr(around, norm)))
    return None


# ---- rounding, and the searches ----


def _round(weight: Tensor, judge: Tensor, scale: Tensor | None = None) -> _Rounded:
    if scale is None:
        int8, scale = quantize_weight(weight)
    else:
        int8 = (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    rounded = _Rounded(int8, scale, 0.0, clipped=False)
    rounded.error = _errors(weight, rounded, judge, 1)[0]
    return rounded


def _errors(weight: Tensor, rounded: _Rounded, judge: Tensor, parts: int) -> list[float]:
    """Relative errors of the layer's output on these rows, for each of so many equal parts of its channels. ``weight``
    is the float layer's, for inputs as they were before smoothing."""
    x = judge if rounded.divisor is None else judge / rounded.divisor
    with torch.no_grad():
        want, got = judge @ weight.t(), quantized_linear(x, rounded.int8, rounded.scale)
    pairs = zip(want.chunk(parts, dim=1), (got - want).chunk(parts, dim=1), strict=True)
    return [float(wrong.norm() / right.norm().clamp_min(1e-30)) for right, wrong in pairs]


def _candidates(weight: Tensor, search: Tensor, judge: Tensor, smooth: bool, plain: _Rounded) -> Iterator[_Rounded]:
    yield plain
    for alpha in (None, *(_SMOOTHINGS if smooth else ())):
        divisor = None if alpha is None else _smoothing(weight, search, alpha)
        moved = weight if divisor is None else weight * divisor
        x = search if divisor is None else search / divisor
        for clipped, scale in ((False, None), (True, _clip(moved, x))):
            one = _round(moved, judge if divisor is None else judge / divisor, scale)
            yield _Rounded(one.int8, one.scale, one.error, clipped, alpha, divisor)


def _smoothing(weight: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """[in]: what inputs are divided by, max|x|^alpha / max|w|^(1 - alpha), of mean 1."""
    divisor = rows.abs().amax(dim=0).clamp_min(1e-5) ** alpha / weight.abs().amax(dim=0).clamp_min(1e-5) ** (1 - alpha)
    return divisor / divisor.log().mean().exp()


def _clip(weight: Tensor, rows: Tensor) -> Tensor:
    """[out]: for each channel the scale with the least squared error of the output on these rows."""
    full = quantize_weight(weight)[1]
    best, least = full, torch.full_like(full, float("inf"))
    for share in _CLIPS:
        scale = full * share
        wrong = (weight / scale[:, None]).round_().clamp_(-127, 127) * scale[:, None] - weight
        error = (rows @ wrong.t()).square().sum(dim=0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
