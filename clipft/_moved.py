"""Where the names of clipft 0.1 are now, so that old imports and pickles go on working for one version.

Modules became packages of the same name, and many were split, so the table goes by name: ``from clipft.data import
tokenize`` and ``from clipft.vectors import VectorFile`` still work, with a DeprecationWarning. A package hands out its
old names with ``__getattr__ = getattr_of(__name__)``; modules that are gone are found by :class:`_OldModules`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "getattr_of", "install"]

# Old module -> new module -> its names, all of them ("*"), or OLD=NEW where the name changed too; all below clipft.
MOVED: dict[str, dict[str, str]] = {
    "attention": {
        "ops.attention": "*",
    },
    "auto_batch": {
        "training.auto_batch": "*",
    },
    "charts": {
        "report.charts": "*",
    },
    "checkpoints": {
        "training.checkpoints": "StagedCheckpoints check_checkpoint kept=kept_checkpoints last_checkpoint",
    },
    "data": {
        "data.collate": "CLIPDataCollator FrozenFeatures model_inputs most_tokens tokenize",
        "data.rows": "DEFAULT_TEMPLATES PairRows class_names_of class_targets class_text column_names "
        "column_values read_row read_stored render stored_pictures",
        "data.sampling": "EpochSampler mix_seed",
    },
    "demo.drawings": {
        "demo.styles": "*",
    },
    "demo.pictures": {
        "data.drawings": "*",
    },
    "devices": {
        "ops.kernels": "*",
    },
    "doctor": {
        "recipes.doctor": "*",
    },
    "embedding": {
        "inference.encode": "*",
    },
    "evaluation": {
        "data.rows": "check_class_names index_texts",
        "evaluation.tasks": "evaluate_heads evaluate_knn evaluate_linear_probe evaluate_retrieval evaluate_zero_shot "
        "heads_found labels_of=checked_labels",
        "inference.encode": "Pictures Progress class_embeddings embed_images embed_texts evaluating",
    },
    "examples": {
        "report.examples": "*",
    },
    "export": {
        "deploy.export": "*",
    },
    "families": {
        "families.family": "Family Tower",
        "families.registry": "FAMILIES MODEL_NAMES MOST_TOKENS base_model check_model family_of family_of_processor",
    },
    "faults": {
        "training.faults": "*",
    },
    "features": {
        "training.feature_cache": "*",
    },
    "forgetting": {
        "training.regularizers": "StartingPoint",
        "training.wise_ft": "ALPHAS Found RULE Sweep WeightLine check_alpha sweep wise_ft",
    },
    "fused": {
        "families.clip": "FusedCLIPOutput FusedLastLayer",
        "families.projected": "fuse_last_layer",
        "families.forward": "loss_parameters normalised records",
        "models.fused": "FusedCLIPModel FusedQuickGELU _new_fused_model",
    },
    "fused_siglip": {
        "families.siglip": "FusedSiglipOutput",
        "models.fused": "FusedSiglip2Model FusedSiglipModel _new_siglip _new_siglip2",
    },
    "grad_cache": {
        "training.grad_cache": "*",
    },
    "head_training": {
        "training.head_training": "*",
    },
    "heads": {
        "inference.classify": "add_head classify default_templates",
        "models.formats": "CONFIG=HEADS_KEY",
        "models.heads": "ClassificationHead LABEL head_logits heads_of restore_heads with_heads",
    },
    "html_report": {
        "report.html": "*",
    },
    "linear": {
        "ops.gelu": "quick_gelu",
        "ops.lora": "dropout_mask lora_linear quick_gelu_lora_linear",
    },
    "lora": {
        "models.formats": "is_adapter_folder",
        "models.loading": "load_merged",
        "models.lora": "add_lora",
    },
    "lora_layers": {
        "models.lora_layers": "*",
    },
    "losses": {
        "data.rows": "MISSING",
        "training.head_losses": "HEAD_LOSSES balanced_class_weights dice_loss focal_loss head_loss",
    },
    "metrics": {
        "evaluation.metrics": "*",
    },
    "model_card": {
        "report.model_card": "*",
    },
    "models": {
        "models.formats": "DEMO_MODEL QUANT_METHOD",
        "models.freezing": "Model freeze",
        "models.fusing": "check_float fuse unfuse",
        "models.loading": "load",
    },
    "naflex": {
        "families.naflex": "*",
    },
    "nn": {
        "ops.nn": "ContrastiveLoss QuantizedLinear SigmoidLoss",
    },
    "onnx_clip": {
        "inference.onnx_clip": "*",
    },
    "onnx_int8": {
        "deploy.onnx_int8": "*",
    },
    "ops": {
        "ops.distributed": "with_other_ranks",
        "ops.gelu": "quick_gelu",
        "ops.int8": "quantize_weight quantized_linear",
        "ops.lora": "dropout_mask lora_linear quick_gelu_lora_linear",
        "ops.losses": "contrastive_loss sigmoid_loss",
    },
    "pairs": {
        "data.columns": "CAPTION_COLUMNS IMAGE_COLUMNS LABEL_COLUMNS checked_attributes",
        "data.reading": "Reading",
        "data.sources": "load_pairs load_reading read_pairs",
    },
    "pixels": {
        "data.pictures": "*",
    },
    "precision": {
        "training.precision": "*",
    },
    "quantization": {
        "deploy.quantize": "*",
    },
    "quantized": {
        "ops.int8": "*",
    },
    "quantized_clip": {
        "models.formats": "REPORT=INT8_REPORT WEIGHTS=INT8_WEIGHTS",
        "models.int8": "QuantizedAttention QuantizedCLIPModel QuantizedEncoderLayer QuantizedLastLayer "
        "QuantizedMLP QuantizedPatchEmbedding QuantizedVisionEmbeddings check_own_folder "
        "fused_activation install load_quantized",
    },
    "reference": {
        "ops.reference": "contrastive_loss contrastive_targets dropout_mask lora_linear quantize_rows "
        "quantized_linear quick_gelu sigmoid_loss",
    },
    "report": {
        "console": "bar by_class number show title_of",
        "files": "write_json write_text",
        "models.saving": "save_model",
        "training.progress": "ProgressReport",
    },
    "sampling": {
        "data.sampling": "*",
    },
    "schedules": {
        "training.schedules": "*",
    },
    "scoring": {
        "data.drawings": "control_drawings",
        "evaluation.scoring": "Found Scorer gains",
    },
    "sharding": {
        "training.fsdp": "*",
    },
    "shards": {
        "data.shards": "samples shard_paths",
        "data.slices": "Address PROTOCOL read_slice shard_of",
    },
    "sheet": {
        "report.sheet": "*",
    },
    "training": {
        "training.arguments": "CLIPTrainingArguments default_learning_rate",
        "training.trainer": "CLIPTrainer",
    },
    "training_args": {
        "training.arguments": "*",
    },
    "transforms": {
        "data.pictures": "EncodedPicture",
        "data.transforms": "AUGMENTATIONS AUGMENTATION_OPTIONS Augmentation augmentation_set build_transform "
        "stack_pictures",
    },
    "vectors": {
        "inference.vectors": "*",
    },
}
# ---- end of the table ----


def getattr_of(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that has taken an old module's name."""

    def old_name(name: str) -> Any:
        found = _found(module, name)
        if found is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return found

    return old_name


