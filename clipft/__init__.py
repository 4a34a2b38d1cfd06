"""Fine-tune, evaluate and deploy CLIP models, with the hot paths in C.

Public names are imported on first use (PEP 562), so ``import clipft`` loads neither torch nor torchvision.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # which pyproject.toml reads too

if TYPE_CHECKING:
    from clipft import nn as nn
    from clipft import ops as ops
    from clipft import reference as reference
    from clipft.data.collate import CLIPDataCollator as CLIPDataCollator
    from clipft.data.sources import load_pairs as load_pairs
    from clipft.deploy.convert import convert as convert
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
    from clipft.models.resize import resize as resize
    from clipft.ops import contrastive_loss as contrastive_loss
    from clipft.ops import lora_linear as lora_linear
    from clipft.ops import quantized_linear as quantized_linear
    from clipft.ops import sigmoid_loss as sigmoid_loss
    from clipft.recipes.anomaly import anomaly as anomaly
    from clipft.recipes.doctor import doctor as doctor
    from clipft.recipes.evaluate import evaluate as evaluate
    from clipft.recipes.explain import explain as explain
    from clipft.recipes.predict import predict as predict
    from clipft.recipes.train import train as train
    from clipft.training.arguments import CLIPTrainingArguments as CLIPTrainingArguments
    from clipft.training.head_losses import dice_loss as dice_loss
    from clipft.training.head_losses import focal_loss as focal_loss
    from clipft.training.trainer import CLIPTrainer as CLIPTrainer
    from clipft.training.wise_ft import wise_ft as wise_ft

if importlib.util.find_spec("clipft._C") is None:
    raise ImportError(
        "clipft's C extension is not built here: this looks like a source tree. Install the package (pip install .) "
        "and import it from another directory, or build in place with: python setup.py build_ext --inplace"
    )

importlib.import_module("clipft._moved").install()

_MODULE_OF = {
    "contrastive_loss": "clipft.ops",
    "sigmoid_loss": "clipft.ops",
    "lora_linear": "clipft.ops",
    "add_lora": "clipft.models.lora",
    "quantized_linear": "clipft.ops",
    "quantize": "clipft.deploy.quantize",
    "convert": "clipft.deploy.convert",
    "export_onnx": "clipft.deploy.export",
    "OnnxCLIP": "clipft.inference.onnx_clip",
    "embed": "clipft.inference.encode",
    "search": "clipft.inference.vectors",
    "add_head": "clipft.inference.classify",
    "classify": "clipft.inference.classify",
    "focal_loss": "clipft.training.head_losses",
    "dice_loss": "clipft.training.head_losses",
    "load": "clipft.models.loading",
    "freeze": "clipft.models.freezing",
    "resize": "clipft.models.resize",
    "fuse": "clipft.models.fusing",
    "unfuse": "clipft.models.fusing",
    "load_pairs": "clipft.data.sources",
    "CLIPDataCollator": "clipft.data.collate",
    "CLIPTrainer": "clipft.training.trainer",
    "CLIPTrainingArguments": "clipft.training.arguments",
    "evaluate_heads": "clipft.evaluation.tasks",
    "evaluate_knn": "clipft.evaluation.tasks",
    "evaluate_linear_probe": "clipft.evaluation.tasks",
    "evaluate_retrieval": "clipft.evaluation.tasks",
    "evaluate_zero_shot": "clipft.evaluation.tasks",
    "wise_ft": "clipft.training.wise_ft",
    "train": "clipft.recipes.train",
    "evaluate": "clipft.recipes.evaluate",
    "explain": "clipft.recipes.explain",
    "predict": "clipft.recipes.predict",
    "doctor": "clipft.recipes.doctor",
    "anomaly": "clipft.recipes.anomaly",
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
