"""Names of the files and keys that models are saved under."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "DEMO_MODEL",
    "FLOAT_WEIGHTS",
    "HEADS_KEY",
    "INT8_REPORT",
    "INT8_WEIGHTS",
    "QUANT_METHOD",
    "WEIGHT_FILES",
    "is_adapter_folder",
]

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
FLOAT_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
INT8_WEIGHTS, INT8_REPORT = "clipft_int8.safetensors", "quantization_report.json"
WEIGHT_FILES = (*FLOAT_WEIGHTS, INT8_WEIGHTS)  # a model folder holds one of these
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's
QUANT_METHOD = "clipft_int8"  # of a configuration's quantization_config
HEADS_KEY = "clipft_heads"  # of a configuration: names and classes of the classification heads


def is_adapter_folder(path: str | Path) -> bool:
    """Whether this is a folder as peft's ``save_pretrained`` writes it."""
    return (Path(path).expanduser() / ADAPTER_CONFIG).is_file()
