"""The ops as functions: losses, LoRA and int8 linear layers, attention, quick_gelu.

Importing it registers the fake kernels and gradients of ``torch.ops.clipft.*``. ``kernels`` is what all have in common,
``distributed`` the losses of several processes, ``reference`` the same in plain torch, ``nn`` the ops as modules.
"""

from clipft._moved import getattr_of

try:
    from clipft.ops.attention import attend, attention
    from clipft.ops.gelu import quick_gelu
    from clipft.ops.int8 import quantize_weight, quantized_linear
    from clipft.ops.int8_lora import int8_lora_linear, quick_gelu_int8_lora_linear
    from clipft.ops.lora import dropout_mask, lora_linear, quick_gelu_lora_linear
    from clipft.ops.losses import contrastive_loss, sigmoid_loss
except RuntimeError as error:
    if "clipft::" not in str(error):
        raise
    raise ImportError(
        f"clipft's C extension is older than the Python code beside it ({error}). Build it again: pip install . or, in "
        "a source tree, python setup.py build_ext --inplace"
    ) from error

__all__ = [
    "attend",
    "attention",
    "contrastive_loss",
    "dropout_mask",
    "int8_lora_linear",
    "lora_linear",
    "quantize_weight",
    "quantized_linear",
    "quick_gelu",
    "quick_gelu_int8_lora_linear",
    "quick_gelu_lora_linear",
    "sigmoid_loss",
]

__getattr__ = getattr_of(__name__)
