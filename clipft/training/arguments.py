"""Arguments of ``clipft.CLIPTrainer``, and what is checked of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainingArguments

from clipft.data.rows import DEFAULT_TEMPLATES
from clipft.families.losses import LOSSES, PairLoss
from clipft.families.registry import base_model, family_of
from clipft.training.fsdp import check_version
from clipft.training.head_losses import HEAD_LOSSES

__all__ = ["CLIPTrainingArguments", "check_arguments", "check_loss", "default_learning_rate", "loss_of", "objective_of"]

_HEADS = ("none", "text")
_BASE_SIZE = 150e6  # parameters of ViT-B/32


@dataclass
class CLIPTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of CLIP fine-tuning, and what only CLIP needs.

    ``label_smoothing_factor`` smooths the targets of the contrastive loss and of the heads' cross-entropy. Runs of many
    epochs crop pictures a little; ``clipft.data.transforms.Augmentation`` says when each random change harms.
    """

    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate; 5e-6 to 1e-5 keeps what the model knows."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warm-up: steps, or below 1 a share of all steps."}
    )
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    weight_decay: float = field(default=0.1, metadata={"help": "For weights of two or more dimensions only."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Pairs a process; all are negatives of each other."}
    )
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "As in training, so that the losses compare."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: CLIPTrainer stops before a step that is not finite."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The trainer picks the columns that it needs itself."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume early stopping with the patience it had left."}
    )
    loss: str = field(
        default="auto",
        metadata={"help": "auto: the model's own, contrastive for CLIP and sigmoid for SigLIP, which takes either."},
    )
    head: str = field(
        default="none",
        metadata={"help": "text: a classifier of the labels, started as zero-shot, trained in place of pairs."},
    )
    attributes: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Columns of classes, each with a head whose loss is added with this weight."},
    )
    head_loss: str = field(default="cross_entropy", metadata={"help": "Of heads: cross_entropy, focal or dice."})
    focal_gamma: float = field(default=2.0, metadata={"help": "Of the focal loss: 0 is cross-entropy."})
    class_weights: Any = field(
        default=None,
        metadata={"help": "In the heads' loss: balanced, inverse to the classes' frequency, or a list for label's."},
    )
    augmentation: str = field(
        default="auto",
        metadata={
            "help": "none, crop, light, strong, industrial, medical; auto: crop in runs of more than 5 epochs that "
            "train the image tower, else none. The options below override."
        },
    )
    random_resized_crop: float | None = field(
        default=None, metadata={"help": "Smallest share of the area a crop may keep; 0 for no random crop."}
    )
    horizontal_flip: float | None = field(default=None, metadata={"help": "Probability of a mirror image."})
    color_jitter: float | None = field(
        default=None, metadata={"help": "Strength of random brightness, contrast, saturation, hue."}
    )
    rotation: float | None = field(default=None, metadata={"help": "Largest random rotation, in degrees."})
    noise: float | None = field(
        default=None, metadata={"help": "Largest random noise, as a share of the brightness range."}
    )
    blur: float | None = field(default=None, metadata={"help": "Largest random blur, in pixels of the model's input."})
    caption_templates: list[str] = field(
        default_factory=lambda: list(DEFAULT_TEMPLATES),
        metadata={"help": "Captions from class names, where the data set has labels and no captions."},
    )
    l2_sp: float = field(
        default=0.0, metadata={"help": "Pull to the starting weights: lambda / 2 * |w - w_start|^2 (L2-SP)."}
    )
    distillation: float = field(
        default=0.0, metadata={"help": "Weight of the embeddings' mean squared distance to the starting model's."}
    )
    grad_cache_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Pictures that a tower sees at once; the loss still takes the whole batch."},
    )
    auto_batch: bool = field(
        default=False, metadata={"help": "Choose grad_cache_chunk_size: as many as fit into memory."}
    )
    cache_frozen: bool = field(
        default=True, metadata={"help": "Compute the outputs of a frozen tower once, not in every epoch."}
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder for them, shared by runs; default: features in output_dir."}
    )
    class_balanced: bool = field(
        default=False, metadata={"help": "Batches with equally many pairs of each class; needs labels."}
    )
    hard_negatives: int = field(
        default=0,
        metadata={
            "help": "Batches of pairs that are hard to tell apart, mined each epoch: most meet so many of their "
            "hardest negatives."
        },
    )
    gradual_unfreezing: float = field(
        default=0.0,
        metadata={"help": "Epochs after which one more layer trains, from the top down; 0: all from the start."},
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of a layer over that of the layer above it."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Evaluate and keep an average of the weights over steps; 0.999 is usual."}
    )
    cudnn_benchmark: bool = field(
        default=False, metadata={"help": "Let cuDNN time its kernels; batches have one size."}
    )

    def __post_init__(self) -> None:
        self.greater_is_better = _greater_is_better(self)
        super().__post_init__()
        if self.loss not in ("auto", *LOSSES):
            raise ValueError(f"loss: expected one of {', '.join(('auto', *LOSSES))}, got {self.loss!r}")
        for name in ("l2_sp", "distillation"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if self.grad_cache_chunk_size is not None and self.grad_cache_chunk_size < 1:
            raise ValueError(f"grad_cache_chunk_size: expected at least 1, or None, got {self.grad_cache_chunk_size}")
        if self.auto_batch and self.grad_cache_chunk_size is not None:
            raise ValueError("auto_batch: chooses grad_cache_chunk_size, expected one of the two")
        if self.hard_negatives < 0 or (self.hard_negatives and self.class_balanced):
            raise ValueError(
                f"hard_negatives: expected a number of at least 0, and 0 with class_balanced, got {self.hard_negatives}"
            )
        if self.hard_negatives and self.hard_negatives >= (pairs := self.train_batch_size * self.world_size):
            raise ValueError(
                f"hard_negatives: expected fewer than the {pairs} pairs of a batch, got {self.hard_negatives}"
            )
        if self.gradual_unfreezing < 0.0:
            raise ValueError(f"gradual_unfreezing: expected epochs, at least 0, got {self.gradual_unfreezing}")
        if self.gradual_unfreezing and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # the layers that wait
        _check_heads(self)
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay: expected a factor in (0, 1], got {self.layer_decay}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay: expected a decay in [0, 1), got {self.ema_decay}")
        if self.cudnn_benchmark and self.full_determinism:
            raise ValueError(
                "cudnn_benchmark: its choice of kernels varies between runs; not with full_determinism=True"
            )


def _greater_is_better(args: CLIPTrainingArguments) -> bool | None:
    """As given; of a rank the least is best, as Trainer has it for losses."""
    of_rank = args.greater_is_better is None and (args.metric_for_best_model or "").endswith("rank")
    return False if of_rank else args.greater_is_better


def objective_of(args: CLIPTrainingArguments, direction: str, metrics: dict[str, float]) -> float:
    """What a search for hyper-parameters goes by where it names nothing: ``metric_for_best_model``, else the loss where
    it minimises, and where it maximises the sum of the metrics of which more is better.
    """
    if args.metric_for_best_model or direction == "minimize":
        name = args.metric_for_best_model or "loss"
        return metrics[name if name.startswith("eval_") else f"eval_{name}"]
    others = ("loss", "rank", "_runtime", "_per_second", "_time", "epoch")
    return sum(value for name, value in metrics.items() if not name.endswith(others))


def _check_heads(args: CLIPTrainingArguments) -> None:
    for name, known in (("head", _HEADS), ("head_loss", HEAD_LOSSES)):
        if getattr(args, name) not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(args, name)!r}")
    for name, weight in args.attributes.items():
        if not 0.0 < weight < math.inf:
            raise ValueError(f"attributes: {name!r}: expected a weight above 0, got {weight!r}")
    if not 0.0 <= args.focal_gamma < math.inf:
        raise ValueError(f"focal_gamma: expected a number of at least 0, got {args.focal_gamma}")
    _check_class_weights(args)
    if args.head == "none" and not args.attributes and (args.head_loss, args.class_weights) != ("cross_entropy", None):
        raise ValueError("head_loss, class_weights: there is no head; expected head='text', or attributes")
    if args.head == "none":
        return
    if args.hard_negatives:
        raise ValueError("hard_negatives: they are those of pairs, whose place head='text' takes")
    if args.loss != "auto":
        raise ValueError(f"head: it takes the place of the loss over pairs, expected loss 'auto', got {args.loss!r}")
    if "label" in args.attributes:
        raise ValueError("attributes: 'label' has the head that head='text' names already")
    if args.label_smoothing_factor and args.head_loss != "cross_entropy":
        raise ValueError(f"label_smoothing_factor: not in the {args.head_loss} loss, expected 0.0")


