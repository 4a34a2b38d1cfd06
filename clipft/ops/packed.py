"""What a layer with packed weights gives to read: its codes, unpacked anew, and written back where they are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["PackedCodes"]


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
