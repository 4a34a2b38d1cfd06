"""Adding LoRA to the models of ``clipft.families``: adapters by target.

peft is an optional dependency, imported where it is used. Its layers on clipft's op: ``clipft.models.lora_layers``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clipft.families.family import Family, TowerName
from clipft.families.registry import check_model, family_of
from clipft.models.frozen import FROZEN, check_float_base, to_int8
from clipft.models.fusing import check_float, fuse

__all__ = ["add_lora", "import_peft", "merged_base"]

_TOWER = re.compile(r"(vision|text)(?:\.(?:last(?P<last>\d+)|(?P<first>\d+)(?:-(?P<end>\d+))?))?")


# ---- adding ----


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.1,
    targets: str | Iterable[str] = ("vision", "text"),
    frozen: str = "float",
) -> Any:
    """Wrap a model in peft with a fresh LoRA adapter, fused (:func:`clipft.fuse`). Only the adapter trains: a saved
    adapter holds its matrices and nothing else, so the logit scale, both projections and all else stay as they are.

    Args:
        model: a ``CLIPModel`` or one of another family without adapters; changed in place, and what the
            adapter holds on to.
        r: the rank.
        alpha: the adapter's output is multiplied by ``alpha / r``.
        dropout: probability in [0, 1) for an element of the adapter's input, in training.
        targets: which linear layers get an adapter; one entry or several, whose union counts. ``"vision"`` and
            ``"text"`` are a tower's ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, ``fc1`` and ``fc2``, of a BERT
            ``query``, ``key``, ``value`` and the three ``dense``; ``"vision.8-11"``, ``"vision.11"`` and
            ``"vision.last2"`` are those of some layers (from 0, ends included); ``"vision.last2:q_proj,v_proj"`` names
            them. A name alone (``"q_proj"``) is looked for in the whole model; so the projections are targets too:
            ``"visual_projection"``, for SigLIP ``"head"``, its text head. (The attention inside its image head is
            torch's own, which no adapter reaches.)
        frozen: ``"int8"``: the linear layers of both towers, which do not train, compute in int8, forward and backward,
            under an adapter or without one; their float weights are gone. What trains, norms, attention, embeddings and
            projections stay as they are. Adapters are saved, switched and disabled as on a float base, and fit it; to
            merge one, save it, and :func:`clipft.load` reads its float base again.

    Returns:
        A ``peft.PeftModel`` in the model's mode (training or evaluation), with one adapter, ``"default"``.

    Raises:
        ImportError: peft is not installed.
        TypeError, ValueError: an argument that does not fit; a target that matches nothing lists what exists.
    """
    peft = import_peft()
    _check_arguments(model, r, alpha, dropout, frozen)
    modules = _target_modules(model, family_of(model), targets)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules)

    adapted = peft.get_peft_model(model, config).train(model.training)
    if frozen == "int8":
        to_int8(adapted)
    return fuse(adapted)


def import_peft() -> Any:
    """The optional dependency."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: pip install 'clipft[lora]' ({error})") from error
    return peft


def merged_base(model: Any) -> Any:
    """The base of a peft model with its adapters merged into its weights, which are rounded to their dtype once: peft
    rounds an adapter in 16 bits, and each of several.

    Raises:
        ValueError: a base in int8.
    """
    check_float_base(model)
    kinds: Any = import_peft().tuners.tuners_utils.BaseTunerLayer
    narrow = {
        parameter: parameter.dtype
        for module in model.modules()
        for parameter in (module.parameters() if isinstance(module, kinds) else ())
        if parameter.is_floating_point() and parameter.dtype.itemsize < torch.float32.itemsize
    }
    for parameter in narrow:
        parameter.data = parameter.data.float()
    base = model.merge_and_unload()
    for parameter, dtype in narrow.items():
        parameter.data = parameter.data.to(dtype)
    return base


def _check_arguments(model: Any, r: Any, alpha: Any, dropout: Any, frozen: Any) -> None:
    check_model(model)

    check_float(model)
    if hasattr(model, "peft_config"):
        raise ValueError("model: expected a model without adapters; its peft model takes more by add_adapter(...)")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r: expected an integer of at least 1, got {r!r}")
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not alpha > 0:
        raise ValueError(f"alpha: expected a number above 0, got {alpha!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
    if frozen not in FROZEN:
        raise ValueError(f"frozen: expected {' or '.join(FROZEN)}, got {frozen!r}")


# ---- targets ----


def _target_modules(model: Any, family: Family, targets: str | Iterable[str]) -> list[str]:
    """Full names of the linear layers that the targets match, in the model's order."""
    entries = [targets] if isinstance(targets, str) else list(targets)
    if not entries:
        raise ValueError("targets: expected at least one, got none")
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    parts = [(entry, *part) for entry in entries for part in _parts(entry, family)]
    chosen = {name for entry, where, own in parts for name in _matches(model, family, linears, entry, where, own)}
    return [name for name in linears if name in chosen]


def _parts(entry: str, family: Family) -> list[tuple[str, tuple[str, ...]]]:
    """What an entry stands for, as (tower and layers or an empty string, names of which one is enough) each."""
    where, colon, names = str(entry).partition(":")
    if colon:
        return [(where.strip(), (name.strip(),)) for name in names.split(",")]
    parts = []
    for part in map(str.strip, where.split(",")):
        tower = next((tower for name, tower in family.towers.items() if part.partition(".")[0] == name), None)
        parts.append(("", (part,)) if tower is None else (part, tower.linears))
    return parts


def _matches(
    model: Any, family: Family, linears: list[str], entry: str, where: str, names: tuple[str, ...]
) -> list[str]:
    prefixes = _layer_prefixes(model, family, entry, where) if where else ("",)
    found = [linear for linear in linears if linear.startswith(prefixes) and linear.rpartition(".")[2] in names]
    if not found:
        wanted = " or ".join(map(repr, names)) or "a linear layer that an adapter can stand beside"
        raise ValueError(f"targets: {entry!r}: {wanted} matches nothing; {_what_exists(model, family, linears)}")
    return found


def _layer_prefixes(model: Any, family: Family, entry: str, where: str) -> tuple[str, ...]:
    match = _TOWER.fullmatch(where)
    if match is None:
        raise ValueError(
            f"targets: {entry!r}: expected vision or text, vision.FIRST-LAST, vision.N or vision.lastN before the "
            f"names, got {where!r}"
        )
    name = cast(TowerName, match[1])
    tower = family.towers[name]
    paths = tower.paths_of_layers(model)
    count = len(paths)
    first, end = 0, count - 1
    if match["last"]:
        first = count - int(match["last"])
    elif match["first"]:
        first = int(match["first"])
        end = int(match["end"] or first)
    if not 0 <= first <= end < count:
        raise ValueError(f"targets: {entry!r}: expected layers from 0 to {count - 1}, which {name} has, got {where!r}")
    return tuple(f"{path}." for path in paths[first : end + 1])


def _what_exists(model: Any, family: Family, linears: list[str]) -> str:
    towers = family.towers
    layers = {name: tower.paths_of_layers(model) for name, tower in towers.items()}
    counts = " and ".join(f"{name} (layers 0-{len(paths) - 1})" for name, paths in layers.items())
    prefixes = tuple(f"{path}." for paths in layers.values() for path in paths)
    inside = dict.fromkeys(name.rpartition(".")[2] for name in linears if name.startswith(prefixes))
    outside = [name for name in linears if not name.startswith(prefixes)]
    return f"there are {counts} with {', '.join(inside)}, and {', '.join(outside)}"
