"""Modules with packed weights, and what these give to read: codes, unpacked anew, and written back where they are
changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_leaves, tree_map

from clipft.ops import int8
from clipft.ops.kernels import call

__all__ = ["PackedCodes", "PackedWeight"]


class PackedCodes(Tensor):
    """A tensor as any other, of which every change in place, its own or a view's, goes to ``write``. (Of what changes
    memory without torch, as a numpy view does, nobody can know.) Copies and results are plain tensors.
    """

    _whole: Tensor
    _write: Callable[[Tensor], None]

    @classmethod
    def of(cls, whole: Tensor, write: Callable[[Tensor], None]) -> Tensor:
        """``whole`` itself; ``write`` gets it after each change. Within ``torch.func`` there is no memory to watch."""
        return whole if is_functorch_wrapped_tensor(whole) else _watched(whole, whole, write)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch's, and what follows from it for the layer."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            for codes in {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)}.values():
                if func.__name__ == "__get__" and result is None:
                    continue
                memory = codes._whole.untyped_storage().data_ptr()
                if codes.untyped_storage().data_ptr() != memory:
                    raise RuntimeError("weight_int8: expected a change in place or an assignment of weight_int8 itself")
                # what gives its own operand, or nothing, may have written to it
                if result is None or any(leaf is codes for leaf in tree_leaves(result)):
                    codes._write(codes._whole)
                result = tree_map(lambda leaf, of=codes, at=memory: _as_view(leaf, of, at), result)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved and copied without its layer."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).clone()


def _watched(view: Tensor, whole: Tensor, write: Callable[[Tensor], None]) -> PackedCodes:
    codes = view.as_subclass(PackedCodes)
    codes._whole, codes._write = whole, write
    return codes


def _as_view(leaf: Any, codes: PackedCodes, memory: int) -> Any:
    """A result that lies in the memory of the codes is theirs."""
    if type(leaf) is not Tensor or leaf.device != codes._whole.device or leaf.is_sparse:
        return leaf
    return _watched(leaf, codes._whole, codes._write) if leaf.untyped_storage().data_ptr() == memory else leaf


class PackedWeight(nn.Module):
    """Weights as int8 codes, kept as this CPU wants them; on a GPU as they are saved.

    Of its state it says what :class:`clipft.nn.QuantizedLinear` does. A subclass may keep further packings: it names
    their buffers in ``_packings`` and makes them in ``_keep``.
    """

    weight_scale: Tensor
    _packed: Tensor  # as the kernel of its device reads the weights: uint8 bytes on a CPU, else [out, in] int8

    _name: ClassVar[str]  # in messages
    _packings: ClassVar[tuple[str, ...]] = ("_packed",)

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.zeros((out_features, in_features), dtype=torch.int8, device=device)
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        int8.check_weight(self._name, weight, self.weight_scale)
        for name in self._packings:
            self.register_buffer(name, None, persistent=False)
        self._keep(weight)

    def _keep(self, weight: Tensor) -> None:
        """Packs [out, in] codes."""
        self._packed = self._pack(weight)

    def _pack(self, weight: Tensor) -> Tensor:
        if weight.device.type != "cpu":
            return weight
        return cast(Tensor, call(torch.ops.clipft.quantized_pack, weight, name=self._name))

    @property
    def weight_int8(self) -> Tensor:
        """[out, in] int8 in -127 .. 127. On a CPU unpacked anew at each reading, and packed again where it changes."""
        packed = self._packed
        if packed.dtype == torch.int8:
            return packed

        def write(weight: Tensor) -> None:
            nonlocal packed
            if self._packed is not packed:
                raise RuntimeError(
                    f"clipft.{self._name}: weight_int8 was changed since this tensor was read from it; read it again"
                )
            self._keep(weight)
            packed = self._packed

        return PackedCodes.of(self._plain_weight(), write)

    @weight_int8.setter
    def weight_int8(self, weight: Tensor) -> None:
        int8.check_codes(self._name, weight, (self.out_features, self.in_features))
        self._keep(weight.detach().as_subclass(Tensor))

    def _plain_weight(self) -> Tensor:
        packed = self._packed
        if packed.dtype == torch.int8:
            return packed
        op = torch.ops.clipft.quantized_unpack
        return cast(Tensor, call(op, packed, self.out_features, self.in_features, name=self._name))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_int8"] = self._plain_weight()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
        key = f"{prefix}weight_int8"
        if key not in state_dict:
            missing_keys += [key] * strict
            return
        unexpected_keys[:] = [name for name in unexpected_keys if name != key]
        weight, own = state_dict[key], [self.out_features, self.in_features]
        if list(weight.shape) != own:
            error_msgs.append(f"size mismatch for {key}: expected {own}, got {list(weight.shape)}.")
            return
        self.weight_int8 = weight if local_metadata.get("assign_to_params_buffers") else weight.to(self._packed.device)
        scale = self.weight_scale
        int8.check_weight(self._name, torch.empty_like(weight, device=scale.device), scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        packed, weight, scale = (
            [self._buffers[name] for name in self._packings],
            self._plain_weight(),
            self.weight_scale,
        )
        super()._apply(fn, recurse)
        if self.weight_scale.device != scale.device:
            self._keep(fn(weight))
        else:
            self._buffers.update(zip(self._packings, packed, strict=True))
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: tensor for name, tensor in self._buffers.items() if name not in self._packings}
        return {**self.__dict__, "_buffers": {**buffers, "weight_int8": self._plain_weight()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_packed", None)  # of 0.1
        self._buffers = dict(self._buffers)
        weight = cast(Tensor, self._buffers.pop("weight_int8"))
        self._non_persistent_buffers_set = set(self._packings)
        for name in self._packings:
            self.register_buffer(name, None, persistent=False)
        self._keep(weight)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
