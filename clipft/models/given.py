"""What public functions take for a model: a folder, a name, a run, or the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["given_model"]


def given_model(
    model: Any, processor: Any = None, load_name: Callable[[str | Path], tuple[Any, Any]] | None = None
) -> tuple[Any, Any]:
    """A model and its processor, of whatever a public function is given for them.

    Args:
        model: a folder or name, which ``load_name`` takes, ``(model, processor)``, a run, or the model itself.
        processor: of a model itself; of the others it takes the place of their own.
        load_name: of a folder or name; default: :func:`clipft.load`.

    Raises:
        TypeError: ``processor`` is something else, as where what comes after it is not given by its name.
    """
    if processor is not None and not hasattr(processor, "image_processor"):
        raise TypeError(
            f"processor: expected a model's processor or None, got {processor!r:.80}; what comes after it goes by its "
            "name, as in images=[...]"
        )
    if isinstance(model, (str, Path)):
        from clipft.models.loading import load  # needs torchvision, which a model itself does not

        model = (load_name or load)(model)
    elif hasattr(model, "model") and hasattr(model, "processor"):
        model = model.model, model.processor
    if isinstance(model, tuple):
        model, own = model
        processor = own if processor is None else processor
    return model, processor
