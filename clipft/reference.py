"""The ops in plain torch: the public name of ``clipft.ops.reference``."""

from clipft.ops.reference import (
    attend,
    attention,
    contrastive_loss,
    contrastive_targets,
    dropout_mask,
    int8_input_gradient,
    int8_lora_linear,
    lora_linear,
    quantize_rows,
    quantized_linear,
    quick_gelu,
    sigmoid_loss,
)

__all__ = [
    "attend",
    "attention",
    "contrastive_loss",
    "contrastive_targets",
    "dropout_mask",
    "int8_input_gradient",
    "int8_lora_linear",
    "lora_linear",
    "quantize_rows",
    "quantized_linear",
    "quick_gelu",
    "sigmoid_loss",
]
