"""Frozen linear layers in int8, of a model that trains: forward and backward passes at the speed of int8 products.

An instance's class is swapped for :class:`FrozenLinear` and its float weight for codes; names, biases and all that
trains stay. The gradients are those of the model that runs forward (SwitchBack, arXiv:2304.13013, did so on GPUs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import clipft._C
from clipft.families.registry import base_model, family_of
from clipft.ops.int8 import quantize_weight, quantized_linear
from clipft.ops.int8_lora import Int8Weight, int8_lora_linear

__all__ = [
    "FROZEN",
    "FrozenLinear",
    "check_float_base",
    "float_linears",
    "float_state",
    "frozen_linears",
    "naming_layer",
    "rounding_errors",
    "to_float",
    "to_int8",
    "tower_linears",
]

FROZEN = ("float", "int8")  # what is frozen may compute in
_ROWS = 512  # of a layer's input that errors are measured on
_WRITTEN = (
    "model: its frozen layers are int8 codes, which an adapter cannot be merged into and which are not saved: save "
    "the adapter with model.save_pretrained(FOLDER), and clipft.load(FOLDER) merges it into the float base"
)
_INITIALISED = "; an adapter whose initialisation changes its base (pissa, olora, ...) is for a float one"


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` that does not train, with its weight in int8. Made by :func:`to_int8` only.

    Attributes:
        codes: the weight.
        float_dtype: of the weight that the codes were made of.
    """

    codes: Int8Weight
    float_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the parameter's name in torch)
        """[..., in] -> [..., out], rounded to int8 codes; gradients pass through."""
        return int8_lora_linear(input, self.codes, self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] in ``float_dtype``, made anew of the codes, to read: for peft, which asks for a layer's dtype and
        device, and computes with the weight in its variants. Writing to its ``data``, as a merge does, is refused."""
        codes, scale = self.codes.weight_int8.as_subclass(Tensor), self.codes.weight_scale
        return (codes.float() * scale[:, None]).to(self.float_dtype).as_subclass(_Read)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Of a float model's state too, whose weight has to be the one that the codes were made of."""
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None:
            _checked(prefix.removesuffix("."), self, weight)
            state_dict.update(self.codes.state_dict(prefix=f"{prefix}codes."))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Read(Tensor):
    """A layer's weight, which is not where it would be written to."""

    # what is computed from it is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        raise ValueError(_WRITTEN + _INITIALISED)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError(_WRITTEN + _INITIALISED)


# ---- which layers ----


def tower_linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of both towers' layers, float or int8, alone or under an adapter, by the names that they have
    in the base model without adapters.
    """
    base = base_model(model)
    found = {}
    for tower in family_of(model).towers.values():
        for path in tower.paths_of_layers(base):
            for name, module in base.get_submodule(path).named_modules():
                own = name.removesuffix(".base_layer")
                if type(module) in (nn.Linear, FrozenLinear) and own.rpartition(".")[2] in tower.linears:
                    found[f"{path}.{own}"] = module
    return found


def float_linears(model: Any) -> dict[str, nn.Linear]:
    """Of :func:`tower_linears` what may become int8: nothing in it trains.

    Raises:
        ValueError: an adapter is of a layer's weight instead of the layer, so that it needs that in float.
    """
    linears = tower_linears(model)
    names = {linear: name for name, linear in linears.items()}
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if hasattr(module, "parameter_name") and base in names:
            raise ValueError(
                f"target_parameters: expected target_modules; in int8 {names[base]} has no float weight to adapt"
            )
    return {
        name: linear
        for name, linear in linears.items()
        if type(linear) is nn.Linear and not any(parameter.requires_grad for parameter in linear.parameters())
    }


def frozen_linears(model: Any) -> dict[str, FrozenLinear]:
    """Of :func:`tower_linears` what is int8."""
    return {name: linear for name, linear in tower_linears(model).items() if isinstance(linear, FrozenLinear)}


def check_float_base(model: Any) -> None:
    """That no layer is int8. What only saves itself as a model does has none.

    Raises:
        ValueError: one is.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(module, FrozenLinear) for module in modules):
        raise ValueError(_WRITTEN)


# ---- what rounding does ----


