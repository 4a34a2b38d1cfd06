"""The options of ``clipft train`` in groups, as ``--help`` shows them."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

__all__ = ["PANELS", "Grouped"]

PANELS = {
    "Data": ("data", "eval_data", "template", "on_bad_row", "allow_outside", "workers", "seed"),
    "Model and what trains": (
        *("model", "freeze", "gradual_unfreezing"),
        *("lora_r", "lora_alpha", "lora_dropout", "lora_targets"),
    ),
    "Schedule": ("epochs", "lr", "warmup_ratio", "layer_decay", "ema_decay", "weight_decay", "max_grad_norm"),
    "Batches, memory and speed": (
        *("batch_size", "class_balanced", "hard_negatives", "grad_cache_chunk_size", "auto_batch"),
        *("gradient_checkpointing", "precision"),
    ),
    "Loss": ("loss", "label_smoothing"),
    "Heads": ("head", "attribute", "head_loss", "class_weights", "focal_gamma"),
    "Augmentation": (
        *("augmentation", "random_resized_crop", "horizontal_flip", "color_jitter", "rotation", "noise", "blur"),
    ),
    "Against forgetting": ("control_data", "l2_sp", "distillation", "wise_ft"),
    "The run": ("output", "config", "resume", "early_stopping_patience", "metric", "report_to"),
}


class Grouped(TyperCommand):
    """A command that shows its options under these headings; one that none names comes last, under "Options"."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Plain text, which no width cuts."""
        options = {param.name: param for param in self.get_params(ctx)}
        rest = options.keys() - {name for names in PANELS.values() for name in names}
        for panel, names in (*PANELS.items(), ("Options", sorted(rest))):
            records = [options[name].get_help_record(ctx) for name in names if name in options]
            with formatter.section(panel):
                formatter.write_dl([record for record in records if record is not None])
