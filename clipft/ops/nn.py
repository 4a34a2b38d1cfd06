"""The ops as modules, for those who build a training step from parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from clipft.ops import int8
from clipft.ops.kernels import (
    bias_or_empty,
    call,
    check_floats,
    check_tensors,
    exports_to_onnx,
    in_order,
    refuse_derivatives,
)
from clipft.ops.losses import contrastive_loss, sigmoid_loss
from clipft.ops.packed import PackedWeight

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


class QuantizedLinear(PackedWeight):
    """:func:`clipft.quantized_linear` with its weights kept as this CPU wants them; on a GPU as they are saved.

    What is saved is plain and moves between machines: ``weight_int8`` [out, in] int8, ``weight_scale`` [out] float32
    and, where there is one, ``bias`` [out]. Weights are packed once: when the module is made, moved to a CPU, loaded,
    or ``weight_int8`` assigned. A CPU keeps no other copy: ``weight_int8`` unpacks anew what it gives, and packs again
    when torch changes that, or a view of it, in place. What changes its memory past torch (numpy, a pointer) changes
    what was read and nothing else. ``weight_scale`` stays float32 whatever dtype the module is cast to. For inference:
    nothing here gets a gradient. Graphs of ``torch.compile`` and ``torch.export`` take the weights as they are packed.
    """

    bias: Tensor | None
    _name = _NAME

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device)
        self.activation = activation
        int8.activation_code(_NAME, activation)
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within, the weights are as they are saved on a CPU too, for a file of another kind to hold."""
        packed, self._packed = self._packed, self._plain_weight()
        try:
            yield
        finally:
            self._packed = packed

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = None) -> QuantizedLinear:
        """The int8 form of ``linear``, with ``activation`` (None, "quick_gelu", "gelu" or "gelu_tanh") behind it."""
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
        check_tensors(_NAME, input=input, weight_int8=self._packed, weight_scale=self.weight_scale)
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
        if exports_to_onnx():
            return self._by_steps(input, norm, residual, then, code)
        if not int8.runs(_NAME, input, "quantized"):
            return self._plain(input, norm, residual, then)
        none = input.new_empty(0)
        return call(
            torch.ops.clipft.quantized_chain,
            in_order(input),
            *((none, none, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)),
            *self._operands(none),
            code,
            *((none, none, none) if then is None else then._operands(none)),
            none if residual is None else in_order(residual),
            name=_NAME,
        )

    def _operands(self, none: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = none if self.bias is None else bias_or_empty(_NAME, self.bias, self.weight_scale, none)
        return self._packed, self.weight_scale, bias

    def _by_steps(
        self, x: Tensor, norm: nn.LayerNorm | None, residual: Tensor | None, then: QuantizedLinear | None, code: int
    ) -> Tensor:
        """In ops for which ``clipft.export_onnx`` has ONNX's."""
        if self._packed.dtype != torch.int8:
            raise NotImplementedError(
                f"clipft.{_NAME}: torch.onnx.export has no operators for it; clipft.export_onnx(model, processor, "
                "folder, int8=True) writes the float model as int8 ONNX, with the same weights"
            )
        x = in_order(x if norm is None else norm(x))
        bias = bias_or_empty(_NAME, self.bias, self.weight_scale, x)
        x = torch.ops.clipft.quantized_linear(x, self._packed, self.weight_scale, bias, code)
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
            wide = int8.plain_linear(
                _NAME, wide, layer._plain_weight(), layer.weight_scale, layer.bias, layer.activation
            )
        return (wide if residual is None else residual + wide).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"
