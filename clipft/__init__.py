"""Fine-tune, evaluate and deploy CLIP models, with the hot paths in C.

Public names are imported on first use (PEP 562), so ``import clipft`` loads neither torch nor torchvision.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from clipft import _moved

if TYPE_CHECKING:
    from clipft import nn as nn
    from clipft import ops as ops
    from clipft import reference as reference
    from clipft.data.collate import CLIPDataCollator as CLIPDataCollator
    from clipft.data.sources import load_pairs as load_pairs
    from clipft.deploy.export import export_onnx as export_onnx
    from clipft.deploy.quantize import quantize as quantize
    from clipft.evaluation.tasks import evaluate_heads as evaluate_heads
    from clipft.evaluation.tasks import evaluate_knn as evaluate_knn
    from clipft.evaluation.tasks import evaluate_linear_probe as evaluate_linear_probe
    from clipft.evaluation.tasks import evaluate_retrieval as evaluate_retrieval
    from clipft.evaluation.tasks import evaluate_zero_shot as evaluate_zero_shot
    from clipft.inference.classify import add_head as add_head
    from clipft.inference.classify import classify as classify
    from clipft.inference.encode import embed as embed
    from clipft.inference.onnx_clip import OnnxCLIP as OnnxCLIP
    from clipft.inference.vectors import search as search
    from clipft.models.freezing import freeze as freeze
    from clipft.models.fusing import fuse as fuse
    from clipft.models.fusing import unfuse as unfuse
    from clipft.models.loading import load as load
    from clipft.models.lora import add_lora as add_lora
    from clipft.ops import contrastive_loss as contrastive_loss
    from clipft.ops import lora_linear as lora_linear
    from clipft.ops import quantized_linear as quantized_linear
    from clipft.ops import sigmoid_loss as sigmoid_loss
    from clipft.training import CLIPTrainingArguments as CLIPTrainingArguments
    from clipft.training.head_losses import dice_loss as dice_loss
    from clipft.training.head_losses import focal_loss as focal_loss
    from clipft.training.trainer import CLIPTrainer as CLIPTrainer
    from clipft.training.wise_ft import wise_ft as wise_ft

__version__ = "0.1.0"

if importlib.util.find_spec("clipft._C") is None:
    raise ImportError(
        "clipft's C extension is not built here: this looks like a source tree. Install the package (pip install .) "
        "and import it from another directory, or build in place with: python setup.py build_ext --inplace"
    )

_moved.install()

_MODULE_OF = {
    "contrastive_loss": "clipft.ops",
    "sigmoid_loss": "clipft.ops",
    "lora_linear": "clipft.ops",
    "add_lora": "clipft.lora",
    "quantized_linear": "clipft.ops",
    "quantize": "clipft.quantization",
    "export_onnx": "clipft.export",
    "OnnxCLIP": "clipft.onnx_clip",
    "embed": "clipft.embedding",
    "search": "clipft.vectors",
    "add_head": "clipft.heads",
    "classify": "clipft.heads",
    "focal_loss": "clipft.losses",
    "dice_loss": "clipft.losses",
    "load": "clipft.models",
    "freeze": "clipft.models",
    "fuse": "clipft.models",
    "unfuse": "clipft.models",
    "load_pairs": "clipft.pairs",
    "CLIPDataCollator": "clipft.data",
    "CLIPTrainer": "clipft.training",
    "CLIPTrainingArguments": "clipft.training",
    "evaluate_heads": "clipft.evaluation",
    "evaluate_knn": "clipft.evaluation",
    "evaluate_linear_probe": "clipft.evaluation",
    "evaluate_retrieval": "clipft.evaluation",
    "evaluate_zero_shot": "clipft.evaluation",
    "wise_ft": "clipft.forgetting",
}
_SUBMODULES = ("nn", "ops", "reference")

__all__ = [*_MODULE_OF, *_SUBMODULES]  # noqa: PLE0604  (names, all of them)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"clipft.{name}")
    else:
        raise AttributeError(f"module 'clipft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
