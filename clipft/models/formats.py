"""Names of the files and keys that models are saved under, and the set that the files of a folder are."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path

from clipft.files import expanded, replace_set

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_PICKLE",
    "ADAPTER_WEIGHTS",
    "CALIBRATION_KEY",
    "DEMO_MODEL",
    "FLOAT_WEIGHTS",
    "HEADS_KEY",
    "INT8_REPORT",
    "INT8_WEIGHTS",
    "MERGED",
    "MODEL_MANIFEST",
    "ONNX_CLASSES",
    "ONNX_INFO",
    "ONNX_MODELS",
    "OPEN_CLIP_CONFIG",
    "OPEN_CLIP_WEIGHTS",
    "PROCESSOR_FILES",
    "QUANT_METHOD",
    "SEEN_ROWS",
    "SENTENCE_CONFIG",
    "SENTENCE_MODULES",
    "WEIGHT_FILES",
    "folder_of",
    "is_adapter_folder",
    "model_set",
]

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
FLOAT_WEIGHTS = (  # in the order in which transformers looks for them; each before the index of its kind
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INT8_WEIGHTS, INT8_REPORT = "clipft_int8.safetensors", "quantization_report.json"
WEIGHT_FILES = (*FLOAT_WEIGHTS, INT8_WEIGHTS)  # a model folder holds one of these
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (  # in the order in which open_clip looks for them
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's
ADAPTER_PICKLE = "adapter_model.bin"  # of older versions of peft, which reads either
QUANT_METHOD = "clipft_int8"  # of a configuration's quantization_config
HEADS_KEY = "clipft_heads"  # of a configuration: names and classes of the classification heads
CALIBRATION_KEY = "clipft_calibration"  # of a configuration: by head or "zero_shot", its temperature and threshold
MERGED = "merged"  # of a LoRA run's folder: the folder with the adapter's base, merged
SEEN_ROWS = "clipft_rows.safetensors"  # digests of the pictures that a run trained and tested on
SENTENCE_MODULES, SENTENCE_CONFIG = "modules.json", "sentence_bert_config.json"  # sentence-transformers'
MODEL_MANIFEST = "clipft_files.json"
ONNX_CLASSES = "class_vectors.npy"  # beside ONNX encoders: of heads, and of the classes of a run
ONNX_INFO, ONNX_MODELS = "clipft_onnx.json", ("image_encoder*.onnx*", "text_encoder*.onnx*", ONNX_CLASSES)
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
_MODELS = (
    *(*WEIGHT_FILES, *_SHARDS, INT8_REPORT, ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE),
    *(OPEN_CLIP_CONFIG, *OPEN_CLIP_WEIGHTS, SENTENCE_MODULES, SENTENCE_CONFIG),
)


def folder_of(name_or_path: str | Path) -> Path:
    """Where a model is, if it is on this machine: a name on the hub is no folder. The demo's model is in this package,
    also where a name has it in the package of another machine.
    """
    path = expanded(name_or_path)
    elsewhere = path.is_absolute() and path.parts[-3:] == DEMO_MODEL.parts[-3:] and not path.exists()
    return DEMO_MODEL if elsewhere or str(name_or_path) == "demo" else path


def is_adapter_folder(path: str | Path) -> bool:
    """Whether this is a folder as peft's ``save_pretrained`` writes it."""
    return (expanded(path) / ADAPTER_CONFIG).is_file()


def model_set(folder: Path, keep: Collection[str] = ()) -> AbstractContextManager[Path]:
    """Where to write a model, whatever its kind, to take the place of whatever model is in the folder; encoders that
    were exported into the same folder go with that. Of the merged model of an earlier LoRA run nothing stays either.
    """
    obsolete = ["config.json", *_MODELS, *PROCESSOR_FILES, ONNX_INFO, *ONNX_MODELS]
    if is_adapter_folder(folder):
        obsolete += [f"{MERGED}/{name}" for name in ("config.json", *_MODELS)]
    return replace_set(folder, MODEL_MANIFEST, obsolete=obsolete, replaces=[ONNX_INFO], keep=keep)
