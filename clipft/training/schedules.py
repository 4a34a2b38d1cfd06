"""How fast and when each part of a model learns: layer-wise learning-rate decay, gradual unfreezing, averaged weights.

All three follow from the step number and the parameters' names, so that a resumed run needs no more state than the
averaged weights.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from clipft.families.family import Family, TowerName
from clipft.families.registry import base_model, family_of
from clipft.training.precision import wide_copy

__all__ = ["GradualUnfreezing", "WeightAverage", "depth_from_top", "split_by_depth"]

_logger = logging.getLogger(__name__)
TRAINED_WEIGHTS = "trained_weights.safetensors"


# ---- layer-wise learning-rate decay ----


def depth_from_top(name: str, layers: dict[TowerName, list[str]], family: Family) -> int:
    """How far a parameter is below its tower's output: 0 for projections, last norms, the logit scale and what else is
    in no tower, 1 for the last layer, and one more than the number of layers for the embeddings.

    Args:
        name: the parameter's, with or without peft's prefix.
        layers: the paths of the layers of "text" and "vision", from the input up.
        family: the model's.
    """
    for tower_name, tower in family.towers.items():
        for below, path in enumerate(reversed(layers[tower_name]), 1):
            if _is_in(name, path):
                return below
        if any(_is_in(name, path) for path in tower.stem):
            return len(layers[tower_name]) + 1
    return 0


def _is_in(name: str, path: str) -> bool:
    return re.search(rf"\b{re.escape(path)}(\.|$)", name) is not None


def _depths(model: nn.Module) -> dict[str, int]:
    """Of every parameter, by name."""
    clip, family = base_model(model), family_of(model)
    layers = {name: tower.paths_of_layers(clip) for name, tower in family.towers.items()}
    return {name: depth_from_top(name, layers, family) for name, _ in model.named_parameters()}


def split_by_depth(optimizer: torch.optim.Optimizer, model: nn.Module, layer_decay: float) -> None:
    """Give each group of the optimiser's parameters that lie k below the output the rate ``lr * layer_decay ** k``
    (arXiv:1801.06146, 3.1; as ``layer_decay`` in timm, BEiT and MAE). Before the first step.
    """
    depths = _depths(model)
    depth = {parameter: depths[name] for name, parameter in model.named_parameters()}
    groups, optimizer.param_groups[:] = list(optimizer.param_groups), []
    for group in groups:
        for below in sorted({depth[parameter] for parameter in group["params"]}):
            params = [parameter for parameter in group["params"] if depth[parameter] == below]
            optimizer.add_param_group({**group, "params": params, "lr": group["lr"] * layer_decay**below})


# ---- gradual unfreezing ----


class GradualUnfreezing(TrainerCallback):
    """The top layer of each tower trains first, and one more below it every so many epochs (ULMFiT,
    arXiv:1801.06146, 3.2); what is above the layers trains from the start, the embeddings come last.

    Parameters of a layer that waits are frozen: no gradient, no decay, no moments, and the backward pass ends above
    them. The optimiser has them from the start.
    """

    def __init__(self, model: Callable[[], Any], epochs: float) -> None:
        self.model, self.epochs = model, epochs
        self._layers: list[tuple[int, nn.Parameter]] = []  # with their depth

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the run trains, and how much of it now, which a resumed run knows by its epoch."""
        depths = _depths(self.model())
        trained = ((depths[name], p) for name, p in self.model().named_parameters() if p.requires_grad)
        self._layers = [(depth, parameter) for depth, parameter in trained if depth > 1]
        if not self._layers:
            raise ValueError("gradual_unfreezing: expected layers that train below the top one, all are frozen")
        epochs = state.num_train_epochs if args.max_steps > 0 else args.num_train_epochs
        reached, lowest = math.ceil(epochs / self.epochs - 1e-6), max(depth for depth, _ in self._layers)
        if reached < lowest and state.is_world_process_zero:
            _logger.warning(
                "gradual_unfreezing: %g epochs reach the upper %d of %d layers (the embeddings are one), the others "
                "stay as they are; %.2g reaches all",
                *(epochs, reached, lowest, epochs / lowest),
            )
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unfreeze the layers whose time has come."""
        deepest = 1 + int((state.epoch or 0.0) / self.epochs + 1e-6)
        for depth, parameter in self._layers:
            parameter.requires_grad_(depth <= deepest)

    def finish(self) -> None:
        """The run is over: what it would have trained counts as trained, as before."""
        for _, parameter in self._layers:
            parameter.requires_grad_(True)
        self._layers = []


# ---- averaged weights ----


class WeightAverage(TrainerCallback):
    """An exponential moving average of the weights that train (EMA): evaluated, saved, and left in the model at the
    end.

    After each optimiser step ``average = d * average + (1 - d) * weights`` with ``d = min(decay, (1 + step) / (10 +
    step))``, so that short runs do not stick to the start. A checkpoint's model file holds the average; the weights
    that train lie beside it, for a resume. The average is float32 at least: in 16 bits it would soon stand still.
    """

    def __init__(self, model: Callable[[], Any], decay: float) -> None:
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}  # what trains, while the model has the average

    def _trained(self) -> dict[str, Tensor]:
        """As the run begins; a layer that waits (:class:`GradualUnfreezing`) is among them."""
        parameters = self.model().named_parameters()
        average = self.average
        return {name: p.detach() for name, p in parameters if (name in average if average else p.requires_grad)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the weights as they are, unless a checkpoint was loaded."""
        if not self.average or state.global_step == 0:
            self.average = {}
            self.average = {name: wide_copy(weights) for name, weights in self._trained().items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step of the average."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, weights in self._trained().items():
            self.average[name].lerp_(weights.to(self.average[name].dtype), 1.0 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model has the averaged weights; entered again within, it is left alone."""
        if self._held or not self.average:
            yield
            return
        self._held = {name: weights.clone() for name, weights in self._trained().items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(self._held)
            self._held = {}

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weights in self._trained().items():
            weights.copy_(values[name])

    def finish(self, *, keep: bool) -> None:
        """The run is over: with ``keep`` the averaged weights stay in the model."""
        if keep:
            self._put(self.average)
        self.average = {}

    def save_trained(self, folder: Path) -> None:
        """What a resume needs beside the checkpoint's model, which is the average. Call it within :meth:`in_use`."""
        save_file({name: weights.contiguous() for name, weights in self._held.items()}, folder / TRAINED_WEIGHTS)

    def load_trained(self, folder: Path) -> None:
        """After the checkpoint's model was loaded: that is the average; go on from the weights that trained."""
        path = folder / TRAINED_WEIGHTS
        if not path.is_file():
            raise ValueError(
                f"ema_decay: expected {TRAINED_WEIGHTS} in {folder}, which a run with ema_decay leaves there"
            )
        stored = load_file(path)
        expected = self._trained()
        if stored.keys() != expected.keys():
            odd = sorted(stored.keys() ^ expected.keys())[:3]
            raise ValueError(f"{path}: expected the parameters that train here; differs in {odd}")
        self.average = {name: wide_copy(weights) for name, weights in expected.items()}
        self._put(stored)
