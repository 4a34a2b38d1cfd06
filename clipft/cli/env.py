"""``clipft env``: what to paste into a bug report."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from clipft.cli.common import app, examples, user_errors


@app.command(epilog=examples("clipft env --json"))
@user_errors
def env(*, as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of lines.")] = False) -> None:
    """Versions, processor, kernels and threads, for a bug report; and on a Mac, whether its GPU computes what the CPU
    does.
    """
    import torch

    from clipft.environment import environment
    from clipft.families.registry import FAMILIES

    found = environment() | ({"mps": _against_the_cpu("mps")} if torch.backends.mps.is_available() else {})
    found["families"] = {family.title: family.model.__name__ for family in FAMILIES}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        nested = value.items() if isinstance(value, dict) else ()
        typer.echo(f"{name}: {'' if nested else _words(value)}".rstrip())
        for inner, part in nested:
            typer.echo(f"  {inner}: {'not installed' if part is None and name == 'packages' else _words(part)}")


def _against_the_cpu(device: str) -> dict[str, Any]:
    """The largest differences of one batch through the demo's model, as shares of the largest values on the CPU."""
    try:
        ours, theirs = _one_batch("cpu"), _one_batch(device)
    except (RuntimeError, TypeError) as error:  # float64, or an op that the device lacks
        return {"agrees": False, "error": str(error)}
    found = {name: float((theirs[name] - true).abs().max() / true.abs().max()) for name, true in ours.items()}
    return {"agrees": all(difference < 1e-3 for difference in found.values()), **found}


def _one_batch(device: str) -> dict[str, Any]:
    """Embeddings, loss and a gradient, brought to the CPU."""
    import numpy as np
    from PIL import Image

    from clipft.models.loading import load

    model, processor = load("demo")
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    texts = ["a red apple", "a dog", "a house by the sea", "two birds"]
    batch = processor(
        text=texts, images=[Image.fromarray(picture) for picture in noise], return_tensors="pt", padding=True
    )
    output = model.to(device)(**batch.to(device), return_loss=True)
    output.loss.backward()
    gradient = model.visual_projection.weight.grad
    found = {"loss": output.loss, "image": output.image_embeds, "text": output.text_embeds, "gradient": gradient}
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
