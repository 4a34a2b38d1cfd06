"""The ops as modules, for those who build a training step from parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from clipft.ops import int8
from clipft.ops.kernels import bias_or_empty, call, check_floats, check_tensors, has_kernel, refuse_derivatives
from clipft.ops.losses import contrastive_loss, sigmoid_loss

__all__ = ["ContrastiveLoss", "QuantizedLinear", "SigmoidLoss"]

_NAME = "nn.QuantizedLinear"  # in messages


class ContrastiveLoss(nn.Module):
    """:func:`clipft.contrastive_loss` with its smoothing and group fixed."""

    def __init__(self, *, label_smoothing: float = 0.0, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.group = group

    def forward(
        self, image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor | float, labels: Tensor | None = None
    ) -> Tensor:
        """[N, D] twice, the scale and optional labels [N] -> 0-d float32 loss."""
        return contrastive_loss(
            image_embeds,
            text_embeds,
            logit_scale,
            labels=labels,
            label_smoothing=self.label_smoothing,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"label_smoothing={self.label_smoothing:g}"


class SigmoidLoss(nn.Module):
    """:func:`clipft.sigmoid_loss` with its group fixed."""

    def __init__(self, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        labels: Tensor | None = None,
    ) -> Tensor:
        """[N, D] twice, scale, bias and optional labels [N] -> 0-d float32 loss."""
        return sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias, labels=labels, group=self.group)


class QuantizedLinear(nn.Module):
    """:func:`clipft.quantized_linear` with its weights kept as this CPU wants them; on a GPU as they are saved.

    The state is plain and moves between machines: ``weight_int8`` [out, in] int8, ``weight_scale`` [out] float32 and,
    where there is one, ``bias`` [out]. What is packed is made from it when it is first needed, and again after a change
    of ``weight_int8``; it is neither saved nor copied. ``weight_scale`` stays float32 whatever dtype the module is
    cast to. For inference: nothing here gets a gradient.
    """

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        int8.activation_code(_NAME, activation)
        self._packed: tuple[object, Tensor] | None = None
        self.register_buffer("weight_int8", torch.zeros((out_features, in_features), dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)
        int8.check_weight(_NAME, self.weight_int8, self.weight_scale)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = None) -> QuantizedLinear:
        """The int8 form of ``linear``, with ``activation`` (None, "quick_gelu" or "gelu") behind it."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"clipft.{_NAME}: linear must be a torch.nn.Linear, got {type(linear).__name__}")
        bias = linear.bias
        layer = cls(linear.in_features, linear.out_features, bias is not None, activation, linear.weight.device)
        layer.weight_int8, layer.weight_scale = int8.quantize_weight(linear.weight)
        if bias is not None:
            layer.bias = bias.detach().clone()
        layer.train(linear.training)
        return layer

    def forward(
        self,
        input: Tensor,  # noqa: A002
        norm: nn.LayerNorm | None = None,
        residual: Tensor | None = None,
        then: QuantizedLinear | None = None,
    ) -> Tensor:
        """[..., in] float32, bfloat16 or float16 -> [..., out] in the same dtype.

        What stands around a layer in a transformer's block may come along, and is then done in the same pass over the
        rows: ``residual + then(self(norm(input)))``, ``norm`` over [in], ``then`` a layer without an activation whose
        input these are.
        """
        check_tensors(_NAME, input=input, weight_int8=self.weight_int8, weight_scale=self.weight_scale)
        refuse_derivatives(_NAME, input)
        code = int8.activation_code(_NAME, self.activation)
        if then is not None and not (
            isinstance(then, QuantizedLinear) and then.in_features == self.out_features and then.activation is None
        ):
            raise ValueError(
                f"clipft.{_NAME}: then must be a QuantizedLinear of {self.out_features} features without an "
                f"activation, got {then!r}"
            )
        last = self if then is None else then
        int8.check_surroundings(_NAME, input, norm, residual, self.in_features, last.out_features)
        if torch.compiler.is_exporting():
            return self._by_steps(input, norm, residual, then, code)
        if not has_kernel(_NAME, input, int8.PLAIN):
            return self._plain(input, norm, residual, then)
        none = input.new_empty(0)
        return call(
            torch.ops.clipft.quantized_chain,
            int8.in_order(input),
            *((none, none, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)),
            *self._operands(none),
            code,
            *((none, none, none) if then is None else then._operands(none)),
            none if residual is None else int8.in_order(residual),
            name=_NAME,
        )

    def _operands(self, none: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight_int8 if self.weight_int8.device.type == "cuda" else self._pack()
        bias = none if self.bias is None else bias_or_empty(_NAME, self.bias, self.weight_int8, none)
        return weight, self.weight_scale, bias

    def _by_steps(
        self, x: Tensor, norm: nn.LayerNorm | None, residual: Tensor | None, then: QuantizedLinear | None, code: int
    ) -> Tensor:
        """In ops that an exporter can translate."""
        x = int8.in_order(x if norm is None else norm(x))
        bias = bias_or_empty(_NAME, self.bias, self.weight_int8, x)
        x = torch.ops.clipft.quantized_linear(x, self.weight_int8, self.weight_scale, bias, code)
        if then is not None:
            x = then(x)
        return x if residual is None else residual + x

    def _plain(
        self, x: Tensor, norm: nn.LayerNorm | None, residual: Tensor | None, then: QuantizedLinear | None
    ) -> Tensor:
        """Without kernels; as these do, rounded to the input's dtype in the end only, whatever dtype the norm has."""
        check_floats(_NAME, input=x)
        wide = x.float()
        if norm is not None:
            wide = F.layer_norm(wide, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        for layer in (self,) if then is None else (self, then):
            wide = int8.plain_linear(_NAME, wide, layer.weight_int8, layer.weight_scale, layer.bias, layer.activation)
        return (wide if residual is None else residual + wide).to(x.dtype)

    def _pack(self) -> Tensor:
        """The packed weights. While torch.compile traces, those that there are; in eager mode they are made anew where
        ``weight_int8`` is another tensor or was written to. The pair is replaced as one: threads may race for it."""
        packed, weight = self._packed, self.weight_int8
        if torch.compiler.is_compiling():
            return self._packed_anew() if packed is None else packed[1]
        key = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if packed is None or packed[0] != key:
            packed = self._packed = (key, self._packed_anew())
        return packed[1]

    def _packed_anew(self) -> Tensor:
        return call(torch.ops.clipft.quantized_pack, self.weight_int8, name=_NAME)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None
        int8.check_weight(_NAME, self.weight_int8, self.weight_scale)
        if self.weight_int8.device.type == "cpu":
            self._pack()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self._packed = None
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
