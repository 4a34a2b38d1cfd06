"""The ops as modules: the public name of ``clipft.ops.nn``."""

from clipft.ops.nn import ContrastiveLoss, QuantizedLinear, SigmoidLoss

__all__ = ["ContrastiveLoss", "QuantizedLinear", "SigmoidLoss"]