def rounding_errors(
    model: Any, run: Callable[[], Any], linears: Mapping[str, nn.Linear] | None = None
) -> dict[str, float]:
    """Of each of these layers, or of :func:`float_linears`, that is called within ``run``: the root of the mean squared
    error of its outputs in int8, over what they vary by.

    Raises:
        ValueError: a weight that is NaN or Inf.
    """
    errors: dict[str, float] = {}

    def measure(name: str, linear: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, linear.in_features)
        x = x[torch.linspace(0, len(x) - 1, min(len(x), _ROWS)).long()].float()
        weight = linear.weight.detach().float()
        with naming_layer(name):
            codes = quantize_weight(weight)
        want, got = F.linear(x, weight), quantized_linear(x, *codes)
        error = float((got - want).norm() / (want - want.mean(dim=0)).norm().clamp_min(1e-30))
        errors[name] = max(error, errors.get(name, 0.0))

    measured = (float_linears(model) if linears is None else linears).items()
    hooks = [linear.register_forward_pre_hook(partial(measure, name)) for name, linear in measured]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return errors


@contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """An error of its weight, as NaN is, names it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"model: {name}: {error}") from error


# ---- there and back ----


def to_int8(model: Any, names: Iterable[str] | None = None) -> None:
    """Let these layers, or all of :func:`float_linears`, compute in int8, in place. A float weight goes as its codes
    are made.

    Raises:
        ValueError: a weight that is NaN or Inf.
    """
    linears = float_linears(model)
    for name in linears if names is None else names:
        linear: Any = linears[name]
        with naming_layer(name):
            codes = Int8Weight.from_weight(linear.weight.detach())
        kept = linear.weight.dtype
        del linear.weight
        linear.__class__ = FrozenLinear
        linear.codes, linear.float_dtype = codes, kept
    clipft._C.trim_heap()  # blocks of the size of a weight lie between others on it
    _keep_from_ddp(model)


def to_float(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Undo :func:`to_int8`.

    Args:
        weights: of each layer of :func:`frozen_linears`, the one that its codes were made of.

    Raises:
        ValueError: one that they were not made of; no layer has changed then.
    """
    layers = frozen_linears(model)
    floats = {name: _checked(name, layer, weights[name]) for name, layer in layers.items()}
    for name, layer in layers.items():
        linear = cast(Any, layer)
        del linear.codes, linear.float_dtype
        linear.__class__ = nn.Linear
        linear.weight = nn.Parameter(floats.pop(name), requires_grad=False)
        linear._parameters["bias"] = linear._parameters.pop("bias")  # after the weight, as optimisers number them
    _keep_from_ddp(model)


def _keep_from_ddp(model: nn.Module) -> None:
    """Codes do not change, and each process has packed them for its own CPU: DistributedDataParallel, which would send
    those of the first to the others before each pass, leaves them alone, beside what it was told to before."""
    ours = [name for name, module in model.named_modules() if isinstance(module, Int8Weight)]
    buffers = [f"{name}.{buffer}" for name in ours for buffer, _ in model.get_submodule(name).named_buffers()]
    others: list[str] = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list({*others, *buffers}))


def float_state(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` that a model without adapters would have in float. Arguments and errors are those of
    :func:`to_float`.
    """
    layers = frozen_linears(model)
    codes = tuple(f"{name}.codes." for name in layers)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(codes)}
    return own | {f"{name}.weight": _checked(name, layer, weights[name]) for name, layer in layers.items()}


def _checked(name: str, layer: FrozenLinear, weight: Tensor) -> Tensor:
    """The weight in its layer's dtype and place."""
    weight = weight.detach().to(layer.codes.weight_scale.device, layer.float_dtype)
    if not _made_of(layer, weight):
        raise ValueError(f"{name}: expected the weight that its int8 codes were made of, got another")
    return weight


def _made_of(layer: FrozenLinear, weight: Tensor) -> bool:
    if weight.shape != (layer.out_features, layer.in_features) or not torch.isfinite(weight).all():
        return False
    codes, scale = quantize_weight(weight)
    own = layer.codes.weight_int8.as_subclass(Tensor)
    return torch.equal(own, codes) and torch.equal(layer.codes.weight_scale, scale)