def install() -> None:
    """Let the modules that are gone be imported."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def _found(module: str, name: str) -> Any:
    """An old module's name, with a warning that says where it is now."""
    for new, names in MOVED.get(module.removeprefix("clipft."), {}).items():
        renamed = dict(entry.partition("=")[::2] for entry in names.split())
        if names == "*" or name in renamed:
            place, own = f"clipft.{new}", renamed.get(name) or name
            value = getattr(importlib.import_module(place), own, None)
            if value is not None:
                message = f"{module}.{name} is {place}.{own} now; the old name goes with the next version"
                warnings.warn(message, DeprecationWarning, stacklevel=3)
                return value
    return None


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of 0.1 that are gone. What moved whole is the new module under both names, so that setting an
    attribute of it goes on working; of what was split there is an empty module that looks names up.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Asked last: a module that exists is found before."""
        old = fullname.startswith("clipft.") and fullname.removeprefix("clipft.") in MOVED
        return importlib.machinery.ModuleSpec(fullname, self) if old else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The new module, if there is one for the whole."""
        places = MOVED[spec.name.removeprefix("clipft.")]
        if list(places.values()) != ["*"]:
            return None
        new = f"clipft.{next(iter(places))}"
        warnings.warn(f"{spec.name} is {new} now; the old name goes with the next version", DeprecationWarning, 2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: names are there already, or looked up as they are asked for."""
        own = module.__spec__.loader_state if module.__spec__ else None
        if own is None:
            module.__getattr__ = getattr_of(module.__name__)  # type: ignore[method-assign]
        else:
            if module.__spec__ and module.__spec__.name.partition(".")[2] in sys.modules["clipft"].__all__:
                module.__class__ = _Function  # the import puts it where the package has a function
            module.__spec__ = own  # the import has put that of the old name in its place


class _Function(ModuleType):
    """A module that moved whole, and whose old name is that of a function in it now."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)