def _check_class_weights(args: CLIPTrainingArguments) -> None:
    weights = args.class_weights
    if weights is None or weights == "balanced":
        return
    numbers = isinstance(weights, (list, tuple)) and all(isinstance(w, (int, float)) for w in weights)
    if not numbers or not all(0.0 < w < math.inf for w in weights):
        raise ValueError(f"class_weights: expected 'balanced' or a list of numbers above 0, got {weights!r}")
    if args.head == "none" and "label" not in args.attributes:
        raise ValueError("class_weights: a list is for the classes of label, which has no head here; try 'balanced'")


def default_learning_rate(model: nn.Module, *, lora: bool = False) -> float:
    """The peak rate where nobody names one: 1e-5 at ViT-B/32's 150 million parameters, inversely to the size, between
    5e-6 and 2e-4; for an adapter, whose weights start from nothing, 20 times that, 2e-3 at most.

    The large checkpoints know much that a high rate would undo, hence the usual 5e-6 to 1e-5; what a small model knows
    is not worth that care, and in the epochs that people train it would hardly move.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    rate = min(max(1e-5 * _BASE_SIZE / max(size, 1), 5e-6), 2e-4)
    return min(20.0 * rate, 2e-3) if lora else rate


def check_arguments(args: Any, kwargs: dict[str, Any], *, own_loss: bool = False) -> None:
    """That a trainer can be made of these; ``kwargs`` are its own, ``own_loss``: it has a loss that is a function.

    Raises:
        TypeError, ValueError: it cannot.
    """
    if not isinstance(args, CLIPTrainingArguments):
        raise TypeError(f"args: expected clipft.CLIPTrainingArguments, got {type(args).__name__}")
    if args.n_gpu > 1:
        raise ValueError(
            f"args: {args.n_gpu} GPUs in one process would split the negatives; start one process each (torchrun "
            f"--nproc-per-node {args.n_gpu}), or choose one with CUDA_VISIBLE_DEVICES"
        )
    check_version(args)
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy: expected 'random', which resumes exactly, got {args.train_sampling_strategy!r}"
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16: needs a GPU; on a CPU train in bfloat16 (bf16=True) or float32")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func: CLIPTrainer computes the loss named by args.loss; give loss=, a function, for another"
        )
    if own_loss and (args.loss, args.head, args.label_smoothing_factor) != ("auto", "none", 0.0):
        raise ValueError(
            "loss: a function of your own takes the place of the loss over pairs; expected args.loss 'auto', head "
            f"'none' and label_smoothing_factor 0.0, got {args.loss!r}, {args.head!r} and {args.label_smoothing_factor}"
        )


def loss_of(args: CLIPTrainingArguments, model: Any) -> PairLoss:
    """The loss over pairs that is named, or the model's own."""
    return LOSSES[family_of(model).loss if args.loss == "auto" else args.loss]


def check_loss(args: CLIPTrainingArguments, model: Any) -> None:
    """That this model can be trained with the loss named.

    Raises:
        ValueError: it cannot.
    """
    loss = loss_of(args, model)
    if args.head != "none":
        return
    if loss.needs_bias and not hasattr(base_model(model), "logit_bias"):
        others = " or ".join(repr(other.name) for other in LOSSES.values() if not other.needs_bias)
        raise ValueError(
            f"loss: {loss.name!r} needs the logit bias that a SigLIP has; a {type(base_model(model)).__name__} has "
            f"none: choose {others}"
        )
    if args.label_smoothing_factor and not loss.smooths:
        raise ValueError(
            f"label_smoothing_factor: the {loss.name} loss has no distribution to smooth, expected 0.0, got "
            f"{args.label_smoothing_factor}"
        )
