"""``convert``: a model written in the layout of open_clip or of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from clipft.files import locked
from clipft.models.formats import folder_of
from clipft.models.given import given_model
from clipft.models.saving import save_model, save_open_clip

__all__ = ["convert"]


def convert(model: Any, output: str | Path, *, to: Literal["open_clip", "hf"]) -> None:
    """The same weights and the same preprocessing, under the names of another library.

    Args:
        model: what :func:`clipft.load` takes, ``(model, processor)`` or a :class:`clipft.recipes.run.Run`: a float
            ``CLIPModel``, ``MetaClip2Model``, ``SiglipModel`` or ``OpenCLIPModel``.
        output: a folder, other than the model's own. With ``to="open_clip"``
            ``open_clip.create_model_and_transforms("local-dir:OUTPUT")`` loads it, with ``"hf"`` transformers does.
        to: whose layout to write.

    Raises:
        ValueError: the other library has no model that is the same; the message says what it lacks.
        TypeError: another kind of model.
    """
    if to not in ("open_clip", "hf"):
        raise ValueError(f"to: expected 'open_clip' or 'hf', got {to!r}")
    folder = Path(output)
    if isinstance(model, (str, Path)) and folder_of(model).resolve() == folder.resolve():
        raise ValueError(f"output: expected a folder other than the model's own, got {output}")
    with locked(folder):
        own, processor = given_model(model)
        (save_open_clip if to == "open_clip" else save_model)(own, processor, folder)
