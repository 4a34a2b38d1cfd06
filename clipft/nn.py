"""The ops as modules: the public name of ``clipft.ops.nn``."""

from clipft.ops.int8_lora import Int8Weight
from clipft.ops.nn import ContrastiveLoss, QuantizedLinear, SigmoidLoss

__all__ = ["ContrastiveLoss", "Int8Weight", "QuantizedLinear", "SigmoidLoss"]
