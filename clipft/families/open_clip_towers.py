"""Where the parts of an architecture's tower are, found by its shape: open_clip has a hundred of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clipft.families.family import EmbeddingTower

__all__ = ["OpenCLIPTower", "tower_of"]

_RANDOM = ("p", "prob", "drop_prob")  # of modules that drop something in training: their rates
_NUMBERED = re.compile(r"(\D+)\d+")  # layer1, layer2, ...


class OpenCLIPTower(EmbeddingTower):
    """What is known of it stands in the model's configuration, or in the tower itself."""

    def settings(self, model: Any) -> str:
        """Of the whole model: what is a tower's is not apart."""
        return json.dumps([model.config.model_cfg, model.config.text_tower], sort_keys=True)

    def is_frozen(self, model: nn.Module) -> bool:
        """By what is in it: its configuration may be any library's."""
        tower = self.module_of(model)
        rates = (getattr(module, name, None) for module in tower.modules() for name in _RANDOM)
        random = any(isinstance(rate, float) and rate > 0 for rate in rates)
        return not random and not any(parameter.requires_grad for parameter in tower.parameters())


def tower_of(root: nn.Module, name: str) -> OpenCLIPTower:
    """Its layers are the largest list of modules in it, or modules with numbers in their names (``layer1`` ... of a
    ResNet). What was registered before them is the stem; the last after them, or a parameter called so, the
    projection.
    """
    layers = max(_groups(root), key=lambda group: sum(_size(root.get_submodule(path)) for path in group))
    parameters, before, after = _around(root, layers)
    matrices = [path for path in parameters if "proj" in path and "." not in path]
    heads = [path for path in after if next(root.get_submodule(path).parameters(), None) is not None]
    projection = [layers[-1], *heads, *matrices][-1]
    linears = {
        path.rpartition(".")[2]: None
        for layer in layers
        for path, module in root.get_submodule(layer).named_modules(prefix=layer)
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    return OpenCLIPTower(
        module=name,
        layers=tuple(f"{name}.{path}" for path in layers),
        projection=f"{name}.{projection}",
        stem=tuple(f"{name}.{path}" for path in (*parameters, *before) if path != projection),
        linears=tuple(linears),
    )


def _groups(root: nn.Module) -> Iterator[list[str]]:
    """Lists of modules, and modules numbered one after another, by their paths."""
    for path, module in root.named_modules():
        children = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
        if isinstance(module, nn.ModuleList | nn.Sequential):
            yield from [children] if children else []
            continue
        numbered: dict[str, list[str]] = {}
        for child in children:
            if match := _NUMBERED.fullmatch(child.rpartition(".")[2]):
                numbered.setdefault(match[1], []).append(child)
        yield from (group for group in numbered.values() if len(group) > 1)


def _size(module: nn.Module) -> int:
    """Parameters, without those of tables of tokens."""
    tables = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    return sum(p.numel() for p in module.parameters() if id(p) not in tables)


def _around(root: nn.Module, layers: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Parameters and modules that stand beside the layers on the way to them: those before, and those after."""
    parameters: list[str] = []
    before: list[str] = []
    after: list[str] = []
    first, last = layers[0].split("."), layers[-1].split(".")
    for depth, name in enumerate(first):
        prefix = "".join(f"{part}." for part in first[:depth])
        module = root.get_submodule(prefix.rstrip("."))
        children = [child for child, _ in module.named_children()]
        parameters += [f"{prefix}{own}" for own, _ in module.named_parameters(recurse=False)]
        before += [f"{prefix}{child}" for child in children[: children.index(name)]]
        after = [f"{prefix}{child}" for child in children[children.index(last[depth]) + 1 :]] + after
    return parameters, before, after
